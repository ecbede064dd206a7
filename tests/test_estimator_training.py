"""Training of the learned estimator: right pairs, any split over devices, resume, learning."""

import subprocess
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import main_in_two
from training_runs import log_lines

from lfp_jax import attacks, basis, fingerprint, generators, images, main, sharding
from lfp_jax.attribution import estimator as estimators
from lfp_jax.attribution import training
from lfp_jax.errors import UserError
from lfp_jax.generators import stylegan2
from lfp_jax.training import estimator as trainer
from lfp_jax.weights import store

pytestmark = pytest.mark.usefixtures("quick_compilation")
BITS, DIM = 4, 16
MARK = {"strength": 2.0, "code": "antipodal"}
NETWORK = {"patch": 2, "channels": (16,), "blocks": 1, "grid": 4, "head": 16, "width": 64}
NETWORK["rounds"] = 2
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def generator():
    arch = stylegan2.Architecture(
        resolution=8, channels=(16, 16), z_dim=DIM, w_dim=DIM, mapping_layers=1, mapping_width=DIM
    )
    return stylegan2.random_generator(jax.random.key(0), arch, name="small")


@pytest.fixture(scope="module")
def space(generator):
    directions = basis.fit_generator(jax.random.key(1), generator, samples=512)
    return basis.split(directions, bits=BITS)


@pytest.fixture(scope="module")
def draw(generator, space):
    design = estimators.Design("small", "", BITS, DIM - BITS, **MARK)

    @jax.jit(static_argnames=("n", "chain", "random"))
    def draw_with(generator, space, start, choice, *, n, chain, random):
        return training.draw_pairs(
            KEY, generator, space, start, n=n, design=design, chain=training.CHAINS[chain],
            choice=None if random else choice,
        )  # fmt: skip

    def pairs(start, n, *, chain="none", choice=None):
        return draw_with(
            generator, space, start, choice or 0, n=n, chain=chain, random=choice is None
        )

    return pairs


def _settings(generator, workdir, **changes):
    """Give keywords of a quick training run: 8 steps of 32 pairs."""
    settings = {
        "generator": generator, "workdir": workdir, "total_pairs": 256, "basis_samples": 512,
        "bits": BITS, "shift": None, "directions": "pca", "attacks": "none", "network": NETWORK,
        "batch": 32, "learning_rate": 3e-3, "warmup": 50, "log_every": 1, "save_every": 4,
        "evaluate_every": 4, "evaluate_pairs": 64,
    }  # fmt: skip
    return settings | MARK | changes


def _losses(workdir):
    return [line["loss"] for line in log_lines(workdir) if "loss" in line]


@pytest.fixture(scope="module")
def whole(generator, tmp_path_factory):
    """Train 8 steps on the four fake devices without a break."""
    workdir = tmp_path_factory.mktemp("whole")
    trainer.train(**_settings(generator, workdir))
    return workdir


# --- pairs ----------------------------------------------------------------------------------------


def test_targets_are_what_makes_the_image(generator, space, draw):
    pairs = draw(0, 6)
    alpha = pairs.theta * space.nuisance_stddev[None]
    made = generator.decode(fingerprint.compose(space, alpha, pairs.bits, **MARK))
    np.testing.assert_allclose(images.png_round_trip(made), pairs.images, atol=1.01 / 127.5)
    assert np.mean(images.to_uint8(made) == images.to_uint8(pairs.images)) > 0.999
    assert 0.0 < np.mean(pairs.bits) < 1.0


def test_a_pair_depends_on_its_global_index_only(draw):
    for chain in ("none", "paper"):
        many, few = draw(0, 8, chain=chain), draw(6, 2, chain=chain)
        for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(few), strict=True):
            np.testing.assert_allclose(a[6:], b, atol=1e-4)
    assert np.abs(draw(0, 8).theta - draw(8, 8).theta).max() > 0.1


