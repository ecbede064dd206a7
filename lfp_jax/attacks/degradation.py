"""Attacks that lose detail: noise, blur, median. Images are [H, W, C] in [-1, 1]."""

import jax
import jax.numpy as jnp

from lfp_jax.attacks import separable
from lfp_jax.attacks.operation import POSITIVE, SHARE, operation
from lfp_jax.errors import UserError


@operation(std=POSITIVE)
def noise(key, image, *, std, wrap=False):
    """Add Gaussian noise.

    Args:
        key: PRNG key.
        image: [H, W, C].
        std: standard deviation on the [-1, 1] scale: twice that on [0, 1].
        wrap: add whole steps of 8 bits that wrap around at 0 and 255, as the code of Tree-Ring and
            of Gaussian Shading does: at grey 250 and std 0.2, 40 % of the pixels end below 64.
    """
    added = std * jax.random.normal(key, image.shape, image.dtype)
    if not wrap:
        return image + added
    levels = jnp.round((image + 1.0) * 127.5) + jnp.trunc(added * 127.5)
    return jnp.mod(levels, 256.0) / 127.5 - 1.0


@operation(amount=SHARE)
def salt_and_pepper(key, image, *, amount):
    """Set a share `amount` of the values, channel by channel, to -1 or 1, half each."""
    chance = jax.random.uniform(key, image.shape)
    image = jnp.where(chance < 0.5 * amount, 1.0, image)
    return jnp.where(chance > 1.0 - 0.5 * amount, -1.0, image)


@operation(sigma=POSITIVE)
def blur(key, image, *, sigma, window=25):
    """Blur with a Gaussian of standard deviation sigma pixels, cut to window x window (odd).

    Edges are reflected as torchvision does; an image may be smaller than the window. Pillow's
    GaussianBlur(radius) is sigma = radius with edges repeated.

    Raises:
        UserError: an even window.
    """
    _check_window(window)
    rows, columns = (separable.blur(n, sigma=sigma, window=window) for n in image.shape[:2])
    return separable.transform(image, rows, columns)


@operation()
def median(key, image, *, window):
    """Take the median of window x window pixels (odd), channel by channel; edges are repeated.

    Raises:
        UserError: an even window.
    """
    _check_window(window)
    reach = window // 2
    padded = jnp.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    height, width, _ = image.shape
    views = [
        padded[i : i + height, j : j + width] for i in range(window) for j in range(window)
    ]  # fmt: skip
    return jnp.sort(jnp.stack(views), axis=0)[len(views) // 2]


def _check_window(window):
    if window < 1 or window % 2 == 0:
        raise UserError(f"A window must be odd and >= 1; got {window}.")
