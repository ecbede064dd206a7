"""Attacks on colours, as torchvision and Pillow's ImageEnhance define them.

Images are [H, W, 1 or 3] in [-1, 1]; factors act on [0, 1]. A factor of 1 changes nothing, 0 leaves
black, mean grey, greyscale or the smoothed image. Greyscale images have no saturation and no hue.
"""

import jax.numpy as jnp

from lfp_jax.attacks.operation import POSITIVE, operation

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@operation(factor=POSITIVE)
def brightness(key, image, *, factor):
    """Multiply the values."""
    return factor * (image + 1.0) - 1.0


@operation(factor=POSITIVE)
def contrast(key, image, *, factor):
    """Move away from, or to, the mean grey of the image."""
    return _blend(jnp.mean(_grey(image)), image, factor)


@operation(factor=POSITIVE)
def saturation(key, image, *, factor):
    """Move away from, or to, the greyscale image."""
    return _blend(_grey(image), image, factor)


@operation(factor=POSITIVE)
def sharpness(key, image, *, factor):
    """Move away from, or to, a smoothed image (3 x 3, centre 5 of 13); the border stays."""
    if min(image.shape[:2]) < 3:
        return image
    rows = image[:-2] + image[1:-1] + image[2:]
    box = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    smooth = image.at[1:-1, 1:-1].set((box + 4.0 * image[1:-1, 1:-1]) / 13.0)
    return _blend(smooth, image, factor)


@operation()
def greyscale(key, image):
    """Replace colours by their luma."""
    return jnp.broadcast_to(_grey(image), image.shape)


@operation(turn=(-0.5, 0.5))
def hue(key, image, *, turn):
    """Turn the hue of HSV by a share of the colour circle, -0.5 to 0.5."""
    if image.shape[-1] == 1:
        return image
    value = jnp.max(image, axis=-1, keepdims=True)
    chroma = value - jnp.min(image, axis=-1, keepdims=True)
    angle = _hue(image, value, chroma) + 6.0 * turn
    # Red, green and blue of a pure hue: ramps of the distance from 0, 2 and 4 sixths.
    ramps = jnp.mod(jnp.array([5.0, 3.0, 1.0])[None, None] + angle, 6.0)
    return value - chroma * jnp.clip(jnp.minimum(ramps, 4.0 - ramps), 0.0, 1.0)


def _hue(image, value, chroma):
    """Hue [H, W, 1] in sixths of the circle; 0 of a grey pixel."""
    red, green, blue = jnp.split(image, 3, axis=-1)
    safe = jnp.where(chroma > 0.0, chroma, 1.0)
    sixth = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    return jnp.where(chroma > 0.0, sixth, 0.0)


def _grey(image):
    """Luma [H, W, 1]."""
    if image.shape[-1] == 1:
        return image
    return jnp.einsum("hwc,c->hw", image, jnp.array(_LUMA), precision="highest")[..., None]


def _blend(other, image, factor):
    return other + factor * (image - other)
