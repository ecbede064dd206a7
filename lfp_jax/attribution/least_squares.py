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


@jax.jit
def nearest(bank, images):
    """Find the latents [n, d] of the bank whose thumbnails are nearest to the images'."""
    small = thumbnails(images)
    distance = jnp.sum(jnp.square(bank.thumbnails), axis=1)[None] - 2.0 * jnp.einsum(
        "nt,bt->nb", small, bank.thumbnails, precision="highest"
    )
    return bank.latents[jnp.argmin(distance, axis=1)]


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
    differences = jnp.concatenate([here[None], jax.lax.map(look, trials)])
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
    """Go the best of a few lengths along the steps of a batch; give theta and its residual."""

    def go(theta, target, step):
        look = partial(_look, generator, frame, target)
        here = look(theta)
        theta, difference = _best_length(look, theta, here, step, _variance(here), _SHRINK)
        return theta, jnp.sqrt(jnp.mean(jnp.square(difference)))

    return jax.vmap(go)(theta, targets, steps)


def _descend(generator, frame, targets, theta, iterations):
    """Make one step by conjugate gradients; give theta, residual and evaluations."""
    unroll = jax.default_backend() == "cpu"
    chunk = _CPU_UNROLL if unroll else iterations
    carry, calls = None, range(0, iterations, chunk)
    for done in calls:
        carry = _conjugate_gradients(
            generator, frame, targets, theta, carry,
            iterations=min(chunk, iterations - done), unroll=unroll,
        )  # fmt: skip
    theta, rms = _best_lengths(generator, frame, targets, theta, carry[0])
    # Each call places the images anew; a slope counts 2, an iteration 3.
    return theta, rms, len(calls) + 2 + 3 * iterations + 1 + len(_SHRINK)


# --- near: one Jacobian and chord steps ----------------------------------------------------------


def _outer_step(generator, frame, target, theta, chords):
    """One Jacobian and chord steps for one image: theta, soft bits, residual, evaluations."""
    image, jacobian = _jacobian(generator, frame, theta)
    look = partial(_look, generator, frame, target)
    start, live = _difference(image, target)
    jacobian = jacobian * live.reshape(1, -1)
    variance = _variance(start)
    gram = jnp.einsum("qp,rp->qr", jacobian, jacobian, precision="highest")
    factor = jax.scipy.linalg.cho_factor(gram / variance + jnp.eye(len(theta)), lower=True)

    def step_from(theta, difference):
        slope = jnp.einsum("qp,p->q", jacobian, difference.reshape(-1), precision="highest")
        return -jax.scipy.linalg.cho_solve(factor, slope / variance + theta)

    def chord(carry):
        here, difference, _, count = carry
        here = here + step_from(here, difference)
        return here, look(here), jnp.mean(jnp.square(difference)), count + 1

    def goes_on(carry):
        _, difference, before, count = carry
        falls = jnp.mean(jnp.square(difference)) < _SETTLED**2 * before
        return (count < chords) & ((count < 2) | falls)

    begin = (theta, start, jnp.inf, 0)
    end, difference, _, count = jax.lax.while_loop(goes_on, chord, begin)

    def shorten():
        step = step_from(theta, start)
        return _best_length(look, theta, start, step, variance, _SHRINK[1:])

    improved = _cost(difference, end, variance) < _cost(start, theta, variance)
    end, difference = jax.lax.cond(improved, lambda: (end, difference), shorten)
    square = jnp.mean(jnp.square(difference))
    soft = _soft_bits(frame, end, gram / jnp.maximum(square, _QUANTUM))
    padded = len(theta) + -len(theta) % _CHUNK
    spent = 1 + padded + count + jnp.where(improved, 0, len(_SHRINK) - 1)
    return end, soft, jnp.sqrt(square), spent


