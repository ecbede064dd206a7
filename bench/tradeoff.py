"""Draws accuracy against quality, method by method, from a grid's folder: the README's figure.

    python -m lfp_jax.main --config=configs/stylegan2_grid.py --mode=grid
    python -m bench.baselines --workdir runs/stylegan2_grid
    python -m bench.tradeoff --workdir runs/stylegan2_grid --plot tradeoff.png

A line joins the strengths of one method at one shift; a shift of which there is one strength alone
is a point with its number. Only cells of as many bits as most have are drawn.
"""

import argparse
from collections import Counter, defaultdict
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lfp_jax import files
from lfp_jax.report import plots, results, tables

ATTACKS = ("none", "paper:noise", "paper:jpeg", "paper:combination")
_RATES = ("bit_accuracy", "right_user_first")


def _method(cell):
    """Name what carries bits; a method that has no directions by itself."""
    basis, code = tables.values(cell, ("basis", "code"))
    return f"{basis}, {code}" if "basis" in cell.settings else str(cell.settings["estimator"])


def _series(cells):
    """Give {(method, shift): cells by strength} of the cells that have most cells' bits."""
    own = [cell for cell in cells if "basis" in cell.settings]
    [(bits, _)] = Counter(cell.settings["bits"] for cell in own).most_common(1)
    series = defaultdict(list)
    for cell in cells:
        if cell not in own or cell.settings["bits"] == bits:
            series[_method(cell), cell.settings.get("shift")].append(cell)
    for group in series.values():
        group.sort(key=lambda cell: cell.quantities["psnr"].interval[0])
    return dict(sorted(series.items(), key=lambda item: str(item[0])))


def plot(path, cells, attacks=ATTACKS):
    """Draw a column an attack, a row a rate, as a PNG."""
    series = _series([c for c in cells if c.error is None])
    lengths = {
        key: len({c.settings.get("strength") for c in group}) for key, group in series.items()
    }
    methods = list(dict.fromkeys(method for method, _ in series))
    looks = dict(zip(methods, zip(plots.COLOURS, "os^Dv<>", strict=True), strict=False))
    figure = Figure(figsize=(3.0 * len(attacks) + 0.5, 6.0), dpi=110, layout="constrained")
    axes = figure.subplots(len(_RATES), len(attacks), sharex=True, sharey="row", squeeze=False)
    handles = {}
    for (method, shift), group in series.items():
        lone = shift is not None and lengths[method, shift] == 1
        colour, marker = looks[method]
        style = {"color": colour, "marker": marker, "linewidth": 1.1, "markersize": 4.5}
        style |= {"linestyle": "", "markerfacecolor": "white"} if lone else {}
        for axis_row, name in zip(axes, _RATES, strict=True):
            for axis, attack in zip(axis_row, attacks, strict=True):
                points = [c for c in group if c.attack == attack and name in c.quantities]
                if not points:
                    continue
                x, y = ([c.quantities[n].interval for c in points] for n in ("psnr", name))
                bars = [[v - low for v, low, _ in y], [high - v for v, _, high in y]]
                where = [v for v, _, _ in x], [v for v, _, _ in y]
                drawn = axis.errorbar(*where, bars, elinewidth=0.6, **style)
                if not lone:
                    handles[method if shift is None else f"{method}, from {shift}"] = drawn
                else:
                    axis.annotate(shift, (where[0][0], where[1][0]), xytext=(5, 3),
                                  textcoords="offset points", fontsize=7, color=colour)  # fmt: skip
    for axis, attack in zip(axes[0], attacks, strict=True):
        axis.set(title=attack)
    for axis in axes[-1]:
        axis.set(xlabel="PSNR against the plain twin, dB")
    for axis, name in zip(axes[:, 0], _RATES, strict=True):
        axis.set(ylabel=tables.LABELS[name])
    for axis in axes.flat:
        axis.grid(alpha=0.25, linewidth=0.6)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    FigureCanvasAgg(figure)
    with files.replacing(path) as part:
        figure.savefig(part, format="png")


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
    main()
