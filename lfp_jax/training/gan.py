"""Trains a StyleGAN2: non-saturating loss, lazy R1, style mixing, EMA; one jitted step.

Data-parallel over the mesh by shardings alone: the batch is split, parameters are replicated, XLA
inserts the reductions. Everything random in a step comes from fold_in(key, step) and, per example,
the global index, so a result does not depend on the number of devices, and a killed run that
resumes equals the uninterrupted one.

Sources: StyleGAN2 (arXiv 1912.04958) for losses, lazy regularisation and path length.
"""

import math
import os
import time
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lfp_jax import images as image_files
from lfp_jax import sharding
from lfp_jax.generators import stylegan2
from lfp_jax.logs import MetricLog, Progress
from lfp_jax.training import data as faces
from lfp_jax.weights import store

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
    """Static choices of a run (see `train`)."""

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


def _per_example(key, n, draw):
    """Draw for examples 0..n-1 of the global batch, each from its own key."""
    return jax.vmap(lambda i: draw(jax.random.fold_in(key, i)))(jnp.arange(n))


def _latents(key, params, hyper, n):
    """Map fresh z to W+ latents [n, num_ws, w_dim] with style mixing; also their plain w."""
    arch = hyper.arch
    z_key, other_key, cut_key, mix_key = jax.random.split(key, 4)
    mapping = stylegan2.mapping_module(arch)

    def draw_w(key):
        z = _per_example(key, n, lambda k: jax.random.normal(k, (arch.z_dim,)))
        return mapping.apply({"params": params["mapping"]}, z)

    w = draw_w(z_key)
    ws = jnp.broadcast_to(w[:, None], (n, arch.num_ws, arch.w_dim))
    if hyper.mixing == 0.0:
        return ws, w
    cut = _per_example(cut_key, n, lambda k: jax.random.randint(k, (), 1, arch.num_ws))
    mixed = _per_example(mix_key, n, lambda k: jax.random.uniform(k) < hyper.mixing)
    cut = jnp.where(mixed, cut, arch.num_ws)
    keep = jnp.arange(arch.num_ws)[None, :] < cut[:, None]
    return jnp.where(keep[:, :, None], ws, draw_w(other_key)[:, None]), w


def _noise(key, hyper, n):
    shapes = stylegan2.noise_shapes(hyper.arch)
    keys = jax.random.split(key, len(shapes))
    return [
        _per_example(k, n, lambda k, s=s: jax.random.normal(k, s[1:]))
        for k, s in zip(keys, shapes, strict=True)
    ]


def _generate(params, ws, noise, hyper):
    module = stylegan2.Synthesis(hyper.arch, trainable=True)
    return module.apply({"params": params["synthesis"]}, ws, noise)


def _logits(params, images, hyper):
    module = stylegan2.ResnetDiscriminator(hyper.d_arch)
    return module.apply({"params": params}, images)[:, 0]


def _discriminator_loss(params, real, fake, hyper, penalise):
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


def _path_penalty(key, params, path_length, hyper):
    """Path-length penalty (section 3.2): |J^T y| should be constant over latents."""
    n = max(hyper.batch // 2, 1)
    latent_key, noise_key, image_key = jax.random.split(key, 3)
    ws, _ = _latents(latent_key, params, hyper, n)
    noise = _noise(noise_key, hyper, n)
    size = hyper.arch.resolution
    shape = (size, size, hyper.arch.image_channels)
    y = _per_example(image_key, n, lambda k: jax.random.normal(k, shape)) / size
    slopes = jax.grad(lambda ws: jnp.sum(_generate(params, ws, noise, hyper) * y))(ws)
    lengths = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(slopes), axis=2), axis=1))
    target = path_length + _PATH_DECAY * (jnp.mean(lengths) - path_length)
    penalty = jnp.mean(jnp.square(lengths - jax.lax.stop_gradient(target)))
    return penalty, jax.lax.stop_gradient(target)


@partial(jax.jit, static_argnames=("hyper", "penalise", "path"), donate_argnames=("state",))
def _train_step(key, state, u8, step, hyper, *, penalise, path):
    """One discriminator and one generator update; `u8` is [batch, H, W, C] uint8."""
    key = jax.random.fold_in(key, step)
    d_key, d_noise, g_key, g_noise, flip_key, path_key = jax.random.split(key, 6)
    n = hyper.batch
    real = u8.astype(jnp.float32) / 127.5 - 1.0
    if hyper.flip:
        flips = _per_example(flip_key, n, lambda k: jax.random.bernoulli(k))
        real = jnp.where(flips[:, None, None, None], real[:, :, ::-1], real)

    generator_adam, discriminator_adam = _optimizers(hyper)
    ws, w = _latents(d_key, state.generator, hyper, n)
    fake = _generate(state.generator, ws, _noise(d_noise, hyper, n), hyper)
    grad_d = jax.grad(_discriminator_loss, has_aux=True)
    grads, metrics = grad_d(state.discriminator, real, fake, hyper, penalise)
    updates, d_optimizer = discriminator_adam.update(grads, state.discriminator_optimizer)
    discriminator = optax.apply_updates(state.discriminator, updates)

    def generator_loss(params):
        ws, _ = _latents(g_key, params, hyper, n)
        images = _generate(params, ws, _noise(g_noise, hyper, n), hyper)
        loss = jnp.mean(jax.nn.softplus(-_logits(discriminator, images, hyper)))
        length, aux = state.path_length, {"g_loss": loss}
        if path:
            penalty, length = _path_penalty(path_key, params, state.path_length, hyper)
            loss = loss + hyper.path_weight * hyper.path_every * penalty
            aux["path"] = penalty
        return loss, (aux, length)

    grads, (aux, length) = jax.grad(generator_loss, has_aux=True)(state.generator)
    updates, g_optimizer = generator_adam.update(grads, state.generator_optimizer)
    generator = optax.apply_updates(state.generator, updates)

    # The average warms up: it never looks back further than a fifth of what was seen.
    horizon = jnp.minimum(hyper.ema_images, jnp.maximum(step * n * 0.05, 1.0))
    decay = 0.5 ** (n / horizon)
    average = jax.tree.map(lambda a, p: p + decay * (a - p), state.average, generator)
    w_avg = state.w_avg + 0.005 * (jnp.mean(w, axis=0) - state.w_avg)
    new = State(
        generator=generator,
        discriminator=discriminator,
        average=average,
        w_avg=w_avg,
        generator_optimizer=g_optimizer,
        discriminator_optimizer=d_optimizer,
        path_length=length,
    )
    return new, metrics | aux


