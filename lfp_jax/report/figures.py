"""The figures of a page: what of the cells goes into which plot, its title and what it tells."""

import base64
from collections.abc import Iterable, Sequence
from typing import Any

from lfp_jax.metrics import accuracy
from lfp_jax.report import plots, tables
from lfp_jax.report.results import Cell
from lfp_jax.report.spectrum import Spectrum

_PANELS = ("bit_accuracy", "word_accuracy")
_FALLING = {"psnr": False, "lpips": True, "fd": True}  # of quality: whether less is better
_ALONG = {"strength": "strength", "bits": "bits", "shift": "shift (first direction that carries)"}
_SLOTS = 3  # settings told apart in one plot: by colour, marker and dashes


def uri(kind: str, data: bytes) -> str:
    """Put data of a media type into an address that needs no network."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def tradeoffs(
    cells: Sequence[Cell], fields: Sequence[str], *, everything: Sequence[Cell], under: str
) -> list[dict[str, str]]:
    """Plot accuracy against each measure of quality.

    Args:
        cells: to be plotted, in the order in which lines join them.
        fields: settings that colour, marker and dashes stand for.
        everything: all cells of the page, so that a colour means the same everywhere.
        under: under which attack, for the title.

    Returns:
        Figures: "title", "alt" and "uri" of each.
    """
    figures = []
    for column in tables.columns(cells):
        name = column[0]
        if name not in _FALLING:
            continue
        shown = [cell for cell in cells if tables.has(cell, column)]
        x = {cell.name: cell.quantities[name].interval for cell in shown}
        better = "lower" if _FALLING[name] else "higher"
        options: dict[str, Any] = {"falling": _FALLING[name], "front": True}
        if name == "fd":
            plain = {tables.value(cell, "fd_plain") for cell in shown}
            known = sorted(distance for distance in plain if distance is not None)
            options["marks"] = [("plain images", distance) for distance in known]
        xlabel = f"{_drawable(tables.label(column), 60)}\n({better} is better)"
        title = f"Accuracy against {tables.LABELS[name]} {under}"
        figures += _accuracy(shown, x, xlabel, title, fields, everything, **options)
    return figures


def along(
    cells: Sequence[Cell], carried: Sequence[str], *, everything: Sequence[Cell], under: str
) -> list[dict[str, str]]:
    """Plot accuracy against strength, bits and shift, those of them that vary.

    Args, returns: as of `tradeoffs`; `carried` are all settings that vary besides the attack.
    """
    figures = []
    for field in filter(_ALONG.get, carried):
        shown = [cell for cell in cells if tables.is_number(cell.settings.get(field))]
        shown.sort(key=lambda cell: cell.settings[field])
        x = {cell.name: (cell.settings[field],) * 3 for cell in shown}
        ticks = sorted({place for place, _, _ in x.values()})
        if len(ticks) < 2:
            continue
        others = [each for each in carried if each != field]
        title = f"Accuracy against {field} {under}"
        figures += _accuracy(shown, x, _ALONG[field], title, others, everything, ticks=ticks)
    return figures


def _accuracy(
    cells: Sequence[Cell],
    x: dict[str, tuple[float, float, float]],
    xlabel: str,
    title: str,
    fields: Sequence[str],
    everything: Sequence[Cell],
    **options: Any,
) -> list[dict[str, str]]:
    fields = fields[:_SLOTS]
    points = []
    for cell in cells:
        rates = {name: cell.quantities[name] for name in _PANELS if _measured(cell, name)}
        y = {tables.LABELS[name]: rate.interval for name, rate in rates.items()}
        points += [plots.Point(x[cell.name], y, _named(fields, tables.values(cell, fields)))]
    points = [point for point in points if point.y]
    if not points:
        return []
    levels = [tables.levels(everything, field) for field in fields]
    legend = [
        _named([field] * len(found), map(tables.text, found))
        for field, found in zip(fields, levels, strict=True)
    ]
    svg = plots.points_svg(points, xlabel=xlabel, legend=legend, **options)
    return [_figure(svg, title, f"{len(points)} points; the tables hold their numbers")]


def _measured(cell: Cell, name: str) -> bool:
    return tables.value(cell, name) is not None


def _named(fields: Sequence[str], values: Iterable[str]) -> tuple[str, ...]:
    pairs = zip(fields, values, strict=True)
    return tuple(_drawable(f"{field} {value}", 40) for field, value in pairs)


def _drawable(text: str, most: int) -> str:
    """Make a text from a file fit for a figure: short, and without control characters."""
    text = "".join(each if each.isprintable() else " " for each in text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def reliability(cells: Sequence[Cell], *, under: str) -> list[dict[str, str]]:
    """Plot the reliability of soft bits, those of all design points together; as `tradeoffs`."""
    found: dict[str, list[dict[str, float]]] = {}
    for cell in (cell for cell in cells if cell.reliability):
        estimator = _drawable(tables.text(cell.settings.get("estimator")), 40)
        found.setdefault(estimator, []).extend(cell.reliability)
    if not found:
        return []
    series = {name: _pool(bins) for name, bins in found.items()}
    bits = sum(each["bits"] for bins in series.values() for each in bins)
    svg = plots.reliability_svg(series)
    return [_figure(svg, f"Reliability of soft bits {under}", f"{bits:,.0f} bits")]


def _pool(bins: list[dict[str, float]]) -> list[dict[str, float]]:
    """Throw together bins that have the same bounds."""
    groups: dict[tuple[float, float], list[dict[str, float]]] = {}
    for each in bins:
        groups.setdefault((each["lowest"], each["highest"]), []).append(each)
    out = []
    for _, group in sorted(groups.items()):
        bits = sum(each["bits"] for each in group)
        stated, wrong = (
            sum(each[name] * each["bits"] for each in group) / bits for name in ("stated", "wrong")
        )
        low, high = accuracy.wilson(min(wrong * bits, bits), bits)
        out.append({"stated": stated, "wrong": wrong, "low": low, "high": high, "bits": bits})
    return out


def spectra(found: Sequence[Spectrum], cells: Sequence[Cell]) -> list[dict[str, str]]:
    """Plot the spectra of a unit, with the cells' shifts marked; as `tradeoffs`."""
    shifts = [shift for shift in tables.levels(cells, "shift") if tables.is_number(shift)]
    figures = []
    for unit in dict.fromkeys(each.unit for each in found):
        alike = [each for each in found if each.unit == unit]
        series = {
            _drawable(each.basis, 20): (each.sensitivity, each.sensitivity * each.stddev)
            for each in alike
        }
        svg = plots.spectrum_svg(series, ylabel=f"image change, {unit}", marks=shifts)
        told = ", ".join(f"{each.basis}: {len(each.stddev)} directions" for each in alike)
        figures.append(_figure(svg, "How far pictures move along each direction", told))
    return figures


def _figure(svg: str, title: str, told: str) -> dict[str, str]:
    data = svg[svg.index("<svg") :].encode()
    return {"uri": uri("image/svg+xml", data), "title": title, "alt": f"Plot: {title}. {told}."}
