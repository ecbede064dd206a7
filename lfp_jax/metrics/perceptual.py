"""How far apart two images are: PSNR, SSIM, and the losses an inversion descends.

One example a call, [H, W, C] with 1 or 3 channels, nominally in [-1, 1]; `vmap` outside. All is
float32, differentiable, and free of pretrained weights unless features are handed in.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from lfp_jax.errors import UserError, choose

_RANGE = 2.0  # from -1 to 1
_C1, _C2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2
_WINDOW, _SIGMA = 11, 1.5
_COARSE = 2.0  # what a pyramid level counts against the next finer one
_BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)

Features = Callable[[Any, jax.Array], jax.Array]

# Compiled here too, for calls outside a larger program: op by op they are far slower.
_jit = functools.partial(jax.jit, static_argnames=("levels",))


def mse(x: jax.Array, y: jax.Array) -> jax.Array:
    """Compute the mean squared difference of two images [H, W, C]; returns []."""
    return jnp.mean(jnp.square(x - y))


def psnr(x: jax.Array, y: jax.Array) -> jax.Array:
    """Compute the peak signal-to-noise ratio of two images [H, W, C] in dB; infinite for equal."""
    return 10.0 * jnp.log10(_RANGE**2 / mse(x, y))


@jax.jit
def ssim(x: jax.Array, y: jax.Array) -> jax.Array:
    """Compute the structural similarity of two images (Wang et al. 2004).

    Gaussian window of 11 x 11, sigma 1.5, K1 0.01, K2 0.03, only where the window fits inside the
    image, mean over places and channels. This is scikit-image's `structural_similarity` with
    `gaussian_weights=True, use_sample_covariance=False, data_range=2`. Images with a side below 11
    get the largest odd window that fits.

    Args:
        x: [H, W, C], H and W at least 8.
        y: the same shape.

    Returns:
        [], at most 1.

    Raises:
        ValueError: unlike shapes, or smaller images.
    """
    _check_pair(x, y)
    taps = _gaussian(min(x.shape[0], x.shape[1]))
    channels = x.shape[-1]
    moments = jnp.concatenate([x, y, x * x, y * y, x * y], axis=-1)
    moments = _filter(_filter(moments, taps, axis=0), taps, axis=1)
    mean_x, mean_y, xx, yy, xy = (moments[..., i * channels : (i + 1) * channels] for i in range(5))
    covariance = xy - mean_x * mean_y
    variances = (xx - mean_x**2) + (yy - mean_y**2)
    luminance = (2.0 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    return jnp.mean(luminance * (2.0 * covariance + _C2) / (variances + _C2))


@_jit
def laplacian_features(image: jax.Array, *, levels: int = 4) -> jax.Array:
    """Compute weighted pyramid coefficients, whose squared distance is the loss.

    A level is an image less its blurred, halved and doubled self; the last is what remains. A level
    counts by its mean square, twice as much as the next finer one: equal weights would make this
    little else than the mean squared error. (Pyramid of Burt and Adelson 1983; squares in place of
    absolute values, which would leave a least-squares solver no derivative at the solution.)

    Args:
        image: [H, W, C].
        levels: how many, the remainder included; sides must be at least 2^(levels - 1).

    Returns:
        [r], all levels in one vector, finest first.

    Raises:
        UserError: too many levels for the image.
    """
    most = int(math.log2(min(image.shape[:2]))) + 1
    if not 1 <= levels <= most:
        size = f"{image.shape[0]} x {image.shape[1]}"
        raise UserError(f"levels must be 1..{most} for images of {size}; got {levels}.")
    parts = []
    for _ in range(levels - 1):
        coarse = _halve(_halve(image, axis=0), axis=1)
        again = _double(_double(coarse, axis=0), axis=1)
        parts.append(image - again[: image.shape[0], : image.shape[1]])
        image = coarse
    weighted = [
        math.sqrt(_COARSE**level / part.size) * part.ravel()
        for level, part in enumerate([*parts, image])
    ]
    return jnp.concatenate(weighted)


@_jit
def laplacian_pyramid(x: jax.Array, y: jax.Array, *, levels: int = 4) -> jax.Array:
    """Compute the squared distance of two images [H, W, C] over pyramid levels; returns []."""
    difference = laplacian_features(x - y, levels=levels)  # the pyramid is linear
    return jnp.sum(jnp.square(difference))


@flax.struct.dataclass
class Loss:
    """A distance of images that is a sum of squares, ready for descent and for least squares.

    It goes into jit as an argument: params of its network are its leaves, not constants.
    """

    params: Any  # of the feature network, or ()
    name: str = flax.struct.field(pytree_node=False)
    levels: int = flax.struct.field(pytree_node=False)
    network: Features | None = flax.struct.field(pytree_node=False)

    def features(self, image: jax.Array) -> jax.Array:
        """Compute the vector [r] of an image [H, W, C] whose squared distance is the loss."""
        return _FEATURES[self.name](self, image)

    def prepare(self, image: jax.Array) -> jax.Array:
        """Compute once what `distance` needs of a target image [H, W, C]."""
        return self.features(image)

    def distance(self, prepared: jax.Array, image: jax.Array) -> jax.Array:
        """Compute the loss [] of an image [H, W, C] against a prepared target."""
        return jnp.sum(jnp.square(self.features(image) - prepared))


def loss(name: str, *, levels: int = 4, network: Features | None = None, params: Any = ()) -> Loss:
    """Make a loss by its name.

    Args:
        name: "mse"; "laplacian", a pyramid of `levels`; "classifier", mean squared difference of
            the features of a network; "lpips", squared difference of such features.
        levels: of the pyramid.
        network: (params, images [n, H, W, C]) -> features [n, ...], for "classifier"; a function
            at module level, so that jit knows it again. For "lpips": `lpips.features`.
        params: of the network; for "lpips" what `lpips.load` gives.

    Raises:
        UserError: an unknown name, or a loss on features without a network.
    """
    choose(name, _FEATURES, "loss")
    if name in _ON_NETWORKS and network is None:
        raise UserError(f"The loss '{name}' needs a network; got None.")
    return Loss(params=params, name=name, levels=levels, network=network)


def _mse_features(_, image):
    return image.ravel() / math.sqrt(image.size)


def _pyramid_features(chosen, image):
    return laplacian_features(image, levels=chosen.levels)


def _network_features(chosen, image):
    return chosen.network(chosen.params, image[None]).ravel()


def _mean_network_features(chosen, image):
    features = _network_features(chosen, image)
    return features / math.sqrt(features.size)


_FEATURES = {
    "mse": _mse_features,
    "laplacian": _pyramid_features,
    "classifier": _mean_network_features,
    "lpips": _network_features,
}
_ON_NETWORKS = ("classifier", "lpips")
NAMES = tuple(_FEATURES)  # of the losses


def _check_pair(x, y):
    if x.shape != y.shape or x.ndim != 3:
        raise ValueError(
            f"Two images of one shape [H, W, C] are needed; got {list(x.shape)}, {list(y.shape)}."
        )
    if min(x.shape[:2]) < 8:
        raise ValueError(f"Images must be at least 8 x 8; got {x.shape[0]} x {x.shape[1]}.")


def _gaussian(side):
    """Give the window's taps along one axis, fewer where the image is smaller than the window."""
    radius = (min(_WINDOW, side) - 1) // 2
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / _SIGMA) ** 2)
    return tuple((weights / weights.sum()).tolist())