def test_the_harshest_attacks_are_those_of_the_suite():
    image = jax.random.uniform(jax.random.key(0), (16, 16, 3), minval=-0.5, maxval=0.5)

    @jax.jit(static_argnames="chain")
    def degrade(image, choice, *, chain):
        amounts = jnp.ones(len(training.CHAINS[chain]))
        return training.degrade(
            KEY, image, chain=training.CHAINS[chain], choice=choice, amounts=amounts
        )

    for name in ("paper", "paper-history"):
        names = training.attack_names(training.CHAINS[name])
        suite = {attack.name: attack for attack in attacks.suite(name)}
        assert set(names) == {"none", *suite}
        for choice, attack in enumerate(names):
            mine = np.asarray(degrade(image, choice, chain=name))
            levels = (mine + 1.0) * 127.5
            np.testing.assert_allclose(levels, np.round(levels), atol=1e-3)
            if attack in ("noise", "combination"):  # drawn from other keys
                continue
            wanted = suite.get(attack, attacks.suite("none")[0])
            theirs = attacks.apply(KEY, image[None], wanted)[0]
            np.testing.assert_allclose(mine, theirs, atol=2.1 / 127.5, err_msg=attack)
        noisy = np.asarray(degrade(image, names.index("noise"), chain=name))
        np.testing.assert_allclose(np.std(noisy - image), 0.1, rtol=0.1)
        steps = [name for name, _ in suite["combination"].steps]
        assert steps == [name for name, *_ in training.CHAINS[name]]


def test_training_draws_every_attack_and_strength(draw):
    clean, drawn = draw(0, 64).images, draw(0, 64, chain="paper").images
    change = np.sqrt(np.mean(np.square(clean - drawn), axis=(1, 2, 3)))
    assert 5 <= np.sum(change == 0.0) <= 25  # a fifth is left alone
    assert len(np.unique(change.round(5))) > 40


# --- runs -----------------------------------------------------------------------------------------


def test_one_device_equals_four(whole, generator, tmp_path):
    one = jax.devices()[:1]
    trainer.train(**_settings(generator, tmp_path, total_pairs=160, devices=one))
    # The schedule ends earlier, but in its warm-up the steps are the same.
    np.testing.assert_allclose(_losses(tmp_path), _losses(whole)[:5], rtol=1e-5)


def test_the_batch_is_split_over_the_devices(generator, space):
    mesh = sharding.mesh()
    arch = estimators.Architecture(**NETWORK | {"rounds": 1})
    metric = np.eye(DIM, dtype=np.float32)
    made = estimators.initial(KEY, generator, space, metric=metric, arch=arch, **MARK)
    hyper = training.Hyperparameters(32, 8, 3e-3, 50, 4.0, 1.0, 50_000, ())
    step = training.make_step(mesh=mesh, hyper=hyper)
    state, kind = training.initial_state(made, hyper), made.replace(params=None)
    text = step.lower(KEY, state, kind, generator, space, np.int32(0)).compile().as_text()
    assert "f32[8,8,8,3]" in text  # 8 of the 32 images on a device
    assert "f32[32,8,8,3]" not in text


def test_a_killed_and_resumed_run_equals_the_whole_one(whole, generator, tmp_path, killed_after):
    with killed_after(6):
        trainer.train(**_settings(generator, tmp_path))
    assert not (tmp_path / "estimator").exists()
    trainer.train(**_settings(generator, tmp_path))
    assert log_lines(tmp_path) == log_lines(whole)
    assert [line["step"] for line in log_lines(whole)] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    mine, theirs = (store.load(str(path / "estimator")) for path in (tmp_path, whole))
    jax.tree.map(np.testing.assert_array_equal, mine[0], theirs[0])
    assert mine[1] == theirs[1]
    assert mine[1]["training"]["pairs"] == 256
    assert images.read(tmp_path / "curve.png").std() > 5


def test_a_checkpoint_is_finished_without_steps(whole, generator):
    (whole / "curve.png").unlink()
    before = (whole / "log.jsonl").read_bytes()
    tree, _ = store.load(str(whole / "estimator"))
    trainer.train(**_settings(generator, whole, total_pairs=1))
    assert (whole / "log.jsonl").read_bytes() == before
    jax.tree.map(np.testing.assert_array_equal, store.load(str(whole / "estimator"))[0], tree)
    assert (whole / "curve.png").exists()


def test_a_run_begins_where_another_ended(whole, generator, tmp_path):
    path = str(whole / "estimator")
    ended, _ = store.load(path)
    settings = _settings(generator, tmp_path, total_pairs=32, begin=path, learning_rate=0.0)
    trainer.train(**settings)  # nothing learnt: the weights are those it began with
    begun, _ = store.load(str(tmp_path / "estimator"))
    jax.tree.map(np.testing.assert_array_equal, begun, ended)
    narrow = settings | {"network": NETWORK | {"width": 32}, "workdir": tmp_path / "narrow"}
    with pytest.raises(UserError, match="holds a network of other sizes: .*width=64"):
        trainer.train(**narrow)


