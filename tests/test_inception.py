"""The FID-Inception against recorded values; its pools, its resizing, and its strict reader."""

from pathlib import Path

import jax
import jax.numpy as jnp
import manifest
import numpy as np
import pytest

from lfp_jax import images
from lfp_jax.errors import UserError
from lfp_jax.metrics import distances, inception

FOLDER = Path(__file__).parent / "golden" / "fid_inception"
WEIGHTS = FOLDER / "weights_manifest.json"


@pytest.fixture(scope="module")
def golden():
    """Recorded images and values."""
    with np.load(FOLDER / "io.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def empty():
    """A file of the right names and shapes, without its values: {name: float16 tensor}."""
    return {k: np.zeros(v.shape, np.float16) for k, v in manifest.draw(WEIGHTS).items()}


@pytest.mark.parametrize("name", ["square", "rect"])
def test_golden_resizing(golden, name):
    resized = inception.resize(images.from_uint8(golden[f"images_{name}"]))
    assert resized.shape[1:] == (299, 299, 3)
    corner = resized[:, :16, :16].transpose(0, 3, 1, 2)
    np.testing.assert_allclose((corner + 1) / 2, golden[f"{name}/resized_corner"], atol=1e-6)
    means = (resized.mean(axis=(1, 2)) + 1) / 2
    np.testing.assert_allclose(means, golden[f"{name}/resized_mean"], rtol=1e-6)


@pytest.mark.usefixtures("quick_compilation")
def test_golden_first_block(golden):
    tensors = manifest.draw(WEIGHTS, prefix="Conv2d_")
    corner = inception.resize(images.from_uint8(golden["images_rect"]))[:, :45, :45]

    @jax.jit
    def apply(params, x):
        return inception.Mixed((inception._BLOCKS[0],)).apply({"params": params}, x)

    names = [layer.name for layer in inception._BLOCKS[0][:3]]
    found = apply({name: _block_params(tensors, name) for name in names}, corner)
    found = found[:, :9, :9, :8].transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found, golden["rect/feat64_corner"], rtol=1e-5, atol=1e-6)


def _block_params(tensors, name):
    parts = {"mean": "running_mean", "var": "running_var", "scale": "weight", "bias": "bias"}
    return {
        "conv": {"kernel": tensors[f"{name}.conv.weight"].transpose(2, 3, 1, 0)},
        "bn": {part: tensors[f"{name}.bn.{theirs}"] for part, theirs in parts.items()},
    }


@pytest.mark.slow
def test_golden_features(golden, tmp_path):
    path = manifest.write(tmp_path / "inception.pth", manifest.draw(WEIGHTS))
    model = inception.load(path=path)
    sides = []
    for name in ("square", "rect"):
        resized = inception.resize(images.from_uint8(golden[f"images_{name}"]))
        means = inception.block_means(model, resized)
        for width, found in zip(inception.WIDTHS, means, strict=True):
            expected = golden[f"{name}/pool{width}"]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.max())
        # Batches, 8-bit images and a last batch that is not full change nothing.
        u8 = golden[f"images_{name}"]
        pooled = inception.features_in_batches(model, u8, batch=2)
        np.testing.assert_allclose(pooled, expected, rtol=1e-4, atol=1e-5 * expected.max())
        sides.append((pooled, expected))
    ours, theirs = zip(*sides, strict=True)
    found, expected = (
        distances.frechet_interval(*pair, key=jax.random.key(0), draws=2) for pair in (ours, theirs)
    )
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-4)
    scores = inception.logits(model, pooled)
    by_hand = pooled.astype(np.float64) @ manifest.draw(WEIGHTS, prefix="fc.")["fc.weight"].T
    np.testing.assert_allclose(scores, by_hand, rtol=1e-4, atol=1e-4)


def test_average_pools_leave_the_padding_out():
    pooled = inception._pool(inception._AVERAGE, jnp.full((1, 5, 4, 2), 3.0))
    np.testing.assert_allclose(pooled, 3.0, rtol=1e-6)


def test_the_last_block_takes_the_largest_where_the_one_before_averages():
    peak = jnp.zeros((1, 5, 5, 1)).at[0, 2, 2, 0].set(9.0)
    kinds = [dict(inception._BLOCKS[3])[name][3][0] for name in ("Mixed_7b", "Mixed_7c")]
    heights = [float(inception._pool(kind, peak)[0, 1, 1, 0]) for kind in kinds]
    assert heights == [pytest.approx(1.0), 9.0]


def test_grey_is_repeated_and_other_shapes_are_refused():
    grey = np.linspace(-1, 1, 12, dtype=np.float32).reshape(1, 3, 4, 1)
    np.testing.assert_array_equal(
        inception.resize(grey), inception.resize(np.repeat(grey, 3, axis=-1))
    )
    with pytest.raises(UserError, match=r"takes images \[n, H, W, 1 or 3\]; got \[3, 4, 3\]"):
        inception.resize(np.zeros((3, 4, 3), np.float32))
    with pytest.raises(UserError, match=r"got \[0, 4, 4, 3\]"):
        inception.resize(np.zeros((0, 4, 4, 3), np.float32))


def test_every_tensor_has_its_place(empty, tmp_path):
    counters = {"Mixed_7c.branch1x1.bn.num_batches_tracked": np.int64(3)}
    model = inception.load(path=manifest.write(tmp_path / "net", empty | counters))
    sizes = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert sizes == sum(tensor.size for tensor in empty.values())
    assert model.params["Mixed_6b"]["branch7x7_2"]["conv"]["kernel"].shape == (1, 7, 128, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.bias": None}, "lacks tensors that a FID-Inception needs: 'fc.bias'"),
        ({"AuxLogits.fc.bias": np.zeros(3, np.float32)}, "no place .*: 'AuxLogits.fc.bias'"),
        ({"fc.num_batches_tracked": np.int64(3)}, "no place .*'fc.num_batches_tracked'"),
        ({"fc.weight": np.zeros((1000, 2048), np.float16)}, r"\[1000, 2048\]; needed: \[1008, 2"),
    ],
)
def test_the_file_is_read_strictly(empty, tmp_path, change, message):
    tensors = {k: v for k, v in (empty | change).items() if v is not None}
    with pytest.raises(UserError, match=message):
        inception.load(path=manifest.write(tmp_path / "net", tensors))


def test_weights_that_are_not_here_are_said(tmp_path, monkeypatch):
    monkeypatch.setenv("LFP_JAX_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"put https://.*fid_weights/pt_inception.* at '"):
        inception.load()
