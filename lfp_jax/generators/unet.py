"""The UNet of latent diffusion (arXiv 2105.05233, 2112.10752): residual blocks told the time, and
attention to the map itself or, in transformers, to a context.

Maps [n, h, w, c] are NHWC float32 at both ends, times [n] count training steps (0 is clean), and
may be fractions. Group norms have eps 1e-5, inside transformers 1e-6. The sizes describe CompVis'
`openaimodel.UNetModel` and diffusers' `UNet2DModel` and `UNet2DConditionModel`.
"""

import dataclasses
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lfp_jax.generators.blocks import (
    Attention,
    Conv,
    Dense,
    GroupNorm,
    MultiHead,
    ResBlock,
    grow,
    shrink,
)

_MAX_PERIOD = 10_000.0

# What attends after a residual block: (heads, head_dim, transformer blocks; 0 for plain attention),
# or None.
Attends = tuple[int, int, int] | None


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes of a UNet; per-level tuples go from the finest level to the coarsest.

    `down_resample` and `up_resample` are between levels i and i + 1: "conv", "pool" (mean or
    repetition only) or "block" (a residual block that resamples).
    """

    size: int  # height and width of the maps it was trained on
    in_channels: int
    out_channels: int
    stem: int  # channels after the first convolution, and of the time embedding
    channels: tuple[int, ...]
    blocks: tuple[int, ...]  # residual blocks a level on the way down; one more on the way up
    down_attention: tuple[Attends, ...]
    middle_attention: Attends
    up_attention: tuple[Attends, ...]
    down_resample: tuple[str, ...]
    up_resample: tuple[str, ...]
    embed_dim: int
    context_dim: int = 0
    classes: int = 0
    scale_shift: bool = False
    groups: int = 32
    middle_groups: int = 32  # of the middle's plain attention; 0 for none
    eps: float = 1e-5
    down_padding: int = 1  # 0: one row and column behind, as in the first stage
    sin_first: bool = False
    freq_shift: float = 0.0


def time_embedding(t, width, *, sin_first=False, freq_shift=0.0):
    """Embed times [n] as [n, width]: cosines, then sines (or the reverse), zero-padded if odd.

    Frequencies fall geometrically from 1 towards 1 / 10,000, over width / 2 - freq_shift steps.
    """
    half = width // 2
    exponent = jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = t.astype(jnp.float32)[:, None] * jnp.exp(-math.log(_MAX_PERIOD) * exponent)[None]
    parts = [jnp.cos(angles), jnp.sin(angles)]
    parts = parts[::-1] if sin_first else parts
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, width % 2)))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, gated feed-forward: each normed and residual."""

    heads: int
    head_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, context):
        attend = partial(
            MultiHead, heads=self.heads, head_dim=self.head_dim, bias=False, dtype=self.dtype
        )
        norms = [
            nn.LayerNorm(1e-5, use_fast_variance=False, dtype=jnp.float32, name=f"norm{i}")
            for i in (1, 2, 3)
        ]
        x = x + attend(name="attn1")(norms[0](x))
        x = x + attend(name="attn2")(norms[1](x), context)
        width = x.shape[-1]
        h = Dense(8 * width, dtype=self.dtype, name="ff_in")(norms[2](x))
        value, gate = jnp.split(h, 2, axis=-1)
        return x + Dense(width, dtype=self.dtype, name="ff_out")(
            value * jax.nn.gelu(gate, approximate=False)
        )


class SpatialTransformer(nn.Module):
    """Transformer over all positions of [n, h, w, c], residual (arXiv 2112.10752, section 3.3)."""

    heads: int
    head_dim: int
    depth: int
    groups: int = 32
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, context):
        width = self.heads * self.head_dim
        h = GroupNorm(self.groups, 1e-6, name="norm")(x).reshape(x.shape[0], -1, x.shape[-1])
        h = Dense(width, dtype=self.dtype, name="proj_in")(h)
        for i in range(self.depth):
            h = TransformerBlock(self.heads, self.head_dim, self.dtype, name=f"block{i}")(
                h, context
            )
        return x + Dense(x.shape[-1], dtype=self.dtype, name="proj_out")(h).reshape(x.shape)


