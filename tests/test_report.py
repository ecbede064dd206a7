"""The report: one page and a CSV of what a grid or an experiment left, in whatever state."""

import base64
import csv
import html
import json
import re
import shutil
import subprocess
import xml.dom.minidom

import numpy as np
import pytest

from bench import tradeoff
from lfp_jax import basis, images, main, sensitivity
from lfp_jax.metrics import accuracy
from lfp_jax.report import html as report
from lfp_jax.report import results, spectrum
from lfp_jax.weights import store

HOSTILE = '<script>alert("x")</script>'
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
ROWS = ["plain", "fingerprinted", "difference x 10", "reconstruction"]


def _rate(value, n=24):
    low, high = accuracy.wilson(value * n, n)
    return {"value": value, "low": low, "high": high, "images": n}


def _around(value, spread, **more):
    return {"value": value, "low": value - spread, "high": value + spread, "images": 24, **more}


def _cell(strength, attack, *, bits=64, directions="sensitivity", seed=0):
    """Make the record of a cell whose numbers follow a plausible law."""
    harm = {"none": 0.3, "paper:noise": 2.0, "paper:jpeg": 1.2}[attack]
    harm *= {"sensitivity": 1.0, "pca": 2.5}[directions] * (bits / 64) ** 0.5
    right = 1.0 - 0.5 * np.exp(-1.6 * strength / harm)
    note = {"features": "demo classifier", "reference": "held-out pictures", "images": 5000}
    rng = np.random.default_rng(seed)
    stated = np.minimum(rng.beta(0.4, 4.0, (24, bits)), 0.5)
    wrong = rng.random((24, bits)) < stated
    bins = accuracy.reliability(np.where(wrong, stated, 1 - stated), np.ones((24, bits), int))
    settings = {
        "generator": "stylegan2-demo", "seed": 0, "bits": bits, "basis": directions, "shift": 64,
        "strength": strength, "code": "antipodal", "attack": attack, "estimator": "hybrid",
        "images": 24, "network": None, "lm": {"bank": 8192, "ranks": [64, 128]},
    }  # fmt: skip
    quality = 43.0 - 20 * np.log10(strength) - 1.5 * (bits / 64)
    return {
        "settings": settings,
        "changes": {"strength": strength, "attack": attack, "bits": bits, "basis": directions},
        "metrics": {
            "bit_accuracy": _rate(round(right * 24) / 24),
            "word_accuracy": _rate(round(right**bits * 24) / 24),
            "right_user_first": _rate(1.0) | {"decoys": 100_000},
            "psnr": _around(quality, 0.7, unit="dB"),
            "ssim": _around(1 - 0.0025 * strength**2, 0.004),
            "fd_plain": _around(28.9, 0.5) | note,
            "fd": _around(28.9 + 0.4 * strength**2, 0.5) | note,
            "generator_evaluations": _around(620.0, 80.0),
            "seconds_per_image": {"value": 3.21, "images": 24, "setup_seconds": 1.0},
        },
        "reliability": [vars(each) for each in bins],
        "generator": {"name": "stylegan2-demo", "sha256": "ab" * 32},
        "versions": {"jax": "0.10.2", "numpy": "2.3"},
        "rows": ROWS,
        "pictures": None,
    }


def _write(folder, name, record):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"hash": name, **record}))


def _sheet(path, seed=0):
    tiles = np.random.default_rng(seed).integers(0, 255, (4 * 34 + 2, 8 * 34 + 2, 3))
    images.write_png(path, tiles.astype(np.uint8))


