"""The FID-Inception: features for FID and KID, class scores for the Inception Score.

It is Inception v3 as converted from TensorFlow for FID (pytorch-fid): 1008 classes, average pools
that leave the padding out, and a max pool in the last block. Images are [n, H, W, 3], nominally in
[-1, 1] (one channel is repeated to three), resized to 299 x 299 by plain bilinear interpolation.
All is float32 at HIGHEST precision; weights are read from pytorch-fid's file.
"""

import functools
import os
from typing import Any, NamedTuple, cast

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lfp_jax.errors import UserError
from lfp_jax.metrics import features as batched
from lfp_jax.weights import backbones, downloads

NAME = "FID-Inception"  # what reports call these features
SIZE = 299  # pixels a side inside
WIDTHS = (64, 192, 768, 2048)  # channels of the four blocks; the last are the FID's features
_CLASSES = 1008
_EPSILON = 1e-3  # of the batch normalisation


class _Conv(NamedTuple):
    """A convolution without bias, batch normalisation with fixed statistics, and a ReLU."""

    name: str
    width: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1
    pad: bool = True  # so as to keep the size


class _Pool(NamedTuple):
    """A pool of 3 x 3: "max" or "average"."""

    kind: str
    stride: int


_SHRINK, _AVERAGE, _MAX = _Pool("max", 2), _Pool("average", 1), _Pool("max", 1)


def _grid35(pool):
    """Give the branches at 35 x 35."""
    return (
        (_Conv("branch1x1", 64),),
        (_Conv("branch5x5_1", 48), _Conv("branch5x5_2", 64, 5)),
        (
            _Conv("branch3x3dbl_1", 64),
            _Conv("branch3x3dbl_2", 96, 3),
            _Conv("branch3x3dbl_3", 96, 3),
        ),
        (_AVERAGE, _Conv("branch_pool", pool)),
    )


def _grid17(width):
    """Give the branches at 17 x 17."""
    return (
        (_Conv("branch1x1", 192),),
        (
            _Conv("branch7x7_1", width),
            _Conv("branch7x7_2", width, (1, 7)),
            _Conv("branch7x7_3", 192, (7, 1)),
        ),
        (
            _Conv("branch7x7dbl_1", width),
            _Conv("branch7x7dbl_2", width, (7, 1)),
            _Conv("branch7x7dbl_3", width, (1, 7)),
            _Conv("branch7x7dbl_4", width, (7, 1)),
            _Conv("branch7x7dbl_5", 192, (1, 7)),
        ),
        (_AVERAGE, _Conv("branch_pool", 192)),
    )


def _grid8(pool):
    """Give the branches at 8 x 8; a tuple inside a branch stands side by side."""
    return (
        (_Conv("branch1x1", 320),),
        (
            _Conv("branch3x3_1", 384),
            (_Conv("branch3x3_2a", 384, (1, 3)), _Conv("branch3x3_2b", 384, (3, 1))),
        ),
        (
            _Conv("branch3x3dbl_1", 448),
            _Conv("branch3x3dbl_2", 384, 3),
            (_Conv("branch3x3dbl_3a", 384, (1, 3)), _Conv("branch3x3dbl_3b", 384, (3, 1))),
        ),
        (pool, _Conv("branch_pool", 192)),
    )


_TO_GRID17 = (
    (_Conv("branch3x3", 384, 3, 2, False),),
    (
        _Conv("branch3x3dbl_1", 64),
        _Conv("branch3x3dbl_2", 96, 3),
        _Conv("branch3x3dbl_3", 96, 3, 2, False),
    ),
    (_SHRINK,),
)
_TO_GRID8 = (
    (_Conv("branch3x3_1", 192), _Conv("branch3x3_2", 320, 3, 2, False)),
    (
        _Conv("branch7x7x3_1", 192),
        _Conv("branch7x7x3_2", 192, (1, 7)),
        _Conv("branch7x7x3_3", 192, (7, 1)),
        _Conv("branch7x7x3_4", 192, 3, 2, False),
    ),
    (_SHRINK,),
)
# The four blocks: layers, and (name, branches) of mixed ones.
_BLOCKS = (
    (
        _Conv("Conv2d_1a_3x3", 32, 3, 2, False),
        _Conv("Conv2d_2a_3x3", 32, 3, 1, False),
        _Conv("Conv2d_2b_3x3", 64, 3),
        _SHRINK,
    ),
    (_Conv("Conv2d_3b_1x1", 80), _Conv("Conv2d_4a_3x3", 192, 3, 1, False), _SHRINK),
    (
        ("Mixed_5b", _grid35(32)),
        ("Mixed_5c", _grid35(64)),
        ("Mixed_5d", _grid35(64)),
        ("Mixed_6a", _TO_GRID17),
        ("Mixed_6b", _grid17(128)),
        ("Mixed_6c", _grid17(160)),
        ("Mixed_6d", _grid17(160)),
        ("Mixed_6e", _grid17(192)),
    ),
    (
        ("Mixed_7a", _TO_GRID8),
        ("Mixed_7b", _grid8(_AVERAGE)),
        ("Mixed_7c", _grid8(_MAX)),
    ),
)


class Normalization(nn.Module):
    """Batch normalisation by the statistics of training."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise [n, h, w, c]."""
        zeros, shape = nn.initializers.zeros, (x.shape[-1],)
        mean, var, scale, bias = (
            self.param(name, zeros, shape)[None, None, None]
            for name in ("mean", "var", "scale", "bias")
        )
        return (x - mean) * (scale / jnp.sqrt(var + _EPSILON)) + bias


