"""The Fréchet distance between two sets of images, from features of each.

Computed on the host in float64: the distance is a small difference of large traces. It is only as
telling as its features, which every report names beside it.
"""

import dataclasses

import jax
import numpy as np
import scipy.linalg


@dataclasses.dataclass(frozen=True)
class Distance:
    """A distance with its bootstrap interval."""

    value: float
    low: float
    high: float
    draws: int


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute mean and covariance (n - 1 below) of features.

    Args:
        features: [n, f], finite, n at least 2.

    Returns:
        float64 mean [f] and covariance [f, f].

    Raises:
        ValueError: another shape, too few rows, or values that are not finite.
    """
    features = np.asarray(features)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"Features must be [n >= 2, f]; got {list(features.shape)}.")
    bad = int((~np.isfinite(features)).sum())
    if bad:
        raise ValueError(f"{bad} of {features.size} feature values are not finite.")
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet(
    mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray
) -> float:
    """Compute the Fréchet distance of two Gaussians: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    The trace of the root is the sum of the singular values of S1^(1/2) S2^(1/2): real, and accurate
    for singular covariances too, where the matrix square root of S1 S2 is neither. (Heusel et al.
    2017; without the constant that other programs add to the diagonal.)

    Args:
        mean1: [f].
        covariance1: [f, f], symmetric.
        mean2: [f].
        covariance2: [f, f].

    Raises:
        ValueError: shapes that do not fit.
    """
    mean1, covariance1, mean2, covariance2 = (
        np.asarray(part, np.float64) for part in (mean1, covariance1, mean2, covariance2)
    )
    f = mean1.size
    shapes = [part.shape for part in (mean1, covariance1, mean2, covariance2)]
    if shapes != [(f,), (f, f)] * 2:
        raise ValueError(f"Means [f] and covariances [f, f] are needed; got {shapes}.")
    product = _root(covariance1) @ _root(covariance2)
    overlap = scipy.linalg.svdvals(product).sum()
    traces = np.trace(covariance1) + np.trace(covariance2)
    # Rounding can leave equal sets a hair below zero.
    return max(0.0, float(np.sum((mean1 - mean2) ** 2) + traces - 2.0 * overlap))


def frechet_interval(
    features1: np.ndarray,
    features2: np.ndarray | tuple[np.ndarray, np.ndarray],
    *,
    key: jax.Array,
    draws: int = 50,
    confidence: float = 0.95,
) -> Distance:
    """Compute the Fréchet distance of two sets of features with a bootstrap interval.

    The sets are drawn again with replacement. A redrawn set has fewer distinct rows, which raises
    every redrawn distance, so the spread of the draws about their mean is laid about the value. The
    interval thus says how much the distance at *these* numbers of images varies; the upward bias
    that a finite number of images gives the value itself is in it (compare with a floor).

    Args:
        features1: [n1, f].
        features2: [n2, f]; or the `moments` of a set that is fixed, which is then not redrawn.
        key: random key.
        draws: bootstrap samples, at least 2.
        confidence: of the interval.

    Raises:
        ValueError: features as for `moments`, or too few draws.
    """
    if draws < 2:
        raise ValueError(f"An interval needs at least 2 draws; got {draws}.")
    fixed = isinstance(features2, tuple)
    value = frechet(*moments(features1), *(features2 if fixed else moments(features2)))
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
    redrawn = np.zeros(draws)
    for i in range(draws):
        first = moments(_redraw(generator, features1))
        second = features2 if fixed else moments(_redraw(generator, features2))
        redrawn[i] = frechet(*first, *second)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(redrawn - redrawn.mean(), [tail, 1.0 - tail])
    return Distance(value, max(0.0, value + float(low)), value + float(high), draws)


def _root(covariance):
    """Give the symmetric square root of a covariance; negative eigenvalues are rounding."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def _redraw(generator, features):
    features = np.asarray(features)
    return features[generator.integers(0, len(features), len(features))]
