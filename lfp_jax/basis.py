"""Directions in which a generator's latents spread, and their split into carrier and nuisance.

Principal directions, by falling variance (the paper's); those of the same spread turned to the axes
of the generator's mean metric, by falling sensitivity of the image; or some that are correlated
under the prior: random ones, the metric's own axes, those that noise hides least. Fitted once on
the host in float64, so that weak directions are right; stored in float32. A latent of any shape is
a flat vector of d values here.
"""

import dataclasses
import operator
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from scipy.linalg import helmert

from lfp_jax import sensitivity
from lfp_jax.errors import UserError, choose
from lfp_jax.generators import zoo
from lfp_jax.weights import store

DIRECTIONS = dict.fromkeys(("pca", "sensitivity", "random", "jacobian", "fisher"))

_CHUNK = 4096  # latents brought to float64 at once
_BATCH = 64  # latents sampled at once
_LEAST_SPREAD = 1e-6  # of a direction, as a share of the widest's: it has a dual all the same
_MOST_PIXELS = 2**40  # of an image: more is no number of pixels
_INFORMED = 1_024  # most sensitive directions, at most, whose information is measured


@flax.struct.dataclass
class Basis:
    """Mean, directions and spread of latents: w = mean + components alpha.

    alpha are uncorrelated, or `prior` tells how latents spread.
    """

    mean: jax.Array  # [d]
    components: jax.Array  # [d, m], largest entry of each column positive
    stddev: jax.Array  # [m], of alpha; of correlated ones each given all others
    duals: jax.Array | None = None  # [d, m], alpha = duals^T (w - mean); orthonormal: components
    prior: jax.Array | None = None  # [d, m], orthogonal: w = mean + prior t, t of covariance I


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
    components, spread = np.asarray(basis.components, np.float64), _spread(basis)
    steps = _steps(basis)
    axes = np.linalg.eigh(steps.T @ np.asarray(metric, np.float64) @ steps)[1][:, ::-1]
    axes = axes * _signs(steps @ axes)
    return Basis(
        mean=basis.mean,
        components=jnp.asarray(steps @ axes, jnp.float32),
        stddev=jnp.ones(len(spread), jnp.float32),
        duals=jnp.asarray((components / spread) @ axes, jnp.float32),
    )


def correlate(basis: Basis, matrix: np.ndarray) -> Basis:
    """Take any other directions in the span of latents, correlated or not.

    Args:
        basis: of `fit`, orthonormal.
        matrix: [m, m], the new directions in units of the spread along the old ones.

    Returns:
        A basis of as many directions.
    """
    steps = _steps(basis)
    components = steps @ matrix
    return Basis(
        mean=basis.mean,
        components=jnp.asarray(components * _signs(components), jnp.float32),
        stddev=jnp.asarray(1.0 / np.linalg.norm(matrix, axis=0), jnp.float32),
        prior=jnp.asarray(steps, jnp.float32),
    )


def random_directions(key: jax.Array, basis: Basis) -> Basis:
    """Draw orthonormal directions of latents, evenly over all.

    Args:
        key: random key.
        basis: of `fit`, orthonormal.

    Returns:
        A basis of as many directions.
    """
    m = basis.components.shape[1]
    drawn = np.asarray(jax.random.normal(key, (m, m)), np.float64)
    return correlate(basis, np.linalg.qr(drawn)[0] / _spread(basis)[:, None])


def jacobian_directions(basis: Basis, metric: np.ndarray) -> Basis:
    """Find the axes of a metric: orthonormal directions of latents, by falling change of the image.

    A step of one has length one, however far latents spread along it. (Those of `turn` are the axes
    in units of that spread.)

    Args:
        basis: of `fit`, orthonormal.
        metric: [d, d] of `sensitivity.mean_metric`.

    Returns:
        A basis of as many directions.
    """
    components = np.asarray(basis.components, np.float64)
    axes = np.linalg.eigh(components.T @ np.asarray(metric, np.float64) @ components)[1][:, ::-1]
    return correlate(basis, axes / _spread(basis)[:, None])


