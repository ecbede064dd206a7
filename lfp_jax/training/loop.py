"""The loop of a training stage: batches, log, grids, distances and checkpoints of its folder.

Data-parallel over the mesh by shardings alone: the batch is split, parameters are replicated, XLA
inserts the reductions. A killed run that resumes equals the uninterrupted one.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from lfp_jax import sharding
from lfp_jax.errors import UserError
from lfp_jax.logs import MetricLog, Progress
from lfp_jax.training import data, output
from lfp_jax.training.window import Window, check_intervals
from lfp_jax.weights import store


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one stage of a training does; `state` is anything that its steps change."""

    name: str
    initial: Any  # the first state
    rows: Callable[[], np.ndarray]  # the examples [n, ...]; asked for only if steps are to be made
    take_step: Callable  # (state, batch on the mesh, step [] int32) -> state, metrics
    draw: Callable  # state -> images [n, H, W, 3] in [-1, 1] for a grid
    distance: Callable  # state -> the distance of what it makes to the held-out pictures


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long a stage goes on, and how often it does what; intervals are in steps, 0 is never."""

    total_images: int
    batch: int
    log_every: int
    save_every: int
    grid_every: int
    fd_every: int

    @property
    def steps(self):
        """Steps in all."""
        return math.ceil(self.total_images / self.batch)


def check(schedule, *, label):
    """Check a schedule.

    Raises:
        UserError: nothing to do, or intervals that do not fit.
    """
    for name in ("total_images", "batch", "log_every", "save_every"):
        value = getattr(schedule, name)
        if value < 1:
            raise UserError(f"{name} of the {label} must be >= 1; got {value}.")
    check_intervals(log_every=schedule.log_every, save_every=schedule.save_every)


def run(stage, *, folder, mesh, seed, schedule):
    """Train a stage from where an earlier run in its folder stopped.

    With no more images asked for than the latest checkpoint has seen, no step is made and the log
    is left alone.

    Args:
        stage: Stage.
        folder: gets checkpoints/, log.jsonl (losses are means since the line before) and grids.
        mesh: to train on.
        seed: of the order of the examples.
        schedule: Schedule.

    Returns:
        The last state, and how many images it has seen.
    """
    batch, steps = schedule.batch, schedule.steps
    manager = store.checkpoints(os.path.join(folder, "checkpoints"))
    start = manager.latest_step() or 0
    state = sharding.replicate(mesh, stage.initial)
    if start:
        state = store.restore_step(manager, start, like=state)
    log = MetricLog(os.path.join(folder, "log.jsonl"))
    if start < steps:
        rows = stage.rows()
        log.truncate(start)
    done, window = start, Window(start, batch=batch, digits=6)
    total = max(steps, start) * batch
    with Progress(total, label=stage.name, start=start * batch) as progress:
        for step in range(start, steps):
            index = data.batch_indices(seed, len(rows), batch=batch, step=step)
            shown = sharding.shard(mesh, rows[index])
            state, metrics = stage.take_step(state, shown, jnp.asarray(step, jnp.int32))
            window.add(metrics)
            done = step + 1
            last = done == steps
            if done % schedule.log_every == 0 or last:
                record, rate = window.close(done)
                log.write(done, images=done * batch, **record, images_per_second=rate)
                progress.update(done * batch, **record)
            if schedule.grid_every and (done % schedule.grid_every == 0 or last):
                output.write_grid(folder, stage.draw(state), images=done * batch)
                window.restart_clock(done)
            if schedule.fd_every and done % schedule.fd_every == 0 and not last:
                found = round(stage.distance(state), 4)
                log.write(done, images=done * batch, fd=found)
                window.restart_clock(done)
            if done % schedule.save_every == 0 or last:
                store.save_step(manager, done, state)
    manager.close()
    return state, done * batch
