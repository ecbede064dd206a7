"""Latent-diffusion files: averages, strictness both ways, what is inferred, folders, damage."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pickle_writer as write
import pytest
import yaml
from test_ldm import DDCONFIG, TINY, UNET

import lfp_jax
from lfp_jax import generators
from lfp_jax.errors import UserError
from lfp_jax.weights import compvis, latent_tables, ldm, safetensors

GOLDEN = Path(__file__).parent / "golden"
VQ = GOLDEN / "diffusers" / "vqmodel"
WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET_PREFIX, FIRST_PREFIX = "model.diffusion_model.", "first_stage_model."


def _shapes(rows):
    return {row.name: row.shape for row in rows}


def _unet_shapes(hparams):
    none = {"tensors": {}, "prefix": UNET_PREFIX, "what": "test", "size": None}
    sizes, order = compvis.unet(hparams, **none)
    layers, names = latent_tables.unet(sizes), compvis.unet_names(sizes, prefix=UNET_PREFIX)
    style = latent_tables.OPENAI[order]
    return _shapes(latent_tables.rows(layers, names=names, style=style, tensors={}, root=""))


def _first_shapes(hparams, networks):
    none = {"tensors": {}, "prefix": FIRST_PREFIX, "what": "test", "size": None}
    sizes, shapes = compvis.first_stage(hparams, **none), {}
    for network in networks:
        layers = getattr(latent_tables, network)(sizes)
        names = {
            layer.place: compvis.first_stage_name(layer.place, network=network, prefix=FIRST_PREFIX)
            for layer in layers
        }
        style = latent_tables.FIRST_STAGE
        shapes |= _shapes(latent_tables.rows(layers, names=names, style=style, tensors={}, root=""))
    return shapes | {f"{FIRST_PREFIX}quantize.embedding.weight": (16, 3)}


def _state(*, unet=UNET, networks=("encoder", "decoder"), seed=0):
    """Random tensors under the original's names."""
    random = np.random.default_rng(seed)
    shapes = _unet_shapes(unet) if unet else {}
    shapes |= _first_shapes(TINY["first_stage"], networks) if networks else {}
    return {name: random.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def _write(path, state):
    """Write a Lightning checkpoint, with a callback that would run code."""
    torch = write.Torch()
    tensors = write.mapping({name: torch.tensor(x) for name, x in state.items()})
    hostile = write.call(write.named("os", "system"), write.plain("touch /tmp/lfp_was_run"))
    path.write_bytes(torch.zip(write.mapping({"callbacks": hostile, "state_dict": tensors})))
    return path


@pytest.fixture
def path(tmp_path):
    """Give the path of a checkpoint to write."""
    return tmp_path / "model.ckpt"


def _averages(state, add):
    names = {name: name.removeprefix("model.").replace(".", "") for name in state}
    return {f"model_ema.{names[name]}": x + add for name, x in state.items()}


def test_averages_are_the_default(path):
    state = _state(networks=())
    extra = {"model_ema.decay": np.float32(0.99), "model_ema.num_updates": np.int32(3)}
    _write(path, state | _averages(state, 1) | extra)
    averaged, raw = (lfp_jax.load_generator(path, hparams=UNET, ema=ema) for ema in (True, False))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b + 1, rtol=1e-5, atol=1e-5),
        averaged.unet, raw.unet,
    )  # fmt: skip
    assert not os.path.exists("/tmp/lfp_was_run")


def test_averages_are_strict(path):
    state = _state(networks=())
    averages = _averages(state, 1)
    name = "model_ema.diffusion_modelout2bias"
    _write(path, state | {other: x for other, x in averages.items() if other != name})
    with pytest.raises(UserError, match=f"lacks the averages: '{name}'.*ema=False"):
        ldm.read(path, hparams=UNET)
    _write(path, state | averages | {"model_ema.extra": np.ones(1, np.float32)})
    with pytest.raises(UserError, match="averages of no tensor: 'model_ema.extra'"):
        ldm.read(path, hparams=UNET)


