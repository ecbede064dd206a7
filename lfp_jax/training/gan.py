"""Trains a StyleGAN2 on an image folder: the loop, its log, and what it leaves behind.

Data-parallel over the mesh by shardings alone: the batch is split, parameters are replicated, XLA
inserts the reductions. A killed run that resumes equals the uninterrupted one, and a run on one
device equals one on many (see `gan_step`).
"""

import dataclasses
import math
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lfp_jax import generators, sharding
from lfp_jax import images as image_files
from lfp_jax.errors import UserError
from lfp_jax.generators import stylegan2
from lfp_jax.logs import MetricLog, Progress
from lfp_jax.metrics import features
from lfp_jax.training import data as faces
from lfp_jax.training import gan_step, output
from lfp_jax.training.window import Window, check_intervals
from lfp_jax.weights import store

NAME = "stylegan2-demo"  # of the generator, and of the store in the work folder
_CHUNK = 100  # generated images at once when measuring; bounds the memory
_SHOWN = 64  # generated images in a grid
_DROP = 0.25  # of the learning rate
_DRAWS = 20  # bootstrap draws of the last distance

# Everything random in a run comes from one of these folds of the seed.
_INIT, _STEPS, _NOISE, _GRID, _QUALITY, _GROWTH = range(6)


def train(
    *,
    data,
    workdir,
    total_images,
    channels,
    discriminator_channels=None,
    resolution=64,
    growth=(),
    w_dim=512,
    mapping_layers=8,
    batch=16,
    learning_rate=0.002,
    learning_rate_drop=None,
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
    fd_every=0,
    fd_images=5_000,
    devices=None,
):
    """Train a StyleGAN2 on an image folder; goes on where an earlier run in `workdir` stopped.

    With `total_images` at or below what the latest checkpoint has seen, no step is made, the log is
    left alone and the pictures are not needed: the checkpoint is only measured and written as a
    store. That works beside a run which is still training.

    Args:
        data: what toon_head.mjs wrote (see `training.data.load_split`).
        workdir: gets parameters.txt, checkpoints/, log.jsonl (losses are means since the line
            before), sample grids and, at the end, the averaged generator as the store
            `stylegan2-demo` in float16 and curve.png.
        total_images: stop after so many real images.
        resolution: of the images, and of the pictures in the folder.
        growth: pairs (resolution, images): the lower resolutions trained first, each for so many
            images and with `r1_gamma` in proportion to the pixels (as arXiv 2006.06676 scales it),
            as the coarse layers of the whole network; `gan_step.grow` adds the finer ones.
        learning_rate_drop: after so many images the rate is a quarter; None: never.
        channels: feature maps at 4, 8, ..., resolution; `discriminator_channels` likewise.
        ema_images: half-life of the averaged weights.
        log_every, save_every, grid_every: in steps; the first divides the second.
        fd_every: steps between Fréchet distances to the held-out pictures; 0 for none on the way.
        fd_images: images behind a distance; 0 for none at the end either.
        devices: default all.

    Returns:
        The averaged generator, as stored.

    Raises:
        UserError: no image folder, pictures or a distance of another size than the network's, a
            batch that does not divide by the devices, or intervals that do not fit.
    """
    # --- networks, state, checkpoints ------------------------------------------------------------
    arch = stylegan2.Architecture(
        resolution=resolution, channels=tuple(channels), z_dim=w_dim, w_dim=w_dim,
        mapping_layers=mapping_layers, mapping_width=w_dim,
    )  # fmt: skip
    d_arch = stylegan2.DiscriminatorArchitecture(
        resolution=resolution, channels=tuple(discriminator_channels or channels)
    )
    hyper = gan_step.Hyperparameters(
        arch, d_arch, batch, learning_rate, r1_gamma, r1_every, path_weight, path_every, mixing,
        flip, ema_images,
    )  # fmt: skip
    _check(arch, growth, total_images, log_every, save_every, fd_every, fd_images)
    mesh = sharding.mesh(devices=devices)
    fold = [jax.random.fold_in(jax.random.key(seed), i) for i in range(6)]
    manager = store.checkpoints(os.path.join(workdir, "checkpoints"))
    start = manager.latest_step() or 0
    steps = math.ceil(total_images / batch)
    stages = _stages(growth, resolution, batch)
    stage = next(i for i, (_, end) in enumerate(stages) if start <= end)
    size, end = stages[stage]
    hyper_now = _at_resolution(hyper, size)
    state = sharding.replicate(mesh, gan_step.init_state(fold[_INIT], hyper_now))
    if start:
        state = store.restore_step(manager, start, like=state)
    networks = {"generator": state.generator, "discriminator": state.discriminator}
    output.write_parameters(workdir, networks)
    log = MetricLog(os.path.join(workdir, "log.jsonl"))
    averaged = partial(gan_step.averaged_generator, fold[_NOISE], name=NAME)

    # --- steps -----------------------------------------------------------------------------------
    if start < steps:
        log.truncate(start)
        pixels = output.load_pixels(data, "train", resolution=resolution)
        shown = image_files.shrink(pixels, size)
    done, window = start, Window(start, batch=batch, digits=5)
    with Progress(max(steps, start) * batch, label="train", start=start * batch) as progress:
        for step in range(start, steps):
            if step == end:
                stage += 1
                size, end = stages[stage]
                hyper_now = _at_resolution(hyper, size)
                grown = gan_step.grow(jax.random.fold_in(fold[_GROWTH], stage), state, hyper_now)
                state, shown = sharding.replicate(mesh, grown), image_files.shrink(pixels, size)
            if learning_rate_drop is not None and step * batch >= learning_rate_drop:
                hyper_now = hyper_now.replace(learning_rate=learning_rate * _DROP)
            u8 = shown[faces.batch_indices(seed, len(shown), batch=batch, step=step)]
            state, metrics = gan_step.train_step(
                fold[_STEPS], state, sharding.shard(mesh, u8), jnp.asarray(step, jnp.int32),
                hyper_now, penalise=step % r1_every == 0,
                path=bool(path_weight) and step % path_every == 0,
            )  # fmt: skip
            window.add(metrics)
            done = step + 1
            last = done == steps
            if done % log_every == 0 or last:
                record, rate = window.close(done)
                log.write(done, images=done * batch, **record, images_per_second=rate)
                progress.update(done * batch, d=record["d_loss"], g=record["g_loss"])
            if done % grid_every == 0 and not last:
                generator = averaged(state, hyper_now.arch)
                _write_grid(fold[_GRID], generator, workdir, done * batch)
            if fd_every and done % fd_every == 0 and not last and size == resolution:
                fd = _frechet(fold[_QUALITY], averaged(state, arch), fd_images)["value"]
                log.write(done, images=done * batch, fd=round(fd, 4))
            if done % save_every == 0 or last:
                store.save_step(manager, done, state)
    manager.close()

    # --- what ships ------------------------------------------------------------------------------
    generator = _as_stored(averaged(state, hyper_now.arch))
    _write_grid(fold[_GRID], generator, workdir, done * batch)
    training = {"images": done * batch}
    if fd_images and output.measurable(generator.image_shape):
        training["fd"] = _frechet(fold[_QUALITY], generator, fd_images, draws=_DRAWS)
        if start < steps:
            log.write(done, images=done * batch, fd=round(training["fd"]["value"], 4))
    generator = generator.replace(sha256=output.hash_leaves(generator))
    generators.save(
        os.path.join(workdir, NAME), generator, source_format="lfp_jax", licence=output.LICENCE,
        dtype=np.float16, training=training,
    )  # fmt: skip
    output.write_curve(workdir, training)
    distance = f", FD {training['fd']['value']:.4g} ({features.NAME})" if "fd" in training else ""
    print(f"Generator after {done * batch} images{distance}: {os.path.join(workdir, NAME)}/")
    return generator


