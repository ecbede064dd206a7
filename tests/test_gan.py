"""The GAN trainer: exact resume, any number of devices, each term of the losses, what it leaves."""

import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_runs import log_lines, write_plain_pictures

from configs.train_stylegan2_demo import get_config
from lfp_jax import generators, images, main
from lfp_jax.errors import UserError
from lfp_jax.generators import layers, stylegan2
from lfp_jax.metrics import distances, features
from lfp_jax.training import gan, gan_step
from lfp_jax.weights import store

pytestmark = pytest.mark.usefixtures("quick_compilation")
SIZE = 8
NETWORK = {"resolution": SIZE, "channels": (8, 8), "w_dim": 16, "mapping_layers": 1}
NETWORK["growth"] = ((SIZE // 2, 16),)  # the first two steps of a run
COLOUR = (224, 64, 32)


def _hyper(**changes):
    arch = stylegan2.Architecture(
        resolution=SIZE, channels=(8, 8), z_dim=16, w_dim=16, mapping_layers=1, mapping_width=16
    )
    values = {
        "arch": arch,
        "d_arch": stylegan2.DiscriminatorArchitecture(resolution=SIZE, channels=(8, 8)),
        "batch": 8, "learning_rate": 0.002, "r1_gamma": 0.5, "r1_every": 2, "path_weight": 1.0,
        "path_every": 2, "mixing": 0.9, "flip": True, "ema_images": 10_000,
    }  # fmt: skip
    return gan_step.Hyperparameters(**values | changes)


def _render(folder, *, size, count=40):
    """Write a folder of pictures of nearly one colour."""
    rng = np.random.default_rng(0)
    pictures = [
        np.asarray(COLOUR) + rng.integers(-15, 16, 3) + np.zeros((size, size, 1), int)
        for _ in range(count)
    ]
    return write_plain_pictures(folder, np.uint8(pictures))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return _render(tmp_path_factory.mktemp("faces"), size=SIZE)


def _settings(data, workdir, **changes):
    """Give keywords of `gan.train`: the config `:tiny`, smaller, regularised every 2nd step."""
    settings = get_config("tiny").to_dict() | NETWORK
    settings |= {"discriminator_channels": None, "data": data, "workdir": workdir, "flip": True}
    settings |= {"r1_every": 2, "path_every": 2, "path_weight": 1.0}
    del settings["task"]
    return settings | changes


def _state(workdir, step):
    """Read every leaf of a checkpoint, by name."""
    manager = store.checkpoints(workdir / "checkpoints")
    like = gan_step.init_state(jax.random.key(9), _hyper())
    state = store.restore_step(manager, step, like=like)
    manager.close()
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(state)}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Run 8 steps on the four fake devices without a break."""
    workdir = tmp_path_factory.mktemp("whole")
    gan.train(**_settings(data, workdir))
    return workdir


def test_a_killed_and_resumed_run_equals_the_whole_one(whole, data, tmp_path, killed_after):
    with killed_after(6):
        gan.train(**_settings(data, tmp_path))
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "stylegan2-demo").exists()
    gan.train(**_settings(data, tmp_path))
    assert log_lines(tmp_path) == log_lines(whole)
    assert [line["step"] for line in log_lines(tmp_path)] == list(range(1, 9))
    resumed, uninterrupted = _state(tmp_path, 8), _state(whole, 8)
    assert resumed.keys() == uninterrupted.keys() and len(resumed) > 100
    for name, leaf in uninterrupted.items():
        np.testing.assert_array_equal(resumed[name], leaf, err_msg=name)
    earlier = _state(whole, 4)
    assert any(np.any(earlier[name] != leaf) for name, leaf in uninterrupted.items())


def test_a_run_killed_where_a_resolution_ends_goes_on_the_same(whole, data, tmp_path):
    gan.train(**_settings(data, tmp_path, total_images=16))
    assert images.read(tmp_path / "samples-00000016.png").shape < (8 * SIZE, 8 * SIZE, 3)
    gan.train(**_settings(data, tmp_path, total_images=32))
    lines = log_lines(whole)
    assert log_lines(tmp_path) == lines[:4]


def test_the_learning_rate_drops_to_a_quarter(data, tmp_path):
    settings = {"data": data, "growth": ()}
    gan.train(
        **_settings(workdir=tmp_path / "a", total_images=24, learning_rate_drop=16, **settings)
    )
    gan.train(**_settings(workdir=tmp_path / "b", total_images=16, **settings))
    slow = _settings(workdir=tmp_path / "b", total_images=24, learning_rate=0.0005, **settings)
    gan.train(**slow)
    dropped, by_hand = (_state(tmp_path / name, 3) for name in "ab")
    for name, leaf in by_hand.items():
        np.testing.assert_array_equal(dropped[name], leaf, err_msg=name)


def test_growing_keeps_the_images(whole):
    low = gan._at_resolution(_hyper(), SIZE // 2)
    state = gan_step.init_state(jax.random.key(0), low)
    grown = gan_step.grow(jax.random.key(1), state, _hyper())

    @partial(jax.jit, static_argnames="arch")
    def image(params, arch):
        module = stylegan2.Synthesis(arch)
        noise = [jnp.zeros(shape) for shape in stylegan2.noise_shapes(arch)]
        return module.apply({"params": params["synthesis"]}, ws[:, : arch.num_ws], noise)

    ws = jax.random.normal(jax.random.key(2), (2, _hyper().arch.num_ws, 16))
    small, large = image(state.average, low.arch), image(grown.average, _hyper().arch)
    np.testing.assert_allclose(large, layers.upsample(small, low.arch.fir), atol=1e-6)
    # Every layer of the lower resolution is kept, and the discriminator's too.
    for tree, kept in ((state.generator, grown.generator), (state.discriminator["b4"],
                       grown.discriminator["b4"])):  # fmt: skip
        kept = {jax.tree_util.keystr(k): v for k, v in jax.tree.leaves_with_path(kept)}
        for path, leaf in jax.tree.leaves_with_path(tree):
            np.testing.assert_array_equal(kept[jax.tree_util.keystr(path)], leaf)
    assert all(np.all(x == 0) for x in jax.tree.leaves(grown.discriminator_optimizer))


def test_one_device_equals_four(whole, data, tmp_path):
    one = jax.devices()[:1]
    gan.train(**_settings(data, tmp_path, total_images=8, devices=one))
    [mine], four = log_lines(tmp_path), log_lines(whole)[0]
    assert mine.keys() == four.keys() >= {"d_loss", "g_loss", "r1", "path"}
    for name, value in mine.items():  # the log keeps five decimals
        np.testing.assert_allclose(value, four[name], rtol=1e-5, atol=1.1e-5, err_msg=name)


def test_it_learns_the_colour_of_the_pictures(whole, data, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    settings = _settings(data, workdir, total_images=8 * 300, save_every=300, grid_every=300)
    trained = gan.train(**settings)
    untrained = stylegan2.random_generator(jax.random.key(0), _hyper().arch)
    wanted = images.from_uint8(np.asarray(COLOUR, np.uint8))

    made_by = jax.jit(lambda generator, key: generator.decode(generator.sample(key, 32)))

    def error(generator):
        made = made_by(generator, jax.random.key(1))
        return np.abs(np.asarray(made).mean(axis=(0, 1, 2)) - wanted).max()

    assert error(trained) < min(0.5, error(untrained))  # below 0.35 where it was measured
    lines = log_lines(workdir)
    early = np.mean([x["d_real"] - x["d_fake"] for x in lines[10:40]])
    assert early > 0.0  # the discriminator tells real from generated


def test_a_checkpoint_is_finished_without_steps_or_pictures(whole, tmp_path, pytestconfig, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "stylegan2-demo")
    for file in ("curve.png", "samples-00000064.png", "parameters.txt"):
        (workdir / file).unlink()
    before = (workdir / "log.jsonl").read_bytes()
    config = pytestconfig.rootpath / "configs" / "train_stylegan2_demo.py"
    flags = [f"--config.{k}={v}" for k, v in NETWORK.items()]
    flags += ["--config.discriminator_channels=(8, 8)", "--config.data=nowhere"]
    flags += ["--config.total_images=8", "--workdir", str(workdir)]
    assert main.main(["lfp_jax", f"--config={config}:tiny", *flags]) == 0, capsys.readouterr().err
    assert (workdir / "log.jsonl").read_bytes() == before
    assert images.read(workdir / "curve.png").std() > 5
    assert (workdir / "samples-00000064.png").exists()
    assert "generator/synthesis/const" in (workdir / "parameters.txt").read_text()

    tree, metadata = store.load(str(workdir / "stylegan2-demo"))
    assert metadata["training"] == {"images": 64}
    assert metadata["source_format"] == "lfp_jax" and "CC BY 4.0" in metadata["licence"]
    assert len(metadata["sha256"]) == 64
    state = _state(workdir, 8)
    const = state[".average['synthesis']['const']"]
    assert tree["synthesis"]["const"].dtype == np.float16
    np.testing.assert_array_equal(tree["synthesis"]["const"], const.astype(np.float16))
    loaded = generators.load(str(workdir / "stylegan2-demo"))
    np.testing.assert_array_equal(loaded.w_avg, state[".w_avg"])
    assert np.isfinite(loaded.decode(loaded.sample(jax.random.key(0), 4))).all()


def test_the_distance_on_the_way_and_at_the_end(tmp_path, monkeypatch):
    def idle(key, state, u8, step, hyper, *, penalise, path):
        return state, {"d_loss": jnp.float32(1.0), "g_loss": jnp.float32(2.0)}

    monkeypatch.setattr(gan_step, "train_step", idle)
    (tmp_path / "faces").mkdir()
    data = _render(tmp_path / "faces", size=64)
    changes = {"resolution": 64, "channels": (4,) * 5, "total_images": 24, "path_weight": 0.0}
    changes |= {"growth": ()}
    changes |= {"fd_every": 2, "fd_images": 100, "save_every": 4}
    trained = gan.train(**_settings(data, tmp_path, **changes))
    distance = [(line["step"], line["fd"]) for line in log_lines(tmp_path) if "fd" in line]
    assert [step for step, _ in distance] == [2, 3]
    found = store.load(str(tmp_path / "stylegan2-demo"))[1]["training"]["fd"]
    assert found["images"] == 100 and found["low"] <= found["value"] <= found["high"]
    np.testing.assert_allclose(distance[1][1], found["value"], rtol=1e-4)
    np.testing.assert_allclose(distance[0][1], found["value"], rtol=1e-2)  # before float16

    key = jax.random.fold_in(jax.random.key(0), 4)  # what `gan` measures on
    made = jax.jit(lambda generator, key: generator.decode(generator.sample(key, 100)))
    u8 = images.to_uint8(made(trained, key))
    rows = features.features_in_batches(features.load_classifier(), u8, batch=100)
    again = distances.frechet(*distances.moments(rows), *features.load_reference())
    np.testing.assert_allclose(found["value"], again, rtol=1e-3)
    assert found["value"] > 10  # random weights make no faces; the floor is 0.35


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"fd_every": 5}, "64x64x3.*got 8x8x3.*fd_every=0"),
        ({"save_every": 3, "log_every": 2}, "multiple of log_every; got 3 and 2"),
        ({"total_images": 0}, "total_images must be >= 1; got 0"),
        ({"fd_images": 1}, "fd_images >= 2; got 1"),
        ({"growth": ((8, 16),)}, r"rising resolutions of \[4\]; got \[8\]"),
        ({"growth": ((4, 0),)}, "1 image or more; got"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, says, tmp_path):
    with pytest.raises(UserError, match=says):
        gan.train(**_settings("nowhere", tmp_path, **changes))


def test_pictures_of_another_size_are_refused(tmp_path):
    (tmp_path / "faces").mkdir()
    data = _render(tmp_path / "faces", size=16)
    with pytest.raises(UserError, match="are 16x16; resolution=8"):
        gan.train(**_settings(data, tmp_path))


def test_r1_is_the_squared_slope_of_the_discriminator():
    hyper = _hyper()
    params = stylegan2.random_discriminator(jax.random.key(0), hyper.d_arch).params
    real, fake = jax.random.normal(jax.random.key(1), (2, 4, SIZE, SIZE, 3))

    @jax.jit
    def losses(params, real, fake):
        plain, _ = gan_step.discriminator_loss(params, real, fake, hyper, penalise=False)
        return plain, *gan_step.discriminator_loss(params, real, fake, hyper, penalise=True)

    def total(params, real):
        return jnp.sum(stylegan2.ResnetDiscriminator(hyper.d_arch).apply({"params": params}, real))

    step = 1e-2  # one pixel of one image at a time
    steps = step * jnp.eye(real.size).reshape(-1, *real.shape)
    along = jax.jit(jax.vmap(total, in_axes=(None, 0)))
    slopes = along(params, real[None] + steps) - along(params, real[None] - steps)
    slopes = slopes / (2 * step)
    expected = float(jnp.sum(jnp.square(slopes))) / len(real)  # mean over the images

    plain, penalised, aux = losses(params, real, fake)
    np.testing.assert_allclose(aux["r1"], expected, rtol=2e-2)
    scale = 0.5 * hyper.r1_gamma * hyper.r1_every
    np.testing.assert_allclose(penalised, plain + scale * aux["r1"], rtol=1e-5)
    np.testing.assert_allclose(aux["d_loss"], plain, rtol=1e-6)


def test_the_path_penalty_evens_out_the_path_lengths():
    hyper = _hyper()
    params = stylegan2.random_generator(jax.random.key(0), hyper.arch)
    params = {"mapping": params.mapping, "synthesis": params.synthesis}
    key, adam = jax.random.key(1), optax.adam(0.01)

    @jax.jit
    def update(params, moments, path_length):
        def penalty(params):
            return gan_step.path_penalty(key, params, path_length, hyper)

        (value, length), grads = jax.value_and_grad(penalty, has_aux=True)(params)
        updates, moments = adam.update(grads, moments)
        return optax.apply_updates(params, updates), moments, value, length

    moments, length, values = adam.init(params), jnp.zeros(()), []
    for _ in range(30):
        params, moments, value, length = update(params, moments, length)
        values.append(float(value))
    assert 0.0 < values[-1] < 0.5 * values[0]
    assert float(length) > 0.0


def test_the_path_penalty_and_r1_are_lazy(whole):
    lines = log_lines(whole)
    assert [("path" in line, "r1" in line) for line in lines] == [(True,) * 2, (False,) * 2] * 4
    assert _state(whole, 8)[".path_length"] > 0.0


def test_style_mixing_holds_both_latents():
    hyper, n = _hyper(mixing=1.0), 64
    params = {"mapping": stylegan2.random_generator(jax.random.key(0), hyper.arch).mapping}
    ws, w = map(np.asarray, gan_step.mixed_latents(jax.random.key(1), params, hyper, n))
    assert ws.shape == (n, hyper.arch.num_ws, hyper.arch.w_dim)
    first = np.all(ws == w[:, None], axis=2)
    second = np.all(ws == ws[:, -1:], axis=2)
    assert first[:, 0].all() and not first[:, -1].any()
    assert np.all(first ^ second)  # each layer has the one or the other
    assert set(first.sum(axis=1)) == set(range(1, hyper.arch.num_ws))  # every cut occurs
    np.testing.assert_array_equal(np.sort(~first, axis=1), ~first)  # one cut

    half, _ = gan_step.mixed_latents(jax.random.key(1), params, _hyper(mixing=0.5), n)
    share = np.mean(np.any(half != half[:, :1], axis=(1, 2)))
    assert 0.25 < share < 0.75
    none, w = gan_step.mixed_latents(jax.random.key(1), params, _hyper(mixing=0.0), n)
    assert np.all(none == w[:, None])


def test_the_moving_average_warms_up():
    def decay(step):
        return float(gan_step.average_decay(step, batch=10, ema_images=1_000))

    assert decay(0) < 1e-3  # starts as the generator itself, not as its random initialisation
    np.testing.assert_allclose(decay(200), 0.5 ** (10 / 100), rtol=1e-6)  # a 20th of 2,000 seen
    np.testing.assert_allclose([decay(2_000), decay(10**6)], 0.5 ** (10 / 1_000), rtol=1e-6)


def test_the_average_follows_the_generator(whole):
    state = _state(whole, 4)
    name = "['synthesis']['b8']['conv1']['kernel']"
    # After 4 steps of at most the learning rate each, the average is within a step or two.
    gap = np.abs(state[f".average{name}"] - state[f".generator{name}"]).max()
    assert 0.0 < gap < 2 * 0.002 * 4
