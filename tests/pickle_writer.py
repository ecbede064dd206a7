"""Writes checkpoints byte by byte, as torch and NVlabs do: the tests need no torch."""

import io
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.int32): "IntStorage",
    np.dtype(np.int16): "ShortStorage",
    np.dtype(np.int8): "CharStorage",
    np.dtype(np.uint8): "ByteStorage",
    np.dtype(np.bool_): "BoolStorage",
    np.dtype(np.complex64): "ComplexFloatStorage",
    np.dtype(np.complex128): "ComplexDoubleStorage",
}


def plain(value):
    """Opcodes of a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def named(module, name):
    """Opcodes of a global."""
    return f"c{module}\n{name}\n".encode()


def call(function, *arguments):
    """Opcodes of a call; all parts are opcodes."""
    return function + b"(" + b"".join(arguments) + b"tR"


def mapping(items):
    """Opcodes of a dict from text to opcodes."""
    return b"}(" + b"".join(plain(key) + value for key, value in items.items()) + b"u"


def file(body, *, protocol=2):
    """A whole pickle."""
    return bytes((0x80, protocol)) + body + b"."


def storage(key, dtype, count):
    """Opcodes of a storage by persistent id."""
    parts = (plain("storage"), named("torch", STORAGES[dtype]), plain(str(key)), plain("cpu"))
    return b"(" + b"".join(parts) + plain(count) + b"NtQ"


def view(storage, *, offset, shape, strides):
    """Opcodes of a tensor."""
    rebuild = named("torch._utils", "_rebuild_tensor_v2")
    hooks = call(named("collections", "OrderedDict"))
    return call(rebuild, storage, plain(offset), plain(shape), plain(strides), plain(False), hooks)


def _contiguous(shape):
    return tuple(int(np.prod(shape[i + 1 :], dtype=int)) for i in range(len(shape)))


class Torch:
    """Collects tensors; then writes a torch file of one of the two forms."""

    def __init__(self):
        """Start without storages."""
        self.arrays = []

    def tensor(self, array):
        """Opcodes of a tensor with a storage of its own."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        self.arrays.append(array)
        held = storage(len(self.arrays) - 1, array.dtype, array.size)
        return view(held, offset=0, shape=array.shape, strides=_contiguous(array.shape))

    def zip(self, body, *, compression=zipfile.ZIP_STORED, extra=(), byteorder="little"):
        """Bytes of a zip file."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression) as archive:
            archive.writestr("model/data.pkl", file(body))
            archive.writestr("model/byteorder", byteorder)
            for i, array in enumerate(self.arrays):
                archive.writestr(f"model/data/{i}", array.tobytes())
            for name, content in extra:
                archive.writestr(name, content)
        return buffer.getvalue()

    def legacy(self, body):
        """Bytes of the older form."""
        header = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001}]
        parts = [pickle.dumps(part, 2) for part in header]
        keys = [str(i) for i in range(len(self.arrays))]
        parts += [file(body), pickle.dumps(keys, 2)]
        parts += [struct.pack("<q", array.size) + array.tobytes() for array in self.arrays]
        return b"".join(parts)


def blob_tensor(array):
    """Opcodes of a tensor with a torch file of the older form inside, as in NVlabs' pickles."""
    array = np.ascontiguousarray(array).reshape(np.shape(array))
    inner = Torch()
    inner.arrays.append(array)
    blob = inner.legacy(storage(0, array.dtype, array.size))
    held = call(
        named("torch.storage", "_load_from_bytes"), b"B" + struct.pack("<I", len(blob)) + blob
    )
    tensor = view(held, offset=0, shape=array.shape, strides=_contiguous(array.shape))
    rebuild = named("torch._utils", "_rebuild_parameter")
    return call(rebuild, tensor, plain(True), call(named("collections", "OrderedDict")))


def nvlabs_module(class_name, *, tensors=None, modules=None, **attributes):
    """Opcodes of a module pickled by torch_utils.persistence."""
    state = {
        "_parameters": mapping({k: blob_tensor(v) for k, v in (tensors or {}).items()}),
        "_buffers": mapping({}),
        "_modules": mapping(modules or {}),
        **{key: plain(value) for key, value in attributes.items()},
    }
    meta = {
        "type": plain("class"),
        "version": plain(6),
        "module_src": plain("raise SystemExit('this must never run')"),
        "class_name": plain(class_name),
        "state": mapping(state),
    }
    return call(named("torch_utils.persistence", "_reconstruct_persistent_obj"), mapping(meta))