@partial(jax.jit, static_argnames=("chords",))
def _outer_steps(generator, frame, targets, theta, *, chords):
    """The outer step for a batch [n, ...] of images, one after the other (memory)."""
    return jax.lax.map(
        lambda each: _outer_step(generator, frame, each[0], each[1], chords), (targets, theta)
    )


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
    gradients=(20, 30),
    jacobians=6,
    chords=12,
    batch=8,
    progress=True,
):
    """Estimate keys by Levenberg-Marquardt from the nearest sample of a bank.

    An image is settled when its residual is down to 8-bit rounding, or no longer falls; only the
    others go on, so `jacobians` is a bound and not the cost.

    Args:
        key: unused; every estimator takes one.
        generator: a frozen generator.
        space: carrier, nuisance and mean.
        images: [n, H, W, C] in [-1, 1], already through 8 bits.
        strength, code: as injected.
        bank: prior samples to start from (`make_bank`).
        nuisance: leading nuisance directions that stay free, the others stay at zero; None: all.
        gradients: conjugate gradients of each step before the first Jacobian.
        jacobians: steps with a Jacobian, at most; chords: chord steps on each, at most.
        batch: images a compiled call.
        progress: show a progress line.

    Returns:
        A Solution; soft bits are sigmoid(2 b / var b) of the whitened bit b at the solution.

    Raises:
        UserError: images of another shape than the generator's, or an option out of bounds.
    """
    del key
    images = jnp.asarray(images)
    check(generator, images, jacobians=jacobians, chords=chords, batch=batch)
    if min(gradients, default=1) < 1 or (nuisance is not None and nuisance < 0):
        raise UserError(
            f"gradients must be >= 1 and nuisance >= 0; got {tuple(gradients)} and {nuisance}."
        )
    frame = whiten(space, strength=strength, code=code, nuisance=nuisance)
    n, bits = len(images), space.carrier.shape[1]
    theta = np.zeros((n, frame.nuisance + bits), np.float32)
    near = nearest(bank, images)
    theta[:, : frame.nuisance] = fingerprint.whitened_nuisance(space, near, count=frame.nuisance)
    soft = np.full((n, bits), 0.5, np.float32)
    rms, evaluations = np.full(n, np.inf, np.float32), np.zeros(n)

    def batches(rows):
        for i in range(0, len(rows), batch):
            part = rows[i : i + batch]
            yield part, np.resize(part, batch)  # one shape, one compilation

    with Progress(n, label="lm") if progress else Silent() as line:
        for iterations in gradients:
            for rows, full in batches(np.arange(n)):
                found, left, spent = _descend(
                    generator, frame, images[full], jnp.asarray(theta[full]), iterations
                )
                theta[rows] = np.asarray(found)[: len(rows)]
                evaluations[rows] += spent
                line.update(0, residual=float(np.mean(left[: len(rows)])))
        todo = np.arange(n)
        for _ in range(jacobians):
            before = rms.copy()
            for rows, full in batches(todo):
                found = _outer_steps(generator, frame, images[full], theta[full], chords=chords)
                found = [np.asarray(each)[: len(rows)] for each in found]
                theta[rows], soft[rows], rms[rows] = found[:3]
                evaluations[rows] += found[3]
                line.update(n - len(todo), residual=float(np.mean(rms[rows])))
            todo = todo[(rms[todo] > _FLOOR) & (rms[todo] < _STALLED * before[todo])]
            line.update(n - len(todo))
            if len(todo) == 0:
                break
    w = _place(frame, jnp.asarray(theta))
    return Solution(soft, w, residual(generator, w, images), evaluations + 1)


def _soft_bits(frame, theta, gram):
    """Probability that each bit is one: Gaussian at the solution, nuisance marginalised.

    `gram` is J^T J over the noise variance; where it is not finite nothing is known: one half.
    """
    bits = theta[frame.nuisance :]
    factor = jnp.linalg.cholesky(gram + jnp.eye(len(theta)))
    units = jnp.eye(len(theta))[:, frame.nuisance :]
    half = jax.scipy.linalg.solve_triangular(factor, units, lower=True)
    soft = jax.nn.sigmoid(2.0 * bits / jnp.sum(jnp.square(half), axis=0))
    return jnp.where(jnp.isnan(soft), 0.5, soft)