def test_every_missing_tensor_is_named(path):
    state = _state()
    for name in list(state)[::17]:
        _write(path, {other: x for other, x in state.items() if other != name})
        with pytest.raises(UserError, match=f"'{name}'"):
            ldm.read(path, hparams=TINY)


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("strange.weight", (2,), "no place in a latent diffusion model: 'strange.weight'"),
        (f"{UNET_PREFIX}more.weight", (2,), "no place in a UNet: 'model.diffusion_model.more"),
        (f"{FIRST_PREFIX}decoder.more", (2,), "no place in a first stage: 'first_stage_model.dec"),
        (f"{UNET_PREFIX}out.2.bias", (4,), r"'model.diffusion_model.out.2.bias' has the shape \[4"),
        (f"{FIRST_PREFIX}quantize.embedding.weight", (9, 3), r"shape \[9, 3\]; needed: \[16, 3\]"),
        ("alphas_cumprod", (10,), r"'alphas_cumprod' has the shape \[10\]; needed: \[1000\]"),
    ],
)
def test_a_strange_tensor_is_named(path, name, shape, match):
    _write(path, _state() | {name: np.ones(shape, np.float32)})
    with pytest.raises(UserError, match=match) as raised:
        ldm.read(path, hparams=TINY)
    assert "\n" not in str(raised.value)


def test_other_parts_are_left_alone(path):
    others = ("cond_stage_model.transformer.weight", "betas", "first_stage_model.loss.logvar")
    _write(path, _state() | {name: np.ones(3, np.float32) for name in others})
    assert ldm.read(path, hparams=TINY).unet is not None


def test_stored_schedule_and_scale(path):
    alphas = np.linspace(0.9, 0.1, 1000, dtype=np.float32)
    extra = {"alphas_cumprod": alphas, "scale_factor": np.float32(0.25)}
    _write(path, _state() | extra)
    generator = lfp_jax.load_generator(path, hparams=TINY | {"scale_by_std": True})
    np.testing.assert_array_equal(generator.alphas_cumprod, alphas)
    assert float(generator.scale_factor) == 0.25
    _write(path, _state())
    with pytest.raises(UserError, match="lacks 'scale_factor', which scale_by_std"):
        ldm.read(path, hparams=TINY | {"scale_by_std": True})


def _yaml(path):
    unet = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": UNET}
    first = {"target": "ldm.models.autoencoder.VQModelInterface", "params": TINY["first_stage"]}
    params = {"linear_start": 0.001, "monitor": "val/loss", "scale_factor": 0.5}
    params |= {"unet_config": unet, "first_stage_config": first}
    path.write_text(yaml.safe_dump({"model": {"params": params}, "data": {"x": 1}}))


@pytest.mark.parametrize("name", ["model.yaml", "config.yaml", "any.yaml"])
def test_hyperparameters_beside_the_file(path, name):
    _write(path, _state())
    _yaml(path.parent / name)
    found = lfp_jax.load_generator(path)
    given = lfp_jax.load_generator(path, hparams=TINY | {"linear_start": 0.001})
    assert found.arch == given.arch
    jax.tree.map(np.testing.assert_array_equal, found, given)


def test_sizes_are_read_off_the_tensors(path):
    _write(path, _state())
    told = lfp_jax.load_generator(path, hparams=TINY)
    few = {"unet": {"num_heads": 2, "image_size": 4}, "scale_factor": 0.5}
    assert lfp_jax.load_generator(path, hparams=few).arch == told.arch
    with pytest.raises(UserError, match="does not tell 'num_heads' or 'num_head_channels'"):
        lfp_jax.load_generator(path, hparams={"unet": {"image_size": 4}})
    with pytest.raises(UserError, match="does not tell 'image_size'.*YAML"):
        lfp_jax.load_generator(path, hparams={"unet": {"num_heads": 2}})
    _write(path, _state(unet=None))
    with pytest.raises(UserError, match="does not tell 'resolution'.*YAML"):
        lfp_jax.load_generator(path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"unet": {**UNET, "num_head_chanels": 3}}, "Did you mean 'num_head_channels'"),
        ({"unet": {**UNET, "num_heads": "two"}}, "'num_heads' must be a whole number"),
        ({"unet": {**UNET, "num_heads": 5}}, "32 channels do not divide into 5 heads"),
        ({"unet": {**UNET, "model_channels": 40}}, "40 channels do not divide into 32 groups"),
        ({"unet": {**UNET, "dims": 3}}, "dims=3 is not supported"),
        ({"unet": 3}, "'unet' must be a dict"),
        ({"scale_facter": 2.0}, "Did you mean 'scale_factor'"),
        ({"scale_factor": "big"}, "'scale_factor' must be a number"),
        ({"beta_schedule": "quick"}, "Unknown beta_schedule 'quick'"),
        ({"first_stage": {"ddconfig": {**DDCONFIG, "attn_type": "liner"}}}, "mean 'linear'"),
        ({"first_stage": {"ddconfig": {**DDCONFIG, "double_z": True}}}, "double_z must be False"),
        ({"first_stage": {"ddconfig": {**DDCONFIG, "num_res_blocks": 2}}}, "block.2.norm1.weight'"),
    ],
)
def test_impossible_hyperparameters(path, changes, match):
    _write(path, _state())
    with pytest.raises(UserError, match=match) as raised:
        ldm.read(path, hparams=TINY | changes)
    assert "\n" not in str(raised.value)