def _grid(workdir):
    """Lay out a grid of 12 cells with pictures, one failed cell and one damaged file."""
    folder = workdir / "cells"
    plan = [(s, a, 64, "sensitivity") for s in (1.0, 2.0, 4.0) for a in ("none", "paper:noise")]
    plan += [(s, "none", b, "pca") for s in (1.0, 2.0, 4.0) for b in (32, 64)]
    for i, (strength, attack, bits, directions) in enumerate(plan):
        record = _cell(strength, attack, bits=bits, directions=directions, seed=i)
        _write(folder, f"c{i:02d}", record | {"pictures": f"c{i:02d}.png"})
        _sheet(folder / f"c{i:02d}.png", seed=i)
    failed = _cell(8.0, "none")
    failed = {name: failed[name] for name in ("settings", "changes")}
    _write(folder, "failed", failed | {"error": f"UserError: strength is too much {HOSTILE}"})
    (folder / "damaged.json").write_text('{"settings": {"bits": 6')
    return workdir


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    workdir = _grid(tmp_path_factory.mktemp("grid"))
    page, problems = report.write(workdir)
    return workdir, page.read_text(encoding="utf-8"), problems


def _words(page):
    """Give a page's words, without tags and pictures."""
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def _plots(page):
    """Give the SVG text of a page's plots by their alternative texts."""
    found = re.findall(r'src="data:image/svg\+xml;base64,([^"]*)" alt="([^"]*)"', page)
    return {alt: base64.b64decode(data).decode() for data, alt in found}


def test_the_page_says_what_was_found(grid):
    words = _words(grid[1])
    assert "9 design points under 2 attacks, 1 failed, 1 problem with files." in words
    assert "strength 1, 2, 4, 8" in words  # what varies
    assert "lm.ranks 64, 128" in words  # what does not
    assert "Attack: none" in words
    assert "Attack: paper:noise" in words
    assert "FD demo classifier, against held-out pictures 5,000 images" in words
    assert "right key first of 100,000 24 images" in words
    assert "41.5 40.8 – 42.2" in words  # PSNR at strength 1, with its interval
    assert "sha256 " + "ab" * 32 in words


def test_another_method_stands_beside_the_grid(tmp_path):
    for strength in (1.0, 2.0):
        _write(tmp_path / "cells", f"c{strength}", _cell(strength, "none"))
    record = _cell(1.0, "none")
    own = {"generator": "stylegan2-demo", "estimator": "shallow", "attack": "none", "bits": None}
    _write(tmp_path / "cells", "other", record | {"settings": own})
    page = report.write(tmp_path)[0].read_text(encoding="utf-8")
    words = _words(page)
    assert "estimator hybrid, shallow" in words
    assert "lm.ranks 64, 128" in words  # still common to all that have it
    assert "basis sensitivity" in words
    assert "shallow" in "".join(_plots(page).values())


def test_the_benchmark_draws_a_grid_method_by_method(tmp_path, capsys):
    def drawn():
        tradeoff.main(["--workdir", str(tmp_path), "--plot", str(tmp_path / "plot.png")])
        assert "damaged.json" in capsys.readouterr().out
        return images.decode_png((tmp_path / "plot.png").read_bytes())

    _grid(tmp_path)
    alone = drawn()
    own = {"estimator": "shallow", "attack": "paper:noise", "bits": None}
    _write(tmp_path / "cells", "other", _cell(1.0, "paper:noise") | {"settings": own})
    both = drawn()
    assert both.std() > 10.0
    assert both.shape != alone.shape or (both != alone).any()


def test_plots_name_axes_units_and_features(grid):
    plots_of = _plots(grid[1])
    titles = [alt.partition(".")[0].removeprefix("Plot: ") for alt in plots_of]
    for title in (
        "Accuracy against PSNR under each attack", "Accuracy against FD under none",
        "Accuracy against strength under paper:noise", "Accuracy against bits under none",
        "Reliability of soft bits under none",
    ):  # fmt: skip
        assert title in titles
    assert "Accuracy against shift under none" not in titles  # it does not vary
    assert "Accuracy against bits under paper:noise" not in titles
    text = next(svg for alt, svg in plots_of.items() if "against FD under none" in alt)
    for label in ("FD, demo classifier, against held-out pictures", "bit accuracy", "plain images"):
        assert label in text


