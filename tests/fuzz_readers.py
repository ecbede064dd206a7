"""Every reader of files, for tests/test_fuzz.py: how to write what it reads, and how to read it.

Each function imports what it needs: a process that damages images does not load JAX.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable

import fuzz_mutations
import numpy as np

READERS = {}


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader of files."""

    write: Callable  # (folder): writes valid files
    read: Callable  # (folder): reads them; all that is needed is within the functions' reach
    hostile: Callable  # () -> {name: {file name: content}}, to be refused or read in little memory
    damaged: tuple  # endings of the names of files that are damaged
    cost: int  # how many times as long as the cheapest ones a file takes


def _none():
    return {}


def reader(name, write, read, *, hostile=_none, damaged=("",), cost=1):
    """Enter a reader into the table; see `Reader`."""
    READERS[name] = Reader(write, read, hostile, damaged, cost)


# --- images --------------------------------------------------------------------------------------


def _picture(mode="RGB"):
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (9, 13, 4), np.uint8)
    if mode == "I;16":
        return Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(noise[..., 0] if mode == "P" else noise).convert(mode)


def _write_picture(name, mode, **options):
    def write(folder):
        from PIL import Image

        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "turned"
        _picture(mode).save(folder / name, exif=exif, **options)

    return write


def _read_picture(folder):
    from lfp_jax import images

    [path] = folder.iterdir()
    images.read_hashed(path)


def _flat_png(side, depth, colour):
    """Make the PNG of a huge black picture in a few kilobytes."""
    header = side.to_bytes(4) * 2 + bytes([depth, colour, 0, 0, 0])
    row = side * {0: 1, 6: 4}[colour] * depth // 8 + 1
    packer, body = zlib.compressobj(9), b""
    for _ in range(side):
        body += packer.compress(bytes(row))
    chunks = [(b"IHDR", header), (b"IDAT", body + packer.flush()), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(fuzz_mutations.png_chunk(*chunk) for chunk in chunks)


def _huge_pngs():
    kinds = {"16 bits": (16, 0), "RGBA": (8, 6)}
    return {name: {"a.png": _flat_png(8000, *kind)} for name, kind in kinds.items()}


def _postscript():
    """An image in a language that only another program could run."""
    text = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(RAN) (w) file\n%%EOF\n"
    )
    return {"PostScript": {"a.bmp": text}}


reader("png", _write_picture("a.png", "RGBA"), _read_picture, hostile=_huge_pngs)
reader("png of 16 bits", _write_picture("a.png", "I;16"), _read_picture)
reader("png of a palette", _write_picture("a.png", "P"), _read_picture)
reader("jpeg", _write_picture("a.jpg", "RGB"), _read_picture)
reader("webp", _write_picture("a.webp", "RGBA", lossless=True), _read_picture)
reader("tiff", _write_picture("a.tif", "RGB", compression="tiff_lzw"), _read_picture)
reader("bmp", _write_picture("a.bmp", "RGB"), _read_picture, hostile=_postscript)
reader("gif", _write_picture("a.gif", "P"), _read_picture)
reader("ppm", _write_picture("a.ppm", "RGB"), _read_picture)


# --- what users and runs leave -------------------------------------------------------------------


def _write_registry(folder):
    from lfp_jax.registry import DesignPoint, Registry

    point = DesignPoint("demo", "a" * 64, "b" * 64, 64, 448, 1.0, "antipodal", "/bases/1")
    with Registry(folder / "registry.sqlite", create=True) as ledger:
        ledger.add_design(point)
        ledger.register(["alice", "bob", "carol"], design=1)
        ledger.issue("alice", design=1, images=3, noise="constant", settings={"seed": [1, 2]})
        ledger.revoke("carol", design=1)
        verdict = {"p_value": 1e-9, "threshold": 1e-6, "agreeing": 60, "soft_score": 1.0}
        ledger.record_verdict(design=1, key_id=1, image_sha256="c", users=2, **verdict)


def _read_registry(folder):
    from lfp_jax.attribution import verdict
    from lfp_jax.registry import Registry

    with Registry(folder / "registry.sqlite") as ledger:
        for number, point in ledger.designs().items():
            packed = ledger.packed_keys(design=number)
            verdict.index(packed.packed, bits=point.bits)
            ledger.noises(design=number)
            for key in packed.ids:
                ledger.key(ledger.key_by_id(int(key)).user, design=number)
        for entry in list(ledger.export(show_keys=True)):
            ledger.issues(entry["user"])
        ledger.register(["dave"], design=1)
        ledger.issue("dave", design=1, images=1, noise="constant", settings={})


def _strange_schemas():
    """Registries of a schema that would do more than keep rows."""
    found = {}
    bomb = (
        "CREATE TRIGGER bomb AFTER INSERT ON users BEGIN SELECT length(randomblob(900000000)); END"
    )
    view = "CREATE VIEW more AS SELECT zeroblob(900000000) AS x"
    for name, sql in (("a trigger", bomb), ("a view", view), ("a column", _GENERATED)):
        found[name] = {"registry.sqlite": _changed_registry(sql)}
    return found


_GENERATED = "ALTER TABLE users ADD COLUMN more AS (length(zeroblob(900000000)))"


def _changed_registry(sql):
    import sqlite3
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        _write_registry(folder)
        database = sqlite3.connect(folder / "registry.sqlite")
        database.execute(sql)
        database.commit()
        database.close()
        return (folder / "registry.sqlite").read_bytes()


reader("registry", _write_registry, _read_registry, hostile=_strange_schemas, cost=4)


def _rate(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "images": 24}


