"""What may have happened to an image: told from its pixels, and modelled as the attacks do it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import lfp_jax
from lfp_jax import attacks, images
from lfp_jax.attribution import channel


@pytest.fixture(scope="module")
def made():
    generator = lfp_jax.load_generator("stylegan2-demo")
    latents = generator.sample(jax.random.key(3), 4)
    return images.png_round_trip(jax.jit(lambda g, w: g.decode(w))(generator, latents))


def compare(view, image):
    """Compare an image [H, W, C]."""
    return channel.compare(view, channel.form(view, jnp.asarray(image)), 0.0)


def attacked(made, name, **options):
    return attacks.apply(jax.random.key(0), made, attacks.attack(name, **options))


def sent(image, *strengths):
    view = channel.View(jnp.asarray(image), jnp.asarray(strengths, jnp.float32))
    return channel.transmit(view, jnp.zeros(len(strengths)), jnp.asarray(image))


def level(image):
    return channel.noise_level(channel.View(image, None))


def blurred(sigma):
    return np.arctanh(np.exp(-0.5 / sigma**2))


@pytest.mark.parametrize(
    ("name", "options", "changes"),
    [
        ("blur", {"sigma": 0.5}, {2: blurred(0.5)}),
        ("blur", {"sigma": 2.0}, {2: blurred(2.0)}),
        ("crop", {"keep": 0.8}, {3: np.log(0.8)}),
        ("brightness", {"factor": 0.8}, {0: np.log(0.8), 1: -0.2}),
    ],
)
def test_transmission_is_that_of_the_attacks(name, options, changes, made):
    theirs = attacked(made[:1], name, **options)[0]
    strengths = [changes.get(i, 0.0) for i in range(6)]
    np.testing.assert_allclose(sent(made[0], *strengths), theirs, atol=1.5 / 127.5)
    if 3 not in changes:
        np.testing.assert_allclose(sent(made[0], *strengths[:3]), theirs, atol=1.5 / 127.5)


def test_a_blur_of_none_has_a_slope_and_sharpens_below(made):
    view = channel.View(jnp.asarray(made[0]), jnp.zeros(3))
    image = jnp.asarray(made[0])
    still, moved = jax.jvp(
        lambda eta: channel.transmit(view, eta, image), (jnp.zeros(3),), (jnp.eye(3)[2],)
    )
    np.testing.assert_allclose(still, image, atol=1e-5)
    assert jnp.std(moved) > 0.01
    sharp, soft = (jnp.std(sent(made[0], 0.0, 0.0, blur)) for blur in (-0.1, 0.1))
    assert sharp > jnp.std(image) > soft


def test_without_strengths_an_image_stays_as_it_is(made):
    view = channel.View(jnp.asarray(made[0]), jnp.zeros(0))
    np.testing.assert_array_equal(channel.transmit(view, jnp.zeros(0), made[1]), made[1])


def test_an_overshoot_of_a_clipped_pixel_does_not_pull():
    seen = jnp.array([1.0, 1.0, -1.0, -1.0, 0.5])
    made = jnp.array([1.4, 0.7, -1.4, -0.7, 1.4])
    found = channel.compare(channel.View(seen, jnp.zeros(0)), made, 0.0)
    np.testing.assert_allclose(found.difference, [0.0, -0.3, 0.0, 0.3, 0.9], atol=1e-6)
    np.testing.assert_array_equal(found.difference, found.pull)
    np.testing.assert_array_equal(found.sharpness, [0.0, 1.0, 0.0, 1.0, 1.0])


@pytest.mark.parametrize("bound", [1.0, -1.0])
def test_a_clipped_pixel_is_that_of_a_censored_gaussian(bound):
    made, spread, step = np.linspace(-0.6, 1.7, 24), 0.1, 1e-3
    found = channel.compare(channel.View(jnp.full(24, bound), jnp.zeros(0)), bound * made, spread)

    def lost(made):
        """Log-likelihood that noise did not lead beyond the bound."""
        return -stats.norm.logsf(1.0, loc=made, scale=spread)

    near, after, before = lost(made), lost(made + step), lost(made - step)
    curvature, slope = (after + before - 2.0 * near) / step**2, (after - before) / (2.0 * step)
    unit = spread**2
    np.testing.assert_allclose(
        jnp.square(found.difference), 2.0 * unit * near, rtol=1e-3, atol=1e-8
    )
    np.testing.assert_allclose(found.sharpness, unit * curvature, rtol=5e-3, atol=1e-4)
    ends = found.pull * jnp.sqrt(found.sharpness)
    np.testing.assert_allclose(ends, bound * unit * slope, rtol=1e-3, atol=1e-6)


def test_the_spread_is_that_of_the_noise_and_no_more_than_is_left(made):
    view = channel.see(attacked(made[:1], "noise", std=0.1)[0])
    assert view.level == level(view.pixels)
    for guess, expected in ((made[1], view.level), (view.pixels + 0.01, 0.01)):
        scale = channel.scale(view, compare(view, guess))
        np.testing.assert_allclose(scale.spread, expected, rtol=0.1)
    assert channel.scale(channel.see(made[0]), compare(channel.see(made[0]), made[1])).spread == 0.0


def test_what_a_clipped_pixel_still_tells_is_the_information_of_its_likelihood():
    made, spread = np.array([-1.2, -0.95, 0.0, 0.9, 0.99, 1.5]), 0.1
    noise = np.linspace(-5.0, 5.0, 4001)
    seen = np.clip(made[:, None] + spread * noise, -1.0, 1.0)
    place = jnp.broadcast_to(jnp.asarray(made)[:, None], seen.shape).reshape(-1)
    found = channel.compare(channel.View(jnp.asarray(seen), jnp.zeros(0)), place, spread)
    sharpness = np.asarray(found.sharpness, np.float64).reshape(seen.shape)
    chance = stats.norm.pdf(noise) * (noise[1] - noise[0])
    # Of what the generator itself clips, nothing. The information is the slope's mean square.
    slope = np.asarray(found.pull, np.float64).reshape(seen.shape) * np.sqrt(sharpness) / spread
    expected = np.where(np.abs(made) <= 1.0, np.square(slope) @ chance, 0.0)
    told = channel.told(jnp.asarray(made), spread)
    np.testing.assert_allclose(told, expected, rtol=0.02)


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
    near = np.stack([made[1], np.clip(made[0] + 0.02, -1.0, 1.0)])
    told = {}
    for name, options in (("none", {}), ("blur", {"sigma": 2.0}), ("crop", {"keep": 0.8})):
        seen = attacked(made[:1], name, **options)[0] if options else made[0]
        found = [channel.likely(seen, near, keep) for keep in channel.KEPT]
        assert all(distances[1] < distances[0] for _, distances in found[:3])
        told[name] = min(found, key=lambda each: float(each[1][1]))[0][1]
    np.testing.assert_allclose(told["none"], np.zeros(3))
    np.testing.assert_allclose(told["blur"], [0.0, 0.0, 1.4], rtol=1e-6)
    np.testing.assert_allclose(np.exp(told["crop"][3]), 0.8, rtol=1e-6)


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
    shares = []
    for before, after in zip(made, attacked(made, "jpeg", quality=50), strict=True):
        view = channel.see(after)
        found = compare(view, before)
        zero, live = view.coded == 0.0, found.sharpness == 1.0
        assert np.mean(live[zero]) < 0.02 and np.all(live[~zero])
        np.testing.assert_array_equal(found.difference[~live], 0.0)
        scale = channel.scale(view, found)
        assert scale.count == live.sum() and scale.weights.max() <= 1.0
        square = channel.mean_square(scale.weights * found.difference, scale)
        shares.append(square / channel.noise_level(view) ** 2)
    np.testing.assert_allclose(np.mean(shares), 1.0, atol=0.25)  # rounding explains all of it
    assert np.max(shares) < 1.5


def test_the_weights_of_another_image_are_one(made):
    view = channel.View(jnp.asarray(made[0]), jnp.zeros(0))
    found = compare(view, made[1])
    scale = channel.scale(view, found)
    np.testing.assert_array_equal(scale.weights, 1.0)
    expected = np.mean(np.square(found.difference))
    np.testing.assert_allclose(channel.variance(found.difference, scale), expected, rtol=1e-5)
    row = channel.form(view, jnp.asarray(made[1]))
    np.testing.assert_array_equal(row, made[1].reshape(-1))


def test_a_wrong_latent_leaves_structure_in_a_jpeg_and_noise_does_not(made):
    view = channel.see(attacked(made[:1], "jpeg", quality=50)[0])

    def structure(guess):
        found = compare(view, guess)
        scale = channel.scale(view, found)
        return float(channel.structure(view, scale.weights * found.difference, scale))

    noisy = attacked(made[:1], "noise", std=0.1)[0]
    assert structure(noisy) < 1.3
    assert structure(made[1]) > 1.8