def _filter(image, taps, *, axis):
    """Correlate along an axis where the taps fit inside, by shift and add."""
    length = image.shape[axis] - len(taps) + 1
    shifted = (
        tap * jax.lax.slice_in_dim(image, i, i + length, axis=axis) for i, tap in enumerate(taps)
    )
    return sum(shifted)


def _halve(image, *, axis):
    """Blur along an axis, repeating the border, and keep every other place (rounded up)."""
    pads = [(0, 0)] * image.ndim
    pads[axis] = (2, 2)
    blurred = _filter(jnp.pad(image, pads, mode="edge"), _BINOMIAL, axis=axis)
    return jax.lax.slice_in_dim(blurred, 0, None, stride=2, axis=axis)


def _double(image, *, axis):
    """Double along an axis by the same blur of the zero-stuffed image, in its two phases."""
    pads = [(0, 0)] * image.ndim
    pads[axis] = (1, 1)
    padded = jnp.pad(image, pads, mode="edge")
    even = _filter(padded, (1 / 8, 6 / 8, 1 / 8), axis=axis)
    odd = _filter(jax.lax.slice_in_dim(padded, 1, None, axis=axis), (1 / 2, 1 / 2), axis=axis)
    both = jnp.stack([even, odd], axis=axis + 1)
    return both.reshape(image.shape[:axis] + (2 * image.shape[axis],) + image.shape[axis + 1 :])
