"""Figures of results; drawn without a display, written in one step.

Figures of single runs are PNG files. Those of a page are SVG text, narrow enough for a phone, in
colours that colour-blind readers tell apart (Okabe and Ito 2008).
"""

import dataclasses
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lfp_jax import files

# Okabe and Ito's, without yellow, which white paper swallows, and with black last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "os^Dv<>PX*"
_DASHES = ("-", "--", ":", "-.")
_WIDTH = 4.4  # inches of a figure on a page: its text is then as large as the page's on a phone
_MARK: dict[str, Any] = {"color": "0.45", "linewidth": 0.8, "linestyle": (0, (1, 2))}
_PAGE: dict[Any, Any] = {  # newer versions of matplotlib list the names as a type
    "text.parse_math": False,  # a dollar sign in a name is one
    "svg.fonttype": "none", "svg.hashsalt": "lfp_jax", "font.size": 9.5, "axes.edgecolor": "0.3",
    "axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 9.0,
}  # fmt: skip

_Interval = tuple[float, float, float]  # a value, and its ends

_LOSSES = {"d_loss": "discriminator (nats)", "g_loss": "generator (nats)"}
_ERRORS = {
    "bit_loss": "bits: cross-entropy (nats; ln 2 says nothing)",
    "theta_error": "nuisance: mean square, whitened (1 says nothing)",
}


def training_curve(
    path: str | os.PathLike,
    lines: Iterable[dict[str, Any]],
    *,
    features: str,
    losses: dict[str, str] = _LOSSES,
) -> None:
    """Draw Fréchet distance and losses of a generator's training against the images seen, as a PNG.

    Args:
        path: the file to write.
        lines: of the training log; each has "images" and any of "fd" and the losses.
        features: what the distance is measured on, for the label.
        losses: {name in the lines: label}; default those of a GAN.
    """
    upper = {"ylabel": f"FD, {features}", "yscale": "log", "series": {"fd": None}}
    lower = {"ylabel": "loss", "series": losses}
    _curve(path, lines, [upper, lower], along="images")


def estimator_curve(path: str | os.PathLike, lines: Iterable[dict[str, Any]]) -> None:
    """Draw bit accuracy and losses of an estimator's training against the pairs seen, as a PNG.

    Args:
        path: the file to write.
        lines: of the training log; each has "pairs" and any of "fresh" ({attack: bit accuracy}),
            "bit_loss", "theta_error".
    """
    lines = [{**line, **line.get("fresh", {})} for line in lines]
    attacks = dict.fromkeys(name for line in lines for name in line.get("fresh", {}))
    upper = {"ylabel": "bit accuracy, fresh keys", "series": {name: name for name in attacks}}
    lower = {"ylabel": "training error", "series": _ERRORS}
    _curve(path, lines, [upper, lower], along="pairs")


def reliability(path: str | os.PathLike, bins: Iterable[dict[str, Any]]) -> None:
    """Draw shares of wrong bits against their stated probabilities of error, as a PNG.

    Args:
        path: the file to write.
        bins: with "stated", "wrong", "low", "high" and "bits" (fields of `accuracy.Bin`).
    """
    figure = Figure(figsize=(5, 5), dpi=120, layout="constrained")
    write(_reliability(figure, {"": list(bins)}), path)


