"""The trainer of the latent-diffusion demo: both stages, exact resume, any number of devices."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import log_lines, write_plain_pictures

import lfp_jax
from configs.train_ldm_demo import get_config
from lfp_jax import images, main
from lfp_jax.errors import UserError
from lfp_jax.generators import diffusion as schedules
from lfp_jax.generators.first_stage import quantize
from lfp_jax.metrics import features
from lfp_jax.training import diffusion as diffusion_step
from lfp_jax.training import first_stage as first_step
from lfp_jax.training import ldm
from lfp_jax.training.steps import learning_rates
from lfp_jax.weights import store

pytestmark = pytest.mark.usefixtures("quick_compilation")
SIZE = 8
RATE = 3e-3
EVERY = {"log_every": 1, "save_every": 2, "grid_every": 2}
COLOUR = (224, 64, 32)


def _render(folder, *, size, count=40):
    """Write a folder of pictures in two halves, of light and dark colours."""
    rng = np.random.default_rng(0)
    pictures = []
    for i in range(count):
        u8 = np.asarray(COLOUR) + rng.integers(-30, 31, 3) + np.zeros((size, size, 1), int)
        u8[: size // 2] //= 1 + i % 3
        pictures.append(u8)
    return write_plain_pictures(folder, np.uint8(pictures))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return _render(tmp_path_factory.mktemp("faces"), size=SIZE)


def _settings(data, workdir, *, first_stage=None, diffusion=None, **changes):
    """Give keywords of `ldm.train`: those of the config `:tiny`, with changes."""
    settings = get_config("tiny").to_dict() | {"data": data, "workdir": workdir} | changes
    # One rate in all runs: the steps are compiled once.
    settings["first_stage"] |= {"learning_rate": RATE, **(first_stage or {})}
    settings["diffusion"] |= {"learning_rate": RATE, **(diffusion or {})}
    del settings["task"]
    return settings


def _hypers(*, first_stage=None, diffusion=None):
    settings = _settings("", "", first_stage=first_stage, diffusion=diffusion)
    first, _ = ldm.plan_first_stage(SIZE, EVERY, 0, **settings["first_stage"])
    return first, ldm.plan_diffusion(first.arch, EVERY, 0, sample_steps=2, **settings["diffusion"])[
        0
    ]


def _folders(workdir):
    [diffusion] = workdir.glob("diffusion-*")
    return workdir / "first_stage", diffusion


def _states(workdir, step):
    """Read every leaf of both stages' checkpoints, by name."""
    first, hyper = _hypers()
    found = {}
    for folder, like in zip(
        _folders(workdir),
        (
            first_step.init_state(jax.random.key(9), first),
            diffusion_step.init_state(jax.random.key(9), hyper),
        ),
        strict=True,
    ):
        manager = store.checkpoints(folder / "checkpoints")
        state = store.restore_step(manager, step, like=like)
        manager.close()
        for path, leaf in jax.tree.leaves_with_path(state):
            found[type(like).__module__ + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Run 4 steps of each stage on the four fake devices without a break."""
    workdir = tmp_path_factory.mktemp("whole")
    ldm.train(**_settings(data, workdir))
    return workdir


def _assert_equal_runs(mine, whole):
    for ours, theirs in zip(_folders(mine), _folders(whole), strict=True):
        assert log_lines(ours) == log_lines(theirs) and len(log_lines(ours)) == 4
    resumed, uninterrupted = _states(mine, 4), _states(whole, 4)
    assert resumed.keys() == uninterrupted.keys() and len(resumed) > 100
    for name, leaf in uninterrupted.items():
        np.testing.assert_array_equal(resumed[name], leaf, err_msg=name)


def test_a_run_killed_in_either_stage_equals_the_whole_one(whole, data, tmp_path, killed_after):
    with killed_after(3):  # the first stage, which has a checkpoint of step 2
        ldm.train(**_settings(data, tmp_path))
    assert not (tmp_path / "ldm-demo").exists()
    ldm.train(**_settings(data, tmp_path, diffusion={"total_images": 0}))
    assert lfp_jax.load_generator(str(tmp_path / "ldm-demo")).unet is None
    with killed_after(3):
        ldm.train(**_settings(data, tmp_path))
    assert len(log_lines(_folders(tmp_path)[1])) == 3
    ldm.train(**_settings(data, tmp_path))
    _assert_equal_runs(tmp_path, whole)
    assert lfp_jax.load_generator(str(tmp_path / "ldm-demo")).unet is not None


def test_one_device_equals_four(whole, data, tmp_path):
    ldm.train(**_settings(data, tmp_path, devices=jax.devices()[:1]))
    for mine, four in zip(_folders(tmp_path), _folders(whole), strict=True):
        for ours, theirs in zip(log_lines(mine), log_lines(four), strict=True):
            assert ours.keys() == theirs.keys() > {"step", "images"}
            for name, value in ours.items():
                np.testing.assert_allclose(value, theirs[name], rtol=1e-5, atol=2e-6, err_msg=name)


def test_both_losses_fall(data, tmp_path):
    longer = {"total_images": 8 * 200}
    settings = _settings(
        data, tmp_path, first_stage=longer, diffusion=longer, log_every=20, save_every=200,
        grid_every=0,
    )  # fmt: skip
    generator = ldm.train(**settings)
    first, second = map(log_lines, _folders(tmp_path))
    assert first[-1]["l1"] < 0.4 * first[0]["l1"]
    assert second[-1]["loss"] < 0.7 * second[0]["loss"] and second[0]["loss"] < 1.5
    # What it makes has the colours of the pictures, in their places.
    made = np.asarray(ldm._sample(jax.random.key(3), generator, 0, steps=10))
    wanted = images.from_uint8(np.asarray(COLOUR, np.uint8))
    np.testing.assert_allclose(made[:, SIZE // 2 :].mean(axis=(0, 1, 2)), wanted, atol=0.3)


def test_the_store_holds_the_averages_and_the_scale_of_the_latents(whole):
    tree, metadata = store.load(str(whole / "ldm-demo"))
    assert metadata["training"] == {"first_stage": {"images": 32}, "diffusion": {"images": 32}}
    assert metadata["source_format"] == "lfp_jax" and "CC BY 4.0" in metadata["licence"]
    states = _states(whole, 4)
    kept = tree["encoder"]["stem"]["kernel"]
    assert kept.dtype == np.float16 and len(metadata["sha256"]) == 64
    average = states["lfp_jax.training.first_stage.average['encoder']['stem']['kernel']"]
    np.testing.assert_array_equal(kept, average.astype(np.float16))
    kept = tree["unet"]["stem"]["kernel"]
    average = states["lfp_jax.training.diffusion.average['stem']['kernel']"]
    np.testing.assert_array_equal(kept, average.astype(np.float16))

    latents, _ = store.load(str(whole / "latents"))
    assert latents["latents"].shape == (36, SIZE // 2, SIZE // 2, 3)
    values = latents["latents"].astype(np.float64)
    np.testing.assert_allclose([values.mean(), values.std()], [0, 1], atol=1e-3)


def test_the_stored_generator_encodes_decodes_and_samples(whole, data):
    generator = lfp_jax.load_generator(str(whole / "ldm-demo"))
    assert generator.latent_shape == (4, 4, 3) and generator.image_shape == (SIZE, SIZE, 3)
    pixels, _ = ldm.output.faces.load_split(data, "train")
    z = ldm._encode(generator, images.from_uint8(pixels))
    stored = store.load(str(whole / "latents"))[0]["latents"]
    np.testing.assert_allclose(z, stored, rtol=2e-3, atol=2e-3)  # float16
    drawn = generator.sample(jax.random.key(0), 3, steps=2)
    assert drawn.shape == (3, 4, 4, 3)
    decode = jax.jit(
        lambda generator, z, quantize: generator.decode(z, quantize=quantize), static_argnums=2
    )
    made, raw = decode(generator, drawn, True), decode(generator, drawn, False)
    assert np.isfinite(made).all() and np.abs(made - raw).max() > 0
    # Quantised decoding does not tell a latent from the codes nearest to it.
    nearest, _ = quantize(drawn / generator.scale_factor + generator.shift, generator.codebook)
    codes = (nearest - generator.shift) * generator.scale_factor
    np.testing.assert_allclose(decode(generator, codes, False), made, atol=1e-3)


def test_a_run_is_finished_without_steps_or_pictures(whole, tmp_path, pytestconfig, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "ldm-demo")
    logged = [(folder / "log.jsonl").read_bytes() for folder in _folders(workdir)]
    for folder in _folders(workdir):
        (folder / "curve.png").unlink()
    config = pytestconfig.rootpath / "configs" / "train_ldm_demo.py"
    flags = [f"--config.{part}.total_images=8" for part in ("first_stage", "diffusion")]
    flags += [f"--config.{part}.learning_rate={RATE}" for part in ("first_stage", "diffusion")]
    flags += ["--config.data=nowhere", "--workdir", str(workdir)]
    assert main.main(["lfp_jax", f"--config={config}:tiny", *flags]) == 0, capsys.readouterr().err
    assert logged == [(folder / "log.jsonl").read_bytes() for folder in _folders(workdir)]
    assert store.load(str(workdir / "ldm-demo"))[1] == store.load(str(whole / "ldm-demo"))[1]
    for folder in _folders(workdir):
        assert images.read(folder / "curve.png").std() > 5
        assert images.read(folder / "samples-00000032.png").std() > 5


def test_a_first_stage_trained_further_gets_a_unet_of_its_own(whole, data, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    ldm.train(**_settings(data, workdir, first_stage={"total_images": 40}))
    folders = sorted(workdir.glob("diffusion-*"))
    assert len(folders) == 2
    assert all(len(log_lines(folder)) == 4 for folder in folders)


def test_distances_are_measured_on_the_way_and_at_the_end(tmp_path, monkeypatch):
    def idle(key, state, frozen, batch, step, *, hyper):
        return state, {"loss": jnp.float32(1.0)}

    monkeypatch.setattr(first_step, "train_step", idle)
    monkeypatch.setattr(diffusion_step, "train_step", idle)
    monkeypatch.setattr(ldm, "_CHUNK", 8)
    (tmp_path / "faces").mkdir()
    data = _render(tmp_path / "faces", size=64)
    measured = {"fd_every": 2, "total_images": 24}
    ldm.train(**_settings(
        data, tmp_path, first_stage=measured | {"perceptual": 0.1}, diffusion=measured,
        resolution=64, fd_images=8, grid_every=0,
    ))  # fmt: skip
    facts = store.load(str(tmp_path / "ldm-demo"))[1]["training"]
    assert facts["first_stage"]["fd"]["images"] == 4  # all held-out pictures that there are
    assert facts["diffusion"]["fd"]["images"] == 8
    for stage, folder in zip(facts.values(), _folders(tmp_path), strict=True):
        [found] = [line["fd"] for line in log_lines(folder) if "fd" in line]
        np.testing.assert_allclose(found, stage["fd"]["value"], rtol=1e-3)


@pytest.mark.parametrize(
    ("stage", "changes", "says"),
    [
        ("first_stage", {"channels": (8, 6)}, r"multiples of groups=4; got \[8, 6\]"),
        ("first_stage", {"channels": (8,) * 5}, "halves 8 4 times"),
        ("first_stage", {"perceptual": 0.1}, "64x64.*got 8x8. Set perceptual=0"),
        ("first_stage", {"fd_every": 2}, "64x64x3.*got 8x8x3"),
        ("first_stage", {"patch": 3}, "patch must divide the resolution 8; got 3"),
        ("first_stage", {"patch": 4, "channels": (8, 8, 8)}, "halves 2 2 times"),
        ("diffusion", {"decay_images": 16}, "more than the 2 steps of warmup; got 16, 2 steps"),
        ("first_stage", {"total_images": 0}, "total_images of the first stage must be >= 1; got 0"),
        ("first_stage", {"batch": 6, "total_images": 6}, "divide evenly.*got 6 over 4"),
        ("diffusion", {"head_dim": 3}, r"head_dim must divide the channels \[8\].*got 3"),
        ("diffusion", {"prediction": "velocty"}, "Did you mean 'velocity'"),
        ("diffusion", {"batch": 0}, "batch of the UNet must be >= 1; got 0"),
    ],
)
def test_settings_that_do_not_fit_are_named(stage, changes, says, data, tmp_path):
    with pytest.raises(UserError, match=says):
        ldm.train(**_settings(data, tmp_path, **{stage: changes}))


def test_pictures_of_another_size_are_refused(data, tmp_path):
    with pytest.raises(UserError, match="are 8x8; resolution=16"):
        ldm.train(**_settings(data, tmp_path, resolution=16))


def test_programs_of_grids_and_distances_serve_every_step():
    first_hyper, hyper = _hypers()
    keys = jax.random.split(jax.random.key(0))
    firsts = [
        ldm._freeze_first_stage(first_step.init_state(key, first_hyper), first_hyper.arch)
        for key in keys
    ]
    whole = [
        ldm._freeze_unet(diffusion_step.init_state(key, hyper), firsts[0].replace(arch=hyper.arch))
        for key in keys
    ]
    for one, other in (firsts, whole):
        assert jax.tree.structure(one) == jax.tree.structure(other)


def test_the_first_batch_sets_all_codes_and_codes_move_to_what_they_stand_for():
    first, _ = _hypers()
    state = first_step.init_state(jax.random.key(0), first)
    z = jax.random.normal(jax.random.key(1), (8, 4, 4, 3))
    _, indices = quantize(z, state.codebook)
    used = np.unique(indices)
    (codebook, uses, sums), alive = first_step.update_codebook(
        jax.random.key(2), state, z, indices, decay=0.0
    )
    rows = np.asarray(z).reshape(-1, 3)
    np.testing.assert_allclose(alive, len(used) / 16)
    for code in range(16):
        mine = rows[np.asarray(indices).ravel() == code]
        if len(mine):
            np.testing.assert_allclose(codebook[code], mine.mean(axis=0), rtol=1e-4, atol=1e-5)
            assert uses[code] == len(mine)
        else:  # revived as one of the batch's latents
            assert (np.abs(rows - codebook[code]).max(axis=1) < 1e-6).any()
            assert uses[code] == 1.0
    # A code that nothing is near to any more starts anew once its average is used up.
    state = state.replace(codebook=codebook, uses=jnp.ones(16), sums=sums)
    (moved, _, _), alive = first_step.update_codebook(
        jax.random.key(3), state, z + 50.0, jnp.zeros_like(indices), decay=0.01
    )
    assert float(alive) == 1 / 16 and float(moved[1:].min()) > 40.0


def test_the_straight_through_gradient_reaches_the_encoder():
    first, _ = _hypers(first_stage={"commitment": 0.0})
    state = first_step.init_state(jax.random.key(0), first)
    shown = jax.random.normal(jax.random.key(1), (2, SIZE, SIZE, 3))
    grads, _ = jax.jit(jax.grad(first_step.losses_of, has_aux=True), static_argnums=(3,))(
        state.params, state.codebook, shown, first, None
    )
    assert np.abs(grads["encoder"]["stem"]["kernel"]).max() > 1e-6


def test_the_perceptual_term_is_the_squared_difference_of_features():
    settings = get_config().to_dict()["first_stage"] | {"channels": (8, 8), "codes": 16}
    first, _ = ldm.plan_first_stage(64, EVERY, 0, **settings | {"fd_every": 0})
    state = first_step.init_state(jax.random.key(0), first)
    classifier = features.load_classifier()
    shown = jax.random.uniform(jax.random.key(1), (2, 64, 64, 3), minval=-1.0)
    loss, (z, _, aux) = first_step.losses_of(state.params, state.codebook, shown, first, classifier)
    decoder = first_step.Decoder(first.arch.first_stage)
    made = decoder.apply({"params": state.params["decoder"]}, quantize(z, state.codebook)[0])
    difference = features.features(classifier, made) - features.features(classifier, shown)
    np.testing.assert_allclose(aux["perceptual"], np.square(difference).mean(), rtol=1e-4)
    parts = aux["l1"] + 0.25 * aux["commitment"] + first.perceptual * aux["perceptual"]
    np.testing.assert_allclose(loss, parts, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["noise", "velocity", "image"])
def test_the_sampler_undoes_what_the_target_says(prediction):
    z, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 3))
    alpha = jnp.asarray([0.9, 0.5, 0.1])[:, None, None, None]
    x = jnp.sqrt(alpha) * z + jnp.sqrt(1 - alpha) * noise
    target = diffusion_step.target_of(z, noise, alpha, prediction=prediction)
    found = schedules.noise_and_image(target, x, alpha, prediction)
    np.testing.assert_allclose(found[0], noise, atol=1e-4)
    np.testing.assert_allclose(found[1], z, atol=1e-4)


def test_rates_rise_then_fall_along_a_cosine():
    rates = learning_rates(2.0, warmup=4, decay=12)
    found = [float(rates(step)) for step in (0, 2, 4, 8, 12, 20)]
    np.testing.assert_allclose(found, [0.0, 1.0, 2.0, 1.0, 0.0, 0.0], atol=1e-6)
    assert float(learning_rates(2.0, warmup=4, decay=0)(1_000)) == 2.0


def test_the_config_fits_the_size_that_ships():
    settings = get_config().to_dict()
    first, _ = ldm.plan_first_stage(64, EVERY, 5_000, **settings["first_stage"])
    hyper, _ = ldm.plan_diffusion(
        first.arch, EVERY, 5_000, sample_steps=50, **settings["diffusion"]
    )
    shapes = jax.eval_shape(lambda: ldm.first_step.assemble._shapes(hyper.arch))
    assert hyper.arch.size**2 * hyper.arch.latent_channels == 768
    assert 2 * sum(leaf.size for leaf in jax.tree.leaves(shapes)) < 8e6  # bytes in float16
