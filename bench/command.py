"""What the benches' command lines share."""

import importlib
import sys
from pathlib import Path

from lfp_jax import attacks
from lfp_jax.errors import UserError, did_you_mean

_CONFIGS = Path(__file__).parent.parent / "configs"


def run(main):
    """Run a bench; what its user can mend is one line and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def load_config(text):
    """Load a config of configs/ by its name, and its switches after a colon."""
    name, _, switches = text.partition(":")
    known = sorted(path.stem for path in _CONFIGS.glob("[!_]*.py") if path.stem != "common")
    if name not in known:
        raise UserError(did_you_mean(name, known, "config"))
    return importlib.import_module(f"configs.{name}").get_config(switches)


def attack_names(asked):
    """Give the names of attacks; a suite's name stands for all of its attacks."""
    for each in asked:
        if each == "none" or ":" in each:
            yield each
        else:
            yield from (f"{each}:{attack.name}" for attack in attacks.suite(each))
