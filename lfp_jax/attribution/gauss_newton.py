"""The linear algebra of a Gauss-Newton step under a prior N(0, I) and noise of variance v.

A step solves (J^T J / v + I) step = -(J^T r / v + theta). Jacobians J are rows, [a, p] for a
unknowns, as `sensitivity.columns` gives them.
"""

from functools import partial

import jax
import jax.numpy as jnp

QUANTUM = (2.0 / 255.0) ** 2 / 12.0  # variance of rounding to 8 bits on the [-1, 1] scale
_SHIFT = 3e-6  # of the trace: above what float32 loses in a product of many rows

_einsum = partial(jnp.einsum, precision="highest")


def gram(rows):
    """Products [a, a] of rows [a, p]."""
    return _einsum("ap,bp->ab", rows, rows)


def factorise(jacobian):
    """Lower triangular factor [a, a] of J^T J / QUANTUM + I, from rows J [a, p].

    The product spans more than float32 holds, and its Cholesky factor would often be NaN. So that
    of a shifted product first, which makes the rows nearly orthogonal, and then that of the new
    product: shifted CholeskyQR (Fukaya et al., SIAM J. Sci. Comput. 2020), all matrix products.
    """
    unit = jnp.eye(len(jacobian))
    rows = jnp.concatenate([jacobian / QUANTUM**0.5, unit], axis=1)
    product = gram(rows)
    first = jnp.linalg.cholesky(product + _SHIFT * jnp.trace(product) * unit)
    inverse = jax.scipy.linalg.solve_triangular(first, unit, lower=True)
    rows = _einsum("qr,rp->qp", inverse, rows)
    return _einsum("qr,rs->qs", first, jnp.linalg.cholesky(gram(rows)))


def damp(factor, variance):
    """Lower triangular factor of J^T J / variance + I from that at the variance of rounding."""
    share = QUANTUM / variance
    unit = jnp.eye(len(factor))
    stacked = [jnp.sqrt(share) * factor.T, jnp.sqrt(jnp.maximum(1.0 - share, 0.0)) * unit]
    return jnp.linalg.qr(jnp.concatenate(stacked), mode="r").T


def step(theta, difference, jacobian, damped, variance):
    """Give the Gauss-Newton step [q] along the a leading unknowns theta [q]; the others stay."""
    rank = len(jacobian)
    slope = _einsum("ap,p->a", jacobian, difference)
    down = -jax.scipy.linalg.cho_solve((damped, True), slope / variance + theta[:rank])
    return jnp.pad(down, (0, len(theta) - rank))


def marginal(rows, factor):
    """Covariance [k, k] of linear functions rows [k, q] of the unknowns, all others marginalised.

    Args:
        rows: coefficients.
        factor: of the matrix of the leading unknowns; the others have their prior's variance.
    """
    rank = len(factor)
    half = jax.scipy.linalg.solve_triangular(factor, rows[:, :rank].T, lower=True)
    return gram(half.T) + gram(rows[:, rank:])
