"""Joint decoding: exact where all keys can be counted, calibrated, better than bit by bit."""

import itertools

import numpy as np

from lfp_jax.attribution import decoding


def draw(rng, *, k, decades, loudest):
    """Give a key of -1 and 1, and mean and covariance of a posterior that an image may leave."""
    turn = np.linalg.qr(rng.standard_normal((k, k)))[0]
    variances = loudest * np.logspace(0, -decades, k)
    key = rng.choice((-1.0, 1.0), k)
    seen = key + turn @ (np.sqrt(variances) * rng.standard_normal(k))
    covariance = (turn * (variances / (1.0 + variances))) @ turn.T
    return key, covariance @ (turn / variances) @ turn.T @ seen, covariance


def test_probabilities_are_those_over_all_keys():
    rng = np.random.default_rng(0)
    every = np.array(list(itertools.product((-1.0, 1.0), repeat=8)))
    wrong = []
    for case in range(8):
        _, mean, covariance = draw(rng, k=8, decades=1, loudest=3.0)
        information = np.linalg.inv(covariance) - np.eye(8)
        log = every @ np.linalg.solve(covariance, mean)
        log -= 0.5 * np.einsum("ci,ij,cj->c", every, information, every)
        weights = np.exp(log - log.max())
        exact = weights @ (every > 0) / weights.sum()
        wrong.append(np.abs(decoding.soft_bits(case, mean, covariance) - exact))
    assert np.mean(wrong) < 0.02


def test_joint_decoding_finds_keys_that_bit_by_bit_rounding_does_not():
    rng, alone, together = np.random.default_rng(1), 0, 0
    for case in range(12):
        key, mean, covariance = draw(rng, k=32, decades=2, loudest=4.0)
        soft = decoding.soft_bits(case, mean, covariance)
        alone += np.array_equal(mean > 0, key > 0)
        together += np.array_equal(soft > 0.5, key > 0)
    assert together >= alone + 4


def test_what_the_gaussian_does_not_explain_makes_bits_less_sure():
    rng = np.random.default_rng(2)
    key, _, covariance = draw(rng, k=32, decades=3, loudest=0.1)
    right = decoding.soft_bits(0, key * (1.0 - np.diag(covariance)), covariance)
    spoilt = decoding.soft_bits(0, key + 0.7 * rng.standard_normal(32), covariance)
    doubt = [np.minimum(soft, 1.0 - soft).sum() for soft in (right, spoilt)]
    assert doubt[0] < 1e-3 and doubt[1] > 0.5


def test_the_same_draws_again_and_nothing_known_of_what_is_not_finite():
    rng = np.random.default_rng(3)
    _, mean, covariance = draw(rng, k=16, decades=1, loudest=3.0)
    again = [decoding.soft_bits(5, mean, covariance) for _ in range(2)]
    np.testing.assert_array_equal(*again)
    np.testing.assert_array_equal(decoding.soft_bits(0, mean * np.nan, covariance), 0.5)
