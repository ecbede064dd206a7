"""Estimate the key of images by Levenberg-Marquardt: estimator `lm`.

Unknowns, whitened, theta = (alpha / s of the nuisance directions, 2 phi - 1), with prior N(0, I).
Residuals are pixel differences; a pixel the 8-bit range clips counts only when the model is on the
wrong side of the bound. The noise variance v follows the current residual, so early steps are
damped by the prior and late ones are exact. Every step solves

    (J^T J / v + I) step = -(J^T r / v + theta)

with one Jacobian (forward mode, a column an evaluation), which serves a row of chord steps. Those
are taken in full, though the first may raise the residual: it lands beside the curved valley, the
bits right already, and the next ones fall back to its floor. A line search would allow small steps
only.

Coarse to fine: the nuisance directions are ordered by how much the image moves along them, on
average over the prior, and not by how much the latent does. A few dozen of these carry most of an
image, so the first Jacobians have few columns and bring the latent near; only the last ones, which
must find the bits below everything else, have all.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

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
_SETTLED = 0.98  # a chord step that leaves more of the residual than this is the last one
_SHIFT = 3e-6  # of the trace: above what float32 loses in a product of many rows
_LOST = 4.0  # a residual above so many times that of the directions left out: no way from there
_THUMBNAIL = 16


class Bank(flax.struct.PyTreeNode):
    """What is known of a generator before any image: samples of the prior, and how it moves."""

    latents: jax.Array  # [N, d]
    thumbnails: jax.Array  # [N, t * t * C], small pictures of them: the nearest one is a start
    metric: jax.Array  # [d, d], mean of J^T J over the prior, J = d image / d latent


def thumbnails(images):
    """Average images [n, H, W, C] over blocks down to about 16 x 16; flat rows [n, t * t * C]."""
    n, height, width, channels = images.shape
    rows, columns = max(height // _THUMBNAIL, 1), max(width // _THUMBNAIL, 1)
    cut = images[:, : height // rows * rows, : width // columns * columns]
    blocks = cut.reshape(n, height // rows, rows, width // columns, columns, channels)
    return jnp.clip(blocks, -1.0, 1.0).mean((2, 4)).reshape(n, -1)


def make_bank(key, generator, *, size, jacobians=8, batch=256):
    """Decode `size` samples of the prior, keep their thumbnails, and measure the mean metric.

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
    return Bank(jnp.asarray(latents), jnp.asarray(small), metric)


@jax.jit
def _local_metric(generator, w):
    """J^T J of the image by the latent [d]."""
    tangents = jnp.eye(len(w), dtype=w.dtype)
    _, rows = _columns(lambda w: decode_flat(generator, w[None])[0], w, tangents)
    return _gram(rows)


@partial(jax.jit, static_argnames=("count",))
def nearest(bank, images, *, count=1):
    """Find the latents [n, count, d] of the bank whose thumbnails are nearest to the images'."""
    small = thumbnails(images)
    distance = jnp.sum(jnp.square(bank.thumbnails), axis=1)[None] - 2.0 * jnp.einsum(
        "nt,bt->nb", small, bank.thumbnails, precision="highest"
    )
    return bank.latents[jax.lax.top_k(-distance, count)[1]]


class _Frame(flax.struct.PyTreeNode):
    """theta -> w = mean + directions theta."""

    mean: jax.Array  # [d]
    directions: jax.Array  # [d, q], scaled: nuisance stddev, then strength / 2
    rotation: jax.Array  # [m - k, q - k], of whitened nuisance coordinates
    sensitivity: jax.Array  # [q - k], mean square change of the image along each, summed

    @property
    def nuisance(self):
        """How many of the unknowns, the leading ones, are nuisance."""
        return len(self.sensitivity)