@matplotlib.rc_context(_PAGE)
def reliability_svg(series: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """Draw what `reliability` does as SVG text, a colour for each series: {label: its bins}."""
    return _svg(_reliability(_figure(_WIDTH), series))


@dataclasses.dataclass(frozen=True)
class Point:
    """A point in every panel of a figure, each value with the ends of its interval."""

    x: _Interval
    y: dict[str, _Interval]  # {label of the panel's axis: value}
    style: tuple[str, ...]  # what its colour, marker and dashes stand for; may be empty


@matplotlib.rc_context(_PAGE)
def points_svg(
    points: Sequence[Point],
    *,
    xlabel: str,
    legend: Sequence[Sequence[str]],
    marks: Sequence[tuple[str, float]] = (),
    falling: bool = False,
    front: bool = False,
    ticks: Sequence[float] = (),
) -> str:
    """Draw points with their intervals, panels one above the other, as SVG text.

    Points of one style are joined by a line, in the order given.

    Args:
        points: at least one.
        xlabel: with its unit.
        legend: for colour, marker and dashes in turn all labels of the page, so that a label looks
            the same in all its figures.
        marks: (label, x) of vertical lines.
        falling: whether less is better, so that the axis runs from right to left.
        front: whether to draw the line above and to the right of which there is no point.
        ticks: where the x-axis has its ticks; default where matplotlib thinks. Spread over more
            than a factor of six the axis is logarithmic.
    """
    panels = list(dict.fromkeys(label for point in points for label in point.y))
    figure = _figure(0.7 + 2.1 * len(panels))
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    groups = {point.style: [p for p in points if p.style == point.style] for point in points}
    for axis, label in zip(axes, panels, strict=True):
        for style, group in groups.items():
            _line(axis, [(p.x, p.y[label]) for p in group if label in p.y], look(style, legend))
        if front:
            _front(axis, [(p.x[0], p.y[label][0]) for p in points if label in p.y], falling)
        for name, x in marks:
            axis.axvline(x, label=name, **_MARK)
        axis.set(ylabel=label)
        _rate_axis(axis)
        axis.grid(alpha=0.25, linewidth=0.6)
    if len(ticks) > 0:
        if min(ticks) > 0 and max(ticks) > 6 * min(ticks):
            axes[-1].set_xscale("log")
        axes[-1].set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes[-1].minorticks_off()
    if falling:
        axes[-1].invert_xaxis()
    axes[-1].set(xlabel=xlabel)
    _legend(figure, groups, legend, marks, front)
    return _svg(figure)


@matplotlib.rc_context(_PAGE)
def spectrum_svg(
    series: dict[str, tuple[np.ndarray, np.ndarray]],
    *,
    ylabel: str,
    marks: Sequence[float] = (),
) -> str:
    """Draw image change against the position of a direction, as SVG text.

    Args:
        series: {basis: (the change by one unit along direction 0, 1, ..., and by one standard
            deviation of the prior)}.
        ylabel: with its unit.
        marks: positions to mark, where carriers begin.
    """
    figure = _figure(3.6)
    axis = figure.subplots()
    for (name, changes), colour in zip(series.items(), COLOURS, strict=False):
        by_unit, by_deviation = changes
        axis.plot(by_unit, label=f"{name}, by one unit", color=colour, linewidth=0.9, alpha=0.4)
        axis.plot(by_deviation, label=f"{name}, by one std. dev.", color=colour, linewidth=1.1)
    for i, x in enumerate(marks):
        axis.axvline(x, label=None if i else "carriers begin", **_MARK)
    axis.set(xlabel="position of the direction", ylabel=ylabel, yscale="log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    axis.grid(alpha=0.25, linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return _svg(figure)


def _reliability(figure: Figure, series: Mapping[str, Sequence[dict[str, Any]]]) -> Figure:
    axis = figure.subplots()
    axis.plot([0.0, 0.5], [0.0, 0.5], color="grey", linewidth=0.8, label="calibrated")
    for (label, bins), colour in zip(series.items(), COLOURS, strict=False):
        stated, wrong = ([each[name] for each in bins] for name in ("stated", "wrong"))
        below = [each["wrong"] - each["low"] for each in bins]
        above = [each["high"] - each["wrong"] for each in bins]
        axis.errorbar(
            stated, wrong, [below, above], fmt="o", markersize=4, linewidth=0.8, color=colour,
            label=label or None,
        )  # fmt: skip
        counted = [each for each in bins if each["stated"] > 0.02]  # below, they would overlap
        for each in counted if len(series) == 1 else ():
            place = (each["stated"], each["wrong"])
            axis.annotate(
                f"{each['bits']:,.0f} bits", place, xytext=(6, -10), textcoords="offset points",
                fontsize=7,
            )  # fmt: skip
    axis.set(xlabel="stated probability of error", ylabel="share of errors")
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left")
    return figure


def _line(axis: Axes, pairs: list[tuple[_Interval, _Interval]], style: dict[str, Any]) -> None:
    pairs = [(x, y) for x, y in pairs if None not in (x[0], y[0])]
    if not pairs:
        return
    (x, xerr), (y, yerr) = (bars([pair[i] for pair in pairs]) for i in (0, 1))
    axis.errorbar(
        x, y, xerr=xerr, yerr=yerr, markersize=4.5, linewidth=1.1, elinewidth=0.7,
        markeredgecolor="white", markeredgewidth=0.4, **style,
    )  # fmt: skip


def bars(intervals: Sequence[_Interval]) -> tuple[list[float], list[list[float]]]:
    """Give values, and the lengths of their bars below and above.

    Args:
        intervals: each a value and its ends.
    """
    values = [value for value, _, _ in intervals]
    below = [max(value - low, 0.0) for value, low, _ in intervals]
    above = [max(high - value, 0.0) for value, _, high in intervals]
    return values, [below, above]


def _front(axis: Axes, pairs: list[tuple[float, float]], falling: bool) -> None:
    """Draw the staircase of the points that no other beats in both coordinates."""
    best, stairs = -1.0, []
    for x, y in sorted(pairs, key=lambda pair: (pair[0] if falling else -pair[0], -pair[1])):
        if y > best:
            stairs.append((x, y))
            best = y
    axis.step(
        *zip(*stairs, strict=True), where="post", color="0.6", linewidth=4.0, alpha=0.35, zorder=0
    )


def _rate_axis(axis: Axes) -> None:
    """Show a rate from a whole tenth below the lowest up to one."""
    low, high = axis.get_ylim()
    if high <= 1.1:
        axis.set_ylim(max(math.floor(10 * low) / 10, 0.0) - 0.03, 1.03)


def look(style: tuple[str, ...], legend: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Give the colour, marker and dashes of a line, as matplotlib takes them.

    Args:
        style: what they stand for, in turn; fewer leave the first marker and dashes.
        legend: for each in turn all that it can be.
    """
    places = [known.index(label) for label, known in zip(style, legend, strict=False)]
    hue, marker, dashes = (places + [0, 0, 0])[:3]
    count = len(legend[0]) if legend else 1
    if count <= len(COLOURS):
        colour: Any = COLOURS[hue]
    else:  # too many to tell apart by hue: by lightness, in their order
        colour = matplotlib.colormaps["cividis"](0.9 * hue / (count - 1))
    return {
        "color": colour,
        "marker": _MARKERS[marker % len(_MARKERS)],
        "linestyle": _DASHES[dashes % len(_DASHES)],
    }


def _legend(
    figure: Figure,
    groups: Iterable[tuple[str, ...]],
    legend: Sequence[Sequence[str]],
    marks: Sequence[tuple[str, float]],
    front: bool,
) -> None:
    """Tell below the panels what colours, markers, dashes and lines stand for."""
    entries = []
    for slot, known in enumerate(legend):
        present = {style[slot] for style in groups if slot < len(style)}
        if len(present) < 2:  # nothing to tell apart
            continue
        for label in (each for each in known if each in present):
            shown = look(tuple(known[0] for known in legend[:slot]) + (label,), legend)
            if slot > 0:
                shown["color"] = "0.35"
            if slot != 1:
                shown["marker"] = "o" if slot == 0 else ""
            entries.append(Line2D([], [], markersize=4.5, linewidth=1.1, label=label, **shown))
    if front:
        entries.append(
            Line2D([], [], color="0.6", linewidth=4.0, alpha=0.35, label="best trade-off")
        )
    if marks:
        entries += [Line2D([], [], label=name, **_MARK) for name in dict.fromkeys(dict(marks))]
    if entries:
        figure.legend(handles=entries, loc="outside lower center", ncols=2, frameon=False)


def _curve(
    path: str | os.PathLike,
    lines: Iterable[dict[str, Any]],
    panels: list[dict[str, Any]],
    *,
    along: str,
) -> None:
    """Draw panels of series of the lines, one above the other; one that has none is left out."""
    lines = sorted(lines, key=lambda line: line[along])
    panels = [p for p in panels if any(_series(lines, name, along)[0] for name in p["series"])]
    figure = Figure(figsize=(7, 3 * max(len(panels), 1)), dpi=120, layout="constrained")
    axes = figure.subplots(max(len(panels), 1), sharex=True, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels, strict=False):
        for name, label in panel["series"].items():
            marker = "o" if panel is not panels[-1] else None  # measured now and then
            axis.plot(
                *_series(lines, name, along), label=label, linewidth=0.8, marker=marker,
                markersize=3,
            )  # fmt: skip
        axis.set(ylabel=panel["ylabel"], yscale=panel.get("yscale", "linear"))
        axis.grid(alpha=0.3, which="both")
        if any(panel["series"].values()):
            axis.legend()
    axes[-1].set(xlabel=f"training {along} seen")
    write(figure, path)


def _series(lines: list[dict[str, Any]], name: str, along: str) -> tuple[list, list]:
    """Give the places and values of the lines that have a value (null in JSON: not finite)."""
    kept = [line for line in lines if line.get(name) is not None]
    return [line[along] for line in kept], [line[name] for line in kept]


def write(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure as a PNG, in one step.

    Args:
        figure: made without a display.
        path: the file to write.
    """
    FigureCanvasAgg(figure)
    with files.replacing(path) as part:
        figure.savefig(part, format="png")


def _figure(height: float) -> Figure:
    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _svg(figure: Figure) -> str:
    """Render to SVG text that is the same every time, its text as text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
