"""The benches whose work is kept part by part: they go on, share, and measure as the grid does."""

import json

import numpy as np
import pytest

from bench import directions, identification, parts
from lfp_jax import images
from lfp_jax.attribution.inversion import Solution
from lfp_jax.cells import Folder

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _reader(seen):
    def read(start, stop):
        seen.append((start, stop))
        rows = np.arange(start, stop)
        solution = Solution(rows[:, None] / 8.0, rows[:, None], rows * 0.1, rows)
        return solution, {"bits": rows[:, None] % 2}

    return read


def test_parts_are_made_once_and_put_together(tmp_path):
    seen = []
    sets = {"a": (5, lambda: _reader(seen)), "a-b": (2, lambda: _reader(seen))}
    assert parts.estimate(tmp_path, sets, size=2)
    assert seen == [(0, 2), (2, 4), (4, 5), (0, 2)]
    (tmp_path / "parts" / "a-00002.npz").unlink()
    with Folder(tmp_path).claim("a-00002"):
        assert not parts.estimate(tmp_path, sets, size=2)  # it is left to who is at it
    assert parts.estimate(tmp_path, sets, size=2)
    assert seen[4:] == [(2, 4)]
    assert parts.names(tmp_path) == ["a", "a-b"]
    solution, more = parts.load(tmp_path, "a")
    assert solution.evaluations.tolist() == [0, 1, 2, 3, 4]
    assert more["bits"].ravel().tolist() == [0, 1, 0, 1, 0]


def test_identification_judges_attacked_and_foreign_images(tmp_path, capsys):
    argv = ["--config=ldm:tiny", "--estimator=encoder", "--images=3", "--part=2", "--users=20"]
    argv += ["--rate=0.5", "--foreign=2", "--out", str(tmp_path), "--attacks", "none", "paper:blur"]
    identification.main(argv)
    written = json.loads((tmp_path / "identification.json").read_text())
    assert sum(each["bits"] for each in written["reliability"]) == 2 * 3 * 8  # of two attacks
    rows = {row["name"]: row for row in written["rows"]}
    foreign = ("plain", "stylegan2-demo", "flat", "noise", "stripes")
    assert set(rows) == {"none", "paper-blur", *(f"foreign-{source}" for source in foreign)}
    for name, row in rows.items():
        own = not name.startswith("foreign")
        for quantity in ("bit_accuracy", "word_accuracy", "right_user_first"):
            assert (quantity in row) == own
        assert row["soft"]["right"]["images"] == (3 if own else 2)
        assert row["hard"]["null"]["images"] == 20 * row["soft"]["right"]["images"]
    capsys.readouterr()
    identification.main(argv)
    assert "none-00000" not in capsys.readouterr().out  # nothing is estimated twice


def test_directions_are_compared_at_one_change_of_the_image(tmp_path, capsys):
    argv = ["--config=ldm:tiny", "--estimator=encoder", "--images=3", "--part=2", "--planned=1"]
    argv += ["--carriers=random:0,pca:0", "--change=0.5", "--out", str(tmp_path)]
    directions.main([*argv, "--attacks", "none", "paper:noise"])
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert {(r["basis"], r["attack"]) for r in results} == {
        (basis, attack) for basis in ("random", "pca") for attack in ("none", "paper:noise")
    }
    told = capsys.readouterr().out
    for r in results:
        assert f"{r['basis']} {r['shift']}" in told
        assert r["metrics"]["bit_accuracy"]["images"] == 3
        # A root mean square of 0.5 on [-1, 1], a mean over pictures of unlike share in it.
        np.testing.assert_allclose(r["metrics"]["psnr"]["value"], 12.04, atol=1.0)
        assert 0.0 <= r["plan"]["alone"]["value"] <= 1.0
    plotted = tmp_path / "directions.png"
    directions.main(["--out", str(tmp_path), "--plot", str(plotted)])
    assert images.read(plotted).std() > 10.0
