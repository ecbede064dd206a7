"""Keys are unlike, uniform, never near all-zero under `binary`, and survive copying by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lfp_jax import keys
from lfp_jax.errors import UserError

KEYS = arrays(np.uint8, st.integers(1, 300), elements=st.integers(0, 1))
CODES = st.sampled_from(("binary", "antipodal"))


@given(KEYS)
def test_hex_comes_back(key):
    text = keys.to_hex(key)
    for written in (text, " ".join(text.upper().replace("-", ""))):
        back = keys.from_hex(written, bits=key.size)
        np.testing.assert_array_equal(back, key)
        assert back.dtype == np.uint8


def test_hex_form():
    key = np.zeros(64, np.uint8)
    key[[0, 2, 63]] = 1
    assert keys.to_hex(key)[:-4] == "a000-0000-0000-0001-"


@given(KEYS, st.data())
def test_a_wrong_digit_and_two_that_are_swapped_are_found(key, data):
    digits = keys.to_hex(key).replace("-", "")
    i = data.draw(st.integers(0, len(digits) - 2))
    other = data.draw(st.sampled_from("0123456789abcdef"))
    wrong = digits[:i] + other + digits[i + 1 :]
    swapped = digits[:i] + digits[i + 1] + digits[i] + digits[i + 2 :]
    for text in {wrong, swapped} - {digits}:
        with pytest.raises(UserError, match="copied with a mistake"):
            keys.from_hex(text, bits=key.size)


@given(st.text() | st.text("0123456789abcdefABCDEF- ", min_size=5), st.integers(1, 64))
def test_any_text_is_a_key_or_a_mistake(text, bits):
    try:
        key = keys.from_hex(text, bits=bits)
    except UserError as error:
        assert str(error).startswith(("A key ", "The check digits "))
    else:
        written = "".join(text.lower().replace("-", "").split())
        assert keys.to_hex(key).replace("-", "") == written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a000-000", "A key of 64 bits has 20 hex digits; got 7"),
        ("", "A key of 64 bits has 20 hex digits; got 0"),
        ("xyz!", "0-9, a-f and hyphens; got '!xyz'"),
    ],
)
def test_bad_text(text, message):
    with pytest.raises(UserError, match=message):
        keys.from_hex(text, bits=64)


@given(KEYS, st.integers(1, 3))
def test_a_key_does_not_pass_for_one_of_another_length(key, more):
    """Of as many digits; of another number the number tells."""
    others = {key.size + more, max(key.size - more, 1)} - {key.size}
    for bits in others:
        with pytest.raises(UserError, match="copied with a mistake|hex digits; got"):
            keys.from_hex(keys.to_hex(key), bits=bits)


@pytest.mark.parametrize("bad", [np.array([0, 2]), np.zeros((2, 2)), np.array([])])
def test_to_hex_takes_bits_only(bad):
    with pytest.raises(ValueError, match="a vector of 0 and 1"):
        keys.to_hex(bad)


@pytest.mark.parametrize("code", ["binary", "antipodal"])
def test_draws_are_unlike_and_even(code):
    drawn = keys.draw(4000, bits=64, code=code)
    assert (drawn.shape, drawn.dtype) == ((4000, 64), np.uint8)
    assert len(np.unique(drawn, axis=0)) == 4000
    # Six standard errors of a mean of 4,000 fair bits: one run in 8 million fails by chance.
    assert np.abs(drawn.mean(axis=0) - 0.5).max() < 6 * 0.5 / np.sqrt(4000)
    assert len(np.unique(keys.draw(2, bits=64, code=code), axis=0)) == 2


def test_all_keys_can_be_drawn():
    assert len(np.unique(keys.draw(256, bits=8), axis=0)) == 256
    heavy = keys.draw(247, bits=8, code="binary")  # 256 less the 9 keys of weight 0 and 1
    assert len(np.unique(heavy, axis=0)) == 247


def test_bounds_of_a_draw():
    with pytest.raises(UserError, match="n must be <= 247, all binary keys of 8 bits; got 248"):
        keys.draw(248, bits=8, code="binary")
    with pytest.raises(UserError, match="bits >= 1 and n >= 0; got bits 0, n 1"):
        keys.draw(1, bits=0)
    with pytest.raises(UserError, match="Unknown code 'binery'. Did you mean 'binary'"):
        keys.draw(1, bits=8, code="binery")


@given(st.integers(1, 12), CODES, st.floats(0.0, 1.0))
def test_draws_are_unlike_and_among_the_available(bits, code, share):
    strings = np.unpackbits(np.arange(2**bits, dtype=">u2").view(np.uint8).reshape(-1, 2), axis=1)
    least = bits // 4 if code == "binary" else 0
    assert keys.available(bits=bits, code=code) == (strings.sum(axis=1) >= least).sum()
    n = int(share * keys.available(bits=bits, code=code))
    drawn = keys.draw(n, bits=bits, code=code)
    assert (drawn.shape, drawn.dtype) == ((n, bits), np.uint8)
    assert len(np.unique(drawn, axis=0)) == n
    assert drawn.sum(axis=1).min(initial=bits) >= least


def test_available_needs_bits():
    with pytest.raises(UserError, match="bits >= 1; got 0"):
        keys.available(bits=0)


def test_keys_too_short_for_the_users_are_refused_with_the_arithmetic():
    keys.check_capacity(bits=64, users=10**6)
    keys.check_capacity(bits=12_288, users=10**6)  # 2 ** 12,288 is beyond any float
    keys.check_capacity(bits=32, users=4294)
    line = (
        r"32 bits and 100,000 users: .* 100,000 / 4,294,967,295 = 2.3e-05, above the "
        r"false-positive rate 1e-06. Use at least 37 bits, or at most 4,294 users."
    )
    with pytest.raises(UserError, match=line):
        keys.check_capacity(bits=32, users=10**5)
    keys.check_capacity(bits=37, users=10**5)
    with pytest.raises(UserError, match="No match is possible"):
        keys.check_capacity(bits=32, users=4295)
    with pytest.raises(UserError, match="Use at least 24 bits.$"):  # not even one user
        keys.check_capacity(bits=8, users=10)
    with pytest.raises(UserError, match="between 0 and 1; got 0"):
        keys.check_capacity(bits=64, users=1, rate=0.0)
