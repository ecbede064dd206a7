"""Trains the network of the estimator `learned`: the loop, its log, and what it leaves behind.

Data-parallel over the mesh by shardings alone, on one device or on several processes of several:
each makes its own share of the pairs from their global indices (see `attribution.training`). A
killed run that resumes equals the uninterrupted one, whatever the number of devices.
"""

import os
from functools import partial

import jax
import numpy as np

from lfp_jax import basis, generators, seeds, sharding
from lfp_jax.attribution import estimator as estimators
from lfp_jax.attribution import training
from lfp_jax.attribution.inversion import Silent
from lfp_jax.errors import UserError, choose
from lfp_jax.fingerprint import CODES
from lfp_jax.logs import MetricLog, Progress, read_lines
from lfp_jax.report import plots
from lfp_jax.training.window import Window, check_intervals
from lfp_jax.weights import store


def train(
    *,
    workdir,
    generator,
    total_pairs,
    directions="sensitivity",
    basis_samples=50_000,
    metric_samples=4_096,
    sample_steps=None,
    bits=64,
    shift=64,
    strength=4.0,
    code="antipodal",
    nuisance=64,
    attacks="paper",
    network=None,
    begin=None,
    batch=64,
    learning_rate=1e-3,
    warmup=200,
    bit_weight=1.0,
    clip=1.0,
    ema_pairs=50_000,
    seed=0,
    log_every=50,
    save_every=1_000,
    evaluate_every=1_000,
    evaluate_pairs=1_024,
    devices=None,
):
    """Train an estimator on pairs drawn from a generator; goes on where an earlier run stopped.

    With `total_pairs` at or below what the latest checkpoint has seen, no step is made and the log
    is left alone: the checkpoint is only measured and written as a store. Several processes need a
    disk that they share, for all write into a checkpoint.

    Args:
        workdir: gets checkpoints/, log.jsonl (losses are means since the line before) and, at the
            end, the averaged network as the store `estimator` in float16, and curve.png.
        generator: a frozen generator, or what `generators.load` takes.
        total_pairs: stop after so many pairs; the learning rate falls to zero over them.
        directions, basis_samples, metric_samples, seed: of the basis; an experiment with the same
            four has the same one.
        sample_steps: DDIM steps behind a latent of a latent-diffusion model; None: its own number.
        bits, shift, strength, code: the design point.
        nuisance: leading nuisance directions to estimate; None for all.
        attacks: a name in `training.CHAINS`.
        network: options of `estimator.Architecture`; None for its defaults.
        begin: store of an estimator of the same generator and design point whose weights are where
            training starts, e.g. one trained without attacks; None to draw them.
        batch: pairs a step; must divide by the number of devices.
        learning_rate: of Adam, at its highest: reached in `warmup` steps, zero at the end.
        bit_weight: of the bits' mean loss against that of the nuisance.
        clip: the most that the gradient's norm may be.
        ema_pairs: half-life of the averaged weights.
        log_every, save_every, evaluate_every: in steps; the first divides the second.
        evaluate_pairs: fresh pairs, of each attack, behind a measured bit accuracy.
        devices: default all devices of all processes.

    Returns:
        The averaged estimator, as stored.

    Raises:
        UserError: a setting out of bounds, a batch that does not divide by the devices, or an
            estimator to begin with that was made for another design point or network.
    """
    # --- generator, basis, network ---------------------------------------------------------------
    mesh = sharding.mesh(devices=devices)
    chain = choose(attacks, training.CHAINS, "suite of training attacks")
    choose(code, CODES, "code")
    _check(mesh, total_pairs, batch, strength, log_every, save_every, evaluate_pairs)
    fold = partial(seeds.key, seed)
    source = generators.load(generator) if isinstance(generator, str) else generator
    if sample_steps is not None:
        source = source.replace(sample_steps=sample_steps)
    fitted, metric = basis.measure_generator(
        fold(seeds.BASIS), source, samples=basis_samples, metric_samples=metric_samples,
        directions=directions,
    )  # fmt: skip
    space = basis.split(fitted, bits=bits, shift=shift)
    arch = estimators.Architecture(**network or {})
    estimator = estimators.initial(
        fold(seeds.NETWORK), source, space, metric=metric, arch=arch, strength=strength, code=code,
        nuisance=nuisance,
    )  # fmt: skip
    if begin is not None:
        estimator = _begin(begin, estimator, source, space)
    steps = -(-total_pairs // batch)
    hyper = training.Hyperparameters(
        batch, steps, learning_rate, warmup, bit_weight, clip, ema_pairs, chain
    )

    # --- state, checkpoints ----------------------------------------------------------------------
    manager = store.checkpoints(os.path.join(workdir, "checkpoints"))
    start = manager.latest_step() or 0
    state = sharding.replicate(mesh, training.initial_state(estimator, hyper))
    if start:
        state = store.restore_step(manager, start, like=state)
    source, space, kind = sharding.replicate(mesh, (source, space, estimator.replace(params=None)))
    first = sharding.is_first()  # of several processes one writes and speaks
    log = MetricLog(os.path.join(workdir, "log.jsonl")) if first else None
    take_step = training.make_step(mesh=mesh, hyper=hyper)
    evaluate = training.make_evaluation(mesh=mesh, batch=batch, chain=chain)
    starts = np.arange(0, evaluate_pairs, batch, dtype=np.int32)

    def measure(params):
        of_batch = partial(evaluate, fold(seeds.FRESH), kind.replace(params=params), source, space)
        return _bit_accuracies(of_batch, starts, training.attack_names(chain))

    # --- steps -----------------------------------------------------------------------------------
    if start < steps and log is not None:
        log.truncate(start)
    done, window = start, Window(start, batch=batch, digits=6)
    line = Progress(max(steps, start) * batch, unit="pairs", label="train", start=start * batch)
    with line if first else Silent() as progress:
        for step in range(start, steps):
            state, metrics = take_step(
                fold(seeds.PAIRS), state, kind, source, space, np.int32(step)
            )
            window.add(metrics)
            done = step + 1
            last = done == steps
            if done % log_every == 0 or last:
                record, rate = window.close(done)
                if log is not None:
                    log.write(done, pairs=done * batch, **record, pairs_per_second=rate)
                progress.update(done * batch, loss=record["loss"], bits=record["bit_accuracy"])
            if done % evaluate_every == 0 and not last:
                found = measure(state.average)
                if log is not None:
                    log.write(done, pairs=done * batch, fresh=found)
                window.restart_clock(done)
            if done % save_every == 0 or last:
                store.save_step(manager, done, state)
    manager.close()

    # --- what ships ------------------------------------------------------------------------------
    params = jax.tree.map(lambda x: np.float32(np.float16(x)), jax.device_get(state.average))
    found = measure(sharding.replicate(mesh, params))
    estimator = estimator.replace(params=params)
    if log is not None:
        if start < steps:
            log.write(done, pairs=done * batch, fresh=found)
        _write(workdir, estimator, found, pairs=done * batch, attacks=attacks, seed=seed)
    sharding.wait_for_all("estimator")
    return estimator


def _begin(path, estimator, generator, space):
    """Read the weights to start from; they must be of the same network."""
    design = estimator.design
    read = estimators.load(path, generator, space, strength=design.strength, code=design.code)
    if (read.arch, read.design) != (estimator.arch, design):
        theirs = f"{read.arch}, nuisance {read.design.nuisance}"
        raise UserError(f"'{path}' holds a network of other sizes: {theirs}.")
    return estimator.replace(params=read.params)


def _check(mesh, total_pairs, batch, strength, log_every, save_every, evaluate_pairs):
    counts = {"total_pairs": total_pairs, "batch": batch, "evaluate_pairs": evaluate_pairs}
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name} must be >= 1; got {count}.")
    if batch % mesh.size:
        raise UserError(f"batch must divide by the devices; got {batch} over {mesh.size}.")
    if not strength > 0:
        raise UserError(f"strength must be > 0; got {strength}.")
    check_intervals(log_every=log_every, save_every=save_every)


def _bit_accuracies(of_batch, starts, attacks):
    """Measure the bit accuracy on batches of fresh pairs under each attack, by its name."""
    found = {}
    for choice, name in enumerate(attacks):
        rates = [of_batch(start, np.int32(choice))["bit_accuracy"] for start in starts]
        found[name] = round(float(np.mean(rates, dtype=np.float64)), 5)
    return found


def _write(workdir, estimator, found, **training_facts):
    path = os.path.join(workdir, "estimator")
    estimators.save(path, estimator, training={**training_facts, "bit_accuracy": found})
    plots.estimator_curve(
        os.path.join(workdir, "curve.png"), read_lines(os.path.join(workdir, "log.jsonl"))
    )
    rates = ", ".join(f"{name} {rate:.4f}" for name, rate in found.items())
    print(f"Estimator after {training_facts['pairs']} pairs, bit accuracy {rates}: {path}/")
