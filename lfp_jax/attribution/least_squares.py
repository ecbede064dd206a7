"""Estimate the key of images by Levenberg-Marquardt: estimator `lm`.

Unknowns, whitened: alpha / s of the nuisance directions and 2 phi - 1, with prior N(0, I), turned
to other axes theta in which that prior is the same (below). Residuals are pixel differences; a
pixel the 8-bit range clips counts only when the model is on the wrong side of the bound. The noise
variance v follows the current residual, so early steps are damped by the prior and late ones are
exact. Every step solves

    (J^T J / v + I) step = -(J^T r / v + theta)

with one Jacobian (forward mode, a column an evaluation), which serves a row of chord steps. Those
are taken in full, though the first may raise the residual: it lands beside the curved valley, the
bits right already, and the next ones fall back to its floor. A line search would allow small steps
only.

Coarse to fine: the axes of theta are those of the generator's mean metric E[J^T J] in the whitened
unknowns, ordered by how much the image moves along them, and not by how much the latent does. A few
dozen of these, each a mixture of nuisance and bits, carry most of an image, so the first Jacobians
have few columns and bring the latent near; only the last ones, which must tell the bits from
everything else, have all.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from lfp_jax import fingerprint
from lfp_jax.attribution.inversion import Silent, Solution, check, decode_flat, residual
from lfp_jax.errors import UserError
from lfp_jax.logs import Progress

_CHUNK = 64  # tangents pushed through the generator at once
_BOUND = 1.0 - 1.0 / 255.0  # a target beyond this may have been clipped
_QUANTUM = (2.0 / 255.0) ** 2 / 12.0  # variance of rounding to 8 bits on the [-1, 1] scale
_FLOOR = 1.1 * _QUANTUM**0.5  # a residual below this is rounding alone
_STALLED = 0.99  # a step that leaves more of the residual than this has stalled
_SHORT = (0.5, 0.25, 0.1)  # step lengths tried where full steps fail
_SLOW = 0.98  # a chord step that leaves more of the residual than this is the last one
_SHIFT = 3e-6  # of the trace: above what float32 loses in a product of many rows
_DOUBT = 0.05  # wrong bits expected below which an image is settled
_LOST = 8.0  # a residual above so many times that of the directions left out: no way from there
_THUMBNAIL = 16
_RIDGE = 0.1  # of the regression, as a share of the kernel's greatest value


class Bank(flax.struct.PyTreeNode):
    """What is known of a generator before any image: samples of the prior, and how it moves."""

    latents: jax.Array  # [N, d]
    thumbnails: jax.Array  # [N, t * t * C], small pictures of them
    regression: jax.Array  # [N, d], weights of kernel ridge regression, latents by thumbnails
    metric: jax.Array  # [d, d], mean of J^T J over the prior, J = d image / d latent


def thumbnails(images):
    """Average images [n, H, W, C] over blocks down to about 16 x 16; flat rows [n, t * t * C]."""
    n, height, width, channels = images.shape
    rows, columns = max(height // _THUMBNAIL, 1), max(width // _THUMBNAIL, 1)
    cut = images[:, : height // rows * rows, : width // columns * columns]
    blocks = cut.reshape(n, height // rows, rows, width // columns, columns, channels)
    return jnp.clip(blocks, -1.0, 1.0).mean((2, 4)).reshape(n, -1)


def make_bank(key, generator, *, size, jacobians=8, batch=256):
    """Decode samples of the prior, learn latents by their thumbnails, measure the mean metric.

    Made once a generator; shared by all design points, images and users.

    Args:
        key: draws the samples.
        generator: a frozen generator.
        size: samples.
        jacobians: of how many samples the metric is the mean; d evaluations each.
        batch: samples decoded at once.

    Raises:
        UserError: a size or a number of Jacobians below 1, or fewer samples than Jacobians.
    """
    if not size >= jacobians >= 1:
        raise UserError(f"A bank's size must be >= its Jacobians >= 1; got {size} and {jacobians}.")

    @jax.jit
    def draw(generator, key, start):
        w = generator.sample(key, batch, start=start)
        return w.reshape(batch, -1), thumbnails(generator.decode(w))

    parts, metric = [], 0.0
    with Progress(size, label="bank") as progress:
        for start in range(0, size, batch):
            parts.append(jax.device_get(draw(generator, key, start)))
            progress.update(min(start + batch, size))
        latents, small = (np.concatenate(part)[:size] for part in zip(*parts, strict=True))
        for w in latents[:jacobians]:
            metric += _local_metric(generator, w) / jacobians
            progress.update(size)
    return Bank(latents, small, _regress(small, latents), metric)


def _regress(small, latents):
    """Fit kernel ridge regression on the host: weights [N, d]."""
    kernel = np.array(_kernel(_squares(small, small), small))
    kernel[np.diag_indices(len(kernel))] += _RIDGE
    factor = scipy.linalg.cho_factor(kernel, overwrite_a=True, check_finite=False)
    return scipy.linalg.cho_solve(factor, latents - latents.mean(0))


@jax.jit
def _kernel(squares, small):
    """Gaussian kernel of squared distances, as wide as the mean one of the bank's thumbnails."""
    return jnp.exp(-jnp.maximum(squares, 0.0) / (2.0 * jnp.var(small, axis=0).sum()))


