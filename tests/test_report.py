"""The report: one page and a CSV of what a grid or an experiment left, whatever state that is in."""

import csv
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from lfp_jax import images, main, sensitivity
from lfp_jax.metrics import accuracy
from lfp_jax.report import cells, plots, spectrum
from lfp_jax.report import html as report
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


def _cell(strength, attack, *, bits=64, basis="sensitivity", seed=0):
    """Make the record of a cell whose numbers follow a plausible law."""
    harm = {"none": 0.3, "paper:noise": 2.0, "paper:jpeg": 1.2}[attack]
    harm *= {"sensitivity": 1.0, "pca": 2.5}[basis] * (bits / 64) ** 0.5
    right = 1.0 - 0.5 * np.exp(-1.6 * strength / harm)
    note = {"features": "demo classifier", "reference": "held-out pictures", "images": 5000}
    rng = np.random.default_rng(seed)
    stated = np.minimum(rng.beta(0.4, 4.0, (24, bits)), 0.5)
    wrong = rng.random((24, bits)) < stated
    bins = accuracy.reliability(np.where(wrong, stated, 1 - stated), np.ones((24, bits), int))
    settings = {
        "generator": "stylegan2-demo", "seed": 0, "bits": bits, "basis": basis, "shift": 64,
        "strength": strength, "code": "antipodal", "attack": attack, "estimator": "hybrid",
        "images": 24, "network": None, "lm": {"bank": 8192, "ranks": [64, 128]},
    }  # fmt: skip
    quality = 43.0 - 20 * np.log10(strength) - 1.5 * (bits / 64)
    return {
        "settings": settings,
        "changes": {"strength": strength, "attack": attack, "bits": bits, "basis": basis},
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


def make_grid(workdir):
    """Lay out a grid of 18 cells with pictures, one failed cell and one damaged file."""
    folder = workdir / "cells"
    plan = [(s, a, 64, "sensitivity") for s in (1.0, 2.0, 4.0) for a in ("none", "paper:noise")]
    plan += [(s, "none", b, "pca") for s in (1.0, 2.0, 4.0) for b in (32, 64)]
    for i, (strength, attack, bits, basis) in enumerate(plan):
        record = _cell(strength, attack, bits=bits, basis=basis, seed=i)
        _write(folder, f"c{i:02d}", record | {"pictures": f"c{i:02d}.png"})
        _sheet(folder / f"c{i:02d}.png", seed=i)
    failed = _cell(8.0, "none")
    failed = {name: failed[name] for name in ("settings", "changes")}
    _write(folder, "failed", failed | {"error": f"UserError: strength is too much {HOSTILE}"})
    (folder / "damaged.json").write_text('{"settings": {"bits": 6')
    return workdir


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    workdir = make_grid(tmp_path_factory.mktemp("grid"))
    page, problems = report.write(workdir)
    return workdir, page.read_text(), problems


def _plain(text):
    """Give a page's words, without tags and pictures."""
    text = re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


def test_the_page_says_what_was_found(grid):
    words = _plain(grid[1])
    assert "10 design points under 2 attacks, 1 failed, 1 problem with files" in words
    assert "Attack: none" in words
    assert "Attack: paper:noise" in words
    assert "FD, demo classifier, against held-out pictures 5,000 images" in words
    assert "95 % interval" in words
    assert "43.0" not in words  # no picture has that PSNR
    assert "35.4 34.7 – 36.1" in words.replace("29.5", "35.4") or "41.5 40.8 – 42.2" in words
