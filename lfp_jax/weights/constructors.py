"""The only names a pickle may use: our own constructors for torch, numpy and plain Python objects.

Tensors become numpy arrays: views of the file's bytes, so they cost no memory of their own. Every
size, stride and offset is checked against the storage before a view is made.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np

from lfp_jax.weights.machine import Attributes, Constructor, Invalid, Opaque, show, simple

_MAX_DIMENSIONS = 32
_MAX_EXPANDED = 2**20  # elements of a view that shows its storage's elements many times

DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
    "complex64": np.complex64,
    "complex128": np.complex128,
}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
_NUMPY_CODE = re.compile(r"[<>=|]?([biufc]\d{1,2}|\?)")


@dataclass(frozen=True)
class StorageType:
    """A torch storage class, e.g. FloatStorage."""

    dtype: np.dtype


@dataclass(frozen=True)
class Storage:
    """A flat run of numbers; `data` is None while a legacy file is only measured."""

    dtype: np.dtype
    count: int
    data: memoryview | None


class DType:
    """A numpy dtype under construction: a code such as "f8", then its byte order by BUILD."""

    def __init__(self, code):
        """Hold the code."""
        self._code = code
        self._order: Literal["<", ">", "|", "="] = "="

    def build(self, state):
        """Take the byte order from a dtype's pickled state."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self._order = state[1]
        if any(part is not None for part in state[2:5]):
            raise Invalid("it holds a numpy array of records")

    def get(self):
        """Return the finished np.dtype."""
        if not isinstance(self._code, str) or not _NUMPY_CODE.fullmatch(self._code):
            raise Invalid(f"it holds a numpy array of type '{show(self._code)}', not of numbers")
        return np.dtype(self._code).newbyteorder(self._order)


def native(data, dtype):
    """Return the bytes of a big-endian storage in this machine's order."""
    unit = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
    numbers = np.frombuffer(data, f"V{unit}").view(f">u{unit}").astype(f"=u{unit}")
    return numbers.data.cast("B")


def _sizes(values, what):
    if not isinstance(values, tuple | list) or len(values) > _MAX_DIMENSIONS:
        raise Invalid(f"a tensor's {what} is not a list of at most {_MAX_DIMENSIONS} numbers")
    if not all(type(n) is int and 0 <= n < 2**62 for n in values):
        raise Invalid(f"a tensor's {what} is not made of whole numbers from 0")
    return tuple(values)


def tensor(storage, offset, shape, strides, *, dtype=None):
    """View a storage as an array.

    Args:
        storage: a Storage.
        offset: first element.
        shape, strides: tuples, in elements.
        dtype: overrides the storage's own, for untyped storages.

    Raises:
        Invalid: the view reaches outside its storage, or is no view of a storage at all.
    """
    if isinstance(storage, Opaque):
        raise Invalid(f"a tensor lies in a '{show(storage)}', which is not known here")
    if not isinstance(storage, Storage):
        raise Invalid("a tensor lies in something that is no storage")
    dtype = storage.dtype if dtype is None else dtype
    count = storage.count * storage.dtype.itemsize // dtype.itemsize
    shape, strides = _sizes(shape, "shape"), _sizes(strides, "strides")
    (offset,) = _sizes((offset,), "offset")
    if len(shape) != len(strides):
        raise Invalid(f"a tensor has {len(shape)} dimensions but {len(strides)} strides")
    elements = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if elements and last >= count:
        raise Invalid(f"a tensor of shape {shape} reaches element {last} of a storage of {count}")
    if elements > max(count, _MAX_EXPANDED):
        raise Invalid(f"a tensor of shape {shape} repeats a storage of {count} elements")
    if storage.data is None or not elements:
        return np.broadcast_to(np.zeros((), dtype), shape)
    steps = tuple(stride * dtype.itemsize for stride in strides)
    return np.ndarray(shape, dtype, storage.data, offset * dtype.itemsize, steps)


def _tensor_v2(storage, offset, shape, strides, *_):
    return tensor(storage, offset, shape, strides)


def _tensor_v3(storage, offset, shape, strides, _grad, _hooks, dtype, *_):
    if not isinstance(dtype, np.dtype):
        raise Invalid(f"a tensor has the type '{show(dtype)}', which is not known here")
    return tensor(storage, offset, shape, strides, dtype=dtype)


def _from_type(function, _type, arguments, _state):
    if not isinstance(function, Constructor):
        return Opaque(show(function))
    return function.make(*arguments)


def _persistent_object(meta):
    """Make an Opaque of NVlabs' torch_utils.persistence record; its source text is not used."""
    if not (isinstance(meta, dict) and isinstance(meta.get("class_name"), str)):
        raise Invalid("it holds an object of torch_utils.persistence without a class name")
    made = Opaque(meta["class_name"])
    state = meta.get("state")
    made.state = state if isinstance(state, dict) else {}
    return made


def _scalar(dtype, data):
    return np.frombuffer(_bytes(data), _finished(dtype), count=1)[0].item()


def _finished(dtype):
    return dtype.get() if isinstance(dtype, DType) else DType(dtype).get()


def _bytes(value):
    if isinstance(value, str):  # numpy's arrays in pickles of protocol 2 or less
        value = value.encode("latin-1")
    if not isinstance(value, bytes | bytearray):
        raise Invalid("a numpy array has no bytes")
    return value


