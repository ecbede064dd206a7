"""The mean metric from random probes equals that of whole Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfp_jax import sensitivity
from lfp_jax.errors import UserError
from lfp_jax.generators import stylegan2


@pytest.fixture(scope="module")
def generator():
    arch = stylegan2.Architecture(
        resolution=8, channels=(8, 8), z_dim=12, w_dim=12, mapping_layers=1, mapping_width=12
    )
    return stylegan2.random_generator(jax.random.key(0), arch)


def test_probes_tell_the_mean_of_whole_jacobians(generator):
    found = sensitivity.mean_metric(jax.random.key(1), generator, samples=6_000, batch=500)

    def metric(w):
        rows = jax.jacfwd(lambda w: generator.decode(w[None]).reshape(-1))(w)
        return jnp.einsum("pd,pe->de", rows, rows, precision="highest")

    latents = generator.sample(jax.random.key(2), 1_000)
    expected = np.asarray(jnp.mean(jax.lax.map(metric, latents), axis=0), np.float64)
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    np.testing.assert_allclose(found / scale, expected / scale, atol=0.1)
    assert np.abs(found / scale - expected / scale).mean() < 0.03


def test_samples_do_not_hang_on_the_batch(generator):
    found = [
        sensitivity.mean_metric(jax.random.key(1), generator, samples=20, batch=batch)
        for batch in (7, 20)
    ]
    np.testing.assert_allclose(*found, rtol=1e-3, atol=1e-4)


def test_no_samples_are_a_user_error(generator):
    with pytest.raises(UserError, match="samples of the mean metric must be >= 1; got 0."):
        sensitivity.mean_metric(jax.random.key(0), generator, samples=0)
