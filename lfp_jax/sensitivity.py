"""How far images move as their latents do: the generator's mean metric E[J^T J].

J is the derivative of the image, all its pixels, by the latent. A quadratic form of the metric is
the squared change of the image, summed over pixels, that a step in latent space makes on average.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lfp_jax.errors import UserError
from lfp_jax.logs import Progress


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
    total, done = 0.0, 0
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