def test_a_decoder_alone(path):
    _write(path, _state(unet=None, networks=("decoder",)))
    generator = lfp_jax.load_generator(path, hparams=TINY | {"unet": {}})
    assert generator.decode(np.zeros((1, 4, 4, 3), np.float32)).shape == (1, 8, 8, 3)
    with pytest.raises(UserError, match="no encoder"):
        generator.encode(np.zeros((1, 8, 8, 3), np.float32))
    with pytest.raises(UserError, match="no UNet.*not sample"):
        generator.sample(jax.random.key(0), 1)


def test_both_attention_orders_mean_the_same(path):
    state = _state(networks=())
    legacy = lfp_jax.load_generator(_write(path, state), hparams=UNET)
    for name, x in state.items():
        if ".qkv." in name:  # heads, then q / k / v -> q / k / v, then heads
            state[name] = x.reshape(2, 3, 16, -1).swapaxes(0, 1).reshape(x.shape)
    hparams = UNET | {"use_new_attention_order": True}
    new = lfp_jax.load_generator(_write(path, state), hparams=hparams)
    jax.tree.map(np.testing.assert_array_equal, legacy.unet, new.unet)


def test_convert_a_checkpoint(path, tmp_path):
    _write(path, _state())
    _yaml(path.with_suffix(".yaml"))
    generators.convert(path, tmp_path / "store")
    before, after = lfp_jax.load_generator(path), lfp_jax.load_generator(tmp_path / "store")
    assert before.arch == after.arch
    jax.tree.map(np.testing.assert_array_equal, before, after)


def _safetensors(tensors, *, header=None, tail=b""):
    """Bytes of a safetensors file of float32 arrays; `header` changes its entries."""
    entries, start = {"__metadata__": {"format": "pt"}}, 0
    for name, x in tensors.items():
        entries[name] = {
            "dtype": "F32",
            "shape": x.shape,
            "data_offsets": [start, start + x.nbytes],
        }
        start += x.nbytes
    text = json.dumps(entries | (header or {})).encode()
    return (
        len(text).to_bytes(8, "little")
        + text
        + b"".join(x.tobytes() for x in tensors.values())
        + tail
    )


def _folder(path, tensors, **changes):
    config = json.loads((VQ / "config.json").read_text()) | changes
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / WEIGHTS).write_bytes(_safetensors(tensors))
    return path


def test_older_attention_names(tmp_path):
    tensors = safetensors.read(VQ / WEIGHTS)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, x in tensors.items():
        for theirs, older in names.items():
            name = name.replace(f".{theirs}.", f".{older}.")
        old[name] = x
    assert set(old) != set(tensors)
    today, older = (lfp_jax.load_generator(p) for p in (VQ, _folder(tmp_path / "old", old)))
    jax.tree.map(np.testing.assert_array_equal, today.decoder, older.decoder)


