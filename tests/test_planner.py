"""What is predicted of a design point: against simulation where images are linear in latents."""

import json

import jax
import jax.numpy as jnp
import linear_generator
import numpy as np
import pytest

from lfp_jax import attacks, basis, fingerprint, main, planner
from lfp_jax.attribution import gauss_newton
from lfp_jax.errors import UserError

GENERATOR = linear_generator.make(d=24)
METRIC = np.asarray(GENERATOR.jacobian, np.float64).T @ np.asarray(GENERATOR.jacobian, np.float64)
BITS, VARIANCE, STRENGTH = 10, 0.03**2, 0.06
CONFIG = "--config=configs/stylegan2.py:tiny"


@pytest.fixture(scope="module")
def fitted():
    return basis.fit(basis.sample(jax.random.key(0), GENERATOR, 1_000))


def _space(fitted, shift=4):
    return basis.split(fitted, bits=BITS, shift=shift, metric=METRIC / 48)


def _plan(space, n, code="antipodal"):
    latents = basis.sample(jax.random.key(1), GENERATOR, n)
    bits = np.random.default_rng(2).integers(0, 2, (n, BITS)).astype(np.uint8)
    options = {"strength": STRENGTH, "code": code, "variance": VARIANCE, "attack": "none"}
    return planner.predict(GENERATOR, space, METRIC, latents, bits, **options)


@pytest.mark.parametrize("code", ["antipodal", "binary"])
def test_the_error_is_that_of_the_exact_linear_decoder(fitted, code):
    space = _space(fitted)
    plan = _plan(space, 24, code)
    rng, n = np.random.default_rng(3), 40_000
    signs = rng.choice((-1.0, 1.0), (n, BITS))
    # Responses of the image to half a bit's swing, and to a standard deviation of each nuisance.
    jacobian = np.asarray(GENERATOR.jacobian, np.float64)
    carried = 0.5 * STRENGTH * jacobian @ np.asarray(space.carrier, np.float64)
    loud = jacobian @ (np.asarray(space.nuisance) * np.asarray(space.nuisance_stddev))
    seen = signs @ carried.T + rng.normal(size=(n, loud.shape[1])) @ loud.T
    seen += VARIANCE**0.5 * rng.normal(size=seen.shape)

    def error(seen, covariance, i):
        """Share of wrong signs of the best linear estimate of bit i."""
        estimate = seen @ np.linalg.solve(covariance, carried[:, i])
        return np.mean((estimate > 0.0) != (signs[:, i] > 0.0))

    hidden = loud @ loud.T + VARIANCE * np.eye(48)
    alone = np.mean([error(seen, hidden + carried @ carried.T, i) for i in range(BITS)])
    assert 0.02 < alone < 0.3
    np.testing.assert_allclose(plan.alone.mean(), alone, rtol=0.15)
    others = [seen - np.delete(signs, i, 1) @ np.delete(carried, i, 1).T for i in range(BITS)]
    known = np.mean([error(others[i], hidden, i) for i in range(BITS)])
    np.testing.assert_allclose(plan.known, known, rtol=0.05)


@pytest.mark.parametrize("code", ["antipodal", "binary"])
def test_a_picture_far_from_the_mean_is_told_by_its_own_place(fitted, code):
    """Against the posterior mean of the picture itself, over draws of the noise alone."""
    space = _space(fitted)
    latents = basis.sample(jax.random.key(1), GENERATOR, 3)
    latents = space.mean[None] + 4.0 * (latents - space.mean[None])
    bits = np.random.default_rng(2).integers(0, 2, (3, BITS)).astype(np.uint8)
    form = {"strength": STRENGTH, "code": code, "variance": VARIANCE, "attack": "none"}
    plan = planner.predict(GENERATOR, space, METRIC, latents, bits, **form)
    jacobian = np.asarray(GENERATOR.jacobian, np.float64)
    scaled = np.asarray(space.nuisance) * np.asarray(space.nuisance_stddev)
    loud = jacobian @ np.concatenate([0.5 * STRENGTH * np.asarray(space.carrier), scaled], 1)
    posterior = np.linalg.inv(np.eye(loud.shape[1]) + loud.T @ loud / VARIANCE)
    drawn = np.random.default_rng(3).normal(size=(20_000, 48)) * VARIANCE**0.5
    for alone, latent, key in zip(plan.alone, np.asarray(latents), bits, strict=True):
        place = np.linalg.lstsq(scaled, latent - np.asarray(space.mean), rcond=None)[0]
        seen = loud @ np.concatenate([2.0 * key - 1.0, place]) + drawn
        estimate = (seen @ loud / VARIANCE @ posterior)[:, :BITS]
        np.testing.assert_allclose(alone, np.mean((estimate > 0.0) != key), rtol=0.05)


