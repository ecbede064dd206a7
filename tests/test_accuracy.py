"""Rates by hand, and intervals that hold the truth as often as they say."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from lfp_jax.metrics import accuracy


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (59, 64), (999, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_is_scipys(successes, n, confidence):
    interval = scipy.stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    ours = accuracy.wilson(successes, n, confidence=confidence)
    np.testing.assert_allclose(ours, [interval.low, interval.high], atol=1e-12)


def test_ends_are_exact():
    assert accuracy.wilson(0, 7)[0] == 0.0
    assert accuracy.wilson(7, 7)[1] == 1.0


def test_rates_by_hand():
    keys = np.array([[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]], np.uint8)
    decoded = keys.copy()
    decoded[1, 2] = 1
    decoded[2] ^= 1
    word, bit = accuracy.word_accuracy(decoded, keys), accuracy.bit_accuracy(decoded, keys)
    assert (word.value, word.successes, word.n) == (1 / 3, 1, 3)
    assert (bit.value, bit.successes, bit.n) == (1.75 / 3, 1.75, 3)
    assert word.low < word.value < word.high
    assert set(dataclasses.asdict(word)) == {"value", "low", "high", "successes", "n"}


def test_one_key_for_all_images_and_jax_bits():
    key = np.array([1, 0, 1], np.uint8)
    decoded = jnp.asarray(np.tile(key, (5, 1)))
    assert accuracy.word_accuracy(decoded, key).value == 1.0
    assert accuracy.bit_accuracy(decoded, 1 - key).value == 0.0


def test_interval_of_bits_holds_the_truth_where_bits_fail_together():
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        lost = rng.random(60) < 0.1  # a lost image has random bits: expected accuracy 0.95
        agree = np.where(lost[:, None], rng.random((60, 64)) < 0.5, True)
        rate = accuracy.bit_accuracy(agree, np.ones_like(agree))
        held += rate.low <= 0.95 <= rate.high
    assert held / 400 >= 0.95


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 3), (4, 3)])
def test_impossible_shares(successes, n):
    with pytest.raises(ValueError, match=f"got {successes} of {n}"):
        accuracy.wilson(successes, n)


def test_other_mistakes():
    with pytest.raises(ValueError, match="confidence must be between 0 and 1; got 95"):
        accuracy.wilson(1, 2, confidence=95)
    with pytest.raises(ValueError, match=r"got \[3, 4\] and \[2, 4\]"):
        accuracy.bit_accuracy(np.zeros((3, 4)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="got 0.0 of 0"):
        accuracy.word_accuracy(np.zeros((0, 4)), np.zeros((0, 4)))


def test_first_among_decoys():
    llr = np.array([[2.0, -1.0, 0.5], [2.0, -1.0, -0.5], [0.0, 0.0, 0.0]])
    keys = np.array([[1, 0, 0], [1, 0, 0], [1, 1, 1]], np.uint8)
    decoys = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 1]], np.uint8)
    # The third decoy fits the first image better, and all fit the last one alike.
    assert accuracy.first_among(llr, keys, decoys).value == 1 / 3
    assert accuracy.first_among(llr, keys, decoys[:2]).value == 2 / 3
    # Of several owners one that fits is enough.
    assert accuracy.first_among(llr, 1 - keys, decoys).value == 0.0
    assert accuracy.first_among(llr, np.stack([1 - keys, keys]), decoys).value == 1 / 3


def test_reliability_holds_what_is_stated_against_what_is_so():
    rng = np.random.default_rng(0)
    chance = rng.uniform(size=(400, 64))
    keys = (rng.uniform(size=chance.shape) < chance).astype(np.uint8)
    bins = accuracy.reliability(chance, keys)
    assert sum(each.bits for each in bins) == keys.size
    for each in bins:
        assert each.lowest <= each.stated <= each.highest
        assert each.wrong == pytest.approx(each.stated, abs=0.02)
        assert each.low <= each.wrong <= each.high
    # Twice as sure as it may be.
    bold = 1.0 / (1.0 + ((1.0 - chance) / chance) ** 2)
    assert all(each.low > each.stated for each in accuracy.reliability(bold, keys)[:-1])


def test_reliability_by_hand():
    soft_bits = np.array([[0.9, 0.1, 0.5, 0.0]])
    keys = np.array([[1, 1, 0, 0]], np.uint8)
    first, second, last = accuracy.reliability(soft_bits, keys)
    assert (first.lowest, first.wrong, first.bits) == (0.0, 0.0, 1)
    assert (second.lowest, second.wrong, second.bits) == (0.05, 0.5, 2)
    assert (last.highest, last.wrong, last.bits) == (0.5, 0.0, 1)
