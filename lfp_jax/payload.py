"""Keys that say themselves whose they are: a user's number in an error-correcting code.

A key of k bits is a codeword of a shortened BCH code (Bose and Ray-Chaudhuri 1960; `bchlib`) that
carries a number of a few bits, exclusive-or a mask that belongs to the design point. Wrong bits are
mended by the code, and no registry is needed to read a key.

Soft bits are decoded as by Chase (1972, his second algorithm): the library decodes the word with
each pattern of its least sure bits flipped, and the codeword that fits the soft bits best is taken.

Codewords are no uniform keys, but the mask makes any one of them so: to an image that knows nothing
of the mask the codeword of every number is a uniform string, and so the bound of `verdict` holds,
with as many users as there are numbers. Keys of other users of the same mask are farther apart than
chance has them. What the mask does not give is secrecy: whoever knows the basis knows every key.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from lfp_jax import keys
from lfp_jax.attribution import verdict
from lfp_jax.errors import UserError

_UNSURE = 10  # bits whose patterns are tried: 1,024 words a key
_FIELDS = range(5, 14)  # m of the codes' length 2^m - 1


@dataclasses.dataclass(frozen=True)
class Codebook:
    """The keys of all numbers below 2^payload."""

    payload: int  # bits of a number
    mask: np.ndarray  # uint8 [k]

    @property
    def bits(self) -> int:
        """Length of a key, k."""
        return len(self.mask)

    @property
    def corrects(self) -> int:
        """How many wrong bits are always mended."""
        return _bch(self.bits, self.payload).t

    def encode(self, numbers: Iterable[int]) -> np.ndarray:
        """Give the keys of numbers.

        Args:
            numbers: [n], each 0 to 2^payload - 1.

        Returns:
            uint8 [n, k].

        Raises:
            UserError: a number that the payload cannot hold.
        """
        code, size = _bch(self.bits, self.payload), 2**self.payload
        spare, words = -code.ecc_bits % 8, []
        for number in map(int, numbers):
            if not 0 <= number < size:
                raise UserError(
                    f"A payload of {self.payload} bits holds numbers below {size:,}; "
                    f"got {number:,}."
                )
            check = code.encode(number.to_bytes(_message_bytes(code, self.bits), "big"))
            words.append((number << code.ecc_bits) | (int.from_bytes(check, "big") >> spare))
        return _to_bits(words, self.bits) ^ self.mask

    def read(self, llr: np.ndarray, *, rate: float = keys.FALSE_POSITIVE_RATE) -> verdict.Verdict:
        """Read the number of a key.

        Args:
            llr: log-likelihood ratios [k] of one to zero.
            rate: the chance that any number is named for an image without a key.

        Returns:
            A Verdict, whose `user` is a number.

        Raises:
            UserError: so many numbers cannot be told apart at the rate.
            ValueError: ratios of another length than the keys.
        """
        if np.shape(llr) != (self.bits,):
            raise ValueError(f"Ratios must be [{self.bits}]; got {list(np.shape(llr))}.")
        users = 2**self.payload
        keys.check_capacity(bits=self.bits, users=users, rate=rate)
        threshold, llr = rate / users, verdict.clean(llr)
        number = self._nearest(llr)
        if number is None:
            return verdict.Verdict(None, 1.0, threshold, 0, self.bits, 0.0, users, None)
        away = self.encode([number])[0] != (llr > 0.0)
        p_value = float(verdict.soft_p_value(llr, away @ np.abs(llr)))
        return verdict.Verdict(
            user=number if p_value <= threshold else None,
            p_value=p_value,
            threshold=threshold,
            agreeing=int(self.bits - away.sum()),
            bits=self.bits,
            soft_score=verdict.soft_score(llr, away),
            users=users,
            runner_up=None,
        )

    def mend(self, llr: np.ndarray) -> np.ndarray:
        """Give the key that `read` finds, sure or not; without one the bits as they are.

        Args:
            llr: log-likelihood ratios [k] of one to zero.

        Returns:
            uint8 [k].
        """
        llr = verdict.clean(llr)
        number = self._nearest(llr)
        return (llr > 0.0).astype(np.uint8) if number is None else self.encode([number])[0]

    def _nearest(self, llr: np.ndarray) -> int | None:
        """Give the number whose key fits best, of those that the likeliest words lead to."""
        code, word = _bch(self.bits, self.payload), (llr > 0.0) ^ self.mask
        unsure = np.argsort(np.abs(llr), kind="stable")[:_UNSURE]
        tried, found = [_to_int(word)], set()
        for place in unsure:
            tried += [each ^ (1 << (self.bits - 1 - int(place))) for each in tried]
        for each in tried:
            number = _decode(code, each, self.bits)
            if number is not None and number < 2**self.payload:
                found.add(number)
        numbers = sorted(found)
        misfits = (self.encode(numbers) != (llr > 0.0)) @ np.abs(llr)
        return numbers[int(np.argmin(misfits))] if numbers else None


def codebook(*, bits: int, payload: int, secret: bytes) -> Codebook:
    """Make the keys of a design point.

    Args:
        bits: k, length of a key.
        payload: bits of a number; the fewer, the more wrong bits are mended.
        secret: what the mask follows from.

    Raises:
        UserError: no code of this length mends a single bit besides carrying so many, or `bchlib`
            is not installed.
    """
    _bch(bits, payload)
    packed = hashlib.shake_256(b"mask of payloads" + secret).digest(-(-bits // 8))
    return Codebook(payload, np.unpackbits(np.frombuffer(packed, np.uint8), count=bits))


@functools.cache
def _bch(bits: int, payload: int) -> Any:
    """Give the strongest code that leaves room for the payload."""
    try:
        import bchlib
    except ImportError:
        raise UserError('payload needs bchlib: python3 -m pip install ".[payload]".') from None
    if payload < 1:
        raise UserError(f"payload must be >= 1; got {payload}.")
    best = None
    fields = [m for m in _FIELDS if 2**m - 1 >= bits][:2]  # whole bytes may need the longer codes
    for m, t in itertools.product(fields, range(1, bits // min(fields, default=1) + 1)):
        try:
            code = bchlib.BCH(t, m=m)
        except (RuntimeError, ValueError):  # no such code
            continue
        message = bits - code.ecc_bits
        fits = message >= payload and 8 * -(-message // 8) + code.ecc_bits <= code.n
        if fits and (best is None or t > best.t):
            best = code
    if best is None:
        raise UserError(
            f"No BCH code of {bits} bits carries a payload of {payload} and mends a wrong bit."
        )
    return best


def _message_bytes(code: Any, bits: int) -> int:
    return -(-(bits - code.ecc_bits) // 8)


def _to_bits(words: list[int], bits: int) -> np.ndarray:
    """Spell words, of k bits each, out: uint8 [n, k], the highest bit first."""
    width = -(-bits // 8)
    packed = b"".join(word.to_bytes(width, "big") for word in words)
    rows = np.frombuffer(packed, np.uint8).reshape(len(words), width)
    return np.unpackbits(rows, axis=1)[:, 8 * width - bits :]


def _to_int(bits: np.ndarray) -> int:
    padded = np.pad(bits.astype(np.uint8), (-len(bits) % 8, 0))
    return int.from_bytes(np.packbits(padded).tobytes(), "big")


def _decode(code: Any, word: int, bits: int) -> int | None:
    """Give the message of the codeword nearest to a word, None where none is near enough."""
    spare = -code.ecc_bits % 8
    # A shortened code: what is left out of the message is zero.
    message = bytearray((word >> code.ecc_bits).to_bytes(_message_bytes(code, bits), "big"))
    check = (word & ((1 << code.ecc_bits) - 1)) << spare
    check = bytearray(check.to_bytes((code.ecc_bits + spare) // 8, "big"))
    if code.decode(message, check) < 0:
        return None
    code.correct(message, check)
    return int.from_bytes(message, "big")
