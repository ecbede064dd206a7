"""Reference statistics: of a folder of any sizes, kept by content, or of a file."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from lfp_jax import images
from lfp_jax.errors import UserError
from lfp_jax.metrics import distances, reference
from lfp_jax.weights import statistics


def network(model, pictures):
    """A stand-in for Inception: [n, H, W, 3] of any size -> [n, 4]."""
    means = jnp.concatenate([pictures.mean((1, 2)), pictures[:, :1, 0, 0]], axis=1)
    return jnp.einsum("nf,fg->ng", means, model, precision="highest")


MODEL = np.arange(16, dtype=np.float32).reshape(4, 4) / 8.0


def _folder(path, *, n=7, seed=0):
    rng = np.random.default_rng(seed)
    pictures = [rng.integers(0, 256, (8 + i // 4, 9, 3), np.uint8) for i in range(n)]
    (path / "below").mkdir(parents=True)
    for i, picture in enumerate(pictures):
        images.write_png(path / ("below" if i % 2 else "") / f"{i}.png", picture)
    (path / "notes.txt").write_text("no image")
    rows = [network(MODEL, images.from_uint8(picture[None])) for picture in pictures]
    return np.concatenate(rows)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("LFP_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "statistics"


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_a_folder_of_several_sizes(tmp_path, batch):
    rows = _folder(tmp_path / "real")
    found = reference.load(tmp_path / "real", MODEL, network=network, batch=batch)
    mean, covariance = distances.moments(rows)
    np.testing.assert_allclose(found.mean, mean, atol=1e-6)
    np.testing.assert_allclose(found.covariance, covariance, atol=1e-6)
    assert found.images == 7
    assert found.mean.dtype == found.covariance.dtype == np.float64
    assert distances.frechet(*found.moments, mean, covariance) < 1e-6


def test_it_is_kept_for_the_content_the_network_and_the_params(tmp_path, cache, capsys):
    folder = tmp_path / "real"
    _folder(folder)
    first = reference.load(folder, MODEL, network=network)
    assert "reference: 7/7 images" in capsys.readouterr().err
    (folder / "0.png").rename(folder / "renamed.png")
    again = reference.load(folder, MODEL, network=network)
    assert capsys.readouterr().err == ""
    np.testing.assert_array_equal(again.covariance, first.covariance)
    assert again.images == 7
    reference.load(folder, MODEL + 1.0, network=network)
    images.write_png(folder / "more.png", np.zeros((8, 9, 3), np.uint8))
    assert reference.load(folder, MODEL, network=network).images == 8
    assert len(list(cache.iterdir())) == 3


def test_standard_files_are_read(tmp_path):
    mean, covariance = np.arange(4.0), np.eye(4)
    path = tmp_path / "ffhq.npz"
    np.savez(path, mu=mean, sigma=covariance, mu_s=mean, arr_0=np.zeros((2, 2)))
    found = reference.load(path, MODEL, network=network)
    np.testing.assert_array_equal(found.mean, mean)
    np.testing.assert_array_equal(found.covariance, covariance)
    assert found.images is None
    statistics.write(path, mean=mean, covariance=covariance, count=12)
    assert statistics.read(path)[2] == 12
    np.savez(path, mu=np.arange(3.0), sigma=np.eye(3))
    with pytest.raises(UserError, match="has statistics of 3 features; needed: 4"):
        reference.load(path, MODEL, network=network)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "lacks sigma; it holds mu"),
        ({"other": np.zeros(3)}, "lacks mu and sigma; it holds other"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"got \[3\] and \[4, 4\]"),
        ({"mu": np.zeros(3, int), "sigma": np.eye(3)}, "needs floats; got int64 and float64"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "not finite"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "count": np.zeros(2)}, "no whole number"),
        (
            {"mu": np.array([{}], object), "sigma": np.eye(1)},
            "Cannot read '.*' as a statistics file: mu is no array of numbers",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, arrays, message):
    path = tmp_path / "some.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=message):
        statistics.read(path)


def test_damaged_and_missing_sources(tmp_path):
    path = tmp_path / "some.npz"
    with pytest.raises(UserError, match="No such statistics file: '.*some.npz'"):
        reference.load(path, MODEL, network=network)
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="Cannot read '.*some.npz' as a statistics file"):
        reference.load(path, MODEL, network=network)
    with open(path, "wb") as file:
        np.save(file, np.zeros(4))
    with pytest.raises(UserError, match="no .npz file: it holds a single array"):
        reference.load(path, MODEL, network=network)
    (tmp_path / "few").mkdir()
    with pytest.raises(UserError, match=r"'.*few' holds no image: no file ends in .png"):
        reference.load(tmp_path / "few", MODEL, network=network)
    images.write_png(tmp_path / "few" / "1.PNG", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="at least 2 images; '.*few' holds 1"):
        reference.load(tmp_path / "few", MODEL, network=network)


_WORKER = """
import json, sys
import jax
from lfp_jax import sharding
sharding.join(coordinator=sys.argv[1], processes=2, process=int(sys.argv[2]))
import test_reference
from lfp_jax.metrics import reference
found = reference.load(sys.argv[3], test_reference.MODEL, network=test_reference.network)
print(json.dumps([found.images, found.mean.tolist(), found.covariance.tolist()]))
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, cache, two_processes, pytestconfig):
    rows = _folder(tmp_path / "real")
    _, said = two_processes(
        lambda coordinator, i: ["-c", _WORKER, coordinator, str(i), str(tmp_path / "real")],
        PYTHONPATH=f"{pytestconfig.rootpath}:{os.path.dirname(__file__)}",
    )
    mean, covariance = distances.moments(rows)
    answers = [json.loads(text.splitlines()[-1]) for text in said]
    for images_seen, found_mean, found_covariance in answers:
        assert images_seen == 7
        np.testing.assert_allclose(found_mean, mean, atol=1e-6)
        np.testing.assert_allclose(found_covariance, covariance, atol=1e-6)
    assert answers[0] == answers[1]