class Bent(linear_generator.Linear):
    """Images that are bent, but for one where they and their derivatives are the linear ones."""

    middle: jax.Array | None = None

    def decode(self, w):
        """Make images [n, 4, 4, 3]."""
        flat = super().decode(w)
        return flat + 100.0 * jnp.square(flat - self.middle)


def test_images_that_bend_tell_less(fitted):
    space = _space(fitted)
    latents = basis.sample(jax.random.key(1), GENERATOR, 1)
    bits = np.random.default_rng(2).integers(0, 2, (1, BITS)).astype(np.uint8)
    form = {"strength": STRENGTH, "code": "antipodal"}
    middle = GENERATOR.decode(fingerprint.inject(space, latents, bits, **form))
    bent = Bent(GENERATOR.spread, GENERATOR.jacobian, middle=middle)
    form |= {"variance": VARIANCE, "attack": "none"}
    plain, bends = (
        planner.predict(model, space, METRIC, latents, bits, **form) for model in (GENERATOR, bent)
    )
    assert bends.known[0] > 1.1 * plain.known[0] > 0.0


def test_bits_told_jointly_err_between_the_two(fitted):
    plan = _plan(_space(fitted), 12)
    assert plan.known.mean() < plan.alone.mean()
    assert 0.8 * plan.known.mean() < plan.jointly.mean() < 1.2 * plan.alone.mean()
    assert np.all((plan.words >= 0.0) & (plan.words <= 1.0))
    assert np.all(plan.told < 1.0)


def test_fisher_directions_beat_random_ones_at_the_same_change_of_the_image(fitted):
    drawn = basis.random_directions(jax.random.key(4), fitted)
    found = basis.fisher_directions(
        jax.random.key(5), GENERATOR, fitted, METRIC, noise=VARIANCE**0.5, samples=2
    )
    at_random, told = (_plan(_space(each, shift=2), 2) for each in (drawn, found))
    assert told.alone.mean() < 0.5 * at_random.alone.mean()


def test_quality_is_that_of_the_pictures(fitted):
    space = _space(fitted)
    plan = _plan(space, 2)
    latents = basis.sample(jax.random.key(1), GENERATOR, 2)
    bits = np.random.default_rng(2).integers(0, 2, (2, BITS)).astype(np.uint8)
    marked = fingerprint.inject(space, latents, bits, strength=STRENGTH)
    change = GENERATOR.decode(marked) - GENERATOR.decode(latents)
    change = np.sqrt(np.square(change).mean((1, 2, 3)))
    np.testing.assert_allclose(plan.change, change, rtol=0.05)
    np.testing.assert_allclose(plan.psnr, 20.0 * np.log10(2.0 / plan.change), atol=1e-3)


def test_noise_is_that_of_the_attack_and_of_rounding():
    quantum = gauss_newton.QUANTUM
    assert planner.noise_variance(attacks.find("none")) == quantum
    found = planner.noise_variance(attacks.find("paper:noise"))
    np.testing.assert_allclose(found, 0.1**2 + 2 * quantum)
    with pytest.raises(UserError, match="got attack 'blur'"):
        planner.noise_variance(attacks.find("paper:blur"))


def test_a_plan_is_a_table_and_a_file(tmp_path, capsys):
    argv = ["main", "--mode=plan", CONFIG, f"--workdir={tmp_path}", "--n=2"]
    argv += ["--config.attack=paper:noise", "--config.basis_samples=128"]
    argv += ["--config.metric_samples=64"]
    assert main.main(argv) == 0
    said = capsys.readouterr().out
    assert "sensitivity from 20, 8 bits, antipodal, strength 4, attack paper:noise" in said
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["plan"]["jointly"]["images"] == 2
    assert 0.0 <= written["plan"]["known"]["value"] <= 0.5
    assert written["settings"]["attack"] == "paper:noise"
    for override, message in (
        ("attack=paper:jpeg", "got attack 'jpeg'"),
        ("noise=known", "got noise=known"),
        ("basis=fishr", "Did you mean 'fisher'"),
    ):
        assert main.main([*argv, f"--config.{override}"]) == 2
        assert message in capsys.readouterr().err
