"""The mesh: a result does not depend on the number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfp_jax import sharding
from lfp_jax.errors import UserError


def _gradient(devices, params, images):
    mesh = sharding.mesh(devices=devices)

    def loss(params, images):
        return jnp.mean(jnp.tanh(jnp.einsum("nd,dk->nk", images, params["w"])) ** 2)

    batch, full = sharding.batch_sharding(mesh), sharding.replicated_sharding(mesh)
    step = jax.jit(jax.grad(loss), in_shardings=(full, batch), out_shardings=full)
    return step(sharding.replicate(mesh, params), sharding.shard(mesh, images))["w"]


def test_one_device_equals_four():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(6, 3)).astype(np.float32)}
    images = rng.normal(size=(8, 6)).astype(np.float32)
    four = _gradient(None, params, images)
    assert len(four.sharding.device_set) == 4
    np.testing.assert_allclose(four, _gradient(jax.devices()[:1], params, images), rtol=1e-5)


def test_shard_splits_the_first_axis_and_replicate_copies():
    mesh = sharding.mesh()
    tree = sharding.shard(mesh, {"x": np.arange(8.0), "y": jnp.zeros((4, 2))})
    assert tree["x"].addressable_shards[0].data.shape == (2,)
    assert tree["y"].addressable_shards[0].data.shape == (1, 2)
    np.testing.assert_array_equal(tree["x"], np.arange(8.0))
    copy = sharding.replicate(mesh, {"step": 3, "w": jnp.ones((5, 2))})
    assert copy["w"].addressable_shards[3].data.shape == (5, 2)
    assert int(copy["step"]) == 3


def test_shard_names_the_batch_and_the_devices_when_they_do_not_fit():
    with pytest.raises(UserError, match="got 6 over 4"):
        sharding.shard(sharding.mesh(), np.zeros((6, 2)))
