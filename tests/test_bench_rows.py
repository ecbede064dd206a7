"""The benches of other methods and of adversaries: their rows, end to end on random weights."""

import json

import numpy as np
import pytest

from bench import adversary, baselines, command
from lfp_jax.cells import Folder
from lfp_jax.errors import UserError

SMALL = ["--generator=stylegan2-tiny", "--images=4", "--users=2", "--fd-images=0", "--decoys=50"]


def _check(rows):
    assert len({row["hash"] for row in rows}) == len(rows)
    for row in rows:
        assert {"hash", "settings", "changes", "metrics"} <= set(row)
        for entry in row["metrics"].values():
            assert entry["low"] <= entry["value"] <= entry["high"]
            assert entry["images"] == 4
    return rows


def _cells(folder):
    return _check(Folder(folder).read_all())


def test_shallow_keys_are_measured_at_the_psnr_asked(tmp_path):
    argv = ["--methods", "shallow", "--training=64", "--epochs=1", "--steps=5", "--psnr=30"]
    argv += [f"--workdir={tmp_path}", "--attacks", "none", "paper:blur"]
    baselines.main([*SMALL, *argv])
    rows = _cells(tmp_path)
    assert sorted(row["changes"]["attack"] for row in rows) == ["none", "paper:blur"]
    for row in rows:
        np.testing.assert_allclose(row["metrics"]["psnr"]["value"], 30.0, atol=0.2)
        assert row["settings"]["bits"] is None
        assert row["metrics"]["right_user_first"]["users"] == 2
        assert row["strength"] > 0.0
        assert "no bits" in row["metrics"]["word_accuracy"]["note"]


def test_a_ready_made_watermark_is_measured_where_it_is_installed(tmp_path):
    pytest.importorskip("blind_watermark")
    argv = ["--methods", "blind-watermark", "--psnr", "24", "--attacks", "none"]
    baselines.main([*SMALL, *argv, "--workdir", str(tmp_path)])
    [row] = _cells(tmp_path)
    assert row["settings"]["bits"] == 15  # 32 x 32: 16 blocks, one must stay free
    assert row["metrics"]["bit_accuracy"]["value"] > 0.8


def test_the_adversary_is_measured_on_a_design_point(tmp_path, capsys):
    argv = ["--config=ldm:tiny", "--estimator=encoder", "--images=4", "--decoys=50", "--attacks"]
    argv += ["none", "reinvert", "remove-zero", "transplant", "collude-mean-2", "plant-latents-8"]
    adversary.main([*argv, "--out", str(tmp_path)])
    found = _check(json.loads((tmp_path / "adversary.json").read_text()))
    assert "reinvert-00000" in capsys.readouterr().out
    adversary.main([*argv, "--out", str(tmp_path)])
    assert "-00000" not in capsys.readouterr().out  # nothing is read twice
    assert _check(json.loads((tmp_path / "adversary.json").read_text())) == found
    rows = {row["changes"]["adversary"]: row["metrics"] for row in found}
    assert "psnr" not in rows["none"]
    assert "target_first" in rows["transplant"]
    assert set(rows["plant-latents-8"]) == {"psnr", "target_bit_accuracy", "target_first"}
    assert rows["collude-mean-2"]["psnr"]["value"] > 10.0


def test_what_cannot_be_measured_is_said_in_one_line():
    with pytest.raises(UserError, match="Did you mean 'shallow'"):
        baselines.main([*SMALL, "--methods", "shalow"])
    with pytest.raises(UserError, match="Did you mean 'reinvert'"):
        adversary.main(["--config", "ldm:tiny", "--attacks", "reinvent"])


def test_a_mistake_on_the_command_line_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.run(lambda: command.load_config("stylegan"))
    told = capsys.readouterr().err
    assert stopped.value.code == 2
    assert told.count("\n") == 1 and "Did you mean 'stylegan2'" in told
    assert command.load_config("stylegan2:tiny").generator == "stylegan2-tiny"
