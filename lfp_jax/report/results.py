"""What a work folder holds, read for a report: the cells of a grid, or one experiment.

The files may come from other machines, and from runs that were killed: nothing in them is taken on
trust. One that is damaged is a problem of one line, and the others are read all the same.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from lfp_jax import images, logs
from lfp_jax.errors import UserError

_NOTES = ("unit", "features", "network")  # what tells two quantities of one name apart
_BIN = ("lowest", "highest", "stated", "wrong", "low", "high", "bits")
_BESIDE = ("settings", "versions", "generator", "reliability")  # in metrics.json, no quantities


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A measured value with its 95 % interval; None: not measured, or not finite."""

    value: float | None
    low: float | None
    high: float | None
    images: int | None
    note: str  # unit, features and reference, in words; may be empty

    @property
    def interval(self) -> tuple[float, float, float]:
        """The value and the ends of its interval, which are the value where there is none.

        Raises:
            ValueError: it was not measured.
        """
        if self.value is None:
            raise ValueError("What was not measured has no interval.")
        low = self.value if self.low is None else self.low
        return self.value, low, self.value if self.high is None else self.high


@dataclasses.dataclass(frozen=True)
class Cell:
    """One design point under one attack."""

    name: str  # of the file
    settings: dict[str, Any]  # flat: {"lm.bank": 8192}
    quantities: dict[str, Quantity]
    reliability: list[dict[str, float]]  # fields of `accuracy.Bin`
    generator: dict[str, str]  # name, sha256
    versions: dict[str, str]
    picture: bytes | None  # a PNG
    rows: list[str]  # what the rows of the picture are, from above
    error: str | None  # why there is nothing else

    @property
    def attack(self) -> str:
        """The name of the attack."""
        return str(self.settings.get("attack", "none"))


def read(workdir: Path) -> tuple[list[Cell], list[str]]:
    """Read WORKDIR/cells/*.json, or where there are none WORKDIR/metrics.json.

    Args:
        workdir: of a grid or of an experiment.

    Returns:
        The cells, by the names of their files, and the problems, each a line that names its file.

    Raises:
        UserError: the folder holds neither.
    """
    paths = sorted((workdir / "cells").glob("[!.]*.json"))
    paths = paths or list(workdir.glob("metrics.json"))
    if not paths:
        raise UserError(
            f"'{workdir}' holds no results to report: neither cells/*.json nor metrics.json. "
            "Run an experiment or a grid with this --workdir first."
        )
    cells, problems = [], []
    for path in paths:
        try:
            cell, lacking = _read(path)
            cells.append(cell)
            problems += [f"'{path}': {each}" for each in lacking]
        except _Damaged as damage:
            problems.append(f"'{path}' is left out: {damage}")
    return cells, problems


class _Damaged(Exception):
    """A line that says what is wrong with a file."""


def _read(path: Path) -> tuple[Cell, list[str]]:
    """Give the Cell of a file, and what its picture lacks."""
    record = _object(_load(path), "the file")
    grid = path.name != "metrics.json"
    settings = _flat(_object(record.get("settings"), "'settings'"))
    measured = record if not grid else _object(record.get("metrics", {}), "'metrics'")
    error = record.get("error")
    if grid and error is None and "metrics" not in record:
        raise _Damaged("it has neither 'metrics' nor 'error'.")
    rows = _rows(settings) if not grid else record.get("rows") or []
    picture, lacking = _picture(path, record.get("pictures") if grid else "grid.png")
    cell = Cell(
        name=path.stem,
        settings=settings,
        quantities=_quantities(measured),
        reliability=_bins(record.get("reliability", measured.get("reliability")) or []),
        generator=_texts(record.get("generator")),
        versions=_texts(record.get("versions")),
        picture=picture,
        rows=[str(row) for row in rows] if isinstance(rows, list) else [],
        error=None if error is None else str(error),
    )
    return cell, lacking


def _load(path: Path) -> Any:
    try:
        # JSON has no NaN, but Python writes it: not finite is not measured.
        return logs.from_text(path.read_bytes(), parse_constant=lambda _: None)
    except OSError as error:
        raise _Damaged(f"it cannot be read: {error.strerror}.") from None
    except ValueError as error:
        cause = " ".join(str(error).split())[:200]
        raise _Damaged(f"it holds no JSON ({cause}).") from None


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Damaged(f"{what} must hold a JSON object.")
    return value


def _flat(settings: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= (
            _flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
        )
    return flat


def _texts(value: Any) -> dict[str, str]:
    return {str(k): str(v) for k, v in value.items()} if isinstance(value, dict) else {}


def _quantities(measured: dict[str, Any]) -> dict[str, Quantity]:
    found = {}
    for name, entry in measured.items():
        if name in _BESIDE or not isinstance(entry, dict) or "value" not in entry:
            continue
        notes = [entry[note] for note in _NOTES if entry.get(note)]
        if entry.get("reference"):
            notes.append(f"against {entry['reference']}")
        decoys = _number(entry, "decoys", name)
        if decoys:
            notes.append(f"of {decoys:,.0f}")
        value, low, high = (_number(entry, field, name) for field in ("value", "low", "high"))
        n = _number(entry, "images", name)
        note = ", ".join(map(str, notes))
        found[name] = Quantity(value, low, high, None if n is None else int(n), note)
    return found


def _number(entry: dict[str, Any], field: str, name: str) -> float | None:
    value = entry.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Damaged(f"'{name}' has a '{field}' that is no number.")
    try:
        value = float(value)
    except OverflowError:
        raise _Damaged(f"'{name}' has a '{field}' out of range.") from None
    return value if math.isfinite(value) else None


def _bins(bins: Any) -> list[dict[str, float]]:
    if not isinstance(bins, list):
        raise _Damaged("'reliability' must be a list.")
    out = []
    for each in bins:
        each = _object(each, "each of 'reliability'")
        found = {name: _number(each, name, "reliability") for name in _BIN}
        numbers = {name: number for name, number in found.items() if number is not None}
        if len(numbers) < len(_BIN):
            raise _Damaged(f"'reliability' needs {', '.join(_BIN)} in each bin.")
        if not (0.0 <= numbers["wrong"] <= 1.0 and numbers["bits"] >= 1.0):
            raise _Damaged("'reliability' has shares outside 0..1, or bins without bits.")
        out.append(numbers)
    return out


def _rows(settings: dict[str, Any]) -> list[str]:
    """Name the rows of an experiment's sheet."""
    attacked = ["attacked"] if str(settings.get("attack", "none")) != "none" else []
    return ["plain", "fingerprinted", "difference x 10", *attacked, "reconstructed"]


def _picture(path: Path, name: Any) -> tuple[bytes | None, list[str]]:
    """Read the picture that a file names: PNG bytes or None, and what is wrong."""
    if name is None:
        return None, []
    folder = path.parent.resolve()
    if not isinstance(name, str) or Path(name).name != name or not name:
        return None, [f"the picture {name!r} is refused: it must lie beside the file."]
    try:
        if (folder / name).resolve().parent != folder:
            return None, [f"the picture {name!r} is refused: it is a link out of the folder."]
        data = (folder / name).read_bytes()
        images.decode_png(data)
    except (OSError, ValueError) as error:  # UserError is a ValueError
        cause = getattr(error, "strerror", None) or error
        return None, [f"the picture {name!r} is left out: {' '.join(str(cause).split())}"]
    return data, []
