"""Shallow fingerprints: keys learn to be silent, apart, and found again."""

import jax
import numpy as np
import pytest

from lfp_jax import images as files
from lfp_jax import shallow
from lfp_jax.errors import UserError

KEY = jax.random.key(0)
USERS = 4


@pytest.fixture(scope="module")
def plain():
    """Smooth pictures about a common mean: what a key must be silent on."""
    rng = np.random.default_rng(0)
    coarse = 0.3 * rng.normal(size=(512, 4, 4, 3)) + 0.5 * rng.normal(size=(1, 4, 4, 3))
    return np.tanh(np.asarray(jax.image.resize(coarse, (512, 16, 16, 3), "linear"), np.float32))


@pytest.fixture(scope="module")
def keys(plain):
    return shallow.train(KEY, plain[:384], users=USERS, epochs=4, steps=250, learning_rate=1e-2)


def test_keys_are_silent_on_plain_pictures_and_orthogonal(plain, keys):
    raw, _ = shallow.scores(keys, plain[384:])
    assert np.mean(np.asarray(raw) < 0.0) > 0.98
    gram = np.asarray(keys.directions) @ np.asarray(keys.directions).T
    np.testing.assert_allclose(np.diag(gram), 1.0, atol=1e-5)
    assert np.abs(gram - np.diag(np.diag(gram))).max() < 0.02  # random ones: about 0.04 each


def test_a_random_direction_is_not_silent(plain, keys):
    drawn = jax.random.normal(KEY, keys.directions.shape)
    raw, _ = shallow.scores(keys.replace(directions=drawn), plain[384:])
    assert np.mean(np.asarray(raw) < 0.0) < 0.9


def test_own_classifier_alone_says_yes_through_8_bits(plain, keys):
    user = np.arange(128) % USERS
    made = files.png_round_trip(np.asarray(shallow.mark(keys, plain[384:], user, strength=2.0)))
    raw, standard = shallow.scores(keys, made)
    yes = np.asarray(raw) > 0.0
    np.testing.assert_array_equal(np.argmax(standard, axis=1), user)
    assert np.mean((yes.sum(axis=1) == 1) & yes[np.arange(128), user]) > 0.95


def test_the_strength_is_the_length_of_what_is_added(plain, keys):
    made = shallow.mark(keys, plain[:2], np.array([3, 1]), strength=1.5)
    added = np.asarray(made - plain[:2]).reshape(2, -1)
    np.testing.assert_allclose(np.linalg.norm(added, axis=1), 1.5, rtol=1e-4)
    np.testing.assert_allclose(added / 1.5, keys.directions[np.array([3, 1])], atol=1e-4)


def test_scores_of_plain_pictures_are_standard(plain, keys):
    _, standard = shallow.scores(keys, plain[:384])
    np.testing.assert_allclose(np.mean(standard, axis=0), 0.0, atol=1e-2)
    np.testing.assert_allclose(np.std(standard, axis=0), 1.0, atol=1e-2)


def test_bad_counts_are_said_in_one_line(plain):
    with pytest.raises(UserError, match="users >= 1"):
        shallow.train(KEY, plain, users=0)
