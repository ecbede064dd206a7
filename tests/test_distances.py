"""The Fréchet distance against recorded values, closed forms, and its interval's coverage."""

from pathlib import Path

import jax
import numpy as np
import pytest

from lfp_jax.metrics import distances

GOLDEN = Path(__file__).parent / "golden" / "fid_math" / "io.npz"


@pytest.fixture(scope="module")
def golden():
    """Features and distances of pytorch-fid."""
    with np.load(GOLDEN) as file:
        return dict(file)


def test_golden_moments(golden):
    for side in "12":
        mean, covariance = distances.moments(golden[f"full/features{side}"])
        assert mean.dtype == covariance.dtype == np.float64
        np.testing.assert_allclose(mean, golden[f"full/mu{side}_f64"], atol=1e-12)
        np.testing.assert_allclose(covariance, golden[f"full/sigma{side}_f64"], atol=1e-12)


@pytest.mark.parametrize("case", ["full", "few_samples", "low_rank", "dead_channels"])
def test_golden_distance(golden, case):
    sides = [distances.moments(golden[f"{case}/features{side}"]) for side in "12"]
    value = distances.frechet(*sides[0], *sides[1])
    np.testing.assert_allclose(value, golden[f"{case}/fid_f64"], rtol=1e-6)
    np.testing.assert_allclose(distances.frechet(*sides[1], *sides[0]), value, rtol=1e-9)


@pytest.mark.parametrize("case", ["full", "few_samples", "low_rank", "dead_channels"])
def test_a_set_is_at_no_distance_from_itself(golden, case):
    side = distances.moments(golden[f"{case}/features1"])
    value = distances.frechet(*side, *side)
    assert isinstance(value, float)
    assert 0.0 <= value < 1e-9


def test_closed_form_of_diagonal_gaussians():
    s1, s2 = np.array([1.0, 4.0, 0.0]), np.array([9.0, 4.0, 0.25])
    m1, m2 = np.array([0.0, 1.0, 2.0]), np.array([3.0, 1.0, 2.0])
    expected = 9.0 + np.sum((np.sqrt(s1) - np.sqrt(s2)) ** 2)
    value = distances.frechet(m1, np.diag(s1), m2, np.diag(s2))
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_rotation_changes_nothing():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 6)), rng.normal(0.3, 1.5, (150, 6))
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    before = distances.frechet(*distances.moments(x), *distances.moments(y))
    after = distances.frechet(*distances.moments(x @ turn), *distances.moments(y @ turn))
    np.testing.assert_allclose(after, before, rtol=1e-9)


def test_interval_repeats_with_the_key_and_holds_the_value():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(300, 8)), rng.normal(0.5, 1.0, (200, 8))
    one, same, other = (
        distances.frechet_interval(x, y, key=jax.random.key(seed), draws=40) for seed in (0, 0, 1)
    )
    assert one == same
    assert one.low != other.low
    assert (
        one.value == other.value == distances.frechet(*distances.moments(x), *distances.moments(y))
    )
    assert 0.0 <= one.low < one.value < one.high


def test_interval_says_how_much_new_images_would_change_the_value():
    rng = np.random.default_rng(2)

    def sets():
        return rng.normal(size=(400, 4)), rng.normal(0.5, 1.0, (400, 4))

    values = [
        distances.frechet(*distances.moments(x), *distances.moments(y))
        for x, y in (sets() for _ in range(200))
    ]
    expected = np.mean(values)
    held = 0
    for i in range(60):
        found = distances.frechet_interval(*sets(), key=jax.random.key(i), draws=60)
        held += found.low <= expected <= found.high
    assert held >= 50  # 57 expected


def test_a_fixed_set_is_not_redrawn():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(2000, 4)), rng.normal(0.5, 1.0, (60, 4))
    both, fixed = (
        distances.frechet_interval(x, second, key=jax.random.key(0))
        for second in (y, distances.moments(y))
    )
    assert both.value == fixed.value
    assert fixed.high - fixed.low < 0.5 * (both.high - both.low)  # the small set varies most


def test_old_style_keys_are_taken():
    x = np.random.default_rng(3).normal(size=(30, 3))
    distances.frechet_interval(x, x + 1.0, key=jax.random.PRNGKey(0), draws=2)


def test_mistakes():
    with pytest.raises(ValueError, match=r"\[n >= 2, f\]; got \[1, 4\]"):
        distances.moments(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="1 of 8 feature values are not finite"):
        distances.moments(np.array([[0.0, 1, 2, np.nan], [0, 1, 2, 3]]))
    with pytest.raises(ValueError, match="at least 2 draws; got 1"):
        distances.frechet_interval(
            np.zeros((4, 2)), np.zeros((4, 2)), key=jax.random.key(0), draws=1
        )
    with pytest.raises(ValueError, match=r"got \[\(2,\), \(2, 2\), \(3,\), \(3, 3\)\]"):
        distances.frechet(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