@jax.jit
def _squares(left, right):
    """Squared distances [n, m] of rows."""
    product = jnp.einsum("nt,mt->nm", left, right, precision="highest")
    norms = [jnp.sum(jnp.square(rows), axis=1) for rows in (left, right)]
    return norms[0][:, None] + norms[1][None] - 2.0 * product


@jax.jit
def _local_metric(generator, w):
    """J^T J of the image by the latent [d]."""
    tangents = jnp.eye(len(w), dtype=w.dtype)
    _, rows = _columns(lambda w: decode_flat(generator, w[None])[0], w, tangents)
    return _gram(rows)


@partial(jax.jit, static_argnames=("count",))
def guesses(bank, images, *, count):
    """Guess latents [n, count, d] of images: by regression, then the nearest samples of the bank.

    Regression is nearer on the whole, a sample is never far off the prior.
    """
    squares = _squares(thumbnails(images), bank.thumbnails)
    kernel = _kernel(squares, bank.thumbnails)
    regressed = jnp.einsum("nb,bd->nd", kernel, bank.regression, precision="highest")
    first = jnp.mean(bank.latents, axis=0)[None] + regressed
    near = jax.lax.top_k(-squares, count - 1)[1]
    return jnp.concatenate([first[:, None], bank.latents[near]], axis=1)


class _Frame(flax.struct.PyTreeNode):
    """theta -> w = mean + directions theta, most sensitive directions first."""

    mean: jax.Array  # [d]
    directions: jax.Array  # [d, q], a step of one standard deviation each
    nuisance: jax.Array  # [m, q], alpha / s of theta; m: nuisance directions
    bits: jax.Array  # [k, q], 2 phi - 1 of theta
    sensitivity: jax.Array  # [q], mean square change of the image along each, summed


def whiten(space, metric, *, strength, code, free):
    """Set up the whitened unknowns, by falling sensitivity of the image.

    The `free` most sensitive ones can move (None: all).
    """
    half = 0.5 * strength
    # strength c(phi) = half (2 phi - 1), shifted by half under the binary code.
    shift = half * jnp.sum(space.carrier, axis=1) if code == "binary" else 0.0
    loud = np.asarray(space.nuisance * space.nuisance_stddev[None], np.float64)
    steps = np.concatenate([loud, half * np.asarray(space.carrier, np.float64)], axis=1)
    squares, axes = np.linalg.eigh(steps.T @ np.asarray(metric, np.float64) @ steps)
    squares, axes = np.maximum(squares[::-1], 0.0)[:free], axes[:, ::-1][:, :free]
    nuisance, bits = np.split(axes, [loud.shape[1]])
    arrays = (steps @ axes, nuisance, bits, squares)
    return _Frame(space.mean + shift, *(jnp.asarray(array, jnp.float32) for array in arrays))


def _begin(frame, space, latents):
    """Unknowns [n, q] of latents [n, d]: their nuisance, and bits at one half."""
    alpha = fingerprint.whitened_nuisance(space, latents)
    return jnp.einsum("nm,mq->nq", alpha, frame.nuisance, precision="highest")


