"""A grid whose cells take no time, in place of `experiment.Bench`; also as a process of its own.

python tests/grid_stand_in.py WORKDIR LOG SECONDS
"""

import os
import sys
import time
from types import SimpleNamespace

import numpy as np

from configs import stylegan2_grid
from lfp_jax import experiment, grid


class StandIn:
    """Measures nothing, and notes each cell in a file."""

    log, seconds = None, 0.0
    trouble = staticmethod(lambda config: None)  # called for each cell

    def generator(self, config):
        """Give no generator, but what is asked of one."""
        return SimpleNamespace(name="none", sha256="0" * 64)

    def prepare(self, config, workdir):
        """Do nothing."""

    def measure(self, config, workdir):
        """Give made-up figures."""
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {config.strength} {config.attack}\n")
        time.sleep(self.seconds)
        self.trouble(config)
        rate = {"value": 0.5, "low": 0.25, "high": 0.75, "images": 4}
        rows = {"plain": np.zeros((2, 8, 8, 3)), "fingerprinted": np.ones((2, 8, 8, 3))}
        return experiment.Result({"bit_accuracy": rate}, [], None, rows)


def sweep(add):
    """Add ten cells."""
    for strength in (1.0, 2.0):
        for attack in ("none", "paper"):
            add(strength=strength, attack=attack)


def run(workdir, *, sweep=sweep):
    """Run the grid."""
    return grid.run(stylegan2_grid.get_config("tiny"), workdir, sweep)


if __name__ == "__main__":
    workdir, StandIn.log, seconds = sys.argv[1:]
    StandIn.seconds, experiment.Bench = float(seconds), StandIn
    sys.exit(run(workdir))
