"""Distances of sets against recorded values and closed forms; intervals; merged statistics."""

from pathlib import Path

import jax
import numpy as np
import pytest

from lfp_jax.errors import UserError
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


def test_a_small_set_of_many_features_has_the_same_interval_either_way():
    rng = np.random.default_rng(5)
    x, fixed = rng.normal(size=(12, 30)), distances.moments(rng.normal(0.2, 1.0, (90, 30)))
    found = distances.frechet_interval(x, fixed, key=jax.random.key(1), draws=8)
    generator = distances._generator(jax.random.key(1))
    drawn = [
        distances.frechet(*distances.moments(distances._redraw(generator, x)), *fixed)
        for _ in range(8)
    ]
    np.testing.assert_allclose(found.stddev, np.std(drawn), rtol=1e-6)
    assert (found.images, found.draws) == (12, 8)


@pytest.mark.parametrize("cuts", [[200], [1, 2, 599], [0, 300, 300, 600]])
def test_merged_statistics_are_those_of_all(golden, cuts):
    features = golden["full/features1"]
    parts = [distances.statistics(part) for part in np.split(features, cuts)]
    left = distances.merge(*parts)
    right = parts[-1]
    for part in parts[-2::-1]:
        right = distances.merge(part, right)
    for total in (left, right):
        assert total.count == 600
        np.testing.assert_allclose(total.mean, golden["full/mu1_f64"], atol=1e-12)
        np.testing.assert_allclose(total.moments[1], golden["full/sigma1_f64"], atol=1e-12)


def test_statistics_far_from_zero_lose_nothing():
    features = np.random.default_rng(6).normal(1e4, 1e-2, (64, 3))
    total = distances.merge(*(distances.statistics(part) for part in np.split(features, 8)))
    np.testing.assert_allclose(total.moments[1], np.cov(features.T), rtol=1e-6)


def test_one_process_merges_with_itself():
    own = distances.statistics(np.eye(3))
    assert distances.merge_processes(own) is own


def test_golden_kernel_distance(golden):
    x, y = (golden[f"full/features{side}"].astype(np.float64) for side in "12")
    subsets = zip(golden["kid/subset_idx1"], golden["kid/subset_idx2"], strict=True)
    values = np.array([distances.kernel_mmd(x[rows1], y[rows2]) for rows1, rows2 in subsets])
    np.testing.assert_allclose(values, golden["kid/mmd2_per_subset_f64"], rtol=1e-9)
    np.testing.assert_allclose(values.mean(), golden["kid/mean_f64"], rtol=1e-9)
    np.testing.assert_allclose(values.std(), golden["kid/std_f64"], rtol=1e-6)
    found = distances.kernel_distance(jax.random.key(0), x, y, subsets=25, size=200)
    assert abs(found.value - values.mean()) < 3 * values.std() / 25**0.5 * 2
    assert found.low < found.value < found.high
    assert (found.draws, found.images) == (25, 600)
    again = distances.kernel_distance(jax.random.key(0), x, y, subsets=25, size=200)
    assert found == again


def test_kernel_distance_by_hand():
    x, y = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 1.0], [3.0, 0.0]])
    within = 1.0**3 + (3 / 2 + 1) ** 3  # x1.x2 = 0; y1.y2 = 3
    across = ((1 / 2 + 1) ** 3 + (3 / 2 + 1) ** 3 + (2 / 2 + 1) ** 3 + 1.0) / 4
    np.testing.assert_allclose(distances.kernel_mmd(x, y), within - 2 * across, rtol=1e-12)


def test_kernel_distance_of_one_law_is_centred_on_zero():
    rng = np.random.default_rng(7)
    values = [
        distances.kernel_mmd(rng.normal(size=(20, 3)), rng.normal(size=(30, 3))) for _ in range(300)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / 300**0.5


@pytest.mark.parametrize(("splits", "shuffled"), [(10, 1), (10, 0), (1, 0), (7, 1)])
def test_golden_inception_score(golden, splits, shuffled):
    logits = golden["is/logits"]
    logits = logits[golden["is/permutation_seed2020"]] if shuffled else logits
    found = distances.inception_score(logits, splits=splits)
    expected = golden[f"is/splits{splits}_shuffle{shuffled}_f64"]
    np.testing.assert_allclose([found.value, found.stddev], expected, rtol=1e-6, atol=1e-9)
    assert (found.draws, found.images) == (splits, 503)


def test_inception_score_at_its_bounds():
    np.testing.assert_allclose(distances.inception_score(np.zeros((20, 5))).value, 1.0)
    sure = np.tile(1000.0 * np.eye(4), (10, 1))
    np.testing.assert_allclose(distances.inception_score(sure, splits=2).value, 4.0)


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
    with pytest.raises(UserError, match="size 2..4, the smaller set; got 100 of 1000"):
        distances.kernel_distance(jax.random.key(0), np.zeros((4, 2)), np.zeros((9, 2)))
    with pytest.raises(ValueError, match=r"got \[1, 2\] and \[4, 2\]"):
        distances.kernel_mmd(np.zeros((1, 2)), np.zeros((4, 2)))
    with pytest.raises(UserError, match="splits must be 1..3, the number of images; got 10"):
        distances.inception_score(np.zeros((3, 5)))
    with pytest.raises(ValueError, match="at least 2 rows of features; got 1"):
        _ = distances.statistics(np.zeros((1, 2))).moments
    with pytest.raises(ValueError, match="of 2 and of 3 features do not merge"):
        distances.merge(*(distances.statistics(np.zeros((4, f))) for f in (2, 3)))
    with pytest.raises(ValueError, match=r"got \[\(2,\), \(2, 2\), \(3,\), \(3, 3\)\]"):
        distances.frechet(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
