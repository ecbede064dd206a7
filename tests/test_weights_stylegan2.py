"""StyleGAN2 files to trees: golden values, other sizes, labels, and strictness both ways."""

import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import nvlabs_writer
import pickle_writer as write
import pytest
from nvlabs_writer import square
from pickle_writer import mapping

from lfp_jax.errors import UserError
from lfp_jax.generators import stylegan2 as networks
from lfp_jax.weights import pickles, stylegan2

GOLDEN = Path(__file__).parent / "golden"
ROSINALITY = GOLDEN / "sg2_rosinality" / "model.pt"
NVLABS = GOLDEN / "sg2_nvlabs" / "model.pkl"
TOLERANCE = {"rtol": 2e-4, "atol": 2e-4}


def _networks(checkpoint):
    """Build both networks of a checkpoint."""
    made = checkpoint.generator
    arch = networks.Architecture(**checkpoint.generator_hparams)
    noise = tuple(checkpoint.noise)
    generator = networks.StyleGAN2(
        made["mapping"], made["synthesis"], checkpoint.w_avg, noise, arch
    )
    d_arch = networks.DiscriminatorArchitecture(**checkpoint.discriminator_hparams)
    return generator, networks.Discriminator(checkpoint.discriminator, d_arch)


def _assert_shapes(checkpoint):
    """Compare a checkpoint's trees with those of freshly made networks."""
    generator, discriminator = _networks(checkpoint)
    key = jax.random.key(0)
    fresh = jax.eval_shape(lambda key: networks.random_generator(key, generator.arch), key)
    fresh_d = jax.eval_shape(
        lambda key: networks.random_discriminator(key, discriminator.arch), key
    )
    wanted = [fresh.mapping, fresh.synthesis, fresh.noise, fresh_d.params]
    found = [generator.mapping, generator.synthesis, generator.noise, discriminator.params]
    assert jax.tree.map(jnp.shape, wanted) == jax.tree.map(jnp.shape, found)
    assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype(np.float32)}


_map = jax.jit(lambda generator, z: generator.map(z))
_decode = jax.jit(lambda generator, w: generator.decode(w))
_judge = jax.jit(lambda discriminator, images: discriminator(images))


def _last(images):
    return np.transpose(images, (0, 2, 3, 1))


def test_rosinality_golden():
    checkpoint = stylegan2.read(ROSINALITY)
    assert checkpoint.source == "rosinality"
    assert checkpoint.sha256 == hashlib.sha256(ROSINALITY.read_bytes()).hexdigest()
    assert checkpoint.generator_hparams == {
        "resolution": 64, "image_channels": 3, "channels": (32, 32, 32, 24, 16), "z_dim": 64,
        "w_dim": 64, "label_dim": 0, "embed_dim": 0, "mapping_layers": 8, "mapping_width": 64,
        "mapping_lr": 0.01, "fir": (1, 3, 3, 1), "clamp": None,
    }  # fmt: skip
    assert checkpoint.discriminator_hparams["stddev_channels"] == 1
    _assert_shapes(checkpoint)
    io = np.load(GOLDEN / "sg2_rosinality" / "io.npz")
    np.testing.assert_array_equal(checkpoint.w_avg, io["latent_avg"])
    generator, discriminator = _networks(checkpoint)
    np.testing.assert_allclose(_map(generator, io["z"]), io["w"], rtol=2e-5, atol=2e-5)
    images = _decode(generator, io["w"])
    np.testing.assert_allclose(images, _last(io["img_registered"]), **TOLERANCE)
    logits = _judge(discriminator, _last(io["d_images"]))
    np.testing.assert_allclose(logits, io["d_logits"], **TOLERANCE)


def test_nvlabs_golden():
    checkpoint = stylegan2.read(NVLABS)
    assert checkpoint.source == "nvlabs"
    assert checkpoint.generator_hparams["channels"] == (32, 32, 32, 20)
    assert checkpoint.generator_hparams["clamp"] == 256.0
    assert checkpoint.discriminator_hparams["clamp"] == 256.0
    _assert_shapes(checkpoint)
    io = np.load(GOLDEN / "sg2_nvlabs" / "io.npz")
    np.testing.assert_array_equal(checkpoint.w_avg, io["w_avg"])
    generator, discriminator = _networks(checkpoint)
    np.testing.assert_allclose(_map(generator, io["z"]), io["ws_psi1"][:, 0], rtol=2e-5, atol=2e-5)
    images = _decode(generator, io["wplus"])
    np.testing.assert_allclose(images, _last(io["img_wplus"]), **TOLERANCE)
    logits = _judge(discriminator, _last(io["d_images"]))
    np.testing.assert_allclose(logits, io["d_logits"], **TOLERANCE)


