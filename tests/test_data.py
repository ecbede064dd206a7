"""The training pictures: read back as written, named when missing, the same batches on resume."""

import sys

import numpy as np
import pytest
from training_runs import write_pictures

from lfp_jax import images
from lfp_jax.errors import UserError
from lfp_jax.training import data

_CHOICES = {"hair": ["bun", "spiky"], "mouth": ["smile", "sad", "agape"]}


def _render(folder, count=20):
    """Write a folder as toon_head.mjs does; every picture holds its own index."""
    pictures = [np.full((8, 8, 3), i, np.uint8) for i in range(count)]
    labels = [{"hair": i % 2, "mouth": i % 3} for i in range(count)]
    return write_pictures(folder, pictures, labels=labels, choices=_CHOICES)


def test_splits_hold_the_pictures_with_their_labels_and_need_no_tensorflow(tmp_path):
    folder = _render(tmp_path)
    train, labels = data.load_split(folder, "train")
    held_out, _ = data.load_split(folder, "held_out")
    assert train.shape == (18, 8, 8, 3) and train.dtype == np.uint8
    assert labels["hair"].dtype == np.int32
    index = train[:, 0, 0, 0]
    assert list(index) == [i for i in range(20) if i % 10 != 9]
    np.testing.assert_array_equal(labels["hair"], index % 2)
    np.testing.assert_array_equal(labels["mouth"], index % 3)
    assert list(held_out[:, 0, 0, 0]) == [9, 19]
    assert "tensorflow" not in sys.modules
    assert data.read_choices(folder) == _CHOICES


def test_a_folder_rendered_further_is_read_in_full(tmp_path):
    folder = _render(tmp_path)
    assert len(data.load_split(folder, "train")[0]) == 18
    _render(tmp_path, count=40)
    assert len(data.load_split(folder, "train")[0]) == 36


def test_a_missing_folder_names_the_command(tmp_path):
    with pytest.raises(UserError, match="Render it: node .*toon_head.mjs --out .*nowhere"):
        data.load_split(str(tmp_path / "nowhere"), "train")


def test_missing_and_broken_parts_are_named(tmp_path):
    folder = _render(tmp_path)
    with pytest.raises(UserError, match="Did you mean 'train'"):
        data.load_split(folder, "trian")
    (tmp_path / "images" / "000" / "000003.png").unlink()
    with pytest.raises(UserError, match="lacks 1 of 18 train pictures.*000003.png.*node"):
        data.load_split(folder, "train")
    images.write_png(str(tmp_path / "images" / "000" / "000003.png"), np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match=r"one size.*000003.png' is \(4, 4\)"):
        data.load_split(folder, "train")
    with open(tmp_path / "labels.jsonl", "a", encoding="utf-8") as file:
        file.write('{"file": "images/0')
    with pytest.raises(UserError, match="Line 21 of .*labels.jsonl' is damaged"):
        data.load_split(folder, "train")
    (tmp_path / "choices.json").write_text("{")
    with pytest.raises(UserError, match="choices.json' is not readable"):
        data.load_split(folder, "train")


def test_a_folder_without_held_out_pictures_is_refused(tmp_path):
    with pytest.raises(UserError, match="no held_out pictures"):
        data.load_split(_render(tmp_path, count=5), "train")


def test_batches_are_a_function_of_seed_and_step_and_cover_every_epoch():
    steps = [data.batch_indices(3, 10, batch=4, step=step) for step in range(5)]
    both_epochs = np.concatenate(steps)
    assert sorted(both_epochs[:10]) == list(range(10))
    assert sorted(both_epochs[10:]) == list(range(10))
    assert list(both_epochs[:10]) != list(both_epochs[10:])
    np.testing.assert_array_equal(steps[2], data.batch_indices(3, 10, batch=4, step=2))
    other = np.concatenate([data.batch_indices(4, 10, batch=4, step=step) for step in range(5)])
    assert list(other) != list(both_epochs)
    assert len(data.batch_indices(0, 3, batch=8, step=0)) == 8
