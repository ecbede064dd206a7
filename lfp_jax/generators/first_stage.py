"""First stages of latent diffusion (arXiv 2112.10752, appendix G): VQ and KL autoencoders.

Images [n, H, W, C] are nominally in [-1, 1]; latents [n, h, w, c] here are those of the autoencoder
itself, before any scale factor. Sizes and options are those of CompVis' `ddconfig` and of
diffusers' `VQModel` and `AutoencoderKL`. Group norms have eps 1e-6.
"""

import dataclasses
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
    LinearAttention,
    ResBlock,
    grow,
    shrink,
)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes of a first stage; per-level tuples go from the finest level to the coarsest."""

    kind: str  # "vq" or "kl"
    resolution: int
    channels: tuple[int, ...]
    stem: int  # channels after the encoder's first convolution
    z_channels: int  # between the networks and the 1 x 1 convolutions on the latent's side
    latent_channels: int
    codes: int = 0  # VQ: size of the codebook
    image_channels: int = 3
    out_channels: int = 3
    blocks: int = 2  # residual blocks a level of the encoder; the decoder has one more
    encoder_attention: tuple[bool, ...] = ()
    decoder_attention: tuple[bool, ...] = ()
    middle_attention: bool = True
    attention: str = "vanilla"  # or "linear"
    resample_conv: bool = True
    groups: int = 32
    quant_conv: bool = True
    post_quant_conv: bool = True
    tanh_out: bool = False
    give_pre_end: bool = False
    patch: int = 1  # pixels a side that become channels before the encoder, and back at the end

    @property
    def factor(self):
        """How many times smaller a latent is than its image, per side."""
        return self.patch * 2 ** (len(self.channels) - 1)

    @property
    def decoded_channels(self):
        """Channels that the decoder gives."""
        return self.channels[0] if self.give_pre_end else self.out_channels


class _Level(nn.Module):
    """Residual blocks of one width, each followed by attention if the level has it."""

    arch: Architecture
    features: int
    blocks: int
    attends: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, resample=None):
        arch = self.arch
        for j in range(self.blocks):
            block = ResBlock(self.features, arch.groups, dtype=self.dtype, name=f"block{j}")
            x = block(x)
            if self.attends:
                x = _attention(arch, self.features, self.dtype, f"attn{j}")(x)
        if resample == "down" and arch.resample_conv:
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
            return Conv(self.features, stride=2, padding=0, dtype=self.dtype, name="resample")(x)
        if resample == "down":
            return shrink(x)
        if resample == "up":
            x = grow(x)
        if resample == "up" and arch.resample_conv:
            return Conv(self.features, dtype=self.dtype, name="resample")(x)
        return x


class _Middle(nn.Module):
    arch: Architecture
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        features = x.shape[-1]
        block = partial(ResBlock, features, groups=self.arch.groups, dtype=self.dtype)
        x = block(name="block0")(x)
        if self.arch.middle_attention:
            x = _attention(self.arch, features, self.dtype, "attn")(x)
        return block(name="block1")(x)


def _attention(arch, features, dtype, name):
    if arch.attention == "linear":
        return LinearAttention(dtype=dtype, name=name)
    return Attention(1, features, arch.groups, dtype=dtype, name=name)


class Encoder(nn.Module):
    """Images [n, H, W, C] -> [n, h, w, latent_channels], or twice that (mean, logvar) for KL."""

    arch: Architecture
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image):
        arch, last = self.arch, len(self.arch.channels) - 1
        x = Conv(arch.stem, dtype=self.dtype, name="stem")(_fold(image, arch.patch))
        for i, features in enumerate(arch.channels):
            attends = bool(arch.encoder_attention and arch.encoder_attention[i])
            level = _Level(arch, features, arch.blocks, attends, self.dtype, name=f"down{i}")
            x = level(x, "down" if i < last else None)
        x = _Middle(arch, self.dtype, name="mid")(x)
        x = nn.silu(GroupNorm(arch.groups, name="norm_out")(x))
        double = 2 if arch.kind == "kl" else 1
        x = Conv(double * arch.z_channels, dtype=self.dtype, name="conv_out")(x)
        if arch.quant_conv:
            x = Dense(double * arch.latent_channels, dtype=self.dtype, name="quant")(x)
        return x.astype(jnp.float32)


class Decoder(nn.Module):
    """Latents [n, h, w, latent_channels] (quantised before, for VQ) -> images [n, H, W, C]."""

    arch: Architecture
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, z):
        arch = self.arch
        x = (
            Dense(arch.z_channels, dtype=self.dtype, name="post_quant")(z)
            if arch.post_quant_conv
            else z
        )
        x = Conv(arch.channels[-1], dtype=self.dtype, name="stem")(x)
        x = _Middle(arch, self.dtype, name="mid")(x)
        for i, features in reversed(list(enumerate(arch.channels))):
            attends = bool(arch.decoder_attention and arch.decoder_attention[i])
            level = _Level(arch, features, arch.blocks + 1, attends, self.dtype, name=f"up{i}")
            x = level(x, "up" if i else None)
        if arch.give_pre_end:
            return x.astype(jnp.float32)
        x = nn.silu(GroupNorm(arch.groups, name="norm_out")(x))
        x = Conv(arch.out_channels * arch.patch**2, dtype=self.dtype, name="conv_out")(x)
        x = _unfold(x.astype(jnp.float32), arch.patch)
        return jnp.tanh(x) if arch.tanh_out else x


def _fold(x, size):
    """Turn size x size pixels of [n, h, w, c] into channels: [n, h / size, w / size, size^2 c]."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height // size, size, width // size, size, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(*x.shape[:3], size * size * channels)


def _unfold(x, size):
    """Undo `_fold`."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height, width, size, size, channels // size**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, height * size, width * size, -1)


def quantize(z, codebook):
    """Replace each position by its nearest code (arXiv 1711.00937); the gradient passes straight.

    Args:
        z: [n, h, w, c] float32.
        codebook: [codes, c].

    Returns:
        (z_q [n, h, w, c], indices [n, h, w] int32).
    """
    product = jnp.einsum("nhwc,kc->nhwk", z, codebook, precision="highest")
    # The squared distance up to |z|^2, which is the same for all codes.
    distance = jnp.sum(jnp.square(codebook), axis=1)[None, None, None] - 2 * product
    indices = jnp.argmin(distance, axis=-1).astype(jnp.int32)
    return z + jax.lax.stop_gradient(codebook[indices] - z), indices
