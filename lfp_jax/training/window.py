"""What a trainer says every so many steps: means of its metrics since the line before, its rate."""

import time

import jax
import numpy as np

from lfp_jax.errors import UserError


def check_intervals(*, log_every, save_every):
    """Check the steps between lines of the log and between checkpoints.

    Raises:
        UserError: the first does not divide the second: a resumed run would average its first line
            over fewer steps than the uninterrupted one.
    """
    if save_every % log_every:
        raise UserError(
            f"save_every must be a multiple of log_every; got {save_every} and {log_every}."
        )


class Window:
    """The steps since the last line of the log."""

    def __init__(self, step, *, batch, digits):
        """Begin.

        Args:
            step: how many steps are done.
            batch: examples a step.
            digits: decimals that means keep.
        """
        self._batch, self._digits = batch, digits
        self._metrics = []
        self.restart_clock(step)

    def restart_clock(self, step):
        """Leave the time until now out of the rate."""
        self._begin, self._step = time.monotonic(), step

    def add(self, metrics):
        """Take the metrics of a step, {name: []}; they stay on the device."""
        self._metrics.append(metrics)

    def close(self, step):
        """End the window after a step and begin the next.

        Returns:
            The mean of each metric over the steps that have it, and examples a second.
        """
        metrics = jax.device_get(self._metrics)
        columns = {
            name: [each[name] for each in metrics if name in each]
            for name in sorted({name for each in metrics for name in each})
        }
        means = {
            name: round(float(np.mean(values, dtype=np.float64)), self._digits)
            for name, values in columns.items()
        }
        rate = (step - self._step) * self._batch / (time.monotonic() - self._begin)
        self._metrics = []
        self.restart_clock(step)
        return means, round(rate, 1)
