"""Rates of decoded keys, each with its interval.

Computed on the host in float64. An image is one trial: bits of one image are right or wrong
together, so that counting each as a trial would make an interval far too narrow.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rate:
    """A share with its interval."""

    value: float  # successes / n
    low: float
    high: float
    successes: float  # whole images, or the sum of images' shares of right bits
    n: int  # images


def rate(successes: float, n: int, *, confidence: float = 0.95) -> Rate:
    """Make the rate of so many successes in n trials.

    Args:
        successes: 0 .. n.
        n: trials.
        confidence: of the Wilson interval.

    Raises:
        ValueError: as `wilson` does.
    """
    low, high = wilson(successes, n, confidence=confidence)
    return Rate(successes / n, low, high, successes, n)


def word_accuracy(decoded: np.ndarray, keys: np.ndarray, *, confidence: float = 0.95) -> Rate:
    """Compute the share of images with every bit right (the paper's attribution accuracy).

    Args:
        decoded: bits [n, k].
        keys: the true bits [n, k], or one key [k].
        confidence: of the Wilson interval.

    Raises:
        ValueError: shapes that do not fit, or no images.
    """
    return _share(np.all(_agree(decoded, keys), axis=1), confidence)


def bit_accuracy(decoded: np.ndarray, keys: np.ndarray, *, confidence: float = 0.95) -> Rate:
    """Compute the share of right bits; the interval is Wilson's with an image as one trial.

    That interval is exact in the worst case, all bits of an image alike, and too wide otherwise;
    it is never too narrow.

    Args:
        decoded: bits [n, k].
        keys: the true bits [n, k], or one key [k].
        confidence: of the interval.

    Raises:
        ValueError: shapes that do not fit, or no images.
    """
    return _share(_agree(decoded, keys).mean(axis=1), confidence)


def first_among(
    llr: np.ndarray, keys: np.ndarray, decoys: np.ndarray, *, confidence: float = 0.95
) -> Rate:
    """Compute the share of images whose own key fits better than every decoy does.

    A key fits as its log-likelihood does, the sum of the ratios of its ones less those of its
    zeros; a decoy that fits as well as the key comes first.

    Args:
        llr: log-likelihood ratios of one to zero, [n, k].
        keys: the true bits [n, k], or [a, n, k] where an image has `a` owners: the best counts.
        decoys: keys of nobody, [m, k].
        confidence: of the Wilson interval.
    """
    llr, others = np.asarray(llr, np.float64), 2.0 * np.asarray(decoys) - 1.0
    own = np.sum(llr * (2.0 * np.asarray(keys) - 1.0), axis=-1)
    best = np.array([np.max(others @ row) for row in llr])
    return _share(np.atleast_2d(own).max(axis=0) > best, confidence)


@dataclasses.dataclass(frozen=True)
class Bin:
    """Bits whose stated probability of error lies between two bounds."""

    lowest: float
    highest: float
    stated: float  # its mean
    wrong: float  # share of errors
    low: float  # Wilson interval of that share
    high: float
    bits: int


def reliability(
    soft_bits: np.ndarray,
    keys: np.ndarray,
    *,
    edges: Sequence[float] = (0.0, 0.002, 0.01, 0.05, 0.15, 0.2, 0.4, 0.5),
    confidence: float = 0.95,
) -> list[Bin]:
    """Hold the stated probabilities of error against the share of errors.

    Args:
        soft_bits: probability [n, k] that a bit is one; that of an error is that of the other bit.
        keys: the true bits [n, k].
        edges: of the bins, rising from 0 to 0.5.
        confidence: of the intervals, in which bits count as independent.

    Returns:
        A Bin for each pair of edges that holds any bits.
    """
    soft_bits = np.asarray(soft_bits, np.float64)
    stated = np.minimum(soft_bits, 1.0 - soft_bits)
    wrong = ~_agree(soft_bits > 0.5, keys)
    bins = []
    for lowest, highest in itertools.pairwise(edges):
        inside = (stated >= lowest) & ((stated < highest) | (highest == edges[-1]))
        count, errors = int(inside.sum()), int(wrong[inside].sum())
        if count:
            low, high = wilson(errors, count, confidence=confidence)
            mean = float(stated[inside].mean())
            bins.append(Bin(lowest, highest, mean, errors / count, low, high, count))
    return bins


def wilson(successes: float, n: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """Compute the Wilson score interval of a share.

    Args:
        successes: 0..n.
        n: trials, at least 1.
        confidence: between 0 and 1.

    Returns:
        (low, high), within 0..1.

    Raises:
        ValueError: a value outside its bounds.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"A share needs 0 <= successes <= n, n >= 1; got {successes} of {n}.")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be between 0 and 1; got {confidence}.")
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2.0)
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # At the ends the bound is the end itself, which rounding would miss by a hair.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def _agree(decoded: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Give right or wrong a bit, bool [n, k]."""
    decoded, keys = np.asarray(decoded), np.asarray(keys)
    if decoded.ndim != 2 or keys.shape not in (decoded.shape, decoded.shape[1:]):
        raise ValueError(
            f"Bits [n, k] and keys [n, k] or [k] are needed; "
            f"got {list(decoded.shape)} and {list(keys.shape)}."
        )
    return decoded == keys


def _share(right: np.ndarray, confidence: float) -> Rate:
    """Make the rate of what is right of each image, [n] within 0..1."""
    return rate(float(right.sum()), len(right), confidence=confidence)