def _place(frame, theta):
    """Latents [n, d] of unknowns [n, q]."""
    return frame.mean[None] + jnp.einsum("dq,nq->nd", frame.directions, theta, precision="highest")


def _model(generator, frame, theta):
    return decode_flat(generator, _place(frame, theta[None]))[0]


def _difference(made, target):
    """Pixel residual, zero where a clipped target is overshot; and the mask of live pixels."""
    over = (target >= _BOUND) & (made > target) | (target <= -_BOUND) & (made < target)
    return jnp.where(over, 0.0, made - target), ~over


def _columns(function, x, tangents):
    """Value of a function and its derivatives [t, size] along tangents [t, ...], in chunks."""
    count = len(tangents)
    padded = jnp.pad(tangents, ((0, -count % _CHUNK), (0, 0))).reshape(-1, _CHUNK, len(x))
    value, push = jax.linearize(function, x)
    return value, jax.lax.map(jax.vmap(push), padded).reshape(-1, value.size)[:count]


def _gram(rows):
    return jnp.einsum("qp,rp->qr", rows, rows, precision="highest")


def _cost(difference, theta, variance):
    return jnp.sum(jnp.square(difference)) / variance + jnp.sum(jnp.square(theta))


def _variance(difference):
    return jnp.maximum(jnp.mean(jnp.square(difference)), _QUANTUM)


def _look(generator, frame, target, theta):
    return _difference(_model(generator, frame, theta), target)[0]


def _best_length(look, theta, here, step, variance, lengths):
    """Go the best of some lengths along a step, or stay; give theta and its difference."""
    trials = theta[None] + jnp.asarray(lengths)[:, None] * step[None]
    differences = jnp.concatenate([here[None], jax.vmap(look)(trials)])
    trials = jnp.concatenate([theta[None], trials])
    costs = jax.vmap(partial(_cost, variance=variance))(differences, trials)
    best = jnp.argmin(jnp.where(jnp.isfinite(costs), costs, jnp.inf))
    return trials[best], differences[best]


@partial(jax.jit, static_argnames=("rank",))
def _linearise(generator, frame, targets, theta, *, rank):
    """Differences [n, H, W, C] and Jacobians [n, rank, H * W * C], 0 at pixels out of play."""

    def one(target, theta):
        tangents = jnp.eye(rank, len(theta))
        image, jacobian = _columns(partial(_model, generator, frame), theta, tangents)
        difference, live = _difference(image, target)
        return difference, jacobian * live.reshape(1, -1)

    return jax.vmap(one)(targets, theta)


@jax.jit
def _factors(jacobians):
    """Lower triangular factors [n, a, a] of J^T J / _QUANTUM + I, from rows J [n, a, p].

    The product spans more than float32 holds, and its Cholesky factor would often be NaN. So that
    of a shifted product first, which makes the rows nearly orthogonal, and then that of the new
    product: shifted CholeskyQR (Fukaya et al., SIAM J. Sci. Comput. 2020), all matrix products.
    """

    def one(jacobian):
        unit = jnp.eye(len(jacobian))
        rows = jnp.concatenate([jacobian / _QUANTUM**0.5, unit], axis=1)
        product = _gram(rows)
        first = jnp.linalg.cholesky(product + _SHIFT * jnp.trace(product) * unit)
        inverse = jax.scipy.linalg.solve_triangular(first, unit, lower=True)
        rows = jnp.einsum("qr,rp->qp", inverse, rows, precision="highest")
        return jnp.einsum("qr,rs->qs", first, jnp.linalg.cholesky(_gram(rows)), precision="highest")

    return jax.vmap(one)(jacobians)


def _damp(factor, variance):
    """Lower triangular factor of J^T J / variance + I from that at the variance of rounding."""
    share = _QUANTUM / variance
    unit = jnp.eye(len(factor))
    stacked = [jnp.sqrt(share) * factor.T, jnp.sqrt(jnp.maximum(1.0 - share, 0.0)) * unit]
    return jnp.linalg.qr(jnp.concatenate(stacked), mode="r").T


