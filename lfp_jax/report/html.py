"""One page on all design points of a work folder: the question, tables, plots, pictures; and a CSV.

The page holds all that it shows and asks no network. Whatever comes from files is escaped.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2

from lfp_jax import images, logs
from lfp_jax.errors import UserError
from lfp_jax.report import figures, results, spectrum, tables
from lfp_jax.report.results import Cell

_GLANCE = ("bit_accuracy", "word_accuracy", "right_user_first", "psnr", "lpips", "fd")
_MOST_BYTES = 12_000_000  # of pictures as they are; more than that come as JPEG
_QUALITY = 88  # of those


def write(workdir: str | os.PathLike) -> tuple[Path, list[str]]:
    """Write WORKDIR/report.html and WORKDIR/report.csv from what the folder holds.

    Args:
        workdir: of a grid (cells/*.json) or of one experiment (metrics.json).

    Returns:
        The page, and a line on each file that could not be read; the page tells these too.

    Raises:
        UserError: the folder holds no results at all.
    """
    workdir = Path(workdir)
    cells, problems = results.read(workdir)
    spectra = []
    for path in spectrum.find(workdir):
        try:
            spectra += spectrum.read(path)
        except UserError as error:
            problems.append(str(error))
    varied = tables.varied(cells)
    cells.sort(key=lambda cell: [tables.rank(cell.settings.get(field)) for field in varied])
    logs.write_file(workdir / "report.csv", tables.to_csv(cells))
    page = workdir / "report.html"
    logs.write_file(page, _page(workdir.resolve().name, cells, varied, spectra, problems))
    return page, problems


def _page(
    name: str,
    cells: list[Cell],
    varied: list[str],
    spectra: list[spectrum.Spectrum],
    problems: list[str],
) -> str:
    carried = [field for field in varied if field != "attack"]  # what tells design points apart
    designs = list(dict.fromkeys(tables.values(cell, carried) for cell in cells))
    number = {cell.name: 1 + designs.index(tables.values(cell, carried)) for cell in cells}
    measured = [cell for cell in cells if cell.error is None]
    attacks = sorted({cell.attack for cell in measured}, key=lambda name: (name != "none", name))
    glance = [column for column in tables.columns(measured) if column[0] in _GLANCE]
    sections = []
    with logs.Progress(len(attacks), unit="attacks", label="report") as progress:
        for attack in attacks:
            section = _section(attack, measured, carried, number)
            sections.append(section | {"best": _best(attack, measured, glance, carried, number)})
            progress.update(len(sections))
    fields = ["attack", *(field for field in carried if field != "strength")]
    overview = len(attacks) > 1
    return _template().render(
        name=name,
        designs=len({number[cell.name] for cell in measured}),
        varied=[(field, _listed(tables.levels(cells, field))) for field in varied],
        common=_common(cells, varied),
        carried=carried,
        glance=[tables.head(measured, column) for column in glance],
        sections=sections,
        overview=overview
        and figures.tradeoffs(measured, fields, everything=measured, under="under each attack"),
        spectra=figures.spectra(spectra, measured),
        pictures=_pictures(cells, designs, carried, number),
        heavy=_are_heavy(cells),
        failed=[_failure(cell, carried, number) for cell in cells if cell.error is not None],
        problems=problems,
        generators=_unique(cell.generator for cell in measured),
        versions=_unique(cell.versions for cell in measured),
    )


def _section(
    attack: str, measured: list[Cell], carried: list[str], number: dict[str, int]
) -> dict[str, Any]:
    """Give the template all of an attack."""
    cells, under = [cell for cell in measured if cell.attack == attack], f"under {attack}"
    columns, front = tables.columns(cells), _front(cells)
    fields = [field for field in carried if field != "strength"]
    options: dict[str, Any] = {"everything": measured, "under": under}
    return {
        "attack": attack,
        "columns": [tables.head(cells, column) for column in columns],
        "rows": [
            {
                "number": number[cell.name],
                "front": cell.name in front,
                "settings": tables.values(cell, carried),
                "entries": [tables.entry(cell, column) for column in columns],
            }
            for cell in cells
        ],
        "figures": figures.tradeoffs(cells, fields, **options)
        + figures.along(cells, carried, **options),
        "reliability": figures.reliability(cells, under=under),
    }


def _best(
    attack: str,
    measured: list[Cell],
    columns: list[tuple[str, str]],
    carried: list[str],
    number: dict[str, int],
) -> dict[str, Any]:
    """Give the template the design point from which most keys come back."""

    def goodness(cell: Cell) -> list[float]:
        values = [tables.value(cell, name) for name in ("word_accuracy", "bit_accuracy", "psnr")]
        return [float("-inf") if value is None else value for value in values]

    best = max((cell for cell in measured if cell.attack == attack), key=goodness)
    return {
        "number": number[best.name],
        "settings": _pairs(best, carried),
        "entries": [tables.entry(best, column) for column in columns],
    }


def _front(cells: list[Cell]) -> set[str]:
    """Give the names of the cells that no other beats in both bit accuracy and PSNR."""
    pairs = {}
    for cell in cells:
        bits, psnr = tables.value(cell, "bit_accuracy"), tables.value(cell, "psnr")
        if bits is not None and psnr is not None:
            pairs[cell.name] = bits, psnr
    return {
        name
        for name, (a, b) in pairs.items()
        if not any(c >= a and d >= b and (c, d) != (a, b) for c, d in pairs.values())
    }


def _listed(levels: list[Any]) -> str:
    return ", ".join(map(tables.text, levels))


def _common(cells: list[Cell], varied: list[str]) -> list[tuple[str, str]]:
    settings = {name: value for cell in cells for name, value in cell.settings.items()}
    return [(name, tables.text(value)) for name, value in settings.items() if name not in varied]


def _pairs(cell: Cell, fields: list[str]) -> list[tuple[str, str]]:
    return list(zip(fields, tables.values(cell, fields), strict=True))


def _failure(cell: Cell, carried: list[str], number: dict[str, int]) -> dict[str, Any]:
    settings = [("attack", cell.attack), *_pairs(cell, carried)]
    return {"number": number[cell.name], "settings": settings, "error": cell.error}


def _pictures(
    cells: list[Cell],
    designs: list[tuple[str, ...]],
    carried: list[str],
    number: dict[str, int],
) -> list[dict[str, Any]]:
    """Give each design point's sheets."""
    points, heavy = [], _are_heavy(cells)
    for i, values in enumerate(designs, 1):
        sheets = [
            {
                "attack": cell.attack,
                "uri": _sheet(cell.picture, heavy),
                "rows": cell.rows,
                "alt": f"Pictures of design point {i} under {cell.attack}, in rows: "
                f"{', '.join(cell.rows)}.",
            }
            for cell in cells
            if number[cell.name] == i and cell.picture is not None
        ]
        if sheets:
            settings = list(zip(carried, values, strict=True))
            points.append({"number": i, "settings": settings, "sheets": sheets})
    return points


def _are_heavy(cells: list[Cell]) -> bool:
    """Tell whether the files of pictures are too much for one page."""
    return sum(len(cell.picture or b"") for cell in cells) > _MOST_BYTES


def _sheet(png: bytes, heavy: bool) -> str:
    if not heavy:
        return figures.uri("image/png", png)
    jpeg = images.encode_jpeg(images.decode_png(png), quality=_QUALITY, subsampling="4:4:4")
    return figures.uri("image/jpeg", jpeg)


def _unique(texts: Iterable[dict[str, str]]) -> list[tuple[tuple[str, str], ...]]:
    """Give the different ones among some dicts, each as its items."""
    return list(dict.fromkeys(tuple(each.items()) for each in texts if each))


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lfp_jax", "report"), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("page.html")