def test_points_that_no_other_beats_are_marked(grid):
    none = grid[1].split("Attack: none")[1].split("</table>")[0]
    rows = [_words(row) for row in none.split("<tr")[2:]]
    marked = [row for row in rows if 'class="front">' in row]
    assert len(rows) == 9
    # Among 64 bits sensitivity beats pca; 32 bits of pca have the highest PSNR.
    assert [row.split()[2:6] for row in marked] == [
        ["pca", "32", "1", "0.958"], ["sensitivity", "64", "1", "1.000"]
    ]  # fmt: skip


def test_a_failed_cell_and_a_damaged_file_are_told(grid):
    workdir, page, problems = grid
    assert "UserError: strength is too much" in _words(page)
    [problem] = problems
    assert problem.startswith(f"'{workdir}/cells/damaged.json' is left out: it holds no JSON")
    assert problem in _words(page)


def test_the_page_needs_nothing_else(grid):
    sources = re.findall(r'(?:src|href)="([^"#]+)', grid[1])
    assert {each.split(",")[0].split(":")[0] for each in sources} == {"data", "report.csv"}
    assert "@import" not in grid[1]
    assert "url(" not in grid[1]


def test_the_csv_holds_every_cell(grid):
    rows = list(csv.DictReader((grid[0] / "report.csv").read_text().splitlines()))
    assert len(rows) == 13
    [row] = [row for row in rows if row["cell"] == "c00"]
    assert (row["strength"], row["lm.bank"], row["attack"]) == ("1", "8192", "none")
    assert float(row["psnr"]) == pytest.approx(41.5)
    assert float(row["psnr_low"]) == pytest.approx(40.8)
    assert row["fd_note"] == "demo classifier, against held-out pictures"
    assert [row["error"][:9] for row in rows if row["cell"] == "failed"] == ["UserError"]


def test_the_same_results_give_the_same_page(grid, tmp_path):
    shutil.copytree(grid[0], tmp_path / grid[0].name)
    page, _ = report.write(tmp_path / grid[0].name)
    again = page.read_text(encoding="utf-8").replace(str(tmp_path / grid[0].name), str(grid[0]))
    assert again == grid[1]


def test_whatever_files_say_is_escaped(tmp_path):
    for i, attack in enumerate((HOSTILE, "none")):
        record = _cell(1.0, "none")
        record["settings"] |= {"attack": attack, "generator": HOSTILE, HOSTILE: HOSTILE + str(i)}
        record["metrics"] |= {HOSTILE: _around(1.0, 0.1, unit=HOSTILE)}
        record["metrics"]["fd"]["features"] = HOSTILE
        record |= {"rows": [HOSTILE], "versions": {HOSTILE: HOSTILE}, "pictures": f"c{i}.png"}
        record["generator"] = {"name": HOSTILE}
        _write(tmp_path / "cells", f"c{i}", record)
        _sheet(tmp_path / "cells" / f"c{i}.png")
    _write(tmp_path / "cells", "failed", _cell(1.0, "none") | {"error": HOSTILE})
    _write(tmp_path / "cells", "refused", _cell(2.0, "none") | {"pictures": f"../{HOSTILE}"})
    page = report.write(tmp_path)[0].read_text(encoding="utf-8")
    assert "<script" not in page
    assert _words(page).count(HOSTILE) > 15
    for alt, svg in _plots(page).items():
        assert "<script" not in svg + alt


def test_names_of_any_kind_are_drawn_as_they_are(tmp_path):
    for i, name in enumerate(("$\\frac$ _^ \x01", "x" * 300)):
        record = _cell(1.0, "none")
        record["settings"]["estimator"] = name
        record["metrics"]["fd"]["features"] = name
        _write(tmp_path / "cells", f"c{i}", record)
    drawn = _plots(report.write(tmp_path)[0].read_text(encoding="utf-8"))
    for svg in drawn.values():
        xml.dom.minidom.parseString(svg)
    reliability = drawn[next(alt for alt in drawn if "Reliability" in alt)]
    assert "$\\frac$ _^  <" in reliability
    assert "x" * 39 + "…" in reliability


