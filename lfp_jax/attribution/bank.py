"""What is known of a generator before any image: samples of the prior, and how its images move.

From a bank come the starts of a descent (the nearest samples, and a regression of latents by small
pictures) and its coordinates (the mean metric).
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lfp_jax.attacks import separable
from lfp_jax.errors import UserError
from lfp_jax.logs import Progress

_THUMBNAIL = 16
_NEAR = 512  # samples in a regression
_RIDGE = 0.1  # of it, as a share of the kernel's greatest value


class Bank(flax.struct.PyTreeNode):
    """Samples of the prior of one generator; made once, shared by all images and users."""

    latents: jax.Array | np.ndarray  # [N, d]
    thumbnails: jax.Array | np.ndarray  # [N, t, t, C], small pictures of them
    metric: jax.Array | np.ndarray  # [d, d] of `sensitivity.mean_metric`


def thumbnails(images):
    """Average images [n, H, W, C] over blocks down to about 16 x 16: [n, t, t, C]."""
    n, height, width, channels = images.shape
    high, wide = max(height // _THUMBNAIL, 1), max(width // _THUMBNAIL, 1)
    cut = images[:, : height // high * high, : width // wide * wide]
    blocks = cut.reshape(n, height // high, high, width // wide, wide, channels)
    return jnp.clip(blocks, -1.0, 1.0).mean((2, 4))


def make_bank(key, generator, *, size, metric, batch=256):
    """Decode samples of the prior.

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
    return Bank(latents, small, metric)


@partial(jax.jit, static_argnames=("count",))
def guesses(bank, image, *, count, keep=1.0):
    """Guess latents [count, d] of an image: by regression, then the nearest samples of the bank.

    Regression (kernel ridge, of latents by thumbnails, on the samples nearest by) is nearer on the
    whole, a sample is never far off the prior.

    Args:
        bank: a Bank.
        image: [H, W, C].
        count: guesses.
        keep: share of each side that a crop from the middle has kept of it.
    """
    latents, small = bank.latents, _crop(bank.thumbnails, keep)
    target, rows = thumbnails(image[None]).reshape(1, -1), small.reshape(len(small), -1)
    width = 2.0 * jnp.sum(jnp.var(rows, axis=0))
    squares, near = jax.lax.top_k(-_squares(target, rows)[0], min(_NEAR, len(rows)))
    kernel = jnp.exp(-_squares(rows[near], rows[near]) / width) + _RIDGE * jnp.eye(len(near))
    weights = jax.scipy.linalg.solve(kernel, jnp.exp(squares / width), assume_a="pos")
    mean = jnp.mean(latents[near], axis=0)
    offset = jnp.einsum("b,bd->d", weights, latents[near] - mean[None], precision="highest")
    return jnp.concatenate([(mean + offset)[None], latents[near[: count - 1]]])


def _crop(small, keep):
    rows, columns = (
        separable.crop(size, start=0.5 * (1.0 - keep) * size, length=keep * size)
        for size in small.shape[1:3]
    )
    return jax.vmap(separable.transform, in_axes=(0, None, None))(small, rows, columns)


def _squares(left, right):
    """Squared distances [n, m] of rows."""
    product = jnp.einsum("nt,mt->nm", left, right, precision="highest")
    norms = [jnp.sum(jnp.square(rows), axis=1) for rows in (left, right)]
    return jnp.maximum(norms[0][:, None] + norms[1][None] - 2.0 * product, 0.0)
