"""Gauss-Newton steps: Jacobians by chunks, factors that float32 can hold, marginals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lfp_jax import sensitivity
from lfp_jax.attribution import gauss_newton


def test_the_chunked_jacobian_is_the_jacobian():
    weights = jax.random.normal(jax.random.key(0), (12, 40))

    def function(x):
        return jnp.sin(jnp.einsum("ph,h->p", weights, x, precision="highest")).reshape(3, 4)

    x = jax.random.normal(jax.random.key(1), (40,))
    tangents = jax.random.normal(jax.random.key(2), (70, 40))  # more than a chunk
    value, rows = jax.jit(partial(sensitivity.columns, function))(x, tangents)
    plain = np.asarray(jax.jit(jax.jacfwd(function))(x))
    np.testing.assert_allclose(value, function(x), atol=1e-6)
    np.testing.assert_allclose(rows, np.einsum("tn,hwn->thw", tangents, plain), atol=1e-4)
    assert sensitivity.evaluations(70) == 1 + 70
    assert sensitivity.evaluations(515) == 1 + 9 * 58


def test_the_marginal_is_that_of_the_inverse():
    q, rank, k = 32, 20, 8
    rows = np.linalg.qr(np.random.default_rng(0).standard_normal((q, q)))[0][:k]
    jacobian = 0.02 * jax.random.normal(jax.random.key(0), (rank, 64))
    factor = gauss_newton.damp(gauss_newton.factorise(jacobian), 1e-2)
    # One along the directions without a Jacobian.
    matrix = np.eye(q)
    matrix[:rank, :rank] += np.asarray(jacobian @ jacobian.T / 1e-2)
    found = gauss_newton.marginal(jnp.asarray(rows, jnp.float32), factor)
    np.testing.assert_allclose(found, rows @ np.linalg.inv(matrix) @ rows.T, atol=1e-4)


def test_the_factor_holds_what_a_cholesky_factor_in_float32_cannot():
    scales = np.logspace(0.5, -5.5, 48)  # of the directions: 12 decades in the product
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((48, 48)))[0]
    jacobian = (turn * scales @ rng.standard_normal((48, 900))).astype(np.float32)
    unit, quantum = np.eye(48), gauss_newton.QUANTUM
    exact = np.linalg.inv(jacobian.astype(np.float64) @ jacobian.T / quantum + unit)
    plain = jnp.linalg.cholesky(jnp.asarray(jacobian @ jacobian.T / quantum + unit, jnp.float32))
    assert np.isnan(plain).any()
    factor = np.asarray(gauss_newton.factorise(jnp.asarray(jacobian)), np.float64)
    np.testing.assert_array_equal(factor, np.tril(factor))
    variances = np.sum(np.square(np.linalg.inv(factor)), axis=0)
    np.testing.assert_allclose(variances, np.diag(exact), rtol=0.01)
