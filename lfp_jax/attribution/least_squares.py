"""Estimate the key of images by Levenberg-Marquardt: estimator `lm`.

Unknowns, whitened, theta = (alpha / s of the leading nuisance directions, 2 phi - 1), with prior
N(0, I). Residuals are pixel differences; a pixel the 8-bit range clips counts only when the model
is on the wrong side of the bound. The noise variance v follows the current residual, so early
steps are damped by the prior and late ones are exact. Every step solves

    (J^T J / v + I) step = -(J^T r / v + theta)

Far off, by a few conjugate gradients, which need no Jacobian: the prior whitens the unknowns so
well that they converge at once along what matters. Near, where the bits are weak beside bent, stiff
directions, by one Jacobian (chunked forward mode) and its Cholesky factor, which serve a row of
chord steps. Those are taken in full, though the first may raise the residual: it lands beside the
curved valley, the bits right already, and the next ones fall back to its floor. A line search
would allow small steps only.
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
_STALLED = 0.99  # an outer step that leaves more of the residual than this has stalled
_SHRINK = (1.0, 0.5, 0.25, 0.1)  # step lengths tried where a full step may fail
_SETTLED = 0.98  # a chord step that leaves more of the residual than this is the last one
_CPU_UNROLL = 10  # on CPU a gradient inside a scan runs five times slower than unrolled
_SHIFT = 3e-6  # of the trace: above what float32 loses in a product of many rows
_TINY = 1e-20  # keeps a quotient of a solved system finite
_THUMBNAIL = 16


class Bank(flax.struct.PyTreeNode):
    """Samples of the prior and small pictures of them: the nearest one is a start."""

    latents: jax.Array  # [N, d]
    thumbnails: jax.Array  # [N, t * t * C]


def thumbnails(images):
    """Average images [n, H, W, C] over blocks down to about 16 x 16; flat rows [n, t * t * C]."""
    n, height, width, channels = images.shape
    rows, columns = max(height // _THUMBNAIL, 1), max(width // _THUMBNAIL, 1)
    cut = images[:, : height // rows * rows, : width // columns * columns]
    blocks = cut.reshape(n, height // rows, rows, width // columns, columns, channels)
    return jnp.clip(blocks, -1.0, 1.0).mean((2, 4)).reshape(n, -1)


def make_bank(key, generator, *, size, batch=256):
    """Decode `size` samples of the prior and keep their thumbnails.

    Made once a generator and design point; shared by all images and users.

    Raises:
        UserError: a size below 1.
    """
    if size < 1:
        raise UserError(f"A bank's size must be >= 1; got {size}.")

    @jax.jit
    def draw(generator, key, start):
        w = generator.sample(key, batch, start=start)
        return w.reshape(batch, -1), thumbnails(generator.decode(w))

    parts = []
    with Progress(size, label="bank") as progress:
        for start in range(0, size, batch):
            parts.append(jax.device_get(draw(generator, key, start)))
            progress.update(min(start + batch, size))
    latents, small = (np.concatenate(part)[:size] for part in zip(*parts, strict=True))
    return Bank(jnp.asarray(latents), jnp.asarray(small))


@partial(jax.jit, static_argnames=("count",))
def nearest(bank, images, *, count=1):
    """Find the latents [n, count, d] of the bank whose thumbnails are nearest to the images'."""
    small = thumbnails(images)
    distance = jnp.sum(jnp.square(bank.thumbnails), axis=1)[None] - 2.0 * jnp.einsum(
        "nt,bt->nb", small, bank.thumbnails, precision="highest"
    )
    return bank.latents[jax.lax.top_k(-distance, count)[1]]


class _Directions(flax.struct.PyTreeNode):
    """theta -> w = mean + directions theta."""

    mean: jax.Array  # [d]
    directions: jax.Array  # [d, q], scaled: nuisance stddev, then strength / 2
    nuisance: int = flax.struct.field(pytree_node=False)  # leading entries that are nuisance


