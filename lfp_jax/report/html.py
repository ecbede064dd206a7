"""One page on all design points of a work folder: the question, tables, plots, pictures; and a CSV.

The page holds all that it shows and asks no network. Whatever comes from files is escaped.
"""

import base64
import csv
import io
import json
from pathlib import Path

import jinja2

from lfp_jax import images, logs
from lfp_jax.errors import UserError
from lfp_jax.metrics import accuracy
from lfp_jax.report import cells as results
from lfp_jax.report import plots, spectrum

_LABELS = {
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
    "seconds_per_image": "seconds",
}
_RATES = ("bit_accuracy", "word_accuracy", "right_user_first", "tpr_at_fpr")
_ACCURACY = ("bit_accuracy", "word_accuracy")  # the panels of a plot
_QUALITY = {"psnr": False, "lpips": True, "fd": True}  # whether less is better
_ALONG = ("strength", "bits", "shift")
_MOST_BYTES = 12_000_000  # of pictures as they are; more than that come as JPEG
_JPEG = {"quality": 88, "subsampling": "4:4:4"}


def write(workdir: Path) -> tuple[Path, list[str]]:
    """Write WORKDIR/report.html and WORKDIR/report.csv from what the folder holds.

    Args:
        workdir: of a grid (cells/*.json) or of one experiment (metrics.json).

    Returns:
        The page, and a line on each file that could not be read; the page tells these too.

    Raises:
        UserError: the folder holds no results at all.
    """
    workdir = Path(workdir)
    found, problems = results.read(workdir)
    try:
        spectra = spectrum.read(workdir)
    except UserError as error:
        spectra, problems = [], [*problems, str(error)]
    logs.write_file(workdir / "report.csv", _csv(found))
    page = workdir / "report.html"
    logs.write_file(page, _page(workdir.resolve().name, found, spectra, problems))
    return page, problems


def _page(name, found, spectra, problems):
    varied = _varied(found)
    found = sorted(found, key=lambda cell: [_order(cell.settings.get(field)) for field in varied])
    carried = [field for field in varied if field != "attack"]  # what tells design points apart
    designs = list(dict.fromkeys(_values(cell, carried) for cell in found))
    number = {cell.name: 1 + designs.index(_values(cell, carried)) for cell in found}
    measured = [cell for cell in found if cell.error is None]
    attacks = sorted({cell.attack for cell in measured}, key=lambda name: (name != "none", name))
    sections = [_Section(attack, measured, carried, number) for attack in attacks]
    with logs.Progress(len(sections) + 2, unit="sections", label="report") as progress:
        filled = []
        for section in sections:
            filled.append(section.fill())
            progress.update(len(filled))
        together = _Section(None, measured, carried, number) if len(attacks) > 1 else None
        overview = together.tradeoffs(["attack", *_fields(carried, "strength")]) if together else []
        progress.update(len(filled) + 1)
        pictures = _pictures(found, carried, designs, number)
        progress.update(len(filled) + 2)
    return _template().render(
        name=name,
        designs=len({_values(cell, carried) for cell in measured}),
        measured=len(measured),
        varied=[(field, _listed(cell.settings.get(field) for cell in found)) for field in varied],
        common=_common(found, varied),
        carried=carried,
        best=[section.best() for section in sections],
        overview=overview,
        sections=filled,
        reliability=_reliability(attacks, measured),
        spectrum=_spectrum(spectra, measured),
        pictures=pictures,
        pictured={point["number"] for point in pictures["points"]},
        failed=[_failure(cell, varied, number) for cell in found if cell.error is not None],
        problems=problems,
        generators=_unique(cell.generator for cell in measured),
        versions=_unique(cell.versions for cell in measured),
    )


