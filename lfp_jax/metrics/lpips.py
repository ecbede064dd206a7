"""LPIPS, the learned perceptual distance of two images (Zhang et al. 2018), version 0.1.

Images are [H, W, 3], nominally in [-1, 1]; one channel is repeated to three. All is float32 at
HIGHEST precision and differentiable. The backbones are torchvision's VGG16, AlexNet and SqueezeNet
1.1 up to the last layer LPIPS looks at; weights are read from the published files.
"""

import os
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from lfp_jax.errors import UserError, choose
from lfp_jax.weights import backbones, downloads

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's, for [-1, 1]
_EPSILON = 1e-10  # beside the norm over channels


class _Conv(NamedTuple):
    """A convolution and its ReLU."""

    place: int  # in torchvision's `features`
    width: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1


class _Fire(NamedTuple):
    """SqueezeNet's block: 1x1 down, then 1x1 and 3x3 up side by side."""

    place: int
    squeeze: int
    expand: int  # channels of each of the two


class _Pool(NamedTuple):
    """A max pool of stride 2."""

    window: int
    ceil: bool  # a last window may hang over the edge


_HALVE, _OVERLAP, _HANG = _Pool(2, False), _Pool(3, False), _Pool(3, True)
# The layers of each network, cut where LPIPS looks at what has come out.
_SLICES = {
    "vgg": (
        (_Conv(0, 64), _Conv(2, 64)),
        (_HALVE, _Conv(5, 128), _Conv(7, 128)),
        (_HALVE, _Conv(10, 256), _Conv(12, 256), _Conv(14, 256)),
        (_HALVE, _Conv(17, 512), _Conv(19, 512), _Conv(21, 512)),
        (_HALVE, _Conv(24, 512), _Conv(26, 512), _Conv(28, 512)),
    ),
    "alex": (
        (_Conv(0, 64, 11, 4, 2),),
        (_OVERLAP, _Conv(3, 192, 5, 1, 2)),
        (_OVERLAP, _Conv(6, 384)),
        (_Conv(8, 256),),
        (_Conv(10, 256),),
    ),
    "squeeze": (
        (_Conv(0, 64, 3, 2, 0),),
        (_HANG, _Fire(3, 16, 64), _Fire(4, 16, 64)),
        (_HANG, _Fire(6, 32, 128), _Fire(7, 32, 128)),
        (_HANG, _Fire(9, 48, 192)),
        (_Fire(10, 48, 192),),
        (_Fire(11, 64, 256),),
        (_Fire(12, 64, 256),),
    ),
}
NAMES = tuple(_SLICES)  # of the networks
_SMALLEST = {"vgg": 16, "alex": 31, "squeeze": 17}  # sides that leave a pixel to the last layer


class Backbone(nn.Module):
    """The layers LPIPS looks at: images [n, H, W, 3] -> a list of [n, h, w, c], after ReLU."""

    network: str

    @nn.compact
    def __call__(self, images: jax.Array) -> list[jax.Array]:
        """Compute the layers of a batch, already shifted and scaled."""
        x, layers = images, []
        for part in _SLICES[self.network]:
            for layer in part:
                x = _apply(layer, x)
            layers.append(x)
        return layers


