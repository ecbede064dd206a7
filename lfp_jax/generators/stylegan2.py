"""StyleGAN2 (Karras et al. 2020, arXiv 1912.04958): mapping, skip synthesis, resnet discriminator.

Ranges: z is N(0, I); images are nominally in [-1, 1]; noise maps are N(0, 1). All parameters are
float32 and un-scaled: equalised learning rate multiplies every kernel by 1 / sqrt(fan_in) at run
time. `dtype` is the compute type inside the networks only; w and images are float32.

Modulation scales the input of a convolution, demodulation its output, y = demod * conv(x * style),
so that one kernel serves the whole batch and no grouped convolution is needed (section 2.2 of the
paper: the same thing, written on the weights).
"""

import dataclasses
import math
from functools import partial

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lfp_jax.errors import UserError
from lfp_jax.generators import layers

_LRELU_GAIN = math.sqrt(2)
_MAPPING_SAMPLES = 4096  # z samples behind the mean latent where a file has none


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes of a generator; `channels` are those at 4, 8, ..., resolution."""

    resolution: int
    channels: tuple[int, ...]
    image_channels: int = 3
    z_dim: int = 512
    w_dim: int = 512
    label_dim: int = 0
    embed_dim: int = 0
    mapping_layers: int = 8
    mapping_width: int = 512
    mapping_lr: float = 0.01
    fir: tuple[float, ...] = (1, 3, 3, 1)
    clamp: float | None = None

    @property
    def num_ws(self):
        """Number of style inputs: two a resolution (convolutions), ToRGB shares the next one."""
        return 2 * len(self.channels)


@dataclasses.dataclass(frozen=True)
class DiscriminatorArchitecture:
    """Sizes of a resnet discriminator; `channels` are those at 4, 8, ..., resolution."""

    resolution: int
    channels: tuple[int, ...]
    image_channels: int = 3
    label_dim: int = 0
    cmap_dim: int = 0
    embed_dim: int = 0
    mapping_layers: int = 8
    mapping_width: int = 512
    mapping_lr: float = 0.01
    stddev_group: int = 4
    stddev_channels: int = 1
    fir: tuple[float, ...] = (1, 3, 3, 1)
    clamp: float | None = None


def _clip(x, clamp):
    return x if clamp is None else jnp.clip(x, -clamp, clamp)


def _lrelu(x, *, gain=1.0, clamp=None):
    """Leaky ReLU 0.2 with gain sqrt(2); the clamp scales with a further gain."""
    x = jax.nn.leaky_relu(x, 0.2) * jnp.asarray(_LRELU_GAIN * gain, x.dtype)
    return _clip(x, None if clamp is None else clamp * gain)


def normalize_second_moment(x):
    """Scale vectors [..., d] to mean square 1."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-8)


class EqualLinear(nn.Module):
    """Linear layer with equalised learning rate (arXiv 1710.10196, section 4.1)."""

    features: int
    lr: float = 1.0
    bias_init: float = 0.0

    @nn.compact
    def __call__(self, x):
        normal = nn.initializers.normal(1.0 / self.lr)
        kernel = self.param("kernel", normal, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.constant(self.bias_init), (self.features,))
        scale = self.lr / math.sqrt(x.shape[-1])
        return x @ (kernel * scale).astype(x.dtype) + (bias * self.lr).astype(x.dtype)[None]


class Mapping(nn.Module):
    """z [n, z_dim] (and labels [n, label_dim]) -> w [n, out_dim]."""

    out_dim: int
    num_layers: int = 8
    width: int = 512
    embed_dim: int = 0
    lr: float = 0.01

    @nn.compact
    def __call__(self, z, label=None):
        parts = [] if z is None else [normalize_second_moment(z)]
        if label is not None:
            embedded = EqualLinear(self.embed_dim, name="embed")(label)
            parts.append(normalize_second_moment(embedded))
        x = jnp.concatenate(parts, axis=-1)
        for i in range(self.num_layers):
            features = self.out_dim if i == self.num_layers - 1 else self.width
            x = _lrelu(EqualLinear(features, lr=self.lr, name=f"fc{i}")(x))
        return x