def fisher_directions(
    key: jax.Array,
    generator: Any,
    basis: Basis,
    metric: np.ndarray,
    *,
    noise: float,
    samples: int = 32,
) -> Basis:
    """Find the directions along which an image tells most, for what a step costs.

    Let t be latents in units of their spread, prior N(0, I), and J the derivative of the image by
    t. With noise of variance v and all else, U, marginalised by its prior, an image tells of steps
    along V (both orthonormal here)

        F = V^T J^T (v I + J U U^T J^T)^-1 J V = (V^T (I + M)^-1 V)^-1 - I,  M = J^T J / v,

    the inverse of their posterior covariance without their own prior (Schur's complement). It is
    V^T M V at most, the change of the image in units of the noise, and just that along the axes of
    M: were J the same everywhere, `turn` would lose nothing. But J varies, and at each latent other
    directions answer through much the same pixels as the carrier.

    A key must be read whatever the latent, so posterior covariances are averaged over the prior,
    not informations, whose mean a few clear images would rule. What the mean tells is

        K = E[(I + M)^-1]^-1 - I  <=  E[M]

    (the inverse is operator convex), and what a step u tells for its cost u^T K u / u^T (E[M] + I)
    u: the cost is the change of the image in units of the noise and that of the latent in units
    of the prior. Without the latter the image would hardly feel the best directions, and steps
    along them leave the prior far behind. Directions are the eigenvectors of this pair, by falling
    ratio; neither K nor the cost ties one to another.

    Args:
        key: draws the latents to linearise at.
        generator: a frozen generator.
        basis: of `fit`, orthonormal.
        metric: [d, d] of `sensitivity.mean_metric`.
        noise: standard deviation of a pixel's noise, images in [-1, 1].
        samples: latents, a whole Jacobian each.

    Returns:
        A basis of as many directions, each a step of one standard deviation of the prior. After the
        1,024 most sensitive ones, among which these are sought, the others follow as of `turn`.

    Raises:
        UserError: no samples, or a noise below 0.02.
    """
    steps = _steps(basis)
    squares, axes = np.linalg.eigh(steps.T @ np.asarray(metric, np.float64) @ steps)
    squares, axes = squares[::-1], axes[:, ::-1]
    squares, leading = squares[:_INFORMED], axes[:, :_INFORMED]
    posterior = sensitivity.mean_posterior(
        key, generator, steps @ leading, noise=noise, samples=samples
    )
    unit = np.eye(len(squares))
    information = np.linalg.inv(posterior) - unit
    cost = np.diag(np.maximum(squares, 0.0)) / noise**2 + unit
    telling = scipy.linalg.eigh(information, cost)[1][:, ::-1]
    found = leading @ (telling / np.linalg.norm(telling, axis=0))
    return correlate(basis, np.concatenate([found, axes[:, _INFORMED:]], axis=1))


def fit_generator(key: jax.Array, generator: Any, *, samples: int) -> Basis:
    """Find the principal directions of a generator's latents: `fit` on samples of its prior.

    Args:
        key: draws the samples.
        generator: a frozen generator.
        samples: how many latents.
    """
    return fit(sample(key, generator, samples))


def measure_generator(
    key: jax.Array,
    generator: Any,
    *,
    samples: int,
    directions: str,
    metric_samples: int = 4_096,
    noise: float = 0.1,
    fisher_samples: int = 32,
) -> tuple[Basis, np.ndarray]:
    """Find directions of a generator's latents, and the metric of its images.

    Args:
        key: draws the samples.
        generator: a frozen generator.
        samples: how many latents.
        directions: "pca" (of `fit`), "sensitivity" (of `turn`), or "random", "jacobian", "fisher"
            (of `random_directions` and so on).
        metric_samples: images behind the metric.
        noise, fisher_samples: of `fisher_directions`.

    Returns:
        The basis, and the metric, float32 [d, d], of `sensitivity.mean_metric`.

    Raises:
        UserError: other directions.
    """
    choose(directions, DIRECTIONS, "basis")
    wanted = _origin(key, generator, samples, metric_samples)
    fitted, metric = _shipped(generator.name, wanted) or _measure(key, generator, wanted)
    random_key, fisher_key = jax.random.fold_in(key, 2), jax.random.fold_in(key, 3)
    if directions == "sensitivity":
        fitted = turn(fitted, metric)
    elif directions == "random":
        fitted = random_directions(random_key, fitted)
    elif directions == "jacobian":
        fitted = jacobian_directions(fitted, metric)
    elif directions == "fisher":
        fitted = fisher_directions(
            fisher_key, generator, fitted, metric, noise=noise, samples=fisher_samples
        )
    return fitted, metric


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


def _origin(key: jax.Array, generator: Any, samples: int, metric_samples: int) -> dict[str, Any]:
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


def _shipped(name: str, wanted: dict[str, Any]) -> tuple[Basis, np.ndarray] | None:
    """Read directions and metric from a bundle, or None where it has none of this origin."""
    path = zoo.basis(name)
    if path is None:
        return None
    tree, metadata = store.load(path)
    return (Basis(**tree["basis"]), tree["metric"]) if metadata == wanted else None


def _measure(key: jax.Array, generator: Any, origin: dict[str, Any]) -> tuple[Basis, np.ndarray]:
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
def _sample(key: jax.Array, generator: Any, start: int) -> jax.Array:
    return generator.sample(key, _BATCH, start=start)


def stored_pixels(metadata: dict[str, Any]) -> int | None:
    """Give the values of an image, colours apart, that a stored basis tells; None: it tells none.

    Raises:
        ValueError: what it tells is no such number.
    """
    pixels = metadata.get("pixels")
    if pixels is not None and not (type(pixels) is int and 0 < pixels < _MOST_PIXELS):
        raise ValueError(f"An image cannot have {pixels!r} values.")
    return pixels


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