def test_overrides():
    checkpoint = stylegan2.read(ROSINALITY, hparams={"mapping_lr": 0.1})
    assert checkpoint.generator_hparams["mapping_lr"] == 0.1
    with pytest.raises(UserError, match="Did you mean 'mapping_lr'"):
        stylegan2.read(ROSINALITY, hparams={"maping_lr": 0.1})


def _rosinality_state(key):
    """Arrays of the golden file's part, to be changed."""
    return dict(pickles.read(ROSINALITY)[key])


def _read_state(path, **parts):
    """Write a rosinality file of these state dicts, in torch's older form, and read it."""
    torch = write.Torch()
    body = {
        name: mapping({k: torch.tensor(v) for k, v in part.items()}) for name, part in parts.items()
    }
    path.write_bytes(torch.legacy(mapping(body)))
    return stylegan2.read(path)


@pytest.fixture
def path(tmp_path):
    """Give the path of a file to write."""
    return tmp_path / "model.pt"


def test_a_generator_alone(path):
    checkpoint = _read_state(path, g_ema=_rosinality_state("g_ema"))
    assert checkpoint.discriminator is None
    assert checkpoint.discriminator_hparams is None
    assert checkpoint.w_avg is None
    assert len(checkpoint.noise) == 9
    with pytest.raises(UserError, match="has no 'g', only 'g_ema'"):
        stylegan2.read(path, ema=False)


def test_a_discriminator_alone(path):
    checkpoint = _read_state(path, d=_rosinality_state("d"))
    assert checkpoint.generator is None
    assert checkpoint.noise is None
    assert checkpoint.discriminator_hparams["resolution"] == 64


def test_other_filters_and_fewer_layers(path):
    state = _rosinality_state("g_ema")
    for name in state:
        if name.endswith(".kernel"):
            state[name] = square((1, 2, 1), 4)
    removed = [name for name in state if name.startswith(("style.7", "style.8"))]
    state = {name: x for name, x in state.items() if name not in removed}
    hparams = _read_state(path, g_ema=state).generator_hparams
    assert hparams["fir"] == (1, 2, 1)
    assert hparams["mapping_layers"] == 6


@pytest.mark.parametrize("part", ["g_ema", "d"])
def test_every_missing_tensor_is_named(path, part):
    state = _rosinality_state(part)
    for name in list(state)[:: max(1, len(state) // 25)]:
        rest = {other: x for other, x in state.items() if other != name}
        if name == list(state)[-1] and part == "g_ema":
            continue
        with pytest.raises(UserError, match=f"'{name}'"):
            _read_state(path, **{part: rest})


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("extra.weight", np.ones((2,), np.float32), "no place in a StyleGAN2: 'extra.weight'"),
        ("conv1.conv.weight", np.ones((1, 32, 32, 1, 1), np.float32), "'conv1.conv.weight' has"),
        ("to_rgbs.1.bias", np.ones((1, 4, 1, 1), np.float32), "'to_rgbs.1.bias' has the shape"),
        ("style.1.weight", np.ones((64,), np.float32), "'style.1.weight' has 1 dimensions"),
        ("style.2.bias", np.ones((64,), np.int64), "'style.2.bias' has the type int64"),
        ("convs.0.conv.blur.kernel", np.eye(4, dtype=np.float32), "not the outer product"),
        ("convs.0.conv.blur.kernel", square((1, 3, 3, 1), 1), "sums to 1; needed: 4"),
        ("convs.2.conv.blur.kernel", square((1, 2, 2, 1), 4), "differs from the filters"),
        ("noises.noise_3", np.ones((1, 1, 8, 8), np.float32), "'noises.noise_3' has the shape"),
        ("style.999999.bias", np.ones((1,), np.float32), "up to 999999; the limit"),
    ],
)  # fmt: skip
def test_a_strange_tensor_is_named(path, name, value, match):
    with pytest.raises(UserError, match=match) as raised:
        _read_state(path, g_ema=_rosinality_state("g_ema") | {name: value})
    assert "\n" not in str(raised.value)


