"""Users' keys: draw them, write them down, read them back.

A key is a uint8 array [k] of 0 and 1. The bits come from the operating system's cryptographic
source: a key must not be guessable, and the p-value of a match counts on uniform bits.
"""

import binascii
import fractions
import math
import secrets
from collections.abc import Callable

import numpy as np

from lfp_jax.errors import UserError, choose
from lfp_jax.fingerprint import CODES

FALSE_POSITIVE_RATE = 1e-6  # that a user is named for an image nobody's key made, unless asked
_CHECK_DIGITS = 4
_GROUP = 4  # hex digits between hyphens


def available(*, bits: int, code: str = "antipodal") -> int:
    """Count the keys that `draw` draws from.

    Args:
        bits: k, length of a key.
        code: "binary" leaves out keys with fewer than bits // 4 ones.

    Raises:
        UserError: bits below 1, or another code.
    """
    choose(code, CODES, "code")
    if bits < 1:
        raise UserError(f"Keys need bits >= 1; got {bits}.")
    return 2**bits - sum(math.comb(bits, ones) for ones in range(_least_ones(bits, code)))


def check_capacity(
    *, bits: int, users: int, rate: float = FALSE_POSITIVE_RATE, code: str = "antipodal"
) -> None:
    """Refuse keys too short to tell so many users apart.

    A key that did not make an image is any of the others, so even one that agrees in every bit does
    so by chance with probability 1 / (available - 1), and one of `users` with that times users. If
    that exceeds the rate, nobody can ever be named.

    Args:
        bits: k, length of a key.
        users: how many keys an image is compared with.
        rate: the false-positive rate asked for, over all users together.
        code: "binary" or "antipodal".

    Raises:
        UserError: no match is possible (the line gives the arithmetic), or a rate outside 0..1.
    """
    if not 0.0 < rate < 1.0:
        raise UserError(f"A false-positive rate must be between 0 and 1; got {rate}.")
    exact = fractions.Fraction(rate)  # times a count of keys that no float can hold
    others = available(bits=bits, code=code) - 1
    if users <= exact * others:
        return
    most, enough = math.floor(exact * others), bits
    while users > exact * (available(bits=enough, code=code) - 1):
        enough += 1
    remedy = f"at least {enough} bits" + (f", or at most {most:,} users" if most else "")
    raise UserError(
        f"No match is possible with {bits} bits and {users:,} users: even if all {bits} agree, "
        f"chance does as well with probability {users:,} / {others:,} = {users / others:.2g}, "
        f"above the false-positive rate {rate:g}. Use {remedy}."
    )


def draw(
    n: int,
    *,
    bits: int,
    code: str = "antipodal",
    source: Callable[[int], bytes] = secrets.token_bytes,
) -> np.ndarray:
    """Draw keys, no two alike.

    Under the `binary` code a key with fewer than bits // 4 ones is drawn again, since an image
    without a fingerprint reads as nearly all zeros. The keys are then uniform over the rest: of 64
    bits that leaves out 1 key in 82,000, so no probability of a match grows by more than 1 part in
    82,000; of 16 bits it leaves out 1 in 94, of 8 bits 1 in 28.

    Args:
        n: how many keys.
        bits: k, length of a key.
        code: "binary" or "antipodal", the form in which they will be injected.
        source: gives so many random bytes. Users' keys take the default; another one, with a seed,
            is for decoys.

    Returns:
        uint8 [n, k].

    Raises:
        UserError: there are fewer than n such keys, or another code.
    """
    if bits < 1 or n < 0:
        raise UserError(f"A draw needs bits >= 1 and n >= 0; got bits {bits}, n {n}.")
    most = available(bits=bits, code=code)
    if n > most:
        raise UserError(f"n must be <= {most:,}, all {code} keys of {bits} bits; got {n:,}.")
    drawn = np.zeros((0, bits), np.uint8)
    while len(drawn) < n:
        # Many at once, though few be missing: the last of all keys takes ever so many draws.
        more = _random_bits(max(n - len(drawn), n // 8), bits, source)
        more = more[more.sum(axis=1) >= _least_ones(bits, code)]
        drawn = _without_copies(np.concatenate([drawn, more]))
    return drawn[:n]


def to_hex(key: np.ndarray) -> str:
    """Write a key as hex digits in groups of four, the last group being check digits.

    Four check digits find any single wrong digit, any two neighbours swapped, and all but 1 in
    65,536 of other mistakes.

    Args:
        key: [k] of 0 and 1; the last hex digit is filled up with zeros.

    Raises:
        ValueError: other values, or another shape.
    """
    key = np.asarray(key)
    if key.ndim != 1 or key.size == 0 or not np.isin(key, (0, 1)).all():
        raise ValueError(f"A key is a vector of 0 and 1; got {key.dtype} {list(key.shape)}.")
    packed = np.packbits(key.astype(np.uint8)).tobytes()
    digits = packed.hex()[: _digits(key.size)]
    groups = [digits[i : i + _GROUP] for i in range(0, len(digits), _GROUP)]
    return "-".join([*groups, _check(packed, key.size)])


def from_hex(text: str, *, bits: int) -> np.ndarray:
    """Read what `to_hex` wrote; capitals, spaces and missing hyphens are fine.

    Args:
        text: the written key.
        bits: k, length of the key.

    Returns:
        uint8 [k].

    Raises:
        UserError: other characters, another length, or check digits that do not fit.
    """
    digits = "".join(text.lower().replace("-", "").split())
    others = sorted(set(digits) - set("0123456789abcdef"))
    if others:
        raise UserError(f"A key is written in 0-9, a-f and hyphens; got '{''.join(others)}'.")
    expected = _digits(bits) + _CHECK_DIGITS
    if len(digits) != expected:
        raise UserError(f"A key of {bits} bits has {expected} hex digits; got {len(digits)}.")
    written, check = digits[:-_CHECK_DIGITS], digits[-_CHECK_DIGITS:]
    packed = bytes.fromhex(written + "0" * (len(written) % 2))
    key = np.unpackbits(np.frombuffer(packed, np.uint8))
    if check != _check(packed, bits) or key[bits:].any():
        raise UserError("The check digits do not fit the key: it was copied with a mistake.")
    return key[:bits]


def _random_bits(n: int, bits: int, source: Callable[[int], bytes]) -> np.ndarray:
    width = -(-bits // 8)
    data = np.frombuffer(source(n * width), np.uint8).reshape(n, width)
    return np.unpackbits(data, axis=1, count=bits)


def _least_ones(bits: int, code: str) -> int:
    return bits // 4 if code == "binary" else 0


def _without_copies(drawn: np.ndarray) -> np.ndarray:
    """Drop the later ones of equal keys [n, k], in a second for a million."""
    packed = np.packbits(drawn, axis=1)
    words = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8))).view(np.uint64)
    order = np.lexsort(words.T)  # stable: of equal keys the first drawn comes first
    words = words[order]
    keep = np.ones(len(drawn), bool)
    keep[order[1:][(words[1:] == words[:-1]).all(axis=1)]] = False
    return drawn[keep]


def _digits(bits: int) -> int:
    return -(-bits // 4)


def _check(packed: bytes, bits: int) -> str:
    """Give CRC-16 of the packed key and its length, so that no key passes for a longer one."""
    return f"{binascii.crc_hqx(bits.to_bytes(4, 'big') + packed, 0xFFFF):04x}"
