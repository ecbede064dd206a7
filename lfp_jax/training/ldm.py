"""Trains a latent-diffusion model on an image folder: a VQ first stage, then a UNet on its latents.

One command does both in turn, and goes on wherever it was stopped: a killed run that resumes equals
the uninterrupted one, and a run on one device equals one on many (see `loop`).
"""

import os
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from lfp_jax import generators, sharding
from lfp_jax import images as image_files
from lfp_jax.errors import UserError, choose
from lfp_jax.generators import diffusion as schedules
from lfp_jax.generators import first_stage as first_networks
from lfp_jax.generators import ldm, unet
from lfp_jax.metrics import features
from lfp_jax.training import diffusion as diffusion_step
from lfp_jax.training import first_stage as first_step
from lfp_jax.training import loop, output
from lfp_jax.training.steps import from_uint8
from lfp_jax.weights import store

NAME = "ldm-demo"  # of the generator, and of the store in the work folder
_CHUNK = 100  # images at once when encoding or measuring; bounds the memory
_COLUMNS = 8  # of a grid
_SHOWN = 64  # images in a grid
_DRAWS = 20  # bootstrap draws of the last distances
_FIRST_LOSSES = {name: name for name in ("l1", "commitment", "perceptual")}
_PREDICTIONS = dict.fromkeys(("noise", "velocity", "image"))

# Everything random in a run comes from one of these folds of the seed.
_FIRST_INIT, _FIRST_STEPS, _INIT, _STEPS, _GRID, _QUALITY = range(6)


def train(
    *,
    data,
    workdir,
    first_stage,
    diffusion,
    resolution=64,
    seed=0,
    log_every=100,
    save_every=1_000,
    grid_every=2_000,
    fd_images=5_000,
    sample_steps=50,
    devices=None,
):
    """Train both stages on an image folder; goes on where an earlier run in `workdir` stopped.

    A stage that is asked for no more images than its latest checkpoint has seen makes no step.

    Args:
        data: what toon_head.mjs wrote (see `training.data.load_split`); not read where both stages
            are done and the latents still lie in the workdir.
        workdir: gets first_stage/ and one diffusion-.../ for each first stage, named after its
            hash, with parameters.txt, checkpoints/, log.jsonl, grids (of the first stage: rows of
            held-out pictures, each above its reconstructions) and curve.png; latents/, those of all
            training pictures; and the averaged networks as the store `ldm-demo` in float16, at
            first without the UNet, so that it can be looked at while that is trained.
        first_stage: settings of the first stage, see `plan_first_stage`.
        diffusion: those of the UNet, see `plan_diffusion`; total_images=0 for none.
        resolution: of the pictures in the folder.
        log_every, save_every, grid_every: in steps; the first divides the second; no grids at 0.
        fd_images: images behind a Fréchet distance; 0 for none at the end either.
        sample_steps: DDIM steps of the samples that are shown and measured, with eta 1.
        devices: default all.

    Returns:
        The generator, as stored.

    Raises:
        UserError: no image folder, pictures of another size, sizes of a network or intervals that
            do not fit, or a batch that does not divide by the devices.
    """
    # --- what is to be done ----------------------------------------------------------------------
    fold = [jax.random.fold_in(jax.random.key(seed), i) for i in range(6)]
    every = {"log_every": log_every, "save_every": save_every, "grid_every": grid_every}
    first_hyper, first_schedule = plan_first_stage(resolution, every, fd_images, **first_stage)
    hyper, schedule = plan_diffusion(
        first_hyper.arch, every, fd_images, sample_steps=sample_steps, **diffusion
    )
    run = partial(loop.run, mesh=sharding.mesh(devices=devices), seed=seed)
    pixels = partial(output.load_pixels, data, resolution=resolution)
    held_out = cache(partial(pixels, "held_out"))

    # --- first stage -----------------------------------------------------------------------------
    stage = _first_stage(fold, first_hyper, pixels, held_out, fd_images)
    folder = os.path.join(workdir, "first_stage")
    output.write_parameters(folder, stage.initial.params)
    state, seen = run(stage, folder=folder, schedule=first_schedule)
    first = _freeze_first_stage(state, first_hyper.arch)
    first, latents, fd = _encode_all(first, pixels, held_out, workdir, fold[_QUALITY], fd_images)
    facts = {"first_stage": {"images": seen, **fd}}
    output.write_curve(folder, facts["first_stage"], losses=_FIRST_LOSSES)
    shipped = _ship(first, workdir, facts)
    if hyper is None:
        return shipped

    # --- UNet ------------------------------------------------------------------------------------
    first = first.replace(arch=hyper.arch)
    stage = _diffusion_stage(fold, hyper, first, latents, fd_images, sample_steps)
    folder = os.path.join(workdir, f"diffusion-{first.sha256[:8]}")
    output.write_parameters(folder, {"unet": stage.initial.params})
    state, seen = run(stage, folder=folder, schedule=schedule)
    generator = _freeze_unet(state, first)
    facts["diffusion"] = {"images": seen}
    if fd_images and output.measurable(generator.image_shape):
        draw = partial(_sample, fold[_QUALITY], generator, steps=sample_steps)
        found = output.frechet(fold[_QUALITY], draw, fd_images, draws=_DRAWS)
        facts["diffusion"]["fd"] = {**found, "steps": sample_steps}
    output.write_curve(folder, facts["diffusion"], losses={"loss": "UNet"})
    return _ship(generator, workdir, facts)


