"""How images move as their latents do: Jacobians, the mean metric, and what noise leaves of it.

J is the derivative of the image, all its pixels, by the latent. A quadratic form of J^T J is the
squared change of the image, summed over pixels, that a step in latent space makes; on average over
the prior it is one of the generator's mean metric E[J^T J].
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lfp_jax import sharding
from lfp_jax.errors import UserError
from lfp_jax.logs import Progress

_CHUNK = 64  # tangents pushed through a function at once
_LEAST_NOISE = 0.02  # below, float32 does not hold J^T J / noise^2 beside the prior's unit matrix


def columns(function, x, tangents, *, chunk=None, chunks=None):
    """Value of a function at x and its derivatives [t, *shape] along tangents [t, n].

    Args:
        function: of arrays [n].
        x: [n].
        tangents: [t, n].
        chunk: tangents pushed through at once (`chunk_size`); None: that of t.
        chunks: how many chunks of the tangents, leading ones, the rest of the rows being zero; may
            be traced, so that one program serves them all. None: all.
    """
    count = len(tangents)
    chunk = chunk_size(count) if chunk is None else chunk
    padded = jnp.pad(tangents, ((0, -count % chunk), (0, 0))).reshape(-1, chunk, len(x))
    value, push = jax.linearize(function, x)

    def fill(i, rows):
        return rows.at[i].set(jax.vmap(push)(padded[i]))

    rows = jnp.zeros((*padded.shape[:2], *value.shape), value.dtype)
    rows = jax.lax.fori_loop(0, len(padded) if chunks is None else chunks, fill, rows)
    return value, rows.reshape(-1, *value.shape)[:count]


def evaluations(count):
    """Count the evaluations of a function that `columns` makes for `count` tangents."""
    return 1 + count + -count % chunk_size(count)


def chunk_size(count):
    """Give the size of chunks of about the same size, _CHUNK at most."""
    return -(-count // -(-count // _CHUNK))


def mean_metric(key, generator, *, samples=4_096, batch=32):
    """Estimate E[J^T J] over the prior from one random probe an image.

    For signs r, independent and fair, E[J^T r r^T J] = J^T J (Hutchinson 1990): a reverse pass an
    image tells as much of the mean as all columns of a few Jacobians would, and sees more images.

    Args:
        key: draws latents and probes.
        generator: a frozen generator.
        samples: images, a reverse pass each.
        batch: images at once.

    Returns:
        float64 [d, d] on the host.

    Raises:
        UserError: no samples.
    """
    if samples < 1:
        raise UserError(f"samples of the mean metric must be >= 1; got {samples}.")
    total: np.ndarray | float = 0.0
    done = 0
    with Progress(samples, label="sensitivity") as progress:
        while done < samples:
            rows = np.asarray(_probe(key, generator, done, batch=batch), np.float64)
            rows = rows[: samples - done]
            total, done = total + rows.T @ rows, done + len(rows)
            progress.update(done)
    return total / samples


def along(metric, directions):
    """Measure how far images move along directions.

    Args:
        metric: [d, d] of `mean_metric`.
        directions: [d, m].

    Returns:
        float64 [m]: the root of the mean squared change of an image by one unit of each direction,
        summed over its pixels; in rms where the metric was divided by how many these are.
    """
    directions = np.asarray(directions, np.float64)
    squares = np.einsum("dm,dm->m", directions, np.asarray(metric, np.float64) @ directions)
    return np.sqrt(np.maximum(squares, 0.0))


@partial(jax.jit, static_argnames=("batch",))
def _probe(key, generator, start, *, batch):
    """J^T r [batch, d] of samples start, start + 1, ... of the prior."""
    latent_key, probe_key = jax.random.split(key)
    latents = generator.sample(latent_key, batch, start=start)
    keys = jax.vmap(partial(jax.random.fold_in, probe_key))(start + jnp.arange(batch))
    signs = jax.vmap(lambda k: jax.random.rademacher(k, generator.image_shape, jnp.float32))(keys)
    _, pull = jax.vjp(generator.decode, latents)
    return pull(signs)[0].reshape(batch, -1)


def mean_posterior(key, generator, steps, *, noise, samples=32):
    """Average what noise leaves unknown of a latent: E[(I + A^T J^T J A / noise^2)^-1].

    Each image is linearised where it is; coordinates t of its latent m + A t have prior N(0, I),
    and a pixel that the 8-bit range clips says nothing. A whole Jacobian an image, one at a time on
    each device of the mesh.

    Args:
        key: draws the latents.
        generator: a frozen generator.
        steps: A [d, r], a standard deviation of the prior each, uncorrelated.
        noise: standard deviation of a pixel's noise, images in [-1, 1].
        samples: images.

    Returns:
        float64 [r, r] on the host, the mean of the posterior covariances of t.

    Raises:
        UserError: no samples, or a noise that float32 cannot resolve.
    """
    if samples < 1:
        raise UserError(f"samples of the mean posterior must be >= 1; got {samples}.")
    if not noise >= _LEAST_NOISE:
        raise UserError(f"noise behind a basis must be >= {_LEAST_NOISE}; got {noise}.")
    mesh = sharding.mesh(devices=jax.local_devices())  # several processes all do the same
    generator, steps = sharding.replicate(mesh, (generator, np.asarray(steps, np.float32)))
    total: np.ndarray | float = 0.0
    unit = np.eye(steps.shape[1])
    with Progress(samples, label="information") as progress:
        for start in range(0, samples, mesh.size):
            latents = sharding.shard(mesh, _draw(key, generator, start, count=mesh.size))
            grams = np.asarray(_grams(generator, steps, latents), np.float64)
            for gram in grams[: samples - start]:
                total = total + np.linalg.inv(unit + gram / noise**2)
            progress.update(min(start + mesh.size, samples))
    return total / samples


@partial(jax.jit, static_argnames=("count",))
def _draw(key, generator, start, *, count):
    return generator.sample(key, count, start=start)


@jax.jit
def _grams(generator, steps, latents):
    """A^T J^T J A [n, r, r] of latents [n, ...], over the pixels that are not clipped."""

    def one(latent):
        def decode(flat):
            return generator.decode(flat.reshape(1, *latent.shape))[0].reshape(-1)

        image, rows = columns(decode, latent.reshape(-1), steps.T)
        rows = rows * (jnp.abs(image) < 1.0)[None]
        return jnp.einsum("ap,bp->ab", rows, rows, precision="highest")

    return jax.vmap(one)(latents)
