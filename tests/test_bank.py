"""The bank: samples of the prior, nearest ones found, latents regressed by small pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lfp_jax
from lfp_jax import attacks, images
from lfp_jax.attribution import bank as banks
from lfp_jax.errors import UserError
from lfp_jax.generators import stylegan2


@pytest.fixture(scope="module")
def generator():
    arch = stylegan2.Architecture(
        resolution=8, channels=(16, 8), z_dim=32, w_dim=32, mapping_layers=2, mapping_width=32
    )
    return stylegan2.random_generator(jax.random.key(0), arch)


def make(generator, **options):
    metric = jnp.eye(32)
    return banks.make_bank(jax.random.key(7), generator, metric=metric, **options)


def guesses(bank, made, **options):
    return jnp.stack([banks.guesses(bank, image, **options) for image in made])


def test_a_bank_is_the_prior_and_its_nearest_sample_is_found(generator):
    bank = make(generator, size=10, batch=4)
    expected = generator.sample(jax.random.key(7), 10)
    np.testing.assert_allclose(bank.latents, expected, atol=1e-5)
    found = guesses(bank, generator.decode(expected)[3:6], count=3)
    assert found.shape == (3, 3, expected.shape[1])
    np.testing.assert_allclose(found[:, 1], expected[3:6], atol=1e-5)


def test_regression_is_nearer_than_the_nearest_sample(generator):
    bank = make(generator, size=512)
    latents = generator.sample(jax.random.key(8), 32)
    found = guesses(bank, generator.decode(latents), count=2)
    regressed, nearest = jnp.mean(jnp.square(found - latents[:, None]), axis=(0, 2))
    assert regressed < 0.5 * nearest


def test_a_crop_is_looked_for_in_what_it_has_kept():
    generator = lfp_jax.load_generator("stylegan2-demo")
    bank = banks.make_bank(jax.random.key(7), generator, size=512, metric=jnp.eye(512))
    made = images.png_round_trip(jax.jit(lambda g, w: g.decode(w))(generator, bank.latents[:8]))
    crop = attacks.attack("crop", keep=0.7)
    seen = attacks.apply(jax.random.key(0), made, crop)
    found = guesses(bank, jnp.asarray(seen), count=2, keep=0.7)[:, 1]
    np.testing.assert_array_equal(found, bank.latents[:8])
    lost = guesses(bank, jnp.asarray(seen), count=2)[:, 1]
    assert np.mean(np.all(lost == bank.latents[:8], axis=1)) < 0.5


def test_an_empty_bank_is_a_user_error(generator):
    with pytest.raises(UserError, match="A bank's size must be >= 2; got 0."):
        make(generator, size=0)
