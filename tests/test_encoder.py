"""Keys read by a first stage's encoder, and the main job on a random-weight latent diffusion."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.ldm import get_config
from lfp_jax import basis, design, fingerprint, main
from lfp_jax.attribution import encoder
from lfp_jax.errors import UserError

TINY = "--config=configs/ldm.py:tiny"


@pytest.fixture(scope="module")
def tiny():
    return design.load_generator("ldm-tiny", sample_steps=2, quantize=False)


class _Echo:
    """A generator whose images are its latents, so that the encoder's answer is known."""

    image_shape = latent_shape = (2, 2, 3)
    encoder = {}  # noqa: RUF012

    def decode(self, z):
        return z

    def encode(self, images):
        return images


jax.tree_util.register_pytree_node(_Echo, lambda _: ((), None), lambda *_: _Echo())


def test_the_encoder_reads_exactly_what_an_exact_inverse_gives():
    latents = 0.1 * np.random.default_rng(0).normal(size=(200, 2, 2, 3)).astype(np.float32)
    space = basis.split(basis.fit(latents), bits=4, shift=2)
    bits = np.random.default_rng(1).integers(0, 2, (5, 4)).astype(np.uint8)
    for code in fingerprint.CODES:
        mark = {"strength": 0.5, "code": code}
        marked = fingerprint.inject(space, latents[:5], bits, **mark)
        found = encoder.encoder(None, _Echo(), space, marked, **mark, batch=2, progress=False)
        np.testing.assert_array_equal(found.bits, bits)
        np.testing.assert_allclose(found.latents, marked.reshape(5, -1), atol=1e-6)
        np.testing.assert_allclose(found.residual, 0.0, atol=1e-6)
        assert np.all(np.abs(np.asarray(found.soft_bits) - bits) < 1e-3)


def test_a_generator_without_an_encoder_is_named(tiny):
    blind = tiny.replace(encoder=None)
    images = jnp.zeros((1, *tiny.image_shape))
    with pytest.raises(UserError, match="'ldm-tiny' has no encoder"):
        encoder.encoder(None, blind, None, images, strength=1.0, code="antipodal")


def test_the_main_job_runs_and_a_second_one_takes_its_basis(tmp_path):
    argv = ["main", TINY, f"--workdir={tmp_path}", "--config.decoys=10", "--config.fd_images=0"]
    quick = [*argv, "--config.estimator=encoder"]
    assert main.main(quick) == 0
    made = (tmp_path / "basis" / "metadata.json").stat().st_mtime_ns
    assert main.main(quick) == 0
    assert (tmp_path / "basis" / "metadata.json").stat().st_mtime_ns == made
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["generator_evaluations"]["value"] == 2
    assert main.main([*quick, "--config.quantize=False"]) == 0
    assert (tmp_path / "basis" / "metadata.json").stat().st_mtime_ns > made


def test_the_paper_s_carrier_lies_in_one_channel(tmp_path, tiny):
    config = get_config("tiny,paper")
    config.update(bits=3, shift=5, basis_samples=128, metric_samples=32)
    point = design.prepare(jax.random.key(0), config, tmp_path, generator=tiny)
    carrier = np.asarray(point.space.carrier).reshape(4, 4, 3, 3)
    assert carrier[:, :, 0].any(axis=(0, 1)).all()
    assert not carrier[:, :, 1:].any()
    np.testing.assert_allclose(np.square(carrier).sum((0, 1, 2)), 3.0, rtol=1e-4)
    with pytest.raises(UserError, match="channels=1 needs basis=pca; got basis=sensitivity"):
        config.basis = "sensitivity"
        design.check(config)
