"""Statistics of features as `.npz` files: `mu` [f] and `sigma` [f, f], as FID programs do."""

import os

import numpy as np

from lfp_jax import files
from lfp_jax.errors import UserError
from lfp_jax.weights.machine import show


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
    with open(path, "rb") as file:  # np.load would leave a damaged file open
        held = np.load(file, allow_pickle=False)
        if not isinstance(held, np.lib.npyio.NpzFile):
            raise UserError(f"'{path}' is no .npz file: it holds a single array.")
        missing = [name for name in ("mu", "sigma") if name not in held.files]
        if missing:
            names = ", ".join(show(name) for name in held.files[:5]) or "nothing"
            lacks = " and ".join(missing)
            raise UserError(f"'{path}' is no statistics file: it lacks {lacks}; it holds {names}.")
        return held["mu"], held["sigma"], held["count"] if "count" in held.files else None


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
