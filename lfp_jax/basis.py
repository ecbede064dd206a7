"""Directions in which a generator's latents spread, and their split into carrier and nuisance.

Principal directions, by falling variance (the paper's), or those of the same spread turned to the
axes of the generator's mean metric, by falling sensitivity of the image. Fitted once on the host in
float64, so that weak directions are right; stored in float32. A latent of any shape is a flat
vector of d values here.
"""

import operator
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import helmert

from lfp_jax import sensitivity
from lfp_jax.errors import UserError, choose
from lfp_jax.generators import zoo
from lfp_jax.weights import store

DIRECTIONS = {"pca": False, "sensitivity": True}  # those turned to the metric

_CHUNK = 4096  # latents brought to float64 at once
_BATCH = 64  # latents sampled at once
_LEAST_SPREAD = 1e-6  # of a direction, as a share of the widest's: it has a dual all the same


@flax.struct.dataclass
class Basis:
    """Mean, directions and spread of latents, uncorrelated: w = mean + components alpha."""

    mean: jax.Array  # [d]
    components: jax.Array  # [d, m], largest entry of each column positive
    stddev: jax.Array  # [m], of alpha
    duals: jax.Array | None = None  # [d, m], alpha = duals^T (w - mean); orthonormal: components


@flax.struct.dataclass
class Space:
    """A basis split in two: the carrier holds the bits, the nuisance is everything else."""

    mean: jax.Array  # [d]
    carrier: jax.Array  # [d, k]
    nuisance: jax.Array  # [d, m - k], in the order of the basis
    nuisance_stddev: jax.Array  # [m - k]
    carrier_stddev: jax.Array  # [k]
    carrier_dual: jax.Array | None = None  # [d, k]; of orthonormal directions themselves
    nuisance_dual: jax.Array | None = None  # [d, m - k]


def fit(latents: np.ndarray) -> Basis:
    """Find the principal directions of latents: orthonormal, by falling variance.

    The sign of a direction is free; here its entry of largest magnitude is positive. (Stored bases
    are what keys refer to: two machines may fit close directions in another order.)

    Args:
        latents: [n, *latent_shape], samples of the prior.

    Returns:
        A basis of m = min(d, n - 1) directions: n latents span no more.

    Raises:
        UserError: fewer than two latents, or values that are not finite.
    """
    latents = np.asarray(latents)
    if len(latents) < 2:
        raise UserError(f"A basis needs at least 2 latents; got {len(latents)}.")
    rows = latents.reshape(len(latents), -1)
    with np.errstate(invalid="ignore"):  # infinities of both signs: said below
        mean = rows.mean(axis=0, dtype=np.float64)
    if not np.isfinite(mean).all():
        raise UserError(f"{int((~np.isfinite(rows)).sum())} values of the latents are not finite.")
    variance, components = _principal(rows, mean)
    components = components * _signs(components)
    return Basis(
        mean=jnp.asarray(mean, jnp.float32),
        components=jnp.asarray(components, jnp.float32),
        stddev=jnp.asarray(np.sqrt(np.maximum(variance, 0.0)), jnp.float32),
    )


def turn(basis: Basis, metric: np.ndarray) -> Basis:
    """Turn a basis to the axes of a metric, by falling sensitivity of the image.

    In units of their spread the old coordinates are uncorrelated and alike, and stay so under any
    rotation: of all those bases this one makes steps along different directions change the image,
    on average, in ways orthogonal to each other. Its directions are not orthogonal themselves, and
    a step of one is one standard deviation of the prior.

    Args:
        basis: of `fit`, orthonormal.
        metric: [d, d] of `sensitivity.mean_metric`.

    Returns:
        A basis of as many directions, all of spread 1.
    """
    components, spread = np.asarray(basis.components, np.float64), np.asarray(basis.stddev)
    spread = np.maximum(spread.astype(np.float64), _LEAST_SPREAD * spread.max())
    steps = components * spread
    axes = np.linalg.eigh(steps.T @ np.asarray(metric, np.float64) @ steps)[1][:, ::-1]
    axes = axes * _signs(steps @ axes)
    return Basis(
        mean=basis.mean,
        components=jnp.asarray(steps @ axes, jnp.float32),
        stddev=jnp.ones(len(spread), jnp.float32),
        duals=jnp.asarray((components / spread) @ axes, jnp.float32),
    )


