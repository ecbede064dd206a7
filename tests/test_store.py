"""The native store: what goes in comes out, damage is one line, a kill loses nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lfp_jax.errors import UserError
from lfp_jax.weights import store

TREE = {
    "half": np.arange(6, dtype=np.float16).reshape(2, 3),
    "brain": np.ones((2,), ml_dtypes.bfloat16),
    "nested": {"list": [np.zeros((), np.float32), np.arange(3, dtype=np.int32)]},
}


def _assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert isinstance(y, np.ndarray)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def _largest_file(folder):
    files = [os.path.join(root, name) for root, _, names in os.walk(folder) for name in names]
    return max(files, key=os.path.getsize)


@pytest.fixture
def folder(tmp_path):
    path = str(tmp_path / "weights")
    store.save(path, TREE, {"resolution": 64})
    return path


def test_load_returns_what_save_wrote(folder):
    tree, metadata = store.load(folder)
    _assert_same(TREE, tree)
    assert metadata == {"resolution": 64}


def test_save_replaces_and_leaves_nothing_else(folder):
    store.save(folder, {"w": np.ones((2,), np.float32)}, {"second": True})
    tree, metadata = store.load(folder)
    assert list(tree) == ["w"]
    assert metadata == {"second": True}
    assert os.listdir(os.path.dirname(folder)) == ["weights"]


def test_a_failing_save_keeps_the_old_folder(folder):
    with pytest.raises(TypeError):
        store.save(folder, {"w": np.ones((2,))}, {"not json": object()})
    _assert_same(TREE, store.load(folder)[0])
    assert os.listdir(os.path.dirname(folder)) == ["weights"]


def _break_metadata(folder):
    with open(os.path.join(folder, "metadata.json"), "w", encoding="utf-8") as file:
        file.write('{"resolution": ')


def _list_metadata(folder):
    with open(os.path.join(folder, "metadata.json"), "w", encoding="utf-8") as file:
        json.dump([1], file)


def _truncate_arrays(folder):
    path = _largest_file(os.path.join(folder, "arrays"))
    os.truncate(path, os.path.getsize(path) // 2)


def _remove_arrays(folder):
    shutil.rmtree(os.path.join(folder, "arrays"))


def _remove_metadata(folder):
    os.remove(os.path.join(folder, "metadata.json"))


@pytest.mark.parametrize(
    "damage",
    [_break_metadata, _list_metadata, _truncate_arrays, _remove_arrays, _remove_metadata],
)
def test_a_damaged_store_is_one_line(folder, damage):
    damage(folder)
    with pytest.raises(UserError, match="weight store") as raised:
        store.load(folder)
    assert "\n" not in str(raised.value)


def test_a_missing_store_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        store.load(tmp_path / "nowhere")


def _state(step):
    return {
        "w": jnp.full((8, 8), step, jnp.float32),
        "key": jax.random.key_data(jax.random.key(step)),
        "optimizer": ({"m": jnp.full((3,), step / 3)}, jnp.asarray(step, jnp.int32)),
    }


def test_checkpoints_keep_the_newest_and_restore_exactly(tmp_path):
    manager = store.checkpoints(tmp_path / "run", keep=2)
    assert manager.latest_step() is None
    for step in (1, 2, 3):
        store.save_step(manager, step, _state(step))
    manager.close()
    manager = store.checkpoints(tmp_path / "run", keep=2)
    assert sorted(manager.all_steps()) == [2, 3]
    restored = store.restore_step(manager, 3, like=_state(0))
    manager.close()
    _assert_same(*[jax.tree.map(np.asarray, state) for state in (_state(3), restored)])


_WRITER = """
import sys, jax.numpy as jnp
from lfp_jax.weights import store
manager = store.checkpoints(sys.argv[1], keep=2)
for step in range(1, 10_000):
    store.save_step(manager, step, {"w": jnp.full((256, 1024), step, jnp.float32)})
    print(step, flush=True)
"""


def test_a_kill_in_the_middle_leaves_a_whole_checkpoint(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-c", _WRITER, str(run)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        for _ in range(3):
            assert process.stdout.readline()
        time.sleep(0.03)  # into the next save
        process.send_signal(signal.SIGKILL)
        process.wait()
    manager = store.checkpoints(run, keep=2)
    latest = manager.latest_step()
    assert latest >= 3
    restored = store.restore_step(manager, latest, like={"w": jnp.zeros((256, 1024))})
    np.testing.assert_array_equal(restored["w"], np.full((256, 1024), latest, np.float32))
    store.save_step(manager, latest + 1, restored)
    manager.close()