class _Section:
    """What the page shows of one attack, or (None) of all together."""

    def __init__(self, attack, measured, carried, number):
        self._attack, self._carried, self._number = attack, carried, number
        self._all = measured
        self._cells = [cell for cell in measured if attack in (None, cell.attack)]
        self._under = f"under {attack}" if attack else "under each attack"

    def fill(self):
        """Give the template all of an attack."""
        columns = _columns(self._cells)
        front = self._front()
        rows = [
            {
                "number": self._number[cell.name],
                "front": cell.name in front,
                "settings": _values(cell, self._carried),
                "cells": [_entry(cell, column) for column in columns],
            }
            for cell in self._cells
        ]
        figures = self.tradeoffs(_fields(self._carried, "strength"))
        figures += [figure for field in _ALONG for figure in self._along(field)]
        heads = [_head(self._cells, column) for column in columns]
        return {"attack": self._attack, "columns": heads, "rows": rows, "figures": figures}

    def best(self):
        """Give the design point that most keys come back from."""

        def rank(cell):
            values = [_value(cell, name) for name in ("word_accuracy", "bit_accuracy", "psnr")]
            return [float("-inf") if value is None else value for value in values]

        cell = max(self._cells, key=rank)
        names = ("bit_accuracy", "word_accuracy", "right_user_first", *_QUALITY)
        columns = [column for column in _columns(self._cells) if column[0] in names]
        return {
            "attack": self._attack,
            "number": self._number[cell.name],
            "settings": [*zip(self._carried, _values(cell, self._carried), strict=True)],
            "quantities": [(_head([cell], column), _entry(cell, column)) for column in columns],
        }

    def tradeoffs(self, fields):
        """Plot accuracy against each measure of quality; a figure each."""
        figures = []
        for name, note in _columns(self._cells):
            if name not in _QUALITY:
                continue
            cells = [cell for cell in self._cells if _has(cell, (name, note))]
            x = {cell.name: cell.quantities[name].interval for cell in cells}
            plain = _plain_distances(cells) if name == "fd" else []
            better = "lower" if _QUALITY[name] else "higher"
            label = f"{_label((name, note))}\n({better} is better)"
            options = {"falling": _QUALITY[name], "front": True, "marks": plain}
            figures += self._figure(cells, x, label, _LABELS[name], fields, **options)
        return figures

    def _along(self, field):
        """Plot accuracy against a setting that varies, if it does here."""
        cells = [cell for cell in self._cells if _is_number(cell.settings.get(field))]
        places = sorted({cell.settings[field] for cell in cells})
        if field not in self._carried or len(places) < 2:
            return []
        x = {cell.name: (cell.settings[field],) * 3 for cell in cells}
        cells.sort(key=lambda cell: cell.settings[field])
        fields = _fields(self._carried, field)
        label = "strength of a bit" if field == "strength" else field
        label = "shift (the first direction that carries)" if field == "shift" else label
        return self._figure(cells, x, label, field, fields, ticks=places)

    def _figure(self, cells, x, xlabel, short, fields, **options):
        points = []
        for cell in cells:
            rates = {name: cell.quantities.get(name) for name in _ACCURACY}
            y = {_LABELS[name]: rate.interval for name, rate in rates.items() if _known(rate)}
            if y:
                points.append(plots.Point(x[cell.name], y, _style(cell, fields)))
        if not points:
            return []
        legend = _legend(self._all, fields)
        svg = plots.points_svg(points, xlabel=xlabel, legend=legend, **options)
        title = f"Accuracy against {short} {self._under}"
        return [_svg_figure(svg, title, f"{len(points)} points; the tables hold their numbers")]

    def _front(self):
        """Names of the cells that no other beats in both bit accuracy and PSNR."""
        names = ("bit_accuracy", "psnr")
        pairs = {cell.name: [_value(cell, name) for name in names] for cell in self._cells}
        pairs = {name: pair for name, pair in pairs.items() if None not in pair}
        return {
            name
            for name, (a, b) in pairs.items()
            if not any(c >= a and d >= b and (c, d) != (a, b) for c, d in pairs.values())
        }


