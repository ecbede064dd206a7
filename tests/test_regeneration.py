"""Attacks that make an image anew: what a known denoiser must give, and any size of image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfp_jax import attacks, design
from lfp_jax.attacks import regeneration
from lfp_jax.errors import UserError
from lfp_jax.generators import diffusion, ldm

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(1)
ALPHAS = jnp.asarray(diffusion.alphas_cumprod(), jnp.float32)


class Plain(ldm.LatentDiffusion):
    """Latents are images, of all which any is as likely: no noise is ever seen in one."""

    def encode(self, images):
        """Give the images."""
        return images

    def decode(self, z, *, quantize=None):
        """Give the latents."""
        return z

    def predict_noise(self, x, t, *, context=None, label=None):
        """Say that there is none."""
        return jnp.zeros_like(x)


class OnePicture(Plain):
    """There is one picture, the codebook: all else is noise."""

    def predict_noise(self, x, t, *, context=None, label=None):
        """Take the picture away."""
        alpha = self.alphas_cumprod[t][:, None, None, None]
        return (x - jnp.sqrt(alpha) * self.codebook[None]) / jnp.sqrt(1.0 - alpha)


def _stand_in(kind, picture=None):
    arch = ldm.Architecture(None, None, diffusion.Settings(), 8)
    return kind(None, None, picture, None, ALPHAS, jnp.ones(()), jnp.zeros(()), arch)


@pytest.fixture
def use(monkeypatch):
    """Give a function that makes the attacks load one model, whatever its name."""
    return lambda model: monkeypatch.setattr(regeneration, "_load", lambda source: model)


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).uniform(-0.5, 0.5, (5, 8, 8, 3)).astype(np.float32)


@pytest.mark.parametrize("level", [30, 100])
def test_the_noise_is_that_of_the_training_step(use, pictures, level):
    use(_stand_in(Plain))
    images = np.zeros((16, 8, 8, 3), np.float32)
    made = attacks.rediffuse(KEY, images, level=level)
    alpha = float(ALPHAS[level])
    np.testing.assert_allclose(np.std(made), ((1.0 - alpha) / alpha) ** 0.5, rtol=0.05)


def test_a_denoiser_that_knows_one_picture_gives_it(use, pictures):
    use(_stand_in(OnePicture, jnp.asarray(pictures[0])))
    made = attacks.rediffuse(KEY, pictures, level=60)
    np.testing.assert_allclose(made, np.broadcast_to(pictures[0], made.shape), atol=1e-4)


def test_noise_hangs_on_the_global_index_only(use, pictures, monkeypatch):
    use(_stand_in(Plain))
    whole = attacks.rediffuse(KEY, pictures, level=30, start=3)
    np.testing.assert_array_equal(
        whole[2:], attacks.rediffuse(KEY, pictures[2:], level=30, start=5)
    )
    monkeypatch.setattr(regeneration, "_BATCH", 2)
    np.testing.assert_array_equal(whole, attacks.rediffuse(KEY, pictures, level=30, start=3))


def test_the_first_stage_encodes_and_decodes(use, pictures):
    tiny = design.load_generator("ldm-tiny")
    use(tiny)
    made = attacks.apply(KEY, pictures, attacks.find("regeneration:vae"))
    seen = attacks.apply(KEY, pictures, attacks.find("none"))
    wanted = jnp.clip(tiny.decode(tiny.encode(seen)), -1.0, 1.0)
    np.testing.assert_allclose(made, wanted, atol=1.01 / 255)
    odd = np.asarray(seen[:2, :7, :5, :1])
    whole = np.repeat(np.pad(odd, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge"), 3, axis=-1)
    grey = attacks.regenerate(KEY, odd)
    wanted = np.clip(tiny.decode(tiny.encode(whole)), -1.0, 1.0)[:, :7, :5]
    assert grey.shape == odd.shape
    np.testing.assert_allclose(grey, wanted.mean(axis=-1, keepdims=True), atol=1e-4)


@pytest.mark.parametrize("level", [0, 1000, "loud"])
def test_a_level_that_the_schedule_lacks_is_said(use, pictures, level):
    use(_stand_in(Plain))
    with pytest.raises(UserError, match=f"level must be 1 .. 999 .*got {level} and 10"):
        attacks.rediffuse(KEY, pictures, level=level)


def test_another_generator_is_said(use, pictures):
    use(object())
    with pytest.raises(UserError, match="'ldm-demo' is no latent-diffusion model"):
        attacks.regenerate(KEY, pictures)


def test_the_suite_is_found_by_name():
    assert [one.name for one in attacks.suite("regeneration")] == [
        "vae", "rediffuse-30", "rediffuse-60", "rediffuse-100",
    ]  # fmt: skip
    with pytest.raises(UserError, match="Did you mean 'vae'"):
        attacks.find("regeneration:vea")
