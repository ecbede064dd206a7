"""Estimator `encoder`: exact where the encoder is, sure as far as its errors allow."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfp_jax import basis, fingerprint
from lfp_jax.attribution import encoder, inversion, least_squares
from lfp_jax.errors import UserError

STRENGTH = 2.0


class Scaled(flax.struct.PyTreeNode):
    """Images are a tenth of their latents, and its encoder knows."""

    encoder: dict | None
    latent_shape: tuple = flax.struct.field(pytree_node=False, default=(2, 4, 3))
    image_shape: tuple = flax.struct.field(pytree_node=False, default=(2, 4, 3))
    name: str = flax.struct.field(pytree_node=False, default="scaled")

    def decode(self, z):
        """Make images."""
        return 0.1 * z

    def encode(self, images):
        """Make latents."""
        return self.encoder["scale"] * images


@pytest.fixture(scope="module")
def case():
    generator = Scaled({"scale": jnp.asarray(10.0)})
    latents = np.asarray(jax.random.normal(jax.random.key(0), (200, *generator.latent_shape)))
    space = basis.split(basis.fit(latents), bits=8, shift=4)
    bits = np.asarray(jax.random.bernoulli(jax.random.key(1), 0.5, (6, 8)), np.uint8)
    return generator, space, latents[:6], bits


@pytest.mark.parametrize("code", ["antipodal", "binary"])
def test_bits_are_read_off_the_latents(case, code):
    generator, space, latents, bits = case
    mark = {"strength": STRENGTH, "code": code}
    marked = fingerprint.inject(space, latents, bits, **mark)
    images = generator.decode(marked)
    # 6 images in batches of 4: the last batch is filled up.
    found = encoder.encoder(None, generator, space, images, batch=4, progress=False, **mark)
    np.testing.assert_array_equal(found.bits, bits)
    np.testing.assert_allclose(found.latents, marked.reshape(6, -1), atol=1e-5)
    np.testing.assert_allclose(found.residual, 0.0, atol=1e-6)
    assert found.evaluations.shape == (6,)
    assert np.all(np.abs(found.soft_bits - bits) < 1e-3)
    noise = 0.1 * jax.random.normal(jax.random.key(2), images.shape)
    noisy = encoder.encoder(None, generator, space, images + noise, progress=False, **mark)
    assert np.abs(noisy.soft_bits - bits).mean() > 0.01  # less sure where the errors are large


def test_how_sure_it_is_of_an_image_is_that_images_own_matter(case):
    generator, space, latents, bits = case
    mark = {"strength": STRENGTH, "code": "antipodal"}
    images = np.array(generator.decode(fingerprint.inject(space, latents, bits, **mark)))
    images[1:] += 0.3 * np.random.default_rng(0).standard_normal(images[1:].shape)
    found = encoder.encoder(None, generator, space, images, progress=False, **mark)
    alone = encoder.encoder(None, generator, space, images[:1], progress=False, **mark)
    np.testing.assert_allclose(found.soft_bits[:1], alone.soft_bits, atol=1e-6)
    assert np.abs(alone.soft_bits - bits[:1]).max() < 1e-3


def test_what_it_cannot_read_is_refused(case):
    generator, space, latents, _ = case
    mark = {"strength": STRENGTH, "code": "antipodal"}
    with pytest.raises(UserError, match="'scaled' has no encoder"):
        encoder.encoder(None, Scaled(None), space, latents, **mark)
    with pytest.raises(UserError, match=r"Images must be \[n, 2, 4, 3\]"):
        encoder.encoder(None, generator, space, latents[:, :1], **mark)


def test_hybrid_starts_from_it_where_no_network_was_trained(case, monkeypatch):
    generator, space, latents, _ = case
    given = []

    def lm(key, generator, space, images, *, near=None, **options):
        given.append(near)
        return inversion.Solution(*(jnp.ones(6) for _ in range(4)))

    monkeypatch.setattr(least_squares, "lm", lm)
    mark = {"strength": STRENGTH, "code": "antipodal"}
    images = generator.decode(latents)
    found = least_squares.hybrid(None, generator, space, images, progress=False, **mark)
    np.testing.assert_allclose(given[0].latents, latents.reshape(6, -1), atol=1e-5)
    np.testing.assert_allclose(found.evaluations, 1 + given[0].evaluations)
    least_squares.hybrid(None, Scaled(None), space, images, progress=False, **mark)
    assert given[1] is None
