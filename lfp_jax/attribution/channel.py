"""What may have happened to an image between the generator and the file.

Blur, crop and enlargement, contrast and brightness, in this order and each of a strength that is
not known: it is estimated together with the latent. A crop is reckoned with only where it seems
to be one: a window that is not needed blurs at the least shift, to both sides alike. Noise is what
remains; where the file was a JPEG it is that of quantisation, coefficient by coefficient. Images
are [H, W, C] in [-1, 1].
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

from lfp_jax.attacks import separable
from lfp_jax.attacks.jpeg import block_dct, quantisation_tables, ycc
from lfp_jax.attribution.gauss_newton import QUANTUM

# The logarithm of the contrast, the brightness, the blur; and of a view with a crop the logarithm
# of the share of each side that it keeps, and its offset down and right in shares of a side.
_SPREAD = np.array([0.3, 0.3, 0.3, 0.2, 0.05, 0.05], np.float32)  # of strengths round their centre
KEPT = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # shares of each side that a crop may have kept: tried
_BLURS = (0.0, 0.4, 0.7, 1.1, 1.4, 1.8)  # tried; those from 0.4 on are sigma 0.7, 1, 1.5, 2, 3
_MUST_GAIN = 1.3  # factor in squared residual to believe in a crop, and another one in a blur
_TAPS = 12  # of a blur, to each side
_BOUND = 1.0 - 1.0 / 255.0  # a pixel beyond this may have been clipped
_DETAIL = 0.01  # noise below this cannot be told from detail
_LOWER_HALF = 0.3246  # mean of the lower half of |x|, x a standard Gaussian
_LEVELS = 127.5  # levels of 8 bits to a unit
_MIDDLE = 0.5  # levels from the middle of our scale to that of a JPEG's, 128
_AFTER = 0.5  # spread that decoding to 8 bits leaves in a coefficient, in levels
_OUTLIERS = 0.2  # share of coefficients that clipping moved further
_EVIDENCE = 30.0  # nats that make a JPEG
_FAR = 20.0  # spreads from a bound beyond which noise decides nothing


class View(flax.struct.PyTreeNode):
    """An image, and what is assumed of the way it took."""

    pixels: jax.Array | np.ndarray  # [H, W, C]
    # [e] strengths, most likely ones: e = 6, 3 without a crop, 0 for noise only
    centre: jax.Array | np.ndarray
    level: jax.Array | np.floating = np.float32(0.0)  # of noise, as `noise_level` tells it
    coded: jax.Array | None = None  # [p] DCT coefficients, where it was a JPEG
    noise: jax.Array | None = None  # [p] variances of their rounding
    halved: bool = flax.struct.field(pytree_node=False, default=True)  # has chroma of half the size


def transmit(view, eta, image):
    """Send an image the way of a view, at strengths eta [e] in units of their spread."""
    strengths = view.centre + _SPREAD[: len(view.centre)] * eta
    if not len(strengths):
        return image
    contrast, brightness, blur, *place = strengths
    matrices = [_blur(pixels, blur) for pixels in image.shape[:2]]
    if place:
        size, *offsets = place
        for axis, offset in enumerate(offsets):
            pixels, keep = image.shape[axis], jnp.exp(size)
            start = (0.5 * (1.0 - keep) + offset) * pixels
            window = separable.crop(pixels, start=start, length=keep * pixels)
            matrices[axis] = jnp.einsum("ij,jk->ik", window, matrices[axis], precision="highest")
    image = separable.transform(jnp.clip(image, -1.0, 1.0), *matrices)
    return jnp.exp(contrast) * image + brightness


def _blur(size, strength):
    """Matrix of a Gaussian blur whose first tap beside the middle is tanh(strength) of that.

    Then tap k is its k^2-th power: smooth where there is no blur, and sharpening below.
    """
    first = jnp.tanh(strength)
    taps = [jax.lax.integer_pow(first, k * k) for k in range(_TAPS + 1)]
    return separable.convolve(size, jnp.stack(taps[:0:-1] + taps))


def form(view, image):
    """Bring an image or a derivative [H, W, C] of one to the form [p] in which a view compares.

    Pixel by pixel; of a JPEG, coefficient by coefficient.
    """
    return image.reshape(-1) if view.coded is None else _coefficients(image, view.halved)


class Comparison(flax.struct.PyTreeNode):
    """How an image differs from that of a view: a log-likelihood, its slope and its curvature."""

    # [p], their squares twice the lost log-likelihood in units of the noise's variance
    difference: jax.Array
    pull: jax.Array  # [p], what a Gauss-Newton step takes for the difference
    sharpness: jax.Array  # [p], curvatures from 0, which is out of play, to 1


def compare(view, made, spread):
    """Compare an image, in `form` [p], with that of a view.

    A pixel that may have been clipped says only that image and noise came to the bound or beyond
    (the likelihood of a censored Gaussian: Tobin, Econometrica 1958): without noise an overshoot
    is out of play. So is a coefficient that would have been rounded to the zero that it is: most
    are, and such a zero measures nothing.

    Args:
        view: a View.
        made: [p].
        spread: root mean square of the noise before clipping; 0: none.

    Returns:
        A Comparison.
    """
    if view.coded is None:
        return _compare_pixels(view.pixels.reshape(-1), made, spread)
    off, zero = made - view.coded, view.coded == 0.0
    reach = jnp.where(zero, jnp.sqrt(3.0 * view.noise), 0.0)  # half a step
    off = off - jnp.clip(off, -reach, reach)
    return Comparison(off, off, (~zero | (off != 0.0)).astype(off.dtype))


def _compare_pixels(seen, made, spread):
    off, spread = made - seen, jnp.maximum(spread, 1e-9)
    bound = jnp.where(jnp.abs(seen) < _BOUND, 0.0, jnp.sign(seen))
    beyond = jnp.clip(bound * off / spread, -_FAR, _FAR)
    fit = norm.logcdf(beyond)  # log-likelihood
    slope = jnp.exp(norm.logpdf(beyond) - fit)
    loose = (bound != 0.0) & (beyond > -_FAR)
    short = -bound * spread
    return Comparison(
        jnp.where(loose, short * jnp.sqrt(-2.0 * fit), off),
        jnp.where(loose, short * jnp.sqrt(slope / (slope + beyond)), off),
        jnp.where(loose, slope * (slope + beyond), 1.0),
    )


class Scale(flax.struct.PyTreeNode):
    """What brings comparisons [p] to one unit of noise, and how much of them is in play."""

    weights: jax.Array  # [p]
    count: jax.Array  # []
    least: jax.Array  # [], variance of rounding alone
    spread: jax.Array  # [], of the noise before clipping


def scale(view, comparison):
    """Make the Scale of a Comparison without spread: weights at most 1.

    A coefficient of a JPEG has the noise of its step. What that does not explain of the difference
    is noise too, the same in all. The spread is what the view tells beforehand, but no more than
    is left of the image here.
    """
    difference = comparison.difference
    if view.coded is None:
        spread = jnp.minimum(view.level, jnp.sqrt(jnp.mean(jnp.square(difference))))
        count, least = jnp.float32(len(difference)), jnp.float32(QUANTUM)
        return Scale(jnp.ones_like(difference), count, least, spread)
    count = jnp.maximum(jnp.sum(comparison.sharpness), 1.0)

    def halve(bounds, _):
        middle = jnp.sqrt(bounds[0] * bounds[1])
        more = jnp.sum(jnp.square(difference) / (view.noise + middle)) > count
        return (jnp.where(more, middle, bounds[0]), jnp.where(more, bounds[1], middle)), None

    (rest, _), _ = jax.lax.scan(halve, (jnp.float32(QUANTUM), jnp.float32(4.0)), length=24)
    least = jnp.min(view.noise)
    weights = jnp.sqrt((least + rest) / (view.noise + rest))
    return Scale(weights, count, least, jnp.float32(0.0))


def weigh(view, made, scale):
    """Compare an image, in `form` [p], with that of a view in units of a Scale."""
    seen, weights = compare(view, made, scale.spread), scale.weights
    return seen.replace(difference=weights * seen.difference, pull=weights * seen.pull)


def told(made, spread):
    """Give the share [p] of what pixels [p] under noise would tell that the 8-bit range leaves.

    That of Fisher's information of a Gaussian which is censored at both bounds, on average over
    the noise; none of a pixel that the generator itself made too bright or too dark.
    """
    left = jnp.ones_like(made)
    for side in (-1.0, 1.0):
        room = jnp.clip((1.0 - side * made) / spread, 0.0, 0.25 * _FAR)
        tail, density = norm.cdf(-room), norm.pdf(room)
        left = left - (tail + room * density - jnp.square(density) / tail)
    return jnp.where(jnp.abs(made) < 1.0, left, 0.0)


def mean_square(scaled, scale):
    """Mean square [] of weighted differences [p]."""
    return jnp.sum(jnp.square(scaled)) / scale.count


def variance(scaled, scale):
    """Variance [] of the noise of weighted differences [p]: theirs, but no less than rounding's."""
    return jnp.maximum(mean_square(scaled, scale), scale.least)


