"""Put a key into a latent, and read it back from one.

Latents are [n, *latent_shape] and stand for flat vectors w of d values; with mean m, carrier V
[d, k] and nuisance U of a `basis.Space`, an image's latent is w = m + U alpha + strength V c(bits)
(arXiv 2304.09752). Duals V* and U* read the parts of a latent; of orthonormal directions they are V
and U. All in float32 at HIGHEST precision; no d x d matrix is ever built.
"""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.typing import ArrayLike

from lfp_jax.basis import Space
from lfp_jax.errors import UserError, choose
from lfp_jax.generators.stylegan2 import StyleGAN2

# What is taken from a bit: the two codes keep keys equally far apart, but `antipodal` spends half
# the energy, leaves the mean of many fingerprinted latents where it was, and gives an unmarked
# latent no key (under `binary` it reads as all zeros).
CODES = {"binary": 0.0, "antipodal": 0.5}

_LEAST_STDDEV = 1e-8  # a direction without spread stays finite
_einsum = partial(jnp.einsum, precision="highest")
_jit = partial(jax.jit, static_argnames=("code",))


def code(bits: ArrayLike, *, form: str) -> jax.Array:
    """Turn bits into steps along the carrier.

    Args:
        bits: 0..1, any shape; soft bits too.
        form: "binary" (the bits themselves, the paper's) or "antipodal" (bits - 1/2).

    Returns:
        float32 of the same shape.

    Raises:
        UserError: another form.
    """
    return jnp.asarray(bits, jnp.float32) - choose(form, CODES, "code")


@_jit
def inject(
    space: Space, latents: jax.Array, bits: jax.Array, *, strength: float, code: str = "antipodal"
) -> jax.Array:
    """Replace the carrier part of latents by a key: w - V V*^T (w - m) + strength V c.

    Args:
        space: carrier, nuisance and mean.
        latents: [n, *latent_shape].
        bits: keys [n, k], or one key [k] for all.
        strength: step along each carrying direction; a number, not a fraction of its spread.
        code: "binary" or "antipodal".

    Returns:
        Latents of the same shape, float32. Their nuisance part is as before.

    Raises:
        ValueError: shapes that do not fit the space.
    """
    rows = _flat(space, latents)
    steps = strength * _codeword(bits, form=code)
    shape = (rows.shape[0], space.carrier.shape[1])
    if steps.shape not in (shape, shape[1:]):
        raise ValueError(
            f"bits must be [{shape[0]}, {shape[1]}] or [{shape[1]}]; got {list(steps.shape)}."
        )
    marked = jax.vmap(partial(_inject_one, space))(rows, jnp.broadcast_to(steps, shape))
    return marked.reshape(latents.shape)


def fold(
    space: Space, generator: Any, bits: jax.Array, *, strength: float, code: str = "antipodal"
) -> Any:
    """Build a key into a StyleGAN2: it decodes any w as the other decodes what `inject` makes of w.

    Every layer takes its style from w by an affine map A w + b. Injection is affine too, w' = P w +
    t with P = I - V V*^T, so A' = A P and b' = A t + b. In float64; the file has no trace of V but
    that all A' are blind to it.

    Args:
        space: carrier, nuisance and mean.
        generator: a frozen StyleGAN2.
        bits: key [k].
        strength: step along each carrying direction.
        code: "binary" or "antipodal".

    Returns:
        A generator of the same sizes.

    Raises:
        UserError: another kind of generator.
    """
    if not isinstance(generator, StyleGAN2):
        raise UserError(f"Only a StyleGAN2 folds a key into weights; '{generator.name}' is none.")
    double = partial(np.asarray, dtype=np.float64)
    carrier, mean = double(space.carrier), double(space.mean)
    duals = carrier if space.carrier_dual is None else double(space.carrier_dual)
    step = strength * (double(bits) - choose(code, CODES, "code"))
    moved = carrier @ (duals.T @ mean + step)  # t

    def turn(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        return {
            name: turn_affine(each) if name == "affine" else turn(each)
            for name, each in tree.items()
        }

    def turn_affine(affine: dict[str, jax.Array]) -> dict[str, jax.Array]:
        kernel = double(affine["kernel"])  # [d, channels], of equalised learning rate
        bias = double(affine["bias"]) + moved @ kernel / len(kernel) ** 0.5
        kernel = kernel - duals @ (carrier.T @ kernel)
        return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}

    return generator.replace(synthesis=turn(generator.synthesis))


