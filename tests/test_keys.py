"""Keys are unlike, uniform, never near all-zero under `binary`, and survive copying by hand."""

import numpy as np
import pytest

from lfp_jax import keys
from lfp_jax.errors import UserError


@pytest.mark.parametrize("bits", [1, 3, 8, 12, 64, 67])
def test_hex_comes_back(bits):
    for key in keys.draw(min(20, 2**bits), bits=bits):
        text = keys.to_hex(key)
        back = keys.from_hex(text, bits=bits)
        np.testing.assert_array_equal(back, key)
        assert back.dtype == np.uint8
        sloppy = " ".join(text.upper().replace("-", ""))
        np.testing.assert_array_equal(keys.from_hex(sloppy, bits=bits), key)


def test_hex_form():
    key = np.zeros(64, np.uint8)
    key[[0, 2, 63]] = 1
    assert keys.to_hex(key)[:-4] == "a000-0000-0000-0001-"


def test_every_single_wrong_digit_and_swap_is_found():
    [key] = keys.draw(1, bits=64)
    digits = keys.to_hex(key).replace("-", "")
    wrong = [
        digits[:i] + other + digits[i + 1 :]
        for i in range(len(digits))
        for other in "0123456789abcdef"
        if other != digits[i]
    ]
    for i in range(len(digits) - 1):
        swapped = digits[:i] + digits[i + 1] + digits[i] + digits[i + 2 :]
        wrong += [swapped] if swapped != digits else []
    for text in wrong:
        with pytest.raises(UserError, match="copied with a mistake"):
            keys.from_hex(text, bits=64)


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


def test_a_key_does_not_pass_for_one_of_another_length():
    text = keys.to_hex(np.ones(63, np.uint8))
    with pytest.raises(UserError, match="copied with a mistake"):
        keys.from_hex(text, bits=64)


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
    assert heavy.sum(axis=1).min() == 2
    assert keys.draw(0, bits=8).shape == (0, 8)


def test_bounds_of_a_draw():
    with pytest.raises(UserError, match="n must be <= 247, all binary keys of 8 bits; got 248"):
        keys.draw(248, bits=8, code="binary")
    with pytest.raises(UserError, match="bits >= 1 and n >= 0; got bits 0, n 1"):
        keys.draw(1, bits=0)
    with pytest.raises(UserError, match="Unknown code 'binery'. Did you mean 'binary'"):
        keys.draw(1, bits=8, code="binery")


def test_available_counts_what_draw_draws_from():
    assert keys.available(bits=8) == 256
    assert keys.available(bits=8, code="binary") == 247
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
