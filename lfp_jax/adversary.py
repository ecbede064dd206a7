"""What an adversary does who knows how the pictures are made: collude, forge, remove, mislead.

Unlike the functions of `attacks` these need more than one image: other users' copies of it, latents
that an estimator found, the carrier, or a trained estimator. All of it is a real adversary's: users
share pictures, and a generator that leaks may leak with its basis. Where not said otherwise images
are [n, H, W, C] in [-1, 1], and image i of a key uses fold_in(key, start + i).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lfp_jax import fingerprint
from lfp_jax.attribution import estimator as learner
from lfp_jax.errors import UserError, choose

_SAME = 1.0 / 255.0  # values nearer than half a step of 8 bits are alike
_LEAST = 1e-6  # keeps the logarithm of a sure bit finite


def _keys(key, n, start):
    """Give images start, ..., start + n - 1 a key each."""
    return jax.vmap(partial(jax.random.fold_in, key))(start + jnp.arange(n))


def _pick(key, copies):
    """Take every value from a copy drawn at random; copies [c, ...] of one image."""
    chosen = jax.random.randint(key, copies.shape[1:], 0, len(copies))
    return jnp.take_along_axis(copies, chosen[None], axis=0)[0]


def _majority(key, copies):
    """Take the value on which most copies agree, the first such; copies [c, ...] of one image."""
    del key
    alike = jnp.abs(copies[:, None] - copies[None]) < _SAME
    chosen = jnp.argmax(jnp.sum(alike, axis=1), axis=0)
    return jnp.take_along_axis(copies, chosen[None], axis=0)[0]


COLLUSIONS = {
    "mean": lambda key, copies: jnp.mean(copies, axis=0),
    "median": lambda key, copies: jnp.median(copies, axis=0),
    "minimum": lambda key, copies: jnp.min(copies, axis=0),
    "maximum": lambda key, copies: jnp.max(copies, axis=0),
    "majority": _majority,
    "pick": _pick,
}


def collude(
    key: jax.Array, copies: jax.Array | np.ndarray, *, how: str, start: int = 0
) -> jax.Array:
    """Blend several users' copies of the same images, or of the same latents.

    Args:
        key: PRNG key, used by "pick".
        copies: [c, n, ...], float; row by row the same n, made with c users' keys.
        how: a name of COLLUSIONS, value by value.
        start: global index of the first image.

    Returns:
        [n, ...].

    Raises:
        UserError: another name, or no copies.
    """
    blend = choose(how, COLLUSIONS, "collusion")
    copies = jnp.asarray(copies, jnp.float32)
    if not len(copies):
        raise UserError("Collusion needs at least one copy.")
    keys = _keys(key, copies.shape[1], start)
    return jax.vmap(blend, in_axes=(0, 1))(keys, copies)


def plant(images: np.ndarray, marked: np.ndarray, plain: np.ndarray) -> jax.Array:
    """Forge a user's key: add to images what the user's differ by, on average, from plain ones.

    Args:
        images: what shall carry the key, [n, ...]; images or latents, as the other two.
        marked: one user's, [m, ...].
        plain: others, [p, ...]; of many users or of none.

    Returns:
        [n, ...]; not clamped.
    """
    shift = jnp.mean(jnp.asarray(marked), axis=0) - jnp.mean(jnp.asarray(plain), axis=0)
    return jnp.asarray(images) + shift[None]


def remove(key, space, latents, *, how, strength, code, start=0):
    """Take the key out of latents, the carrier being known.

    Args:
        key: PRNG key, used by "random".
        space: carrier, nuisance and mean.
        latents: [n, *latent_shape] or [n, d], as an estimator found them.
        how: "zero" (the carrier part becomes 0) or "random" (it becomes that of a random key).
        strength, code: as injected.
        start: global index of the first image.

    Returns:
        Latents of the same shape. (To forge a key instead, `fingerprint.inject` it.)

    Raises:
        UserError: another way.
    """
    choose(how, dict.fromkeys(("zero", "random")), "removal")
    shape = (len(latents), space.carrier.shape[1])
    if how == "zero":
        bits = jnp.full(shape, choose(code, fingerprint.CODES, "code"))
    else:
        keys = _keys(key, len(latents), start)
        bits = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, shape[1:]))(keys)
    return fingerprint.inject(space, latents, bits, strength=strength, code=code)


def pgd(
    key, generator, space, images, *, estimator, budget, steps=200, pace=0.05, start=0
):  # fmt: skip
    """Mislead a trained estimator: projected gradient ascent on the error of its bits.

    The bits are those that it reads first: the adversary does not know the key. As in WAVES (An et
    al. 2024, arXiv 2401.08573) steps are signs of the gradient from a random start in the box.

    Args:
        key: PRNG key.
        generator: a frozen generator.
        space: carrier, nuisance and mean.
        images: [n, H, W, C]; all in one program.
        estimator: an `attribution.estimator.Estimator`.
        budget: greatest change of a value in steps of 8 bits; WAVES takes 2, 4, 6 and 8.
        steps: how many.
        pace: of a step, as a share of the budget.
        start: global index of the first image.

    Returns:
        Images of the same shape, within the budget and in [-1, 1].

    Raises:
        UserError: a budget or a number of steps below 0.
    """
    if budget < 0 or steps < 0:
        raise UserError(f"budget and steps must be >= 0; got {budget} and {steps}.")
    images, reach = jnp.asarray(images, jnp.float32), 2.0 * budget / 255.0
    bits = _soft_bits(estimator, generator, space, images) > 0.5
    keys = _keys(key, len(images), start)
    noise = jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:], minval=-1.0))(keys)
    changed = jnp.clip(images + reach * noise, -1.0, 1.0)
    for _ in range(steps):  # driven from Python: gradients in a scan are slow on CPU
        changed = _ascend(estimator, generator, space, images, changed, bits, reach, pace)
    return changed


@jax.jit
def _soft_bits(estimator, generator, space, images):
    return jax.nn.sigmoid(learner.guesses(estimator, generator, space, images)[-1].logits)


@jax.jit
def _ascend(estimator, generator, space, images, changed, bits, reach, pace):
    """Make one step: up the cross-entropy of bits [n, k], back into the box around images."""

    def error(changed):
        soft = _soft_bits(estimator, generator, space, changed)
        return -jnp.sum(jnp.log(jnp.maximum(jnp.where(bits, soft, 1.0 - soft), _LEAST)))

    moved = changed + pace * reach * jnp.sign(jax.grad(error)(changed))
    return jnp.clip(jnp.clip(moved, images - reach, images + reach), -1.0, 1.0)
