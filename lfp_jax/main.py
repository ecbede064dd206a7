"""Latent fingerprints for image generators: whose copy made this image, or nobody's?

Usage:
  python -m lfp_jax.main --config=FILE[:SWITCHES] [--workdir=DIR] [--config.FIELD=VALUE ...]
  python -m lfp_jax.main --mode=MODE --config=FILE[:SWITCHES] [flags of the mode] [PATH ...]

Modes, by default train for a config that has a task and experiment for any other:
  experiment  one design point, from the generator to metrics.json and a table
                --config=configs/stylegan2.py --config.strength=2 --config.bits=32
  grid        every design point of the config's sweep(add), a JSON file each in WORKDIR/cells, and
              a report; goes on where an earlier run stopped; any number of processes may share the
              work folder
                --mode=grid --config=configs/stylegan2_grid.py:small
  report      one page, report.html, and a CSV of what experiments or a grid left in a workdir
                --mode=report --workdir=runs/stylegan2
  plan        what an experiment would find, from a few linearised pictures
                --mode=plan --config=configs/stylegan2.py --config.attack=paper:noise
  train       a network, as the config says; goes on where an earlier run stopped
                --config=configs/train_estimator.py
  convert     a foreign checkpoint (rosinality .pt, NVlabs .pkl) to the native store
                --mode=convert --source=ffhq.pkl --target=ffhq
  issue       gives a user a key; a million with --count, as NAME-1 and so on; with --export also a
              generator that makes only this user's images: a native store and rosinality .pt, of
              latent diffusion a jax.export program from noise to images
                --mode=issue --config=configs/stylegan2.py --user=alice
  generate    PNG files with a user's key in them
                --mode=generate --config=configs/stylegan2.py --user=alice --n=4
  attribute   whose key image files carry, or "unknown", a line each: files, folders, patterns
                --mode=attribute --config=configs/stylegan2.py --format=table pictures/
  doctor      makes an image, attributes it, and tells how each step went on this machine
                --mode=doctor --config=configs/stylegan2.py

Flags:
  --config    a file of configs/; SWITCHES is what its get_config(arg) takes, e.g. "tiny"
  --workdir   where the results and the basis go (default: runs/NAME-OF-THE-CONFIG)
  --registry  issue, generate, attribute: the file of users and keys
              (default: WORKDIR/registry.sqlite)
  --user      issue, generate: whose key
  --count     issue: how many users, NAME-1, NAME-2, ...
  --export    issue: the folder of the user's generator
  --n         generate: how many images; plan: how many to look at (default: 4)
  --rate      issue, attribute: the chance that anybody is named for an image of nobody's key
              (default: 1e-6)
  --pool      attribute: at last a line on all files together, as pictures of one unknown user
  --format    attribute: json, a JSON line a file (default); or table
  --source    convert: the file to read
  --target    convert: the folder to write; generate: that of the images
              (default: WORKDIR/users/NAME)
  --distributed  experiment, grid, attribute, and train of the task estimator: one of several
              processes on a disk that they share, which the cluster (TPU pod, Slurm) tells apart,
              or --coordinator=HOST:PORT --processes=N --process=I

Exit status: 0 done; 1 something could not be processed; 2 wrong usage, said in one line.
"""

import errno
import importlib
import logging
import sys
from pathlib import Path
from typing import Any

import absl.logging
from absl.flags import FlagValues

from lfp_jax import logs, options
from lfp_jax.errors import UserError, choose

_TRAINERS = {
    "stylegan2": "gan",
    "ldm": "ldm",
    "classifier": "classifier",
    "estimator": "estimator",
    "directions": "directions",
}
_SHARED = ("experiment", "grid", "attribute", "estimator")  # modes, and a task of training
_OWNERSHIP_FLAGS = ("user", "count", "n", "registry", "rate", "pool", "export", "target")


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
        return _dispatch(*options.parse(argv))
    except UserError as error:
        print(f"lfp_jax: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the answers, as `head` does, wants no more
        logs.discard(sys.stdout)
        return 1
    except OSError as error:
        remedy = "Free some space." if error.errno == errno.ENOSPC else "Check it and its rights."
        where = f"'{error.filename}': " if error.filename else ""
        if not where:  # it was the output itself, and what is left of it cannot be written either
            logs.discard(sys.stdout)
        print(f"lfp_jax: error: {where}{error.strerror}. {remedy}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nlfp_jax: interrupted", file=sys.stderr)
        return 130


def _dispatch(flags: FlagValues, paths: list[str]) -> int:
    # Each mode imports what it needs: `--help` and a mistyped flag answer at once.
    config, mode = flags.config, flags.mode
    if mode == "convert":
        if not (flags.source and flags.target):
            raise UserError("--mode=convert needs --source=FILE and --target=DIR.")
        generators = importlib.import_module("lfp_jax.generators")
        print(generators.describe(generators.convert(flags.source, flags.target)))
        print(f"Weights: {flags.target}/")
        return 0
    if mode == "report":
        return _report(_workdir(flags))
    if config is None:
        raise UserError("--config=FILE is missing, e.g. --config=configs/stylegan2.py. See --help.")
    task = config.get("task")
    expected = "train" if task else "experiment"
    if mode not in (None, expected) and (task or mode not in ("grid", "plan", *options.OWNERSHIP)):
        raise UserError(f"--mode={mode} does not fit this config; it is for --mode={expected}.")
    workdir = _workdir(flags)
    if flags.distributed:
        if (task or mode or expected) not in _SHARED:  # each process would do the whole of another
            raise UserError(f"--distributed is for {', '.join(_SHARED)} only.")
        where = {name: flags[name].value for name in ("coordinator", "processes", "process")}
        importlib.import_module("lfp_jax.sharding").join(**where)
    if task:
        return _train(workdir, **config.to_dict())
    if mode in options.OWNERSHIP:
        given = {name: flags[name].value for name in _OWNERSHIP_FLAGS}
        given |= {"paths": paths, "form": flags.format}
        return importlib.import_module("lfp_jax.desk").run(mode, config, workdir, **given)
    if mode == "grid":  # its folder may be a bucket's, which Path would spoil
        place = str(flags.workdir or workdir)
        status = importlib.import_module("lfp_jax.grid").run(config, place, options.sweep(flags))
        if "://" in place or not importlib.import_module("lfp_jax.sharding").is_first():
            return status
        return max(_report(workdir), status)
    if mode == "plan":
        planner = importlib.import_module("lfp_jax.planner")
        planner.run(config, workdir, pictures=flags.n or planner.PICTURES)
        return 0
    return importlib.import_module("lfp_jax.experiment").run(config, workdir) or 0


def _workdir(flags: FlagValues) -> Path:
    if flags.workdir:
        return Path(flags.workdir)
    if flags.config is None:
        raise UserError("--mode=report needs --workdir=DIR, or --config=FILE with a default one.")
    name = options.config_file(flags).partition(":")[0]
    return Path("runs") / Path(name).stem


def _report(workdir: Path) -> int:
    page, problems = importlib.import_module("lfp_jax.report.html").write(workdir)
    for problem in problems:
        print(f"lfp_jax: {problem}", file=sys.stderr)
    print(f"Report: {page}, numbers: {page.with_suffix('.csv')}")
    return 1 if problems else 0


def _train(workdir: Path, *, task: str, **settings: Any) -> int:
    module = choose(task, _TRAINERS, "task")
    importlib.import_module(f"lfp_jax.training.{module}").train(workdir=workdir, **settings)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
