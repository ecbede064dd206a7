"""Rows of results as a grid writes them, so that other methods and adversaries fit its tables."""

import hashlib

import jax
import numpy as np

from lfp_jax import logs

_TOLD = ("psnr", "fd", "bit_accuracy", "word_accuracy", "right_user_first", "target_first")


def row(settings, metrics, *, changes, **more):
    """Make a row: its name is the hash of its settings.

    Args:
        settings: all that the result depends on.
        metrics: {quantity: {"value", "low", "high", "images", ...}}.
        changes: names of the settings in which rows of one table differ.
        **more: what else to tell; JSON values.
    """
    digest = hashlib.sha256(logs.to_line(settings).encode()).hexdigest()[:16]
    changed = {name: settings[name] for name in changes}
    return {
        "hash": digest, "settings": settings, "changes": changed, "metrics": metrics, **more
    }  # fmt: skip


def line(row):
    """Lay a row out as a line of text."""
    parts = [f"{value!s:<18}" for value in row["changes"].values()]
    for name in _TOLD:
        if name in row["metrics"]:
            entry = row["metrics"][name]
            parts.append(f"{name} {entry['value']:.3f} ({entry['low']:.3f} - {entry['high']:.3f})")
    return "  ".join(parts)


def rate(rate):
    """Turn an `accuracy.Rate` into an entry."""
    return {"value": rate.value, "low": rate.low, "high": rate.high, "images": rate.n}


def mean(values, **more):
    """Make an entry of a value an image: the mean and its 95 % interval."""
    values = np.asarray(values, np.float64)
    middle, spread = float(values.mean()), 1.96 * float(values.std()) / len(values) ** 0.5
    ends = {"low": middle - spread, "high": middle + spread}
    return {"value": middle, **ends, "images": len(values), **more}


def draw_bits(key, n, bits):
    """Draw keys, uint8 [n, bits]."""
    return np.asarray(jax.random.bernoulli(key, 0.5, (n, bits)), np.uint8)
