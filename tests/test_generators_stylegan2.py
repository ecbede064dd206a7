"""StyleGAN2 against outputs of the original implementations (tests/golden)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lfp_jax
from lfp_jax import fingerprint, images
from lfp_jax.basis import Basis, split
from lfp_jax.errors import UserError
from lfp_jax.generators import convert, describe, layers, stylegan2

GOLDEN = Path(__file__).parent / "golden"
IMAGE = {"atol": 2e-4, "rtol": 2e-4}
LATENT = {"atol": 2e-5, "rtol": 2e-5}


def nhwc(array):
    return np.moveaxis(array, 1, -1)


def noise_of(io, prefix):
    return [nhwc(io[name]) for name in sorted(io) if name.startswith(f"{prefix}_0")]


@pytest.fixture(scope="module")
def rosinality():
    folder = GOLDEN / "sg2_rosinality"
    return lfp_jax.load_generator(folder / "model.pt"), dict(np.load(folder / "io.npz"))


@pytest.fixture(scope="module")
def nvlabs():
    folder = GOLDEN / "sg2_nvlabs"
    return lfp_jax.load_generator(folder / "model.pkl"), dict(np.load(folder / "io.npz"))


def test_rosinality_mapping(rosinality):
    gen, io = rosinality
    np.testing.assert_allclose(gen.map(io["z"]), io["w"], **LATENT)
    np.testing.assert_allclose(gen.map(io["z2"]), io["w2"], **LATENT)
    np.testing.assert_allclose(gen.w_avg, io["latent_avg"].reshape(-1), **LATENT)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("img_noise", "noise"), ("img_noise_batch", "noise_batch"), ("img_registered", None)],
)
def test_rosinality_images(rosinality, name, prefix):
    gen, io = rosinality
    noise = noise_of(io, prefix) if prefix else None
    np.testing.assert_allclose(gen.decode(io["w"], noise=noise), nhwc(io[name]), **IMAGE)


def test_rosinality_truncation_and_mixing(rosinality):
    gen, io = rosinality
    w = gen.map(io["z"], truncation=0.7)
    np.testing.assert_allclose(w, io["wplus_trunc07"][:, 0], **LATENT)
    np.testing.assert_allclose(gen.decode(w), nhwc(io["img_trunc07"]), **IMAGE)
    for name in ("mix", "mix_last"):
        index = int(io["inject_index"]) if name == "mix" else gen.arch.num_ws - 1
        first = np.arange(gen.arch.num_ws)[None, :, None] < index
        ws = np.where(first, io["w"][:, None], io["w2"][:, None])
        np.testing.assert_allclose(gen.decode(ws), nhwc(io[f"img_{name}"]), **IMAGE)
    np.testing.assert_allclose(gen.decode(io["wplus"]), nhwc(io["img_wplus"]), **IMAGE)


def test_rosinality_layers(rosinality):
    gen, io = rosinality
    names = {
        "conv1": "b4/conv1",
        "to_rgb1": "b4/torgb",
        "convs.0": "b8/conv0",
        "convs.1": "b8/conv1",
    }
    outputs = _intermediates(gen, io["w"], noise_of(io, "noise"))
    for theirs, ours in names.items():
        np.testing.assert_allclose(outputs[ours], nhwc(io[f"feat/{theirs}"]), **IMAGE)


def _intermediates(gen, w, noise):
    ws = jnp.broadcast_to(w[:, None], (len(w), gen.arch.num_ws, gen.arch.w_dim))
    _, state = stylegan2.Synthesis(gen.arch).apply(
        {"params": gen.synthesis}, ws, noise, capture_intermediates=True
    )
    found = {}
    for block, modules in state["intermediates"].items():
        if block.startswith("b"):
            for name in ("conv0", "conv1", "torgb"):
                if name in modules:
                    found[f"{block}/{name}"] = modules[name]["__call__"][0]
    return found


def test_rosinality_discriminator(rosinality):
    _, io = rosinality
    d = lfp_jax.load_discriminator(GOLDEN / "sg2_rosinality" / "model.pt")
    np.testing.assert_allclose(d(nhwc(io["d_images"])), io["d_logits"], **IMAGE)
    fake = nhwc(io["img_noise"])[:1]
    np.testing.assert_allclose(d(fake), io["d_logits_fake"], **IMAGE)


def test_nvlabs_latents(nvlabs):
    gen, io = nvlabs
    cutoff = json.loads((GOLDEN / "sg2_nvlabs" / "hparams.json").read_text())["truncation_cutoff"]
    every = {"ws_psi1": {}, "ws_psi05": {"truncation": 0.5}}
    for name, options in every.items():
        w = gen.map(io["z"], **options)
        np.testing.assert_allclose(w[:, None] + 0 * io[name], io[name], **LATENT)
    w = gen.map(io["z"], truncation=0.5, cutoff=cutoff)
    np.testing.assert_allclose(w, io["ws_psi05_cutoff"], **LATENT)


def test_nvlabs_images(nvlabs):
    gen, io = nvlabs
    w = gen.map(io["z"])
    np.testing.assert_allclose(gen.decode(w), nhwc(io["img_const"]), **IMAGE)
    np.testing.assert_allclose(gen.decode(w, noise=0), nhwc(io["img_none"]), **IMAGE)
    truncated = gen.decode(gen.map(io["z"], truncation=0.5))
    np.testing.assert_allclose(truncated, nhwc(io["img_psi05_const"]), **IMAGE)
    np.testing.assert_allclose(gen.decode(io["wplus"]), nhwc(io["img_wplus"]), **IMAGE)
    clamped = gen.decode(2000.0 * io["wplus"])
    np.testing.assert_allclose(clamped, nhwc(io["img_wplus_x2000"]), **IMAGE)
    outputs = _intermediates(gen, w, list(gen.noise))
    for name in ("b4.conv1", "b8.conv0", "b4.torgb"):
        ours = outputs[name.replace(".", "/")]
        np.testing.assert_allclose(ours, nhwc(io[f"feat/{name}"]), **IMAGE)


def test_nvlabs_raw_weights(nvlabs):
    _, io = nvlabs
    gen = lfp_jax.load_generator(GOLDEN / "sg2_nvlabs" / "model.pkl", ema=False)
    w = gen.map(io["z"])
    np.testing.assert_allclose(w, io["ws_G"][:, 0], **LATENT)
    np.testing.assert_allclose(gen.decode(w), nhwc(io["img_G_const"]), **IMAGE)


def test_nvlabs_discriminator(nvlabs):
    _, io = nvlabs
    d = lfp_jax.load_discriminator(GOLDEN / "sg2_nvlabs" / "model.pkl")
    np.testing.assert_allclose(d(nhwc(io["d_images"])), io["d_logits"], **IMAGE)


def test_fingerprinted_image_end_to_end(rosinality):
    gen, _ = rosinality
    io = dict(np.load(GOLDEN / "fingerprint_sg2" / "io.npz"))
    stddev = jnp.sqrt(io["pca_explained_variance"])
    recorded = Basis(io["pca_mean"], io["pca_components"].T, stddev)
    space = split(recorded, bits=int(io["key_len"]), shift=int(io["shift"]))
    w = fingerprint.compose(
        space, io["alpha"].T, io["key"].T, strength=float(io["sigma"]), code="binary"
    )
    made = gen.decode(w, noise=noise_of(io, "noise"))
    np.testing.assert_allclose(made, nhwc(io["img_wx"]), **IMAGE)
    wrong = np.abs(images.to_uint8(made).astype(int) - io["img_wx_u8"])
    assert wrong.max() <= 1
    assert wrong.mean() < 1e-3


def test_converted_generator_makes_the_same_images(nvlabs, tmp_path):
    gen, io = nvlabs
    made = convert(str(GOLDEN / "sg2_nvlabs" / "model.pkl"), str(tmp_path / "store"))
    assert describe(made) == describe(gen)
    again = lfp_jax.load_generator(str(tmp_path / "store"))
    np.testing.assert_array_equal(gen.decode(io["wplus"]), again.decode(io["wplus"]))
    assert again.sha256 == gen.sha256


def test_a_description_counts_parameters(nvlabs):
    gen, _ = nvlabs
    mapping = sum(leaf.size for leaf in jax.tree.leaves(gen.mapping))
    height, width, _ = gen.image_shape
    said = describe(gen)
    assert f"images {height}x{width}x3" in said
    assert f"mapping {mapping:,}, synthesis" in said


def test_convert_keeps_a_folder_that_is_no_store(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose me")
    with pytest.raises(UserError, match="left as it is"):
        convert(str(GOLDEN / "sg2_nvlabs" / "model.pkl"), str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_unknown_generator_names_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'stylegan2-demo'"):
        lfp_jax.load_generator("stylegan-demo")


def test_wrong_shapes_are_said(nvlabs):
    gen, io = nvlabs
    with pytest.raises(UserError, match=r"w must have shape \[n, 32\]"):
        gen.decode(jnp.zeros((1, 31)))
    with pytest.raises(UserError, match=r"z must have shape \[n, 48\]"):
        gen.map(jnp.zeros((1, 47)))
    with pytest.raises(UserError, match="takes 7 noise maps"):
        gen.decode(jnp.zeros((1, 32)), noise=list(gen.noise)[:2])
    with pytest.raises(UserError, match="Noise map 0"):
        gen.decode(jnp.zeros((1, 32)), noise=[m[:, :-1] for m in gen.noise])
    with pytest.raises(UserError, match="label"):
        gen.map(io["z"], jnp.zeros((4, 3)))


def tiny(**changes):
    sizes = {"z_dim": 8, "w_dim": 8, "mapping_layers": 2, "mapping_width": 8}
    arch = stylegan2.Architecture(**{**sizes, "resolution": 16, "channels": (8, 8, 8), **changes})
    return stylegan2.random_generator(jax.random.key(0), arch, noise_strength=0.3)


def test_sampling_depends_on_the_global_index_only():
    gen, key = tiny(), jax.random.key(1)
    whole = gen.sample(key, 6)
    parts = [gen.sample(key, 2, start=0), gen.sample(key, 4, start=2)]
    # The draws are the same; the last bits of a product may hang on the size of the batch.
    np.testing.assert_allclose(whole, jnp.concatenate(parts), rtol=1e-5, atol=1e-6)


def test_random_noise_depends_on_its_key():
    gen = tiny()
    w = gen.sample(jax.random.key(1), 2)
    one, same, other = (gen.decode(w, noise=jax.random.key(k)) for k in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3


def test_class_conditional_mapping_uses_the_label():
    gen = tiny(label_dim=3, embed_dim=8)
    z, labels = jnp.ones((2, 8)), jnp.eye(3)[:2]
    w = gen.map(z, labels)
    assert np.abs(w[0] - w[1]).max() > 1e-3
    with pytest.raises(UserError, match="label"):
        gen.map(z)


def test_bfloat16_is_near_float32():
    gen = tiny()
    w = gen.sample(jax.random.key(1), 2)
    exact, rough = gen.decode(w), gen.replace(dtype=jnp.bfloat16).decode(w)
    assert rough.dtype == jnp.float32
    assert np.abs(exact - rough).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_trainable_convolution_has_the_plain_one_s_derivatives(size, stride):
    """Of the first and second order: the gradient of the energy of the slopes in the image."""
    keys = jax.random.split(jax.random.key(1), 2)
    x, kernel = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, [(2, 6, 7, 3), (size, size, 3, 4)], strict=True)
    )

    def energy(x, kernel, trainable):
        return jnp.sum(jnp.sin(layers.conv(x, kernel, stride=stride, trainable=trainable)))

    def penalty(x, kernel, trainable):
        return jnp.sum(jnp.square(jax.grad(energy)(x, kernel, trainable)))

    for function in (energy, penalty):
        plain, own = (jax.grad(function, argnums=(0, 1))(x, kernel, t) for t in (False, True))
        for wanted, found in zip(plain, own, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_trainable_up_convolution_has_the_plain_one_s_gradients():
    x = jax.random.normal(jax.random.key(0), (2, 5, 6, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))

    def energy(x, kernel, trainable):
        return jnp.sum(jnp.sin(layers.up_conv(x, kernel, (1, 3, 3, 1), trainable=trainable)))

    plain = jax.grad(energy, argnums=(0, 1))(x, kernel, False)
    ruled = jax.grad(energy, argnums=(0, 1))(x, kernel, True)
    for one, other in zip(plain, ruled, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)


def test_decode_is_compiled_once_a_shape():
    gen, count = tiny(), []

    @jax.jit
    def decode(gen, w):
        count.append(1)
        return gen.decode(w)

    for seed in range(3):
        decode(gen, gen.sample(jax.random.key(seed), 2))
    assert len(count) == 1
