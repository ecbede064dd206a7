"""The unknowns of a descent: latents in whitened coordinates, the most telling ones first.

alpha / s of the nuisance directions and 2 phi - 1 of the bits, with prior N(0, I), are turned to
axes theta in which that prior is the same: those of the generator's mean metric E[J^T J], ordered
by how much the image moves along them, and not by how much the latent does.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lfp_jax import fingerprint


class Frame(flax.struct.PyTreeNode):
    """theta -> w = mean + directions theta, most sensitive directions first."""

    mean: jax.Array  # [d]
    directions: jax.Array  # [d, q], a step of one standard deviation each
    nuisance: jax.Array | None  # [m, q], alpha / s of theta; m: nuisance directions
    bits: jax.Array | None  # [k, q], 2 phi - 1 of theta
    sensitivity: jax.Array  # [q], mean square change of the image along each, summed


def whiten(space, metric, *, strength, code, free):
    """Set up the whitened unknowns, by falling sensitivity of the image.

    The `free` most sensitive ones can move (None: all).
    """
    # strength c(phi) = strength / 2 (2 phi - 1), shifted by half of it under the binary code.
    shift = 0.5 * strength * jnp.sum(space.carrier, axis=1) if code == "binary" else 0.0
    steps = np.asarray(fingerprint.steps(space, strength=strength), np.float64)
    squares, axes = np.linalg.eigh(steps.T @ np.asarray(metric, np.float64) @ steps)
    squares, axes = np.maximum(squares[::-1], 0.0)[:free], axes[:, ::-1][:, :free]
    nuisance, bits = np.split(axes, [space.nuisance.shape[1]])
    arrays = (steps @ axes, nuisance, bits, squares)
    return Frame(space.mean + shift, *(jnp.asarray(array, jnp.float32) for array in arrays))


def begin(frame, space, latents, *, bits=None):
    """Unknowns [n, q] of latents [n, d]: their nuisance, and soft bits [n, k] (None: one half)."""
    alpha = fingerprint.whitened_nuisance(space, latents)
    theta = jnp.einsum("nm,mq->nq", alpha, frame.nuisance, precision="highest")
    if bits is None:
        return theta
    signs = 2.0 * bits - 1.0
    return theta + jnp.einsum("nk,kq->nq", signs, frame.bits, precision="highest")


def bare(frame):
    """Leave what `place` needs, so that a program of it serves any number of bits."""
    return frame.replace(nuisance=None, bits=None)


def place(frame, theta):
    """Latents [n, d] of unknowns [n, q]."""
    return frame.mean[None] + jnp.einsum("dq,nq->nd", frame.directions, theta, precision="highest")
