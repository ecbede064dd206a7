"""An adversary's means: copies blend as said, keys go and come, an estimator is misled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import adversary as bench
from lfp_jax import adversary, basis, fingerprint
from lfp_jax.attribution import estimator as estimators
from lfp_jax.errors import UserError
from lfp_jax.generators import stylegan2

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
BITS, DIM = 4, 16
MARK = {"strength": 1.5, "code": "antipodal"}


@pytest.fixture(scope="module")
def generator():
    arch = stylegan2.Architecture(
        resolution=8, channels=(8, 8), z_dim=DIM, w_dim=DIM, mapping_layers=1, mapping_width=DIM
    )
    return stylegan2.random_generator(jax.random.key(1), arch)


@pytest.fixture(scope="module")
def latents():
    return np.asarray(jax.random.normal(jax.random.key(2), (400, DIM)))


@pytest.fixture(scope="module")
def space(latents):
    return basis.split(basis.fit(latents), bits=BITS)


@pytest.mark.parametrize(
    ("how", "wanted"),
    [("mean", 0.35), ("median", 0.2), ("minimum", 0.1), ("maximum", 0.9), ("majority", 0.2)],
)
def test_values_are_blended_as_the_name_says(how, wanted):
    copies = np.array([0.9, 0.2, 0.1, 0.2])[:, None, None] * np.ones((4, 3, 2))
    blended = adversary.collude(KEY, copies, how=how)
    np.testing.assert_allclose(blended, np.full((3, 2), wanted), atol=1e-6)


@pytest.mark.parametrize("how", adversary.COLLUSIONS)
def test_one_copy_is_itself(how):
    copies = np.random.default_rng(0).uniform(-1, 1, (1, 2, 4, 4, 3)).astype(np.float32)
    np.testing.assert_array_equal(adversary.collude(KEY, copies, how=how), copies[0])


def test_picks_are_of_all_copies_and_hang_on_the_global_index():
    copies = np.arange(3.0)[:, None, None] * np.ones((3, 4, 600))
    whole = np.asarray(adversary.collude(KEY, copies, how="pick", start=2))
    shares = [np.mean(whole == value) for value in range(3)]
    np.testing.assert_allclose(shares, 1.0 / 3.0, atol=0.05)
    later = adversary.collude(KEY, copies[:, 1:], how="pick", start=3)
    np.testing.assert_array_equal(whole[1:], later)
    assert np.any(whole[0] != whole[1])


def test_the_mean_of_a_users_latents_forges_the_key(space, latents):
    bits = np.array([1, 0, 0, 1], np.uint8)
    marked = fingerprint.inject(space, latents[:150], bits, **MARK)
    forged = adversary.plant(np.tile(np.asarray(space.mean), (5, 1)), marked, latents[150:])
    read = fingerprint.read(space, forged, **MARK)
    np.testing.assert_array_equal(read, np.tile(bits, (5, 1)))


def test_a_removed_key_is_gone_and_the_rest_stays(space, latents):
    bits = np.array([1, 0, 0, 1], np.uint8)
    marked = fingerprint.inject(space, latents, bits, **MARK)
    zero = adversary.remove(KEY, space, marked, how="zero", **MARK)
    np.testing.assert_allclose(fingerprint.carrier_part(space, zero), 0.0, atol=1e-5)
    drawn = adversary.remove(KEY, space, marked, how="random", **MARK)
    agree = np.asarray(fingerprint.read(space, drawn, **MARK)) == bits
    np.testing.assert_allclose(np.mean(agree), 0.5, atol=0.05)
    rest = [fingerprint.whitened_nuisance(space, w) for w in (marked, zero, drawn)]
    np.testing.assert_allclose(rest[1], rest[0], atol=1e-4)
    np.testing.assert_allclose(rest[2], rest[0], atol=1e-4)
    later = adversary.remove(KEY, space, marked[3:], how="random", start=3, **MARK)
    np.testing.assert_allclose(later, drawn[3:], atol=1e-5)


def test_gradient_ascent_turns_bits_within_its_budget(generator, space):
    arch = estimators.Architecture(
        patch=2, channels=(8,), blocks=0, grid=2, head=4, width=16, rounds=1
    )
    metric = np.eye(DIM, dtype=np.float32)
    network = estimators.initial(KEY, generator, space, metric=metric, arch=arch, **MARK)
    head = network.params["network"]["bits"]
    head["kernel"] = jax.random.normal(KEY, head["kernel"].shape)  # it says something
    images = np.asarray(jnp.clip(generator.decode(generator.sample(KEY, 3)), -0.9, 0.9))
    options = {"estimator": network, "budget": 8.0, "steps": 20}
    changed = adversary.pgd(KEY, generator, space, images, **options)
    assert np.max(np.abs(changed - images)) <= 16.0 / 255.0 + 1e-6

    def soft(images):
        guess = estimators.guesses(network, generator, space, images)[-1]
        return np.asarray(jax.nn.sigmoid(guess.logits))

    before, after = soft(images), soft(changed)
    kept = np.where(before > 0.5, after, 1.0 - after)
    assert np.mean(kept) < np.mean(np.maximum(before, 1.0 - before)) - 0.1
    same = adversary.pgd(KEY, generator, space, images, **options | {"budget": 0.0})
    np.testing.assert_allclose(same, images, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adversary.collude(KEY, np.zeros((2, 1)), how="men"), "Did you mean 'mean'"),
        (lambda: adversary.collude(KEY, np.zeros((0, 1)), how="mean"), "at least one copy"),
        (
            lambda: adversary.remove(KEY, None, np.zeros((2, 4)), how="zeros", **MARK),
            "Did you mean 'zero'",
        ),
        (
            lambda: adversary.pgd(
                KEY, None, None, np.zeros((1, 2, 2, 3)), estimator=None, budget=-1
            ),
            "budget and steps must be >= 0; got -1",
        ),
        (lambda: bench.find("collude-mode-3"), "Did you mean 'collude-mean-"),
        (lambda: bench.find("plant-0"), "Unknown attack 'plant-0'"),
    ],
)
def test_mistakes_are_said_in_one_line(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert message in str(error.value)