def plan_first_stage(
    resolution, every, fd_images, *, channels, total_images, blocks=1, codes=1024,
    latent_channels=3, groups=8, patch=1, batch=16, learning_rate=1e-3, warmup=200,
    decay_images=0, commitment=0.25, perceptual=0.0, codebook_decay=0.99, ema_images=10_000,
    fd_every=0,
):  # fmt: skip
    """Plan the first stage.

    Args:
        resolution: of the images.
        every: {"log_every", "save_every", "grid_every"}, in steps.
        fd_images: behind a distance.
        channels: at each level, from the images' resolution, over `patch`, on; the next halves it.
            A multiple of `groups` each.
        total_images: stop after so many images.
        blocks: residual blocks a level of the encoder; the decoder has one more.
        codes: in the codebook.
        latent_channels: of a latent.
        groups: of the group norms.
        patch: pixels a side that become channels: fewer places to work at, and much less time.
        batch: images a step.
        learning_rate: of Adam, once `warmup` steps have raised it from 0.
        decay_images: by then it has fallen back to 0 along a cosine; 0 for no fall.
        commitment: weight of the latents' squared distance to their codes.
        perceptual: weight of the squared difference of the demo classifier's features; 64 x 64
            only.
        codebook_decay: of the codes' moving averages, a step.
        ema_images: half-life of the averaged weights.
        fd_every: steps between distances of reconstructions to the held-out pictures; 0 for none
            on the way.

    Returns:
        (first_stage.Hyperparameters, loop.Schedule).

    Raises:
        UserError: sizes or intervals that do not fit.
    """
    label, size = "first stage", (resolution, resolution, 3)
    _check_patch(patch, resolution)
    _check_channels(channels, groups, resolution // patch, label)
    output.check_distance(size, fd_every=fd_every, fd_images=fd_images)
    if perceptual and resolution != features.SIZE:
        raise UserError(
            f"perceptual needs images of {features.SIZE}x{features.SIZE}, which the "
            f"{features.NAME} takes; got {resolution}x{resolution}. Set perceptual=0."
        )
    first = first_networks.Architecture(
        kind="vq", resolution=resolution, channels=tuple(channels), stem=channels[0],
        z_channels=latent_channels, latent_channels=latent_channels, codes=codes, blocks=blocks,
        middle_attention=False, resample_conv=False, groups=groups, patch=patch,
    )  # fmt: skip
    arch = ldm.Architecture(first, None, schedules.Settings(), resolution // first.factor)
    schedule = loop.Schedule(total_images, batch, **every, fd_every=fd_every)
    loop.check(schedule, label=label)
    decay = _decay_steps(decay_images, batch, warmup, label)
    hyper = first_step.Hyperparameters(
        arch, batch, learning_rate, warmup, decay, commitment, perceptual, codebook_decay,
        ema_images,
    )  # fmt: skip
    return hyper, schedule


def plan_diffusion(
    arch, every, fd_images, *, channels, total_images, sample_steps, blocks=1, attention=(),
    head_dim=32, groups=16, prediction="velocity", batch=64, learning_rate=5e-4, warmup=500,
    decay_images=0, clip=1.0, ema_images=100_000, fd_every=0,
):  # fmt: skip
    """Plan the UNet.

    Args:
        arch: ldm.Architecture of the first stage alone.
        every: {"log_every", "save_every", "grid_every"}, in steps.
        fd_images: behind a distance.
        channels: at each level, from the latents' size on; the next halves it. A multiple of
            `groups` each.
        total_images: stop after so many latents; 0 for no UNet.
        sample_steps: DDIM steps of a sample.
        blocks: residual blocks a level on the way down; one more on the way up.
        attention: whether each level attends; the middle does in any case.
        head_dim: channels of a head; divides those of each level that attends.
        groups: of the group norms.
        prediction: "velocity", "noise" or "image".
        batch: latents a step.
        learning_rate: of Adam, once `warmup` steps have raised it from 0.
        decay_images: by then it has fallen back to 0 along a cosine; 0 for no fall.
        clip: the most that the gradient's norm may be.
        ema_images: half-life of the averaged weights.
        fd_every: steps between distances of samples to the held-out pictures; 0 for none on the
            way.

    Returns:
        (diffusion.Hyperparameters, loop.Schedule); (None, None) for no UNet.

    Raises:
        UserError: sizes or intervals that do not fit.
    """
    label, first = "UNet", arch.first_stage
    if total_images == 0:
        return None, None
    choose(prediction, _PREDICTIONS, "prediction")
    _check_channels(channels, groups, arch.size, label)
    attends = [*attention, *[False] * len(channels)][: len(channels)]
    wide = [width for width, on in zip(channels, attends, strict=True) if on] + [channels[-1]]
    if any(width % head_dim for width in wide):
        raise UserError(f"head_dim must divide the channels {wide} that attend; got {head_dim}.")
    output.check_distance(
        (first.resolution, first.resolution, 3), fd_every=fd_every, fd_images=fd_images
    )
    settings = schedules.Settings(prediction=prediction)
    schedules.timesteps(settings, steps=sample_steps)  # raises for an impossible number
    kinds = tuple(
        (width // head_dim, head_dim, 0) if on else None
        for width, on in zip(channels, attends, strict=True)
    )
    between = ("conv",) * (len(channels) - 1)
    net = unet.Architecture(
        size=arch.size, in_channels=first.latent_channels, out_channels=first.latent_channels,
        stem=channels[0], channels=tuple(channels), blocks=(blocks,) * len(channels),
        down_attention=kinds, middle_attention=(channels[-1] // head_dim, head_dim, 0),
        up_attention=kinds, down_resample=between, up_resample=between,
        embed_dim=4 * channels[0], groups=groups, middle_groups=groups,
    )  # fmt: skip
    schedule = loop.Schedule(total_images, batch, **every, fd_every=fd_every)
    loop.check(schedule, label=label)
    decay = _decay_steps(decay_images, batch, warmup, label)
    whole = ldm.Architecture(first, net, settings, arch.size)
    return diffusion_step.Hyperparameters(
        whole, batch, learning_rate, warmup, decay, clip, ema_images
    ), schedule


def _check_patch(patch, resolution):
    if patch < 1 or resolution % patch:
        raise UserError(f"patch must divide the resolution {resolution}; got {patch}.")


def _decay_steps(decay_images, batch, warmup, label):
    steps = decay_images // batch
    if decay_images and steps <= warmup:
        raise UserError(
            f"decay_images of the {label} must leave more than the {warmup} steps of warmup; "
            f"got {decay_images}, {steps} steps."
        )
    return steps


def _check_channels(channels, groups, size, label):
    if not channels or any(width < 1 or width % groups for width in channels):
        raise UserError(
            f"channels of the {label} must be multiples of groups={groups}; got {list(channels)}."
        )
    if size % 2 ** (len(channels) - 1):
        raise UserError(
            f"The {label} halves {size} {len(channels) - 1} times, which leaves a remainder; "
            f"got channels {list(channels)}."
        )


def _first_stage(fold, hyper, pixels, held_out, fd_images):
    """Say what the loop does in the first stage."""
    classifier = features.load_classifier() if hyper.perceptual else None

    def take_step(state, batch, step):
        return first_step.train_step(
            fold[_FIRST_STEPS], state, classifier, batch, step, hyper=hyper
        )

    def distance(state):
        generator = _freeze_first_stage(state, hyper.arch)
        return _reconstruction_distance(fold[_QUALITY], generator, held_out(), fd_images)["value"]

    return loop.Stage(
        name="first stage",
        initial=first_step.init_state(fold[_FIRST_INIT], hyper),
        rows=partial(pixels, "train"),
        take_step=take_step,
        draw=lambda state: _show(_freeze_first_stage(state, hyper.arch), held_out()),
        distance=distance,
    )


def _diffusion_stage(fold, hyper, first, latents, fd_images, sample_steps):
    """Say what the loop does with the UNet."""

    def take_step(state, batch, step):
        alphas = first.alphas_cumprod
        return diffusion_step.train_step(fold[_STEPS], state, alphas, batch, step, hyper=hyper)

    def draw(state):
        generator = _freeze_unet(state, first)
        return np.asarray(_sample(fold[_GRID], generator, 0, steps=sample_steps))[:_SHOWN]

    def distance(state):
        samples = partial(_sample, fold[_QUALITY], _freeze_unet(state, first), steps=sample_steps)
        return output.frechet(fold[_QUALITY], samples, fd_images)["value"]

    return loop.Stage(
        name="diffusion",
        initial=diffusion_step.init_state(fold[_INIT], hyper),
        rows=lambda: latents,
        take_step=take_step,
        draw=draw,
        distance=distance,
    )


def _freeze_first_stage(state, arch):
    """Make a generator of a state's averages, rounded as stored; its latents are not scaled yet.

    It has no hash, which is static: each grid would compile its programs anew.
    """
    params, codebook = jax.device_get((state.average, state.codebook))
    return ldm.LatentDiffusion(
        **output.round_to_float16(params),
        codebook=output.round_to_float16(codebook),
        unet=None,
        alphas_cumprod=jnp.asarray(schedules.alphas_cumprod(), jnp.float32),
        scale_factor=jnp.ones(()),
        shift=jnp.zeros(()),
        arch=arch,
        name=NAME,
    )


def _freeze_unet(state, first):
    """Add a state's averages, rounded as stored; the hash is still the first stage's."""
    return first.replace(unet=output.round_to_float16(jax.device_get(state.average)))


def _encode_all(first, pixels, held_out, workdir, key, fd_images):
    """Encode the training pictures, or read what an earlier run encoded with this first stage.

    Returns:
        The first stage with its hash and the shift and scale that make its latents N(0, 1) over
        all, those latents [n, h, w, c] float16, and {"fd": distance of reconstructions}, if it is
        measured.
    """
    path, digest = os.path.join(workdir, "latents"), output.hash_leaves(first)
    made_by = {"first_stage": digest, "fd_images": fd_images}
    tree, metadata = store.load(path) if store.is_store(path) else (None, {})
    if metadata.get("made_by") != made_by:
        found = {}
        if fd_images and output.measurable(first.image_shape):
            interval = {"draws": _DRAWS}
            fd = _reconstruction_distance(key, first, held_out(), fd_images, **interval)
            found = {"fd": {**fd, "of": "reconstructions of held-out pictures"}}
        raw = features.in_batches(_encode, first, pixels("train"), batch=_CHUNK)
        shift, deviation = raw.mean(dtype=np.float64), raw.std(dtype=np.float64)
        latents = ((raw - np.float32(shift)) / np.float32(deviation)).astype(np.float16)
        tree = {"latents": latents, "shift": np.float32(shift), "scale": np.float32(1 / deviation)}
        metadata = {"made_by": made_by, "measured": found}
        store.save(path, tree, metadata)
    scaling = {"shift": jnp.asarray(tree["shift"]), "scale_factor": jnp.asarray(tree["scale"])}
    first = first.replace(sha256=digest, **scaling)
    return first, tree["latents"], metadata["measured"]


@jax.jit
def _encode(first, images):
    return first.encode(images)


@jax.jit
def _reconstruct(first, u8):
    return first.decode(first.encode(from_uint8(u8)))


@partial(jax.jit, static_argnames="steps")
def _sample(key, generator, start, *, steps):
    return generator.decode(generator.sample(key, _CHUNK, start=start, steps=steps))


def _show(first, u8):
    """Lay out rows of pictures, each above its reconstructions."""
    u8 = u8[: _SHOWN // 2]
    made = np.asarray(_reconstruct(first, u8))
    pairs = list(zip(image_files.from_uint8(u8), made, strict=True))
    rows = [pairs[i : i + _COLUMNS] for i in range(0, len(pairs), _COLUMNS)]
    return np.stack([image for row in rows for side in zip(*row, strict=True) for image in side])


def _reconstruction_distance(key, first, u8, fd_images, *, draws=0):
    def draw(start):
        return _reconstruct(first, u8[start : start + _CHUNK])

    return output.frechet(key, draw, min(fd_images, len(u8)), draws=draws)


def _ship(generator, workdir, facts):
    """Write a generator as a store, and say so."""
    generator = generator.replace(sha256=output.hash_leaves(generator))
    path = os.path.join(workdir, NAME)
    generators.save(
        path, generator, source_format="lfp_jax", licence=output.LICENCE, dtype=np.float16,
        training=facts,
    )  # fmt: skip
    for stage, fact in facts.items():
        said = f", FD {fact['fd']['value']:.4g} ({features.NAME})" if "fd" in fact else ""
        print(f"{stage}: {fact['images']} images{said}")
    print(f"Generator: {path}/")
    return generator
