"""Latent diffusion: golden values of the originals, sampling, gradients, parts that are missing.

tests/golden/ldm_kl and diffusers/ are set A of the shared golden data (ddim_scheduler cut to its
last samples); ldm_unet_classes was made by openaimodel.UNetModel of stable-diffusion-sdkit 2.1.5,
unet2dcondition by diffusers 0.42.1, both with random weights.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lfp_jax
from lfp_jax import generators
from lfp_jax.errors import UserError
from lfp_jax.generators import first_stage, untrained
from lfp_jax.generators.assemble import random_latent_diffusion

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = {"rtol": 2e-4, "atol": 2e-4}
DDCONFIG = {
    "double_z": False, "z_channels": 3, "resolution": 8, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "attn_type": "none",
}  # fmt: skip
UNET = {
    "image_size": 4, "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_heads": 2,
    "attention_resolutions": [1], "num_res_blocks": 1, "channel_mult": [1],
}  # fmt: skip
TINY = {
    "first_stage": {"embed_dim": 3, "n_embed": 16, "ddconfig": DDCONFIG},
    "unet": UNET,
    "scale_factor": 0.5,
}

decode = jax.jit(lambda g, z, quantize: g.decode(z, quantize=quantize), static_argnums=2)
encode = jax.jit(lambda g, images: g.encode(images))
predict = jax.jit(lambda g, x, t, c, y: g.predict_noise(x, t, context=c, label=y))


def _case(name):
    folder = GOLDEN / name
    io = np.load(folder / "io.npz")
    return folder, {k: np.moveaxis(io[k], 1, -1) if io[k].ndim == 4 else io[k] for k in io}


def _compvis(name):
    folder, io = _case(name)
    hparams = json.loads((folder / "hparams.json").read_text(encoding="utf-8"))
    return lfp_jax.load_generator(folder / "model.ckpt", hparams=hparams), io


@pytest.fixture(scope="module")
def tiny():
    """Give a small random model with all parts."""
    return random_latent_diffusion(jax.random.key(0), TINY)


def test_kl_golden():
    generator, io = _compvis("ldm_kl")
    assert (generator.latent_shape, generator.image_shape) == ((16, 16, 4), (32, 32, 3))
    np.testing.assert_allclose(decode(generator, io["z"], True), io["dec"], **TOLERANCE)
    mean, logvar = jax.jit(lambda g, x: g.encode_moments(x))(generator, io["image"])
    np.testing.assert_allclose(mean, io["mean"], **TOLERANCE)
    np.testing.assert_allclose(logvar, io["logvar"], **TOLERANCE)
    with pytest.raises(UserError, match="no UNet.*not sample"):
        generator.sample(jax.random.key(0), 1)


def test_vq_golden():
    folder, io = _case("diffusers/vqmodel")
    generator = lfp_jax.load_generator(folder)
    np.testing.assert_allclose(decode(generator, io["latent"], True), io["dec_quant"], **TOLERANCE)
    np.testing.assert_allclose(
        decode(generator, io["latent"], False), io["dec_noquant"], **TOLERANCE
    )
    np.testing.assert_allclose(encode(generator, io["image"]), io["enc_latent"], **TOLERANCE)
    z_q, indices = first_stage.quantize(io["latent"], generator.codebook)
    np.testing.assert_allclose(z_q, io["z_q"], **TOLERANCE)
    np.testing.assert_array_equal(np.ravel(indices), io["indices"])


def test_class_conditional_unet_golden():
    generator, io = _compvis("ldm_unet_classes")
    eps = predict(generator, io["x"], io["t"], None, io["y"])
    np.testing.assert_allclose(eps, io["eps"], **TOLERANCE)
    with pytest.raises(UserError, match=r"labels \[2\] below 7; got none"):
        generator.predict_noise(io["x"], io["t"])
    with pytest.raises(UserError, match="no decoder"):
        generator.decode(io["x"])


def test_cross_attention_unet_golden():
    folder, io = _case("diffusers/unet2dcondition")
    generator = lfp_jax.load_generator(folder)
    eps = predict(generator, io["x"], io["t"], jnp.asarray(io["context"]), None)
    np.testing.assert_allclose(eps, io["eps"], **TOLERANCE)
    with pytest.raises(UserError, match=r"context of shape \[2, tokens, 20\]; got none"):
        generator.predict_noise(io["x"], io["t"])


def test_the_scale_factor_is_divided_out(tiny):
    z = jax.random.normal(jax.random.key(1), (2, *tiny.latent_shape))
    plain = tiny.replace(scale_factor=jnp.ones(()))
    np.testing.assert_allclose(decode(tiny, z, True), decode(plain, z / 0.5, True), rtol=1e-6)
    images = jax.random.normal(jax.random.key(2), (2, *tiny.image_shape))
    np.testing.assert_allclose(encode(tiny, images), 0.5 * encode(plain, images), rtol=1e-6)
    shifted = plain.replace(shift=jnp.asarray(0.25))
    np.testing.assert_allclose(
        decode(shifted, z - 0.25, False), decode(plain, z, False), rtol=1e-4, atol=1e-5
    )


def test_patches_become_channels_and_pixels_again(tiny):
    images = jax.random.normal(jax.random.key(0), (2, 8, 4, 3))
    folded = first_stage._fold(images, 2)
    assert folded.shape == (2, 4, 2, 12)
    np.testing.assert_array_equal(folded[1, 2, 1], images[1, 4:6, 2:4].reshape(-1))
    np.testing.assert_array_equal(first_stage._unfold(folded, 2), images)
    plain = tiny.arch.first_stage
    arch = dataclasses.replace(plain, patch=2)
    assert arch.factor == 2 * plain.factor

    def both(key, images):
        z, _ = first_stage.Encoder(arch).init_with_output(key, images)
        return z, first_stage.Decoder(arch).init_with_output(key, z)[0]

    z, made = jax.eval_shape(both, jax.random.key(0), jnp.zeros((2, 16, 8, 3)))
    assert (z.shape, made.shape) == ((2, 16 // arch.factor, 8 // arch.factor, 3), (2, 16, 8, 3))


def test_the_models_own_number_of_steps_is_the_default(tiny):
    draw = jax.jit(lambda g, steps: g.sample(jax.random.key(0), 1, steps=steps), static_argnums=1)
    few = tiny.replace(sample_steps=2)
    np.testing.assert_array_equal(draw(few, None), draw(tiny, 2))


def test_the_gradient_passes_straight_through_the_quantiser():
    codebook = jax.random.normal(jax.random.key(0), (16, 3))
    z = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
    weight = jax.random.normal(jax.random.key(2), z.shape)
    grad = jax.grad(lambda z: jnp.sum(weight * first_stage.quantize(z, codebook)[0]))(z)
    np.testing.assert_array_equal(grad, weight)
    z_q, indices = first_stage.quantize(z, codebook)
    distances = np.sum((np.asarray(z)[..., None, :] - np.asarray(codebook)) ** 2, axis=-1)
    nearest = np.argmin(distances, axis=-1)
    np.testing.assert_array_equal(indices, nearest)
    np.testing.assert_allclose(z_q, codebook[nearest], rtol=1e-5, atol=1e-6)


def test_a_generator_says_whether_it_quantises(tiny):
    z = jax.random.normal(jax.random.key(1), (2, *tiny.latent_shape))
    smooth = decode(tiny.replace(quantizes=False), z, None)
    np.testing.assert_array_equal(smooth, decode(tiny, z, False))
    np.testing.assert_array_equal(decode(tiny, z, None), decode(tiny, z, True))
    assert np.abs(smooth - decode(tiny, z, True)).max() > 1e-3


def test_samples_do_not_depend_on_the_batch(tiny):
    key = jax.random.key(3)
    whole = tiny.sample(key, 4, steps=5)
    assert whole.shape == (4, *tiny.latent_shape)
    parts = [tiny.sample(key, 2, start=start, steps=5) for start in (0, 2)]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-4, atol=1e-4)
    assert np.abs(whole[0] - whole[1]).max() > 0.1


def test_eta_and_given_noise(tiny):
    x = jax.random.normal(jax.random.key(0), (2, *tiny.latent_shape))
    noise = jnp.zeros((5, *x.shape))
    still = tiny.denoise(x, steps=5)
    np.testing.assert_array_equal(tiny.denoise(x, steps=5, eta=0.0, noise=noise + 1), still)
    assert not np.allclose(tiny.denoise(x, steps=5, eta=1.0, noise=noise), still)
    with pytest.raises(UserError, match="eta=1.0 needs keys or noise"):
        tiny.denoise(x, steps=5, eta=1.0)
    with pytest.raises(UserError, match=r"noise must have shape \[5, 2, 4, 4, 3\]"):
        tiny.denoise(x, steps=5, eta=1.0, noise=noise[:3])
    with pytest.raises(UserError, match="steps must be from 1 to 1000; got 0"):
        tiny.denoise(x, steps=0)


def test_progress_is_told(tiny):
    told = []
    x = jnp.zeros((1, *tiny.latent_shape))
    jax.block_until_ready(tiny.denoise(x, steps=5, progress=lambda *done: told.append(done)))
    jax.effects_barrier()
    assert told == [(i, 5) for i in (1, 2, 3, 4, 5)]


def test_guidance_leads_from_null_to_given():
    hparams = {**UNET, "use_spatial_transformer": True, "context_dim": 8}
    generator = random_latent_diffusion(jax.random.key(0), hparams)
    x = jax.random.normal(jax.random.key(1), (2, *generator.latent_shape))
    given, null = jax.random.normal(jax.random.key(2), (2, 2, 5, 8))
    alone = {name: generator.denoise(x, steps=3, context=c) for name, c in
             (("given", given), ("null", null))}  # fmt: skip
    for guidance, name in ((1.0, "given"), (0.0, "null")):
        guided = generator.denoise(x, steps=3, context=given, null_context=null, guidance=guidance)
        np.testing.assert_allclose(guided, alone[name], rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="guidance=2.0 needs"):
        generator.denoise(x, steps=3, context=given, guidance=2.0)


def test_store_keeps_everything(tmp_path, tiny):
    target = tmp_path / "store"
    generators.save(target, tiny, source_format="test", licence="none")
    loaded = lfp_jax.load_generator(target)
    assert (loaded.arch, loaded.name) == (tiny.arch, tiny.name)
    assert jax.tree.structure(loaded) == jax.tree.structure(tiny)
    jax.tree.map(np.testing.assert_array_equal, loaded, tiny)


def test_convert_then_load(tmp_path):
    source, target = GOLDEN / "diffusers" / "vqmodel", tmp_path / "store"
    generators.convert(source, target)
    before, after = lfp_jax.load_generator(source), lfp_jax.load_generator(target)
    assert (before.arch, before.sha256) == (after.arch, after.sha256)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def _shapes(hparams):
    return jax.eval_shape(lambda key: random_latent_diffusion(key, hparams), jax.random.key(0))


def _millions(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6


def test_the_bundled_model_samples_and_rebuilds():
    generator = lfp_jax.load_generator("ldm-demo").replace(sample_steps=5)
    assert (generator.latent_shape, generator.image_shape) == ((16, 16, 3), (64, 64, 3))
    z = jax.jit(lambda g: g.sample(jax.random.key(0), 8))(generator)
    assert 0.7 < float(jnp.std(z)) < 1.3 and abs(float(jnp.mean(z))) < 0.5
    made = decode(generator, z, True)
    again = decode(generator, encode(generator, made), True)
    assert float(jnp.mean(jnp.abs(again - made))) < 0.1 < float(jnp.std(made))


def test_ffhq_geometry():
    model = _shapes(untrained.LATENT_DIFFUSION["ldm-ffhq-untrained"])
    assert (model.latent_shape, model.image_shape) == ((64, 64, 3), (256, 256, 3))
    # The published counts: 274 M in the UNet, 55 M in the first stage.
    assert 273 < _millions(model.unet) < 275
    assert 55 < _millions((model.encoder, model.decoder, model.codebook)) < 56


def test_stable_diffusion_decoder_geometry():
    model = _shapes(untrained.LATENT_DIFFUSION["kl-f8-untrained"])
    assert (model.latent_shape, model.image_shape) == ((64, 64, 4), (512, 512, 3))
    assert 49 < _millions(model.decoder) < 50  # 49.5 M, as published
    images = jax.eval_shape(lambda g, z: g.decode(z), model, jnp.zeros((1, 64, 64, 4)))
    assert images.shape == (1, 512, 512, 3)
