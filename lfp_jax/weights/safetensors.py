"""Reads safetensors files: an 8-byte length, a JSON header, then the tensors' bytes.

Nothing in such a file can run; what could go wrong is its offsets, and all are checked before a
view is made. Tensors are read-only numpy views of the mapped file.
"""

import json
import math
import mmap
import os

import numpy as np

from lfp_jax.errors import UserError
from lfp_jax.weights.constructors import DTYPES
from lfp_jax.weights.machine import Invalid, show

_MAX_HEADER = 100 * 2**20  # bytes, as the format's own limit
_TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def is_safetensors(path):
    """Tell by the first bytes whether a file may be safetensors: a length, then a JSON object."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError:
        return False
    return len(start) == 9 and start[8:] == b"{"


def read(path):
    """Read all tensors of a safetensors file.

    Returns:
        Dict from name to read-only array.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise Invalid("it is too short for a safetensors file")
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return _read(data)
    except Invalid as error:
        raise UserError(f"Cannot read '{path}': {error}.") from None
    except OSError as error:
        raise UserError(f"Cannot read '{path}': {error.strerror or show(str(error))}.") from None


def _read(data):
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(_MAX_HEADER, len(data) - 8):
        raise Invalid(f"its header claims {length} bytes; the file has {len(data)}")
    try:
        header = json.loads(bytes(data[8 : 8 + length]).decode("utf-8"))
    except (ValueError, RecursionError):
        raise Invalid("its header is no JSON: it is damaged or no safetensors file") from None
    if not isinstance(header, dict):
        raise Invalid("its header is no JSON object")
    header.pop("__metadata__", None)
    content = data[8 + length :]
    spans = sorted(_span(name, entry, len(content)) for name, entry in header.items())
    end = 0
    for start, stop, name in spans:
        if start != end:
            raise Invalid(f"its tensor '{show(name)}' does not follow the one before it")
        end = stop
    if end != len(content):
        raise Invalid(f"it has {len(content)} bytes of tensors; its header tells of {end}")
    return {name: _tensor(entry, content) for name, entry in header.items()}


def _span(name, entry, size):
    """Check one entry of the header: type, shape and place agree, and lie within the file."""
    entry = entry if isinstance(entry, dict) else {}
    kind, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    label = f"its tensor '{show(name)}'"
    if not (isinstance(kind, str) and kind in _TYPES):
        raise Invalid(f"{label} has the type '{show(kind)}', which is not known here")
    if not (_numbers(shape) and len(shape) <= 32 and _numbers(offsets) and len(offsets) == 2):
        raise Invalid(f"{label} has no possible shape or place")
    start, stop = offsets
    if not start <= stop <= size:
        raise Invalid(f"{label} is cut short: the file has {size} bytes of tensors")
    if math.prod(shape) * np.dtype(DTYPES[_TYPES[kind]]).itemsize != stop - start:
        raise Invalid(f"{label} has another number of bytes than its shape needs")
    return start, stop, name


def _numbers(values):
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**48 for n in values)


def _tensor(entry, content):
    start, stop = entry["data_offsets"]
    dtype = np.dtype(DTYPES[_TYPES[entry["dtype"]]])
    return np.frombuffer(content[start:stop], dtype).reshape(entry["shape"])
