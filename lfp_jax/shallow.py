"""Shallow fingerprints, the baseline of Kim et al. 2021 (arXiv 2010.13974): pixel keys.

A user's pictures are g(w) + strength * phi / |phi|, phi a key of as many values as an image, and
f(x) = sign(phi . x) tells them from all others: a linear classifier. There are no bits; a picture
is attributed where its own key's classifier alone says yes. Formulas are those of the published
code (new_key_generation.py) with the sign of phi turned, so that a user's pictures are positive.
There a user's model is trained towards such a sum; here the sum is made.

Images are [n, H, W, C], nominally in [-1, 1]; computed in float32 at HIGHEST precision.
"""

from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lfp_jax.errors import UserError
from lfp_jax.logs import Progress

_matmul = partial(jnp.matmul, precision="highest")


@flax.struct.dataclass
class Keys:
    """Trained keys, and what their classifiers say of pictures without one."""

    directions: jax.Array  # [users, pixels], of length 1
    mean: jax.Array  # [users], of phi . x over plain pictures
    stddev: jax.Array  # [users]


def train(
    key: jax.Array, images: np.ndarray, *, users: int, epochs: int = 10, steps: int = 500,
    batch: int = 64, learning_rate: float = 1e-3, decay: float = 0.6,
) -> Keys:  # fmt: skip
    """Train keys one after the other, as published.

    A key minimises E max(0, 1 + phi . x) over pictures without one, so that these come out
    negative, by Adam from N(0, I), the learning rate falling by `decay` an epoch. The published
    loss adds |phi_j . phi| for every earlier key j. Its slope along phi_j, which is |phi_j|, some
    hundred, is steeper than the hinge's, so that its minima are orthogonal to all phi_j: here every
    step ends with the projection there.

    Args:
        key: draws starts and batches.
        images: plain pictures [n, H, W, C], in no order: a batch is a run of neighbours.
        users: how many keys.
        epochs, steps, batch, learning_rate, decay: of the training; steps are those of an epoch.

    Raises:
        UserError: fewer than 1 user, or fewer images than a batch.
    """
    if users < 1 or len(images) < batch:
        raise UserError(
            f"Keys need users >= 1 and images >= {batch}; got {users} and {len(images)}."
        )
    rows = jnp.asarray(images, jnp.float32).reshape(len(images), -1)
    found = jnp.zeros((users, rows.shape[1]))
    options = {"epochs": epochs, "steps": steps, "batch": batch}
    with Progress(users, unit="keys", label="shallow") as progress:
        for user in range(users):
            own = jax.random.fold_in(key, user)
            one = _train_one(own, rows, found, learning_rate, decay, **options)
            found = found.at[user].set(one / jnp.linalg.norm(one))
            progress.update(user + 1)
    plain = _matmul(rows, found.T)
    return Keys(found, plain.mean(axis=0), plain.std(axis=0))


@partial(jax.jit, static_argnames=("epochs", "steps", "batch"))
def _train_one(
    key: jax.Array, rows: jax.Array, others: jax.Array, learning_rate: float, decay: float,
    *, epochs: int, steps: int, batch: int,
) -> jax.Array:  # fmt: skip
    """Train one key [pixels]; `others` [users, pixels] are of length 1, or 0 if not yet trained."""
    optimizer = optax.adam(lambda step: learning_rate * decay ** (step // steps))

    def loss(phi: jax.Array, picked: jax.Array) -> jax.Array:
        return jnp.mean(jax.nn.relu(1.0 + _matmul(picked, phi)))

    def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
        phi, state = carry
        first = jax.random.randint(jax.random.fold_in(key, i), (), 0, len(rows) - batch + 1)
        picked = jax.lax.dynamic_slice_in_dim(rows, first, batch)  # no gather, slow on CPU
        updates, state = optimizer.update(jax.grad(loss)(phi, picked), state)
        phi = optax.apply_updates(phi, updates)
        return (phi - _matmul(_matmul(others, phi), others), state), None

    # No batch has this number.
    start = jax.random.normal(jax.random.fold_in(key, epochs * steps), (rows.shape[1],))
    carry = (start, optimizer.init(start))
    return jax.lax.scan(step, carry, jnp.arange(epochs * steps))[0][0]


def mark(keys: Keys, images: np.ndarray, user: np.ndarray, *, strength: float) -> jax.Array:
    """Fingerprint images: x + strength phi / |phi|.

    Args:
        keys: of `train`.
        images: plain pictures [n, H, W, C].
        user: row of each image's key, [n].
        strength: length of what is added; over all pixels, not of one.

    Returns:
        float32 of the same shape, not clipped.
    """
    plain = jnp.asarray(images, jnp.float32)
    return plain + strength * keys.directions[jnp.asarray(user)].reshape(plain.shape)


def scores(keys: Keys, images: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Ask every user's classifier about every image.

    Args:
        keys: of `train`.
        images: [n, H, W, C].

    Returns:
        phi . x / |phi|, [n, users], positive for yes; and the same in standard deviations from the
        mean of plain pictures, which can be compared between users.
    """
    rows = jnp.asarray(images, jnp.float32).reshape(len(images), -1)
    raw = _matmul(rows, keys.directions.T)
    spread = jnp.maximum(keys.stddev, jnp.finfo(jnp.float32).tiny)
    return raw, (raw - keys.mean[None]) / spread[None]
