"""p-values hold for every kind of ratios, the right user is named, and nobody else."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lfp_jax import keys
from lfp_jax.attribution import verdict
from lfp_jax.errors import UserError


def _spoiled(rng, k):
    llr = rng.normal(size=k)
    llr[::3], llr[1], llr[2] = np.nan, np.inf, -np.inf
    return llr


# Ratios an estimator might give, [k]: well and badly scaled, very unequal, unusable.
KINDS = {
    "equal": lambda rng, k: np.full(k, 2.0) * rng.choice([-1, 1], k),
    "normal": lambda rng, k: 4.0 * rng.normal(size=k),
    "heavy": lambda rng, k: rng.standard_cauchy(k) ** 3,
    "doubling": lambda rng, k: 2.0 ** np.arange(k),
    "two sizes": lambda rng, k: np.where(np.arange(k) % 2, 1e9, 1.0) * rng.normal(size=k),
    "one giant": lambda rng, k: np.where(np.arange(k) == 3, 1e12, rng.normal(size=k)),
    "huge": lambda rng, k: 1e200 * rng.normal(size=k),
    "tiny": lambda rng, k: 1e-200 * rng.normal(size=k),
    "few": lambda rng, k: np.where(np.arange(k) < 4, rng.normal(size=k), 0.0),
    "spoiled": _spoiled,
    "nothing": lambda rng, k: np.zeros(k),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def _usable(llr):
    """What a caller of `soft_p_value` weighs disagreement with: finite ratios."""
    return verdict.pool(llr[None])


def _discrepancy(llr, bits):
    return (bits != (llr > 0)[None]) @ np.abs(llr)


def _users(rng, n, k):
    bits = rng.integers(0, 2, (n, k), dtype=np.uint8)
    return bits, verdict.index(np.packbits(bits, axis=1), bits=k)


@pytest.mark.parametrize(
    ("bits", "users", "least"), [(64, 1, 51), (64, 10**6, 59), (128, 1, 92), (128, 10**6, 103)]
)
def test_least_agreeing_bits_at_one_in_a_million(bits, users, least):
    assert verdict.least_agreeing(bits=bits, users=users, rate=1e-6) == least
    tail = sum(math.comb(bits, m) for m in range(least, bits + 1)) / 2**bits
    assert verdict.hard_p_value(least, bits=bits) == pytest.approx(tail, rel=1e-12)
    assert users * tail <= 1e-6 < users * verdict.hard_p_value(least - 1, bits=bits)


def test_the_hard_score_is_exact_for_keys_unlike_the_images_own():
    """All strings, and all keys but one; a key of few ones is none under `binary`."""
    every = np.array(list(itertools.product((0, 1), repeat=10)))
    for code, own in (("antipodal", every[700]), ("binary", every[-1])):
        pool = every if code == "antipodal" else every[every.sum(axis=1) >= 2]
        pool = pool[(pool != own[None]).any(axis=1)]
        for decoded in every[::13]:
            agreeing = (pool == decoded[None]).sum(axis=1)
            for m in range(11):
                share = (agreeing >= m).mean()
                assert share <= verdict.hard_p_value(m, bits=10, code=code) * (1 + 1e-12)
    assert verdict.hard_p_value(0, bits=10) == 1.0


@st.composite
def _ratios(draw):
    """Up to ten ratios: of a kind above, or whatever numbers there are."""
    k = draw(st.integers(1, 10))
    if k > 4 and draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        return draw(st.sampled_from(list(KINDS.values())))(rng, k)
    strange = st.sampled_from((np.nan, np.inf, -np.inf, 0.0, 1.0, -1.0))
    return draw(arrays(np.float64, k, elements=st.floats(-1e300, 1e300) | strange))


@settings(max_examples=300)
@given(_ratios())
def test_no_p_value_is_below_the_exact_probability(llr):
    """Against all 2^k keys."""
    every = np.array(list(itertools.product((0, 1), repeat=len(llr))), np.uint8)
    found = np.sort(_discrepancy(_usable(llr), every))
    exact = np.searchsorted(found, found, side="right") / len(found)
    p = verdict.soft_p_value(llr, found)
    assert (p >= exact).all()
    assert (np.diff(p) >= 0.0).all()  # the better the fit, the smaller
    # What matters is what may be named: P(p <= x) <= x.
    assert (np.searchsorted(p, p, side="right") / len(p) <= p).all()


@given(_ratios(), st.integers(-200, 200), st.floats(0.0, 1.0))
def test_the_scale_of_the_ratios_does_not_matter(llr, exponent, share):
    llr = np.clip(_usable(llr), -1e200, 1e200)
    found = share * np.abs(llr).sum()
    scaled = verdict.soft_p_value(llr * 2.0**exponent, found * 2.0**exponent)
    if (np.abs(llr[llr != 0.0]) > 1e-200).all():  # what is tinier loses digits
        assert scaled == verdict.soft_p_value(llr, found)


@EVERY_KIND
def test_a_hundred_thousand_null_trials_hold_the_rate(kind):
    """20 images of 5,000 keys that did not make them, at 1e-3; four standard errors of 100."""
    passed = 0
    for seed in range(20):
        rng = np.random.default_rng([7, seed])
        llr = KINDS[kind](rng, 64)
        found = _discrepancy(_usable(llr), rng.integers(0, 2, (5000, 64)))
        passed += int((verdict.soft_p_value(llr, found) <= 1e-3).sum())
    assert passed <= 100 + 4 * 10
    if kind in ("normal", "spoiled"):  # nor is it far below: that would cost power
        assert passed >= 60


@pytest.mark.parametrize("score", ["soft", "hard"])
def test_verdicts_hold_the_rate_over_all_users(score):
    """300 images of nobody, 50 users, rate 0.1: 30 named, and four standard errors more."""
    rng, named = np.random.default_rng(0), 0
    drawn = verdict.draw_decoys(bits=64, n=1000)
    for _ in range(300):
        _, users = _users(rng, 50, 64)
        llr = 3.0 * rng.normal(size=64)
        said = verdict.judge(llr, users, rate=0.1, score=score, decoys=drawn)
        named += said.user is not None
    assert named <= 30 + 4 * 5.2


def test_equal_weights_are_the_binomial_tail():
    agreeing = np.arange(65)
    for size in (1e-9, 0.3, 7.0):
        soft = verdict.soft_p_value(np.full(64, size), (64 - agreeing) * size)
        hard = [verdict.hard_p_value(int(m), bits=64) for m in agreeing]
        np.testing.assert_allclose(soft, hard, rtol=1e-8)


def test_the_bound_is_close_far_out():
    """Whole-number weights, whose distribution Python's integers give exactly."""
    rng = np.random.default_rng(1)
    weights = rng.integers(1, 60, 64)
    counts = [1]
    for w in weights:
        longer = [0] * (len(counts) + int(w))
        for value, count in enumerate(counts):
            longer[value] += count
            longer[value + w] += count
        counts = longer
    exact = np.array([float(c) for c in itertools.accumulate(counts)]) / 2.0**64
    far = np.arange(0, weights.sum() // 3)
    ratio = verdict.soft_p_value(weights.astype(float), far) / exact[far]
    assert exact[far[0]] == 2.0**-64
    assert 1.0 <= ratio.min() <= ratio.max() < 1.1


def test_a_giant_among_the_ratios_leaves_the_others_their_say():
    """One disagreeing bit of 63 small ones, beside one a million times as large."""
    llr = np.ones(64)
    llr[0] = 1e6
    p = verdict.soft_p_value(llr, np.array([1.0, 1e6]))
    assert 64 * 2.0**-64 <= p[0] < 10 * 64 * 2.0**-64
    assert 0.5 < p[1] <= 1.0


def test_many_bits_do_not_underflow():
    p = verdict.soft_p_value(np.ones(1500), np.array([0.0, 750.0]))
    assert 0.0 < p[0] <= 1e-299
    assert 0.5 <= p[1] < 0.53


def test_ratios_of_soft_bits():
    llr = verdict.ratios(np.array([[0.5, np.nan, 0.9], [0.0, 1.0, 0.1]], np.float32))
    nine = math.log(9.0)
    surest = 24 * math.log(2.0)
    np.testing.assert_allclose(llr, [[0, 0, nine], [-surest, surest, -nine]], atol=1e-6)
    for bad in (-0.1, 1.1):
        with pytest.raises(ValueError, match="Soft bits are 0..1"):
            verdict.ratios(np.array([bad]))


def test_distances_are_those_of_the_bits():
    rng = np.random.default_rng(0)
    for k in (1, 8, 13, 64, 70):
        bits, users = _users(rng, 300, k)
        llr = rng.normal(size=k)
        want = _discrepancy(llr, bits)
        found = verdict._distances(users, llr > 0, np.abs(llr)) * np.abs(llr).max()
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
        rows, disagree = verdict._nearest(users, llr > 0, np.abs(llr))
        np.testing.assert_allclose(want[rows], np.sort(want)[:2])  # equal keys may tie
        np.testing.assert_array_equal(disagree, bits[rows] != (llr > 0)[None])


def _seen(rng, bits, noise):
    """Ratios of bits sent as +-1 through Gaussian noise."""
    return 2.0 * (2.0 * bits - 1.0 + noise * rng.normal(size=bits.shape)) / noise**2


def test_the_right_user_is_named_among_many():
    rng = np.random.default_rng(0)
    bits, users = _users(rng, 200_000, 64)
    llr = _seen(rng, bits[123_456], 0.4)
    for score in ("soft", "hard"):
        said = verdict.judge(llr, users, score=score)
        assert (said.user, said.bits, said.users) == (123_456, 64, 200_000)
        assert said.agreeing == ((llr > 0) == bits[123_456]).sum() >= 60
        assert said.p_value <= said.threshold == 1e-6 / 200_000
        assert said.runner_up.p_value > said.threshold
        assert said.runner_up.soft_score < said.soft_score < 64 * math.log(2.0)
        best = np.log(2.0 / (1.0 + np.exp(-llr * (2.0 * bits[123_456] - 1.0)))).sum()
        assert said.soft_score == pytest.approx(best)
    json.dumps(dataclasses.asdict(said))
    nobody = verdict.judge(rng.normal(size=64), users)
    assert nobody.user is None
    assert nobody.p_value > nobody.threshold


@given(
    seed=st.integers(0, 2**32 - 1),
    weights=arrays(np.float64, 64, elements=st.floats(0.5, 16.0)),
    score=st.sampled_from(("soft", "hard")),
    user=st.integers(0, 99),
)
def test_whose_bits_all_agree_is_named_in_whatever_order_users_stand(seed, weights, score, user):
    rng = np.random.default_rng(seed)
    bits, users = _users(rng, 100, 64)
    said = verdict.judge(weights * (2.0 * bits[user] - 1.0), users, score=score)
    assert (said.user, said.agreeing) == (user, 64)
    unsure = weights * rng.normal(size=64)
    order = rng.permutation(100)
    shuffled = verdict.index(np.packbits(bits[order], axis=1), bits=64)
    one, other = (verdict.judge(unsure, index, score="soft") for index in (users, shuffled))
    assert (one.p_value, one.soft_score) == (other.p_value, other.soft_score)
    assert one.runner_up.user == order[other.runner_up.user]


def test_soft_scores_tell_where_hard_ones_do_not():
    rng, named = np.random.default_rng(0), {"soft": 0, "hard": 0}
    bits, users = _users(rng, 1000, 64)
    for i in range(60):
        llr = _seen(rng, bits[i], 1.0)
        for score in named:
            said = verdict.judge(llr, users, score=score)
            assert said.user in (i, None)
            named[score] += said.user == i
    assert named["soft"] > named["hard"] + 20


def test_images_of_one_user_are_pooled():
    rng = np.random.default_rng(0)
    bits, users = _users(rng, 10_000, 64)
    llr = np.stack([_seen(rng, bits[77], 1.8) for _ in range(12)])
    llr[5] = np.nan  # an image that could not be read says nothing
    assert all(verdict.judge(row, users).user is None for row in llr)
    pooled = verdict.judge(verdict.pool(llr), users)
    assert pooled.user == 77
    # Adding ratios is adding soft scores, up to what all keys share.
    single = [verdict.judge(row, users) for row in np.delete(llr, 5, axis=0)]
    assert len(single) == 11
    scores = np.array(
        [
            [verdict.soft_score(row, bits[u] != (row > 0)) for u in (77, 3)]
            for row in np.delete(llr, 5, axis=0)
        ]
    )
    total = [
        verdict.soft_score(verdict.pool(llr), bits[u] != (verdict.pool(llr) > 0)) for u in (77, 3)
    ]
    assert total[0] - total[1] == pytest.approx(np.diff(scores.sum(axis=0))[0] * -1.0)


def test_decoys_raise_a_p_value_and_never_lower_it():
    rng = np.random.default_rng(0)
    drawn = verdict.draw_decoys(bits=64)
    assert len(drawn) == 100_000
    again = verdict.draw_decoys(bits=64)
    np.testing.assert_array_equal(drawn.columns, again.columns)
    assert not np.array_equal(drawn.columns, verdict.draw_decoys(bits=64, seed=1).columns)
    for _ in range(20):
        _, users = _users(rng, 1, 64)
        llr = rng.normal(size=64)
        alone, checked = (verdict.judge(llr, users, decoys=d) for d in (None, drawn))
        assert alone.p_value <= checked.p_value < 1.3 * alone.p_value + 1e-3
    bits, users = _users(rng, 1000, 64)
    near = verdict.index(np.repeat(users.columns.T[:1], 50, axis=0), bits=64)
    llr = _seen(rng, bits[0], 0.3)
    assert verdict.judge(llr, users).user == 0
    assert verdict.judge(llr, users, decoys=near).user is None  # such keys prove nothing
    # Where decoys run out the bound alone speaks.
    assert verdict.judge(llr, users, decoys=drawn).p_value == verdict.judge(llr, users).p_value


def test_decoys_are_drawn_as_keys_are():
    drawn = verdict.draw_decoys(bits=16, code="binary")
    assert len(drawn) == keys.available(bits=16, code="binary") // 2
    assert np.bitwise_count(drawn.columns).sum(axis=0).min() == 4


def test_an_image_that_says_nothing_is_nobodys():
    _, users = _users(np.random.default_rng(0), 5, 64)
    for llr in (np.zeros(64), np.full(64, np.nan)):
        said = verdict.judge(llr, users)
        assert (said.user, said.p_value, said.soft_score) == (None, 1.0, 0.0)


def test_one_key_has_no_runner_up():
    bits, users = _users(np.random.default_rng(0), 1, 64)
    said = verdict.judge(10.0 * bits[0] - 5.0, users)
    assert (said.user, said.runner_up, said.agreeing) == (0, None, 64)
    assert said.p_value == pytest.approx(2.0**-64)


def test_impossible_questions_are_refused():
    _, users = _users(np.random.default_rng(0), 10_000, 32)
    llr = np.ones(32)
    with pytest.raises(UserError, match=r"32 bits and 10,000 users: .* 10,000 / 4,294,967,295"):
        verdict.judge(llr, users)
    with pytest.raises(UserError, match="No match is possible"):
        verdict.least_agreeing(bits=32, users=10**5)
    none = verdict.index(np.zeros((0, 4), np.uint8), bits=32)
    with pytest.raises(UserError, match="no keys to compare"):
        verdict.judge(llr, none)
    with pytest.raises(UserError, match="Unknown score 'sofd'. Did you mean 'soft'"):
        verdict.judge(llr, users, score="sofd")
    with pytest.raises(ValueError, match=r"Ratios must be \[32\]; got \[31\]"):
        verdict.judge(llr[1:], users)
    with pytest.raises(ValueError, match=r"32 bits are uint8 \[N, 4\]; got uint8 \[2, 5\]"):
        verdict.index(np.zeros((2, 5), np.uint8), bits=32)