def fit_generator(key: jax.Array, generator: Any, *, samples: int) -> Basis:
    """Find the principal directions of a generator's latents: `fit` on samples of its prior.

    Args:
        key: draws the samples.
        generator: a frozen generator.
        samples: how many latents.
    """
    return fit(sample(key, generator, samples))


def measure_generator(
    key: jax.Array, generator: Any, *, samples: int, directions: str, metric_samples: int = 4_096
) -> tuple[Basis, np.ndarray]:
    """Find directions of a generator's latents, and the metric of its images.

    Args:
        key: draws the samples.
        generator: a frozen generator.
        samples: how many latents.
        directions: "pca" (of `fit`), or "sensitivity" (of `turn`).
        metric_samples: images behind the metric.

    Returns:
        The basis, and the metric, float32 [d, d], of `sensitivity.mean_metric`.

    Raises:
        UserError: other directions.
    """
    turned = choose(directions, DIRECTIONS, "basis")
    wanted = _origin(key, generator, samples, metric_samples)
    fitted, metric = _shipped(generator.name, wanted) or _measure(key, generator, wanted)
    return turn(fitted, metric) if turned else fitted, metric


def ship(key: jax.Array, path: str, generator: Any, *, samples: int, metric_samples: int) -> None:
    """Write the principal directions and the metric, for `measure_generator` to find in a bundle.

    It saves each user the measurement, and close directions come out in the same order on every
    machine: a trained estimator knows them.

    Args:
        key, generator, samples, metric_samples: as of `measure_generator`.
        path: the store to write, later at `zoo.basis(generator.name)`.
    """
    origin = _origin(key, generator, samples, metric_samples)
    fitted, metric = _measure(key, generator, origin)
    arrays = {name: each for name, each in vars(fitted).items() if each is not None}
    store.save(path, {"basis": arrays, "metric": metric}, origin)


def _origin(key, generator, samples, metric_samples):
    """Give all that principal directions and metric depend on.

    But for the quantiser of a latent-diffusion model, which gradients pass as if it were not there.
    """
    return {
        "kind": "directions",
        "generator": generator.name,
        "sha256": generator.sha256,
        "sample_steps": getattr(generator, "sample_steps", None),
        "key": jax.random.key_data(key).tolist(),
        "samples": samples,
        "metric_samples": metric_samples,
    }


def _shipped(name, wanted):
    """Read directions and metric from a bundle, or None where it has none of this origin."""
    path = zoo.basis(name)
    if path is None:
        return None
    tree, metadata = store.load(path)
    return (Basis(**tree["basis"]), tree["metric"]) if metadata == wanted else None


def _measure(key, generator, origin):
    fitted = fit_generator(key, generator, samples=origin["samples"])
    metric = sensitivity.mean_metric(
        jax.random.fold_in(key, 1), generator, samples=origin["metric_samples"]
    )
    return fitted, metric.astype(np.float32)


def sample(key: jax.Array, generator: Any, n: int, *, start: int = 0) -> np.ndarray:
    """Draw latents start, ..., start + n - 1 of a key, in batches of one shape.

    Args:
        key: random key.
        generator: a frozen generator.
        n: how many.
        start: index of the first.

    Returns:
        [n, *latent_shape] on the host.
    """
    parts = [np.asarray(_sample(key, generator, start + i)) for i in range(0, n, _BATCH)]
    return np.concatenate(parts)[:n]


@jax.jit
def _sample(key, generator, start):
    return generator.sample(key, _BATCH, start=start)


def block(basis: Basis, *, shape: tuple[int, ...], channels: int) -> Basis:
    """Find the principal directions of the first channels of latents, then those of the others.

    A carrier among the leading directions then lies in those channels alone. The two groups are
    each uncorrelated, but not with one another.

    Args:
        basis: of `fit`, orthonormal.
        shape: of a latent, channels last.
        channels: how many the leading directions lie in.

    Returns:
        A basis of all d directions.

    Raises:
        UserError: no channel is left on either side.
    """
    if not 1 <= channels < shape[-1]:
        raise UserError(f"channels must be 1..{shape[-1] - 1}, or unset; got {channels}.")
    d = len(basis.mean)
    rows = np.asarray(basis.components, np.float64) * np.asarray(basis.stddev, np.float64)
    first = np.arange(d) % shape[-1] < channels
    components, variances = np.zeros((d, d)), []
    for chosen, start in ((first, 0), (~first, first.sum())):
        variance, axes = np.linalg.eigh(rows[chosen] @ rows[chosen].T)
        components[chosen, start : start + len(variance)] = axes[:, ::-1]
        variances.append(np.maximum(variance[::-1], 0.0))
    return Basis(
        mean=basis.mean,
        components=jnp.asarray(components * _signs(components), jnp.float32),
        stddev=jnp.asarray(np.sqrt(np.concatenate(variances)), jnp.float32),
    )


