"""Whose key an image carries, or nobody's, with a p-value that holds.

A key that did not make an image is uniform and independent of whatever was estimated from it. So
let the estimate be anything: with weights |l| of its bits (l the log-likelihood ratios of one to
zero), the *discrepancy* of such a key, the weights of the bits in which it disagrees summed up, is
a sum of independent fair choices between 0 and |l|, and the chance of one as small as a match's
can be computed, or bounded, from the weights alone. That is the p-value. With all weights equal it
is the binomial tail of the agreeing bits (score `hard`); with |l| themselves it is that of the
log-likelihood ratio of the key against chance (score `soft`), which differs from the discrepancy
by its sign and a constant. A user is named if N p <= the false-positive rate, N being the number of
keys compared (union bound).

The p-value does not depend on the scale of the ratios, and holds however wrong they are: then it
is only less able to tell. On the host, in float64.
"""

import dataclasses
import math

import numpy as np

from lfp_jax import keys
from lfp_jax.errors import UserError, choose

_SUREST = 2.0**-24  # float32 holds no probability nearer to 1
_CHUNK = 32_768  # keys matched at once: their partial sums stay in the cache
_SHORTLIST = 16  # keys whose discrepancies are computed again in float64
_CELLS = 256  # of the lattice, a bit
_MOST_CELLS = 65_536  # of the lattice, in all
_TILTS = 1.1 ** np.arange(-50.0, 250.0)  # exponents tried in Chernoff's bound
_SLACK = 1e-9  # relative; far above what rounding may take from a sum of probabilities
_LEAST = 1e-300  # far above what underflow may take from one
_DECOYS_COUNT = 10  # fewer decoys than this say nothing of a tail
_BYTES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)  # [256, 8]


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """Keys laid out for matching."""

    columns: np.ndarray = dataclasses.field(repr=False)  # uint8 [ceil(k / 8), N]
    bits: int

    def __len__(self) -> int:
        return self.columns.shape[1]


