"""Distances between two sets of images, and the Inception Score, from features of each.

Computed on the host in float64: a Fréchet distance is a small difference of large traces. It is
only as telling as its features, which every report names beside it. Features are [n, f]; their
statistics are gathered batch by batch and merged in any grouping, across processes too.
"""

import dataclasses
import functools

import jax
import numpy as np
import scipy.linalg
import scipy.special

from lfp_jax import sharding
from lfp_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Distance:
    """A distance (or a score) with its sample count and its spread over draws."""

    value: float
    low: float
    high: float
    stddev: float  # over the draws, population form
    draws: int  # bootstrap samples, subsets, or splits
    images: int  # of the set that is measured


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Count, mean and scatter of features seen so far; `merge` is associative."""

    count: int
    mean: np.ndarray  # [f], float64
    scatter: np.ndarray  # [f, f], float64: sum of outer products about the mean

    @property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [f] and covariance [f, f] (n - 1 below).

        Raises:
            ValueError: fewer than 2 rows.
        """
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 rows of features; got {self.count}.")
        return self.mean, self.scatter / (self.count - 1)


def statistics(features: np.ndarray) -> Statistics:
    """Compute the statistics of a batch of features.

    Args:
        features: [n, f], finite; n may be 0.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    return _statistics(_checked(features, least=0))


def _statistics(features: np.ndarray) -> Statistics:
    mean = features.mean(axis=0) if len(features) else np.zeros(features.shape[1])
    centred = features - mean
    return Statistics(len(features), mean, centred.T @ centred)


def merge(*parts: Statistics) -> Statistics:
    """Merge statistics of disjoint sets of images (Chan et al. 1979), in any grouping.

    Args:
        *parts: one or more, with as many features each.

    Raises:
        ValueError: unlike numbers of features.
    """
    return functools.reduce(_merge_two, parts)


def _merge_two(a: Statistics, b: Statistics) -> Statistics:
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"Statistics of {a.mean.size} and of {b.mean.size} features do not merge.")
    count = a.count + b.count
    if not count:
        return a
    step = b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(step, step) * (a.count * b.count / count)
    return Statistics(count, a.mean + step * (b.count / count), scatter)


def merge_processes(own: Statistics) -> Statistics:
    """Merge the statistics of all processes; every process must call it, and gets the same.

    Args:
        own: of this process's share of the images; it may be empty.
    """
    if jax.process_count() == 1:
        return own
    flat = np.concatenate([[own.count], own.mean, own.scatter.ravel()]).astype(np.float64)
    rows = sharding.stack(flat[None])
    f = own.mean.size
    return merge(*(Statistics(int(r[0]), r[1 : f + 1], r[f + 1 :].reshape(f, f)) for r in rows))


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute mean and covariance (n - 1 below) of features.

    Args:
        features: [n, f], finite, n at least 2.

    Returns:
        float64 mean [f] and covariance [f, f].

    Raises:
        ValueError: another shape, too few rows, or values that are not finite.
    """
    return _statistics(_checked(features, least=2)).moments


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
    f = np.size(mean1)
    shapes = [np.shape(part) for part in (mean1, covariance1, mean2, covariance2)]
    if shapes != [(f,), (f, f)] * 2:
        raise ValueError(f"Means [f] and covariances [f, f] are needed; got {shapes}.")
    return _distance(_factored(mean1, covariance1), _factored(mean2, covariance2))


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
    features1 = _checked(features1, least=2)
    if isinstance(features2, tuple):
        drawn, second = None, _factored(*features2)
    else:
        drawn = _checked(features2, least=2)
        second = _gaussian(drawn)
    value = _distance(_gaussian(features1), second)
    generator = _generator(key)
    redrawn = np.zeros(draws)
    for i in range(draws):
        first = _gaussian(_redraw(generator, features1))
        second = second if drawn is None else _gaussian(_redraw(generator, drawn))
        redrawn[i] = _distance(first, second)
    low, high = _interval(redrawn - redrawn.mean(), confidence)
    bounds = max(0.0, value + low), value + high
    return Distance(value, *bounds, float(redrawn.std()), draws, len(features1))


def kernel_mmd(features1: np.ndarray, features2: np.ndarray) -> float:
    """Compute the unbiased squared MMD of two sets for the kernel (x . y / f + 1)^3.

    This is the KID of one subset (Binkowski et al. 2018); it may be a little below 0.

    Args:
        features1: [n1, f], n1 at least 2.
        features2: [n2, f].

    Raises:
        ValueError: shapes that do not fit, or too few rows.
    """
    x, y = (np.asarray(part, np.float64) for part in (features1, features2))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        shapes = f"{list(x.shape)} and {list(y.shape)}"
        raise ValueError(f"Features [n1 >= 2, f] and [n2 >= 2, f] are needed; got {shapes}.")
    within = 0.0
    for part in (x, y):
        kernel = _kernel(part, part)
        within += (kernel.sum() - np.trace(kernel)) / (len(part) * (len(part) - 1))
    return float(within - 2.0 * _kernel(x, y).mean())