class _Layers(nn.Module):
    """What the parts of the UNet share: how a block and an attention are made."""

    arch: Architecture
    dtype: DTypeLike = jnp.float32

    def block(self, features, name, *, resample=None):
        """Make a residual block."""
        arch = self.arch
        return ResBlock(
            features, arch.groups, arch.eps, resample, arch.scale_shift, self.dtype, name=name
        )

    def attend(self, x, context, kind, name, *, groups):
        """Apply attention or a transformer, if there is one."""
        if kind is None:
            return x
        heads, head_dim, depth = kind
        if depth:
            make = SpatialTransformer(heads, head_dim, depth, groups, self.dtype, name=name)
            return make(x, context)
        return Attention(heads, head_dim, groups, self.arch.eps, self.dtype, name=name)(x)


class _Down(_Layers):
    level: int = 0

    @nn.compact
    def __call__(self, x, emb, context):
        arch, i = self.arch, self.level
        skips = []
        for j in range(arch.blocks[i]):
            x = self.block(arch.channels[i], f"block{j}")(x, emb)
            x = self.attend(x, context, arch.down_attention[i], f"attn{j}", groups=arch.groups)
            skips.append(x)
        if i < len(arch.channels) - 1:
            x = self._resample(x, emb)
            skips.append(x)
        return x, skips

    def _resample(self, x, emb):
        arch, how = self.arch, self.arch.down_resample[self.level]
        if how == "block":
            return self.block(x.shape[-1], "resample", resample="down")(x, emb)
        if how == "pool":
            return shrink(x)
        pad = arch.down_padding
        if not pad:
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        conv = Conv(x.shape[-1], stride=2, padding=pad, dtype=self.dtype, name="resample")
        return conv(x)


class _Up(_Layers):
    level: int = 0

    @nn.compact
    def __call__(self, x, skips, emb, context):
        arch, i = self.arch, self.level
        for j in range(arch.blocks[i] + 1):
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = self.block(arch.channels[i], f"block{j}")(x, emb)
            x = self.attend(x, context, arch.up_attention[i], f"attn{j}", groups=arch.groups)
        if i == 0:
            return x
        how = arch.up_resample[i - 1]
        if how == "block":
            return self.block(x.shape[-1], "resample", resample="up")(x, emb)
        x = grow(x)
        return x if how == "pool" else Conv(x.shape[-1], dtype=self.dtype, name="resample")(x)


class _Middle(_Layers):
    @nn.compact
    def __call__(self, x, emb, context):
        arch, features = self.arch, x.shape[-1]
        kind = arch.middle_attention
        groups = arch.groups if kind and kind[2] else arch.middle_groups
        x = self.block(features, "block0")(x, emb)
        x = self.attend(x, context, kind, "attn", groups=groups)
        return self.block(features, "block1")(x, emb)


class UNet(nn.Module):
    """Maps [n, h, w, c], times [n], context [n, tokens, d], labels [n] -> maps [n, h, w, c]."""

    arch: Architecture
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, t, context=None, label=None):
        arch, make = self.arch, (self.arch, self.dtype)
        emb = time_embedding(
            t, arch.stem, sin_first=arch.sin_first, freq_shift=arch.freq_shift
        )  # fmt: skip
        emb = nn.silu(Dense(arch.embed_dim, dtype=self.dtype, name="time0")(emb))
        emb = Dense(arch.embed_dim, dtype=self.dtype, name="time1")(emb)
        if arch.classes:
            shape = (arch.classes, arch.embed_dim)
            emb = emb + self.param("label", nn.initializers.normal(1.0), shape)[label]
        x = Conv(arch.stem, dtype=self.dtype, name="stem")(x)
        skips = [x]
        levels = range(len(arch.channels))
        for i in levels:
            x, more = _Down(*make, level=i, name=f"down{i}")(x, emb, context)
            skips += more
        x = _Middle(*make, name="mid")(x, emb, context)
        for i in reversed(levels):
            x = _Up(*make, level=i, name=f"up{i}")(x, skips, emb, context)
        x = nn.silu(GroupNorm(arch.groups, arch.eps, name="norm_out")(x))
        return Conv(arch.out_channels, dtype=self.dtype, name="conv_out")(x).astype(jnp.float32)
