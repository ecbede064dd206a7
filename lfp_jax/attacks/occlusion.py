"""Attacks that cover part of the image. Images are [H, W, 1 or 3] in [-1, 1]."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lfp_jax.attacks.operation import POSITIVE, SHARE, operation

_RED = (1.0, -1.0, -1.0)
_RED_LUMA = (2.0 * 0.299 - 1.0,)


@operation(area=SHARE, aspect=POSITIVE)
def erase(key, image, *, area, aspect=1.0, outside=False):
    """Blacken a rectangle at a random place.

    Args:
        key: PRNG key of the place.
        image: [H, W, C].
        area: share of the image that the rectangle takes.
        aspect: share of the height over share of the width; neither exceeds 1.
        outside: keep the rectangle and blacken all around it.
    """
    inside: bool | jax.Array = True
    shares = jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)
    places = jax.random.uniform(key, (2,))
    for axis, (share, place) in enumerate(zip(shares, places, strict=True)):
        size = image.shape[axis]
        length = jnp.round(jnp.minimum(share, 1.0) * size)
        start = jnp.floor(place * (size - length + 1.0))
        line = (jnp.arange(size) >= start) & (jnp.arange(size) < start + length)
        inside = inside & jnp.expand_dims(line, 1 - axis)
    return jnp.where((inside != outside)[..., None], -1.0, image)


@operation(opacity=SHARE)
def text(key, image, *, words="Lorem Ipsum", size=0.15, opacity=1.0):
    """Write red words over the image, from the middle of its left edge (AugLy's overlay_text).

    Args:
        key: not used.
        image: [H, W, 1 or 3].
        words: what to write.
        size: height of the type as a share of the image's height.
        opacity: 1 covers, 0 changes nothing.
    """
    height, width, channels = image.shape
    ink = opacity * jnp.asarray(_ink(words, size, height, width))[..., None]
    colour = jnp.array(_RED_LUMA if channels == 1 else _RED)
    return image + ink * (colour[None, None] - image)


@functools.lru_cache(maxsize=16)
def _ink(words, size, height, width):
    """Coverage [height, width] in [0, 1] of the words in Pillow's own font."""
    sheet = Image.new("L", (width, height))
    font = ImageFont.load_default(max(size * height, 1.0))
    ImageDraw.Draw(sheet).text((0, height // 2), words, fill=255, font=font)
    return np.asarray(sheet, np.float32) / 255.0
