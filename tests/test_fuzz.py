"""Damaged and hostile files: a reader reads them or says in one line why not, and nothing else.

No other exception, no warning, no code of the file's run, no file outside its folder opened, and at
most 1 GiB of memory. Each reader is tried in a process of its own, see fuzz_runner.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import fuzz_mutations
import numpy as np
import pytest
from fuzz_stores import READERS

TESTS = Path(__file__).parent
QUICK = 40  # damaged files of the cheapest readers
FULL = 450
NAMED = pytest.mark.parametrize("name", READERS)


def _count(name, most):
    """Fewer files of a reader that takes long over each."""
    return max(5, int(most / READERS[name].cost ** 0.5))


def _fuzz(name, count, seed, *, timeout):
    """Damage so many files of a reader; its figures."""
    command = [sys.executable, str(TESTS / "fuzz_runner.py"), name, str(count), str(seed)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS)))}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{name}: {done.returncode}: {done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def _hold(figures, count):
    assert not figures["failed"], "\n\n".join(figures["failures"])
    assert figures["accepted"] + figures["refused"] >= count
    assert figures["grown_mib"] <= 1024


@NAMED
def test_damaged_files_are_read_or_refused_in_one_line(name):
    count = _count(name, QUICK) // 4 if READERS[name].cost > 1 else QUICK
    _hold(_fuzz(name, count, 0, timeout=300), count)


@pytest.mark.slow
@NAMED
def test_many_damaged_files_are_read_or_refused_in_one_line(name, record_property):
    count = _count(name, FULL)
    figures = _fuzz(name, count, 1, timeout=3000)
    print(name, figures)
    record_property("figures", figures)
    _hold(figures, count)


def test_ten_thousand_files_are_damaged_in_all():
    assert sum(_count(name, FULL) for name in READERS) >= 10_000


@pytest.mark.parametrize("name", ["a.json", "a.yaml", "a.bin"])
def test_mutants_are_the_same_again_and_unlike_the_file(name):
    data = b'{"a": [1, 2, {"b": "text"}], "c": null}'
    made = [
        [fuzz_mutations.mutate(np.random.default_rng([0, i]), data, name) for i in range(50)]
        for _ in range(2)
    ]
    assert made[0] == made[1]
    assert sum(mutant != data for mutant in made[0]) > 40