def structure(view, difference, scale):
    """Tell how unlike noise weighted differences [p] of a JPEG are: [].

    That is the mean square of the lowest coefficients in play in units of that of all. A descent
    fits what is coarse best, so that noise leaves less than 1, and one that went astray more. Of
    any other view infinity: there `noise_level` tells.
    """
    if view.coded is None:
        return jnp.float32(jnp.inf)
    row, column = jnp.divmod(jnp.arange(64), 8)
    low = jnp.tile(row + column < 2, len(difference) // 64) & (difference != 0.0)
    square = jnp.sum(jnp.square(difference) * low) / jnp.maximum(jnp.sum(low), 1)
    return square / mean_square(difference, scale)


def see(image):
    """Make the view of an image [H, W, C] whose way is not known: JPEG is told by its pixels.

    Args:
        image: in [-1, 1], of 8 bits.

    Returns:
        A View without strengths (see `likely`).
    """
    quality = jpeg_quality(image)
    parts = _decipher(image, quality) if quality is not None else {}
    view = View(image, np.zeros(0, np.float32), **parts)
    return view.replace(level=np.float32(noise_level(view)))


def noise_level(view):
    """Tell the root mean square of the noise of a view; 0 where it cannot be told.

    That of the finest diagonal details' lower half, which no edge is in; a JPEG has lost those, and
    has its least rounding instead, to which `scale` brings all.
    """
    if view.coded is not None:
        return float(np.sqrt(np.min(view.noise)))
    height, width = (n // 2 * 2 for n in view.pixels.shape[:2])
    blocks = np.asarray(view.pixels)[:height, :width].reshape(height // 2, 2, width // 2, 2, -1)
    falling, rising = (
        blocks[:, 0, :, 0] + blocks[:, 1, :, 1],
        blocks[:, 1, :, 0] + blocks[:, 0, :, 1],
    )
    details = np.sort(0.5 * np.abs(falling - rising), axis=None)
    level = float(details[: len(details) // 2].mean()) / _LOWER_HALF
    return level if level > _DETAIL else 0.0


def likely(image, made, keep):
    """Tell how images may have become another one by a crop and a blur.

    Args:
        image: [H, W, C].
        made: guesses of what it was, [g, H, W, C].
        keep: one of KEPT.

    Returns:
        Centres [g, e] with the blur that brings each nearest, and how near: [g], mean squares, more
        where that takes a crop or a blur, which are less likely than none.
    """
    crop = [] if keep == 1.0 else [np.log(keep), 0.0, 0.0]
    grid = jnp.asarray([[0.0, 0.0, blur, *crop] for blur in _BLURS])
    costs = _MUST_GAIN ** (np.sign(_BLURS) + bool(crop))
    distances = _distances(image, made, grid) * jnp.asarray(costs, jnp.float32)[None]
    return grid[jnp.argmin(distances, axis=1)], jnp.min(distances, axis=1)


@jax.jit
def _distances(image, made, grid):
    """Mean squares [g, c] between an image and guesses [g, H, W, C] sent by a grid of centres."""

    def one(guess, centre):
        sent = transmit(View(image, centre), jnp.zeros(len(centre)), guess)
        return jnp.mean(jnp.square(sent - image))

    of_guess = jax.vmap(one, in_axes=(None, 0))
    return jax.lax.map(lambda guess: of_guess(guess, grid), made)


def jpeg_quality(image):
    """Tell from the pixels of an image [H, W, C] at what quality it was a JPEG; None if it was not.

    For tables of libjpeg, with blocks still in their places and pixels as they were decoded.
    """
    coefficients = block_dct(_whole_blocks(_planes(image)[0]))
    evidence = np.asarray(_qualities_evidence(coefficients))
    best = int(evidence.argmax())
    return best + 1 if evidence[best] > _EVIDENCE else None


@jax.jit
def _qualities_evidence(coefficients):
    """`_evidence` [100] that the luma of an image was quantised at quality 1 .. 100."""

    def one(quality):
        return _evidence(coefficients, quantisation_tables(quality)[0])

    return jax.lax.map(one, jnp.arange(1, 101))


def _evidence(coefficients, steps):
    """Log-likelihood ratio that coefficients [a, b, 8, 8] were quantised in steps [8, 8].

    Against coefficients anywhere in their step; those that round to zero say nothing, since the
    coefficients of a smooth image are near zero in any case.
    """
    steps = steps[None, None].astype(jnp.float32)
    nearest = jnp.round(coefficients / steps)
    density = norm.pdf(coefficients, steps * nearest, _AFTER)
    ratio = jnp.log((1.0 - _OUTLIERS) * density * steps + _OUTLIERS)
    return jnp.sum(jnp.where(nearest == 0.0, 0.0, ratio))


def _decipher(image, quality):
    """Recover what a JPEG of a quality held: coefficients, their noise, and if chroma is halved."""
    tables = [np.asarray(table, np.float32) for table in quantisation_tables(quality)]
    luma, *chroma = _planes(image)
    halves = [_unsmooth(_halve(plane)) for plane in chroma]
    whole, half = ([block_dct(_whole_blocks(p)) for p in planes] for planes in (chroma, halves))
    evidence = [sum(float(_evidence(b, tables[1])) for b in blocks) for blocks in (whole, half)]
    halved = not evidence[0] > evidence[1]
    parts = [(block_dct(_whole_blocks(luma)), tables[0])]
    parts += [(blocks, tables[1]) for blocks in (half if halved else whole)]
    coded, noise = [], []
    for blocks, table in parts:
        steps = np.broadcast_to(table[None, None], blocks.shape)
        nearest = steps * np.round(blocks / steps)
        # Blocks beyond the edge of the image are not whole, and not to be recovered.
        coded.append(np.where(np.abs(blocks - nearest) < 3.0 * _AFTER, nearest, blocks))
        noise.append(np.square(steps / _LEVELS) / 12.0)
    coded[0][..., 0, 0] += 8.0 * _MIDDLE  # of a block's mean, that of level 128 on the scale here
    return {"coded": _flat(coded) / _LEVELS, "noise": _flat(noise), "halved": halved}


def _planes(image):
    """Luma and chroma planes of an image, about zero, in levels as a JPEG counts them."""
    levels = jnp.asarray(image) * _LEVELS
    if image.shape[-1] == 1:
        return [levels[..., 0] - _MIDDLE]
    luma, *chroma = ycc(levels)
    return [luma - _MIDDLE, *chroma]


def _coefficients(image, halved):
    """DCT coefficients [p] of luma and chroma of an image, as those of a JPEG."""
    if image.shape[-1] == 1:
        return block_dct(_whole_blocks(image[..., 0])).reshape(-1)
    luma, *chroma = ycc(image)
    chroma = [_halve(plane) for plane in chroma] if halved else chroma
    return jnp.concatenate([block_dct(_whole_blocks(p)).reshape(-1) for p in (luma, *chroma)])


def _halve(plane):
    height, width = plane.shape
    plane = jnp.pad(plane, ((0, height % 2), (0, width % 2)), mode="edge")
    return plane.reshape((height + 1) // 2, 2, (width + 1) // 2, 2).mean((1, 3))


def _unsmooth(plane):
    """Undo what the decoder's upsampling and `_halve` make of a plane of halved chroma."""
    for _ in range(2):
        n = len(plane)
        smooth = 0.75 * np.eye(n) + 0.125 * (np.eye(n, k=1) + np.eye(n, k=-1))
        smooth[[0, -1], [0, -1]] += 0.125
        plane = np.linalg.solve(smooth, plane).T
    return jnp.asarray(plane, jnp.float32)


def _flat(blocks):
    return np.concatenate([np.asarray(each, np.float32).reshape(-1) for each in blocks])


def _whole_blocks(plane):
    height, width = plane.shape
    return jnp.pad(plane, ((0, -height % 8), (0, -width % 8)), mode="edge")