@pytest.mark.slow
def test_it_learns_to_read_keys_it_never_saw(generator, space, tmp_path):
    settings = _settings(generator, tmp_path, total_pairs=32 * 300, attacks="paper")
    settings |= {"log_every": 100, "save_every": 300, "evaluate_every": 1000}
    trainer.train(**settings, devices=jax.devices()[:1])
    fresh = log_lines(tmp_path)[-1]["fresh"]
    assert set(fresh) == {"none", "blur", "noise", "jpeg", "combination"}
    assert fresh["none"] > 0.85, fresh
    assert min(fresh.values()) > 0.55, fresh

    # And so does what is read back from its store, with an image of no training pair.
    directions = basis.fit_generator(
        jax.random.fold_in(jax.random.key(0), 0), generator, samples=512
    )
    space = basis.split(directions, bits=BITS)
    n = 128
    truth = np.random.default_rng(0).integers(0, 2, (n, BITS))
    w = fingerprint.inject(space, generator.sample(jax.random.key(9), n), truth, **MARK)
    made = images.png_round_trip(jax.jit(generator.decode)(w))
    estimator = estimators.load(str(tmp_path / "estimator"), generator, space, **MARK)
    found = estimators.learned(
        KEY, generator, space, made, estimator=estimator, progress=False, **MARK
    )
    assert np.mean(found.bits == truth) > 0.8
    # The nuisance was found as well: what it rebuilds is nearer than the mean image.
    mean = np.clip(generator.decode(space.mean[None]), -1.0, 1.0)
    away = np.sqrt(np.mean(np.square(mean - made), axis=(1, 2, 3)))
    assert np.mean(found.residual) < 0.6 * np.mean(away)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attacks": "papers"}, "Did you mean 'paper'"),
        ({"code": "gray"}, "Unknown code 'gray'"),
        ({"total_pairs": 0}, "total_pairs must be >= 1; got 0"),
        ({"batch": 6}, "batch must divide by the devices; got 6 over 4"),
        ({"strength": 0.0}, "strength must be > 0; got 0"),
        ({"save_every": 3, "log_every": 2}, "multiple of log_every; got 3 and 2"),
        ({"generator": "stylegan2-dmo"}, "Did you mean 'stylegan2-demo'"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, says, generator, tmp_path):
    with pytest.raises(UserError, match=says):
        trainer.train(**_settings(generator, tmp_path) | changes)


# --- the command line, one process and two --------------------------------------------------------


def _flags(pytestconfig, source, workdir):
    config = pytestconfig.rootpath / "configs" / "train_estimator.py"
    flags = [f"--config={config}:tiny", f"--workdir={workdir}", f"--config.generator={source}"]
    flags += ["--config.bits=4", "--config.shift=12", "--config.attacks=none"]
    flags += ["--config.total_pairs=40", "--config.save_every=5"]
    return [*flags, "--config.evaluate_every=100"]


@pytest.fixture(scope="module")
def stored(generator, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("stored") / "generator")
    generators.save(path, generator, source_format="lfp_jax", licence="none")
    return path


@pytest.fixture(scope="module")
def single(stored, tmp_path_factory, pytestconfig):
    """Five steps by the command line, in this process."""
    workdir = tmp_path_factory.mktemp("single")
    assert main.main(["lfp_jax", *_flags(pytestconfig, stored, workdir)]) == 0
    return workdir


@pytest.mark.slow
def test_two_processes_of_two_devices_equal_one(
    single, stored, tmp_path, two_processes, pytestconfig
):
    flags = _flags(pytestconfig, stored, tmp_path)
    said = main_in_two(two_processes, *flags, stderr=subprocess.STDOUT)
    np.testing.assert_allclose(_losses(tmp_path), _losses(single), rtol=1e-5)
    assert len(_losses(tmp_path)) == 5
    assert "Estimator after" in said[0] and "Estimator after" not in said[1]
    mine, theirs = (store.load(str(path / "estimator"))[0] for path in (tmp_path, single))
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-3), mine, theirs)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--process=1"], "need --distributed"),
        (["--distributed"], "could not join the others"),
    ],
)
def test_a_process_never_goes_on_alone(flags, says, stored, tmp_path, pytestconfig, capsys):
    flags = [*_flags(pytestconfig, stored, tmp_path), *flags]
    assert main.main(["lfp_jax", *flags]) == 2
    assert says in capsys.readouterr().err
