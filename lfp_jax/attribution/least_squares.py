"""Estimate the key of images by Levenberg-Marquardt: estimator `lm`.

Unknowns, whitened, theta = (alpha / s of the leading nuisance directions, 2 phi - 1), with prior
N(0, I). Residuals are pixel differences; a pixel the 8-bit range clips counts only when the model
is on the wrong side of the bound. Outer step: one Jacobian by chunked forward mode and one Cholesky
factor; inner (chord) steps reuse both. The noise variance follows the current residual, so early
steps are damped by the prior and late ones are exact.

    (J^T J / v + I) step = -(J^T r / v + theta)
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lfp_jax.attribution.inversion import Silent, Solution, check, decode_flat, residual
from lfp_jax.errors import UserError
from lfp_jax.logs import Progress

_CHUNK = 64  # tangents pushed through the generator at once
_BOUND = 1.0 - 1.0 / 255.0  # a target beyond this may have been clipped
_QUANTUM = (2.0 / 255.0) ** 2 / 12.0  # variance of rounding to 8 bits on the [-1, 1] scale
_FLOOR = 1.1 * _QUANTUM**0.5  # a residual below this is rounding alone
_STALLED = 0.99  # an outer step that leaves more of the residual than this has stalled
_SHRINK = (1.0, 0.5, 0.25, 0.1)  # step lengths tried by a chord step, longest first
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
    return frame.mean + jnp.einsum("dq,q->d", frame.directions, theta, precision="highest")


def _model(generator, frame, theta):
    return decode_flat(generator, _place(frame, theta)[None])[0]


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


def _outer_step(generator, frame, target, theta, chords):
    """One Jacobian and `chords` chord steps for one image; gives theta, soft bits, residual."""
    image, jacobian = _jacobian(generator, frame, theta)
    difference, live = _difference(image, target)
    jacobian = jacobian * live.reshape(1, -1)
    variance = jnp.maximum(jnp.mean(jnp.square(difference)), _QUANTUM)
    gram = jnp.einsum("qp,rp->qr", jacobian, jacobian, precision="highest")
    factor = jax.scipy.linalg.cho_factor(gram / variance + jnp.eye(len(theta)), lower=True)

    def evaluate(theta):
        difference, _ = _difference(_model(generator, frame, theta), target)
        return difference, _cost(difference, theta, variance)

    def chord(carry, _):
        theta, difference, cost = carry
        slope = jnp.einsum("qp,p->q", jacobian, difference.reshape(-1), precision="highest")
        step = -jax.scipy.linalg.cho_solve(factor, slope / variance + theta)
        trials = theta[None] + jnp.asarray(_SHRINK)[:, None] * step[None]
        differences, costs = jax.vmap(evaluate)(trials)
        costs = jnp.where(jnp.isfinite(costs), costs, jnp.inf)
        best = jnp.argmin(costs)
        better = costs[best] < cost
        chosen = (trials[best], differences[best], costs[best])
        return jax.tree.map(partial(jnp.where, better), chosen, carry), None

    carry = (theta, difference, _cost(difference, theta, variance))
    theta, difference, _ = jax.lax.scan(chord, carry, length=chords)[0]
    square = jnp.mean(jnp.square(difference))
    soft = _soft_bits(frame, theta, gram / jnp.maximum(square, _QUANTUM))
    return theta, soft, jnp.sqrt(square)


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
    jacobians=8,
    chords=3,
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
        nuisance: leading nuisance directions that stay free; None for all. A tuple gives one entry
            an outer step, never falling, the last one for all that follow: (96, 96, None) spends
            small Jacobians while far off. Directions not yet free stay at zero.
        jacobians: outer steps at most; chords: inner steps on each Jacobian.
        batch: images a compiled call.
        progress: show a progress line.

    Returns:
        A Solution; soft bits are sigmoid(2 b / var b) of the whitened bit b at the solution.

    Raises:
        UserError: images of another shape than the generator's, an option below 1, or a schedule
            that falls.
    """
    del key
    images = jnp.asarray(images)
    check(generator, images, jacobians=jacobians, chords=chords, batch=batch)
    frames = [
        whiten(space, strength=strength, code=code, nuisance=free)
        for free in _schedule(space, nuisance, jacobians)
    ]
    n, widest, bits = len(images), frames[-1].nuisance, space.carrier.shape[1]
    theta = np.zeros((n, widest + bits), np.float32)  # all that will ever be free, then the bits
    theta[:, : frames[0].nuisance] = _start(frames[0], space, nearest(bank, images))
    soft = np.full((n, bits), 0.5, np.float32)
    rms = np.full(n, np.inf, np.float32)
    evaluations = np.ones(n)
    todo = np.arange(n)
    with Progress(n, label="lm") if progress else Silent() as line:
        for frame, following in zip(frames, [*frames[1:], frames[-1]], strict=True):
            free = np.r_[: frame.nuisance, widest : widest + bits]
            before = rms.copy()
            for i in range(0, len(todo), batch):
                rows = todo[i : i + batch]
                full = np.resize(rows, batch)  # one shape, one compilation
                found = _outer_steps(
                    generator, frame, images[full], theta[full][:, free], chords=chords
                )
                theta[np.ix_(rows, free)], soft[rows], rms[rows] = (
                    np.asarray(each)[: len(rows)] for each in found
                )
                evaluations[rows] += _evaluations(frame, chords)
                line.update(n - len(todo), residual=float(np.mean(rms[rows])))
            goes_on = rms[todo] < _STALLED * before[todo]
            goes_on |= following.nuisance > frame.nuisance  # what stalled may move again
            todo = todo[(rms[todo] > _FLOOR) & goes_on]
            line.update(n - len(todo))
            if len(todo) == 0:
                break
    w = jax.vmap(partial(_place, frames[-1]))(jnp.asarray(theta))
    return Solution(soft, w, residual(generator, w, images), evaluations)


def _schedule(space, nuisance, jacobians):
    """Give the number of free nuisance directions of every outer step."""
    entries = nuisance if isinstance(nuisance, (tuple, list)) else (nuisance,)
    every = space.nuisance.shape[1]
    counts = [every if free is None else min(free, every) for free in entries]
    if not counts or min(counts) < 0 or counts != sorted(counts):
        raise UserError(f"nuisance must be >= 0 and must not fall; got {nuisance}.")
    return [counts[min(i, len(counts) - 1)] for i in range(jacobians)]


def _evaluations(frame, chords):
    """Count the generator evaluations of one outer step: image, tangents, trials of step length."""
    count = frame.directions.shape[1]
    return 1 + count + -count % _CHUNK + chords * len(_SHRINK)


def _start(frame, space, latents):
    """Whitened nuisance coordinates [n, free] of latents [n, d]; they give no bits."""
    loud = jnp.einsum(
        "nd,dm->nm",
        latents - space.mean[None],
        space.nuisance[:, : frame.nuisance],
        precision="highest",
    )
    return loud / jnp.maximum(space.nuisance_stddev[None, : frame.nuisance], 1e-8)


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