def _record(**more):
    settings = {
        "generator": "demo",
        "bits": 64,
        "strength": 1.0,
        "attack": "none",
        "lm": {"bank": 8},
    }
    bins = {"lowest": 0.0, "highest": 0.5, "stated": 0.2, "wrong": 0.2, "low": 0.1, "high": 0.3}
    metrics = {
        "bit_accuracy": _rate(0.9), "psnr": _rate(40.0) | {"unit": "dB"},
        "right_user_first": _rate(1.0) | {"decoys": 1000},
        "fd": _rate(30.0) | {"features": "demo", "reference": "held-out", "images": 50},
    }  # fmt: skip
    about = {"generator": {"name": "demo", "sha256": "ab"}, "versions": {"jax": "0.10"}}
    record = {"settings": settings, "metrics": metrics, "reliability": [bins | {"bits": 99}]}
    return record | about | more


def _write_cells(folder):
    from lfp_jax import images

    (folder / "cells").mkdir()
    record = _record(hash="a", changes={"strength": 1.0}, rows=["plain"], pictures="a.png")
    (folder / "cells" / "a.json").write_text(json.dumps(record))
    images.write_png(folder / "cells" / "a.png", np.zeros((8, 8, 3), np.uint8))
    failed = {"hash": "b", "settings": record["settings"] | {"bits": 32}, "changes": {},
              "error": "UserError: too much", "attempts": 1}  # fmt: skip
    (folder / "cells" / "b.json").write_text(json.dumps(failed))


def _write_metrics(folder):
    record = _record()
    metrics = record.pop("metrics")
    (folder / "metrics.json").write_text(json.dumps(record | metrics))


def _read_results(folder):
    from lfp_jax.report import results, tables

    cells, problems = results.read(folder)
    assert not any("\n" in problem for problem in problems)
    tables.to_csv(cells)


def _write_report(folder):
    from lfp_jax.report import html

    html.write(folder)


def _read_grid(folder):
    from lfp_jax import cells, grid

    there = cells.Folder(folder)
    for record in there.read_all():
        grid._attempts(record)
    grid.table(there.read_all())


def _strange_pictures():
    """Cells whose picture lies elsewhere."""
    named = ("../outside.png", "/outside.png", "outside.png\0", "..", "a" * 999)
    return {
        name: {"cells/a.json": json.dumps(_record(pictures=name)).encode()} for name in named
    } | _deep_settings()


def _deep_settings():
    """Settings nested just as deep as the parser lets pass, and what comes after it may not."""
    found, record = {}, json.dumps(_record(settings={"deep": None}))
    for depth in range(940, 1000, 3):
        deep = '{"a":' * depth + "0" + "}" * depth
        found[f"{depth} deep"] = {"cells/a.json": record.replace("null", deep).encode()}
    return found


reader("cells of a report", _write_cells, _read_results, hostile=_strange_pictures)
reader("metrics.json", _write_metrics, _read_results)
reader("report", _write_cells, _write_report, damaged=(".json",), cost=50)
reader(
    "cells of a grid", _write_cells, _read_grid, hostile=_deep_settings, damaged=(".json",), cost=3
)


def _write_claim(folder):
    (folder / "claims").mkdir()
    holder = {"host": "elsewhere", "pid": 1, "token": "ab", "time": 1.0, "released": True}
    (folder / "claims" / "work.0").write_text(json.dumps(holder))


def _read_claim(folder):
    from lfp_jax import cells

    claim = cells.Folder(folder).claim("work")
    if claim is not None:
        with claim:
            pass


def _own_claims():
    import socket

    holder = {"host": socket.gethostname(), "released": False}
    pids = (0, -1, 10**30, "1", None, 1.5)
    found = {
        f"process {pid}": {"claims/work.0": json.dumps(holder | {"pid": pid}).encode()}
        for pid in pids
    }
    return found | {"another name": {"claims/work.old": b"{}"}}


reader("claims", _write_claim, _read_claim, hostile=_own_claims)


def _write_spectrum(folder):
    content = {"basis": "pca", "stddev": [2.0, 1.0], "sensitivity": [0.1, 0.2]}
    (folder / "spectrum.json").write_text(json.dumps(content))


def _read_spectrum(folder):
    from lfp_jax.report import spectrum

    spectrum.read(folder / "spectrum.json")


reader("spectrum.json", _write_spectrum, _read_spectrum)


def _write_labels(folder):
    (folder / "choices.json").write_text(json.dumps({"eyes": ["open", "shut"]}))
    rows = [{"file": f"{i}.png", "labels": {"eyes": i % 2}, "split": split}
            for i, split in enumerate(("train", "held_out", "train"))]  # fmt: skip
    (folder / "labels.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def _read_labels(folder):
    from lfp_jax.training import data

    choices = data.read_choices(folder)
    for split in data.SPLITS:
        list(data._rows(folder, split, choices))


def _pictures_elsewhere():
    rows = {}
    for name in ("../outside.png", "/outside.png", "..", "", "a/../../outside.png"):
        row = {"file": name, "labels": {"eyes": 0}, "split": "train"}
        rows[f"picture {name!r}"] = {"labels.jsonl": f"{json.dumps(row)}\n".encode()}
    return rows


reader("labels of pictures", _write_labels, _read_labels, hostile=_pictures_elsewhere)


def _write_log(folder):
    from lfp_jax import logs

    log = logs.MetricLog(folder / "metrics.jsonl")
    for step in range(4):
        log.write(step, loss=0.5, rate=3)


def _read_log(folder):
    from lfp_jax import logs

    logs.MetricLog(folder / "metrics.jsonl").truncate(2)


reader("log", _write_log, _read_log)
