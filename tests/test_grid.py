"""The grid: each cell once, whatever stops or joins it; the same numbers as a single experiment."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from grid_stand_in import StandIn, run

from configs import stylegan2_grid
from lfp_jax import basis, cells, design, experiment, grid, images, main, quality
from lfp_jax.attribution import bank
from lfp_jax.errors import UserError
from lfp_jax.report import results

CONFIG = "configs/stylegan2_grid.py:tiny"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Put the stand-in in place of the bench."""
    bench = type("Bench", (StandIn,), {"log": tmp_path / "log"})
    monkeypatch.setattr(experiment, "Bench", bench)
    return bench


def _measured(bench):
    """Give (process, strength, attack) of each measurement."""
    return [tuple(line.split()) for line in bench.log.read_text().splitlines()]


def _records(workdir):
    return [json.loads(path.read_text()) for path in sorted((workdir / "cells").glob("*.json"))]


# --- what the cells are ----------------------------------------------------------------------


def _expand(*added):
    def sweep(add):
        for fields in added:
            add(**fields)

    return grid.expand(stylegan2_grid.get_config("tiny"), sweep, StandIn())


def test_a_suite_stands_for_its_attacks_and_a_cell_is_listed_once():
    found = _expand({"attack": "none"}, {"attack": "paper"}, {"attack": "paper:blur"})
    names = ["none", "paper:noise", "paper:blur", "paper:jpeg", "paper:combination"]
    assert [cell.config.attack for cell in found] == names
    assert [cell.changes for cell in found] == [{"attack": name} for name in names]
    assert len({cell.name for cell in found}) == 5
    assert len({cell.work for cell in found}) == 1


def test_nested_fields_change_by_a_mapping_or_a_dot():
    first, second = _expand({"lm": {"bank": 8, "starts": 1}}, {"lm.bank": 9})
    assert (first.config.lm.bank, first.config.lm.starts, first.config.lm.chords) == (8, 1, 12)
    assert (second.config.lm.bank, second.changes) == (9, {"lm.bank": 9})
    assert first.work == second.work  # of the estimator: the images are the same


def test_cells_that_share_most_are_together():
    points = [
        {"strength": 1.0, "basis": "pca"},
        {"strength": 1.0, "basis": "sensitivity"},
        {"strength": 2.0, "basis": "pca"},
        {"strength": 1.0, "basis": "pca", "attack": "paper:blur"},
    ]
    order = [
        (cell.config.basis, cell.config.strength, cell.config.attack) for cell in _expand(*points)
    ]
    assert order == [
        ("pca", 1.0, "none"),
        ("pca", 1.0, "paper:blur"),
        ("pca", 2.0, "none"),
        ("sensitivity", 1.0, "none"),
    ]


@pytest.mark.parametrize(
    ("added", "says"),
    [
        ([], "adds no cell"),
        ([{"strenght": 1.0}], "Unknown config field in sweep(add): 'strenght'. Did you mean 'stre"),
        ([{"bits": 1.5}], "sweep(add): Could not override field 'bits'"),
        ([{"attack": "papr"}], "Unknown suite 'papr'. Did you mean 'paper'?"),
    ],
)
def test_a_mistake_in_a_sweep_is_said_in_one_line(added, says):
    with pytest.raises(UserError) as error:
        _expand(*added)
    assert says in str(error.value)


# --- each once ---------------------------------------------------------------------------------


def test_a_second_run_does_nothing_and_says_so(stand_in, tmp_path, capsys):
    assert run(tmp_path / "grid") == 0
    assert len(_measured(stand_in)) == 10
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "grid" / "cells").iterdir()}
    assert len(before) == 20
    capsys.readouterr()
    assert run(tmp_path / "grid") == 0
    assert "Nothing to do: all 10 cells" in capsys.readouterr().out
    assert len(_measured(stand_in)) == 10
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "grid" / "cells").iterdir()}