class ConvBlock(nn.Module):
    """One convolution of the table."""

    layer: _Conv

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute [n, h, w, c]."""
        _, width, kernel, stride, pad = self.layer
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        conv = nn.Conv(
            width,
            kernel,
            strides=stride,
            padding=[(side // 2 if pad else 0,) * 2 for side in kernel],
            use_bias=False,
            precision="highest",
            kernel_init=nn.initializers.zeros,  # weights come from a file
            name="conv",
        )
        return nn.relu(Normalization(name="bn")(conv(x)))


class Mixed(nn.Module):
    """Branches side by side, joined along the channels."""

    branches: tuple

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute [n, h, w, c]."""
        return jnp.concatenate([_chain(branch, x) for branch in self.branches], axis=-1)


class Blocks(nn.Module):
    """The network up to its last pool: images [n, 299, 299, 3] -> four blocks [n, h, w, c]."""

    @nn.compact
    def __call__(self, images: jax.Array) -> list[jax.Array]:
        """Compute the blocks of a batch."""
        blocks, x = [], images
        for layers in _BLOCKS:
            x = _chain(layers, x)
            blocks.append(x)
        return blocks


def _chain(layers, x):
    """Apply layers of the tables one after another inside a compact module."""
    for layer in layers:
        if isinstance(layer, _Conv):
            x = ConvBlock(layer, name=layer.name)(x)
        elif isinstance(layer, _Pool):
            x = _pool(layer, x)
        elif isinstance(layer[0], str):
            x = Mixed(layer[1], name=layer[0])(x)
        else:
            x = jnp.concatenate([_chain((side,), x) for side in layer], axis=-1)
    return x


def _pool(layer, x):
    window, strides = (3, 3), (layer.stride, layer.stride)
    padding = [(0, 0) if layer.stride == 2 else (1, 1)] * 2
    if layer.kind == "max":
        return nn.max_pool(x, window, strides=strides, padding=padding)
    return nn.avg_pool(x, window, strides=strides, padding=padding, count_include_pad=False)


@flax.struct.dataclass
class Inception:
    """A frozen FID-Inception; its leaves are its params, so it goes into jit as an argument."""

    params: dict[str, Any]  # {"Conv2d_1a_3x3": {"conv", "bn"}, "Mixed_5b": {...}, ..., "fc": {...}}


def load(*, path: str | os.PathLike | None = None, download: bool = False) -> Inception:
    """Read the FID-Inception.

    Args:
        path: pytorch-fid's pt_inception-2015-12-05-6726825d.pth; default the one in the cache.
        download: fetch it where it is not in the cache.

    Raises:
        UserError: a file that is missing, unreadable, or not exactly this network.
    """
    path = downloads.locate("fid-inception", path=path, download=download)
    tree = backbones.inception(path, like=_shapes())
    return Inception(params=jax.tree.map(jnp.asarray, tree))


@functools.cache
def _shapes():
    """Give the tree of the params' shapes."""
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    like = jax.eval_shape(Blocks().init, jax.random.key(0), image)["params"]
    sizes = {"kernel": (WIDTHS[-1], _CLASSES), "bias": (_CLASSES,)}
    fc = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in sizes.items()}
    return like | {"fc": fc}


@jax.jit
def resize(images: jax.Array) -> jax.Array:
    """Resize images to what the network takes: bilinear, half-pixel centres, no antialiasing.

    Args:
        images: [n, H, W, 1 or 3] in [-1, 1].

    Returns:
        [n, 299, 299, 3].

    Raises:
        UserError: another shape.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
        raise UserError(f"The {NAME} takes images [n, H, W, 1 or 3]; got {list(images.shape)}.")
    n = len(images)
    colour = jnp.broadcast_to(images, (*images.shape[:3], 3))
    return jax.image.resize(colour, (n, SIZE, SIZE, 3), "bilinear", antialias=False)


def features(model: Inception, images: jax.Array) -> jax.Array:
    """Compute the features [n, 2048] of images [n, H, W, 1 or 3] in [-1, 1]; differentiable.

    Resizing is a program of its own, so that the large one is compiled once for all sizes.
    """
    return block_means(model, resize(images))[-1]


@jax.jit
def block_means(model: Inception, resized: jax.Array) -> list[jax.Array]:
    """Compute the mean over places of each block.

    Args:
        model: the network.
        resized: [n, 299, 299, 3] in [-1, 1].

    Returns:
        [n, 64], [n, 192], [n, 768], [n, 2048].
    """
    params = {name: part for name, part in model.params.items() if name != "fc"}
    blocks = cast(list[jax.Array], Blocks().apply({"params": params}, resized))
    return [block.mean(axis=(1, 2)) for block in blocks]


@jax.jit
def logits(model: Inception, features: jax.Array) -> jax.Array:
    """Compute class scores [n, 1008] from features [n, 2048], as the Inception Score takes them.

    The bias is left out, as in the original program (Salimans et al. 2016).
    """
    kernel = model.params["fc"]["kernel"]
    return jnp.einsum("nf,fc->nc", features, kernel, precision="highest")


def features_in_batches(model: Inception, images: np.ndarray, *, batch: int = 32) -> np.ndarray:
    """Compute the features of many images, a batch at a time.

    Args:
        model: the network.
        images: host array [n, H, W, 1 or 3], uint8 or float in [-1, 1].
        batch: images at once; bounds the memory.

    Returns:
        float32 [n, 2048].
    """
    return batched.in_batches(features, model, images, batch=batch)
