"""JPEG twice: the real codec, and libjpeg-turbo's arithmetic in JAX, differentiable.

The second follows the codec step by step (libjpeg-turbo with its default ISLOW transform and
"fancy" upsampling, as Pillow uses it): what is left are ties and last bits of the fixed-point DCT.
Planes are [H, W] in levels 0..255.
"""

import math

import jax.numpy as jnp
import numpy as np

from lfp_jax import images as files
from lfp_jax.attacks.operation import bounded, draw, floor_through, operation, round_through
from lfp_jax.errors import UserError, choose

_BOUNDS = {"quality": (1, 100)}

# ITU-T T.81, tables K.1 and K.2.
_LUMA = np.array([
    [16, 11, 10, 16, 24, 40, 51, 61],
    [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77],
    [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101],
    [72, 92, 95, 98, 112, 100, 103, 99],
])  # fmt: skip
_CHROMA = np.full((8, 8), 99)
_CHROMA[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]

_SUBSAMPLING = {"4:4:4": (1, 1), "4:2:2": (1, 2), "4:2:0": (2, 2)}  # rows, columns

_FREQUENCY = np.arange(8)[:, None]
_DCT = np.cos(np.pi / 8 * _FREQUENCY * (np.arange(8)[None] + 0.5)) * 0.5  # [frequency, sample]
_DCT[0] *= 0.5**0.5
_DCT = _DCT.astype(np.float32)


@bounded(**_BOUNDS)
def jpeg(key, images, *, quality, subsampling="4:2:0", start=0, step=0):
    """Send images through a real JPEG encoder and decoder (Pillow), on the host.

    Args:
        key: PRNG key, of use where the quality is a `Uniform`.
        images: [n, H, W, 1 or 3] in [-1, 1]; rounded to 8 bits first.
        quality: libjpeg's, 1 to 100, rounded; one number, [n], or a `Uniform`.
        subsampling: of chroma: "4:4:4", "4:2:2" or "4:2:0".
        start: global index of the first image.
        step: position of this attack in a sequence of several.

    Returns:
        float32 NumPy array of the same shape.

    Raises:
        UserError: quality out of range, or an unknown subsampling.
    """
    choose(subsampling, _SUBSAMPLING, "subsampling")
    u8 = files.to_uint8(images)
    _, options = draw(key, {"quality": quality}, count=len(u8), start=start, step=step)
    qualities = np.broadcast_to(np.rint(options["quality"]).astype(int), len(u8))
    low, high = _BOUNDS["quality"]
    if np.any((qualities < low) | (qualities > high)):
        raise UserError(f"JPEG quality must be in {low} .. {high}; got {quality}.")
    coded = [
        files.encode_jpeg(image, quality=int(q), subsampling=subsampling)
        for image, q in zip(u8, qualities, strict=True)
    ]
    return files.from_uint8(np.reshape([files.decode_jpeg(data) for data in coded], u8.shape))


@operation(**_BOUNDS)
def jpeg_approximate(key, image, *, quality, subsampling="4:2:0", rounding="straight"):
    """Compute what JPEG makes of an image, differentiably.

    Args:
        key: not used.
        image: [H, W, 1 or 3] in [-1, 1]; any size.
        quality: libjpeg's, 1 to 100; may be traced.
        subsampling: of chroma: "4:4:4", "4:2:2" or "4:2:0".
        rounding: of DCT coefficients. "straight": exact, derivative of the identity; "cubic":
            round(x) + (x - round(x))^3, smooth but for the jumps (Shin and Song, 2017).

    Returns:
        [H, W, 1 or 3]: the levels a decoder gives, mapped to [-1, 1].

    Raises:
        UserError: an unknown subsampling or rounding.
    """
    factors = choose(subsampling, _SUBSAMPLING, "subsampling")
    rounding = choose(rounding, _ROUNDING, "rounding")
    luma, chroma = quantisation_tables(quality)
    levels = round_through((jnp.clip(image, -1.0, 1.0) + 1.0) * 127.5)
    if image.shape[-1] == 1:
        return _code(levels[..., 0], luma, (1, 1), rounding)[..., None] / 127.5 - 1.0
    y, cb, cr = _to_ycc(levels)
    y = _code(y, luma, (1, 1), rounding)
    cb, cr = (_code(plane, chroma, factors, rounding) for plane in (cb, cr))
    return _to_rgb(y, cb, cr) / 127.5 - 1.0


def quantisation_tables(quality):
    """Scale the standard tables as libjpeg does.

    Args:
        quality: 1 to 100; may be traced.

    Returns:
        luma, chroma: int32 [8, 8], row = vertical frequency; steps of orthonormal DCT coefficients
        of levels 0..255.
    """
    quality = jnp.asarray(quality, jnp.float32)
    scale = jnp.where(quality < 50, jnp.floor(5000.0 / quality), 200.0 - 2.0 * quality)
    return tuple(
        jnp.clip(jnp.floor((table * scale + 50.0) / 100.0), 1, 255).astype(jnp.int32)
        for table in (jnp.asarray(_LUMA, jnp.float32), jnp.asarray(_CHROMA, jnp.float32))
    )


