"""Figures of results; drawn without a display, written in one step."""

import os
from collections.abc import Iterable
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lfp_jax import files

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
    axis = figure.subplots()
    axis.plot([0.0, 0.5], [0.0, 0.5], color="grey", linewidth=0.8, label="calibrated")
    bins = list(bins)
    stated, wrong = ([each[name] for each in bins] for name in ("stated", "wrong"))
    below = [each["wrong"] - each["low"] for each in bins]
    above = [each["high"] - each["wrong"] for each in bins]
    axis.errorbar(stated, wrong, [below, above], fmt="o", markersize=4, linewidth=0.8)
    for each in bins:
        place = (each["stated"], each["wrong"])
        axis.annotate(
            f"{each['bits']:,} bits", place, xytext=(6, -10), textcoords="offset points",
            fontsize=7,
        )  # fmt: skip
    axis.set(xlabel="stated probability of error", ylabel="share of errors")
    axis.grid(alpha=0.3)
    axis.legend()
    _write(figure, path)


def _curve(path, lines, panels, *, along):
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
    _write(figure, path)


def _series(lines, name, along):
    """Give the places and values of the lines that have a value (null in JSON: not finite)."""
    kept = [line for line in lines if line.get(name) is not None]
    return [line[along] for line in kept], [line[name] for line in kept]


def _write(figure, path):
    FigureCanvasAgg(figure)
    with files.replacing(path) as part:
        figure.savefig(part, format="png")
