"""The pickle reader: every form and type is read, nothing runs, every bad file is one line."""

import io
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pickle_writer as write
import pytest
from pickle_writer import call, mapping, named, plain

from lfp_jax.errors import UserError
from lfp_jax.weights import pickles
from lfp_jax.weights.machine import Opaque

GOLDEN = Path(__file__).parent / "golden"
VALUES = np.array([[0, 1, 2], [1, 0, 3]])


@pytest.fixture
def read(tmp_path):
    """Return a function that writes bytes to a file and reads it."""

    def run(content):
        path = tmp_path / "file.pt"
        path.write_bytes(content)
        return pickles.read(path)

    return run


def _fails(read, content, match):
    with pytest.raises(UserError, match=match) as raised:
        read(content)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("dtype", write.STORAGES, ids=str)
def test_every_type_in_both_forms(read, form, dtype):
    torch, array = write.Torch(), VALUES.astype(dtype)
    body = mapping({"x": torch.tensor(array), "scalar": torch.tensor(array[0, 1])})
    result = read(getattr(torch, form)(body))
    assert result["x"].dtype == dtype
    np.testing.assert_array_equal(result["x"], array)
    assert result["scalar"].shape == ()


@pytest.mark.parametrize("dtype", [np.float32, np.complex64, np.uint8, ml_dtypes.bfloat16])
def test_big_endian_zip(read, dtype):
    torch, array = write.Torch(), VALUES.astype(dtype)
    body = torch.tensor(array)
    unit = array.dtype.itemsize // (2 if array.dtype.kind == "c" else 1)
    torch.arrays = [array.view(f"u{unit}").byteswap()]
    np.testing.assert_array_equal(read(torch.zip(body, byteorder="big")), array)


def test_newer_types_over_untyped_storages(read):
    array = VALUES.astype(np.uint16)
    torch = write.Torch()
    torch.arrays.append(array)
    parts = (plain("storage"), named("torch.storage", "UntypedStorage"), plain("0"), plain("cpu"))
    held = b"(" + b"".join(parts) + plain(12) + b"tQ"
    rebuild = named("torch._utils", "_rebuild_tensor_v3")
    arguments = (plain(0), plain((2, 3)), plain((3, 1)), plain(False), plain({}))
    body = call(rebuild, held, *arguments, named("torch", "uint16"))
    np.testing.assert_array_equal(read(torch.zip(body)), array)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_strides_and_offsets(read, form):
    torch = write.Torch()
    torch.tensor(np.arange(12, dtype=np.float32))
    held = write.storage(0, np.dtype(np.float32), 12)
    views = {
        "transposed": write.view(held, offset=1, shape=(3, 2), strides=(1, 5)),
        "expanded": write.view(held, offset=11, shape=(4, 1), strides=(0, 0)),
        "empty": write.view(held, offset=0, shape=(0, 9), strides=(9, 1)),
    }
    result = read(getattr(torch, form)(mapping(views)))
    np.testing.assert_array_equal(result["transposed"], [[1, 6], [2, 7], [3, 8]])
    np.testing.assert_array_equal(result["expanded"], [[11]] * 4)
    assert result["empty"].shape == (0, 9)


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize(
    ("offset", "shape", "strides", "match"),
    [
        (0, (13,), (1,), "reaches element 12"),
        (10, (3,), (1,), "reaches element 12"),
        (0, (3, 3), (5, 1), "reaches element 12"),
        (-1, (2,), (1,), "whole numbers from 0"),
        (0, (2,), (-1,), "whole numbers from 0"),
        (0, (2, 2), (1,), "strides"),
        (0, (2**40, 2**40), (0, 0), "repeats a storage"),
        (0, (2**61,) * 3, (1, 1, 1), "reaches element"),
        (0, (1,) * 40, (1,) * 40, "at most 32"),
        (0, (1.5,), (1,), "whole numbers"),
    ],
)
def test_a_view_outside_its_storage(read, form, offset, shape, strides, match):
    torch = write.Torch()
    torch.tensor(np.zeros((12,), np.float32))
    held = write.storage(0, np.dtype(np.float32), 12)
    body = write.view(held, offset=offset, shape=shape, strides=strides)
    _fails(read, getattr(torch, form)(body), match)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_pickles_of_python_and_numpy(read, protocol):
    value = {
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "by column": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big-endian": np.arange(3, dtype=">i4"),
        "scalar": np.float64(0.5),
        "set": {1, 2},
        "frozen": frozenset(("a",)),
        "nested": [(1, 2.5, None, True), b"bytes", bytearray(b"more"), 2**80, -1, "\u00fc"],
        3: {"text": "x"},
    }
    value["shared"] = value["nested"]
    result = read(pickle.dumps(value, protocol))
    assert result.keys() == value.keys()
    for key in ("array", "by column", "big-endian"):
        np.testing.assert_array_equal(result[key], value[key])
    for key in ("set", "frozen", "nested", 3):
        assert result[key] == value[key]
    assert result["shared"] is result["nested"]
    assert type(result["scalar"]) is float


