"""Estimate the key of images by the model's own encoder, in one pass: estimator `encoder`.

The first stage of a latent-diffusion model comes with an approximate inverse of its decoder. What
it finds is off by the autoencoder's error and, for VQ, by what the quantiser took away.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lfp_jax import fingerprint
from lfp_jax.attribution.inversion import Silent, Solution, check, residual
from lfp_jax.errors import UserError
from lfp_jax.logs import Progress

_LEAST_VARIANCE = 1e-4  # of a bit that is +-1; keeps exact readings finite
_EVALUATIONS = 2  # a pass of the encoder, which is about a decoder's, and one for the residual


@jax.jit
def _answer(generator, images):
    w = generator.encode(images).reshape(len(images), -1)
    return w, residual(generator, w, images)


def encoder(key, generator, space, images, *, strength, code, batch=64, first=0, progress=True):
    """Estimate keys by encoding the images and reading their latents.

    A bit that was sent as +-1 arrives as b with some error, whose variance the bits of an image
    tell themselves: E (|b| - 1)^2 where errors are small, and E b^2 - 1, if it is more, where they
    are as large as the bit.

    Args:
        key, first: not used; every estimator takes them.
        generator: a frozen generator with an encoder.
        space: carrier, nuisance and mean.
        images: [n, H, W, C] in [-1, 1], already through 8 bits.
        strength, code: as injected.
        batch: images in one program; bounds the memory.
        progress: show a progress line.

    Returns:
        A Solution; soft bits are sigmoid(2 b / var b).

    Raises:
        UserError: a generator without an encoder, images of another shape than it makes, or batch
            below 1.
    """
    del key, first
    if not has_encoder(generator):
        raise UserError(f"'{generator.name}' has no encoder; take another estimator, such as 'lm'.")
    check(generator, images, batch=batch)
    images, n, parts = np.asarray(images, np.float32), len(images), []
    with Progress(n, label="encoder") if progress else Silent() as line:
        for start in range(0, n, batch):
            rows = np.minimum(np.arange(start, start + batch), n - 1)  # one shape, one compilation
            parts.append(jax.device_get(_answer(generator, images[rows])))
            line.update(min(start + batch, n))
    w, rms = (jnp.asarray(np.concatenate(part)[:n]) for part in zip(*parts, strict=True))
    sent = fingerprint.carrier_part(space, w) / strength - fingerprint.code(0.5, form=code)
    signs = 2.0 * sent
    small = jnp.mean(jnp.square(jnp.abs(signs) - 1.0), axis=1, keepdims=True)
    large = jnp.mean(jnp.square(signs), axis=1, keepdims=True) - 1.0
    variance = jnp.maximum(jnp.maximum(small, large), _LEAST_VARIANCE)
    soft = jax.nn.sigmoid(2.0 * signs / variance)
    return Solution(soft, w, rms, jnp.full((n,), _EVALUATIONS))


def has_encoder(generator):
    """Say whether a generator can turn images into latents itself."""
    return getattr(generator, "encoder", None) is not None
