"""Many design points and attacks: each once, shared out over processes, gone on with when killed.

A cell is a config with some fields changed by the config file's `sweep(add)`. Its result is one
file, named by the hash of all its settings and of its generator's weights. Cells that differ in
what happens after the images are made (attack, estimator) are one piece of work: the same images,
and one distance.
"""

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import sys
import time
import traceback
from typing import Any

from lfp_jax import attacks, design, experiment, logs, sharding
from lfp_jax.cells import Folder
from lfp_jax.errors import UserError, choose
from lfp_jax.weights import store

_POLL = 2.0  # seconds between looks at what other processes are doing
_HASH = 16  # hex digits of a name: of a million cells two share one once in 4 x 10^7 grids

# Columns of the printed table, as far as they were measured: head, quantity, with its interval.
_COLUMNS = (
    ("bits right", "bit_accuracy", True),
    ("words right", "word_accuracy", True),
    ("key first", "right_user_first", True),
    ("PSNR, dB", "psnr", False),
    ("FD", "fd", False),
    ("evaluations", "generator_evaluations", False),
    ("s/image", "seconds_per_image", False),
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One design point under one attack."""

    name: str  # the hash
    work: str  # hash of the design point: cells that share it are one piece of work
    config: Any
    changes: dict[str, Any]  # what the sweep added, a suite of attacks in its parts


def run(config, workdir, sweep):
    """Measure every cell of a sweep that has no result yet; print a table of all.

    Args:
        config: the design point that the sweep changes, see configs/stylegan2.py.
        workdir: folder of the results, a path or the address of a bucket's folder.
        sweep: called with a function add(**fields).

    Returns:
        The exit status: 0, or 1 where a cell failed.

    Raises:
        UserError: the sweep adds nothing, or a field that the config lacks or cannot hold, or an
            unknown suite of attacks; or a generator cannot be loaded.
    """
    folder, bench = Folder(workdir), experiment.Bench()
    cells = expand(config, sweep, bench)
    states = _States(folder, cells)
    if states.left(cells):
        _work_through(folder, bench, states, cells)
    else:
        print(f"Nothing to do: all {len(cells)} cells are in {folder.path}/cells.")

    # --- show ----------------------------------------------------------------------------------
    sharding.wait_for_all("grid")
    print(table(folder.read_all()))
    done, failed = states.count()
    print(f"{done} cells done, {failed} failed: {folder.path}/cells/")
    return 1 if failed else 0


def expand(config, sweep, bench):
    """List the cells of a sweep, those together that share most; a suite gives one an attack.

    Args:
        config: a ConfigDict.
        sweep: called with a function add(**fields); a mapping changes fields of a nested config, as
            does a name with a dot in `add(**{"lm.bank": 64})`.
        bench: an `experiment.Bench`, which loads the generators.

    Returns:
        Cells, each once.

    Raises:
        UserError: as of `run`.
    """
    added = []
    sweep(lambda **fields: added.append(_flat(fields)))
    if not added:
        raise UserError("The config's sweep(add) adds no cell.")
    cells: dict[str, Cell] = {}
    hashes: dict[str, str] = {}
    for changes in added:
        for each, changed in _split(_change(config, changes), changes):
            source = str(design.generator_settings(each))
            if source not in hashes:
                hashes[source] = bench.generator(each).sha256
            name = _hash(each.to_dict(), hashes[source])
            work = _hash(experiment.point_settings(each), hashes[source])
            cells.setdefault(name, Cell(name, work, each, changed))
    return _together(
        list(cells.values()),
        lambda cell: _hash(design.generator_settings(cell.config)),
        lambda cell: _basis_name(cell.config),
        lambda cell: cell.work,
    )


def _together(cells, *levels):
    """Sort cells so that those alike at the first level stand together, then at the next."""
    values = [[level(cell) for level in levels] for cell in cells]
    first: dict[str, int] = {}  # where a value came first
    for i, row in enumerate(values):
        for value in row:
            first.setdefault(value, i)
    order = sorted(range(len(cells)), key=lambda i: [first[value] for value in values[i]])
    return [cells[i] for i in order]


def _basis_name(config):
    return _hash(design.generator_settings(config), design.basis_settings(config))


def _flat(fields, prefix=""):
    """Give {"a.b": value} of nested mappings."""
    out: dict[str, Any] = {}
    for name, value in fields.items():
        nested = isinstance(value, dict)
        out |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return out


def _change(config, changes):
    """Copy a config and change fields of it, given as {"a.b": value}."""
    cell = copy.deepcopy(config).lock()
    fields = _flat(cell.to_dict())
    for name, value in changes.items():
        choose(name, fields, "config field in sweep(add):")
        try:
            cell.update_from_flattened_dict({name: value})
        except TypeError as error:
            raise UserError(f"sweep(add): {error}") from None
    return cell


def _split(config, changes):
    """Give (config, changes) of each attack, where the config names a whole suite of them."""
    suite, _, row = config.attack.partition(":")
    rows = [row] if row else [attack.name for attack in attacks.suite(suite)]
    for each in rows:
        name = suite if each == suite else f"{suite}:{each}"
        changed = changes | ({"attack": name} if "attack" in changes else {})
        yield _change(config, {"attack": name}), changed


def _hash(*values):
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH]


class _States:
    """Which cells are left: those without a result, and those that failed in an earlier run."""

    def __init__(self, folder, cells):
        self._folder, self._final = folder, {}
        self._attempts = {cell.name: _attempts(folder.read(cell.name)) for cell in cells}
        self.look()

    def look(self):
        """Look what results there are by now."""
        there = self._folder.names()
        for name in self._attempts.keys() & there - self._final.keys():
            record = self._folder.read(name)
            failed = _attempts(record) > 0
            if not failed or _attempts(record) > self._attempts[name]:
                self._final[name] = failed

    def left(self, cells):
        """List those of some cells that were left at the last look."""
        return [cell for cell in cells if cell.name not in self._final]

    def attempts(self, cell):
        """Count the failures of a cell before this run."""
        return self._attempts[cell.name]

    def count(self):
        """Count the cells that are done, and those that failed."""
        failed = sum(self._final.values())
        return len(self._final) - failed, failed


def _attempts(record):
    """Give how often a cell has failed; 0 where it was never tried, or is done."""
    return record["attempts"] if record and "error" in record else 0


def _work_through(folder, bench, states, cells):
    """Do the cells that are left, and wait for those that others are at."""
    works = [list(group) for _, group in itertools.groupby(cells, lambda cell: cell.work)]
    with logs.Progress(len(cells), unit="cells", label="grid", start=sum(states.count())) as line:
        while works := [work for work in works if states.left(work)]:
            idle = True
            for work in works:
                claim = folder.claim(work[0].work) if states.left(work) else None
                if claim is None:
                    continue
                with claim:
                    states.look()  # another process may just have done it
                    for cell in states.left(work):
                        _do(folder, bench, states, cell)
                        idle = False
                        states.look()
                        line.update(sum(states.count()), failed=states.count()[1])
            if idle:
                time.sleep(_POLL)
                states.look()
        line.update(len(cells), failed=states.count()[1])


def _do(folder, bench, states, cell):
    """Measure a cell and write its record; or why it failed."""
    about = {"hash": cell.name, "settings": cell.config.to_dict(), "changes": cell.changes}
    try:
        design.check(cell.config)
        workdir = _prepare(folder, bench, cell.config)
        result = bench.measure(cell.config, workdir)
    except Exception as error:  # whatever it is, other cells may fare better
        if not isinstance(error, UserError):
            traceback.print_exc()
        problem = " ".join(str(error).split()) or type(error).__name__
        folder.write(about | {"error": problem, "attempts": states.attempts(cell) + 1})
        print(f"failed: {_words(cell.changes)}: {problem}", file=sys.stderr, flush=True)
        return
    about |= experiment.about_run(bench.generator(cell.config))
    about |= {"metrics": result.metrics, "reliability": result.reliability}
    about |= {"pictures": f"{cell.name}.png", "rows": list(result.rows)}
    folder.write(about, sheet=experiment.sheet(result.rows))


def _prepare(folder, bench, config):
    """Have the basis of a config fitted, by one process alone, and give its folder."""
    name = _basis_name(config)
    workdir = folder.basis(name)
    there = store.is_store(design.basis_path(workdir))
    with contextlib.nullcontext() if there else folder.wait(f"basis-{name}"):
        bench.prepare(config, workdir)
    return workdir


def table(records):
    """Lay results out as lines of text: what differs between cells, and the main quantities.

    Args:
        records: of `cells.Folder.read_all`.
    """
    fields = _varying(records)
    measured = {name for record in records for name in record.get("metrics", {})}
    columns = [column for column in _COLUMNS if column[1] in measured]
    rows = [[*fields, *(head for head, _, _ in columns)]]
    order = sorted(records, key=lambda record: [_rank(record, name) for name in fields])
    for record in order:
        settings, metrics = _flat(record["settings"]), record.get("metrics", {})
        row = [str(settings.get(name)) for name in fields]
        row += [f"failed: {record['error']}"] if "error" in record else []
        row += [_figure(metrics.get(name), interval) for _, name, interval in columns if metrics]
        rows.append(row)
    whole = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    lines = [[text.ljust(width) for text, width in zip(row, widths, strict=False)] for row in rows]
    ends = [row[len(widths) :] for row in rows]
    return "\n".join("  ".join(line + end).rstrip() for line, end in zip(lines, ends, strict=True))


def _figure(entry, interval):
    """Write a measured value; nothing where it was not measured or, in JSON null, not finite."""
    names = ("value", "low", "high") if interval else ("value",)
    numbers = [entry.get(name) for name in names] if isinstance(entry, dict) else [None]
    if not all(isinstance(number, int | float) and abs(number) < 1e300 for number in numbers):
        return ""
    if not interval:
        return f"{entry['value']:.4g}"
    return f"{entry['value']:.3f} ({entry['low']:.2f}-{entry['high']:.2f})"


def _varying(records):
    """List the fields, {"a.b"}, in which results differ; the attack if there are none."""
    settings = [_flat(record["settings"]) for record in records]
    names = dict.fromkeys(name for each in settings for name in each)
    texts = {name: {json.dumps(each.get(name)) for each in settings} for name in names}
    return [name for name in names if len(texts[name]) > 1] or ["attack"]


def _rank(record, name):
    value = _flat(record["settings"]).get(name)
    return (0, value, "") if isinstance(value, int | float) else (1, 0, str(value))


def _words(changes):
    return ", ".join(f"{name}={value}" for name, value in changes.items()) or "the config as it is"
