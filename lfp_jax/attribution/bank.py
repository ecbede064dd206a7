"""What is known of a generator before any image: samples of the prior, and how its images move.

From a bank come the starts of a descent (the nearest samples, and a regression of latents by small
pictures) and its coordinates (the mean metric).
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from lfp_jax.errors import UserError
from lfp_jax.logs import Progress

_THUMBNAIL = 16
_RIDGE = 0.1  # of the regression, as a share of the kernel's greatest value


class Bank(flax.struct.PyTreeNode):
    """Samples of the prior of one generator; made once, shared by all images and users."""

    latents: jax.Array  # [N, d]
    thumbnails: jax.Array  # [N, t * t * C], small pictures of them
    regression: jax.Array  # [N, d], weights of kernel ridge regression, latents by thumbnails
    metric: jax.Array  # [d, d] of `sensitivity.mean_metric`


def thumbnails(images):
    """Average images [n, H, W, C] over blocks down to about 16 x 16; flat rows [n, t * t * C]."""
    n, height, width, channels = images.shape
    high, wide = max(height // _THUMBNAIL, 1), max(width // _THUMBNAIL, 1)
    cut = images[:, : height // high * high, : width // wide * wide]
    blocks = cut.reshape(n, height // high, high, width // wide, wide, channels)
    return jnp.clip(blocks, -1.0, 1.0).mean((2, 4)).reshape(n, -1)


def make_bank(key, generator, *, size, metric, batch=256):
    """Decode samples of the prior, and learn latents by their thumbnails.

    Made once a generator; shared by all design points, images and users.

    Args:
        key: draws the samples.
        generator: a frozen generator.
        size: samples.
        metric: [d, d] of `sensitivity.mean_metric`.
        batch: samples decoded at once.

    Raises:
        UserError: a size below 2.
    """
    if size < 2:
        raise UserError(f"A bank's size must be >= 2; got {size}.")

    @jax.jit
    def draw(generator, key, start):
        w = generator.sample(key, batch, start=start)
        return w.reshape(batch, -1), thumbnails(generator.decode(w))

    parts = []
    with Progress(size, label="bank") as progress:
        for start in range(0, size, batch):
            parts.append(jax.device_get(draw(generator, key, start)))
            progress.update(min(start + batch, size))
    latents, small = (np.concatenate(part)[:size] for part in zip(*parts, strict=True))
    return Bank(latents, small, regress(small, latents), metric)


def regress(small, latents):
    """Fit kernel ridge regression on the host: weights [N, d]."""
    kernel = np.array(_kernel(_squares(small, small), small))
    kernel[np.diag_indices(len(kernel))] += _RIDGE
    factor = scipy.linalg.cho_factor(kernel, overwrite_a=True, check_finite=False)
    return scipy.linalg.cho_solve(factor, latents - latents.mean(0))


@jax.jit
def _kernel(squares, small):
    """Gaussian kernel of squared distances, as wide as the mean one of the bank's thumbnails."""
    return jnp.exp(-jnp.maximum(squares, 0.0) / (2.0 * jnp.var(small, axis=0).sum()))


@jax.jit
def _squares(left, right):
    """Squared distances [n, m] of rows."""
    product = jnp.einsum("nt,mt->nm", left, right, precision="highest")
    norms = [jnp.sum(jnp.square(rows), axis=1) for rows in (left, right)]
    return norms[0][:, None] + norms[1][None] - 2.0 * product


@partial(jax.jit, static_argnames=("count",))
def guesses(bank, images, *, count):
    """Guess latents [n, count, d] of images: by regression, then the nearest samples of the bank.

    Regression is nearer on the whole, a sample is never far off the prior.
    """
    squares = _squares(thumbnails(images), bank.thumbnails)
    kernel = _kernel(squares, bank.thumbnails)
    regressed = jnp.einsum("nb,bd->nd", kernel, bank.regression, precision="highest")
    first = jnp.mean(bank.latents, axis=0)[None] + regressed
    near = jax.lax.top_k(-squares, count - 1)[1]
    return jnp.concatenate([first[:, None], bank.latents[near]], axis=1)
