"""Reads pickled checkpoints without torch, and without running or importing anything they name.

Three forms: torch's zip files, torch's older files (five pickles, then the raw storages), and plain
pickles, as NVlabs writes them, with older torch files inside. Result: dicts, lists, tuples, sets,
numbers, strings and numpy arrays, which are read-only views of the mapped file; a class that a file
names and we do not know is an inert `Opaque` with its name and state.
"""

import mmap
import os
import re
import struct
import warnings
import zipfile
import zlib

import numpy as np

from lfp_jax.errors import UserError
from lfp_jax.weights.constructors import Constructors, Storage, StorageType, native
from lfp_jax.weights.machine import Budget, Invalid, Machine, Opaque, Stream, show

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_LEGACY_START = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # pickle of _MAGIC after its protocol
_KEY = re.compile(r"\w{1,40}")
_LOCAL_HEADER = struct.Struct("<4s22xHH")


def read(path):
    """Read a checkpoint.

    Args:
        path: a .pt, .pth, .ckpt or .pkl file.

    Returns:
        The object the file holds, of plain containers and read-only numpy arrays.

    Raises:
        UserError: the file is missing, damaged, hostile, of another kind, or holds one pickled
            object (a whole module) in place of tensors in plain containers.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise Invalid("the file is empty")
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        with warnings.catch_warnings(action="ignore"):  # pickletools', of odd escapes in old texts
            result = _read(data, Constructors(budget=Budget(size), load_bytes=_no_blob))
    except Invalid as error:
        raise UserError(f"Cannot read '{path}': {error}.") from None
    except OSError as error:
        raise UserError(f"Cannot read '{path}': {error.strerror or show(str(error))}.") from None
    except Exception as error:  # a damaged file can break pickletools, zipfile and numpy anywhere
        cause = f"{type(error).__name__}: {show(' '.join(str(error).split()))}"
        raise UserError(f"Cannot read '{path}': the file is damaged ({cause}).") from None
    if isinstance(result, Opaque):
        raise UserError(
            f"'{path}' holds a pickled object of class '{show(result)}', which is not run; "
            "needed are tensors in plain dicts, as model.state_dict() gives them."
        )
    return result


def _read(data, constructors):
    if data[:4] == b"PK\x03\x04":
        return _read_zip(data, constructors)
    if _is_legacy(data):
        return _read_legacy(data, constructors)
    if data[:1] == b"\x80" and bytes(data[1:2]) in (b"\2", b"\3", b"\4", b"\5"):

        def load_blob(blob):
            if not isinstance(blob, bytes | bytearray) or not _is_legacy(blob):
                raise Invalid("a tensor's bytes are no torch file")
            return _read_legacy(memoryview(blob), constructors)

        outer = Constructors(budget=constructors.budget, load_bytes=load_blob)
        return _machine(outer, _no_storage).run(Stream(data))
    start = show(bytes(data[:30]).decode("latin-1"))
    raise Invalid(f"it is no torch file and no pickle of protocol 2 to 5: it starts with '{start}'")


def _machine(constructors, persistent):
    return Machine(
        constructors.names,
        budget=constructors.budget,
        build=constructors.build,
        persistent=persistent,
    )


def _no_storage(_):
    raise Invalid("its pickle names a storage but the file holds none")


def _no_blob(_):
    raise Invalid("its pickle holds a torch file inside a torch file")


def _storage_id(value):
    """Check a persistent id and return its storage type, key and number of elements."""
    if not (isinstance(value, tuple) and len(value) >= 5 and value[0] == "storage"):
        raise Invalid("its pickle refers to something outside it that is no storage")
    kind, key, count = value[1], value[2], value[4]
    if isinstance(kind, Opaque):
        raise Invalid(f"it holds a '{show(kind)}', which is not known here")
    if not isinstance(kind, StorageType):
        raise Invalid("it holds a storage of no type")
    if not (isinstance(key, str) and _KEY.fullmatch(key)):
        raise Invalid(f"it holds a storage with the key '{show(key)}'")
    if type(count) is not int or not 0 <= count < 2**48:
        raise Invalid("it holds a storage of no possible size")
    return kind.dtype, key, count


def _read_zip(data, constructors):
    members = _zip_members(data)
    pickles = [name for name in members if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        names = ", ".join(show(name) for name in list(members)[:3])
        raise Invalid(f"it is a zip file but no torch checkpoint: it holds {names or 'nothing'}")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in members:
        raise Invalid("it is a TorchScript program, not a checkpoint of tensors")
    order = _member(data, members, f"{prefix}byteorder") if f"{prefix}byteorder" in members else b""
    swap = bytes(order or b"little") == b"big"
    cache = {}

    def persistent(value):
        if isinstance(value, tuple) and len(value) > 1 and isinstance(value[1], Opaque):
            return value[1]  # of a type unknown here: an error only if a tensor lies in it
        dtype, key, count = _storage_id(value)
        if (key, dtype) not in cache:
            content = _member(data, members, f"{prefix}data/{key}")
            cache[key, dtype] = native(content, dtype) if swap else content
        content = cache[key, dtype]
        if len(content) != count * dtype.itemsize:
            raise Invalid(f"storage {key} has {len(content)} bytes for {count} {dtype}")
        return Storage(dtype, count, content)

    content = _member(data, members, pickles[0])
    return _machine(constructors, persistent).run(Stream(content))


def _zip_members(data):
    """List a zip file's members. They are only looked up by name, never written to disk."""
    try:
        with zipfile.ZipFile(_File(data)) as archive:
            listed = archive.infolist()
    except zipfile.BadZipFile as error:
        raise Invalid(f"the zip file is damaged or cut short ({show(str(error))})") from None
    members = {info.filename: info for info in listed}
    if len(members) != len(listed):
        raise Invalid("its zip file holds two members of one name")
    # A member that overlaps others could make a small file a lot of work.
    if sum(info.compress_size for info in listed) > len(data):
        raise Invalid("its zip members claim more bytes than the file has")
    return members