DAMAGED = {
    "nothing": b"",
    "a cut": b'{"settings": {"bits": 6',
    "not UTF-8": b'{"settings": "\xff\xfe"}',
    "a list": b"[1, 2]",
    "nested": b"[" * 100_000,
    "no settings": b'{"metrics": {}}',
    "settings of text": b'{"settings": "all", "metrics": {}}',
    "no metrics": b'{"settings": {"bits": 8}}',
    "a text for a number": b'{"settings": {"a": 1}, "metrics": {"psnr": {"value": "high"}}}',
    "out of range": b'{"settings": {"a": 1}, "metrics": {"psnr": {"value": 1' + b"0" * 400 + b"}}}",
    "half a bin": b'{"settings": {"a": 1}, "metrics": {}, "reliability": [{"stated": 0.1}]}',
    "bins of text": b'{"settings": {"a": 1}, "metrics": {}, "reliability": "good"}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_file_is_one_line_and_the_others_are_read(content, tmp_path):
    _write(tmp_path / "cells", "whole", _cell(1.0, "none"))
    (tmp_path / "cells" / "broken.json").write_bytes(content)
    cells, [problem] = results.read(tmp_path)
    assert [cell.name for cell in cells] == ["whole"]
    assert problem.startswith(f"'{tmp_path}/cells/broken.json' is left out: ")
    assert "\n" not in problem
    assert len(problem) < 400


def test_a_count_of_decoys_beyond_all_floats_is_left_out(tmp_path):
    record = json.dumps(_cell(1.0, "none")).replace('"decoys": 100000', '"decoys": 1e999')
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "c.json").write_text(record)
    [cell], problems = results.read(tmp_path)
    assert not problems
    assert cell.quantities["right_user_first"].note == ""


def test_only_damaged_files_still_make_a_page(tmp_path):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "broken.json").write_bytes(b"")
    page, [problem] = report.write(tmp_path)
    assert problem in _words(page.read_text(encoding="utf-8"))


def test_what_was_not_measured_is_left_open(tmp_path):
    lacking = _cell(1.0, "none")
    lacking["metrics"] = {"psnr": {"value": float("nan"), "low": None, "high": None, "images": 4}}
    _write(tmp_path / "cells", "a", lacking | {"reliability": []})
    _write(tmp_path / "cells", "b", _cell(2.0, "none"))
    page, problems = report.write(tmp_path)
    assert not problems
    assert "1 – – – 35.5" not in _words(page.read_text(encoding="utf-8"))
    assert page.read_text(encoding="utf-8").count('class="none"') == 9


@pytest.mark.parametrize("name", ["../out.png", "/etc/hostname", "link.png", "", 3, "a/b.png"])
def test_a_picture_out_of_the_folder_is_refused(name, tmp_path):
    _write(tmp_path / "cells", "a", _cell(1.0, "none") | {"pictures": name})
    _sheet(tmp_path / "out.png")
    (tmp_path / "cells" / "link.png").symlink_to(tmp_path / "out.png")
    [cell], [problem] = results.read(tmp_path)
    assert cell.picture is None
    assert problem.startswith(f"'{tmp_path}/cells/a.json': the picture {name!r} is refused")