def block_dct(plane):
    """Orthonormal DCT-II of 8 x 8 blocks: [H, W], multiples of 8, to [H / 8, W / 8, 8, 8]."""
    height, width = plane.shape
    blocks = plane.reshape(height // 8, 8, width // 8, 8)
    return jnp.einsum("ui,vj,aibj->abuv", _DCT, _DCT, blocks, precision="highest")


def block_idct(coefficients):
    """Undo `block_dct`: [a, b, 8, 8] to [8 a, 8 b]."""
    rows, columns = coefficients.shape[:2]
    plane = jnp.einsum("ui,vj,abuv->aibj", _DCT, _DCT, coefficients, precision="highest")
    return plane.reshape(8 * rows, 8 * columns)


def _code(plane, table, factors, rounding):
    """Take one plane [H, W] through subsampling, DCT, quantisation and all the way back."""
    height, width = plane.shape
    small = _downsample(plane, *factors)
    # The codec's transform gives whole eighths; a coefficient is rounded half away from zero.
    coefficients = round_through(8.0 * block_dct(small - 128.0)) / 8.0
    table = table[None, None]
    coefficients = rounding(coefficients / table) * table
    small = jnp.clip(round_through(block_idct(coefficients) + 128.0), 0.0, 255.0)
    down, across = (math.ceil(height / factors[0]), math.ceil(width / factors[1]))
    return _upsample(small[:down, :across], *factors)[:height, :width]


def _downsample(plane, down, across):
    """Average down x across pixels; edges are repeated to whole blocks of 8 x 8.

    Columns are filled up before the average, rows after it, as libjpeg does. Its bias alternates
    along a row so that halves do not all go one way.
    """
    height, width = plane.shape
    plane = jnp.pad(plane, ((0, -height % down), (0, -width % (8 * across))), mode="edge")
    blocks = plane.reshape(plane.shape[0] // down, down, -1, across)
    if down * across > 1:
        odd = np.arange(blocks.shape[2]) % 2
        bias = (odd + down - 1).astype(np.float32)
        plane = floor_through((jnp.sum(blocks, axis=(1, 3)) + bias[None]) / (down * across))
    return jnp.pad(plane, ((0, -plane.shape[0] % 8), (0, 0)), mode="edge")


def _upsample(plane, down, across):
    """Double rows and columns where asked with weights 3/4, 1/4 ("fancy" upsampling)."""
    if across == 1:
        return plane
    total = 4.0
    if down == 2:
        plane, total = _double(plane), 16.0
    wide = _double(plane.T).T
    odd = np.arange(wide.shape[1]) % 2
    # Even and odd columns are rounded to different sides: 1, 2 of 4 and 8, 7 of 16.
    bias = np.where(odd, 7, 8) if down == 2 else 1 + odd
    return floor_through((wide + bias.astype(np.float32)[None]) / total)


def _double(plane):
    """Put between rows a, b the rows 3 a + b and a + 3 b; edges are repeated. [2 H, W]."""
    padded = jnp.pad(plane, ((1, 1), (0, 0)), mode="edge")
    pairs = jnp.stack([3.0 * plane + padded[:-2], 3.0 * plane + padded[2:]], axis=1)
    return pairs.reshape(-1, plane.shape[1])


def ycc(image):
    """Luma and the two chroma planes [H, W] of an image [H, W, 3], on its scale and about zero."""
    red, green, blue = jnp.moveaxis(image, -1, 0)
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    cb = -0.168735892 * red - 0.331264108 * green + 0.5 * blue
    cr = 0.5 * red - 0.418687589 * green - 0.081312411 * blue
    return y, cb, cr


def _to_ycc(levels):
    y, *chroma = ycc(levels)
    # Saturated blue or red would round to 256; libjpeg's rounding constant keeps it at 255.
    chroma = [jnp.minimum(round_through(plane + 128.0), 255.0) for plane in chroma]
    return round_through(y), *chroma


def _to_rgb(y, cb, cr):
    cb, cr = cb - 128.0, cr - 128.0
    red = y + round_through(1.402 * cr)
    green = y + round_through(-0.344136286 * cb - 0.714136286 * cr)
    blue = y + round_through(1.772 * cb)
    return jnp.clip(jnp.stack([red, green, blue], axis=-1), 0.0, 255.0)


def _away(x):
    """Round half away from zero, straight through."""
    return jnp.sign(x) * floor_through(jnp.abs(x) + 0.5)


def _cubic(x):
    nearest = jnp.round(x)
    return nearest + (x - nearest) ** 3


_ROUNDING = {"straight": _away, "cubic": _cubic}