def test_a_result_says_all_that_a_report_needs(stand_in, tmp_path):
    assert run(tmp_path) == 0
    for record in _records(tmp_path):
        assert set(record) == {
            "hash", "settings", "changes", "metrics", "reliability", "generator", "versions",
            "pictures", "rows",
        }  # fmt: skip
        assert record["settings"]["strength"] == record["changes"]["strength"]
        assert record["settings"]["lm"]["bank"] == 256
        assert record["rows"] == ["plain", "fingerprinted"]
        assert record["generator"]["sha256"] == "0" * 64
        assert record["pictures"] == f"{record['hash']}.png"
        assert (
            images.read(tmp_path / "cells" / record["pictures"]).shape[1] == 2 * (8 + 2) * 12 + 24
        )
    found, problems = results.read(tmp_path)
    assert (len(found), problems) == (10, [])


def test_another_setting_is_another_cell(stand_in, tmp_path):
    assert run(tmp_path) == 0
    config = stylegan2_grid.get_config("tiny")
    config.images = 5
    assert grid.run(config, tmp_path, lambda add: add(strength=1.0)) == 0
    assert len(_records(tmp_path)) == 11


def test_a_stopped_run_goes_on_where_it_was(stand_in, tmp_path):
    def stop(config):
        if len(_measured(stand_in)) == 7:
            raise KeyboardInterrupt

    stand_in.trouble = staticmethod(stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert len(_records(tmp_path)) == 6
    assert run(tmp_path) == 0
    assert len(_measured(stand_in)) == 11
    assert len(set(_measured(stand_in))) == 10


def test_a_failed_cell_is_recorded_and_tried_again_on_the_nextrun(stand_in, tmp_path, capsys):
    def fail(config):
        if config.attack == "paper:blur":
            raise UserError("no blur today") if config.strength == 1.0 else ZeroDivisionError()

    stand_in.trouble = staticmethod(fail)
    assert run(tmp_path) == 1
    said = capsys.readouterr()
    assert "failed: no blur today" in said.out
    assert "failed: strength=1.0, attack=paper:blur: no blur today" in said.err
    failed = [record for record in _records(tmp_path) if "error" in record]
    assert len(_records(tmp_path)) == 10
    assert {record["error"] for record in failed} == {"no blur today", "ZeroDivisionError"}
    assert {record["attempts"] for record in failed} == {1}
    assert run(tmp_path) == 1
    assert {r["attempts"] for r in _records(tmp_path) if "error" in r} == {2}
    stand_in.trouble = staticmethod(lambda config: None)
    assert run(tmp_path) == 0
    assert len(_measured(stand_in)) == 14
    assert not [record for record in _records(tmp_path) if "error" in record]


def test_a_setting_out_of_bounds_fails_alone(stand_in, tmp_path):
    def sweep(add):
        add(strength=-1.0)
        add(strength=1.0)

    assert run(tmp_path, sweep=sweep) == 1
    assert sorted("error" in record for record in _records(tmp_path)) == [False, True]


# --- several processes ---------------------------------------------------------------------------


def test_two_processes_share_and_survive_the_death_of_one(tmp_path, pytestconfig):
    log = SimpleNamespace(log=tmp_path / "log")
    log.log.touch()
    command = [sys.executable, "tests/grid_stand_in.py", tmp_path / "grid", log.log, "0.3"]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    options["env"] = os.environ | {"PYTHONPATH": str(pytestconfig.rootpath)}
    first, second = (subprocess.Popen(command, **options) for _ in range(2))
    try:
        deadline = time.monotonic() + 600
        while len({process for process, *_ in _measured(log)}) < 2:  # both are at it
            assert time.monotonic() < deadline
            time.sleep(0.02)
        first.kill()
        first.wait()
        assert second.wait(timeout=600) == 0
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
    records = _records(tmp_path / "grid")
    assert len(records) == 10
    assert not [record for record in records if "error" in record]
    done = [cell for _, *cell in _measured(log)]
    assert len({tuple(cell) for cell in done}) == 10
    assert len(done) <= 11  # what the one was at when it died is the only cell begun twice


def test_a_claim_is_held_by_one_and_given_up(tmp_path):
    ours, theirs = cells.Folder(tmp_path), cells.Folder(tmp_path)
    with ours.claim("a"):
        assert theirs.claim("a") is None
        with theirs.claim("b"):
            pass
    with theirs.claim("a"):
        assert ours.claim("a") is None


@pytest.mark.parametrize("beats", [False, True])
def test_a_claim_that_stands_still_is_taken_over(beats, tmp_path, monkeypatch):
    now, path, folder = [0.0], tmp_path / "claims" / "a.0", cells.Folder(tmp_path)
    monkeypatch.setattr(cells.time, "monotonic", lambda: now[0])
    path.parent.mkdir()
    for now[0] in (0.0, 100.0, 130.0):
        holder = {"host": "another", "pid": 1, "time": now[0] * beats, "released": False}
        path.write_text(json.dumps(holder))
        claim = folder.claim("a")
        assert (claim is None) == (beats or now[0] < 120.0)
    if claim:
        with claim:
            assert cells.Folder(tmp_path).claim("a") is None


def test_a_claim_of_a_process_that_has_ended_here_is_void_at_once(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    folder = cells.Folder(tmp_path)
    claim = folder.claim("a")
    claim._holder["pid"] = ended.pid
    claim._path.write_text(claim._text())
    with cells.Folder(tmp_path).claim("a"):
        pass


def test_in_a_bucket_the_last_to_write_holds_the_claim(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "_SETTLED", 0.0)
    path = cells.epath.Path(tmp_path / "a.0")
    assert cells._create_in_bucket(path, "one")
    assert not cells._create_in_bucket(path, "two")
    monkeypatch.setattr(cells.time, "sleep", lambda _: path.write_text("three"))
    path.unlink()
    assert not cells._create_in_bucket(path, "two")


# --- for real ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory, quick_compilation):
    """Run the tiny grid; give its folder and how often each dear part was made."""
    workdir, calls = tmp_path_factory.mktemp("grid"), {}

    def count(patch, module, name):
        function = getattr(module, name)

        def counting(*args, **options):
            calls[name] = calls.get(name, 0) + 1
            return function(*args, **options)

        patch.setattr(module, name, counting)

    with pytest.MonkeyPatch.context() as patch:
        count(patch, design, "load_generator")
        count(patch, basis, "measure_generator")
        count(patch, bank, "make_bank")
        count(patch, experiment, "_plain")
        count(patch, quality, "reference")
        count(patch, quality.distances, "frechet_interval")
        argv = ["main", "--mode=grid", f"--config={CONFIG}", f"--workdir={workdir}"]
        assert main.main(argv) == 0
    return workdir, calls


def test_what_is_dear_is_made_once(real):
    workdir, calls = real
    assert calls == {
        "load_generator": 1, "measure_generator": 1, "make_bank": 1, "_plain": 1, "reference": 1,
        "frechet_interval": 1 + 2,  # plain images, and those of two design points
    }  # fmt: skip
    assert len(list((workdir / "bases").iterdir())) == 1


def test_it_ends_in_a_report(real):
    workdir, _ = real
    assert "<html" in (workdir / "report.html").read_text()
    assert len((workdir / "report.csv").read_text().splitlines()) == 1 + len(_records(workdir))


def test_a_cell_has_the_numbers_of_the_single_experiment(real, tmp_path, quick_compilation):
    workdir, _ = real
    argv = ["main", f"--config={CONFIG}", f"--workdir={tmp_path}", "--config.attack=paper:noise"]
    assert main.main([*argv, "--config.strength=2.0", "--config.code=antipodal"]) == 0
    single = json.loads((tmp_path / "metrics.json").read_text())
    [cell] = [r for r in _records(workdir) if r["settings"] == single["settings"]]
    single["metrics"] = {name: single.pop(name) for name in cell["metrics"]}
    for metrics in (cell["metrics"], single["metrics"]):
        metrics.pop("seconds_per_image")
    for name in ("metrics", "reliability", "generator", "versions"):
        assert cell[name] == single[name], name
    sheet = images.read(workdir / "cells" / cell["pictures"])
    np.testing.assert_array_equal(sheet, images.read(tmp_path / "grid.png"))
    assert len(cell["rows"]) == 5


def test_a_config_without_a_sweep_is_a_mistake(tmp_path, capsys):
    argv = ["main", "--mode=grid", "--config=configs/ldm.py:tiny", f"--workdir={tmp_path}"]
    assert main.main(argv) == 2
    assert "'configs/ldm.py' has no sweep(add), which --mode=grid needs." in capsys.readouterr().err