def split(basis: Basis, *, bits: int = 64, shift: int | None = None, repeat: int = 1) -> Space:
    """Take consecutive directions as the carrier.

    A bit that is repeated steps along the sum of directions shift + i, shift + bits + i, ... What
    latents hold between those, orthogonal to the sum, is nuisance and stays as it is.

    Args:
        basis: m directions of latents.
        bits: k, how many are carried.
        shift: the first carrying direction; default m - repeat * bits, the last ones.
        repeat: directions that carry each bit.

    Raises:
        UserError: the carrier would reach outside the basis, or holds nothing.
    """
    m = basis.components.shape[1]
    bits, repeat = operator.index(bits), operator.index(repeat)
    if bits < 1 or bits > m:
        raise UserError(f"bits must be 1..{m}, the latent dim; got {bits}.")
    if repeat < 1:
        raise UserError(f"repeat must be >= 1; got {repeat}.")
    taken = repeat * bits
    shift = m - taken if shift is None else operator.index(shift)
    if shift < 0:
        raise UserError(f"shift must be >= 0; got {shift}.")
    if shift + taken > m:
        wide, found = ("shift + bits", f"{bits}") if repeat == 1 else (
            "shift + repeat * bits", f"{repeat} * {bits}"
        )  # fmt: skip
        raise UserError(f"{wide} must be <= latent dim; got {shift} + {found} > {m}.")
    if repeat > 1:
        basis = _gather(basis, shift, bits, repeat)
    carries = np.zeros(m, bool)
    carries[shift : shift + bits] = True
    duals = (None, None)
    if basis.duals is not None:
        duals = (basis.duals[:, carries], basis.duals[:, ~carries])
    return Space(
        mean=basis.mean,
        carrier=basis.components[:, carries],
        nuisance=basis.components[:, ~carries],
        nuisance_stddev=basis.stddev[~carries],
        carrier_stddev=basis.stddev[carries],
        carrier_dual=duals[0],
        nuisance_dual=duals[1],
    )


def _gather(basis, shift, bits, repeat):
    """Put the sum of each bit's directions at `shift`, what is orthogonal to the sums behind."""
    turn = helmert(repeat, full=True)  # its first row is the mean, over the root of `repeat`
    scale = np.where(np.arange(repeat) == 0, repeat**0.5, 1.0)
    end = shift + repeat * bits

    def mix(columns, matrix):
        columns = np.array(columns, np.float64)
        taken = columns[..., shift:end].reshape(*columns.shape[:-1], repeat, bits)
        mixed = np.einsum("cr,...rk->...ck", matrix, taken)
        columns[..., shift:end] = mixed.reshape(*columns.shape[:-1], -1)
        return jnp.asarray(columns, jnp.float32)

    duals = basis.components if basis.duals is None else basis.duals
    spread = np.square(np.asarray(basis.stddev, np.float64))
    return Basis(
        mean=basis.mean,
        components=mix(basis.components, turn * scale[:, None]),
        stddev=jnp.sqrt(mix(spread, np.square(turn / scale[:, None]))),
        duals=mix(duals, turn / scale[:, None]),
    )


def _principal(rows, mean):
    """Give variances [m] and directions [d, m] in float64, by falling variance."""
    n, d = rows.shape
    if n <= d:  # the rows themselves are the smaller problem
        _, singular, directions = np.linalg.svd(rows - mean, full_matrices=False)
        return singular[: n - 1] ** 2 / (n - 1), directions[: n - 1].T
    covariance = np.zeros((d, d))
    for start in range(0, n, _CHUNK):
        centred = rows[start : start + _CHUNK] - mean
        covariance += centred.T @ centred
    variance, directions = np.linalg.eigh(covariance / (n - 1))
    return variance[::-1], directions[:, ::-1]


def _signs(components):
    """Give +1 or -1 a column, such that its entry of largest magnitude becomes positive."""
    largest = np.abs(components).argmax(axis=0)
    return np.where(np.take_along_axis(components, largest[None], axis=0) < 0.0, -1.0, 1.0)
