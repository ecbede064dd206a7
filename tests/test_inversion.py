"""The paper's estimator: bits come back, choice is by loss, and no true key is needed."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfp_jax import basis, fingerprint, images
from lfp_jax.attribution import inversion, least_squares
from lfp_jax.errors import UserError
from lfp_jax.generators import stylegan2
from lfp_jax.metrics import perceptual

BITS = 8
MARK = {"strength": 1.0, "code": "antipodal"}
QUICK = {"starts": 2, "steps": 4, "progress": False}


@pytest.fixture(scope="module")
def case():
    """Give generator, space, keys [6, k] and 8-bit images [6, H, W, C]."""
    arch = stylegan2.Architecture(
        resolution=8, channels=(16, 8), z_dim=32, w_dim=32, mapping_layers=2, mapping_width=32
    )
    generator = stylegan2.random_generator(jax.random.key(0), arch)
    space = basis.split(basis.fit(generator.sample(jax.random.key(1), 512)), bits=BITS)
    keys = np.asarray(jax.random.bernoulli(jax.random.key(2), 0.5, (6, BITS)), np.uint8)
    marked = fingerprint.inject(space, generator.sample(jax.random.key(3), 6), keys, **MARK)
    return generator, space, keys, images.png_round_trip(jax.jit(decode)(generator, marked))


def decode(generator, w):
    return generator.decode(w)


def estimate(case, made, **options):
    generator, space, _, _ = case
    options = MARK | QUICK | {"loss": perceptual.loss("mse")} | options
    return inversion.adam(jax.random.key(4), generator, space, made, **options)


def objective(case, unknowns, prepared):
    generator, space, _, _ = case
    options = MARK | {"loss": perceptual.loss("mse"), "penalty": 0.1}
    return np.asarray(inversion._losses(generator, space, prepared, unknowns, **options))


def test_descent_comes_nearer_to_the_image(case):
    # No claim on the bits: few starts and steps leave them near chance on a random network.
    _, _, _, made = case
    early, late = (estimate(case, made, starts=4, steps=steps) for steps in (4, 200))
    assert float(late.residual.mean()) < 0.7 * float(early.residual.mean())
    assert late.soft_bits.min() >= 0.0 and late.soft_bits.max() <= 1.0


@pytest.mark.parametrize("estimator", [inversion.adam, least_squares.lm])
def test_no_estimator_can_be_given_the_true_key(estimator):
    names = list(inspect.signature(estimator).parameters)
    assert names[:4] == ["key", "generator", "space", "images"]
    assert not {"bits", "keys", "truth", "users", "owner"} & set(names)


def test_the_start_of_least_loss_is_chosen(case):
    generator, space, _, made = case
    loss = perceptual.loss("mse")
    prepared = jax.vmap(loss.prepare)(jnp.asarray(made[:2]))
    alpha = jax.random.normal(jax.random.key(5), (6, space.nuisance.shape[1]))
    alpha = alpha * space.nuisance_stddev[None]
    logits = jax.random.normal(jax.random.key(6), (6, BITS))
    logits = logits.at[1].set(jnp.nan)  # a start that broke down
    options = MARK | {"loss": loss, "penalty": 0.1}
    found = inversion._choose_start(
        generator, space, jnp.asarray(made[:2]), prepared, (alpha, logits), 3, 0, options
    )
    losses = objective(case, (alpha, logits), prepared).reshape(2, 3)
    best = np.nanargmin(losses, axis=1) + np.array([0, 3])
    np.testing.assert_allclose(found.soft_bits, jax.nn.sigmoid(logits)[best], rtol=1e-6)
    assert np.isfinite(found.latents).all()


def test_scan_and_unrolled_steps_agree(case):
    generator, space, _, made = case
    loss = perceptual.loss("laplacian", levels=2)
    prepared = jax.vmap(loss.prepare)(jnp.asarray(made[:2]))
    unknowns = (jnp.zeros((2, space.nuisance.shape[1])), jnp.zeros((2, BITS)))
    carry = (unknowns, inversion._optimizer(0.05, 0.001).init(unknowns))
    options = MARK | {"loss": loss, "penalty": 0.1, "rate": 0.05, "decay": 0.001, "steps": 4}
    scanned, unrolled = (
        inversion._adam_steps(generator, space, prepared, carry, unroll=unroll, **options)
        for unroll in (False, True)
    )
    assert np.abs(unrolled[0][0]).max() > 0.01
    for a, b in zip(jax.tree.leaves(scanned), jax.tree.leaves(unrolled), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_an_image_does_not_depend_on_the_others_in_the_batch(case):
    made = case[3]
    both, other = estimate(case, made[:2]), estimate(case, made[[0, 3]])
    np.testing.assert_allclose(both.soft_bits[0], other.soft_bits[0], atol=1e-5)
    assert not np.allclose(both.soft_bits[1], other.soft_bits[1], atol=1e-3)


def test_evaluations_are_three_a_gradient_and_one_a_choice(case):
    found = estimate(case, case[3][:2])
    assert np.asarray(found.evaluations).tolist() == [2 * (3 * 4 + 1) + 1] * 2


def test_further_steps_need_no_further_trace(case):
    estimate(case, case[3][:2], steps=4)
    traces = inversion._adam_steps._cache_size()
    estimate(case, case[3][2:4], steps=12, learning_rate=0.1)
    assert inversion._adam_steps._cache_size() == traces


def test_a_latin_hypercube_has_one_point_a_stratum():
    points = np.asarray(inversion.latin_hypercube(jax.random.key(0), 10, 5))
    strata = (np.arange(10) + 0.5) / 5 - 1
    np.testing.assert_allclose(np.sort(points, axis=0), np.tile(strata[:, None], 5), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": 0}, "steps must be >= 1; got 0."), ({"starts": 0}, "starts must be >= 1; got 0.")],
)
def test_counts_below_one_are_user_errors(case, options, message):
    with pytest.raises(UserError, match=message):
        estimate(case, case[3], **options)


@pytest.mark.parametrize("shape", [(2, 4, 8, 3), (8, 8, 3), (2, 8, 8, 1), (0, 8, 8, 3)])
def test_images_must_have_the_shape_of_the_generators(case, shape):
    with pytest.raises(UserError, match=r"Images must be \[n, 8, 8, 3\]"):
        estimate(case, np.zeros(shape, np.float32))
