"""The estimator `learned` apart from its training: shapes, what it was made for, its store."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ldm as ldm_job
from configs import stylegan2 as main_job
from configs.train_estimator import get_config
from lfp_jax import basis, fingerprint, generators
from lfp_jax.attribution import estimator as estimators
from lfp_jax.errors import UserError
from lfp_jax.generators import stylegan2, zoo
from lfp_jax.weights import store

pytestmark = pytest.mark.usefixtures("quick_compilation")
BITS, DIM = 4, 16
ARCH = estimators.Architecture(
    patch=2, channels=(8, 16), blocks=1, grid=2, head=4, width=16, rounds=2
)
MARK = {"strength": 1.5, "code": "antipodal"}
METRIC = np.eye(DIM, dtype=np.float32)


def _generator(seed, name):
    arch = stylegan2.Architecture(
        resolution=8, channels=(8, 8), z_dim=DIM, w_dim=DIM, mapping_layers=1, mapping_width=DIM
    )
    return stylegan2.random_generator(jax.random.key(seed), arch, name=name)


@pytest.fixture(scope="module")
def generator():
    return _generator(0, "small")


@pytest.fixture(scope="module")
def directions(generator):
    return basis.fit_generator(jax.random.key(1), generator, samples=512)


@pytest.fixture(scope="module")
def space(directions):
    return basis.split(directions, bits=BITS)


@pytest.fixture(scope="module")
def estimator(generator, space):
    """An estimator whose last layers say something, as a trained one's do."""
    made = estimators.initial(jax.random.key(2), generator, space, metric=METRIC, arch=ARCH, **MARK)
    rng = np.random.default_rng(0)
    for name in ("theta", "bits"):
        shape = made.params["network"][name]["kernel"].shape
        kernel = jnp.asarray(0.1 * rng.normal(size=shape), jnp.float16).astype(jnp.float32)
        made.params["network"][name]["kernel"] = kernel
    return made


@pytest.fixture(scope="module")
def images(generator, space):
    w = generator.sample(jax.random.key(3), 5)
    return np.asarray(jnp.clip(generator.decode(w), -1.0, 1.0))


def test_an_untrained_one_says_the_prior_mean_and_no_bit(generator, space, images):
    plain = estimators.initial(
        jax.random.key(2), generator, space, metric=METRIC, arch=ARCH, **MARK
    )
    found = estimators.learned(
        jax.random.key(0), generator, space, images, estimator=plain, progress=False, **MARK
    )
    np.testing.assert_array_equal(found.soft_bits, np.full((5, BITS), 0.5))
    np.testing.assert_allclose(found.latents, np.tile(space.mean, (5, 1)), atol=1e-6)


def test_the_solution_is_what_the_last_round_says(generator, space, estimator, images):
    found = estimators.learned(
        jax.random.key(0), generator, space, images, estimator=estimator, progress=False, batch=2,
        **MARK,
    )  # fmt: skip
    first, last = estimators.guesses(estimator, generator, space, images)
    assert np.abs(last.theta - first.theta).max() > 1e-3
    np.testing.assert_allclose(found.soft_bits, jax.nn.sigmoid(last.logits), rtol=1e-4)
    alpha = last.theta * space.nuisance_stddev[None]
    w = fingerprint.compose(space, alpha, found.soft_bits, **MARK)
    np.testing.assert_allclose(found.latents, w, atol=1e-5)
    made = np.clip(generator.decode(w), -1.0, 1.0)
    rms = np.sqrt(np.mean(np.square(made - images), axis=(1, 2, 3)))
    np.testing.assert_allclose(found.residual, rms, rtol=1e-4)
    assert found.bits.shape == (5, BITS)


def test_a_few_images_are_not_filled_up_to_a_batch(
    generator, space, estimator, images, monkeypatch
):
    sizes, answer = [], estimators._answer

    def counted(*args):
        sizes.append(len(args[-1]))
        return answer(*args)

    monkeypatch.setattr(estimators, "_answer", counted)
    options = {"estimator": estimator, "progress": False, "batch": 4} | MARK
    for n in (1, 3, 5):
        estimators.learned(None, generator, space, images[:n], **options)
    assert sizes == [1, 4, 4, 4]


