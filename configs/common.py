"""What the configs share: reading the text after the colon in `--config=configs/name.py:text`."""

from types import SimpleNamespace
from typing import Any

from lfp_jax.errors import UserError, did_you_mean

_BOOLS = {"true": True, "1": True, "false": False, "0": False}


def parse_arg(arg: str, **defaults: Any) -> SimpleNamespace:
    """Read switches such as "tiny,strength=2".

    Args:
      arg: comma-separated `name` (for True) or `name=value`; may be empty.
      **defaults: every known switch with its default, whose type the value must have.

    Returns:
      The defaults with the given values in their place, as attributes.

    Raises:
      UserError: an unknown name, or a value of the wrong type.
    """
    values = dict(defaults)
    for part in filter(None, (part.strip() for part in (arg or "").split(","))):
        name, _, text = part.partition("=")
        if name not in defaults:
            if not defaults:
                raise UserError(f"This config has no switches; got '{name}'.")
            raise UserError(did_you_mean(name, defaults, "config switch"))
        kind = type(defaults[name])
        try:
            values[name] = _BOOLS[text.lower() or "true"] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise UserError(
                f"Config switch '{name}' must be of type {kind.__name__}; got '{text}'."
            ) from None
    return SimpleNamespace(**values)
