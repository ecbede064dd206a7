"""Logs: files are whole at all times, and the progress line says the truth."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest

from lfp_jax import logs


def test_write_json_takes_arrays_and_leaves_only_the_file(tmp_path):
    path = tmp_path / "new" / "metrics.json"
    value = {"fd": np.float32(1.5), "n": jnp.int32(3), "maps": np.eye(2), "path": path, 1: (True,)}
    logs.write_json(path, value)
    read = json.loads(path.read_text())
    assert read == {
        "fd": 1.5, "n": 3, "maps": [[1.0, 0.0], [0.0, 1.0]], "path": str(path), "1": [True]
    }  # fmt: skip
    assert [file.name for file in path.parent.iterdir()] == ["metrics.json"]


def test_write_json_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    logs.write_json(path, {"value": 1})
    with pytest.raises(TypeError):
        logs.write_json(path, {"value": object()})
    assert json.loads(path.read_text()) == {"value": 1}


def test_nan_becomes_null(tmp_path):
    logs.write_json(tmp_path / "a.json", {"loss": float("nan"), "more": np.array([np.inf, 1.0])})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": None, "more": [None, 1.0]}


def test_json_that_is_nested_too_deep_is_refused():
    deep = [[]]
    for _ in range(98):
        deep = {"a": deep}
    assert logs.from_text(json.dumps(deep)) == deep
    for text in (json.dumps({"a": deep}), "[" * 10**5 + "]" * 10**5):
        with pytest.raises(ValueError, match="nested too deep"):
            logs.from_text(text)


def test_metric_log_appends_and_survives_a_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    logs.MetricLog(path).write(1, loss=jnp.float32(0.5))
    logs.MetricLog(path).write(2, loss=0.25)
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    lines = logs.read_lines(path)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 0.25)]


def test_truncate_drops_what_a_resumed_run_repeats(tmp_path):
    log = logs.MetricLog(tmp_path / "log.jsonl")
    log.truncate(0)  # nothing there yet
    for step in (10, 20, 30):
        log.write(step, loss=1.0)
    log.truncate(20)
    log.write(30, loss=2.0)
    lines = logs.read_lines(tmp_path / "log.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(10, 1.0), (20, 1.0), (30, 2.0)]


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def _run(stream, *, seconds):
    """Do 10 images a second for so many seconds, updating ten times a second."""
    now = [100.0]
    with logs.Progress(1000, label="adam", stream=stream, clock=lambda: now[0]) as progress:
        for done in range(1, 10 * seconds + 1):
            now[0] += 0.1
            progress.update(done, loss=0.125)
    return stream.getvalue()


def test_progress_in_a_file_is_a_line_every_thirty_seconds():
    lines = _run(io.StringIO(), seconds=70).splitlines()
    assert len(lines) == 3  # at 30 s, at 60 s, at the end
    assert lines[-1] == "adam: 700/1000 images, 10/s, 0:30 left, loss 0.125"


def test_progress_on_a_terminal_redraws_one_line():
    text = _run(_Terminal(), seconds=2)
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert text.count("\r") >= 8


def test_progress_of_a_resumed_run_counts_only_its_own_work():
    now, stream = [0.0], io.StringIO()
    with logs.Progress(1000, start=900, stream=stream, clock=lambda: now[0]) as progress:
        now[0] = 10.0
        progress.update(950)
    assert stream.getvalue() == "950/1000 images, 5/s, 0:10 left\n"


def test_tensorboard_events_where_the_package_is_installed(tmp_path):
    pytest.importorskip("tensorboard")
    logs.MetricLog(tmp_path / "log.jsonl", tensorboard=True).write(1, loss=0.5, name="x")
    assert list(tmp_path.glob("events.out.tfevents.*"))
