"""Writes tensors as torch's zip files hold them, without torch."""

import os
import pickle
import zipfile

import numpy as np

from lfp_jax import files


def write(path, content):
    """Write nested dicts of float32 arrays as a file that `torch.load` reads.

    Args:
        path: the file.
        content: dicts with text keys, of dicts and arrays; arrays become contiguous tensors.
    """
    os.makedirs(os.path.dirname(os.fspath(path)) or ".", exist_ok=True)
    arrays: list[np.ndarray] = []
    body = b"\x80\x02" + _opcodes(content, arrays) + b"."
    with files.replacing(path) as part, zipfile.ZipFile(part, "w") as archive:
        archive.writestr("model/data.pkl", body)
        archive.writestr("model/byteorder", "little")
        for i, array in enumerate(arrays):
            archive.writestr(f"model/data/{i}", array.astype("<f4").tobytes())
        archive.writestr("model/version", "3\n")


def _opcodes(value, arrays):
    """Pickle a value; arrays are put aside, and pickled as the call that rebuilds a tensor."""
    if isinstance(value, dict):
        items = (_plain(name) + _opcodes(each, arrays) for name, each in value.items())
        return b"}(" + b"".join(items) + b"u"
    array = np.ascontiguousarray(value, np.float32).reshape(np.shape(value))
    arrays.append(array)
    strides = tuple(stride // array.itemsize for stride in array.strides)
    storage = (_plain("storage"), b"ctorch\nFloatStorage\n", _plain(str(len(arrays) - 1)))
    storage = b"(" + b"".join(storage) + _plain("cpu") + _plain(array.size) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    parts = (storage, _plain(0), _plain(array.shape), _plain(strides), _plain(False), hooks)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + b"".join(parts) + b"tR"


def _plain(value):
    """Pickle a plain value: the opcodes between those of the protocol and of the end."""
    return pickle.dumps(value, 2)[2:-1]