def whiten(space, metric, *, strength, code, nuisance):
    """Set up the whitened coordinates, the nuisance by falling sensitivity of the image.

    The `nuisance` most sensitive ones stay free (None: all).
    """
    free = space.nuisance.shape[1] if nuisance is None else min(nuisance, space.nuisance.shape[1])
    half = 0.5 * strength
    # strength c(phi) = half (2 phi - 1), shifted by half under the binary code.
    shift = half * jnp.sum(space.carrier, axis=1) if code == "binary" else 0.0
    loud = np.asarray(space.nuisance * space.nuisance_stddev[None], np.float64)
    squares, axes = np.linalg.eigh(loud.T @ np.asarray(metric, np.float64) @ loud)
    squares, rotation = np.maximum(squares[::-1][:free], 0.0), axes[:, ::-1][:, :free]
    directions = np.concatenate([loud @ rotation, half * np.asarray(space.carrier)], axis=1)
    return _Frame(
        space.mean + shift,
        jnp.asarray(directions, jnp.float32),
        jnp.asarray(rotation, jnp.float32),
        jnp.asarray(squares, jnp.float32),
    )


def _begin(frame, space, latents):
    """Unknowns [n, q] of latents [n, d]: their nuisance, and bits at one half."""
    alpha = fingerprint.whitened_nuisance(space, latents)
    alpha = jnp.einsum("nm,mf->nf", alpha, frame.rotation, precision="highest")
    return np.pad(np.asarray(alpha), ((0, 0), (0, space.carrier.shape[1])))


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


def _active(frame, rank):
    """Indices of the unknowns that move: the `rank` most sensitive directions, and the bits."""
    return np.concatenate([np.arange(rank), np.arange(frame.nuisance, frame.directions.shape[1])])


@partial(jax.jit, static_argnames=("rank",))
def _linearise(generator, frame, targets, theta, *, rank):
    """Differences [n, H, W, C] and Jacobians [n, a, H * W * C], zero at pixels out of play."""

    def one(target, theta):
        tangents = jnp.eye(len(theta))[_active(frame, rank)]
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


@partial(jax.jit, static_argnames=("rank",))
def _chord(generator, frame, targets, theta, differences, jacobians, damped, variances, *, rank):
    """Make one full step with the Jacobians at hand; theta, differences and variances there."""

    def one(target, theta, *linear):
        theta = theta + _newton(_active(frame, rank), theta, *linear)
        difference = _look(generator, frame, target, theta)
        return theta, difference, _variance(difference)

    return jax.vmap(one)(targets, theta, differences, jacobians, damped, variances)


def _newton(active, theta, difference, jacobian, damped, variance):
    slope = jnp.einsum("ap,p->a", jacobian, difference.reshape(-1), precision="highest")
    step = -jax.scipy.linalg.cho_solve((damped, True), slope / variance + theta[active])
    return jnp.zeros_like(theta).at[active].set(step)


@partial(jax.jit, static_argnames=("rank",))
def _settle(generator, frame, targets, begin, end, jacobians, damped, variances, factors, *, rank):
    """Keep what a row of chord steps reached, or go a short way: theta, soft bits, residuals."""

    def one(target, begin, end, jacobian, damped, variance, factor):
        theta, start = begin
        step = _newton(_active(frame, rank), theta, start, jacobian, damped, variance)
        look = partial(_look, generator, frame, target)
        short = _best_length(look, theta, start, step, variance, _SHORT)
        improved = _cost(end[1], end[0], variance) < _cost(start, theta, variance)
        theta, difference = jax.tree.map(partial(jnp.where, improved), end, short)
        soft = _soft_bits(theta[frame.nuisance :], _damp(factor, _variance(difference)))
        return theta, soft, jnp.sqrt(jnp.mean(jnp.square(difference)))

    return jax.vmap(one)(targets, begin, end, jacobians, damped, variances, factors)


