"""A user's mistakes, said in one line."""

import difflib
import reprlib
from collections.abc import Collection, Mapping
from typing import TypeVar

_T = TypeVar("_T")
_SHORT = reprlib.Repr()  # without end even where a value refers to itself a million times
_SHORT.maxstring = _SHORT.maxother = 200


class UserError(ValueError):
    """Something the user can mend: main prints its one line and exits with status 2."""


def brief(value: object) -> str:
    """Write a value out of a file on one line, short however large or deep it is."""
    try:
        return _SHORT.repr(value)[:200]
    except ValueError:  # Python does not write whole numbers of thousands of digits
        return f"<{type(value).__name__}>"


def did_you_mean(value: object, choices: Collection[str], what: str) -> str:
    """Return the line for an unknown name: what it may have meant, and all choices."""
    text = value if isinstance(value, str) else brief(value)
    text = text if len(text) <= 200 and text.isprintable() else brief(text)
    near = difflib.get_close_matches(text, choices, n=1)
    guess = f" Did you mean '{near[0]}'?" if near else ""
    return f"Unknown {what} '{text}'.{guess} Available: {', '.join(sorted(choices))}."


def choose(value: str, choices: Mapping[str, _T], what: str) -> _T:
    """Return `choices[value]` of a dict, or raise a UserError naming the nearest choice."""
    if value not in choices:
        raise UserError(did_you_mean(value, list(choices), what))
    return choices[value]