# --- settings -----------------------------------------------------------------------------------
def _varied(found):
    """Give the settings that differ between cells, in the order of the configs."""
    names = dict.fromkeys(name for cell in found for name in cell.settings)
    return [name for name in names if len({_text(c.settings.get(name)) for c in found}) > 1]


def _common(found, varied):
    settings = {name: value for cell in found for name, value in cell.settings.items()}
    return [(name, _text(value)) for name, value in settings.items() if name not in varied]


def _fields(carried, without):
    return [field for field in carried if field != without]


def _values(cell, fields):
    return tuple(_text(cell.settings.get(field)) for field in fields)


def _listed(values):
    return ", ".join(_text(value) for value in sorted(_distinct(values), key=_order))


def _distinct(values):
    return list({_text(value): value for value in values}.values())


def _order(value):
    """Sort numbers by size, before text, with what is unset in front."""
    if value is None:
        return 0, 0.0, ""
    return (1, value, "") if _is_number(value) else (2, 0.0, _text(value))


def _is_number(value):
    """Tell whether a value can be a place on an axis."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _text(value):
    if value is None:
        return "unset"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value)


def _style(cell, fields):
    fields = fields[:3]  # colour, marker and dashes
    return tuple(f"{field} {_text(cell.settings.get(field))}" for field in fields)


def _legend(measured, fields):
    legend = []
    for field in fields[:3]:
        values = sorted(_distinct(cell.settings.get(field) for cell in measured), key=_order)
        legend.append([f"{field} {_text(value)}" for value in values])
    return legend


# --- quantities ---------------------------------------------------------------------------------
def _columns(measured):
    """Give (name, note) of every quantity, known names first; another note is another column."""
    found = {(name, q.note) for cell in measured for name, q in cell.quantities.items()}
    known = list(_LABELS)
    return sorted(found, key=lambda c: (known.index(c[0]) if c[0] in known else len(known), c))


def _label(column):
    name, note = column
    return ", ".join(filter(None, [_named(name), note]))


def _named(name):
    return _LABELS.get(name, name.replace("_", " "))


def _has(cell, column):
    quantity = cell.quantities.get(column[0])
    return quantity is not None and quantity.note == column[1] and _known(quantity)


def _known(quantity):
    return quantity is not None and quantity.value is not None


def _value(cell, name):
    return cell.quantities[name].value if name in cell.quantities else None


def _head(measured, column):
    """Name a column, and say of how many images each of its values is where all agree."""
    counts = {cell.quantities[column[0]].images for cell in measured if _has(cell, column)}
    images = f"{counts.pop():,} images" if len(counts) == 1 and None not in counts else ""
    return {"label": _named(column[0]), "note": column[1], "images": images}


def _entry(cell, column):
    if not _has(cell, column):
        return {"value": "", "interval": "", "images": ""}
    quantity = cell.quantities[column[0]]
    bounds = (quantity.low, quantity.high)
    interval = "" if None in bounds else " – ".join(_number(each, column[0]) for each in bounds)
    images = "" if quantity.images is None else f"{quantity.images:,} images"
    return {"value": _number(quantity.value, column[0]), "interval": interval, "images": images}


def _number(value, name):
    if name in _RATES or name == "ssim":
        return f"{value:.3f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _plain_distances(measured):
    """Mark the distances of plain images, which the fingerprinted ones are held against."""
    values = {_value(cell, "fd_plain") for cell in measured} - {None}
    return [("plain images", value) for value in sorted(values)]


# --- figures ------------------------------------------------------------------------------------
def _svg_figure(svg, title, told):
    data = svg[svg.index("<svg") :].encode()
    return {"uri": _uri("image/svg+xml", data), "title": title, "alt": f"Plot: {title}. {told}."}


def _uri(kind, data):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _reliability(attacks, measured):
    figures = []
    for attack in attacks:
        cells = [cell for cell in measured if cell.attack == attack and cell.reliability]
        estimators = dict.fromkeys(_text(cell.settings.get("estimator")) for cell in cells)
        series = {
            name: _pool(c.reliability for c in cells if _text(c.settings.get("estimator")) == name)
            for name in estimators
        }
        if series:
            bits = sum(each["bits"] for bins in series.values() for each in bins)
            told = f"{bits:,.0f} bits of {len(cells)} design points"
            title = f"Reliability of soft bits under {attack}"
            figures.append(_svg_figure(plots.reliability_svg(series), title, told))
    return figures


def _pool(reliabilities):
    """Throw together the bins of several design points that have the same bounds."""
    bins = {}
    for each in (each for reliability in reliabilities for each in reliability):
        bins.setdefault((each["lowest"], each["highest"]), []).append(each)
    out = []
    for bounds in sorted(bins):
        bits = sum(each["bits"] for each in bins[bounds])
        stated, wrong = (
            sum(each[name] * each["bits"] for each in bins[bounds]) / bits
            for name in ("stated", "wrong")
        )
        low, high = accuracy.wilson(min(wrong * bits, bits), bits)
        out.append({"stated": stated, "wrong": wrong, "low": low, "high": high, "bits": bits})
    return out


def _spectrum(spectra, measured):
    if not spectra:
        return None
    series = {}
    for each in spectra:
        series[f"{each.basis}, a step of one unit"] = each.sensitivity
        if not (each.stddev == 1.0).all():
            spread = each.sensitivity * each.stddev
            series[f"{each.basis}, one standard deviation"] = spread
    shifts = sorted({s for s in (c.settings.get("shift") for c in measured) if _is_number(s)})
    label = f"image change ({spectra[0].unit}, images in [-1, 1])"
    svg = plots.spectrum_svg(series, ylabel=label, marks=shifts)
    told = ", ".join(f"{each.basis}: {len(each.stddev)} directions" for each in spectra)
    return _svg_figure(svg, "How far pictures move along each direction", told)


# --- pictures, failures, numbers ----------------------------------------------------------------
def _pictures(found, carried, designs, number):
    """Give each design point's sheets; as JPEG where the files are too much for one page."""
    heavy = sum(len(cell.picture or b"") for cell in found) > _MOST_BYTES
    points = []
    for i, values in enumerate(designs, 1):
        sheets = [
            {
                "attack": cell.attack,
                "uri": _sheet(cell.picture, heavy),
                "rows": cell.rows,
                "alt": f"Pictures of design point {i} under {cell.attack}; rows from above: "
                + ", ".join(cell.rows),
            }
            for cell in found
            if number[cell.name] == i and cell.picture is not None
        ]
        if sheets:
            settings = [*zip(carried, values, strict=True)]
            points.append({"number": i, "settings": settings, "sheets": sheets})
    return {"heavy": heavy, "points": points}


def _sheet(png, heavy):
    if not heavy:
        return _uri("image/png", png)
    return _uri("image/jpeg", images.encode_jpeg(images.decode_png(png), **_JPEG))


def _failure(cell, varied, number):
    settings = [*zip(varied, _values(cell, varied), strict=True)]
    return {"number": number[cell.name], "settings": settings, "error": cell.error}


def _unique(texts):
    """Give the different dicts among some, each as items."""
    return list(dict.fromkeys(tuple(each.items()) for each in texts if each))


def _csv(found):
    """Lay out every setting and quantity of every cell, a row each."""
    settings = list(dict.fromkeys(name for cell in found for name in cell.settings))
    names = list(dict.fromkeys(name for cell in found for name in cell.quantities))
    parts = ("value", "low", "high", "images", "note")
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["cell", *settings, *(f"{n}.{part}" for n in names for part in parts), "error"])
    for cell in found:
        row = [cell.name, *(_text(cell.settings.get(name)) for name in settings)]
        for name in names:
            quantity = cell.quantities.get(name)
            row += [getattr(quantity, part, None) for part in parts]
        rows.writerow([*row, cell.error])
    return text.getvalue()


def _template():
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lfp_jax", "report"), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("page.html")
