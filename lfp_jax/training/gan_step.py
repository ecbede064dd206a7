"""One training step of a StyleGAN2: losses, lazy regularisation, moving averages.

Everything random in a step comes from fold_in(key, step) and, per example, from the index in the
global batch, so a result depends neither on the number of devices nor on when a run was resumed.
Real images come as uint8; generated ones are float32, nominally in [-1, 1].

Sources: StyleGAN2 (arXiv 1912.04958) for losses, lazy regularisation and path length; R1 is
Mescheder et al. (arXiv 1801.04406).
"""

from functools import partial
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp
import optax

from lfp_jax.generators import stylegan2
from lfp_jax.training.steps import average, average_decay, from_uint8, per_example

_PATH_DECAY = 0.01


class State(flax.struct.PyTreeNode):
    """All that a step changes."""

    generator: dict  # {"mapping", "synthesis"}
    discriminator: dict
    average: dict  # exponential moving average of `generator`
    w_avg: jax.Array  # [w_dim], moving average of mapped latents
    generator_optimizer: tuple
    discriminator_optimizer: tuple
    path_length: jax.Array  # [], moving average of the path length


@flax.struct.dataclass
class Hyperparameters:
    """Static choices of a run (see `gan.train`)."""

    arch: stylegan2.Architecture
    d_arch: stylegan2.DiscriminatorArchitecture
    batch: int
    learning_rate: float
    r1_gamma: float
    r1_every: int
    path_weight: float
    path_every: int
    mixing: float
    flip: bool
    ema_images: float


def _optimizers(hyper):
    # Lazy regularisation: fewer, larger regulariser steps; section 3.1 of the paper.
    def adam(every):
        ratio = every / (every + 1)
        return optax.adam(hyper.learning_rate * ratio, b1=0.0, b2=0.99**ratio, eps=1e-8)

    return adam(hyper.path_every if hyper.path_weight else 1e9), adam(hyper.r1_every)


def init_state(key, hyper):
    """Draw the initial training state."""
    generator_key, discriminator_key = jax.random.split(key)
    made = stylegan2.random_generator(generator_key, hyper.arch)
    params = {"mapping": made.mapping, "synthesis": made.synthesis}
    discriminator = stylegan2.random_discriminator(discriminator_key, hyper.d_arch).params
    generator_adam, discriminator_adam = _optimizers(hyper)
    return State(
        generator=params,
        discriminator=discriminator,
        average=jax.tree.map(jnp.copy, params),
        w_avg=jnp.zeros((hyper.arch.w_dim,)),
        generator_optimizer=generator_adam.init(params),
        discriminator_optimizer=discriminator_adam.init(discriminator),
        path_length=jnp.zeros(()),
    )


def grow(key, state, hyper):
    """Start at a higher resolution from the state that a lower one ended in.

    Layers of the same name and shape are kept; the others are drawn anew, but for the new ToRGB,
    whose kernels are zero: the first images are the lower resolution's, upsampled. The optimisers
    start afresh. Source: progressive growing, arXiv 1710.10196, without the fading.

    Args:
        key: random key, for the new layers.
        state: the last state at the lower resolution.
        hyper: the choices of the run at the higher one.

    Returns:
        The first state at the higher resolution.
    """
    learnt = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}

    def merge(path, fresh):
        name = jax.tree_util.keystr(path)
        kept = learnt.get(name)
        if "optimizer" not in name and kept is not None and kept.shape == fresh.shape:
            return kept
        return jnp.zeros_like(fresh) if name.endswith("['torgb']['kernel']") else fresh

    return jax.tree.map_with_path(merge, init_state(key, hyper))


def mixed_latents(key, params, hyper, n):
    """Map fresh z to latents with style mixing (arXiv 1812.04948, section 3.1).

    Args:
        key: random key.
        params: the generator's parameters, {"mapping", ...}.
        hyper: the choices of the run; `hyper.mixing` is the share of mixed latents.
        n: how many.

    Returns:
        W+ latents [n, num_ws, w_dim]: those of one w up to a random layer, of a second from there
        on; and the first w, [n, w_dim].
    """
    arch = hyper.arch
    z_key, other_key, cut_key, mix_key = jax.random.split(key, 4)
    mapping = stylegan2.mapping_module(arch)

    def draw_w(key):
        z = per_example(key, n, lambda k: jax.random.normal(k, (arch.z_dim,)))
        return mapping.apply({"params": params["mapping"]}, z)

    w = draw_w(z_key)
    ws = jnp.broadcast_to(w[:, None], (n, arch.num_ws, arch.w_dim))
    if hyper.mixing == 0.0:
        return ws, w
    cut = per_example(cut_key, n, lambda k: jax.random.randint(k, (), 1, arch.num_ws))
    mixed = per_example(mix_key, n, lambda k: jax.random.uniform(k) < hyper.mixing)
    cut = jnp.where(mixed, cut, arch.num_ws)
    keep = jnp.arange(arch.num_ws)[None, :] < cut[:, None]
    return jnp.where(keep[:, :, None], ws, draw_w(other_key)[:, None]), w


def _noise(key, hyper, n):
    shapes = stylegan2.noise_shapes(hyper.arch)
    keys = jax.random.split(key, len(shapes))
    return [
        per_example(k, n, lambda k, s=s: jax.random.normal(k, s[1:]))
        for k, s in zip(keys, shapes, strict=True)
    ]


def _generate(params, ws, noise, hyper):
    module = stylegan2.Synthesis(hyper.arch, trainable=True)
    return module.apply({"params": params["synthesis"]}, ws, noise)


def _logits(params, images, hyper):
    module = stylegan2.ResnetDiscriminator(hyper.d_arch)
    return cast(jax.Array, module.apply({"params": params}, images))[:, 0]


