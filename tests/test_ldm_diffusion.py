"""Schedules and DDIM: golden values of diffusers, and what must hold of any schedule."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfp_jax.errors import UserError
from lfp_jax.generators import diffusion
from lfp_jax.weights import diffusers

GOLDEN = Path(__file__).parent / "golden" / "diffusers" / "ddim_scheduler"
COMPVIS = diffusion.Settings()


@pytest.mark.parametrize("variant", ["hub", "compvis"])
@pytest.mark.parametrize("eta", [0, 1])
def test_golden_steps(variant, eta):
    config = json.loads((GOLDEN / "configs.json").read_text(encoding="utf-8"))[variant]
    read = diffusers.diffusion(config, what="the scheduler")
    settings = diffusion.Settings(
        spacing=read["spacing"], offset=read["offset"], end_at_one=read["end_at_one"]
    )
    io = np.load(GOLDEN / "io.npz")
    chosen = diffusion.timesteps(settings, steps=20)[::-1]
    np.testing.assert_array_equal(chosen, io[f"{variant}/timesteps"])
    alphas = jnp.asarray(diffusion.alphas_cumprod(), jnp.float32)
    plan = diffusion.plan(alphas, settings, steps=20, eta=eta)
    x = io["x_T"]
    for i in range(20):
        at = {name: values[i] for name, values in plan.items()}
        noise = io["variance_noise"][i] if eta else None
        x, _ = diffusion.step(x, io["model_outputs"][i], at, noise=noise, settings=settings)
    np.testing.assert_allclose(x, io[f"{variant}/eta{eta}/last_sample"], rtol=1e-5, atol=1e-3)


def test_compvis_steps():
    np.testing.assert_array_equal(diffusion.timesteps(COMPVIS, steps=4), [1, 251, 501, 751])
    # As the original: 1000 // 3 = 333 fits four times.
    np.testing.assert_array_equal(diffusion.timesteps(COMPVIS, steps=3), [1, 334, 667, 1000][:3])
    everything = diffusion.timesteps(COMPVIS, steps=1000)
    np.testing.assert_array_equal(everything, np.arange(1, 1000))


def test_other_spacings():
    trailing = diffusion.Settings(spacing="trailing")
    np.testing.assert_array_equal(diffusion.timesteps(trailing, steps=3), [332, 666, 999])
    linspace = diffusion.Settings(spacing="linspace")
    np.testing.assert_array_equal(diffusion.timesteps(linspace, steps=3), [0, 500, 999])
    with pytest.raises(UserError, match="Did you mean 'leading'"):
        diffusion.timesteps(diffusion.Settings(spacing="leadin"), steps=3)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "sqrt", "cosine"])
def test_schedules_fall_from_one(schedule):
    alphas = diffusion.alphas_cumprod(schedule=schedule, beta_start=1e-4, beta_end=0.02)
    assert alphas.shape == (1000,)
    assert np.all(np.diff(alphas) < 0)
    assert 0.98 < alphas[0] < 1
    assert 0 <= alphas[-1] < 0.06


def test_zero_snr_ends_at_nothing():
    plain, zero = (diffusion.alphas_cumprod(zero_snr=flag) for flag in (False, True))
    assert zero[-1] == 0
    assert zero[0] == pytest.approx(plain[0])


def test_betas_given():
    alphas = diffusion.alphas_cumprod(betas=[0.1, 0.5], timesteps=2)
    np.testing.assert_allclose(alphas, [0.9, 0.45])
    with pytest.raises(UserError, match="needs 3 betas from 0 to below 1; got 2"):
        diffusion.alphas_cumprod(betas=[0.1, 0.5], timesteps=3)


@pytest.mark.parametrize("prediction", ["noise", "velocity", "image"])
def test_predictions_agree(prediction):
    clean, noise = jax.random.normal(jax.random.key(0), (2, 1, 4, 4, 3))
    signal, rest = 0.6, 0.8
    x = signal * clean + rest * noise
    output = {"noise": noise, "velocity": signal * noise - rest * clean, "image": clean}
    found = diffusion.noise_and_image(output[prediction], x, jnp.asarray(0.36), prediction)
    np.testing.assert_allclose(found[0], noise, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1], clean, rtol=1e-4, atol=1e-5)


def test_a_perfect_network_leads_to_the_clean_latent():
    clean, noise = jax.random.normal(jax.random.key(0), (2, 1, 4, 4, 3))
    alphas = jnp.asarray(diffusion.alphas_cumprod(), jnp.float32)
    last = alphas[diffusion.timesteps(COMPVIS, steps=10)[-1]]
    settings = diffusion.Settings(end_at_one=True)

    def network(x, t):
        alpha = alphas[t][:, None, None, None]
        return (x - jnp.sqrt(alpha) * clean) / jnp.sqrt(1 - alpha)

    x = jnp.sqrt(last) * clean + jnp.sqrt(1 - last) * noise
    options = {"settings": settings, "steps": 10}
    found = diffusion.ddim(network, x, alphas, eta=0.0, draw=None, **options)
    np.testing.assert_allclose(found, clean, rtol=1e-3, atol=1e-3)
    found = diffusion.ddim(network, x, alphas, eta=1.0, draw=lambda i: noise, **options)
    np.testing.assert_allclose(found, clean, rtol=1e-3, atol=1e-3)