@jax.jit
def _damping(factors, differences):
    """Noise variances [n], those of the residuals, and factors [n, a, a] damped for them."""
    variances = jax.vmap(_variance)(differences)
    return variances, jax.vmap(_damp)(factors, variances)


@jax.jit
def _chord(generator, frame, targets, theta, differences, jacobians, damped, variances):
    """Make one full step with the Jacobians at hand; theta, differences and variances there."""

    def one(target, theta, *linear):
        theta = theta + _newton(theta, *linear)
        difference = _look(generator, frame, target, theta)
        return theta, difference, _variance(difference)

    return jax.vmap(one)(targets, theta, differences, jacobians, damped, variances)


def _newton(theta, difference, jacobian, damped, variance):
    rank = len(jacobian)
    slope = jnp.einsum("ap,p->a", jacobian, difference.reshape(-1), precision="highest")
    step = -jax.scipy.linalg.cho_solve((damped, True), slope / variance + theta[:rank])
    return jnp.pad(step, (0, len(theta) - rank))


@jax.jit
def _settle(generator, frame, targets, begin, end, jacobians, damped, variances, factors):
    """Keep what a row of chord steps reached, or go a short way: theta, soft bits, residuals."""

    def one(target, begin, end, jacobian, damped, variance, factor):
        theta, start = begin
        step = _newton(theta, start, jacobian, damped, variance)
        look = partial(_look, generator, frame, target)
        short = _best_length(look, theta, start, step, variance, _SHORT)
        improved = _cost(end[1], end[0], variance) < _cost(start, theta, variance)
        theta, difference = jax.tree.map(partial(jnp.where, improved), end, short)
        soft = _soft_bits(frame.bits, theta, _damp(factor, _variance(difference)))
        return theta, soft, jnp.sqrt(jnp.mean(jnp.square(difference)))

    return jax.vmap(one)(targets, begin, end, jacobians, damped, variances, factors)


def _soft_bits(rows, theta, factor):
    """Probability that each bit is one: Gaussian at the solution, nuisance marginalised.

    `rows` [k, q] give the whitened bits of theta. `factor` is that of the Gauss-Newton matrix of
    the leading unknowns; the others have their prior's variance. The curvature of the generator and
    directions left out are not in that matrix, but in how far the bits lie from -1 or 1, which they
    are: so their variance is at least this spread. Where it is not finite nothing is known: 1/2.
    """
    rank = len(factor)
    half = jax.scipy.linalg.solve_triangular(factor, rows[:, :rank].T, lower=True)
    variance = jnp.sum(jnp.square(half), axis=0) + jnp.sum(jnp.square(rows[:, rank:]), axis=1)
    bits = jnp.einsum("kq,q->k", rows, theta, precision="highest")
    spread = jnp.mean(jnp.square(jnp.abs(bits) - 1.0))
    soft = jax.nn.sigmoid(2.0 * bits / jnp.maximum(variance, spread))
    return jnp.where(jnp.isnan(soft), 0.5, soft)


def _outer_step(generator, frame, targets, theta, *, rank, chords):
    """One Jacobian and its chord steps for each of n images, n Jacobians in memory.

    Returns theta, soft bits, residuals and evaluations of each.
    """
    differences, jacobians = _linearise(generator, frame, targets, theta, rank=rank)
    factors = _factors(jacobians)
    variances, damped = _damping(factors, differences)
    linear = jacobians, damped, variances
    begin = end = (theta, differences)
    goes_on, count, before = np.full(len(theta), True), np.zeros(len(theta), int), variances
    for step in range(chords):
        *reached, after = _chord(generator, frame, targets, *end, *linear)
        end = jax.tree.map(partial(_choose, goes_on), tuple(reached), end)
        count += goes_on
        goes_on = goes_on & ((step == 0) | np.asarray(after < _SLOW**2 * before))
        before = after
        if not goes_on.any():
            break
    found = _settle(generator, frame, targets, begin, end, *linear, factors)
    columns = rank + -rank % _CHUNK
    return *found, 1 + columns + count + len(_SHORT)


def _choose(mask, yes, no):
    return jnp.where(mask.reshape(-1, *[1] * (yes.ndim - 1)), yes, no)