def test_a_pipeline_brings_scale_and_scheduler(tmp_path):
    shutil.copytree(VQ, tmp_path / "vqvae")
    condition = GOLDEN / "diffusers" / "unet2dcondition"
    shutil.copytree(condition, tmp_path / "unet")
    (tmp_path / "scheduler").mkdir()
    scheduler = {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2",
                 "prediction_type": "v_prediction", "num_train_timesteps": 50}  # fmt: skip
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (tmp_path / "model_index.json").write_text("{}")
    generator = lfp_jax.load_generator(tmp_path)
    assert float(generator.scale_factor) == pytest.approx(0.18215)
    assert generator.alphas_cumprod.shape == (50,)
    assert generator.arch.diffusion.prediction == "velocity"
    assert generator.latent_shape == (8, 8, 3)  # the UNet says the size
    given = lfp_jax.load_generator(tmp_path, hparams={"scale_factor": 2.0})
    assert float(given.scale_factor) == 2.0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"norm_type": "spatial"}, "'norm_type' is 'spatial'; supported: 'group'"),
        ({"down_block_types": ["DownEncoderBlock", "DownEncoderBlock2D"]}, "DownEncoderBlock2D'?"),
        ({"block_out_channels": [16]}, "'block_out_channels' is"),
        ({"norm_num_groups": 7}, "16 channels do not divide into 7 groups"),
        ({"_class_name": "VQDiffusion"}, "no model that is known here.*VQDiffusion"),
        ({"layers_per_block": 2}, "lacks tensors that a first stage needs"),
    ],
)
def test_configs_that_are_not_supported(tmp_path, changes, match):
    folder = _folder(tmp_path / "m", safetensors.read(VQ / WEIGHTS), **changes)
    with pytest.raises(UserError, match=match) as raised:
        lfp_jax.load_generator(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["decoder.conv_in.bias", "quantize.embedding.weight"])
def test_folders_are_strict(tmp_path, name):
    tensors = safetensors.read(VQ / WEIGHTS)
    rest = {other: x for other, x in tensors.items() if other != name}
    with pytest.raises(UserError, match=f"lacks tensors.*'{name}'"):
        lfp_jax.load_generator(_folder(tmp_path / "less", rest))
    more = dict(tensors) | {"extra": np.ones(2, np.float32)}
    with pytest.raises(UserError, match="no place in a first stage: 'extra'"):
        lfp_jax.load_generator(_folder(tmp_path / "more", more))


ONE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}


def test_safetensors_round_trip(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(_safetensors(ONE | {"b": np.float32([7])}))
    assert safetensors.is_safetensors(path)
    found = safetensors.read(path)
    np.testing.assert_array_equal(found["a"], ONE["a"])
    np.testing.assert_array_equal(found["b"], [7])
    with pytest.raises(ValueError, match="read-only"):
        found["a"][0] = 0


def _entry(**changes):
    return {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "too short"),
        (_safetensors(ONE)[:-1], "cut short"),
        (_safetensors(ONE, tail=b"x"), "25 bytes of tensors; its header tells of 24"),
        ((2**60).to_bytes(8, "little") + b"{}", "header claims"),
        ((2).to_bytes(8, "little") + b"{]", "no JSON"),
        ((2).to_bytes(8, "little") + b"[]", "no JSON object"),
        (_safetensors(ONE, header=_entry(dtype="Q8")), "type 'Q8'"),
        (_safetensors(ONE, header=_entry(dtype=[1])), "not known here"),
        (_safetensors(ONE, header=_entry(shape=[3, 3])), "another number of bytes"),
        (_safetensors(ONE, header=_entry(shape=[-2, -3])), "no possible shape"),
        (_safetensors(ONE, header=_entry(data_offsets=[8, 32])), "cut short"),
        (_safetensors(ONE, header=_entry(shape=[2, 2], data_offsets=[8, 24])), "does not follow"),
        (_safetensors(ONE, header={"b": _entry()["a"]}), "does not follow"),
        (_safetensors(ONE, header={"b": 3}), "'b' has the type"),
    ],
)
def test_hostile_safetensors(tmp_path, content, match):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=match) as raised:
        safetensors.read(path)
    assert "\n" not in str(raised.value)


def test_other_folders_and_files(tmp_path):
    with pytest.raises(UserError, match="no model that is known here"):
        lfp_jax.load_generator(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json': it is damaged"):
        lfp_jax.load_generator(tmp_path)
    (tmp_path / "config.json").write_text((VQ / "config.json").read_text())
    with pytest.raises(UserError, match="has no diffusion_pytorch_model.safetensors"):
        lfp_jax.load_generator(tmp_path)
    with pytest.raises(UserError, match="only the hyperparameter scale_factor; got"):
        lfp_jax.load_generator(tmp_path, hparams={"resolution": 3})
    _write(tmp_path / "model.ckpt", _state(networks=()))
    data = (tmp_path / "model.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="damaged or cut short"):
        lfp_jax.load_generator(tmp_path / "cut.ckpt", hparams=UNET)
    (tmp_path / "model.yaml").write_text("model: !!python/object/apply:os.system ['true']")
    with pytest.raises(UserError, match="model.yaml': it is damaged"):
        lfp_jax.load_generator(tmp_path / "model.ckpt")