def whiten(space, *, strength, code, nuisance):
    """Set up the whitened coordinates; `nuisance` leading directions stay free (None: all)."""
    free = space.nuisance.shape[1] if nuisance is None else min(nuisance, space.nuisance.shape[1])
    half = 0.5 * strength
    # strength c(phi) = half (2 phi - 1), shifted by half under the binary code.
    shift = half * jnp.sum(space.carrier, axis=1) if code == "binary" else 0.0
    loud = space.nuisance[:, :free] * space.nuisance_stddev[None, :free]
    directions = jnp.concatenate([loud, half * space.carrier], axis=1)
    return _Directions(space.mean + shift, directions, free)


def _place(frame, theta):
    """Latents [n, d] of unknowns [n, q]."""
    return frame.mean[None] + jnp.einsum("dq,nq->nd", frame.directions, theta, precision="highest")


def _images(generator, frame, theta):
    return decode_flat(generator, _place(frame, theta))


def _model(generator, frame, theta):
    return _images(generator, frame, theta[None])[0]


def _difference(made, target):
    """Pixel residual, zero where a clipped target is overshot; and the mask of live pixels."""
    over = (target >= _BOUND) & (made > target) | (target <= -_BOUND) & (made < target)
    return jnp.where(over, 0.0, made - target), ~over


def _jacobian(generator, frame, theta):
    """Image [H, W, C] and Jacobian [q, H * W * C] by forward mode, a chunk of tangents a time."""
    count = theta.shape[0]
    tangents = jnp.eye(count, dtype=theta.dtype)
    tangents = jnp.pad(tangents, ((0, -count % _CHUNK), (0, 0))).reshape(-1, _CHUNK, count)
    image, push = jax.linearize(lambda theta: _model(generator, frame, theta), theta)
    columns = jax.lax.map(jax.vmap(push), tangents)
    return image, columns.reshape(-1, image.size)[:count]


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


# --- far off: conjugate gradients ----------------------------------------------------------------


def _dot(a, b):
    return jnp.einsum("nq,nq->n", a, b, precision="highest")[:, None]


@partial(jax.jit, static_argnames=("iterations", "unroll"))
def _conjugate_gradients(generator, frame, targets, theta, carry, *, iterations, unroll):
    """Solve for the steps [n, q] of a batch; carry = (steps, residuals, directions), or None."""
    made, push = jax.linearize(lambda theta: _images(generator, frame, theta), theta)
    pull = jax.linear_transpose(push, theta)
    difference, live = _difference(made, targets)
    variance = jax.vmap(_variance)(difference)[:, None]
    if carry is None:
        slope = -(pull(difference)[0] / variance + theta)
        carry = (jnp.zeros_like(theta), slope, slope)

    def iterate(carry, _):
        steps, residual, direction = carry
        image = pull(push(direction) * live)[0] / variance + direction
        square = _dot(residual, residual)
        length = square / jnp.maximum(_dot(direction, image), _TINY)
        steps, residual = steps + length * direction, residual - length * image
        turn = _dot(residual, residual) / jnp.maximum(square, _TINY)
        return (steps, residual, residual + turn * direction), None

    if unroll:
        for _ in range(iterations):
            carry, _ = iterate(carry, None)
        return carry
    return jax.lax.scan(iterate, carry, length=iterations)[0]


@jax.jit
def _best_lengths(generator, frame, targets, theta, steps):
    """Go the best of a few lengths along the steps of a batch."""

    def go(theta, target, step):
        look = partial(_look, generator, frame, target)
        here = look(theta)
        return _best_length(look, theta, here, step, _variance(here), _SHRINK)[0]

    return jax.vmap(go)(theta, targets, steps)


def _descend(generator, frame, targets, theta, iterations):
    """Make one step by conjugate gradients; give theta and evaluations."""
    unroll = jax.default_backend() == "cpu"
    chunk = _CPU_UNROLL if unroll else iterations
    carry, calls = None, range(0, iterations, chunk)
    for done in calls:
        carry = _conjugate_gradients(
            generator, frame, targets, theta, carry,
            iterations=min(chunk, iterations - done), unroll=unroll,
        )  # fmt: skip
    theta = _best_lengths(generator, frame, targets, theta, carry[0])
    # Each call places the images anew; a slope counts 2, an iteration 3.
    return np.asarray(theta), len(calls) + 2 + 3 * iterations + 1 + len(_SHRINK)


