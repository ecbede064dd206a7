"""Latent fingerprints for image generators: whose copy made this image, or nobody's?

Usage:
  python -m lfp_jax.main --config=FILE[:SWITCHES] [--workdir=DIR] [--config.FIELD=VALUE ...]
  python -m lfp_jax.main --mode=convert --source=FILE --target=DIR

Flags:
  --config   a file of configs/; SWITCHES is what its get_config(arg) takes, e.g. "tiny"
  --mode     experiment: one design point, from the generator to metrics.json and a table
             train: a network, as the config says; goes on where an earlier run stopped
             convert: a foreign checkpoint (rosinality .pt, NVlabs .pkl) to the native store
             (default: train for a config that has a task, experiment for any other)
  --workdir  where the results go (default: runs/NAME-OF-THE-CONFIG)
  --source   convert: the file to read
  --target   convert: the folder to write
  --distributed  train: one of several processes, which the cluster (TPU pod, Slurm) tells apart,
             or --coordinator=HOST:PORT --processes=N --process=I

Examples:
  python -m lfp_jax.main --config=configs/stylegan2.py
  python -m lfp_jax.main --config=configs/stylegan2.py --config.strength=2 --config.bits=32
  python -m lfp_jax.main --mode=convert --source=ffhq.pkl --target=ffhq

Exit status: 0 done; 1 something could not be processed; 2 wrong usage, said in one line.
"""

import importlib
import logging
import sys
from pathlib import Path

import absl.logging

from lfp_jax import options
from lfp_jax.errors import UserError, choose

_TRAINERS = {
    "stylegan2": "gan",
    "ldm": "ldm",
    "classifier": "classifier",
    "estimator": "estimator",
}


def main(argv: list[str]) -> int:
    """Do what the command line says.

    Args:
      argv: the program's name and its arguments.

    Returns:
      The exit status: 0 done, 1 partly done, 2 a user's mistake, 130 interrupted.
    """
    if {"--help", "-help", "-h"} & set(argv[1:]):
        print(__doc__)
        return 0
    # The libraries' notes on devices and checkpoints would bury the run's own lines.
    absl.logging.set_verbosity(absl.logging.ERROR)
    logging.getLogger("jax").setLevel(logging.ERROR)
    try:
        return _dispatch(options.parse(argv))
    except UserError as error:
        print(f"lfp_jax: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nlfp_jax: interrupted", file=sys.stderr)
        return 130


def _dispatch(flags) -> int:
    # Each mode imports what it needs: `--help` and a mistyped flag answer at once.
    config, mode = flags.config, flags.mode
    if mode == "convert":
        if not (flags.source and flags.target):
            raise UserError("--mode=convert needs --source=FILE and --target=DIR.")
        generators = importlib.import_module("lfp_jax.generators")
        print(generators.describe(generators.convert(flags.source, flags.target)))
        print(f"Weights: {flags.target}/")
        return 0
    if config is None:
        raise UserError("--config=FILE is missing, e.g. --config=configs/stylegan2.py. See --help.")
    task = config.get("task")
    expected = "train" if task else "experiment"
    if mode not in (None, expected):
        raise UserError(f"--mode={mode} does not fit this config; it is for --mode={expected}.")
    name = flags["config"].config_filename.partition(":")[0]
    workdir = Path(flags.workdir or Path("runs") / Path(name).stem)
    if flags.distributed:
        if task != "estimator":  # any other would do the whole job in each process
            raise UserError("--distributed is for the task 'estimator' only.")
        where = {name: flags[name].value for name in ("coordinator", "processes", "process")}
        importlib.import_module("lfp_jax.sharding").join(**where)
    if task:
        return _train(workdir, **config.to_dict())
    return importlib.import_module("lfp_jax.experiment").run(config, workdir) or 0


def _train(workdir: Path, *, task: str, **settings) -> int:
    module = choose(task, _TRAINERS, "task")
    importlib.import_module(f"lfp_jax.training.{module}").train(workdir=workdir, **settings)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
