"""Linear operations that act on rows and columns apart, as matrices of one axis.

A matrix [size, size] maps the samples of an axis to new ones; each is differentiable in its
strength. At the sizes of images the products are faster than taps one by one, and a Jacobian
passes through them like a pixel.
"""

import jax.numpy as jnp
import numpy as np

from lfp_jax.attacks.operation import round_through


def transform(image, rows, columns):
    """Apply a matrix [H, H] to the rows and one [W, W] to the columns of an image [H, W, C]."""
    return jnp.einsum("ih,jw,hwc->ijc", rows, columns, image, precision="highest")


def blur(size, *, sigma, window):
    """Gaussian taps, `window` of them (odd), normalised; reflected at the edges.

    The reflection does not repeat the edge, and goes to and fro where the window is longer than
    the axis. sigma is in pixels; at 0 the matrix is the identity.
    """
    offsets = np.arange(window) - window // 2
    return convolve(size, jnp.exp(-0.5 * jnp.square(offsets / jnp.maximum(sigma, 1e-3))))


def convolve(size, taps):
    """Weigh neighbours by taps [window], an odd number of them, normalised; edges as of `blur`."""
    taps = taps / jnp.sum(taps)
    offsets = np.arange(len(taps)) - len(taps) // 2
    period = max(2 * size - 2, 1)
    places = np.abs((np.arange(size)[:, None] + offsets[None]) % period)
    places = np.minimum(places, period - places) if size > 1 else np.zeros_like(places)
    lines = np.arange(size)[:, None]
    return jnp.zeros((size, size)).at[lines, places].add(taps[None])


def crop(size, *, start, length):
    """Enlarge the window [start, start + length) of an axis to all of it, bilinearly.

    Pixel centres lie at halves; start and length may be fractions of pixels; what lies outside the
    window is not looked at.
    """
    centres = start - 0.5 + (jnp.arange(size) + 0.5) * (length / size)
    last = jnp.maximum(start + length - 1.0, start)  # a window of less than a pixel is a pixel
    return _interpolate(jnp.clip(centres, start, last), size)


def shrink_and_enlarge(size, *, scale):
    """Resize an axis to round(scale * size) samples, and back.

    Down: triangle filter as wide as the reduction (antialiased, Pillow's BILINEAR). Up: bilinear.
    """
    short = jnp.clip(round_through(scale * size), 1.0, size)
    centres = (jnp.arange(size) + 0.5) * (size / short)
    distance = jnp.abs(centres[:, None] - (jnp.arange(size) + 0.5)[None])
    down = jnp.maximum(1.0 - distance * (short / size), 0.0)
    down = down / jnp.maximum(jnp.sum(down, axis=1, keepdims=True), 1e-6)
    centres = (jnp.arange(size) + 0.5) * (short / size) - 0.5
    up = _interpolate(jnp.clip(centres, 0.0, short - 1.0), size)  # never looks beyond `short`
    return jnp.einsum("is,sh->ih", up, down, precision="highest")


def _interpolate(places, size):
    """Matrix that reads an axis at fractional places [size], linearly.

    Weights of two neighbours that add up to 1, so that slopes are right on whole pixels too.
    """
    lower = jnp.clip(jnp.floor(places), 0, max(size - 2, 0))
    share = (places - lower)[:, None]
    share = jnp.where(share > 1.0, 1.0, share)  # beyond the last pixel
    steps = jnp.arange(size)[None] - lower[:, None]
    return jnp.where(steps == 0, 1.0 - share, 0.0) + jnp.where(steps == 1, share, 0.0)
