"""Draws accuracy against quality, method by method, from a grid's folder: the README's figure.

    python -m lfp_jax.main --config=configs/stylegan2_grid.py --mode=grid
    python -m bench.baselines --workdir runs/stylegan2_grid
    python -m bench.tradeoff --workdir runs/stylegan2_grid --plot tradeoff.png

A line joins the strengths of one method at one shift; a shift of which there is one strength alone
is a point with its number. Only cells of as many bits as most have are drawn.
"""

import argparse
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path

from matplotlib.figure import Figure

from bench import command
from lfp_jax.report import plots, results, tables

ATTACKS = ("none", "paper:noise", "paper:jpeg", "paper:combination")
_RATES = ("bit_accuracy", "right_user_first")


def _method(cell):
    """Name what carries bits; a method that has no directions by itself."""
    if "basis" in cell.settings:
        return ", ".join(tables.values(cell, ("basis", "code")))
    return str(cell.settings["estimator"])


def _series(cells):
    """Give {(method, shift): cells by quality} of the cells that have most cells' bits."""
    counts = Counter(cell.settings["bits"] for cell in cells if "basis" in cell.settings)
    most = max(counts, key=counts.get, default=None)
    series = defaultdict(list)
    for cell in sorted(cells, key=lambda cell: cell.quantities["psnr"].interval):
        if "basis" not in cell.settings or cell.settings["bits"] == most:
            series[_method(cell), cell.settings.get("shift")].append(cell)
    return dict(sorted(series.items(), key=lambda item: str(item[0])))


def plot(path, cells, attacks=ATTACKS):
    """Draw a column an attack, a row a rate, as a PNG."""
    series = _series([cell for cell in cells if cell.error is None])
    methods = list(dict.fromkeys(method for method, _ in series))
    figure = Figure(figsize=(3.0 * len(attacks) + 0.5, 6.0), dpi=110, layout="constrained")
    axes = figure.subplots(len(_RATES), len(attacks), sharex=True, sharey="row", squeeze=False)
    handles = {}
    for (method, shift), group in series.items():
        lone = shift is not None and len({cell.settings["strength"] for cell in group}) == 1
        style = plots.look((method, method), (methods, methods))
        style |= {"linestyle": "", "markerfacecolor": "white"} if lone else {}
        for (row, name), (column, attack) in product(enumerate(_RATES), enumerate(attacks)):
            points = [c for c in group if c.attack == attack and name in c.quantities]
            if not points:
                continue
            drawn = _draw(axes[row, column], points, name, style, shift if lone else "")
            if not lone:
                handles[method if shift is None else f"{method}, from {shift}"] = drawn
    for axis, attack in zip(axes[0], attacks, strict=True):
        axis.set(title=attack)
    for axis in axes[-1]:
        axis.set(xlabel="PSNR against the plain twin, dB")
    for axis, name in zip(axes[:, 0], _RATES, strict=True):
        axis.set(ylabel=tables.LABELS[name])
    for axis in axes.flat:
        axis.grid(alpha=0.25, linewidth=0.6)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    plots.write(figure, path)


def _draw(axis, points, name, style, label):
    """Draw a rate of cells against PSNR, the first one's place labelled."""
    x, _ = plots.bars([cell.quantities["psnr"].interval for cell in points])
    y, ends = plots.bars([cell.quantities[name].interval for cell in points])
    look = {"linewidth": 1.1, "elinewidth": 0.6, "markersize": 4.5}
    axis.annotate(
        label, (x[0], y[0]), xytext=(5, 3), textcoords="offset points", fontsize=7,
        color=style["color"],
    )  # fmt: skip
    return axis.errorbar(x, y, ends, **look, **style)


def main(argv=None):
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/stylegan2_grid", help="folder of a grid")
    parser.add_argument("--plot", default="tradeoff.png", help="PNG to write")
    parser.add_argument("--attacks", nargs="+", default=ATTACKS)
    options = parser.parse_args(argv)
    cells, problems = results.read(Path(options.workdir))
    print("\n".join(problems), end="\n" * bool(problems))
    plot(options.plot, cells, options.attacks)


if __name__ == "__main__":
    command.run(main)
