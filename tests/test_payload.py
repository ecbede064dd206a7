"""Keys that say a number: wrong bits are mended, and chance names nobody."""

import numpy as np
import pytest

from lfp_jax import payload
from lfp_jax.errors import UserError

BOOK = payload.codebook(bits=64, payload=20, secret=b"tests")


def ratios(rng, key, *, sure=3.0, noise=0.0):
    return (2.0 * key - 1.0) * sure + noise * rng.standard_normal(len(key))


@pytest.mark.parametrize(
    ("bits", "size", "corrects"), [(64, 20, 6), (64, 30, 4), (32, 12, 3), (128, 32, 12), (15, 7, 1)]
)
def test_every_number_comes_back_with_so_many_wrong_bits(bits, size, corrects):
    book, rng = payload.codebook(bits=bits, payload=size, secret=b"a"), np.random.default_rng(0)
    assert (book.bits, book.corrects) == (bits, corrects)
    for number in [0, 1, 2**size - 1, *rng.integers(0, 2**size, 20)]:
        [key] = book.encode([number])
        llr = ratios(rng, key)
        llr[rng.choice(bits, corrects, replace=False)] *= -1.0
        np.testing.assert_array_equal(book.mend(llr), key)


def test_keys_of_numbers_are_codewords_under_a_mask():
    rng = np.random.default_rng(1)
    keys = BOOK.encode(rng.choice(2**20, 200, replace=False))
    away = (keys[:, None] != keys[None]).sum(-1)[~np.eye(200, dtype=bool)]
    assert away.min() >= 2 * BOOK.corrects + 1
    other = payload.codebook(bits=64, payload=20, secret=b"others")
    assert 16 < (other.encode([5])[0] != BOOK.encode([5])[0]).sum() < 48


def test_soft_bits_mend_more_than_hard_ones():
    """Twice as many wrong bits, where they are the unsure ones."""
    rng, mended = np.random.default_rng(2), []
    for number in rng.integers(0, 2**20, 50):
        [key] = BOOK.encode([number])
        llr = ratios(rng, key)
        llr[rng.choice(64, 12, replace=False)] *= -0.1
        mended.append((BOOK.mend(llr) == key).all())
        hard = np.sign(llr) * 3.0
        assert not (BOOK.mend(hard) == key).all()
    assert np.mean(mended) > 0.9


def test_a_sure_reading_is_named_and_an_unsure_one_is_not():
    rng = np.random.default_rng(3)
    [key] = BOOK.encode([77])
    found = BOOK.read(ratios(rng, key))
    assert (found.user, found.agreeing, found.bits, found.users) == (77, 64, 64, 2**20)
    assert found.p_value <= found.threshold == 1e-6 / 2**20
    wrong = ratios(rng, key)
    wrong[:6] *= -1.0
    found = BOOK.read(wrong)
    assert found.user is None  # by chance one of a million keys is as near once in 100,000 images
    assert found.agreeing == 58


def test_nobody_is_named_by_chance_more_often_than_asked():
    """Of 2,000 images without a key at most so many as a rate of 1 in 100 allows."""
    book, rng = payload.codebook(bits=31, payload=6, secret=b"b"), np.random.default_rng(4)
    named = sum(
        book.read(rng.standard_normal(31) * rng.exponential(2.0), rate=1e-2).user is not None
        for _ in range(2_000)
    )
    assert named <= 36  # the chance of more is 1 in 2,000 at that rate


def test_where_no_word_decodes_nobody_is_named():
    book, rng = payload.codebook(bits=128, payload=16, secret=b"c"), np.random.default_rng(5)
    llr = rng.standard_normal(128)
    found = book.read(llr)
    assert (found.user, found.p_value) == (None, 1.0)
    np.testing.assert_array_equal(book.mend(llr), llr > 0.0)
    assert book.read(np.full(128, np.nan)).user is None


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: payload.codebook(bits=64, payload=0, secret=b""), "payload must be >= 1; got 0."),
        (lambda: payload.codebook(bits=64, payload=60, secret=b""), "No BCH code of 64 bits"),
        (
            lambda: payload.codebook(bits=20_000, payload=60, secret=b""),
            "No BCH code of 20000 bits",
        ),
        (lambda: BOOK.encode([2**20]), "holds numbers below 1,048,576; got 1,048,576."),
        (lambda: BOOK.encode([-1]), "got -1."),
    ],
)
def test_mistakes_are_said(call, says):
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        call()


def test_ratios_of_another_length_are_a_mistake():
    with pytest.raises(ValueError, match=r"Ratios must be \[64\]; got \[63\]."):
        BOOK.read(np.zeros(63))