@dataclasses.dataclass(frozen=True)
class Match:
    """How well one key fits."""

    user: int  # its row among the keys
    p_value: float
    agreeing: int  # bits
    soft_score: float  # log-likelihood ratio of the key against chance, nats


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whose image it is. The numbers are of the best match, whether or not it is named."""

    user: int | None  # row among the keys; None for `unknown`
    p_value: float  # of one key, before the union bound
    threshold: float  # false-positive rate / users; the p-value at or below which a user is named
    agreeing: int
    bits: int
    soft_score: float  # nats
    users: int  # keys compared
    runner_up: Match | None  # None where there is one key only


def ratios(soft_bits: np.ndarray) -> np.ndarray:
    """Turn soft bits into log-likelihood ratios of one to zero.

    Args:
        soft_bits: probabilities, any shape; NaN says nothing, as 1/2 does.

    Returns:
        float64 of the same shape, within +-16.6: float32 tells no surer ones apart.

    Raises:
        ValueError: values outside 0..1.
    """
    soft = np.nan_to_num(np.asarray(soft_bits, np.float64), nan=0.5)
    if soft.size and not 0.0 <= soft.min() <= soft.max() <= 1.0:
        raise ValueError(f"Soft bits are 0..1; got {soft.min()} to {soft.max()}.")
    soft = np.clip(soft, _SUREST, 1.0 - _SUREST)
    return np.log(soft) - np.log1p(-soft)


def pool(llr: np.ndarray) -> np.ndarray:
    """Add the evidence of several images of one unknown user.

    The soft scores of a key add up, but for a constant that all keys share, and so do the ratios.

    Args:
        llr: [n, k]; NaN says nothing.

    Returns:
        float64 [k].
    """
    return np.sum([clean(row) for row in llr], axis=0)


def hard_p_value(agreeing: int, *, bits: int, code: str = "antipodal") -> float:
    """Compute the chance that a key which did not make an image agrees in so many bits.

    Exact: P(Bin(k, 1/2) >= agreeing), times the share of strings that are keys of others.

    Args:
        agreeing: 0..k.
        bits: k.
        code: "binary" keys are not all strings.
    """
    tail = sum(math.comb(bits, count) for count in range(agreeing, bits + 1))
    return min(1.0, tail / (keys.available(bits=bits, code=code) - 1))


def least_agreeing(
    *,
    bits: int,
    users: int,
    rate: float = keys.FALSE_POSITIVE_RATE,
    code: str = "antipodal",
) -> int:
    """Find how many bits must agree for a user to be named by the hard score.

    Args:
        bits: k.
        users: N, keys compared.
        rate: false-positive rate over all N.
        code: "binary" or "antipodal".

    Raises:
        UserError: not even k agreeing bits suffice.
    """
    keys.check_capacity(bits=bits, users=users, rate=rate, code=code)
    return next(
        count
        for count in range(bits + 1)
        if users * hard_p_value(count, bits=bits, code=code) <= rate
    )


def soft_p_value(
    llr: np.ndarray, discrepancy: np.ndarray, *, code: str = "antipodal"
) -> np.ndarray:
    """Bound the chance that a key which did not make an image fits so well.

    The smaller of two bounds on P(sum |l_i| B_i <= discrepancy), B_i fair coins. One rounds the
    weights down to a lattice and sums up its distribution: exact where the weights are equal, and
    a few per cent high where they are of a kind. The other is Chernoff's, at the best of a row of
    exponents: it does not mind weights of very unlike size.

    Args:
        llr: log-likelihood ratios [k].
        discrepancy: [m], sums of |llr| over the disagreeing bits; or a number.
        code: "binary" keys are not all strings.

    Returns:
        float64, as the discrepancy; never below the true probability.
    """
    weights, found = np.abs(clean(llr)), np.asarray(discrepancy, np.float64)
    scale = weights.max() or 1.0
    weights, scaled = weights / scale, found.ravel() / scale
    bound = np.minimum(_lattice_bound(weights, scaled), _chernoff_bound(weights, scaled))
    others = keys.available(bits=len(weights), code=code) - 1
    share = 2 ** len(weights) / others
    return np.clip(bound * (1.0 + _SLACK) * share, _LEAST, 1.0).reshape(found.shape)


def index(packed: np.ndarray, *, bits: int) -> Index:
    """Lay packed keys out for matching; once for all images.

    Args:
        packed: uint8 [N, ceil(k / 8)], as `np.packbits` makes them.
        bits: k.

    Raises:
        ValueError: another shape or type.
    """
    if packed.ndim != 2 or packed.shape[1] != -(-bits // 8) or packed.dtype != np.uint8:
        raise ValueError(
            f"Packed keys of {bits} bits are uint8 [N, {-(-bits // 8)}]; "
            f"got {packed.dtype} {list(packed.shape)}."
        )
    return Index(np.ascontiguousarray(packed.T), bits)


def draw_decoys(*, bits: int, code: str = "antipodal", n: int = 100_000, seed: int = 0) -> Index:
    """Draw keys that nobody has, as users' keys are drawn; the same again from the same seed.

    Args:
        bits: k.
        code: "binary" or "antipodal".
        n: how many; at most half of all there are, which are quick to find.
        seed: of a generator that is no secret.
    """
    n = min(n, keys.available(bits=bits, code=code) // 2)
    drawn = keys.draw(n, bits=bits, code=code, source=np.random.default_rng(seed).bytes)
    return index(np.packbits(drawn, axis=1), bits=bits)


def judge(
    llr: np.ndarray,
    users: Index,
    *,
    rate: float = keys.FALSE_POSITIVE_RATE,
    code: str = "antipodal",
    score: str = "soft",
    decoys: Index | None = None,
) -> Verdict:
    """Name the user whose key an image carries, or nobody.

    Args:
        llr: log-likelihood ratios [k] of one image, or pooled; only their ratios to one another
            matter to who is named.
        users: keys to compare, drawn uniformly.
        rate: false-positive rate: the chance that anybody is named for an image that none of these
            keys made.
        code: "binary" or "antipodal", as the keys were drawn.
        score: "soft", or "hard" to count every bit the same.
        decoys: keys that nobody has. Where ten of them or more fit as well as the best match, its
            p-value is not below their share: a check by experiment, which can only raise it.

    Raises:
        UserError: no keys, keys too short for so many users, an unknown score, or a bad rate.
        ValueError: ratios of another length than the keys.
    """
    choose(score, dict.fromkeys(("soft", "hard")), "score")
    if not len(users):
        raise UserError("There are no keys to compare: register a user.")
    if np.shape(llr) != (users.bits,):
        raise ValueError(f"Ratios must be [{users.bits}]; got {list(np.shape(llr))}.")
    keys.check_capacity(bits=users.bits, users=len(users), rate=rate, code=code)
    llr = clean(llr)
    weights = np.abs(llr) if score == "soft" else np.ones(users.bits)
    rows, disagree = _nearest(users, llr > 0.0, weights)
    found = disagree @ weights
    if score == "soft":
        p_values = soft_p_value(llr, found, code=code)
    else:
        agreeing = users.bits - disagree.sum(axis=1)
        p_values = np.array([hard_p_value(int(m), bits=users.bits, code=code) for m in agreeing])
    if decoys is not None:
        p_values = np.maximum(p_values, _shares_as_near(decoys, llr > 0.0, weights, found))
    best, *others = [
        Match(int(row), float(p), int(users.bits - away.sum()), soft_score(llr, away))
        for row, p, away in zip(rows, p_values, disagree, strict=True)
    ]
    threshold = rate / len(users)
    return Verdict(
        user=best.user if best.p_value <= threshold else None,
        p_value=best.p_value,
        threshold=threshold,
        agreeing=best.agreeing,
        bits=users.bits,
        soft_score=best.soft_score,
        users=len(users),
        runner_up=others[0] if others else None,
    )


def clean(llr: np.ndarray) -> np.ndarray:
    """Make ratios finite: NaN says nothing, infinity no more than the surest finite one."""
    llr = np.asarray(llr, np.float64)
    finite = np.abs(llr[np.isfinite(llr)])
    most = finite.max(initial=0.0) or 1.0
    return np.nan_to_num(llr, nan=0.0, posinf=most, neginf=-most)


def soft_score(llr: np.ndarray, disagree: np.ndarray) -> float:
    """Sum log(2 P(bit of the key)) over the bits [k], of which some disagree."""
    weights = np.abs(llr)
    at_best = math.log(2.0) * len(llr) - np.log1p(np.exp(-weights)).sum()
    return float(at_best - weights[disagree].sum())


def _nearest(
    keys_index: Index, decoded: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Give the rows of the two nearest keys, and in which bits they disagree, bool [2, k]."""
    distance = _distances(keys_index, decoded, weights)
    rows = np.arange(len(distance))
    if len(distance) > _SHORTLIST:
        rows = np.argpartition(distance, _SHORTLIST)[:_SHORTLIST]
    bits = np.unpackbits(keys_index.columns[:, rows].T, axis=1, count=keys_index.bits)
    disagree = bits != decoded[None]
    order = np.argsort(disagree @ weights, kind="stable")[:2]
    return rows[order], disagree[order]