def _equal_kernel(module, size, inputs, outputs):
    kernel = module.param("kernel", nn.initializers.normal(1.0), (size, size, inputs, outputs))
    return kernel / math.sqrt(size * size * inputs)


class ModulatedConv(nn.Module):
    """Modulated 3 x 3 convolution, noise, bias, leaky ReLU; optionally doubles the size."""

    features: int
    up: bool = False
    fir: tuple[float, ...] = (1, 3, 3, 1)
    clamp: float | None = None
    trainable: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, w, noise):
        style = EqualLinear(x.shape[-1], bias_init=1.0, name="affine")(w)
        kernel = _equal_kernel(self, 3, x.shape[-1], self.features)
        power = jnp.einsum("rcio,ni->no", jnp.square(kernel), jnp.square(style))
        demod = jax.lax.rsqrt(power + 1e-8).astype(self.dtype)[:, None, None, :]
        x = x * style.astype(self.dtype)[:, None, None, :]
        kernel = kernel.astype(self.dtype)
        if self.up:
            x = layers.up_conv(x, kernel, self.fir, trainable=self.trainable)
        else:
            x = layers.conv(x, kernel, trainable=self.trainable)
        x = x * demod
        strength = self.param("noise_strength", nn.initializers.zeros, ())
        if noise is not None:
            x = x + (noise * strength).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return _lrelu(x + bias.astype(self.dtype)[None, None, None], clamp=self.clamp)


class ToRGB(nn.Module):
    """Modulated 1 x 1 convolution to image channels, not demodulated."""

    features: int
    clamp: float | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, w):
        style = EqualLinear(x.shape[-1], bias_init=1.0, name="affine")(w)
        kernel = _equal_kernel(self, 1, x.shape[-1], self.features).astype(self.dtype)
        x = x * style.astype(self.dtype)[:, None, None, :]
        x = layers.conv(x, kernel)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = x.astype(jnp.float32) + bias[None, None, None]
        return _clip(x, self.clamp)


class SynthesisBlock(nn.Module):
    """One resolution: (up-)convolution, convolution, and the skip image grown by its ToRGB."""

    arch: Architecture
    features: int
    trainable: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, image, ws, noise):
        first = image is None
        arch = self.arch
        conv = partial(
            ModulatedConv, self.features, fir=arch.fir, clamp=arch.clamp, trainable=self.trainable,
            dtype=self.dtype,
        )  # fmt: skip
        names = ("conv1",) if first else ("conv0", "conv1")
        for i, name in enumerate(names):
            x = conv(up=name == "conv0", name=name)(x, ws[:, i], noise[i])
        to_rgb = ToRGB(arch.image_channels, clamp=arch.clamp, dtype=self.dtype, name="torgb")
        rgb = to_rgb(x, ws[:, len(names)])
        return x, rgb if first else layers.upsample(image, arch.fir) + rgb


class Synthesis(nn.Module):
    """W+ latents [n, num_ws, w_dim] and noise maps -> images [n, H, W, C] float32."""

    arch: Architecture
    trainable: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ws, noise):
        arch = self.arch
        const = self.param("const", nn.initializers.normal(1.0), (4, 4, arch.channels[0]))
        x = jnp.broadcast_to(const.astype(self.dtype)[None], (ws.shape[0], *const.shape))
        image, layer = None, 0
        for i, features in enumerate(arch.channels):
            convs = 1 if i == 0 else 2
            block = SynthesisBlock(arch, features, self.trainable, self.dtype, name=f"b{4 * 2**i}")
            x, image = block(
                x, image, ws[:, layer : layer + convs + 1], noise[layer : layer + convs]
            )
            layer += convs
        return image


class DiscriminatorBlock(nn.Module):
    """Residual block that halves the size: conv0, conv1 (down), 1 x 1 skip (down)."""

    features: int
    fir: tuple[float, ...] = (1, 3, 3, 1)
    clamp: float | None = None

    @nn.compact
    def __call__(self, x):
        conv = partial(_Conv, fir=self.fir, clamp=self.clamp)
        skip = _Skip(self.features, self.fir, name="skip")
        conv0 = conv(x.shape[-1], name="conv0")
        conv1 = conv(self.features, down=True, gain=0.5**0.5, name="conv1")
        return conv1(conv0(x)) + skip(x) * 0.5**0.5