def lm(
    key,
    generator,
    space,
    images,
    *,
    strength,
    code,
    bank,
    free=None,
    ranks=(64, 128, 384),
    jacobians=4,
    chords=12,
    starts=4,
    progress=True,
):
    """Estimate keys by Levenberg-Marquardt from what a bank guesses.

    An image is settled when its residual is down to 8-bit rounding, or when its bits are sure. Only
    the others go on, first with more Jacobians and then from their next start, so `starts` and
    `jacobians` are bounds and not the cost. Of all starts the one with the least residual counts.

    Args:
        key: unused; every estimator takes one.
        generator: a frozen generator.
        space: carrier, nuisance and mean.
        images: [n, H, W, C] in [-1, 1], already through 8 bits.
        strength, code: as injected.
        bank: starts and metric (`make_bank`).
        free: most sensitive directions that can move at all, the others stay at zero; None: all.
        ranks: most sensitive directions in the first Jacobians, one number each; those that follow
            have all that are free.
        jacobians: of those that follow, at most, from each start.
        chords: chord steps on each Jacobian, at most.
        starts: guesses of the bank to start from, at most.
        progress: show a progress line.

    Returns:
        A Solution; soft bits are sigmoid(2 b / var b) of the whitened bit b at the solution.

    Raises:
        UserError: images of another shape than the generator's, or an option out of bounds.
    """
    del key
    images = jnp.asarray(images)
    check(generator, images, starts=starts, jacobians=jacobians, chords=chords)
    if min(ranks, default=1) < 1 or (free is not None and free < 1):
        raise UserError(f"ranks and free must be >= 1; got {tuple(ranks)} and {free}.")
    if starts > len(bank.latents):
        raise UserError(f"starts must be <= the bank's {len(bank.latents)} samples; got {starts}.")
    frame = whiten(space, bank.metric, strength=strength, code=code, free=free)
    q = frame.directions.shape[1]
    plan = [min(rank, q) for rank in ranks] + [q] * jacobians
    n = len(images)
    guessed = guesses(bank, images, count=starts)
    theta = np.zeros((n, q), np.float32)
    soft = np.zeros((n, space.carrier.shape[1]), np.float32)
    rms, evaluations = np.full(n, np.inf), np.ones(n)
    with Progress(n, label="lm") if progress else Silent() as line:
        for i in range(n):
            image = images[i : i + 1]
            for start in range(starts):
                begin = _begin(frame, space, guessed[i : i + 1, start])
                found = _attempt(
                    generator, frame, image, begin, plan=plan, coarse=len(ranks), chords=chords
                )
                evaluations[i] += found[3]
                if start == 0 or found[2] < rms[i]:
                    theta[i], soft[i], rms[i] = found[:3]
                if _settled(rms[i], soft[i]):
                    break
            line.update(i + 1, residual=float(rms[i]))
    w = _place(frame, jnp.asarray(theta))
    return Solution(soft, w, residual(generator, w, images), evaluations)


def _attempt(generator, frame, image, theta, *, plan, coarse, chords):
    """Descend from one start [1, q] along a plan of ranks: theta, soft bits, residual, evaluations.

    It ends when the image is settled, when all directions no longer lower the residual, or among
    the `coarse` first ranks if it is far above what the directions left out would leave.
    """
    rms, spent = np.inf, 0
    for i, rank in enumerate(plan):
        if 0 < i < coarse and rms > _LOST * _left_out(frame, plan[i - 1], image.size) > 0.0:
            break
        before = rms
        theta, soft, rms, cost = _outer_step(
            generator, frame, image, theta, rank=rank, chords=chords
        )
        rms, soft, spent = float(rms[0]), np.asarray(soft[0]), spent + int(cost[0])
        if _settled(rms, soft) or (rank == plan[-1] and not rms < _STALLED * before):
            break
    return np.asarray(theta[0]), soft, rms, spent


def _settled(rms, soft):
    return rms <= _FLOOR or np.sum(np.minimum(soft, 1.0 - soft)) < _DOUBT


def _left_out(frame, rank, size):
    """Expect the residual that the directions beyond a rank leave, to first order."""
    return float(jnp.sqrt(jnp.sum(frame.sensitivity[rank:]) / size))