@pytest.mark.parametrize("content", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\n and no more"])
def test_a_damaged_picture_is_a_line(content, tmp_path):
    _write(tmp_path / "cells", "a", _cell(1.0, "none") | {"pictures": "a.png"})
    if content is not None:
        (tmp_path / "cells" / "a.png").write_bytes(content)
    [cell], [problem] = results.read(tmp_path)
    assert cell.picture is None
    assert problem.startswith(f"'{tmp_path}/cells/a.json': the picture 'a.png' is left out: ")


def test_many_pictures_come_as_jpeg(tmp_path, monkeypatch):
    _write(tmp_path / "cells", "a", _cell(1.0, "none") | {"pictures": "a.png"})
    _sheet(tmp_path / "cells" / "a.png")
    page = report.write(tmp_path)[0].read_text(encoding="utf-8")
    [data] = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    assert base64.b64decode(data) == (tmp_path / "cells" / "a.png").read_bytes()
    monkeypatch.setattr(report, "_MOST_BYTES", 1000)
    page = report.write(tmp_path)[0].read_text(encoding="utf-8")
    [data] = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', page)
    assert images.decode_jpeg(base64.b64decode(data)).shape == (138, 274, 3)


def _experiment(workdir, attack):
    record = _cell(1.0, attack)
    metrics = record.pop("metrics")
    kept = {name: record[name] for name in ("settings", "versions", "generator", "reliability")}
    workdir.mkdir(exist_ok=True)
    (workdir / "metrics.json").write_text(json.dumps(metrics | kept))
    _sheet(workdir / "grid.png")


def test_an_experiment_is_a_report_of_one_design_point(tmp_path, capsys):
    _experiment(tmp_path, "paper:noise")
    assert main.main(["main", "--mode=report", f"--workdir={tmp_path}"]) == 0
    assert f"Report: {tmp_path}/report.html" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "1 design point." in _words(page)
    assert "Attack: paper:noise" in _words(page)
    assert "in rows: plain, fingerprinted, difference x 10, attacked, reconstructed." in page


def test_a_config_names_the_default_workdir(tmp_path, monkeypatch, capsys, pytestconfig):
    monkeypatch.chdir(tmp_path)
    config = f"--config={pytestconfig.rootpath}/configs/stylegan2.py"
    assert main.main(["main", "--mode=report", config]) == 2
    assert "'runs/stylegan2' holds no results to report" in capsys.readouterr().err
    assert main.main(["main", "--mode=report"]) == 2
    assert "--mode=report needs --workdir=DIR" in capsys.readouterr().err
    (tmp_path / "runs").mkdir()
    _experiment(tmp_path / "runs" / "stylegan2", "none")
    assert main.main(["main", "--mode=report", config]) == 0
    assert (tmp_path / "runs" / "stylegan2" / "report.csv").exists()


def test_problems_are_said_and_make_status_1(tmp_path, capsys):
    _experiment(tmp_path, "none")
    (tmp_path / "grid.png").write_bytes(b"")
    (tmp_path / "spectrum.json").write_text('{"basis": "pca", "stddev": [1], "sensitivity": []}')
    assert main.main(["main", "--mode=report", f"--workdir={tmp_path}"]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lfp_jax: ")]
    assert "the picture 'grid.png' is left out" in lines[0]
    assert "spectrum.json' is left out" in lines[1]


# --- the Jacobian's spectrum --------------------------------------------------------------------
def _bases():
    """Make latents' principal directions [4, 4], and the same spread turned to a metric."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 4))
    metric = (root.T @ root).astype(np.float32)
    principal = basis.fit(rng.normal(size=(500, 4)) * [4.0, 2.0, 1.0, 0.5])
    return principal, basis.turn(principal, metric), metric


def test_image_change_along_directions_is_that_of_the_jacobian():
    jacobian = np.random.default_rng(1).normal(size=(6, 3))
    found = sensitivity.along(jacobian.T @ jacobian, np.eye(3)[:, :2])
    np.testing.assert_allclose(found, np.linalg.norm(jacobian[:, :2], axis=0))


def test_principal_directions_are_found_again_in_a_turned_basis():
    principal, turned, metric = _bases()
    [own] = spectrum.along(vars(principal), metric, name="pca")
    first, second = spectrum.along(vars(turned), metric, name="sensitivity")
    assert (own[0], first[0], second[0]) == ("pca", "sensitivity", "pca")
    for mine, found in zip(own[1:], second[1:], strict=True):
        np.testing.assert_allclose(found, mine, rtol=1e-3)
    assert (np.diff(first[2]) < 0).all()  # turned to the metric's axes


@pytest.mark.parametrize("where", ["basis", "bases/0123/basis"])
def test_a_stored_basis_gives_the_page_its_spectrum(where, tmp_path):
    _write(tmp_path / "cells", "a", _cell(1.0, "none"))
    _, turned, metric = _bases()
    arrays = {name: np.asarray(each) for name, each in vars(turned).items() if each is not None}
    metadata = {"directions": "sensitivity", "pixels": 6}
    store.save(tmp_path / where, {"basis": arrays, "metric": metric}, metadata)
    found = [each for path in spectrum.find(tmp_path) for each in spectrum.read(path)]
    assert [each.basis for each in found] == ["sensitivity", "pca"]
    change = sensitivity.along(metric, turned.components) / 6**0.5  # rms of six pixels
    np.testing.assert_allclose(found[0].sensitivity, change, rtol=1e-5)
    [svg] = [
        svg for alt, svg in _plots(report.write(tmp_path)[0].read_text()).items() if "move" in alt
    ]
    for text in ("image change, rms", "pca, by one std. dev.", "position of the direction"):
        assert text in svg


def test_a_spectrum_file_goes_before_the_basis(tmp_path):
    _write(tmp_path / "cells", "a", _cell(1.0, "none"))
    record = {"basis": "pca", "stddev": [2.0, 1.0], "sensitivity": [0.2, 0.1]}
    (tmp_path / "spectrum.json").write_text(json.dumps(record))
    page, problems = report.write(tmp_path)
    assert not problems
    assert "pca: 2 directions" in page.read_text(encoding="utf-8")


# --- in a browser -------------------------------------------------------------------------------
_PROBE = """<!doctype html><meta charset="utf-8"><pre id="found"></pre><script>
const page = %s, found = {};
const probe = (width) => new Promise((done) => {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  frame.onload = () => {
    const inside = frame.contentDocument, root = inside.documentElement;
    const boxed = (e) => e.closest(".scroll") !== null && !e.classList.contains("scroll");
    const out = [...inside.body.querySelectorAll("*")].filter(
      (e) => !boxed(e) && e.getBoundingClientRect().right > width + 0.5);
    const pictures = [...inside.images];
    found[width] = {
      width: root.scrollWidth, pictures: pictures.length,
      unloaded: pictures.filter((e) => !e.complete || e.naturalWidth === 0).length,
      nameless: pictures.filter((e) => !e.alt).length,
      out: out.map((e) => `${e.tagName} ${e.className}`),
      scrolls: [...inside.querySelectorAll(".scroll")].filter(
        (e) => e.scrollWidth > e.clientWidth).length,
    };
    done();
  };
  frame.srcdoc = page;
  document.body.append(frame);
});
probe(400).then(() => probe(1200)).then(() => {
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_in_a_browser_pictures_load_and_nothing_overflows(grid, tmp_path):
    probe = tmp_path / "probe.html"
    text = json.dumps(grid[1]).replace("</", "<\\/")  # it must not end the script
    probe.write_text(_PROBE % text, encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/user",
        "--window-size=1300,1000", "--timeout=60000", "--dump-dom", probe.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(re.search(r'<pre id="found">(\{.*?\})</pre>', done.stdout)[1])
    pictures = grid[1].count("<img ")
    assert pictures > 20
    for width, page in found.items():
        assert page["width"] <= int(width)
        assert page["pictures"] == pictures
        assert page["unloaded"] == page["nameless"] == 0
        assert page["out"] == []
    assert found["400"]["scrolls"] > 0  # there was something to keep in