# --- near: one Jacobian and chord steps ----------------------------------------------------------


@jax.jit
def _linearise(generator, frame, targets, theta):
    """Differences [n, H, W, C] and Jacobians [n, q, H * W * C], zero at pixels out of play."""

    def one(target, theta):
        image, jacobian = _jacobian(generator, frame, theta)
        difference, live = _difference(image, target)
        return difference, jacobian * live.reshape(1, -1)

    return jax.vmap(one)(targets, theta)


def _gram(a):
    return jnp.einsum("qp,rp->qr", a, a, precision="highest")


@jax.jit
def _factors(jacobians):
    """Lower triangular factors [n, q, q] of J^T J / _QUANTUM + I, from rows J [n, q, p].

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
def _chord(generator, frame, targets, theta, differences, jacobians, damped, variances):
    """Make one full step with the Jacobians at hand; give theta and the differences there."""

    def one(target, theta, difference, jacobian, damped, variance):
        step = _newton(theta, difference, jacobian, damped, variance)
        return theta + step, _look(generator, frame, target, theta + step)

    return jax.vmap(one)(targets, theta, differences, jacobians, damped, variances)


def _newton(theta, difference, jacobian, damped, variance):
    slope = jnp.einsum("qp,p->q", jacobian, difference.reshape(-1), precision="highest")
    return -jax.scipy.linalg.cho_solve((damped, True), slope / variance + theta)


@jax.jit
def _settle(generator, frame, targets, begin, end, jacobians, factors, damped):
    """Keep what a row of chord steps reached, or go a short way: theta, soft bits, residuals."""

    def one(target, begin, end, jacobian, factor, damped):
        theta, start = begin
        variance = _variance(start)
        step = _newton(theta, start, jacobian, damped, variance)
        look = partial(_look, generator, frame, target)
        short = _best_length(look, theta, start, step, variance, _SHRINK[1:])
        improved = _cost(end[1], end[0], variance) < _cost(start, theta, variance)
        theta, difference = jax.tree.map(partial(jnp.where, improved), end, short)
        square = jnp.mean(jnp.square(difference))
        soft = _soft_bits(frame, theta, _damp(factor, jnp.maximum(square, _QUANTUM)))
        return theta, soft, jnp.sqrt(square)

    return jax.vmap(one)(targets, begin, end, jacobians, factors, damped)


def _outer_steps(generator, frame, targets, theta, chords):
    """One Jacobian and its chord steps for each of n images, n Jacobians in memory.

    Returns theta, soft bits, residuals and evaluations of each.
    """
    differences, jacobians = _linearise(generator, frame, targets, theta)
    factors = _factors(jacobians)
    variances = jax.vmap(_variance)(differences)
    damped = jax.vmap(_damp)(factors, variances)
    begin = end = (theta, differences)
    goes_on, count = np.full(len(theta), True), np.zeros(len(theta), int)
    squares = np.asarray(variances)
    for step in range(chords):
        reached = _chord(generator, frame, targets, *end, jacobians, damped, variances)
        end = jax.tree.map(partial(_choose, goes_on), reached, end)
        count += goes_on
        before, squares = squares, np.asarray(jax.vmap(_variance)(end[1]))
        goes_on = goes_on & ((step == 0) | (squares < _SETTLED**2 * before))
        if not goes_on.any():
            break
    found = _settle(generator, frame, targets, begin, end, jacobians, factors, damped)
    columns = theta.shape[1] + -theta.shape[1] % _CHUNK
    return *found, 1 + columns + count + len(_SHRINK) - 1


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
    starts=3,
    gradients=(20, 30),
    jacobians=5,
    chords=12,
    batch=8,
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
        bank: prior samples to start from (`make_bank`).
        nuisance: leading nuisance directions that stay free, the others stay at zero; None: all.
        starts: samples of the bank to start from, at most.
        gradients: conjugate gradients of each step before the first Jacobian.
        jacobians: steps with a Jacobian, at most, from each start.
        chords: chord steps on each Jacobian, at most.
        batch: images a compiled call of conjugate gradients; a Jacobian is made an image at a time.
        progress: show a progress line.

    Returns:
        A Solution; soft bits are sigmoid(2 b / var b) of the whitened bit b at the solution.

    Raises:
        UserError: images of another shape than the generator's, or an option out of bounds.
    """
    del key
    images = jnp.asarray(images)
    check(generator, images, starts=starts, jacobians=jacobians, chords=chords, batch=batch)
    if min(gradients, default=1) < 1 or (nuisance is not None and nuisance < 0):
        raise UserError(
            f"gradients must be >= 1 and nuisance >= 0; got {tuple(gradients)} and {nuisance}."
        )
    if starts > len(bank.latents):
        raise UserError(f"starts must be <= the bank's {len(bank.latents)} samples; got {starts}.")
    frame = whiten(space, strength=strength, code=code, nuisance=nuisance)
    n, bits = len(images), space.carrier.shape[1]
    near = nearest(bank, images, count=starts).reshape(n * starts, -1)
    near = fingerprint.whitened_nuisance(space, near, count=frame.nuisance)
    near = np.pad(np.asarray(near), ((0, 0), (0, bits))).reshape(n, starts, -1)
    theta, soft = np.zeros_like(near[:, 0]), np.full((n, bits), 0.5, np.float32)
    rms, evaluations = np.full(n, np.inf, np.float32), np.ones(n)
    todo = np.arange(n)
    with Progress(n, label="lm") if progress else Silent() as line:
        for start in range(starts):
            found = _attempt(
                generator, frame, images[todo], near[todo, start],
                gradients=gradients, jacobians=jacobians, chords=chords, batch=batch,
                update=partial(line.update, n - len(todo)),
            )  # fmt: skip
            evaluations[todo] += found[3]
            better = (found[2] < rms[todo]) | (start == 0)
            won = todo[better]
            theta[won], soft[won], rms[won] = (part[better] for part in found[:3])
            todo = todo[~(rms[todo] <= _FLOOR)]
            if len(todo) == 0:
                break
        line.update(n)
    w = _place(frame, jnp.asarray(theta))
    return Solution(soft, w, residual(generator, w, images), evaluations)


