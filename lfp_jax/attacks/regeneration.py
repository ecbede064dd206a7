"""Attacks that make an image anew with a latent-diffusion model: a fingerprint in fine detail goes.

Zhao et al. 2023 (arXiv 2306.01953) and WAVES (An et al. 2024, arXiv 2401.08573). Unlike the other
attacks these are functions of whole batches, for they have weights: those of a generator by name
or path, loaded once. An image whose sides the model does not take is padded by its edges.
"""

import functools
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from lfp_jax import generators
from lfp_jax.attacks.operation import bounded, draw
from lfp_jax.errors import UserError
from lfp_jax.generators import diffusion, ldm

_BATCH = 64  # images in one program; bounds the memory
_load = functools.lru_cache(maxsize=2)(generators.load)


@bounded()
def regenerate(key, images, *, generator="ldm-demo", start=0, step=0):
    """Encode and decode images with a first stage (regen-VAE).

    Args:
        key: not used; every attack takes one.
        images: [n, H, W, 1 or 3] in [-1, 1].
        generator: a latent-diffusion model, by name or path.
        start, step: not used either.

    Returns:
        Images of the same shape, clamped to [-1, 1].

    Raises:
        UserError: a generator that is no latent-diffusion model or lacks a part.
    """
    model = _model(generator)
    keys, _ = draw(key, {}, count=len(images), start=start, step=step)
    return _in_batches(model, images, lambda rows, _: _encode_decode(model, rows), keys)


@bounded()  # one level is for all images: none is drawn, or traced
def rediffuse(key, images, *, level, passes=10, generator="ldm-demo", start=0, step=0):
    """Add noise to the latents of images and take it off again with a UNet (regen-diffusion).

    Of the noise schedule's training steps the latents go to number `level`, and back by DDIM
    without noise of its own (arXiv 2010.02502).

    Args:
        key: PRNG key; image i draws its noise as every attack does.
        images: [n, H, W, 1 or 3] in [-1, 1].
        level: training step, at least 1 and below the schedule's length; one number.
        passes: of the UNet on the way back.
        generator: a latent-diffusion model without conditions, by name or path.
        start: global index of the first image.
        step: position of this attack in a sequence of several.

    Returns:
        Images of the same shape, clamped to [-1, 1].

    Raises:
        UserError: a generator that is no latent-diffusion model or lacks a part, or a level that
            its schedule does not have.
    """
    model = _model(generator)
    timesteps = model.arch.diffusion.timesteps
    if not (isinstance(level, numbers.Real) and 1 <= float(level) < timesteps and passes >= 1):
        raise UserError(
            f"level must be 1 .. {timesteps - 1} of '{model.name}' and passes >= 1; "
            f"got {level} and {passes}."
        )
    times = np.round(level * np.arange(passes, 0, -1) / passes).astype(np.int32)
    keys, _ = draw(key, {}, count=len(images), start=start, step=step)
    return _in_batches(model, images, lambda *rows: _diffuse(model, *rows, times), keys)


def _model(source):
    model = _load(source)
    if not isinstance(model, ldm.LatentDiffusion):
        raise UserError(f"'{source}' is no latent-diffusion model, which this attack needs.")
    return model


def _in_batches(model, images, change, keys):
    """Change images batch by batch, at sides and channels that the model takes."""
    images = jnp.asarray(images, jnp.float32)
    n, height, width, channels = images.shape
    factor = model.arch.first_stage.factor if model.arch.first_stage else 1
    factor *= 2 ** (len(model.arch.unet.channels) - 1) if model.arch.unet else 1
    down, right = -height % factor, -width % factor
    wide = jnp.pad(images, ((0, 0), (0, down), (0, right), (0, 0)), mode="edge")
    wide = jnp.repeat(wide, 3, axis=-1) if channels == 1 else wide
    parts, batch = [], min(n, _BATCH)
    for first in range(0, n, batch):
        rows = np.minimum(np.arange(first, first + batch), n - 1)  # one shape, one compilation
        parts.append(change(wide[rows], keys[rows]))
    made = jnp.clip(jnp.concatenate(parts)[:n, :height, :width], -1.0, 1.0)
    return jnp.mean(made, axis=-1, keepdims=True) if channels == 1 else made


@jax.jit
def _encode_decode(model, images):
    return model.decode(model.encode(images))


@jax.jit
def _diffuse(model, images, keys, times):
    """Bring images to the noise of training step times[0], and back through the others."""
    clean = model.encode(images)
    noise = jax.vmap(lambda key: jax.random.normal(key, clean.shape[1:]))(keys)
    alpha = model.alphas_cumprod[times]
    at = {
        "t": times, "alpha": alpha, "sigma": jnp.zeros_like(alpha),
        "alpha_prev": jnp.append(alpha[1:], 1.0),
    }  # fmt: skip

    def back(x, at):
        eps = model.predict_noise(x, jnp.full((len(x),), at["t"]))
        return diffusion.step(x, eps, at, noise=None, settings=diffusion.Settings())[0], None

    x = jnp.sqrt(alpha[0]) * clean + jnp.sqrt(1.0 - alpha[0]) * noise
    return model.decode(jax.lax.scan(back, x, at)[0])