def _stages(growth, resolution, batch):
    """Return (resolution, step it ends at) of each stage; the last one has no end."""
    ends = np.cumsum([math.ceil(images / batch) for _, images in growth]).tolist()
    sizes = [size for size, _ in growth]
    return list(zip([*sizes, resolution], [*ends, math.inf], strict=True))


def _at_resolution(hyper, size):
    """Cut the networks off above a resolution."""

    def cut(arch):
        channels = arch.channels[: int(math.log2(size)) - 1]
        return dataclasses.replace(arch, resolution=size, channels=channels)

    share = (size / hyper.arch.resolution) ** 2
    return hyper.replace(
        arch=cut(hyper.arch), d_arch=cut(hyper.d_arch), r1_gamma=hyper.r1_gamma * share
    )


def _check(arch, growth, total_images, log_every, save_every, fd_every, fd_images):
    if total_images < 1:
        raise UserError(f"total_images must be >= 1; got {total_images}.")
    check_intervals(log_every=log_every, save_every=save_every)
    sizes = [size for size, _ in growth] + [arch.resolution]
    powers = [4 * 2**i for i in range(len(arch.channels))]
    if sizes != sorted(set(sizes)) or not set(sizes) <= set(powers):
        raise UserError(f"growth must name rising resolutions of {powers[:-1]}; got {sizes[:-1]}.")
    if any(images < 1 for _, images in growth):
        raise UserError(f"growth must give each resolution 1 image or more; got {growth}.")
    size = (arch.resolution, arch.resolution, arch.image_channels)
    output.check_distance(size, fd_every=fd_every, fd_images=fd_images)


@jax.jit
def _sample(key, generator, start):
    return generator.decode(generator.sample(key, _CHUNK, start=start))


def _write_grid(key, generator, workdir, images):
    made = np.asarray(_sample(key, generator, 0))[:_SHOWN]
    output.write_grid(workdir, made, images=images)


def _frechet(key, generator, n, *, draws=0):
    return output.frechet(key, partial(_sample, key, generator), n, draws=draws)


def _as_stored(generator):
    """Round the weights to the float16 that the store keeps."""
    networks = (generator.mapping, generator.synthesis)
    mapping, synthesis = output.round_to_float16(networks)
    return generator.replace(mapping=mapping, synthesis=synthesis)