def program(
    space: Space, generator: Any, bits: jax.Array, *, strength: float, code: str = "antipodal"
) -> bytes:
    """Build a key into a latent-diffusion model: a compiled program from noise to images.

    Its sampler runs DDIM with eta 0, injects the key, and decodes. Weights, directions and key are
    constants in it.

    Args:
        space, bits, strength, code: as of `fold`.
        generator: a frozen latent-diffusion model that samples without context or label.

    Returns:
        An artifact of `jax.export` for CPU, CUDA and TPU: called with noise [n, *latent_shape],
        N(0, I), it gives images [n, H, W, C], nominally in [-1, 1], not clipped.

    Raises:
        UserError: a model that lacks a part, or samples on conditions.
    """

    def make(noise: jax.Array) -> jax.Array:
        latents = generator.denoise(noise, steps=generator.sample_steps)
        return generator.decode(inject(space, latents, bits, strength=strength, code=code))

    (n,) = export.symbolic_shape("n")
    noise = jax.ShapeDtypeStruct((n, *generator.latent_shape), jnp.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A large amount of constants")  # they are what it is for
        exported = export.export(jax.jit(make), platforms=("cpu", "cuda", "tpu"))(noise)
    return bytes(exported.serialize())


@jax.jit
def carrier_part(space: Space, latents: jax.Array) -> jax.Array:
    """Measure latents along the carrying directions: V*^T (w - m), [n, k].

    Args:
        space: carrier, nuisance and mean.
        latents: [n, *latent_shape].

    Raises:
        ValueError: latents of another size than the space's.
    """
    return jax.vmap(partial(_carrier_part_one, space))(_flat(space, latents))


def whitened_nuisance(space: Space, latents: jax.Array, *, count: int | None = None) -> jax.Array:
    """Measure latents along the nuisance directions: U*^T (w - m) / s, N(0, 1) under the prior.

    Args:
        space: carrier, nuisance and mean.
        latents: [n, *latent_shape].
        count: leading directions to measure; None for all.

    Returns:
        float32 [n, count].

    Raises:
        ValueError: latents of another size than the space's.
    """
    offset = _flat(space, latents) - space.mean[None]
    duals = space.nuisance if space.nuisance_dual is None else space.nuisance_dual
    alpha = _einsum("nd,dm->nm", offset, duals[:, :count])
    return alpha / jnp.maximum(space.nuisance_stddev[None, :count], _LEAST_STDDEV)


def steps(space: Space, *, strength: float, count: int | None = None) -> jax.Array:
    """Give latent steps [d, count + k]: a standard deviation of each nuisance, half a bit's swing.

    Args:
        space: carrier, nuisance and mean.
        strength: as injected.
        count: leading nuisance directions; None for all.
    """
    loud = (space.nuisance * space.nuisance_stddev[None])[:, :count]
    return jnp.concatenate([loud, 0.5 * strength * space.carrier], axis=1)


@_jit
def read(
    space: Space, latents: jax.Array, *, strength: float, code: str = "antipodal"
) -> jax.Array:
    """Read the nearest key from latents; exact on what `inject` returned.

    Args:
        space: carrier, nuisance and mean.
        latents: [n, *latent_shape].
        strength: as injected, and not 0.
        code: as injected.

    Returns:
        uint8 bits [n, k].
    """
    soft_bits = carrier_part(space, latents) / strength + choose(code, CODES, "code")
    return (soft_bits > 0.5).astype(jnp.uint8)


@_jit
def compose(
    space: Space, alpha: jax.Array, bits: jax.Array, *, strength: float, code: str = "antipodal"
) -> jax.Array:
    """Build flat latents from their two parts: w = m + U alpha + strength V c.

    Args:
        space: carrier, nuisance and mean.
        alpha: nuisance coordinates [..., m - k].
        bits: [..., k], soft or hard, with the same leading axes.
        strength: step along each carrying direction.
        code: "binary" or "antipodal".

    Returns:
        float32 [..., d].
    """
    steps = strength * _codeword(bits, form=code)
    offset = _einsum("dm,...m->...d", space.nuisance, alpha)
    offset = offset + _einsum("dk,...k->...d", space.carrier, steps)
    return offset + jnp.broadcast_to(space.mean, offset.shape)


_codeword = code  # below, `code` is an argument's name


def _carrier_part_one(space: Space, w: jax.Array) -> jax.Array:
    duals = space.carrier if space.carrier_dual is None else space.carrier_dual
    return _einsum("dk,d->k", duals, w - space.mean)


def _inject_one(space: Space, w: jax.Array, steps: jax.Array) -> jax.Array:
    """w [d], steps [k]: move w along the carrier to where its part equals the steps."""
    return w + _einsum("dk,k->d", space.carrier, steps - _carrier_part_one(space, w))


def _flat(space: Space, latents: jax.Array) -> jax.Array:
    """Flatten latents [n, *latent_shape] to float32 [n, d], checking d."""
    rows = jnp.asarray(latents, jnp.float32)
    rows = rows.reshape(rows.shape[0], -1)
    d = space.mean.shape[0]
    if rows.shape[1] != d:
        raise ValueError(
            f"Latents must have {d} values each; got {rows.shape[1]} ({list(latents.shape)})."
        )
    return rows