class _Skip(nn.Module):
    features: int
    fir: tuple[float, ...]

    @nn.compact
    def __call__(self, x):
        return layers.down_conv(x, _equal_kernel(self, 1, x.shape[-1], self.features), self.fir)


class _Conv(nn.Module):
    features: int
    size: int = 3
    down: bool = False
    gain: float = 1.0
    fir: tuple[float, ...] = (1, 3, 3, 1)
    clamp: float | None = None

    @nn.compact
    def __call__(self, x):
        kernel = _equal_kernel(self, self.size, x.shape[-1], self.features)
        if self.down:
            x = layers.down_conv(x, kernel, self.fir)
        else:
            x = layers.conv(x, kernel, trainable=True)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return _lrelu(x + bias[None, None, None], gain=self.gain, clamp=self.clamp)


def minibatch_stddev(x, *, group, channels):
    """Append the group's mean standard deviation to [n, h, w, c] (arXiv 1710.10196, section 3).

    Groups are strided: image i belongs to group i mod (n / group).
    """
    n, h, w, c = x.shape
    group = min(group, n)
    if n % group:
        raise UserError(f"The discriminator needs a batch divisible by {group}; got {n}.")
    grouped = x.reshape(group, n // group, h, w, channels, c // channels)
    variance = jnp.mean(jnp.square(grouped - jnp.mean(grouped, axis=0, keepdims=True)), axis=0)
    stddev = jnp.mean(jnp.sqrt(variance + 1e-8), axis=(1, 2, 4))  # [n / group, channels]
    maps = jnp.tile(stddev[:, None, None, :], (group, h, w, 1))
    return jnp.concatenate([x, maps], axis=-1)


class _Epilogue(nn.Module):
    arch: DiscriminatorArchitecture

    @nn.compact
    def __call__(self, x):
        arch = self.arch
        x = minibatch_stddev(x, group=arch.stddev_group, channels=arch.stddev_channels)
        conv = _Conv(arch.channels[0], clamp=arch.clamp, name="conv")
        x = conv(x).reshape(x.shape[0], -1)
        x = _lrelu(EqualLinear(arch.channels[0], name="fc")(x))
        return EqualLinear(arch.cmap_dim if arch.label_dim else 1, name="out")(x)


class ResnetDiscriminator(nn.Module):
    """Images [n, H, W, C] (and labels [n, label_dim]) -> logits [n, 1]."""

    arch: DiscriminatorArchitecture

    @nn.compact
    def __call__(self, images, label=None):
        arch = self.arch
        x = _Conv(arch.channels[-1], size=1, clamp=arch.clamp, name="fromrgb")(images)
        for i in range(len(arch.channels) - 1, 0, -1):
            features = arch.channels[i - 1]
            block = DiscriminatorBlock(features, arch.fir, arch.clamp, name=f"b{4 * 2**i}")
            x = block(x)
        x = _Epilogue(arch, name="b4")(x)
        if arch.label_dim:
            cmap = Mapping(
                arch.cmap_dim, arch.mapping_layers, arch.mapping_width, arch.embed_dim,
                arch.mapping_lr, name="mapping",
            )(None, label)  # fmt: skip
            x = jnp.sum(x * cmap, axis=-1, keepdims=True) / math.sqrt(arch.cmap_dim)
        return x


def mapping_module(arch):
    """Build the mapping network of a generator architecture."""
    return Mapping(
        arch.w_dim, arch.mapping_layers, arch.mapping_width, arch.embed_dim, arch.mapping_lr
    )


def noise_shapes(arch):
    """Shapes [1, r, r, 1] of the noise maps: one at 4 x 4, then two a resolution."""
    sizes = [4] + [4 * 2**i for i in range(1, len(arch.channels)) for _ in (0, 1)]
    return [(1, size, size, 1) for size in sizes]


def draw_noise(key, arch, n):
    """Draw noise maps [n, r, r, 1] ~ N(0, 1), one a layer."""
    keys = jax.random.split(key, len(noise_shapes(arch)))
    return [
        jax.random.normal(layer_key, (n, *shape[1:]))
        for layer_key, shape in zip(keys, noise_shapes(arch), strict=True)
    ]


class StyleGAN2(flax.struct.PyTreeNode):
    """A frozen StyleGAN2: its leaves are parameters, so it goes into jit as an argument."""

    mapping: dict  # linen parameters of Mapping
    synthesis: dict  # linen parameters of Synthesis
    w_avg: jax.Array  # [w_dim]
    noise: tuple  # constant maps [1, r, r, 1]
    arch: Architecture = flax.struct.field(pytree_node=False)
    name: str = flax.struct.field(pytree_node=False, default="stylegan2")
    sha256: str = flax.struct.field(pytree_node=False, default="")
    dtype: DTypeLike = flax.struct.field(pytree_node=False, default=jnp.float32)

    @property
    def latent_shape(self):
        """Shape of one latent w: (w_dim,)."""
        return (self.arch.w_dim,)

    @property
    def image_shape(self):
        """Shape of one image: (H, W, C)."""
        return (self.arch.resolution, self.arch.resolution, self.arch.image_channels)

    def sample(self, key, n, *, start=0, label=None):
        """Draw latents from the prior: mapping of z ~ N(0, I).

        Args:
            key: with it, latent i depends on the global index start + i only.
            n: how many.
            start: global index of the first, so that batches put together equal one large draw.
            label: [n, label_dim] for class-conditional generators, else None.

        Returns:
            w [n, w_dim].
        """
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(start + jnp.arange(n))
        z = jax.vmap(lambda k: jax.random.normal(k, (self.arch.z_dim,)))(keys)
        return self.map(z, label=label)

    def map(self, z, label=None, truncation=1.0, *, cutoff=None):
        """Map z to w.

        Args:
            z: [n, z_dim].
            label: [n, label_dim] for class-conditional generators, else None.
            truncation: psi; w is pulled towards the mean latent by 1 - psi.
            cutoff: truncate the first `cutoff` style inputs only.

        Returns:
            w [n, w_dim]; with a cutoff W+ latents [n, num_ws, w_dim].

        Raises:
            UserError: z or label has the wrong shape, or a label is missing.
        """
        self._check_inputs(z, label)
        w = mapping_module(self.arch).apply({"params": self.mapping}, z, label)
        if cutoff is None:
            return w if truncation == 1.0 else self._truncate(w, truncation)
        layer = jnp.arange(self.arch.num_ws)[None, :, None]
        return jnp.where(layer < cutoff, self._truncate(w, truncation)[:, None], w[:, None])

    def decode(self, w, *, noise=None):
        """Synthesise images.

        Args:
            w: [n, w_dim], or W+ [n, num_ws, w_dim].
            noise: None for the stored constant maps; 0 for none; a list of [n or 1, h, w, 1];
                a PRNG key for random maps.

        Returns:
            Images [n, H, W, C] float32, nominally in [-1, 1] (not clipped).

        Raises:
            UserError: w or a noise map has the wrong shape.
        """
        return _synthesise(self, w, noise, trainable=False)

    def _truncate(self, w, psi):
        return self.w_avg[None] + psi * (w - self.w_avg[None])

    def _check_inputs(self, z, label):
        arch = self.arch
        if z.ndim != 2 or z.shape[1] != arch.z_dim:
            raise UserError(f"z must have shape [n, {arch.z_dim}]; got {list(z.shape)}.")
        shape = None if label is None else tuple(label.shape)
        wanted = (z.shape[0], arch.label_dim) if arch.label_dim else None
        if shape != wanted:
            raise UserError(f"This generator takes a label of shape {wanted}; got {shape}.")


def _synthesise(generator, w, noise, *, trainable):
    arch = generator.arch
    if w.shape[1:] not in [(arch.w_dim,), (arch.num_ws, arch.w_dim)]:
        raise UserError(
            f"w must have shape [n, {arch.w_dim}] or [n, {arch.num_ws}, {arch.w_dim}]; "
            f"got {list(w.shape)}."
        )
    ws = jnp.broadcast_to(w[:, None], (w.shape[0], arch.num_ws, arch.w_dim)) if w.ndim == 2 else w
    module = Synthesis(arch, trainable, generator.dtype)
    return module.apply({"params": generator.synthesis}, ws, _noise_maps(generator, noise, len(w)))


def _noise_maps(generator, noise, n):
    shapes = noise_shapes(generator.arch)
    if noise is None:
        return list(generator.noise)
    if isinstance(noise, int) and noise == 0:
        return [None] * len(shapes)
    if not isinstance(noise, (list, tuple)):
        return draw_noise(noise, generator.arch, n)
    if len(noise) != len(shapes):
        raise UserError(f"This generator takes {len(shapes)} noise maps; got {len(noise)}.")
    for i, (given, shape) in enumerate(zip(noise, shapes, strict=True)):
        if given.shape[1:] != shape[1:] or given.shape[0] not in (1, n):
            wanted = [f"{n} or 1", *shape[1:]]
            raise UserError(f"Noise map {i} must have shape {wanted}; got {list(given.shape)}.")
    return list(noise)


class Discriminator(flax.struct.PyTreeNode):
    """A frozen discriminator: `logits = d(images)`."""

    params: dict
    arch: DiscriminatorArchitecture = flax.struct.field(pytree_node=False)

    def __call__(self, images, label=None):
        """Score images [n, H, W, C] (labels [n, label_dim]) -> logits [n, 1].

        Raises:
            UserError: the image shape is not the network's, or a label is missing.
        """
        size = (self.arch.resolution, self.arch.resolution, self.arch.image_channels)
        if images.shape[1:] != size:
            raise UserError(f"Images must have shape [n, *{size}]; got {list(images.shape)}.")
        if (label is not None) != bool(self.arch.label_dim):
            raise UserError(f"This discriminator takes {self.arch.label_dim} label dimensions.")
        return ResnetDiscriminator(self.arch).apply({"params": self.params}, images, label)


@partial(jax.jit, static_argnames=("arch", "name", "noise_strength"))
def random_generator(key, arch, *, name="random", noise_strength=0.0):
    """Make a StyleGAN2 with random weights, for training, tests and timing."""
    mapping_key, synthesis_key, noise_key = jax.random.split(_quick(key), 3)
    z = jnp.zeros((1, arch.z_dim))
    label = jnp.zeros((1, arch.label_dim)) if arch.label_dim else None
    mapping = mapping_module(arch).init(mapping_key, z, label)["params"]
    noise = draw_noise(noise_key, arch, 1)
    ws = jnp.zeros((1, arch.num_ws, arch.w_dim))
    synthesis = Synthesis(arch).init(synthesis_key, ws, noise)["params"]
    synthesis = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + noise_strength if path[-1].key == "noise_strength" else leaf,
        synthesis,
    )
    w_avg = jnp.zeros((arch.w_dim,))
    return StyleGAN2(mapping, synthesis, w_avg, tuple(noise), arch, name)


@partial(jax.jit, static_argnames=("arch",))
def random_discriminator(key, arch):
    """Make a discriminator with random weights."""
    n = arch.stddev_group
    images = jnp.zeros((n, arch.resolution, arch.resolution, arch.image_channels))
    label = jnp.zeros((n, arch.label_dim)) if arch.label_dim else None
    params = ResnetDiscriminator(arch).init(_quick(key), images, label)["params"]
    return Discriminator(params, arch)


def mean_latent(generator):
    """Estimate the mean latent [w_dim] from 4,096 fixed samples, where a file stores none."""
    z = jax.random.normal(jax.random.key(0), (_MAPPING_SAMPLES, generator.arch.z_dim))
    return jnp.mean(generator.map(z), axis=0)


def _quick(key):
    """Reseed the hardware-style generator: a network's worth of draws compiles in no time."""
    return jax.random.key(jax.random.bits(key), impl="unsafe_rbg")
