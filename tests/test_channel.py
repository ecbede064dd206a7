"""What may have happened to an image: told from its pixels, and modelled as the attacks do it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lfp_jax
from lfp_jax import attacks, images
from lfp_jax.attribution import channel


@pytest.fixture(scope="module")
def made():
    generator = lfp_jax.load_generator("stylegan2-demo")
    latents = generator.sample(jax.random.key(3), 4)
    return images.png_round_trip(jax.jit(lambda g, w: g.decode(w))(generator, latents))


def attacked(made, name, **options):
    return attacks.apply(jax.random.key(0), made, attacks.attack(name, **options))


def expected(image, *strengths):
    view = channel.View(jnp.asarray(image), jnp.asarray(strengths, jnp.float32))
    return channel.transmit(view, jnp.zeros(6), jnp.asarray(image))


def level(image):
    return channel.noise_level(channel.View(image, None))


def test_transmission_is_that_of_the_attacks(made):
    plain = (0.0, 0.0, 0.0, 0.0, 0.0, np.log(0.05))
    np.testing.assert_allclose(expected(made[0], *plain), made[0], atol=1e-5)
    cases = {
        "blur": ({"sigma": 2.0}, {5: np.log(2.0)}),
        "crop": ({"keep": 0.8}, {2: np.log(0.8)}),
        "brightness": ({"factor": 0.8}, {0: np.log(0.8), 1: -0.2}),
    }
    for name, (options, changes) in cases.items():
        strengths = [changes.get(i, value) for i, value in enumerate(plain)]
        theirs = attacked(made[:1], name, **options)[0]
        np.testing.assert_allclose(expected(made[0], *strengths), theirs, atol=1.5 / 127.5)


def test_without_strengths_an_image_stays_as_it_is(made):
    view = channel.View(jnp.asarray(made[0]), jnp.zeros(0))
    np.testing.assert_array_equal(channel.transmit(view, jnp.zeros(0), made[1]), made[1])


def test_an_overshoot_of_a_clipped_pixel_does_not_pull():
    seen = jnp.array([1.0, 1.0, -1.0, -1.0, 0.5])
    made = jnp.array([1.4, 0.7, -1.4, -0.7, 1.4])
    difference, live = channel.compare(channel.View(seen, jnp.zeros(0)), made)
    np.testing.assert_allclose(difference, [0.0, -0.3, 0.0, 0.3, 0.9], atol=1e-6)
    np.testing.assert_array_equal(live, [False, True, False, True, True])


@pytest.mark.parametrize("quality", [25, 50, 75, 90])
def test_the_quality_of_a_jpeg_is_told_by_its_pixels(made, quality):
    found = [channel.jpeg_quality(image) for image in attacked(made, "jpeg", quality=quality)]
    assert found == [quality] * 4


def test_other_images_are_no_jpeg(made):
    others = [made, attacked(made, "noise", std=0.1), attacked(made, "blur", sigma=1.0)]
    assert {channel.jpeg_quality(image) for batch in others for image in batch} == {None}
    grey = attacked(made[..., :1], "jpeg", quality=50)
    assert channel.jpeg_quality(grey[0]) == 50


@pytest.mark.parametrize("std", [0.05, 0.1, 0.2])
def test_the_level_of_noise_is_told_by_its_pixels(made, std):
    found = [level(image) for image in attacked(made, "noise", std=std)]
    np.testing.assert_allclose(found, std, rtol=0.25)
    assert level(made[0]) == 0.0


def test_blur_and_crop_are_told_by_a_near_guess(made):
    for name, option, value, place in (("blur", "sigma", 2.0, 5), ("crop", "keep", 0.8, 2)):
        seen = attacked(made[:1], name, **{option: value})[0]
        guesses = np.stack([made[1], np.clip(made[0] + 0.02, -1.0, 1.0)])
        centres, order = channel.likely(seen, guesses)
        assert int(order[0]) == 1
        np.testing.assert_allclose(np.exp(centres[1][place]), value, rtol=1e-5)


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
def test_a_jpeg_is_deciphered(made, subsampling):
    seen = attacked(made, "jpeg", quality=50, subsampling=subsampling)
    for before, after in zip(made, seen, strict=True):
        view = channel.see(after)
        assert view.halved == (subsampling == "4:2:0")
        off = channel._coefficients(jnp.asarray(before), view.halved) - view.coded
        steps = np.sqrt(12.0 * view.noise)
        assert np.mean(np.abs(off) < 0.52 * steps) > 0.99  # what rounding can have done
        assert np.mean(view.coded == 0.0) < 0.97


def test_a_size_that_is_no_multiple_of_a_block_is_deciphered_too(made):
    view = channel.see(attacked(made[:1, :50, :42], "jpeg", quality=60)[0])
    off = channel._coefficients(jnp.asarray(made[0, :50, :42]), view.halved) - view.coded
    assert np.mean(np.abs(off) < 0.6 * np.sqrt(12.0 * view.noise)) > 0.97


def test_a_coefficient_rounded_to_zero_pulls_only_out_of_its_step(made):
    view = channel.see(attacked(made[:1], "jpeg", quality=50)[0])
    difference, live = channel.compare(view, jnp.asarray(made[0]))
    zero = view.coded == 0.0
    assert np.mean(live[zero]) < 0.02 and np.all(live[~zero])
    np.testing.assert_array_equal(difference[~live], 0.0)
    scale = channel.scale(view, difference, live)
    assert scale.count == live.sum() and scale.weights.max() <= 1.0
    # Rounding explains all of it.
    found = channel.mean_square(scale.weights * difference, scale)
    np.testing.assert_allclose(found, scale.least, rtol=0.2)


def test_the_weights_of_another_image_are_one(made):
    view = channel.View(jnp.asarray(made[0]), jnp.zeros(0))
    difference, live = channel.compare(view, jnp.asarray(made[1]))
    scale = channel.scale(view, difference, live)
    np.testing.assert_array_equal(scale.weights, 1.0)
    expected = np.mean(np.square(difference))
    np.testing.assert_allclose(channel.variance(difference, scale), expected, rtol=1e-5)
    row = channel.differentiate(view, jnp.asarray(made[1]))
    np.testing.assert_array_equal(row, made[1].reshape(-1))