def _attempt(generator, frame, images, theta, *, gradients, jacobians, chords, batch, update):
    """Descend from one start an image: theta, soft bits, residuals and evaluations of each."""
    n = len(images)
    theta, spent = theta.copy(), np.zeros(n)
    soft, rms = np.full((n, theta.shape[1] - frame.nuisance), 0.5), np.full(n, np.inf)
    for iterations in gradients:
        for rows, full in _batches(np.arange(n), batch):
            found, cost = _descend(generator, frame, images[full], theta[full], iterations)
            theta[rows], spent[rows] = found[: len(rows)], spent[rows] + cost
            update()
    going = np.arange(n)
    for _ in range(jacobians):
        before = rms.copy()
        for row in going:
            one = slice(row, row + 1)
            found = _outer_steps(generator, frame, images[one], theta[one], chords)
            theta[one], soft[one], rms[one], cost = map(np.asarray, found)
            spent[one] += cost
            update(residual=float(rms[row]))
        going = going[(rms[going] > _FLOOR) & (rms[going] < _STALLED * before[going])]
        if len(going) == 0:
            break
    return theta, soft, rms, spent


def _batches(rows, size):
    """Cut rows into batches: each as it is, and filled up to one shape, hence one compilation."""
    for i in range(0, len(rows), size):
        part = rows[i : i + size]
        yield part, np.resize(part, size)


def _soft_bits(frame, theta, factor):
    """Probability that each bit is one: Gaussian at the solution, nuisance marginalised.

    `factor` is that of the Gauss-Newton matrix; where it is not finite nothing is known: one half.
    """
    bits = theta[frame.nuisance :]
    units = jnp.eye(len(theta))[:, frame.nuisance :]
    half = jax.scipy.linalg.solve_triangular(factor, units, lower=True)
    soft = jax.nn.sigmoid(2.0 * bits / jnp.sum(jnp.square(half), axis=0))
    return jnp.where(jnp.isnan(soft), 0.5, soft)
