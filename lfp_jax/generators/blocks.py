"""Layers shared by the first stage and the UNet of latent diffusion.

All feature maps are NHWC, kernels HWIO; 1 x 1 convolutions are matrices [in, out]. Parameters are
float32; `dtype` is the compute type, and normalisation is float32 in any case.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lfp_jax.generators import layers


class Conv(nn.Module):
    """3 x 3 convolution [n, h, w, i] -> [n, h', w', features]."""

    features: int
    stride: int = 1
    padding: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = layers.conv(
            x.astype(self.dtype), kernel.astype(self.dtype),
            stride=self.stride, padding=self.padding,
        )  # fmt: skip
        return x + bias.astype(self.dtype)[None, None, None]


class Dense(nn.Module):
    """Linear map of the last axis: [..., i] -> [..., features]."""

    features: int
    bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        x = x.astype(self.dtype) @ kernel.astype(self.dtype)
        if not self.bias:
            return x
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return x + bias.astype(self.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class GroupNorm(nn.Module):
    """Normalise groups of channels of [n, ..., c] over all positions (arXiv 1803.08494)."""

    groups: int = 32
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        flat = x.astype(jnp.float32).reshape(x.shape[0], -1, channels)
        # In two passes: the mean square less the squared mean would cancel. Over positions first:
        # sums over the few channels of a group at each position are five times slower on CPU.
        flat = flat - self._mean(flat)
        scale = scale[None, None] * jax.lax.rsqrt(self._mean(jnp.square(flat)) + self.eps)
        return (flat * scale + bias[None, None]).reshape(x.shape).astype(x.dtype)

    def _mean(self, flat):
        """Give the mean of each channel's group of [n, positions, c]: [n, 1, c]."""
        n, _, channels = flat.shape
        means = jnp.mean(flat, axis=1).reshape(n, self.groups, channels // self.groups)
        means = jnp.mean(means, axis=2, keepdims=True)
        return jnp.broadcast_to(means, (n, self.groups, channels // self.groups)).reshape(n, 1, -1)


def grow(x):
    """Double the height and width of [n, h, w, c] by repeating pixels."""
    n, h, w, c = x.shape
    wide = jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c))
    return wide.reshape(n, 2 * h, 2 * w, c)


def shrink(x):
    """Halve the height and width of [n, h, w, c] by the mean of 2 x 2 pixels; odd edges are cut."""
    n, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return jnp.mean(x.reshape(n, h // 2, 2, w // 2, 2, c), axis=(2, 4))


class ResBlock(nn.Module):
    """Residual block: norm, SiLU, conv, norm, SiLU, conv; optionally told the time, resampled.

    `resample` is "up" or "down" between the first SiLU and convolution, and on the skip. With
    `scale_shift` the embedding scales and shifts the second norm, else it is added before it.
    """

    features: int
    groups: int = 32
    eps: float = 1e-6
    resample: str | None = None
    scale_shift: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, emb=None):
        norm = partial(GroupNorm, groups=self.groups, eps=self.eps)
        h = nn.silu(norm(name="norm0")(x))
        if self.resample:
            change = {"up": grow, "down": shrink}[self.resample]
            h, x = change(h), change(x)
        h = Conv(self.features, dtype=self.dtype, name="conv0")(h)
        if emb is None:
            h = norm(name="norm1")(h)
        else:
            h = self._tell(h, nn.silu(emb), norm(name="norm1"))
        h = Conv(self.features, dtype=self.dtype, name="conv1")(nn.silu(h))
        if x.shape[-1] != self.features:
            x = Dense(self.features, dtype=self.dtype, name="skip")(x)
        return x.astype(h.dtype) + h

    def _tell(self, h, emb, norm):
        width = 2 * self.features if self.scale_shift else self.features
        emb = Dense(width, dtype=self.dtype, name="embed")(emb)[:, None, None, :]
        if not self.scale_shift:
            return norm(h + emb)
        scale, shift = jnp.split(emb, 2, axis=-1)
        return norm(h) * (1 + scale) + shift


class MultiHead(nn.Module):
    """Attention of [n, t, c] to itself or a context [n, s, d]: softmax(q k / sqrt(head_dim)) v."""

    heads: int
    head_dim: int
    bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, context=None):
        context = x if context is None else context
        width = self.heads * self.head_dim

        def project(name, x):
            y = Dense(width, self.bias, self.dtype, name=name)(x)
            return y.reshape(*y.shape[:2], self.heads, self.head_dim)

        q, k, v = project("q", x), project("k", context), project("v", context)
        mixed = jax.nn.dot_product_attention(q, k, v)
        return Dense(x.shape[-1], dtype=self.dtype, name="out")(mixed.reshape(*x.shape[:2], width))


class Attention(nn.Module):
    """Residual self-attention over all positions of [n, h, w, c]; no norm if groups is 0."""

    heads: int
    head_dim: int
    groups: int = 32
    eps: float = 1e-6
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = GroupNorm(self.groups, self.eps, name="norm")(x) if self.groups else x
        h = h.reshape(x.shape[0], -1, x.shape[-1])
        heads = MultiHead(self.heads, self.head_dim, dtype=self.dtype, name="heads")
        return x + heads(h).reshape(x.shape)


class LinearAttention(nn.Module):
    """Linear attention of one head, k normalised over positions; neither norm nor residual."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        n, h, w, c = x.shape
        qkv = Dense(3 * c, bias=False, dtype=self.dtype, name="qkv")(x).reshape(n, h * w, 3, c)
        q, k, v = qkv[:, :, 0], jax.nn.softmax(qkv[:, :, 1], axis=1), qkv[:, :, 2]
        summary = jnp.einsum("npd,npe->nde", k, v)
        mixed = jnp.einsum("nde,npd->npe", summary, q)
        return Dense(c, dtype=self.dtype, name="out")(mixed.reshape(x.shape))