def _member(data, members, name):
    """Return a member's bytes in place, after checking that they are whole."""
    if name not in members:
        raise Invalid(f"its zip file has no member '{show(name)}'")
    info = members[name]
    # Torch stores members as they are; a compressed one could swell on reading.
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise Invalid(f"its zip member '{show(name)}' is compressed or encrypted")
    header = data[info.header_offset : info.header_offset + _LOCAL_HEADER.size]
    magic, name_size, extra_size = _LOCAL_HEADER.unpack(header)
    start = info.header_offset + _LOCAL_HEADER.size + name_size + extra_size
    content = data[start : start + info.file_size]
    if magic != b"PK\x03\x04" or len(content) != info.file_size:
        raise Invalid(f"its zip member '{show(name)}' is cut short")
    if zlib.crc32(content) != info.CRC:
        raise Invalid(f"its zip member '{show(name)}' is damaged (its checksum differs)")
    return content


class _File(Stream):
    """A Stream that can seek, as zipfile wants it."""

    def read(self, n=-1):
        return super().read(len(self.data) if n is None or n < 0 else n)

    def seek(self, offset, whence=os.SEEK_SET):
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: len(self.data)}[whence]
        if base + offset < 0:
            raise Invalid("its zip file points before its own start")
        self.position = min(base + offset, len(self.data))
        return self.position

    def seekable(self):
        return True


def _is_legacy(data):
    return data[:1] == b"\x80" and bytes(data[2 : 2 + len(_LEGACY_START)]) == _LEGACY_START


def _read_legacy(data, constructors):
    """Read torch's older form: magic, protocol, system, object, keys, then the raw storages.

    Where a storage starts is known only after the object: so it is read twice, first to measure.
    """
    stream = Stream(data)
    _plain_pickle(stream, constructors)
    if _plain_pickle(stream, constructors) != _PROTOCOL:
        raise Invalid(f"it is a torch file of another protocol than {_PROTOCOL}")
    system = _plain_pickle(stream, constructors)
    start = stream.position
    measured: dict[str, tuple[np.dtype, int]] = {}

    def measure(value):
        if isinstance(value, tuple) and value[:1] == ("module",):
            return value[1]  # (class, source file, source text): a whole module was saved
        dtype, key, count = _storage_id(value)
        if len(value) > 5 and value[5] is not None:
            raise Invalid(f"storage {key} is a view of another storage")
        if measured.setdefault(key, (dtype, count)) != (dtype, count):
            raise Invalid(f"storage {key} has two types or sizes")
        return Storage(dtype, count, None)

    _machine(constructors, measure).run(stream)
    little = not isinstance(system, dict) or system.get("little_endian", True) is True
    storages = _legacy_storages(data, stream, constructors, measured, little)

    def persistent(value):
        return value[1] if value[:1] == ("module",) else storages[value[2]]

    stream.position = start
    return _machine(constructors, persistent).run(stream)


def _plain_pickle(stream, constructors):
    return _machine(constructors, _no_storage).run(stream)


def _legacy_storages(data, stream, constructors, measured, little):
    keys = _plain_pickle(stream, constructors)
    texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not texts or set(keys) != set(measured):
        raise Invalid("its list of storages is not what its tensors need")
    storages, position = {}, stream.position
    for key in keys:
        dtype, count = measured[key]
        size = count * dtype.itemsize
        (stored,) = struct.unpack("<q" if little else ">q", data[position : position + 8])
        content = data[position + 8 : position + 8 + size]
        if stored != count or len(content) != size:
            raise Invalid(f"storage {show(key)} is cut short or damaged")
        storages[key] = Storage(dtype, count, content if little else native(content, dtype))
        position += 8 + size
    return storages