def test_nvlabs_objects_become_inert_records(read):
    array = np.ones((2, 3), np.float32)
    made = write.nvlabs_module("Generator", tensors={"weight": array}, z_dim=4)
    module = read(write.file(mapping({"G": made}), protocol=3))["G"]
    assert isinstance(module, Opaque)
    assert module.name == "Generator"
    assert module.state["z_dim"] == 4
    np.testing.assert_array_equal(module.state["_parameters"]["weight"], array)


def test_an_unknown_storage_is_inert_until_a_tensor_needs_it(read):
    parts = (plain("storage"), named("torch", "QInt8Storage"), plain("0"), plain("cpu"), plain(2))
    held = b"(" + b"".join(parts) + b"tQ"
    quantized = call(named("torch._utils", "_rebuild_qtensor"), held, plain(0))
    unused = read(write.Torch().zip(mapping({"x": quantized})))["x"]
    assert unused.name == "torch._utils._rebuild_qtensor"
    body = write.view(held, offset=0, shape=(2,), strides=(1,))
    _fails(read, write.Torch().zip(body), "torch.QInt8Storage")


def test_namespaces_are_dicts_and_unknown_classes_are_inert(read):
    namespace = call(named("argparse", "Namespace")) + plain({"size": 64}) + b"b"
    callback = named("pytorch_lightning.callbacks", "ModelCheckpoint")
    body = b"}(" + plain("args") + namespace + callback + plain(1) + b"u"
    result = read(write.file(body))
    assert result["args"] == {"size": 64}
    [key] = [key for key in result if key != "args"]
    assert key.name == "pytorch_lightning.callbacks.ModelCheckpoint"


@pytest.mark.parametrize("name", ["sg2_rosinality/model.pt", "sg2_nvlabs/model.pkl"])
def test_golden_files_are_read(name):
    assert isinstance(pickles.read(GOLDEN / name), dict)


