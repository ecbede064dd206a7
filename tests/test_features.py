"""The demo classifier: trained, shipped small, the same in every batch, clear when misused."""

import json
import os
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import write_pictures

from lfp_jax import images as image_files
from lfp_jax.errors import UserError
from lfp_jax.metrics import features
from lfp_jax.training import classifier as training
from lfp_jax.weights import store

_FACES = Path(__file__).parent / "toon_head"  # 32 held-out faces and their labels
_CHOICES = {"background": ["dark", "light"], "mouth": ["smile", "sad", "agape"]}


@pytest.fixture(scope="module")
def small():
    """An untrained classifier and eight images."""
    images = jax.random.uniform(jax.random.key(1), (8, 64, 64, 3), minval=-1.0)
    return features.init(jax.random.key(0), choices=_CHOICES), images


def test_features_of_an_image_do_not_depend_on_its_batch(small):
    classifier, images = small
    together = features.features(classifier, images)
    assert together.shape == (8, 128) and together.dtype == jnp.float32
    one_by_one = [features.features(classifier, image[None])[0] for image in images]
    np.testing.assert_allclose(together, jnp.stack(one_by_one), atol=1e-5, rtol=1e-5)
    chunks = features.features_in_batches(classifier, np.asarray(images), batch=3)
    np.testing.assert_allclose(together, chunks, atol=1e-5, rtol=1e-5)


def test_uint8_and_float_images_give_the_same_features(small):
    classifier, images = small
    u8 = image_files.to_uint8(images)
    from_bytes = features.features_in_batches(classifier, u8)
    from_floats = features.features_in_batches(classifier, image_files.from_uint8(u8))
    np.testing.assert_array_equal(from_bytes, from_floats)


def test_features_have_a_finite_gradient_that_is_not_zero(small):
    classifier, images = small
    gradient = jax.grad(lambda x: jnp.sum(features.features(classifier, x) ** 2))(images)
    assert jnp.isfinite(gradient).all()
    assert (jnp.abs(gradient).max(axis=(1, 2, 3)) > 0).all()


def test_images_of_another_size_are_refused(small):
    with pytest.raises(UserError, match=r"takes images \[n, 64, 64, 3\]; got \[1, 32, 32, 3\]"):
        features.features(small[0], jnp.zeros((1, 32, 32, 3)))


def test_save_and_load_keep_the_classifier_to_float16(small, tmp_path):
    classifier, images = small
    path = str(tmp_path / "classifier")
    mean, covariance = np.arange(128.0), np.eye(128)
    features.save(path, classifier, {"note": "test"}, reference=(mean, covariance))
    again = features.load_classifier(path=path)
    assert again.choices == classifier.choices
    same = jax.tree.map(lambda a, b: np.array_equal(np.float16(a), b), classifier, again)
    assert all(jax.tree.leaves(same))
    np.testing.assert_array_equal(features.load_reference(path=path)[0], mean)
    np.testing.assert_array_equal(features.load_reference(path=path)[1], covariance)
    store.save(str(tmp_path / "other"), {"a": np.zeros(2)}, {})
    with pytest.raises(UserError, match="holds no attribute classifier"):
        features.load_classifier(path=str(tmp_path / "other"))


def test_standardizing_gives_unit_variance_and_the_same_answers(small):
    classifier, images = small
    head = {"kernel": jax.random.normal(jax.random.key(2), (128, 5)), "bias": jnp.ones(5)}
    classifier = classifier.replace(params=dict(classifier.params, head=head))
    scaled = features.standardize(classifier, features.features(classifier, images))
    assert np.var(features.features(scaled, images), axis=0).mean() == pytest.approx(1.0, abs=1e-4)
    before, after = features.logits(classifier, images), features.logits(scaled, images)
    for name in before:
        np.testing.assert_allclose(before[name], after[name], atol=1e-4, rtol=1e-4)


def test_augmentation_is_mild_and_repeats():
    u8 = np.asarray(jax.random.randint(jax.random.key(0), (16, 64, 64, 3), 0, 256), np.uint8)
    key = jax.random.key(1)
    varied = training.augment(key, u8)
    np.testing.assert_array_equal(varied, training.augment(key, u8))
    plain = image_files.from_uint8(u8)
    kept = jnp.abs(varied - plain).mean(axis=(1, 2, 3)) < 0.15
    mirrored = jnp.abs(varied - plain[:, :, ::-1]).mean(axis=(1, 2, 3)) < 0.15
    assert (kept ^ mirrored).all() and kept.any() and mirrored.any()


def test_training_learns_and_repeats(tmp_path):
    folder = _dark_and_light(tmp_path / "faces", count=80)
    settings = {"steps": 30, "batch_size": 16, "learning_rate": 1e-2, "seed": 0}
    first = training.train(data=folder, workdir=tmp_path / "a", **settings)
    again = training.train(data=folder, workdir=tmp_path / "b", **settings)
    assert first["accuracy"]["background"] == {"value": 1.0, "images": 8}
    assert first["accuracy"] == again["accuracy"]
    assert first["fd_floor"] == again["fd_floor"] and first["fd_floor"]["images"] == 8
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert metrics["accuracy"] == first["accuracy"]
    weights = [
        features.load_classifier(path=str(tmp_path / run / "demo-classifier")) for run in "ab"
    ]
    same = jax.tree.map(np.array_equal, *weights)
    assert all(jax.tree.leaves(same))


def test_the_shipped_classifier_knows_what_it_draws():
    folder = resources.files("lfp_jax") / "assets" / "demo-classifier"
    size = sum(os.path.getsize(os.path.join(d, f)) for d, _, fs in os.walk(folder) for f in fs)
    assert size <= 1_000_000
    classifier = features.load_classifier()
    assert len(classifier.choices) == 11
    faces = image_files.read(str(_FACES / "faces.png"))
    faces = faces.reshape(4, 64, 8, 64, 3).swapaxes(1, 2).reshape(32, 64, 64, 3)
    truth = json.loads((_FACES / "labels.json").read_text())
    found = features.attributes(classifier, image_files.from_uint8(faces))
    for name in ("background", "clothes_color", "hair", "hair_color", "mouth", "skin"):
        assert np.mean(found[name] == np.array(truth[name])) >= 0.9, name


def _dark_and_light(folder, *, count):
    """Write a folder as toon_head.mjs does, of dark and light pictures."""
    rng = np.random.default_rng(0)
    pictures, labels = [], []
    for _ in range(count):
        light = int(rng.integers(2))
        pixels = rng.integers(30, 60, (64, 64, 3)) + 150 * light
        pictures.append(pixels.astype(np.uint8))
        labels.append({"background": light, "mouth": int(rng.integers(3))})
    return write_pictures(folder, pictures, labels=labels, choices=_CHOICES)
