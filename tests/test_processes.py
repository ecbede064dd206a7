"""Several processes that work as one: who does what, and the results of one."""

import json
import os
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
from processes import QUICK, main_in_two, without_times

from lfp_jax import main, sharding

FLAGS = ["--config.images=3", "--config.fd_images=6", "--config.basis_samples=64"]
FLAGS += ["--config.metric_samples=16", "--config.decoys=100"]
ADAM = ["--config.estimator=adam", "--config.adam.steps=2"]
LM = ["--config.lm.bank=16", "--config.lm.attack=none", "--config.lm.starts=1"]

EACH = """
import sys
import jax, numpy as np
from lfp_jax import sharding
from lfp_jax.weights import store

coordinator, process, path = sys.argv[1:]
sharding.join(coordinator=coordinator, processes=2, process=int(process))
mine = jax.process_index()
assert sharding.gather([mine, None] * mine + ["a"]) == ["a", 1, None, "a"]
exact = np.array([[1 / 3 + mine, np.nan]])
np.testing.assert_array_equal(sharding.stack(exact), [[1 / 3, np.nan], [4 / 3, np.nan]])
seen = []
rows = sharding.spread(lambda i: seen.append(i) or {"square": i**2, "who": 0.0 * i + mine}, 5)
assert rows["square"].tolist() == [0, 1, 4, 9, 16]
assert rows["who"].tolist() == [0, 0, 0, 1, 1]
assert seen[0].tolist() == ([3, 4, 4] if mine else [0, 1, 2])
assert sharding.spread(lambda i: i, 1).tolist() == [0]
if sharding.is_first():
    store.save(path, {"a": np.arange(3.0)}, {"by": mine})
sharding.wait_for_all("written")
assert store.load(path)[1] == {"by": 0}
print(sharding.first_alone(lambda: mine), len(jax.devices()), len(jax.local_devices()))
"""


def test_shares_are_put_together_and_a_store_needs_no_other_process(two_processes, tmp_path):
    statuses, said = two_processes(
        lambda coordinator, i: ["-c", EACH, coordinator, str(i), str(tmp_path / "store")],
        stderr=subprocess.STDOUT, **QUICK,
    )  # fmt: skip
    assert statuses == [0, 0], said
    assert [each.split()[-3:] for each in said] == [["0", "4", "2"], ["1", "4", "2"]]


def test_one_process_does_all():
    np.testing.assert_array_equal(sharding.spread(lambda rows: rows * 2, 3), [0, 2, 4])
    assert sharding.gather([1, None]) == [1, None]
    assert sharding.is_first()
    assert sharding.first_alone(lambda: "made") == "made"


@pytest.mark.slow
def test_an_experiment_of_two_processes_is_that_of_one(
    two_processes, tmp_path, pytestconfig, quick_compilation
):
    config = f"--config={pytestconfig.rootpath / 'configs' / 'stylegan2.py'}:tiny"
    flags = [config, *FLAGS, *ADAM]
    said = main_in_two(two_processes, *flags, f"--workdir={tmp_path / 'two'}")
    assert "bit_accuracy" in said[0] and not said[1]
    assert main.main(["lfp_jax", *flags, f"--workdir={tmp_path / 'one'}"]) == 0
    two, one = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("two", "one"))
    assert without_times(two) == without_times(one)
    assert len(list((tmp_path / "two" / "images").glob("*.png"))) == 3


@pytest.mark.slow
def test_two_processes_attribute_as_one_does(
    two_processes, tmp_path, pytestconfig, quick_compilation
):
    config = f"--config={pytestconfig.rootpath / 'configs' / 'stylegan2.py'}:tiny"
    flags = [config, *FLAGS, *LM, f"--workdir={tmp_path}", "--config.bits=24", "--config.shift=8"]
    files = tmp_path / "files"
    for mode in ("--mode=issue", "--mode=generate"):
        made = ["--n=3", f"--target={files}"] if mode == "--mode=generate" else []
        assert main.main(["lfp_jax", mode, "--user=a", *made, *flags]) == 0
    (files / "none.png").write_text("no picture")
    asked = ["--mode=attribute", "--pool", *flags, str(files)]
    said = main_in_two(two_processes, *asked, expected=(1, 0))
    with sqlite3.connect(tmp_path / "registry.sqlite") as ledger:
        assert ledger.execute("SELECT count(*) FROM verdicts").fetchone() == (4,)
    # As many devices to a process: a descent on random weights hangs on the last digit.
    alone = subprocess.run(
        [sys.executable, "-m", "lfp_jax.main", *asked], cwd=pytestconfig.rootpath,
        env=os.environ | QUICK, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert alone.returncode == 1
    one = [without_times(json.loads(line)) for line in alone.stdout.splitlines()]
    two = [without_times(json.loads(line)) for line in said[0].splitlines()]
    assert two == one and len(one) == 4
    assert not said[1]