COMMAND = plain("touch RAN")
HOSTILE = {
    "os.system": call(named("os", "system"), COMMAND),
    "posix.system": call(named("posix", "system"), COMMAND),
    "eval": call(named("builtins", "eval"), plain("open('RAN', 'w')")),
    "exec": call(named("__builtin__", "exec"), plain("open('RAN', 'w')")),
    "open": call(named("io", "open"), plain("RAN"), plain("w")),
    "getattr": call(named("builtins", "getattr"), named("os", "x"), plain("system")),
    "inst": b"(" + COMMAND + b"ios\nsystem\n",
    "obj": b"(" + named("os", "system") + COMMAND + b"o",
    "newobj": named("subprocess", "Popen") + b"(" + COMMAND + b"t\x81",
    "stack global": plain("os") + plain("system") + b"\x93(" + COMMAND + b"tR",
    "build": named("os", "system") + plain({"__reduce__": 1}) + b"b",
    "import": named("this_module_must_not_be_imported", "x"),
    "missing table entry": named("lfp_jax.weights.machine", "Machine"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_a_file_names_is_run(read, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    _fails(read, write.file(HOSTILE[name]), "class '.*', which is not run")
    hidden = read(write.file(mapping({"unused": HOSTILE[name]})))
    assert isinstance(hidden["unused"], Opaque)
    _fails(read, write.Torch().zip(HOSTILE[name]), "class '.*', which is not run")
    _fails(read, write.Torch().legacy(HOSTILE[name]), "class '.*', which is not run")
    assert os.listdir(tmp_path) == ["file.pt"]
    assert set(sys.modules) == before


def test_a_whole_module_fails_clearly(read):
    module = call(named("models", "Net")) + plain({"_parameters": {}}) + b"b"
    _fails(read, write.Torch().zip(module), "'models.Net'.*state_dict")


def _deep(n):
    return b"]" * n + b"a" * (n - 1)


BAD = {
    "empty": (b"", "is empty"),
    "text": (b"hello, this is no checkpoint\n", "starts with 'hello"),
    "protocol 0": (b"cos\nsystem\n(S'touch RAN'\ntR.", "starts with 'cos"),
    "protocol 9": (b"\x80\x09N.", "no pickle of protocol 2 to 5"),
    "one byte": (b"\x80", "no torch file"),
    "no end": (b"\x80\x02}", "damaged|no end"),
    "unknown opcode": (b"\x80\x02\xff.", "damaged"),
    "extension": (write.file(b"\x82\x01"), "EXT1"),
    "outside buffer": (write.file(b"\x97"), "NEXT_BUFFER"),
    "text persistent id": (write.file(b"Pabc\n"), "PERSID"),
    "unknown memo": (write.file(b"h\x05"), "memo 5"),
    "empty stack": (write.file(b"0"), "damaged"),
    "huge bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.", "damaged"),
    "huge text": (b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x.", "damaged"),
    "huge int": (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.", "damaged"),
    "many operations": (write.file(b"]0" * 1_100_000 + b"N"), "more work or memory"),
    "nested key": (write.file(b"}" + b")" + b"\x85" * 10_000 + b"Ns"), "nested object as a key"),
    "copied lists": (
        write.file(plain(list(range(1000))) + b"r\xff\xff\0\0]("
                   + call(named("builtins", "list"), b"j\xff\xff\0\0") * 3000 + b"e"),
        "more work or memory",
    ),
    "call of an int": (write.file(plain(1) + b")R"), "calls a int"),
    "items of an int": (write.file(plain(1) + plain(2) + plain(3) + b"s"), "sets items of a int"),
    "storage in a plain pickle": (
        write.file(write.storage(0, np.dtype(np.float32), 1)), "the file holds none"
    ),
    "blob in a blob": (
        write.Torch().legacy(call(named("torch.storage", "_load_from_bytes"), plain(b"x"))),
        "inside a torch file",
    ),
    "blob of text": (
        write.file(call(named("torch.storage", "_load_from_bytes"), b"C\x03abc"), protocol=3),
        "no torch file",
    ),
    "object array": (
        pickle.dumps(np.array([os.getcwd, None], dtype=object), 2), "not of numbers"
    ),
    "zip of another kind": (b"", "no torch checkpoint"),
}  # fmt: skip


def _other_zip():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones((3,)))
    return buffer.getvalue()


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line(read, name):
    content, match = BAD[name]
    _fails(read, _other_zip() if name == "zip of another kind" else content, match)


def test_a_missing_file_and_a_folder_are_one_line(tmp_path):
    for path in (tmp_path / "nothing.pt", tmp_path):
        with pytest.raises(UserError, match="Cannot read"):
            pickles.read(path)


def test_deep_nesting_and_high_memo_numbers_cost_nothing(read):
    depth, value = 0, read(write.file(_deep(100_000)))
    while value:
        value, depth = value[0], depth + 1
    assert depth == 99_999
    assert read(write.file(b"]r\xff\xff\xff\xff")) == []


def _zip_cases():
    torch = write.Torch()
    body = torch.tensor(np.zeros((4096,), np.float32))
    good = torch.zip(body)
    big = write.Torch()
    swollen = big.tensor(np.zeros((1 << 22,), np.float32))
    path = named("torch", "FloatStorage")
    parts = (plain("storage"), path, plain("../../etc/passwd"), plain("cpu"), plain(4))
    outside = b"(" + b"".join(parts) + b"tQ"
    evil = write.view(outside, offset=0, shape=(4,), strides=(1,))
    short = write.view(
        write.storage(0, np.dtype(np.float32), 4000), offset=0, shape=(4,), strides=(1,)
    )
    lost = write.view(write.storage(7, np.dtype(np.float32), 4), offset=0, shape=(4,), strides=(1,))
    damaged = bytearray(good)
    damaged[good.index(b"model/data/0") + 100] ^= 1
    claims = bytearray(good)
    entry = claims.rindex(b"PK\x01\x02")
    claims[entry + 20 : entry + 28] = struct.pack("<II", 2**31, 2**31)
    script = big.zip(
        swollen, compression=zipfile.ZIP_DEFLATED, extra=[("model/constants.pkl", b"")]
    )
    return {
        "compressed": (big.zip(swollen, compression=zipfile.ZIP_DEFLATED), "compressed"),
        "claimed size": (bytes(claims), "more bytes than the file has"),
        "path trick": (torch.zip(evil), "storage with the key"),
        "wrong count": (torch.zip(short), "16384 bytes for 4000"),
        "no such storage": (torch.zip(lost), "no member 'model/data/7'"),
        "flipped bit": (bytes(damaged), "checksum"),
        "two pickles": (torch.zip(body, extra=[("b/data.pkl", b"")]), "no torch checkpoint"),
        "TorchScript": (script, "TorchScript"),
        "cut short": (good[: len(good) // 2], "cut short"),
    }


@pytest.mark.parametrize("name", _zip_cases())
def test_a_bad_zip_is_one_line(read, name):
    _fails(read, *_zip_cases()[name])


def _small_files():
    torch = write.Torch()
    tensors = {"w": torch.tensor(VALUES.astype(np.float32)), "b": torch.tensor(np.ones((3,)))}
    body = mapping(
        tensors | {"args": call(named("argparse", "Namespace")) + plain({"a": 1}) + b"b"}
    )
    module = write.nvlabs_module("Generator", tensors={"w": VALUES.astype(np.float32)}, a=1)
    array = pickle.dumps({"x": np.arange(5.0), "y": np.float32(2), "z": {1, 2}}, 4)
    nvlabs = write.file(mapping({"G": module}), protocol=3)
    return [torch.zip(body), torch.legacy(body), nvlabs, array]


@pytest.mark.parametrize("index", range(4))
def test_truncated_at_every_length(read, index):
    content = _small_files()[index]
    for size in range(0, len(content), 7):
        with pytest.raises(UserError):
            read(content[:size])


@pytest.mark.parametrize("index", range(4))
def test_mutated_files_raise_nothing_but_user_errors(read, index):
    content = _small_files()[index]
    random = np.random.default_rng(index)
    refused = 0
    for _ in range(300):
        mutant = bytearray(content)
        for _ in range(random.integers(1, 4)):
            at = random.integers(len(mutant))
            kind = random.integers(4)
            if kind == 0:
                mutant[at] ^= 1 << random.integers(8)
            elif kind == 1:
                mutant[at] = random.integers(256)
            elif kind == 2:
                del mutant[at : at + random.integers(1, 20)]
            else:
                mutant[at:at] = mutant[(start := random.integers(len(mutant))) : start + 12]
        try:
            read(bytes(mutant))
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 50