def test_slopes_are_how_the_squared_difference_falls(generator, space, estimator, images):
    """To first order, and in proportion: a step along the slopes is the steepest there is."""
    w = jnp.tile(space.mean, (5, 1))
    _, slopes = estimators._compare(estimator, generator, space, w, images)
    np.testing.assert_allclose(np.mean(np.square(slopes), axis=1), 1.0, rtol=1e-4)

    def square(unknowns):
        loud = unknowns[:, : DIM - BITS] * space.nuisance_stddev[None]
        soft = 0.5 * (1.0 + unknowns[:, DIM - BITS :])
        made = jnp.clip(generator.decode(fingerprint.compose(space, loud, soft, **MARK)), -1, 1)
        return jnp.sum(jnp.square(made - images))

    down = -jax.grad(square)(jnp.zeros((5, DIM))) / estimator.sensitivity[None]
    cosine = np.sum(down * slopes, axis=1) / np.linalg.norm(down, axis=1) / np.sqrt(DIM)
    np.testing.assert_allclose(cosine, 1.0, atol=1e-3)


def test_sensitivity_is_the_rms_change_of_a_step(generator, space):
    metric = np.diag(np.arange(1.0, DIM + 1.0, dtype=np.float32))
    made = estimators.initial(jax.random.key(2), generator, space, metric=metric, arch=ARCH, **MARK)
    bit = 0.75 * np.asarray(space.carrier)[:, 1]
    wanted = np.sqrt(bit @ metric @ bit / np.prod(generator.image_shape))
    np.testing.assert_allclose(made.sensitivity[DIM - BITS + 1], wanted, rtol=1e-4)


def test_it_counts_its_own_operations_too(generator, space, estimator, images):
    def cost(**changes):
        arch = estimators.Architecture(**{**vars(ARCH), **changes})
        made = estimators.initial(
            jax.random.key(0), generator, space, metric=METRIC, arch=arch, **MARK
        )
        return estimators._evaluations(made, generator)

    once, twice, thrice = (cost(rounds=rounds) for rounds in (1, 2, 3))
    assert once > 1.0  # the residual
    assert twice - once > 2.0  # a round from the second on: forward and back
    np.testing.assert_allclose(thrice - twice, twice - once, rtol=1e-6)
    assert cost(channels=(16, 32)) > twice + 0.1


def test_where_only_compiled_programs_tell_their_operations_it_still_counts(
    generator, space, monkeypatch
):
    """As on a GPU, on which jax 0.11 tells those of a program that is merely lowered as None."""
    made = estimators.initial(jax.random.key(0), generator, space, metric=METRIC, arch=ARCH, **MARK)
    at_once = estimators._evaluations(made, generator)
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda self: None)
    np.testing.assert_allclose(estimators._evaluations(made, generator), at_once, rtol=0.1)


def test_leading_directions_only(generator, space, images):
    part = estimators.initial(
        jax.random.key(2), generator, space, metric=METRIC, arch=ARCH, nuisance=3, **MARK
    )
    guess = estimators.Guess(jnp.ones((1, 3)), jnp.zeros((1, BITS)), jnp.zeros(3))
    w = estimators.place(part, space, guess)[0] - space.mean
    alpha = np.einsum("d,dm->m", w, space.nuisance) / np.asarray(space.nuisance_stddev)
    np.testing.assert_allclose(alpha, [1.0] * 3 + [0.0] * (DIM - BITS - 3), atol=1e-3)


@pytest.mark.parametrize("size", [(8, 8), (13, 20), (3, 5)])
def test_the_network_takes_images_of_any_size(size):
    network = estimators.Network(ARCH, nuisance=5, bits=3)
    image = jax.random.normal(jax.random.key(0), (2, *size, 1))
    slopes = jnp.ones((2, 8))
    params = network.init(jax.random.key(1), image, image, slopes, 0)
    theta, logits = network.apply(params, image, image, slopes, 1)
    assert (theta.shape, logits.shape) == ((2, 5), (2, 3))


def test_the_network_tells_where_a_pixel_moved():
    network = estimators.Network(ARCH, nuisance=5, bits=3)
    image, slopes = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 8))
    params = network.init(jax.random.key(1), image, image, slopes, 0)
    kernel = jax.random.normal(jax.random.key(2), params["params"]["theta"]["kernel"].shape)
    params["params"]["theta"]["kernel"] = kernel

    def said(row, column):
        return network.apply(params, image.at[0, row, column].add(0.5), image, slopes, 0)[0]

    assert np.abs(said(1, 1) - said(1, 5)).max() > 1e-3