def test_other_files_say_what_they_hold(path):
    torch = write.Torch()
    state = {"model.diffusion_model.time_embed.0.weight": np.ones((2, 2), np.float32)}
    tensors = mapping({name: torch.tensor(x) for name, x in state.items()})
    path.write_bytes(torch.zip(mapping({"state_dict": tensors, "epoch": write.plain(3)})))
    with pytest.raises(UserError, match="entries are 'state_dict', 'epoch'.*time_embed"):
        stylegan2.read(path)
    with pytest.raises(
        UserError, match="lacks 'style.0.weight'|lacks 'style.1.weight'.*time_embed"
    ):
        _read_state(path, g_ema=state)
    path.write_bytes(write.file(write.plain([1, 2])))
    with pytest.raises(UserError, match="no StyleGAN2 but a list"):
        stylegan2.read(path)
    path.write_bytes(write.file(mapping({})))
    with pytest.raises(UserError, match="empty dict"):
        stylegan2.read(path)


# NVlabs files of other sizes, written from their layer structure.


def _read_nvlabs(path, **networks):
    path.write_bytes(write.file(mapping(networks), protocol=3))
    return stylegan2.read(path)


def test_nvlabs_with_labels_and_other_sizes(path):
    make, make_d = nvlabs_writer.Maker(0), nvlabs_writer.Maker(1)
    checkpoint = _read_nvlabs(
        path, G_ema=nvlabs_writer.generator(make), D=nvlabs_writer.discriminator(make_d)
    )
    assert checkpoint.generator_hparams == {
        "resolution": 16, "image_channels": 1, "channels": (8, 6, 4), "z_dim": 7, "w_dim": 10,
        "label_dim": 3, "embed_dim": 10, "mapping_layers": 2, "mapping_width": 9,
        "mapping_lr": 0.02, "fir": (1, 3, 3, 1), "clamp": 128.0,
    }  # fmt: skip
    assert checkpoint.discriminator_hparams == {
        "resolution": 16, "image_channels": 1, "channels": (8, 6, 4), "label_dim": 3,
        "cmap_dim": 5, "embed_dim": 5, "mapping_layers": 3, "mapping_width": 6,
        "mapping_lr": 0.02, "stddev_group": 2, "stddev_channels": 2, "fir": (1, 3, 3, 1),
        "clamp": None,
    }  # fmt: skip
    _assert_shapes(checkpoint)
    made, tree = make.made, checkpoint.generator
    up = tree["synthesis"]["b8"]["conv0"]
    weight = made["synthesis.b8.conv0.weight"]
    np.testing.assert_allclose(up["kernel"], weight.transpose(2, 3, 1, 0) * 72**0.5, rtol=1e-6)
    np.testing.assert_array_equal(up["noise_strength"], made["synthesis.b8.conv0.noise_strength"])
    torgb = made["synthesis.b16.torgb.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(tree["synthesis"]["b16"]["torgb"]["kernel"], torgb)
    embed = made["mapping.embed.weight"].T
    np.testing.assert_array_equal(tree["mapping"]["embed"]["kernel"], embed)
    np.testing.assert_array_equal(checkpoint.w_avg, made["w_avg"])
    noise = made["synthesis.b16.conv0.noise_const"]
    np.testing.assert_array_equal(checkpoint.noise[3][0, :, :, 0], noise)


def test_the_first_linear_layer_is_permuted(path):
    make = nvlabs_writer.Maker(1)
    checkpoint = _read_nvlabs(path, D=nvlabs_writer.discriminator(make))
    x = np.random.default_rng(0).standard_normal((2, 8, 4, 4)).astype(np.float32)
    torch_order = x.reshape(2, -1) @ make.made["b4.fc.weight"].T
    ours = _last(x).reshape(2, -1) @ checkpoint.discriminator["b4"]["fc"]["kernel"]
    np.testing.assert_allclose(ours, torch_order, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["resnet", "orig"])
def test_other_generator_architectures_are_refused(path, architecture):
    network = nvlabs_writer.generator(nvlabs_writer.Maker(0), architecture=architecture)
    with pytest.raises(UserError, match=f"architecture '{architecture}'.*only 'skip'"):
        _read_nvlabs(path, G_ema=network)


@pytest.mark.parametrize("architecture", ["skip", "orig"])
def test_other_discriminator_architectures_are_refused(path, architecture):
    network = nvlabs_writer.discriminator(nvlabs_writer.Maker(0), architecture=architecture)
    with pytest.raises(UserError, match=f"architecture '{architecture}'.*only 'resnet'"):
        _read_nvlabs(path, D=network)


def test_stylegan3_is_refused(path):
    inputs = write.nvlabs_module("SynthesisInput", tensors={"freqs": np.ones((4, 2), np.float32)})
    synthesis = write.nvlabs_module("SynthesisNetwork", modules={"input": inputs})
    network = write.nvlabs_module("Generator", modules={"synthesis": synthesis})
    with pytest.raises(UserError, match="lacks 'synthesis.b4.const'.*synthesis.input.freqs"):
        _read_nvlabs(path, G_ema=network)
