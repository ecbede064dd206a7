"""The paper's carrier in the latents of a diffusion model, as its config asks for it."""

import jax
import numpy as np
import pytest

from configs.ldm import get_config
from lfp_jax import basis, design
from lfp_jax.errors import UserError


def _config(**changes):
    config = get_config("tiny,paper")
    config.update(bits=3, shift=5, **changes)
    return config


def test_three_directions_of_one_channel_carry_a_bit(tmp_path, monkeypatch):
    config = _config(quantize=False)
    generator = design.load_configured(config)
    assert (generator.sample_steps, generator.quantizes) == (2, False)
    latents = np.random.default_rng(0).normal(size=(200, *generator.latent_shape))
    fitted, metric = basis.fit(latents), np.eye(latents[0].size, dtype=np.float32)
    monkeypatch.setattr(basis, "measure_generator", lambda *args, **options: (fitted, metric))
    point = design.prepare(jax.random.key(0), config, tmp_path, generator=generator)
    carrier = np.asarray(point.space.carrier).reshape(*generator.latent_shape, 3)
    assert not carrier[:, :, 1:].any()
    np.testing.assert_allclose(np.square(carrier).sum((0, 1, 2)), 3.0, rtol=1e-4)
    # The stored basis is the turned one, and another setting of the decoder asks for a new one.
    again = design.prepare(jax.random.key(0), config, tmp_path, generator=generator)
    np.testing.assert_array_equal(again.space.carrier, point.space.carrier)
    monkeypatch.setattr(basis, "measure_generator", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        design.prepare(jax.random.key(0), _config(quantize=True), tmp_path, generator=generator)


def test_one_channel_has_no_directions_by_sensitivity():
    with pytest.raises(UserError, match="channels=1 needs basis=pca; got basis=sensitivity"):
        design.check(_config(basis="sensitivity"))
