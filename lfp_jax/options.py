"""The command line: flags and config overrides, with every mistake said in one line."""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from lfp_jax.errors import UserError, did_you_mean

OWNERSHIP = ("issue", "generate", "attribute", "doctor")
MODES = ("experiment", "grid", "plan", "report", "train", "convert", *OWNERSHIP)

_MODULE = "config_config"  # the one that a config file is loaded into
_KEYED = ("issue", "generate", "attribute")
# Flags that mean something in some modes only, and in which.
_BELONG = {
    "source": ("convert",), "target": ("convert", "generate"), "user": ("issue", "generate"),
    "count": ("issue",), "export": ("issue",), "n": ("generate", "plan"), "registry": _KEYED,
    "rate": ("issue", "attribute"), "pool": ("attribute",), "format": ("attribute",),
}  # fmt: skip


def parse(argv: list[str]) -> tuple[flags.FlagValues, list[str]]:
    """Read the command line.

    Args:
      argv: the program's name and its arguments.

    Returns:
      Flags `config` (a locked ConfigDict or None), `distributed` and `pool` (true or false),
      `format` ("json" or "table"), and the others of `--help` (None unless given). And the
      arguments without a name: the paths of the mode `attribute`.

    Raises:
      UserError: an unknown flag, field, mode or file, a value of the wrong type, or a flag that
        means nothing in this mode.
    """
    path = _config_path(argv)
    if path is not None:
        _check_file(path)
        _check_fields(path, argv)
    values, unnamed = _read(argv)
    if unnamed and values.mode != "attribute":
        raise UserError(f"Unexpected argument '{unnamed[0]}': options are --flags. See --help.")
    for name, modes in _BELONG.items():
        if values[name].present and values.mode not in modes:
            raise UserError(f"--{name} is for --mode={' and --mode='.join(modes)}.")
    return values, unnamed


def config_file(values: flags.FlagValues) -> str:
    """Give what stands behind --config=, the file and the switches."""
    return config_flags.get_config_filename(values["config"])


def sweep(values: flags.FlagValues) -> Callable[[Callable[..., None]], None]:
    """Give the function sweep(add) of the config file, with the switches of the config.

    Args:
      values: the flags of `parse`.

    Returns:
      A function of `add`; a sweep(add, arg) is given the text that get_config(arg) was.

    Raises:
      UserError: the file has none.
    """
    path, _, arg = config_file(values).partition(":")
    function = getattr(sys.modules[_MODULE], "sweep", None)
    if function is None:
        raise UserError(f"'{path}' has no sweep(add), which --mode=grid needs.")
    takes_arg = len(inspect.signature(function).parameters) > 1
    return partial(function, arg=arg) if takes_arg else function


def _read(argv: list[str]) -> tuple[flags.FlagValues, list[str]]:
    # A set of flags of its own, not the global one, so that this can be called more than once.
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # flags may follow the paths
    # A config file is loaded into this module; names of an earlier one must not live on in it.
    sys.modules.pop(_MODULE, None)
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    flags.DEFINE_enum("mode", None, MODES, "what to do", flag_values=values)
    for name in ("workdir", "source", "target", "coordinator", "user", "registry", "export"):
        flags.DEFINE_string(name, None, "a path, an address or a name", flag_values=values)
    flags.DEFINE_bool("distributed", False, "one of several processes", flag_values=values)
    flags.DEFINE_bool("pool", False, "also judge all files together", flag_values=values)
    flags.DEFINE_enum("format", "json", ("json", "table"), "of answers", flag_values=values)
    flags.DEFINE_float("rate", None, "false-positive rate", flag_values=values)
    for name in ("count", "n"):
        flags.DEFINE_integer(name, None, "how many", lower_bound=1, flag_values=values)
    for name in ("processes", "process"):
        flags.DEFINE_integer(name, None, "a number", lower_bound=0, flag_values=values)
    try:
        unnamed = values(argv)[1:]
    except flags.Error as error:
        # A mistake found inside a config file arrives with its traceback: the last line says it.
        raise UserError(str(error).strip().split("\n")[-1].split("UserError: ")[-1]) from None
    except AttributeError as error:
        if "get_config" not in str(error):
            raise
        raise UserError(
            "--config needs a file with get_config(arg), e.g. configs/stylegan2.py."
        ) from None
    if not values.distributed and {values.coordinator, values.processes, values.process} != {None}:
        raise UserError("--coordinator, --processes and --process need --distributed.")
    return values, unnamed


def _config_path(argv: list[str]) -> str | None:
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = arg.partition("=")
        if name in ("--config", "-config"):
            return value if equals else following
    return None


def _check_file(path: str) -> None:
    if not path:
        raise UserError("--config needs a file, e.g. --config=configs/stylegan2.py.")
    file = Path(path.partition(":")[0])
    if file.is_file() and file.suffix == ".py":
        return
    known = [str(p) for p in file.parent.glob("*.py") if p.stem not in ("__init__", "common")]
    if known:
        raise UserError(did_you_mean(str(file), known, "config file"))
    raise UserError(
        f"No config file '{file}'. Configs are Python files, e.g. configs/stylegan2.py."
    )


def _check_fields(path: str, argv: list[str]) -> None:
    """Name an unknown field and its neighbours; ml_collections would give a traceback."""
    config = _read([argv[0], f"--config={path}"])[0].config
    for arg in argv:
        flag, _, field = arg.partition("=")[0].partition(".")
        if flag not in ("--config", "-config") or not field:
            continue
        node = config
        for name in field.split("."):
            known = list(node.keys()) if hasattr(node, "keys") else []
            if not known:
                raise UserError(f"--config.{field}: there is no '{name}' below a plain value.")
            if name not in known:
                raise UserError(did_you_mean(name, known, "config field"))
            node = node[name]