def discriminator_loss(params, real, fake, hyper, *, penalise):
    """Compute the non-saturating loss, with the lazy R1 penalty of real images if `penalise`.

    Args:
        params: the discriminator's parameters.
        real: [n, H, W, C].
        fake: [n, H, W, C].
        hyper: the choices of the run.
        penalise: add gamma / 2 E |dD/dx|^2, times the number of steps it stands for.

    Returns:
        The loss [] and what to log: "d_loss" (without the penalty), "d_real", "d_fake", "r1".
    """
    fake_logits = _logits(params, fake, hyper)
    real_logits = _logits(params, real, hyper)
    loss = jnp.mean(jax.nn.softplus(fake_logits)) + jnp.mean(jax.nn.softplus(-real_logits))
    aux = {"d_loss": loss, "d_real": jnp.mean(real_logits), "d_fake": jnp.mean(fake_logits)}
    if penalise:
        slopes = jax.grad(lambda x: jnp.sum(_logits(params, x, hyper)))(real)
        penalty = jnp.mean(jnp.sum(jnp.square(slopes), axis=(1, 2, 3)))
        loss = loss + 0.5 * hyper.r1_gamma * hyper.r1_every * penalty
        aux["r1"] = penalty
    return loss, aux


def path_penalty(key, params, path_length, hyper):
    """Compute the path-length penalty (section 3.2): |J^T y| should be constant over latents.

    Args:
        key: random key.
        params: the generator's parameters.
        path_length: [], moving average of the lengths.
        hyper: the choices of the run.

    Returns:
        The penalty [], and the next moving average [].
    """
    n = max(hyper.batch // 2, 1)
    latent_key, noise_key, image_key = jax.random.split(key, 3)
    ws, _ = mixed_latents(latent_key, params, hyper, n)
    noise = _noise(noise_key, hyper, n)
    size = hyper.arch.resolution
    shape = (size, size, hyper.arch.image_channels)
    y = per_example(image_key, n, lambda k: jax.random.normal(k, shape)) / size
    slopes = jax.grad(lambda ws: jnp.sum(_generate(params, ws, noise, hyper) * y))(ws)
    lengths = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(slopes), axis=2), axis=1))
    target = path_length + _PATH_DECAY * (jnp.mean(lengths) - path_length)
    penalty = jnp.mean(jnp.square(lengths - jax.lax.stop_gradient(target)))
    return penalty, jax.lax.stop_gradient(target)


@partial(jax.jit, static_argnames=("hyper", "penalise", "path"), donate_argnames=("state",))
def train_step(key, state, u8, step, hyper, *, penalise, path):
    """Make one discriminator and one generator update.

    Args:
        key: of the run; folded with `step` here.
        state: consumed: its buffers are used again.
        u8: real images [batch, H, W, C] uint8.
        step: [] int32, from 0 on.
        hyper: the choices of the run.
        penalise: this step has the R1 penalty.
        path: this step has the path-length penalty.

    Returns:
        The next state, and the metrics to log, each [].
    """
    key = jax.random.fold_in(key, step)
    d_key, d_noise, g_key, g_noise, flip_key, path_key = jax.random.split(key, 6)
    n = hyper.batch
    real = from_uint8(u8)
    if hyper.flip:
        flips = per_example(flip_key, n, lambda k: jax.random.bernoulli(k))
        real = jnp.where(flips[:, None, None, None], real[:, :, ::-1], real)

    generator_adam, discriminator_adam = _optimizers(hyper)
    ws, w = mixed_latents(d_key, state.generator, hyper, n)
    fake = _generate(state.generator, ws, _noise(d_noise, hyper, n), hyper)
    grad_d = jax.grad(discriminator_loss, has_aux=True)
    grads, metrics = grad_d(state.discriminator, real, fake, hyper, penalise=penalise)
    updates, d_optimizer = discriminator_adam.update(grads, state.discriminator_optimizer)
    discriminator = optax.apply_updates(state.discriminator, updates)

    def generator_loss(params):
        ws, _ = mixed_latents(g_key, params, hyper, n)
        images = _generate(params, ws, _noise(g_noise, hyper, n), hyper)
        loss = jnp.mean(jax.nn.softplus(-_logits(discriminator, images, hyper)))
        length, aux = state.path_length, {"g_loss": loss}
        if path:
            penalty, length = path_penalty(path_key, params, state.path_length, hyper)
            loss = loss + hyper.path_weight * hyper.path_every * penalty
            aux["path"] = penalty
        return loss, (aux, length)

    grads, (aux, length) = jax.grad(generator_loss, has_aux=True)(state.generator)
    updates, g_optimizer = generator_adam.update(grads, state.generator_optimizer)
    generator = optax.apply_updates(state.generator, updates)

    decay = average_decay(step, batch=n, ema_images=hyper.ema_images)
    averaged = average(state.average, generator, decay)
    w_avg = state.w_avg + 0.005 * (jnp.mean(w, axis=0) - state.w_avg)
    new = State(
        generator=generator,
        discriminator=discriminator,
        average=averaged,
        w_avg=w_avg,
        generator_optimizer=g_optimizer,
        discriminator_optimizer=d_optimizer,
        path_length=length,
    )
    return new, metrics | aux


def averaged_generator(key, state, arch, *, name):
    """Freeze the moving average of a state into a generator with constant noise from `key`."""
    params, w_avg = jax.tree.map(jnp.asarray, jax.device_get((state.average, state.w_avg)))
    noise = tuple(stylegan2.draw_noise(key, arch, 1))
    return stylegan2.StyleGAN2(params["mapping"], params["synthesis"], w_avg, noise, arch, name)