def split(
    basis: Basis,
    *,
    bits: int = 64,
    shift: int | None = None,
    repeat: int = 1,
    metric: np.ndarray | None = None,
) -> Space:
    """Take consecutive directions as the carrier.

    A bit that is repeated steps along the sum of directions shift + i, shift + bits + i, ... What
    latents hold between those, orthogonal to the sum, is nuisance and stays as it is.

    Where directions are correlated under the prior, of a latent w - m = V a + rest the carrier
    takes that a with which the rest is uncorrelated, a = (V^T S^-1 V)^-1 V^T S^-1 (w - m), S the
    covariance of latents: nothing else would change latents, and images, less. Nuisance directions
    are the principal ones of the rest.

    Args:
        basis: m directions of latents.
        bits: k, how many are carried.
        shift: the first carrying direction; default m - repeat * bits, the last ones.
        repeat: directions that carry each bit.
        metric: [d, d], whose form of a step is the mean square change of an image's pixels. Given,
            carrying steps are scaled: all change the image alike, and `strength` is to first order
            the root mean square change that a key makes (antipodal code).

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
    if basis.prior is None:
        space = _part(_gather(basis, shift, bits, repeat) if repeat > 1 else basis, shift, bits)
    else:
        directions = np.asarray(basis.components, np.float64)[:, shift : shift + taken]
        space = _condition(basis, directions.reshape(-1, repeat, bits).sum(axis=1))
    return space if metric is None else _equalise(space, metric)


def _part(basis: Basis, shift: int, bits: int) -> Space:
    """Split uncorrelated directions."""
    carries = np.zeros(basis.components.shape[1], bool)
    carries[shift : shift + bits] = True
    duals = basis.duals
    return Space(
        mean=basis.mean,
        carrier=basis.components[:, carries],
        nuisance=basis.components[:, ~carries],
        nuisance_stddev=basis.stddev[~carries],
        carrier_stddev=basis.stddev[carries],
        carrier_dual=None if duals is None else duals[:, carries],
        nuisance_dual=None if duals is None else duals[:, ~carries],
    )


def _condition(basis: Basis, carrier: np.ndarray) -> Space:
    """Split a carrier [d, k] of correlated directions from what is uncorrelated with its part."""
    steps, k = np.asarray(basis.prior, np.float64), carrier.shape[1]
    inverse = steps / np.square(steps).sum(axis=0)  # t = inverse^T (w - mean)
    axes, factor = np.linalg.qr(inverse.T @ carrier, mode="complete")
    reading = np.linalg.inv(factor[:k])  # a = reading axes^T t
    dual = inverse @ axes[:, :k] @ reading.T
    nuisance, stddev, _ = np.linalg.svd(steps @ axes[:, k:], full_matrices=False)
    nuisance = nuisance * _signs(nuisance)
    arrays = {
        "carrier": carrier, "carrier_stddev": np.linalg.norm(reading, axis=1),
        "carrier_dual": dual, "nuisance": nuisance, "nuisance_stddev": stddev,
        "nuisance_dual": nuisance - dual @ (carrier.T @ nuisance),
    }  # fmt: skip
    arrays = {name: jnp.asarray(each, jnp.float32) for name, each in arrays.items()}
    return Space(mean=basis.mean, **arrays)


def _equalise(space: Space, metric: np.ndarray) -> Space:
    """Scale the k steps of the carrier such that each changes the image by a mean square of 4/k."""
    carrier = np.asarray(space.carrier, np.float64)
    squares = np.sum(carrier * (np.asarray(metric, np.float64) @ carrier), axis=0)
    squares = np.maximum(squares, np.finfo(np.float32).tiny)
    scale = jnp.asarray(np.sqrt(4.0 / (len(squares) * squares)), jnp.float32)
    dual = space.carrier if space.carrier_dual is None else space.carrier_dual
    return dataclasses.replace(
        space,
        carrier=space.carrier * scale[None],
        carrier_stddev=space.carrier_stddev / scale,
        carrier_dual=dual / scale[None],
    )


def _gather(basis: Basis, shift: int, bits: int, repeat: int) -> Basis:
    """Put the sum of each bit's directions at `shift`, what is orthogonal to the sums behind."""
    turn = helmert(repeat, full=True)  # its first row is the mean, over the root of `repeat`
    scale = np.where(np.arange(repeat) == 0, repeat**0.5, 1.0)
    end = shift + repeat * bits

    def mix(columns: jax.Array | np.ndarray, matrix: np.ndarray) -> jax.Array:
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


def _spread(basis: Basis) -> np.ndarray:
    """Give standard deviations [m] along orthonormal directions, none of them zero."""
    spread = np.asarray(basis.stddev, np.float64)
    return np.maximum(spread, _LEAST_SPREAD * spread.max())


def _steps(basis: Basis) -> np.ndarray:
    """Give orthonormal directions [d, m], each as long as latents spread along it."""
    return np.asarray(basis.components, np.float64) * _spread(basis)


def _principal(rows: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def _signs(components: np.ndarray) -> np.ndarray:
    """Give +1 or -1 a column, such that its entry of largest magnitude becomes positive."""
    largest = np.abs(components).argmax(axis=0)
    return np.where(np.take_along_axis(components, largest[None], axis=0) < 0.0, -1.0, 1.0)
