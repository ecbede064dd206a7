"""A user's mistakes, said in one line."""

import difflib
from collections.abc import Collection, Mapping
from typing import TypeVar

_T = TypeVar("_T")


class UserError(ValueError):
    """Something the user can mend: main prints its one line and exits with status 2."""


def did_you_mean(value: object, choices: Collection[str], what: str) -> str:
    """Return the line for an unknown name: what it may have meant, and all choices."""
    near = difflib.get_close_matches(str(value), choices, n=1)
    guess = f" Did you mean '{near[0]}'?" if near else ""
    return f"Unknown {what} '{value}'.{guess} Available: {', '.join(sorted(choices))}."


def choose(value: str, choices: Mapping[str, _T], what: str) -> _T:
    """Return `choices[value]` of a dict, or raise a UserError naming the nearest choice."""
    if value not in choices:
        raise UserError(did_you_mean(value, list(choices), what))
    return choices[value]
