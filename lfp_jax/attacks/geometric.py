"""Attacks that move pixels; the image size stays. Images are [H, W, C] in [-1, 1].

Sampling is bilinear throughout, with pixel centres at halves; what comes in from outside is black.
"""

import jax
import jax.numpy as jnp

from lfp_jax.attacks import separable
from lfp_jax.attacks.operation import ANY, SHARE, operation, round_through


@operation(keep=SHARE)
def crop(key, image, *, keep, random=False):
    """Cut out a window and enlarge it to the size of the image.

    The window need not lie on whole pixels, so that the result is differentiable in `keep`; where
    it does, this equals cropping and a bilinear resize.

    Args:
        key: PRNG key of the position.
        image: [H, W, C].
        keep: share of each side that stays, or a pair: of the height, of the width.
        random: put the window anywhere, uniformly; else in the centre.
    """
    keep = keep if isinstance(keep, tuple) else (keep, keep)
    places = jax.random.uniform(key, (2,)) if random else (0.5, 0.5)
    rows, columns = (
        separable.crop(size, start=place * (1.0 - share) * size, length=share * size)
        for size, share, place in zip(image.shape[:2], keep, places, strict=True)
    )
    return separable.transform(image, rows, columns)


@operation(scale=SHARE)
def resize(key, image, *, scale):
    """Reduce each side to `scale` of it, in whole pixels, and enlarge it again.

    Down as Pillow's BILINEAR, which averages (antialias), up bilinearly.
    """
    rows, columns = (separable.shrink_and_enlarge(n, scale=scale) for n in image.shape[:2])
    return separable.transform(image, rows, columns)


@operation()
def flip(key, image):
    """Mirror left and right."""
    return image[:, ::-1]


@operation(degrees=ANY)
def rotate(key, image, *, degrees):
    """Turn counter-clockwise about the centre; corners that leave the frame are lost."""
    angle = jnp.deg2rad(degrees)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    height, width, _ = image.shape
    rows, columns = _places(height, width)
    rows, columns = rows - (height - 1) / 2, columns - (width - 1) / 2
    return _sample(
        image,
        sin * columns + cos * rows + (height - 1) / 2,
        cos * columns - sin * rows + (width - 1) / 2,
    )


@operation(down=(-1.0, 1.0), right=(-1.0, 1.0))
def translate(key, image, *, down, right):
    """Move by shares of the height and the width, rounded to whole pixels."""
    height, width, _ = image.shape
    rows, columns = _places(height, width)
    return _sample(
        image, rows - round_through(down * height), columns - round_through(right * width)
    )


@operation(distortion=SHARE)
def perspective(key, image, *, distortion):
    """Push each corner inwards at random, by at most distortion / 2 of each side.

    As torchvision's RandomPerspective, but corners are not rounded to whole pixels.
    """
    height, width, _ = image.shape
    corners = jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])  # row, column
    inwards = jax.random.uniform(key, (4, 2)) * (1.0 - 2.0 * corners)
    moved = corners + 0.5 * distortion * inwards
    projection = _to_square(moved)
    rows, columns = _places(height, width)
    ends = jnp.array([max(height - 1, 1), max(width - 1, 1)], jnp.float32)
    seen = jnp.stack([rows / ends[0], columns / ends[1], jnp.ones_like(rows)])
    row, column, weight = jnp.einsum("ij,jhw->ihw", projection, seen, precision="highest")
    return _sample(image, ends[0] * row / weight, ends[1] * column / weight)


def _to_square(corners):
    """Matrix [3, 3], up to scale, of the projective map that takes a quadrangle to the unit square.

    Args:
        corners: [4, 2]; they go to (0, 0), (0, 1), (1, 1), (1, 0).

    Source: the closed form of Heckbert 1989, Fundamentals of Texture Mapping, section 2.2.3; the
    inverse of his square-to-quadrangle matrix is its adjugate.
    """
    first, second, third, fourth = corners
    bend = first - second + third - fourth
    one, two = second - third, fourth - third
    area = _area(one, two)
    g, h = _area(bend, two) / area, _area(one, bend) / area
    a = jnp.append(fourth - first + h * fourth, h)  # the image of (1, 0, 0), ...
    b = jnp.append(second - first + g * second, g)
    c = jnp.append(first, 1.0)
    return jnp.stack([jnp.cross(b, c), jnp.cross(c, a), jnp.cross(a, b)])


def _area(a, b):
    """Signed area of the parallelogram that two vectors [2] span."""
    return a[0] * b[1] - a[1] * b[0]


def _places(height, width):
    return jnp.meshgrid(jnp.arange(1.0 * height), jnp.arange(1.0 * width), indexing="ij")


def _sample(image, rows, columns):
    """Read an image at places [H, W], bilinearly; black outside."""

    def read(plane):
        return jax.scipy.ndimage.map_coordinates(
            plane, [rows, columns], order=1, mode="constant", cval=-1.0
        )

    return jax.vmap(read, in_axes=-1, out_axes=-1)(image)
