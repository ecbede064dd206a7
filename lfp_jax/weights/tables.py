"""Converts named tensors to parameter trees by tables that are strict both ways.

A table is a list of rows: the tensor's name and shape in the file, the place of its value in our
tree, and how it is turned. A tensor without a row, a row without a tensor and a tensor of another
shape are errors that name it. Trees are nested dicts of float32 numpy arrays.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lfp_jax.errors import UserError
from lfp_jax.weights.machine import show

_NAMES_SHOWN = 3
_MAX_NUMBER = 8192


class Row(NamedTuple):
    """One tensor: where it is, where it goes."""

    name: str  # in the file
    shape: tuple  # in the file
    place: str  # in the tree, parts joined by "/"; "" for a tensor that is checked but not kept
    turn: Callable = np.asarray


def convert(tensors, rows, *, what, model="StyleGAN2"):
    """Turn tensors into a tree by a table.

    Args:
        tensors: dict from name to array.
        rows: list of Row; a tensor may have several, for parts of it.
        what: the part of the file, for messages.
        model: what the tensors make, for messages.

    Returns:
        Nested dict of float32 arrays.

    Raises:
        UserError: a missing, unknown, wrongly shaped or non-float tensor.
    """
    missing = [row.name for row in rows if row.name not in tensors]
    if missing:
        raise UserError(f"{what} lacks tensors that a {model} needs: {some(missing)}.")
    known = {row.name for row in rows}
    unknown = [name for name in tensors if name not in known]
    if unknown:
        raise UserError(f"{what} has tensors with no place in a {model}: {some(unknown)}.")
    tree: dict[str, Any] = {}
    for row in rows:
        value = _checked(tensors[row.name], row, what)
        if row.place:
            _put(tree, row.place.split("/"), row.turn(np.asarray(value, np.float32)))
    return tree


def revert(tree, rows):
    """Turn a tree back into tensors by a table: what `convert` reads as that tree.

    Args:
        tree: nested dict of arrays.
        rows: list of Row whose turns only move values about.

    Returns:
        Dict from name to float32 array, of the rows with a place.
    """
    tensors = {}
    for row in rows:
        if row.place:
            value = tree
            for part in row.place.split("/"):
                value = value[part]
            size = math.prod(row.shape)
            origin = row.turn(np.arange(size).reshape(row.shape))  # where each value came from
            flat = np.empty(size, np.float32)
            flat[origin.reshape(-1)] = np.asarray(value).reshape(-1)
            tensors[row.name] = flat.reshape(row.shape)
    return tensors


def _checked(value, row, what):
    if not isinstance(value, np.ndarray):
        raise UserError(f"{what}: '{row.name}' is no tensor but a {type(value).__name__}.")
    if value.shape != row.shape:
        found, needed = list(value.shape), list(row.shape)
        raise UserError(f"{what}: '{row.name}' has the shape {found}; needed: {needed}.")
    if value.dtype.kind not in "fV":  # V: bfloat16
        raise UserError(f"{what}: '{row.name}' has the type {value.dtype}; needed: a float.")
    return value


def _put(tree, parts, value):
    for part in parts[:-1]:
        tree = tree.setdefault(part, {})
    tree[parts[-1]] = np.ascontiguousarray(value, np.float32).reshape(value.shape)


def some(names):
    """List the first names of many, for a message."""
    shown = ", ".join(f"'{show(name)}'" for name in names[:_NAMES_SHOWN])
    rest = len(names) - _NAMES_SHOWN
    return shown + (f" and {rest} more" if rest > 0 else "")


def size(tensors, name, axis, *, what, dims):
    """Return the size of one axis of a tensor of `dims` dimensions, from which others follow."""
    if name not in tensors:
        raise UserError(
            f"{what} lacks '{name}', which a StyleGAN2 needs; "
            f"it has: {some(list(tensors)) or 'nothing'}."
        )
    found = tensors[name].ndim if isinstance(tensors[name], np.ndarray) else "no"
    if found != dims:
        raise UserError(f"{what}: '{name}' has {found} dimensions; needed: {dims}.")
    return tensors[name].shape[axis]


def highest(tensors, pattern, *, what):
    """Return the highest number that a pattern with one number finds in the names, or -1."""
    matches = [re.fullmatch(pattern, name) for name in tensors if isinstance(name, str)]
    number = max((int(match[1]) for match in matches if match), default=-1)
    if number > _MAX_NUMBER:
        raise UserError(f"{what} numbers its layers up to {number}; the limit is {_MAX_NUMBER}.")
    return number


def filter_taps(kernels, *, gain, what):
    """Read a separable FIR filter back from stored kernels, e.g. (1, 3, 3, 1).

    Args:
        kernels: dict from name to array [n, n] (an outer product) or [n]; all must agree.
        gain: what a kernel sums to.

    Returns:
        Tuple of taps: whole numbers where they are in whole proportions to the smallest.

    Raises:
        UserError: a kernel is no outer product, has another sum, or differs from the first.
    """
    if not kernels:
        raise UserError(f"{what} holds no resampling filter.")
    taps, first = None, None
    for name, kernel in kernels.items():
        if not isinstance(kernel, np.ndarray) or kernel.dtype.kind not in "fV":
            raise UserError(f"{what}: filter '{show(name)}' is no tensor of floats.")
        kernel = np.asarray(kernel, np.float64)
        if first is None:
            taps, first = _taps(kernel, gain, f"{what}: filter '{show(name)}'"), kernel
        elif kernel.shape != first.shape or not np.allclose(kernel, first, rtol=0, atol=1e-5):
            raise UserError(f"{what}: filter '{show(name)}' differs from the filters before it.")
    return _whole(taps)


def _taps(kernel, gain, what):
    square = kernel.ndim == 2 and kernel.shape[0] == kernel.shape[1]
    if not kernel.size or not (kernel.ndim == 1 or square):
        raise UserError(f"{what} has the shape {list(kernel.shape)}; needed: [n, n] or [n].")
    if not abs(kernel.sum() - gain) < 1e-3:
        raise UserError(f"{what} sums to {kernel.sum():.4g}; needed: {gain}.")
    if kernel.ndim == 1:
        return kernel
    taps = kernel.sum(axis=0)
    if not np.allclose(np.outer(taps, taps) / gain, kernel, rtol=0, atol=1e-5):
        raise UserError(f"{what} is not the outer product of one filter with itself.")
    return taps


def _whole(taps):
    ratio = taps / np.abs(taps[np.abs(taps) > 1e-7]).min()
    whole = np.round(ratio)
    if np.allclose(ratio, whole, rtol=0, atol=1e-3 * np.abs(whole).max()):
        return tuple(int(tap) for tap in whole)
    return tuple(float(tap) for tap in taps / taps.sum())


def linear(x):
    """Turn torch's [out, in] to [in, out]."""
    return x.T


def conv(x):
    """Turn torch's [out, in, rows, columns] to [rows, columns, in, out]."""
    return x.transpose(2, 3, 1, 0)


def conv_batched(x):
    """Turn [1, out, in, rows, columns] to [rows, columns, in, out]."""
    return conv(x[0])


def conv_scaled(x):
    """Turn a kernel without run-time scale to one that is multiplied by 1 / sqrt(fan_in)."""
    return conv(x) * np.float32(np.sqrt(np.prod(x.shape[1:])))


def channels_last(x):
    """Turn [c, h, w] to [h, w, c]."""
    return x.transpose(1, 2, 0)


def flattened(channels):
    """Turn a linear kernel [out, c * 4 * 4] to [4 * 4 * c, out], rows in the order h, w, c."""

    def turn(x):
        return x.reshape(-1, channels, 4, 4).transpose(2, 3, 1, 0).reshape(-1, x.shape[0])

    return turn


def shaped(*shape):
    """Give the turn that only changes the shape."""
    return lambda x: x.reshape(shape)