def _distances(keys_index: Index, decoded: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Give the discrepancy of every key, float32 [N] in units of the largest weight.

    A table a byte of the key: 1,000,000 keys of 64 bits in 10 ms on a core, against 75 ms for a
    matrix product with keys unpacked in chunks.
    """
    tables = _tables(decoded, weights / (weights.max() or 1.0))
    out = np.zeros(len(keys_index), np.float32)
    buffer = np.empty(_CHUNK, np.float32)
    for start in range(0, len(out), _CHUNK):
        part = out[start : start + _CHUNK]
        for table, column in zip(tables, keys_index.columns, strict=True):
            some = column[start : start + _CHUNK]
            part += np.take(table, some, out=buffer[: len(part)], mode="clip")
    return out


def _tables(decoded: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Give what each value of each byte of a key adds to its discrepancy, float32 [bytes, 256]."""
    padding = (0, -len(decoded) % 8)
    decoded = np.pad(decoded, padding).reshape(-1, 1, 8)
    weights = np.pad(weights, padding).reshape(-1, 1, 8)
    return ((_BYTES[None] != decoded) * weights).sum(axis=-1).astype(np.float32)


def _shares_as_near(
    decoy_index: Index, decoded: np.ndarray, weights: np.ndarray, discrepancy: np.ndarray
) -> np.ndarray:
    """Give (1 + decoys at least as near) / (1 + all), [m]; 0 where they are too few to tell."""
    scale = weights.max() or 1.0
    rounding = 1e-6 * weights.sum() / scale  # of float32
    distance = np.sort(_distances(decoy_index, decoded, weights))
    counts = np.searchsorted(distance, discrepancy / scale + rounding, side="right")
    return np.where(counts < _DECOYS_COUNT, 0.0, (1 + counts) / (1 + len(distance)))


def _lattice_bound(weights: np.ndarray, discrepancy: np.ndarray) -> np.ndarray:
    """Bound P(sum w_i B_i <= d) by that of weights rounded down to multiples of a cell.

    Args:
        weights: [k] in 0..1, the largest 1.
        discrepancy: [m].
    """
    total = min(_CELLS * len(weights), _MOST_CELLS)
    cells = max(1.0, np.round(total / max(weights.sum(), 1.0)))  # in the largest weight
    steps = np.floor(weights * cells + _SLACK).astype(int)
    last = np.floor(discrepancy * cells + 10.0 * _SLACK * len(weights)).astype(int)
    last = np.minimum(last, steps.sum())
    probability = np.ones(1)
    for step in np.sort(steps[steps > 0]):
        longer = np.zeros(len(probability) + step)
        longer[: len(probability)] = probability
        longer[step:] += probability
        probability = 0.5 * longer[: last.max() + 1]  # no value beyond is ever asked for
    return np.cumsum(probability)[np.minimum(last, len(probability) - 1)]


def _chernoff_bound(weights: np.ndarray, discrepancy: np.ndarray) -> np.ndarray:
    """Bound P(sum w_i B_i <= d) by min over t of exp(t d) prod (1 + exp(-t w_i)) / 2."""
    powers = np.exp(-np.multiply.outer(_TILTS, weights))
    moments = (np.log1p(powers) - math.log(2.0)).sum(axis=1)
    exponent = np.zeros(len(discrepancy))
    for tilt, moment in zip(_TILTS, moments, strict=True):
        exponent = np.minimum(exponent, tilt * discrepancy * (1.0 + _SLACK) + moment)
    return np.exp(exponent)