def kernel_distance(
    key: jax.Array,
    features1: np.ndarray,
    features2: np.ndarray,
    *,
    subsets: int = 100,
    size: int = 1000,
    confidence: float = 0.95,
) -> Distance:
    """Compute the kernel (Inception) distance: the mean of `kernel_mmd` over random subsets.

    With features of the FID-Inception this is the KID (Binkowski et al. 2018).

    Args:
        key: random key; draws the subsets, each without replacement.
        features1: [n1, f], of the images measured.
        features2: [n2, f], of the reference.
        subsets: how many.
        size: rows of a subset, at most n1 and n2.
        confidence: of the interval, in which that share of the subsets' values lies.

    Raises:
        UserError: no subset, or a size outside 2..min(n1, n2).
    """
    features1, features2 = np.asarray(features1), np.asarray(features2)
    most = min(len(features1), len(features2))
    if subsets < 1 or not 2 <= size <= most:
        raise UserError(
            f"subsets must be >= 1 and size 2..{most}, the smaller set; got {subsets} of {size}."
        )
    generator, values = _generator(key), np.zeros(subsets)
    for i in range(subsets):
        rows1, rows2 = (generator.choice(len(f), size, False) for f in (features1, features2))
        values[i] = kernel_mmd(features1[rows1], features2[rows2])
    return _over_draws(values, len(features1), confidence)


def inception_score(logits: np.ndarray, *, splits: int = 10, confidence: float = 0.95) -> Distance:
    """Compute the Inception Score, exp(E KL(p(class | image) || p(class))), over splits.

    Rows are split in the order they come in: shuffle them first where it means something.
    (Salimans et al. 2016.)

    Args:
        logits: [n, classes], as `inception.logits` gives them.
        splits: parts, each scored by itself; the value is their mean.
        confidence: of the interval, in which that share of the splits' values lies.

    Raises:
        UserError: fewer images than splits, or no split.
        ValueError: another shape.
    """
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2:
        raise ValueError(f"Logits must be [n, classes]; got {list(logits.shape)}.")
    n = len(logits)
    if not 1 <= splits <= n:
        raise UserError(f"splits must be 1..{n}, the number of images; got {splits}.")
    log_shares = scipy.special.log_softmax(logits, axis=1)
    values = np.zeros(splits)
    for i in range(splits):
        part = log_shares[i * n // splits : (i + 1) * n // splits]
        log_mean = scipy.special.logsumexp(part, axis=0) - np.log(len(part))
        divergence = np.sum(np.exp(part) * (part - log_mean), axis=1)
        values[i] = np.exp(divergence.mean())
    return _over_draws(values, n, confidence)


def _over_draws(values: np.ndarray, images: int, confidence: float) -> Distance:
    low, high = _interval(values, confidence)
    return Distance(float(values.mean()), low, high, float(values.std()), len(values), images)


def _interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(values, [tail, 1.0 - tail])
    return float(low), float(high)


def _generator(key: jax.Array) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _checked(features: np.ndarray, *, least: int) -> np.ndarray:
    """Check features [n >= least, f] and bring them to float64."""
    features = np.asarray(features)
    if features.ndim != 2 or len(features) < least:
        raise ValueError(f"Features must be [n >= {least}, f]; got {list(features.shape)}.")
    bad = int((~np.isfinite(features)).sum())
    if bad:
        raise ValueError(f"{bad} of {features.size} feature values are not finite.")
    return features.astype(np.float64)


def _gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give mean [f] and a factor A [r, f] of the covariance A^T A of features, checked before."""
    n, f = features.shape
    if n > f:
        return _factored(*_statistics(features).moments)
    mean = features.mean(axis=0)
    return mean, (features - mean) / np.sqrt(n - 1)  # exact, and far smaller than the covariance


def _factored(mean: np.ndarray, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give a mean and the symmetric square root of a covariance, as a factor of it."""
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    # Negative eigenvalues are rounding.
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return np.asarray(mean, np.float64), root


def _distance(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> float:
    """Compute the Fréchet distance of two Gaussians, each a mean and a factor of its covariance.

    The trace of (S1 S2)^(1/2) is the sum of the singular values of A1 A2^T, whichever the factors.
    """
    overlap = scipy.linalg.svdvals(first[1] @ second[1].T).sum()
    traces = sum(float(np.sum(factor**2)) for _, factor in (first, second))
    # Rounding can leave equal sets a hair below zero.
    return max(0.0, float(np.sum((first[0] - second[0]) ** 2) + traces - 2.0 * overlap))


def _redraw(generator: np.random.Generator, features: np.ndarray) -> np.ndarray:
    return features[generator.integers(0, len(features), len(features))]
