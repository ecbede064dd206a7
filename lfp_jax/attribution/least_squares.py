"""Estimate the key of images by Levenberg-Marquardt: estimators `lm` and `hybrid`.

Unknowns are theta of `coordinates`, and before them the strengths of what may have happened to the
image (`channel`), all with prior N(0, I). Residuals are pixel differences, or those of the DCT
coefficients of a JPEG, each in units of its noise; a pixel the 8-bit range clips counts as far as
the noise may not have brought it there, without noise only when the model is on the wrong side of
the bound. The noise variance v follows the current residual, so early steps are damped by the
prior and late ones are exact. Every step solves

    (J^T J / v + I) step = -(J^T r / v + theta)

with one Jacobian (forward mode, a column an evaluation), which serves a row of chord steps. Those
are taken in full, though the first may raise the residual: it lands beside the curved valley, the
bits right already, and the next ones fall back to its floor. A line search would allow small steps
only.

Coarse to fine: a few dozen unknowns, each a mixture of nuisance and bits, carry most of an image,
so the first Jacobians have few columns, each twice as many as the one before, and bring the latent
near; only the last ones, which must tell the bits from everything else, have all.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lfp_jax import sensitivity, sharding
from lfp_jax.attribution import channel, coordinates, decoding, gauss_newton
from lfp_jax.attribution.bank import guesses
from lfp_jax.attribution.encoder import encoder, has_encoder
from lfp_jax.attribution.estimator import learned
from lfp_jax.attribution.inversion import Silent, Solution, check, decode_flat
from lfp_jax.errors import UserError, choose
from lfp_jax.logs import Progress

_FLOOR = 1.1 * gauss_newton.QUANTUM**0.5  # a residual below this is rounding alone
_STALLED = 0.99  # a step that leaves more of the residual than this has stalled
_SHORT = (0.5, 0.25, 0.1)  # step lengths tried where full steps fail
_SLOW = 0.98  # a chord step that leaves more of the residual than this is the last one
_DOUBT = 0.05  # wrong bits expected below which an image is settled
_EXPLAINED = 1.15  # times the noise, which is told to a tenth: a residual below that is noise
_UNSURE = 3.0  # wrong bits expected from which an image goes on even so
_NOISY = 1.0  # what is left and has less structure than this is noise too, of whatever strength
# A residual above so many times that of the directions left out, and of a structure that noise does
# not have, leads on less often than another start; one above more, of any structure, nowhere.
_LOST, _SHAPED, _ASTRAY = 3.0, 3.0, 8.0
_ATTACKS = dict.fromkeys(("none", "unknown"))
_EACH = 2  # guesses for each share that a crop may have kept
_AT_ONCE = 8  # images in one program, on each device but a CPU
_AHEAD = 4  # images under way, in units of those in one program


def _model(generator, frame, view, theta):
    """What a view would show, in its form [p], were the unknowns theta [q] right."""
    strengths = len(view.centre)
    w = coordinates.place(frame, theta[None, strengths:])
    return channel.form(
        view, channel.transmit(view, theta[:strengths], decode_flat(generator, w)[0])
    )


def _cost(theta, seen, variance):
    return jnp.sum(jnp.square(seen.difference)) / variance + jnp.sum(jnp.square(theta))


# Compiling a generator takes long, so what runs one is a few programs that serve all ranks.


@partial(jax.jit, static_argnames=("chunk",))
def _linearise(generator, frame, views, theta, chunks, *, chunk):
    """Scales, comparisons [n] and Jacobians [n, q, p], 0 where out of play.

    Of the Jacobians' rows there are those of so many leading chunks, and zeros.
    """

    def one(view, theta):
        model, unit = partial(_model, generator, frame, view), jnp.eye(len(theta))
        made, rows = sensitivity.columns(model, theta, unit, chunk=chunk, chunks=chunks)
        scale = channel.scale(view, channel.compare(view, made, 0.0))
        seen = channel.weigh(view, made, scale)
        return scale, seen, rows * (scale.weights * jnp.sqrt(seen.sharpness))[None]

    return jax.vmap(one)(views, theta)


@jax.jit
def _look(generator, frame, views, scales, theta):
    """Comparisons [n] at unknowns [n, q]."""

    def one(view, scale, theta):
        return channel.weigh(view, _model(generator, frame, view, theta), scale)

    return jax.vmap(one)(views, scales, theta)


@jax.jit
def _steps(theta, seen, jacobians, damped, variances):
    return jax.vmap(gauss_newton.step)(theta, seen.pull, jacobians, damped, variances)


_decode = jax.jit(decode_flat)
_factors = jax.jit(jax.vmap(gauss_newton.factorise))
_mean_squares = jax.jit(jax.vmap(channel.mean_square))


@jax.jit
def _damping(scales, factors, differences):
    """Noise variances [n], and factors [n, a, a] damped for them."""
    variances = jax.vmap(channel.variance)(differences, scales)
    return variances, jax.vmap(gauss_newton.damp)(factors, variances)


@jax.jit
def _settle(frame, views, scales, begin, end, short, variances, factors):
    """Keep what a row of chord steps reached, or the best of where it began and short ways from it.

    Returns theta, relaxed bits [n, k], their covariances, residuals and their structure.
    """

    def one(view, scale, begin, end, short, variance, factor):
        near = jax.tree.map(lambda at, *others: jnp.stack([at, *others]), begin, *short)
        costs = jax.vmap(partial(_cost, variance=variance))(*near)
        best = jnp.argmin(jnp.where(jnp.isfinite(costs), costs, jnp.inf))
        improved = _cost(end[0], end[1], variance) < costs[0]
        theta, seen = jax.tree.map(lambda e, n: jnp.where(improved, e, n[best]), end, near)
        difference = seen.difference
        factor = gauss_newton.damp(factor, channel.variance(difference, scale))
        rows = jnp.pad(frame.bits, ((0, 0), (len(view.centre), 0)))
        bits = jnp.einsum("kq,q->k", rows, theta, precision="highest")
        rms = jnp.sqrt(channel.mean_square(difference, scale))
        coarse = channel.structure(view, difference, scale)
        return theta, bits, gauss_newton.marginal(rows, factor), rms, coarse

    return jax.vmap(one)(views, scales, begin, end, short, variances, factors)


def _outer_step(generator, frame, views, theta, *, rank, chords):
    """One Jacobian and its chord steps for each of n images, n Jacobians in memory.

    Returns what `_settle` does, and evaluations of each.
    """
    chunk, model = sensitivity.chunk_size(rank), (generator, coordinates.bare(frame))
    scales, seen, jacobians = _linearise(*model, views, theta, -(-rank // chunk), chunk=chunk)
    jacobians = jacobians[:, :rank]
    factors = _factors(jacobians)
    variances, damped = _damping(scales, factors, seen.difference)
    linear = jacobians, damped, variances
    look = partial(_look, *model, views, scales)
    begin = end = (theta, seen)
    goes_on, count, before = np.full(len(theta), True), np.zeros(len(theta), int), variances
    for step in range(chords):
        reached = end[0] + _steps(*end, *linear)
        reached = reached, look(reached)
        after = _mean_squares(reached[1].difference, scales)
        end = jax.tree.map(partial(_choose, goes_on), reached, end)
        count += goes_on
        goes_on = goes_on & ((step == 0) | np.asarray(after < _SLOW**2 * before))
        before = after
        if not goes_on.any():
            break
    way = _steps(*begin, *linear)
    short = [(theta + length * way, look(theta + length * way)) for length in _SHORT]
    found = _settle(frame, views, scales, begin, end, short, variances, factors)
    return *found, sensitivity.evaluations(rank) + count + len(_SHORT)


def _choose(mask, yes, no):
    return jnp.where(mask.reshape(-1, *[1] * (yes.ndim - 1)), yes, no)


@dataclasses.dataclass(eq=False)
class _Descent:
    """One image, under way from one of its starts."""

    image: int  # its index
    view: channel.View
    theta: np.ndarray  # [q]
    soft: np.ndarray | None = None  # [k]
    stage: int = 0  # of the plan, the next
    before: float = np.inf  # residual a stage ago
    rms: float = np.inf
    structure: float = np.inf  # of what is left, beside that of noise
    astray: bool = False  # so far off that none has come back
    forced: bool = False  # goes on though it seems lost


class _Search:
    """One image: its best descent so far, those given up, and the starts still to come."""

    def __init__(self, starts, spent):
        self.starts, self.spent = iter(starts), spent
        self.best: Any = None  # a _Descent once the first is back
        self.lost: list[_Descent] = []
        self.ended = False  # whether one went all the way

    def proceed(self, descent, *, settled, ended, lost, astray):
        """Take the news of a descent; give the one to go on with, or None."""
        if self.best is None or descent.rms < self.best.rms:
            self.best = descent
        if settled:
            return None
        if not (ended or lost):
            return descent
        descent.astray = astray
        self.lost += [descent] if lost else []
        self.ended |= ended
        following = next(self.starts, None)
        if following is None and self.lost:
            following = min(self.lost, key=lambda each: (each.astray, each.rms))
            if following.astray and self.ended:
                return None
            self.lost.remove(following)
            following.forced = True  # no start is left that shows a better way
        return following


def lm(
    key,
    generator,
    space,
    images,
    *,
    strength,
    code,
    bank,
    near=None,
    attack="none",
    free=None,
    ranks=(16, 32, 64, 128, 256),
    jacobians=2,
    chords=12,
    starts=4,
    batch=None,
    first=0,
    progress=True,
):
    """Estimate keys by Levenberg-Marquardt from what a bank guesses.

    An image is settled when its residual is down to 8-bit rounding, or to noise, which has no
    structure, or when its bits are sure. Noise is told to a tenth only, so where bits are unsure a
    descent goes on until it converges. Only images that are not settled go on, first with more
    Jacobians and then from their next start, so `starts` and `jacobians` are bounds and not the
    cost. A start far off what the directions left out explain waits for the others. One that is
    further off, as of images that are not the model's, goes on only if all are, and through `ranks`
    alone. Of all starts the one with the least residual counts.

    Args:
        key: unused; every estimator takes one.
        generator: a frozen generator.
        space: carrier, nuisance and mean.
        images: [n, H, W, C] in [-1, 1], already through 8 bits.
        strength, code: as injected.
        bank: starts and metric (`bank.make_bank`).
        near: a Solution of another estimator, for one start more.
        attack: "none", or "unknown": blur, crop, contrast and brightness are estimated too, and
            a JPEG is told by its pixels.
        free: most sensitive directions that can move at all, the others stay at zero; None: all.
        ranks: most sensitive directions in the first Jacobians, one number each; those that follow
            have all that are free.
        jacobians: of those that follow, at most, from each start.
        chords: chord steps on each Jacobian, at most.
        starts: guesses of the bank to start from, at most.
        batch: images in one program, whose Jacobians are in memory at once; a multiple of the
            devices, over which they are split. None: 8 a device, on CPU 1.
        first: global index of the first image, from which what is drawn follows.
        progress: show a progress line.

    Returns:
        A Solution; soft bits are those of `decoding.soft_bits`.

    Raises:
        UserError: images of another shape than the generator's, or an option out of bounds.
    """
    del key
    images = np.asarray(images, np.float32)
    mesh = sharding.mesh(devices=jax.local_devices())  # of several processes each has its images
    if batch is None:
        batch = mesh.size * (1 if jax.default_backend() == "cpu" else _AT_ONCE)
    check(generator, images, starts=starts, jacobians=jacobians, chords=chords, batch=batch)
    if min(ranks, default=1) < 1 or (free is not None and free < 1):
        raise UserError(f"ranks and free must be >= 1; got {tuple(ranks)} and {free}.")
    if starts > len(bank.latents):
        raise UserError(f"starts must be <= the bank's {len(bank.latents)} samples; got {starts}.")
    frame = coordinates.whiten(space, bank.metric, strength=strength, code=code, free=free)
    choose(attack, _ATTACKS, "attack")
    plan = [*ranks, *[np.inf] * jacobians]
    generator, frame = sharding.replicate(mesh, (generator, frame))
    likely = _unattacked if attack == "none" else _likely
    theta = np.zeros((len(images), 0, frame.directions.shape[1]), np.float32)
    if near is not None:
        theta = coordinates.begin(frame, space, near.latents, bits=near.soft_bits)[:, None]
    unknowns = partial(coordinates.begin, frame, space)

    def begin(i):
        return _Search(*likely(generator, frame, bank, unknowns, i, images[i], theta[i], starts))

    step = partial(
        _advance, mesh, generator, frame, plan=plan, batch=batch, chords=chords, first=first
    )
    news = partial(_news, frame, plan, len(ranks), images[0].size)
    with Progress(len(images), label="lm") if progress else Silent() as line:
        searches = _run(len(images), begin, step, news, line, batch=batch)
    best = [search.best for search in searches]
    ends = jnp.asarray(np.stack([d.theta[len(d.view.centre) :] for d in best]))
    return Solution(
        np.stack([descent.soft for descent in best]),
        coordinates.place(frame, ends),
        np.array([descent.rms for descent in best]),
        np.array([search.spent for search in searches]),
    )


def _unattacked(generator, frame, bank, unknowns, index, image, near, count):
    """Give descents of an image [H, W, C] that nothing happened to, and what that cost."""
    guessed = unknowns(guesses(bank, image, count=count))
    view = channel.View(image, np.zeros(0, np.float32))
    return [_Descent(index, view, theta) for theta in np.concatenate([near, guessed])], 0


def _likely(generator, frame, bank, unknowns, index, image, near, count):
    """Do the same where crop, blur, a JPEG may have happened to it: most likely ones first."""
    guessed = [unknowns(guesses(bank, image, count=_EACH, keep=keep)) for keep in channel.KEPT]
    theta = np.concatenate([near, *guessed])
    made = _decode(generator, coordinates.place(frame, theta))
    found: list[tuple] = []
    seen, first = channel.see(image), len(near)
    for i, keep in enumerate(channel.KEPT):
        rows = np.r_[:first, first + i * _EACH : first + (i + 1) * _EACH]
        found += zip(*channel.likely(image, made[rows], keep), theta[rows], strict=True)
    found.sort(key=lambda each: float(each[1]))
    return [
        _Descent(index, seen.replace(centre=centre), np.pad(start, (len(centre), 0)))
        for centre, _, start in jax.device_get(found[:count])
    ], len(theta)


def _run(count, begin, step, news, line, *, batch):
    """Search for each image, a few at a time, and those together that need the same."""
    searches: list[_Search] = []
    active: list[_Descent] = []
    done = 0
    while done < count:
        while len(searches) < count and len(active) < _AHEAD * batch:
            searches.append(begin(len(searches)))
            active.append(next(searches[-1].starts))
        groups: dict[tuple, list[_Descent]] = {}
        for descent in active:
            form = descent.stage, len(descent.theta), jax.tree.structure(descent.view)
            groups.setdefault(form, []).append(descent)
        full = [form for form, group in groups.items() if len(group) >= batch]
        form = max(full or groups, key=lambda form: (form[0], len(groups[form])))
        chosen = groups[form][:batch]
        for descent, cost in zip(chosen, step(chosen), strict=True):
            active.remove(descent)
            search = searches[descent.image]
            search.spent += cost
            following = search.proceed(descent, **news(descent))
            active += [following] if following else []
            done += following is None
        line.update(done, residual=search.best.rms)
    return searches


def _advance(mesh, generator, frame, descents, *, plan, batch, chords, first):
    """Take descents that are at one stage through it; give what each cost."""
    rows = [*descents, *descents[-1:] * (batch - len(descents))]  # one shape, one compilation
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *[(d.view, d.theta) for d in rows])
    views, theta = sharding.shard(mesh, stacked)
    rank = min(plan[descents[0].stage], len(descents[0].theta))
    *found, costs = _outer_step(generator, frame, views, theta, rank=rank, chords=chords)
    for descent, theta, *bits, rms, structure in zip(
        descents, *jax.device_get(found), strict=False
    ):
        descent.theta = theta
        descent.soft = decoding.soft_bits(first + descent.image, *bits)
        descent.before, descent.rms = descent.rms, float(rms)
        descent.structure = float(structure)
        descent.stage += 1
    return costs[: len(descents)]


def _news(frame, plan, coarse, size, descent):
    """Tell of a descent whether it is settled, at its end, lost, or further off than that."""
    noise = float(descent.view.level)
    rms, doubt = descent.rms, np.minimum(descent.soft, 1.0 - descent.soft).sum()
    rank = min(plan[descent.stage - 1], len(descent.theta))
    excess = max(rms**2 - noise**2, 0.0) ** 0.5
    left_out = _left_out(frame, rank, size)
    astray = excess > _ASTRAY * left_out > 0.0
    far = descent.structure > _SHAPED and excess > _LOST * left_out > 0.0
    explained = descent.stage >= coarse and rms <= _EXPLAINED * noise
    converged = rank == len(descent.theta) and not rms < _STALLED * descent.before
    return {
        "settled": doubt < _DOUBT
        or rms <= _FLOOR
        or (explained and (doubt < _UNSURE or converged))
        or (descent.stage > coarse and descent.structure < _NOISY),
        "ended": descent.stage == len(plan)
        or converged
        or (descent.forced and descent.stage >= coarse and astray),
        "lost": (far or astray) and not descent.forced and descent.stage < coarse,
        "astray": astray,
    }


def _left_out(frame, rank, size):
    """Expect the residual that the directions beyond a rank leave, to first order."""
    return float(jnp.sqrt(jnp.sum(frame.sensitivity[rank:]) / size))


def hybrid(key, generator, space, images, *, strength, code, estimator=None, **options):
    """Estimate keys in one pass, and from there, or what the bank guesses, by `lm`.

    The pass is a trained network's; without one that of the model's own encoder, if it has one.

    Args:
        key, generator, space, images, strength, code: as of `lm`.
        estimator: a trained `Estimator`, or None.
        **options: of `lm`.

    Returns:
        A Solution; its evaluations are those of both.
    """
    mark = {"strength": strength, "code": code}
    progress = options.get("progress", True)
    once = partial(learned, estimator=estimator) if estimator else encoder
    if estimator is None and not has_encoder(generator):
        return lm(key, generator, space, images, **mark, **options)
    near = once(key, generator, space, images, progress=progress, **mark)
    found = lm(key, generator, space, images, near=near, **mark, **options)
    return found.replace(evaluations=found.evaluations + near.evaluations)