def test_store_gives_back_the_same_estimator(generator, space, estimator, tmp_path):
    path = str(tmp_path / "estimator")
    rounded = jax.tree.map(lambda x: jnp.float32(jnp.float16(x)), estimator.params)
    estimators.save(path, estimator, training={"pairs": 3})
    tree, metadata = store.load(path)
    assert {leaf.dtype for leaf in jax.tree.leaves(tree["params"])} == {np.dtype(np.float16)}
    assert metadata["training"] == {"pairs": 3}
    assert metadata["design"]["sha256"] == generator.sha256
    again = estimators.load(path, generator, space, **MARK)
    jax.tree.map(np.testing.assert_array_equal, again.params, rounded)
    assert (again.arch, again.design) == (estimator.arch, estimator.design)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"strength": 2.0}, "strength 1.5, not 2.0"),
        ({"code": "binary"}, "code 'antipodal', not 'binary'"),
        ({"bits": 3}, "bits 4, not 3"),
        ({"shift": 2}, "another basis or shift"),
        ({"flip": True}, "another basis or shift"),
        ({"name": "large"}, "the generator 'small', not 'large'"),
        ({"sha256": "f00"}, "sha256 , not f00"),
    ],
)
def test_another_generator_or_design_point_is_named(
    changes, says, generator, directions, estimator, images, tmp_path
):
    bits, shift = changes.get("bits", BITS), changes.get("shift")
    space = basis.split(directions, bits=bits, shift=shift)
    if "flip" in changes:
        space = space.replace(carrier=space.carrier * jnp.array([[1.0, 1.0, -1.0, 1.0]]))
    other = generator.replace(
        name=changes.get("name", generator.name), sha256=changes.get("sha256", generator.sha256)
    )
    mark = MARK | {k: v for k, v in changes.items() if k in MARK}
    with pytest.raises(UserError, match=says):
        estimators.learned(
            jax.random.key(0), other, space, images, estimator=estimator, progress=False, **mark
        )
    path = str(tmp_path / "estimator")
    estimators.save(path, estimator)
    with pytest.raises(UserError, match=says):
        estimators.load(path, other, space, **mark)


def test_a_basis_of_another_machine_is_the_same(generator, space, estimator):
    rng = np.random.default_rng(0)
    noise = 1e-4 * rng.normal(size=space.carrier.shape).astype(np.float32)
    close = space.replace(carrier=space.carrier + noise)
    estimators.check_design(estimator, generator, close, **MARK)


def test_a_store_of_another_kind_is_refused(generator, space, tmp_path):
    store.save(str(tmp_path / "basis"), {"mean": np.zeros(3)}, {"kind": "basis"})
    with pytest.raises(UserError, match="of kind 'basis', not an estimator"):
        estimators.load(str(tmp_path / "basis"), generator, space, **MARK)


def test_sizes_below_1_are_named(generator, space):
    arch = estimators.Architecture(rounds=0)
    with pytest.raises(UserError, match="rounds of the estimator must be >= 1; got 0"):
        estimators.initial(jax.random.key(0), generator, space, metric=METRIC, arch=arch, **MARK)


def test_the_weights_that_ship_are_at_most_4_mb():
    config = get_config()
    sizes = estimators.Architecture(**config.network.to_dict())
    network = estimators.Network(sizes, config.nuisance, config.bits)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    slopes = jax.ShapeDtypeStruct((1, config.nuisance + config.bits), jnp.float32)
    key = jax.random.key(0)
    params = jax.eval_shape(lambda x, slopes: network.init(key, x, x, slopes, 0), image, slopes)
    assert 2 * sum(leaf.size for leaf in jax.tree.leaves(params)) <= 4e6


@pytest.mark.parametrize(
    ("name", "attacks", "experiment"),
    [
        ("stylegan2-demo", "none", main_job),
        ("stylegan2-demo", "attacks", main_job),
        ("ldm-demo", "attacks", ldm_job),
    ],
)
def test_the_networks_that_ship_fit_the_generator_and_the_main_job(name, attacks, experiment):
    path = zoo.estimator(name, attacks)
    tree, metadata = store.load(path)
    config, generator = experiment.get_config(), generators.load(name)
    expected = {
        "generator": name, "sha256": generator.sha256, "bits": config.bits,
        "strength": config.strength, "code": config.code, "nuisance": get_config().nuisance,
    }  # fmt: skip
    assert metadata["design"] == expected
    size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))
    assert 1e6 < size < 4e6
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
    assert zoo.estimator("stylegan2-dem", attacks) is None