def _soft_bits(bits, factor):
    """Probability that each bit is one: Gaussian at the solution, nuisance marginalised.

    `factor` is that of the Gauss-Newton matrix, its last rows those of the whitened bits [k];
    where it is not finite nothing is known: one half.
    """
    units = jnp.eye(len(factor))[:, len(factor) - len(bits) :]
    half = jax.scipy.linalg.solve_triangular(factor, units, lower=True)
    soft = jax.nn.sigmoid(2.0 * bits / jnp.sum(jnp.square(half), axis=0))
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
        *reached, after = _chord(generator, frame, targets, *end, *linear, rank=rank)
        end = jax.tree.map(partial(_choose, goes_on), tuple(reached), end)
        count += goes_on
        goes_on = goes_on & ((step == 0) | np.asarray(after < _SETTLED**2 * before))
        before = after
        if not goes_on.any():
            break
    found = _settle(generator, frame, targets, begin, end, *linear, factors, rank=rank)
    columns = jacobians.shape[1] + -jacobians.shape[1] % _CHUNK
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
    nuisance=None,
    ranks=(64, 64, 128, 256),
    jacobians=4,
    chords=12,
    starts=4,
    progress=True,
):
    """Estimate keys by Levenberg-Marquardt from the nearest samples of a bank.

    An image is settled when its residual is down to 8-bit rounding. Only the others go on, first
    with more Jacobians and then from their next start, so `starts` and `jacobians` are bounds and
    not the cost. Of all starts the one with the least residual counts.

    Args:
        key: unused; every estimator takes one.
        generator: a frozen generator.
        space: carrier, nuisance and mean.
        images: [n, H, W, C] in [-1, 1], already through 8 bits.
        strength, code: as injected.
        bank: starts and metric (`make_bank`).
        nuisance: most sensitive nuisance directions that stay free, the others stay at zero; None:
            all.
        ranks: nuisance directions of the first Jacobians, one each; those that follow have all.
        jacobians: of those that follow, at most, from each start.
        chords: chord steps on each Jacobian, at most.
        starts: samples of the bank to start from, at most.
        progress: show a progress line.

    Returns:
        A Solution; soft bits are sigmoid(2 b / var b) of the whitened bit b at the solution.

    Raises:
        UserError: images of another shape than the generator's, or an option out of bounds.
    """
    del key
    images = jnp.asarray(images)
    check(generator, images, starts=starts, jacobians=jacobians, chords=chords)
    if min(ranks, default=0) < 0 or (nuisance is not None and nuisance < 0):
        raise UserError(f"ranks and nuisance must be >= 0; got {tuple(ranks)} and {nuisance}.")
    if starts > len(bank.latents):
        raise UserError(f"starts must be <= the bank's {len(bank.latents)} samples; got {starts}.")
    frame = whiten(space, bank.metric, strength=strength, code=code, nuisance=nuisance)
    plan = [min(rank, frame.nuisance) for rank in ranks] + [frame.nuisance] * jacobians
    n = len(images)
    near = nearest(bank, images, count=starts)
    theta = np.zeros((n, frame.directions.shape[1]), np.float32)
    soft = np.zeros((n, space.carrier.shape[1]), np.float32)
    rms, evaluations = np.full(n, np.inf), np.ones(n)
    with Progress(n, label="lm") if progress else Silent() as line:
        for i in range(n):
            image = images[i : i + 1]
            for start in range(starts):
                begin = _begin(frame, space, near[i : i + 1, start])
                found = _attempt(
                    generator, frame, image, begin, plan=plan, coarse=len(ranks), chords=chords
                )
                evaluations[i] += found[3]
                if start == 0 or found[2] < rms[i]:
                    theta[i], soft[i], rms[i] = found[:3]
                if rms[i] <= _FLOOR:
                    break
            line.update(i + 1, residual=float(rms[i]))
    w = _place(frame, jnp.asarray(theta))
    return Solution(soft, w, residual(generator, w, images), evaluations)


def _attempt(generator, frame, image, theta, *, plan, coarse, chords):
    """Descend from one start [1, q] along a plan of ranks: theta, soft bits, residual, evaluations.

    It ends when the residual is down to rounding, when all directions no longer lower it, or after
    the `coarse` first ranks if it is far above what the directions left out would leave.
    """
    rms, spent = np.inf, 0
    for i, rank in enumerate(plan):
        if 0 < i == coarse and rms > _LOST * _left_out(frame, plan[i - 1], image.size) > 0.0:
            break
        before = rms
        theta, soft, rms, cost = _outer_step(
            generator, frame, image, theta, rank=rank, chords=chords
        )
        rms, spent = float(rms[0]), spent + int(cost[0])
        if rms <= _FLOOR or (rank == frame.nuisance and not rms < _STALLED * before):
            break
    return np.asarray(theta[0]), np.asarray(soft[0]), rms, spent


def _left_out(frame, rank, size):
    """Expect the residual that the directions beyond a rank leave, to first order."""
    return float(jnp.sqrt(jnp.sum(frame.sensitivity[rank:]) / size))
