"""Latent diffusion (Rombach et al. 2022, arXiv 2112.10752): first stage, UNet and sampler in one.

Ranges: images are nominally in [-1, 1]; latents are those of the diffusion, which are the first
stage's times the scale factor, about N(0, I) over all. Parameters are float32; `dtype` is the
compute type inside the networks only.
"""

import dataclasses
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lfp_jax.errors import UserError
from lfp_jax.generators import diffusion, first_stage, unet


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a model consists of; a part that it lacks is None."""

    first_stage: first_stage.Architecture | None
    unet: unet.Architecture | None
    diffusion: diffusion.Settings
    size: int  # height and width of latents

    @property
    def latent_channels(self):
        """Channels of a latent."""
        if self.first_stage is not None:
            return self.first_stage.latent_channels
        if self.unet is None:
            raise ValueError("A model needs a first stage or a UNet.")
        return self.unet.out_channels


class LatentDiffusion(flax.struct.PyTreeNode):
    """A frozen latent-diffusion model: its leaves are parameters, so it goes into jit as argument.

    The parts that a file lacks are None; what needs them raises a UserError that says so.
    """

    encoder: dict | None  # linen parameters of Encoder
    decoder: dict | None  # of Decoder
    codebook: jax.Array | None  # VQ: [codes, latent_channels]
    unet: dict | None  # of UNet
    alphas_cumprod: jax.Array  # [timesteps]
    scale_factor: jax.Array  # []
    shift: jax.Array  # []; latents are (first stage's - shift) * scale_factor
    arch: Architecture = flax.struct.field(pytree_node=False)
    name: str = flax.struct.field(pytree_node=False, default="ldm")
    sha256: str = flax.struct.field(pytree_node=False, default="")
    quantizes: bool = flax.struct.field(pytree_node=False, default=True)  # in `decode`, if VQ
    dtype: DTypeLike = flax.struct.field(pytree_node=False, default=jnp.float32)
    sample_steps: int = flax.struct.field(pytree_node=False, default=50)  # of `sample`

    @property
    def latent_shape(self):
        """Shape of one latent: (h, w, c)."""
        return (self.arch.size, self.arch.size, self.arch.latent_channels)

    @property
    def image_shape(self):
        """Shape of one image: (H, W, C).

        Raises:
            UserError: the model has no first stage.
        """
        arch, _ = self._first_stage("decoder")
        side = self.arch.size * arch.factor
        return (side, side, arch.decoded_channels)

    def sample(
        self, key, n, *, start=0, steps=None, eta=1.0, context=None, label=None, null_context=None,
        null_label=None, guidance=1.0, progress=None,
    ):  # fmt: skip
        """Draw latents from the prior by DDIM.

        Args:
            key: with it, latent i depends on the global index start + i only.
            n: how many.
            start: global index of the first, so that batches put together equal one large draw.
            steps: as `denoise`; None: `sample_steps` of the model.
            eta, context, label, null_context, null_label, guidance, progress: as `denoise`.

        Returns:
            Latents [n, *latent_shape].

        Raises:
            UserError: the model has no UNet, or an option is impossible.
        """
        self._unet()
        steps = self.sample_steps if steps is None else steps
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(start + jnp.arange(n))
        pairs = jax.vmap(jax.random.split)(keys)
        x = jax.vmap(lambda k: jax.random.normal(k, self.latent_shape))(pairs[:, 0])
        return self.denoise(
            x, steps=steps, eta=eta, keys=pairs[:, 1], context=context, label=label,
            null_context=null_context, null_label=null_label, guidance=guidance, progress=progress,
        )  # fmt: skip

    def denoise(
        self, x, *, steps=50, eta=0.0, keys=None, noise=None, context=None, label=None,
        null_context=None, null_label=None, guidance=1.0, progress=None,
    ):  # fmt: skip
        """Run DDIM from given noise to latents.

        Args:
            x: x_T [n, h, w, c], N(0, I).
            steps: how many; see diffusion.Settings on what happens where they do not divide.
            eta: 0 is deterministic; above it each step adds noise.
            keys: [n] PRNG keys of that noise, one an image.
            noise: the noise itself [steps, n, h, w, c], first (noisiest) step first, not keys.
            context: [n, tokens, context_dim] for a UNet with cross-attention, else None.
            label: [n] whole numbers for a class-conditional UNet, else None.
            null_context, null_label: what stands for "nothing" in classifier-free guidance.
            guidance: noise is null + guidance * (given - null) (arXiv 2207.12598); 1 needs no null.
            progress: function (steps done, all steps), or None.

        Returns:
            Latents [n, h, w, c].

        Raises:
            UserError: the model has no UNet, an input has another shape, eta > 0 without keys or
                noise, or guidance without a null.
        """
        self._check(x, context, label, latents=True)
        guided = null_context is not None or null_label is not None
        if guided:
            self._check(x, null_context, null_label, latents=True)
        elif guidance != 1.0:
            raise UserError(f"guidance={guidance} needs null_context or null_label.")
        count = len(diffusion.timesteps(self.arch.diffusion, steps=steps))
        if noise is not None and noise.shape != (count, *x.shape):
            wanted = [count, *x.shape]
            raise UserError(f"noise must have shape {wanted}; got {list(noise.shape)}.")
        # A traced eta may be above 0, as far as one can tell.
        if not (isinstance(eta, int | float) and eta == 0) and keys is None and noise is None:
            raise UserError(f"eta={eta} needs keys or noise; only eta=0 does without.")
        if isinstance(eta, int | float) and eta < 0:
            raise UserError(f"eta must be at least 0; got {eta}.")
        nulls = (null_context, null_label) if guided else None
        return _denoise(
            self, x, eta, keys, noise, (context, label), nulls, guidance, steps=steps,
            progress=progress,
        )  # fmt: skip

    def predict_noise(self, x, t, *, context=None, label=None):
        """Predict the noise in x.

        Args:
            x: [n, h, w, in_channels].
            t: [n] training steps, 0 is clean.
            context, label: as in `denoise`.

        Returns:
            [n, h, w, out_channels], noise also where the network itself predicts something else.

        Raises:
            UserError: the model has no UNet, or an input has another shape.
        """
        self._check(x, context, label)
        output = _predict(self, x, t, context, label)
        if self.arch.diffusion.prediction == "noise":
            return output
        alpha = self.alphas_cumprod[t][:, None, None, None]
        return diffusion.noise_and_image(output, x, alpha, self.arch.diffusion.prediction)[0]

    def decode(self, z, *, quantize=None):
        """Decode latents: scale back, quantise, decode.

        Args:
            z: [n, h, w, c]; any size that the network takes.
            quantize: VQ: replace each position by its nearest code; the gradient passes straight.
                Default: the generator's `quantizes`.

        Returns:
            Images [n, H, W, C] float32, nominally in [-1, 1] (not clipped).

        Raises:
            UserError: the model has no first stage, or z has another shape.
        """
        arch, params = self._first_stage("decoder")
        if z.ndim != 4 or z.shape[-1] != arch.latent_channels:
            raise UserError(
                f"z must have shape [n, h, w, {arch.latent_channels}]; got {list(z.shape)}."
            )
        z = z / self.scale_factor + self.shift
        quantize = self.quantizes if quantize is None else quantize
        if arch.kind == "vq" and quantize:
            z, _ = first_stage.quantize(z, self.codebook)
        return first_stage.Decoder(arch, self.dtype).apply({"params": params}, z)

    def encode(self, images):
        """Encode images: VQ before quantisation, KL the mean; scaled.

        Args:
            images: [n, H, W, C] in [-1, 1]; H and W divisible by the first stage's factor.

        Returns:
            Latents [n, h, w, c].

        Raises:
            UserError: the model has no encoder, or the images have another shape.
        """
        moments = self._encode(images)
        mean = moments[..., : self.arch.latent_channels]
        return (mean - self.shift) * self.scale_factor

    def encode_moments(self, images):
        """Encode images to a KL first stage's own mean and log variance, which is in [-30, 20].

        Returns:
            (mean, logvar), each [n, h, w, c], not scaled.

        Raises:
            UserError: the model has no KL encoder, or the images have another shape.
        """
        arch, _ = self._first_stage("encoder")
        if arch.kind != "kl":
            raise UserError("A VQ first stage has no moments, only `encode`.")
        mean, logvar = jnp.split(self._encode(images), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def _encode(self, images):
        arch, params = self._first_stage("encoder")
        channels, factor = arch.image_channels, arch.factor
        sizes = images.shape[1:3]
        if images.ndim != 4 or images.shape[3] != channels or any(n % factor for n in sizes):
            raise UserError(
                f"Images must have shape [n, H, W, {channels}] with H and W divisible by {factor}; "
                f"got {list(images.shape)}."
            )
        return first_stage.Encoder(arch, self.dtype).apply({"params": params}, images)

    def _first_stage(self, part):
        """Give the sizes of the first stage, and the parameters of one of its parts."""
        params = getattr(self, part)
        if params is None:
            raise UserError(f"'{self.name}' has no {part}: its file holds none.")
        return self.arch.first_stage, params

    def _unet(self):
        if self.unet is None:
            raise UserError(
                f"'{self.name}' has no UNet, only a first stage: it can decode but not sample."
            )
        return self.arch.unet

    def _check(self, x, context, label, *, latents=False):
        arch, n = self._unet(), x.shape[0]
        channels, factor = arch.in_channels, 2 ** (len(arch.channels) - 1)
        if x.ndim != 4 or x.shape[3] != channels or any(side % factor for side in x.shape[1:3]):
            raise UserError(
                f"x must have shape [n, h, w, {channels}] with h and w divisible by {factor}; "
                f"got {list(x.shape)}."
            )
        if latents and not arch.out_channels == channels == self.arch.latent_channels:
            raise UserError(
                f"This UNet takes {channels} channels and gives {arch.out_channels} for latents of "
                f"{self.arch.latent_channels}: it cannot be sampled from alone."
            )
        found = None if context is None else (context.shape[0], *context.shape[2:])
        if found != ((n, arch.context_dim) if arch.context_dim else None):
            wanted = f"[{n}, tokens, {arch.context_dim}]" if arch.context_dim else "none"
            given = "none" if context is None else list(context.shape)
            raise UserError(f"This UNet takes a context of shape {wanted}; got {given}.")
        found = None if label is None else jnp.shape(label)
        if found != ((n,) if arch.classes else None):
            wanted = f"[{n}] below {arch.classes}" if arch.classes else "none"
            given = "none" if label is None else f"shape {list(jnp.shape(label))}"
            raise UserError(f"This UNet takes labels {wanted}; got {given}.")


def _predict(generator, x, t, context, label):
    module = unet.UNet(generator.arch.unet, generator.dtype)
    return module.apply({"params": generator.unet}, x, t, context, label)


@partial(jax.jit, static_argnames=("steps", "progress"))
def _denoise(generator, x, eta, keys, noise, given, nulls, guidance, *, steps, progress):
    def network(x, t):
        if nulls is None:
            return _predict(generator, x, t, *given)
        # Both halves in one call; context and label are set or None in both alike.
        pair = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), given, nulls)
        twice = jnp.concatenate([x, x]), jnp.concatenate([t, t])
        full, null = jnp.split(_predict(generator, *twice, *pair), 2)
        return null + guidance * (full - null)

    def draw(i):
        if noise is not None:
            return noise[i]
        make = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), x.shape[1:]))
        return make(keys)

    return diffusion.ddim(
        network, x, generator.alphas_cumprod, settings=generator.arch.diffusion, steps=steps,
        eta=eta, draw=None if keys is None and noise is None else draw, progress=progress,
    )  # fmt: skip
