"""Figures of results; drawn without a display, written in one step."""

import os
from collections.abc import Iterable
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_LOSSES = {"d_loss": "discriminator", "g_loss": "generator"}


def training_curve(
    path: str | os.PathLike, lines: Iterable[dict[str, Any]], *, features: str
) -> None:
    """Draw Fréchet distance and losses of a GAN's training against the images seen, as a PNG.

    Args:
        path: the file to write.
        lines: of the training log; each has "images" and any of "fd", "d_loss", "g_loss".
        features: what the distance is measured on, for the label.
    """
    lines = sorted(lines, key=lambda line: line["images"])
    distances = _series(lines, "fd")
    figure = Figure(figsize=(7, 6 if distances[0] else 3), dpi=120, layout="constrained")
    axes = figure.subplots(2 if distances[0] else 1, sharex=True, squeeze=False)[:, 0]
    if distances[0]:
        axes[0].plot(*distances, marker="o", markersize=3, color="black")
        axes[0].set(ylabel=f"FD, {features}", yscale="log")
        axes[0].grid(alpha=0.3, which="both")
    for name, label in _LOSSES.items():
        axes[-1].plot(*_series(lines, name), label=label, linewidth=0.8)
    axes[-1].set(xlabel="training images seen", ylabel="loss (nats)")
    axes[-1].grid(alpha=0.3)
    axes[-1].legend()
    _write(figure, path)


def _series(lines, name):
    """Give the images and values of the lines that have a value (null in JSON: not finite)."""
    kept = [line for line in lines if line.get(name) is not None]
    return [line["images"] for line in kept], [line[name] for line in kept]


def _write(figure, path):
    FigureCanvasAgg(figure)
    part = f"{os.fspath(path)}.{os.getpid()}.part"
    figure.savefig(part, format="png")
    os.replace(part, path)