class FireBlock(nn.Module):
    """Squeeze to few channels, then expand by 1x1 and 3x3 side by side."""

    squeeze: int
    expand: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute the block of a batch [n, h, w, c]."""
        x = _convolve(x, self.squeeze, 1, name="squeeze")
        ones = _convolve(x, self.expand, 1, name="expand1x1")
        threes = _convolve(x, self.expand, 3, padding=1, name="expand3x3")
        return jnp.concatenate([ones, threes], axis=-1)


def _apply(layer, x):
    """Apply one layer of the table inside a compact module."""
    if isinstance(layer, _Conv):
        place, width, kernel, stride, padding = layer
        return _convolve(x, width, kernel, stride=stride, padding=padding, name=str(place))
    if isinstance(layer, _Fire):
        return FireBlock(layer.squeeze, layer.expand, name=str(layer.place))(x)
    window = (layer.window, layer.window)
    pads = [(0, (side - layer.window) % 2 if layer.ceil else 0) for side in x.shape[1:3]]
    return nn.max_pool(x, window, strides=(2, 2), padding=pads)


def _convolve(x, width, kernel, *, stride=1, padding=0, name):
    layer = nn.Conv(
        width,
        (kernel, kernel),
        strides=stride,
        padding=padding,
        precision="highest",
        kernel_init=nn.initializers.zeros,  # weights come from files
        name=name,
    )
    return nn.relu(layer(x))


@flax.struct.dataclass
class LPIPS:
    """A frozen LPIPS network; its leaves are its params, so it goes into jit as an argument."""

    backbone: dict[str, Any]  # {"0": {"kernel", "bias"}, ...} by torchvision's indices
    heads: dict[str, jax.Array]  # {"lin0": [c0], ...}, not negative as published
    network: str = flax.struct.field(pytree_node=False)


def load(
    network: str,
    *,
    backbone: str | os.PathLike | None = None,
    heads: str | os.PathLike | None = None,
    download: bool = False,
) -> LPIPS:
    """Read an LPIPS network from the published files.

    Args:
        network: "vgg", "alex" or "squeeze".
        backbone: torchvision's .pth file; default the one in the cache.
        heads: the lpips package's .pth file (weights/v0.1); default the one in the cache.
        download: fetch what is in neither place.

    Raises:
        UserError: an unknown network; a file that is missing, unreadable, or not exactly this.
    """
    slices = choose(network, _SLICES, "LPIPS network")
    backbone = downloads.locate(f"lpips-{network}-backbone", path=backbone, download=download)
    heads = downloads.locate(f"lpips-{network}-heads", path=heads, download=download)
    side = _SMALLEST[network]
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    like = jax.eval_shape(Backbone(network).init, jax.random.key(0), image)["params"]
    tree = backbones.backbone(backbone, network=network, like=like)
    lines = backbones.heads(heads, widths=[_width(part[-1]) for part in slices])
    tree, lines = jax.tree.map(jnp.asarray, (tree, lines))
    return LPIPS(tree, lines, network)


def _width(layer):
    return 2 * layer.expand if isinstance(layer, _Fire) else layer.width


@jax.jit
def distance(model: LPIPS, x: jax.Array, y: jax.Array) -> jax.Array:
    """Compute the LPIPS of two images [H, W, 1 or 3] in [-1, 1]; returns []."""
    return jnp.sum(layer_distances(model, x, y))


@jax.jit
def layer_distances(model: LPIPS, x: jax.Array, y: jax.Array) -> jax.Array:
    """Compute what each layer adds to the LPIPS of two images.

    Args:
        model: the network.
        x: [H, W, 1 or 3] in [-1, 1], sides at least 16 (vgg), 31 (alex) or 17 (squeeze).
        y: the same shape.

    Returns:
        [layers]; their sum is the distance.

    Raises:
        UserError: unlike shapes, other channels, or smaller images.
    """
    if x.shape != y.shape:
        raise UserError(f"LPIPS needs two images alike; got {list(x.shape)} and {list(y.shape)}.")
    layers = _unit_layers(model, jnp.stack([x, y]))
    squares = [jnp.mean(jnp.square(layer[0] - layer[1]), axis=(0, 1)) for layer in layers]
    parts = [
        jnp.einsum("c,c->", head, square, precision="highest")
        for head, square in zip(_heads(model), squares, strict=True)
    ]
    return jnp.stack(parts)


@jax.jit
def features(model: LPIPS, images: jax.Array) -> jax.Array:
    """Compute vectors whose squared distance is LPIPS.

    It is the `network` of `perceptual.loss("lpips", network=..., params=model)`.

    Args:
        model: the network; its heads must not be negative, and no published one is.
        images: [n, H, W, 1 or 3] in [-1, 1].

    Returns:
        [n, r], all layers in one vector: 500,000 numbers for vgg at 64 x 64.

    Raises:
        UserError: another shape, or images too small for the network.
    """
    parts = []
    for head, layer in zip(_heads(model), _unit_layers(model, images), strict=True):
        weighted = layer * jnp.sqrt(head / (layer.shape[1] * layer.shape[2]))[None, None, None]
        parts.append(weighted.reshape(len(layer), -1))
    return jnp.concatenate(parts, axis=1)


def _heads(model):
    return [model.heads[f"lin{i}"] for i in range(len(model.heads))]


def _unit_layers(model, images):
    """Compute the layers of images [n, H, W, c], each place scaled to unit norm over channels."""
    smallest = _SMALLEST[model.network]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or min(images.shape[1:3]) < smallest:
        raise UserError(
            f"LPIPS ({model.network}) needs images [H, W, 1 or 3] with sides of {smallest} or "
            f"more; got {list(images.shape[1:])}."
        )
    shift, scale = (jnp.asarray(values)[None, None, None] for values in (_SHIFT, _SCALE))
    scaled = (jnp.broadcast_to(images, (*images.shape[:3], 3)) - shift) / scale
    layers = Backbone(model.network).apply({"params": model.backbone}, scaled)
    return [layer / (_norm(layer) + _EPSILON) for layer in layers]


def _norm(layer):
    """Compute the norm over channels, with a gradient (0) where all of them are 0."""
    square = jnp.sum(jnp.square(layer), axis=-1, keepdims=True)
    empty = square == 0.0
    return jnp.where(empty, 0.0, jnp.sqrt(jnp.where(empty, 1.0, square)))
