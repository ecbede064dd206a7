"""Statistics of features as `.npz` files: `mu` [f] and `sigma` [f, f], as FID programs do."""

import math
import os
import zipfile

import numpy as np

from lfp_jax import files
from lfp_jax.errors import UserError
from lfp_jax.weights.machine import show

_ARRAY = b"\x93NUMPY"  # how a file of a single array starts
_MOST_BYTES = 2**28  # of an array: float64 of 5,792 features
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read(path):
    """Read a statistics file.

    Args:
        path: an .npz file with `mu` and `sigma`; `count` where it says of how many images.

    Returns:
        (mean [f], covariance [f, f], count or None), float64.

    Raises:
        UserError: the file is missing, damaged, or holds something else.
    """
    try:
        mean, covariance, count = _load(path)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"No such statistics file: '{path}'.") from None
    except Exception as error:  # on a damaged file numpy and zipfile raise many kinds
        cause = show(" ".join(str(error).split())) or type(error).__name__
        raise UserError(f"Cannot read '{path}' as a statistics file: {cause}.") from None
    return _checked(path, mean, covariance, count)


def _load(path):
    with open(path, "rb") as file:
        if file.read(len(_ARRAY)) == _ARRAY:
            raise UserError(f"'{path}' is no .npz file: it holds a single array.")
        with zipfile.ZipFile(file) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            missing = [name for name in ("mu", "sigma") if name not in names]
            if missing:
                holds = ", ".join(show(name) for name in names[:5]) or "nothing"
                lacks = f"it lacks {' and '.join(missing)}; it holds {holds}"
                raise UserError(f"'{path}' is no statistics file: {lacks}.")
            count = _array(archive, "count") if "count" in names else None
            return _array(archive, "mu"), _array(archive, "sigma"), count


def _array(archive, name):
    """Read an array as numpy does, but only one whose size is honest: a zip can swell without end.

    Raises:
        ValueError: it is not.
    """
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > _MOST_BYTES:
        raise ValueError(f"{name} has {info.file_size:,} bytes; at most {_MOST_BYTES:,} are read")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"{name} is of an unknown version of the format")
        shape, by_column, dtype = _HEADERS[version](file)
        size = math.prod(shape) * dtype.itemsize
        if dtype.kind not in "fiu":
            raise ValueError(f"{name} is no array of numbers")
        if file.tell() + size != info.file_size:
            raise ValueError(f"{name} has {info.file_size:,} bytes, not what its shape needs")
        flat = np.frombuffer(file.read(size), dtype)
        return flat.reshape(shape, order="F" if by_column else "C")


def _checked(path, mean, covariance, count):
    f = mean.size
    if mean.shape != (f,) or covariance.shape != (f, f) or not f:
        shapes = f"{list(mean.shape)} and {list(covariance.shape)}"
        raise UserError(f"'{path}' needs mu [f] and sigma [f, f]; got {shapes}.")
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise UserError(f"'{path}' needs floats; got {mean.dtype} and {covariance.dtype}.")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"'{path}' holds values that are not finite.")
    if count is not None and (count.shape != () or count.dtype.kind not in "iu"):
        raise UserError(f"'{path}' has a count that is no whole number.")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    return mean, covariance, None if count is None else int(count)


def write(path, *, mean, covariance, count):
    """Write a statistics file in one step, making its folder: readers never see half a file.

    Args:
        path: the .npz file.
        mean: [f], kept in float64.
        covariance: [f, f].
        count: images they were taken from.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with files.replacing(path) as part, open(part, "wb") as file:
        np.savez(file, mu=np.float64(mean), sigma=np.float64(covariance), count=np.int64(count))