def averaged_generator(key, state, arch, *, name="stylegan2"):
    """Freeze the moving average of a state into a generator with constant noise from `key`."""
    noise = tuple(stylegan2.draw_noise(key, arch, 1))
    params = state.average
    return stylegan2.StyleGAN2(
        params["mapping"], params["synthesis"], state.w_avg, noise, arch, name
    )


def train(
    *,
    data,
    workdir,
    total_images,
    channels,
    discriminator_channels=None,
    resolution=64,
    w_dim=512,
    mapping_layers=8,
    batch=16,
    learning_rate=0.002,
    r1_gamma=0.5,
    r1_every=16,
    path_weight=0.0,
    path_every=4,
    mixing=0.9,
    flip=True,
    ema_images=10_000,
    seed=0,
    log_every=100,
    save_every=2_000,
    grid_every=2_000,
):
    """Train a StyleGAN2 on an image folder; goes on where an earlier run in `workdir` stopped.

    Args:
        data: what toon_head.mjs wrote (see `training.data.load_split`).
        workdir: gets checkpoints/, log.jsonl and sample grids.
        total_images: stop after so many real images.
        channels: feature maps at 4, 8, ..., resolution; `discriminator_channels` likewise.
        save_every, grid_every, log_every: in steps.

    Returns:
        The averaged generator.

    Raises:
        UserError: no image folder, or a batch that does not divide by the devices.
    """
    arch = stylegan2.Architecture(
        resolution=resolution, channels=tuple(channels), z_dim=w_dim, w_dim=w_dim,
        mapping_layers=mapping_layers, mapping_width=w_dim,
    )  # fmt: skip
    d_arch = stylegan2.DiscriminatorArchitecture(
        resolution=resolution, channels=tuple(discriminator_channels or channels)
    )
    hyper = Hyperparameters(
        arch, d_arch, batch, learning_rate, r1_gamma, r1_every, path_weight, path_every, mixing,
        flip, ema_images,
    )  # fmt: skip
    mesh = sharding.mesh()
    pixels, _ = faces.load_split(data, "train")
    key = jax.random.key(seed)

    manager = store.checkpoints(os.path.join(workdir, "checkpoints"))
    state = sharding.replicate(mesh, init_state(jax.random.fold_in(key, 0), hyper))
    start = manager.latest_step() or 0
    if start:
        state = store.restore_step(manager, start, like=state)
    log = MetricLog(os.path.join(workdir, "log.jsonl"))
    log.truncate(start)

    steps = math.ceil(total_images / batch)
    step_key = jax.random.fold_in(key, 1)
    clock, clock_step, metrics = time.monotonic(), start, {}
    with Progress(steps * batch, label="train", start=start * batch) as progress:
        for step in range(start, steps):
            u8 = pixels[faces.batch_indices(seed, len(pixels), batch=batch, step=step)]
            state, values = _train_step(
                step_key, state, sharding.shard(mesh, u8), jnp.asarray(step, jnp.int32), hyper,
                penalise=step % r1_every == 0, path=bool(path_weight) and step % path_every == 0,
            )  # fmt: skip
            metrics |= values
            done = step + 1
            last = done == steps
            if done % log_every == 0 or last:
                rate = (done - clock_step) * batch / (time.monotonic() - clock)
                clock, clock_step = time.monotonic(), done
                record = {name: round(float(value), 5) for name, value in metrics.items()}
                log.write(done, images=done * batch, **record, images_per_second=round(rate, 1))
                progress.update(done * batch, d=record["d_loss"], g=record["g_loss"])
            if done % grid_every == 0 or last:
                generator = averaged_generator(jax.random.fold_in(key, 2), state, arch)
                path = os.path.join(workdir, f"samples-{done * batch:08d}.png")
                image_files.write_png(path, _samples(jax.random.fold_in(key, 3), generator))
            if done % save_every == 0 or last:
                store.save_step(manager, done, state)
    manager.close()
    return averaged_generator(jax.random.fold_in(key, 2), state, arch, name="stylegan2-demo")


def _samples(key, generator, n=64, columns=8):
    decode = jax.jit(lambda generator, w: generator.decode(w))
    sample = jax.jit(lambda generator, key: generator.sample(key, n))
    return image_files.grid(np.asarray(decode(generator, sample(generator, key))), columns=columns)
