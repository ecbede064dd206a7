"""From a Gaussian over relaxed bits to probabilities of the bits, which are -1 or 1 together.

A descent ends in a posterior N(b, C) of the whitened bits under the prior N(0, I), everything else
marginalised. Without that prior it is a likelihood: the image says z = c + error of covariance D,
with D = (C^-1 - I)^-1 and z = (I + D) b. Bits are tied to each other, for they move the same
pixels. Rounding each by itself loses what they say of one another, so the probabilities are those
of the likelihood over all 2^k keys, by annealing a population of them (Hukushima and Iba 2003,
Population annealing and its application to a spin glass). On the host, in float64.
"""

import numpy as np

_POPULATION = 64
_WIDTHS = np.append(2.0 * 0.75 ** np.arange(20), 0.0)  # of the bits' own errors, from wide to none
_SWEEPS = 2  # at each width
_MEAN_OF = 12  # sweeps averaged at the last one
_FITS = 0.8  # squared standard deviations a bit that the best key found should have at least
_BELIEVED = 1e-6  # the least variance that a Gaussian may claim, as a share of the prior's


def soft_bits(seed, mean, covariance):
    """Give the probability [k] that each bit is one.

    The Gaussian knows neither the curvature of the generator nor what a coarse Jacobian leaves out.
    Their error, taken independent and alike for all bits, is the least that makes the best key
    found fit as a right one would: k in squared standard deviations, and a share less, since of a
    population of keys the best one fits better than the right one. The share was set by how often
    stated probabilities came true.

    Args:
        seed: of the draws.
        mean: b [k].
        covariance: C [k, k].
    """
    k = len(mean)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        return np.full(k, 0.5)
    rng = np.random.default_rng(seed)
    values, axes = np.linalg.eigh(np.asarray(covariance, np.float64))
    values = np.clip(values, _BELIEVED, 1.0 - _BELIEVED)
    errors = values / (1.0 - values)  # variances of D along its axes
    seen = axes @ ((axes.T @ mean) / (1.0 - values))  # z
    keys = rng.choice((-1.0, 1.0), (_POPULATION, k))
    misfit = np.zeros(_POPULATION)
    for width in _WIDTHS:
        matrix = (axes / (errors + width**2)) @ axes.T
        keys = keys[_resample(rng, 0.5 * (misfit - _misfit(matrix, seen, keys)))]
        for _ in range(_SWEEPS):
            _sweep(rng, matrix, seen, keys)
        misfit = _misfit(matrix, seen, keys)
        if misfit.min() > _FITS * k:
            break
    return np.mean([_sweep(rng, matrix, seen, keys) for _ in range(_MEAN_OF)], axis=(0, 1))


def _misfit(matrix, seen, keys):
    """Squared standard deviations [c] of keys [c, k] from what was seen."""
    off = seen[None] - keys
    return np.sum((off @ matrix) * off, axis=1)


def _resample(rng, log_weights):
    """Draw as many indices as there are weights, in proportion to them, with evenly set shots."""
    ends = np.cumsum(np.exp(log_weights - log_weights.max()))
    shots = (np.arange(len(ends)) + rng.random()) * (ends[-1] / len(ends))
    return np.minimum(np.searchsorted(ends, shots), len(ends) - 1)


def _sweep(rng, matrix, seen, keys):
    """Draw each bit of keys [c, k] anew given the others, in place; the chances of a one [c, k]."""
    pull = (seen[None] - keys) @ matrix
    draws, chances = rng.random(keys.shape), np.empty_like(keys)
    for i in rng.permutation(keys.shape[1]):
        lean = np.clip(2.0 * (pull[:, i] + matrix[i, i] * keys[:, i]), -700.0, 700.0)
        chances[:, i] = 1.0 / (1.0 + np.exp(-lean))
        new = np.where(draws[:, i] < chances[:, i], 1.0, -1.0)
        pull -= np.outer(new - keys[:, i], matrix[i])
        keys[:, i] = new
    return chances
