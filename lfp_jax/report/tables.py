"""Settings and quantities of cells in words: columns, entries, and all of them as CSV."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from lfp_jax.report.results import Cell

LABELS = {
    "bit_accuracy": "bit accuracy",
    "word_accuracy": "word accuracy",
    "right_user_first": "right key first",
    "tpr_at_fpr": "TPR at FPR",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "fd": "FD",
    "fd_plain": "FD, plain",
    "residual": "residual",
    "generator_evaluations": "generator evaluations",
    "seconds_per_image": "seconds an image",
}
_SHARES = ("bit_accuracy", "word_accuracy", "right_user_first", "tpr_at_fpr", "ssim")
_FIRST = ("generator", "estimator", "basis", "code", "shift", "bits", "strength", "attack")
_LARGEST = 1e9  # place on an axis


def varied(cells: Sequence[Cell]) -> list[str]:
    """List the settings that differ between cells that have them, a design point's first."""
    names = dict.fromkeys([*_FIRST, *(name for cell in cells for name in cell.settings)])
    having = {name: [c.settings[name] for c in cells if name in c.settings] for name in names}
    return [name for name in names if len(set(map(text, having[name]))) > 1]


def values(cell: Cell, fields: Sequence[str]) -> tuple[str, ...]:
    """Give the settings of some fields as texts."""
    return tuple(text(cell.settings.get(field)) for field in fields)


def levels(cells: Iterable[Cell], field: str) -> list[Any]:
    """List the different values of a setting: unset, then numbers by size, then texts."""
    found = {text(cell.settings.get(field)): cell.settings.get(field) for cell in cells}
    return sorted(found.values(), key=rank)


def rank(value: Any) -> tuple:
    """Give a key to sort settings of any kind by."""
    if value is None:
        return 0, 0, ""
    return (1, value, "") if is_number(value) else (2, 0, text(value))


def is_number(value: Any) -> bool:
    """Tell whether a setting can be a place on an axis."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def text(value: Any) -> str:
    """Say a setting in words."""
    if value is None:
        return "unset"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(text, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value)


def columns(cells: Iterable[Cell]) -> list[tuple[str, str]]:
    """List (name, note) of what was measured, known names first; another note is another column."""
    quantities = [pair for cell in cells for pair in cell.quantities.items()]
    found = {(name, quantity.note) for name, quantity in quantities if quantity.value is not None}
    known = list(LABELS)
    return sorted(found, key=lambda c: (known.index(c[0]) if c[0] in known else len(known), c))


def label(column: tuple[str, str]) -> str:
    """Name a column, with its note."""
    return ", ".join(filter(None, [_named(column[0]), column[1]]))


def value(cell: Cell, name: str) -> float | None:
    """Give the value of a quantity; None where it was not measured."""
    return cell.quantities[name].value if name in cell.quantities else None


def has(cell: Cell, column: tuple[str, str]) -> bool:
    """Tell whether a cell has a value in a column."""
    return value(cell, column[0]) is not None and cell.quantities[column[0]].note == column[1]


def head(cells: Iterable[Cell], column: tuple[str, str]) -> dict[str, str]:
    """Name a column in parts, with the images behind each value where all have as many."""
    counts = {cell.quantities[column[0]].images for cell in cells if has(cell, column)}
    images = f"{counts.pop():,} images" if len(counts) == 1 and None not in counts else ""
    return {"label": _named(column[0]), "note": column[1], "images": images}


def entry(cell: Cell, column: tuple[str, str]) -> dict[str, str]:
    """Give what stands in a cell's row under a column; empty texts where it has no value."""
    if not has(cell, column):
        return {"value": "", "interval": "", "images": ""}
    quantity = cell.quantities[column[0]]
    measured, _, _ = quantity.interval
    bounds = [each for each in (quantity.low, quantity.high) if each is not None]
    interval = " – ".join(_number(each, column[0]) for each in bounds) if len(bounds) == 2 else ""
    images = "" if quantity.images is None else f"{quantity.images:,} images"
    return {"value": _number(measured, column[0]), "interval": interval, "images": images}


def to_csv(cells: Sequence[Cell]) -> str:
    """Lay out every setting and every quantity with its interval, a row each cell."""
    settings = list(dict.fromkeys(name for cell in cells for name in cell.settings))
    names = list(dict.fromkeys(name for cell in cells for name in cell.quantities))
    parts = ("value", "low", "high", "images", "note")
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    heads = [name if part == "value" else f"{name}_{part}" for name in names for part in parts]
    writer.writerow(["cell", *settings, *heads, "error"])
    for cell in cells:
        quantities = [cell.quantities.get(name) for name in names]
        row = [getattr(quantity, part, None) for quantity in quantities for part in parts]
        writer.writerow([cell.name, *values(cell, settings), *row, cell.error])
    return lines.getvalue()


def _named(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))


def _number(value: float, name: str) -> str:
    if name in _SHARES:
        return f"{value:.3f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