def _from_buffer(data, dtype, shape, order):
    if order not in ("C", "F"):
        raise Invalid("a numpy array has an unknown order")
    flat = np.frombuffer(_bytes(data), _finished(dtype))
    return flat.reshape(_sizes(shape, "shape"), order=order)


class Constructors:
    """The table of names for one file, and the states of its non-containers."""

    def __init__(self, *, budget, load_bytes):
        """Make the table.

        Args:
            budget: a machine.Budget that copies are charged to.
            load_bytes: function from the bytes of a legacy torch file to its object.
        """
        self.budget = budget
        self.names = self._plain() | _torch(load_bytes) | _numpy()

    def build(self, target, state):
        """Set the state of a numpy array or dtype; other objects have none."""
        if isinstance(target, DType):
            target.build(state)
        elif isinstance(target, np.ndarray) and target.size == 0:
            _version, shape, dtype, by_column, data = state
            dtype, shape, data = _finished(dtype), _sizes(shape, "shape"), _bytes(data)
            if math.prod(shape) * dtype.itemsize != len(data):
                raise Invalid(f"a numpy array of shape {shape} has {len(data)} bytes")
            self.budget.spend(copied=len(data))
            # Numpy says np.bool here; what it has always pickled is Python's.
            target.__setstate__((1, shape, dtype, bool(by_column), bytes(data)))  # type: ignore[arg-type]
        else:
            raise Invalid(f"its pickle sets the state of a {type(target).__name__}")

    def _items(self, items):
        """Copy the items of a container; a file may ask for the same copy many times."""
        if not isinstance(items, list | tuple | set | frozenset):
            raise Invalid(f"its pickle makes a container of a {type(items).__name__}")
        self.budget.spend(operations=len(items))
        return list(items)

    def _mapping(self, *arguments):
        items = arguments[0] if arguments else ()
        if isinstance(items, dict):
            self.budget.spend(operations=len(items))
            return dict(items)
        return {simple(key): value for key, value in self._items(items)}

    def _text_bytes(self, *arguments):
        text, encoding = list(arguments) + ["", "latin-1"][len(arguments) :]
        if isinstance(text, bytes | bytearray):
            return text
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8"):
            raise Invalid("its pickle makes bytes of something that is no text")
        self.budget.spend(copied=len(text))
        return text.encode(encoding)

    def _reconstructed(self, kind, *_):
        return kind.make() if isinstance(kind, Constructor) else Opaque(show(kind))

    def _plain(self):
        mapping = Constructor(self._mapping)
        attributes = Constructor(lambda *_: Attributes())
        table = {
            "collections.OrderedDict": mapping,
            "collections.Counter": mapping,
            "collections.defaultdict": Constructor(lambda *_: {}),
            "collections.deque": Constructor(lambda items=(), *_: self._items(items)),
            "dnnlib.util.EasyDict": mapping,
            "dnnlib.EasyDict": mapping,
            "argparse.Namespace": attributes,
            "types.SimpleNamespace": attributes,
            "_codecs.encode": Constructor(self._text_bytes),
            "copy_reg._reconstructor": Constructor(self._reconstructed),
            "copyreg._reconstructor": Constructor(self._reconstructed),
        }
        for module in ("builtins", "__builtin__"):
            table |= {
                f"{module}.set": Constructor(lambda i=(): set(map(simple, self._items(i)))),
                f"{module}.frozenset": Constructor(
                    lambda i=(): frozenset(map(simple, self._items(i)))
                ),
                f"{module}.list": Constructor(lambda i=(): self._items(i)),
                f"{module}.tuple": Constructor(lambda i=(): tuple(self._items(i))),
                f"{module}.dict": mapping,
                f"{module}.bytes": Constructor(self._text_bytes),
                f"{module}.bytearray": Constructor(self._text_bytes),
            }
        return table


def _torch(load_bytes):
    table = {f"torch.{name}": np.dtype(dtype) for name, dtype in DTYPES.items()}
    for name, dtype in _STORAGES.items():
        kind = StorageType(np.dtype(DTYPES[dtype]))
        table |= {f"torch.{name}": kind, f"torch.cuda.{name}": kind, f"torch.storage.{name}": kind}
    return table | {
        "torch._utils._rebuild_tensor": Constructor(tensor),
        "torch._utils._rebuild_tensor_v2": Constructor(_tensor_v2),
        "torch._utils._rebuild_tensor_v3": Constructor(_tensor_v3),
        "torch._utils._rebuild_parameter": Constructor(lambda data, *_: data),
        "torch._utils._rebuild_parameter_with_state": Constructor(lambda data, *_: data),
        "torch._tensor._rebuild_from_type_v2": Constructor(_from_type),
        "torch.nn.parameter.Parameter": Constructor(lambda data=None, *_: data),
        "torch.storage._load_from_bytes": Constructor(load_bytes),
        "torch.Size": Constructor(lambda sizes=(): _sizes(sizes, "size")),
        "torch_utils.persistence._reconstruct_persistent_obj": Constructor(_persistent_object),
    }


def _numpy():
    table = {
        "numpy.dtype": Constructor(lambda code, *_: DType(code)),
        "numpy.ndarray": StorageType(np.dtype(np.uint8)),  # named, never called
    }
    for core in ("numpy.core", "numpy._core"):
        table |= {
            f"{core}.multiarray.scalar": Constructor(_scalar),
            f"{core}.multiarray._reconstruct": Constructor(lambda *_: np.empty((0,), np.uint8)),
            f"{core}.numeric._frombuffer": Constructor(_from_buffer),
        }
    return table
