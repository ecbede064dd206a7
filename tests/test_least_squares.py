"""Levenberg-Marquardt: keys come back exactly, each image on its own, at the cost it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfp_jax import basis, fingerprint, images
from lfp_jax.attribution import least_squares
from lfp_jax.errors import UserError
from lfp_jax.generators import stylegan2

BITS, FREE = 8, 24
BOTH_CODES = pytest.mark.parametrize("code", ["antipodal", "binary"])


@pytest.fixture(scope="module")
def model():
    """Give generator and space."""
    arch = stylegan2.Architecture(
        resolution=8, channels=(16, 8), z_dim=32, w_dim=32, mapping_layers=2, mapping_width=32
    )
    generator = stylegan2.random_generator(jax.random.key(0), arch)
    return generator, basis.split(basis.fit(generator.sample(jax.random.key(1), 512)), bits=BITS)


@pytest.fixture(scope="module")
def cases(model):
    """Give by code: keys [4, k], 8-bit images [4, H, W, C], a bank that holds near samples."""
    generator, space = model
    latents = generator.sample(jax.random.key(3), 4)
    far = generator.sample(jax.random.key(5), 28)
    shift = jax.random.normal(jax.random.key(4), latents.shape)
    near = latents + 0.2 * jnp.std(latents, axis=0)[None] * shift
    rows = jnp.concatenate([far, near])
    bank = least_squares.Bank(rows, least_squares.thumbnails(generator.decode(rows)))
    keys = np.asarray(jax.random.bernoulli(jax.random.key(2), 0.5, (4, BITS)), np.uint8)
    made = {}
    for code in ("antipodal", "binary"):
        marked = fingerprint.inject(space, latents, keys, strength=1.0, code=code)
        made[code] = (keys, images.png_round_trip(generator.decode(marked)), bank)
    return made


def estimate(model, case, rows, *, code="antipodal", seed=0, **options):
    _, made, bank = case
    options = {"bank": bank, "batch": 2, "progress": False} | options
    key = jax.random.key(seed)
    return least_squares.lm(key, *model, made[rows], strength=1.0, code=code, **options)


@BOTH_CODES
def test_keys_come_back_from_8_bit_images(model, cases, code):
    found = estimate(model, cases[code], slice(None), code=code)
    np.testing.assert_array_equal(found.bits, cases[code][0])
    assert found.soft_bits.min() >= 0.0 and found.soft_bits.max() <= 1.0
    assert float(found.residual.max()) < 2.0 / 255.0
    again = fingerprint.read(model[1], found.latents, strength=1.0, code=code)
    np.testing.assert_array_equal(again, cases[code][0])


def test_conjugate_gradients_solve_the_step(model, cases):
    generator, space = model
    keys, made, bank = cases["antipodal"]
    frame = least_squares.whiten(space, strength=1.0, code="antipodal", nuisance=None)
    targets = jnp.asarray(made[:2])
    start = fingerprint.whitened_nuisance(space, least_squares.nearest(bank, targets)[:, 0])
    theta = jnp.concatenate([start, jnp.zeros((2, BITS))], axis=1)
    found = {
        unroll: least_squares._conjugate_gradients(
            generator, frame, targets, theta, None, iterations=40, unroll=unroll
        )[0]
        for unroll in (True, False)
    }
    np.testing.assert_allclose(found[True], found[False], atol=2e-3)
    for i in range(2):
        image, jacobian = jax.jit(least_squares._jacobian)(generator, frame, theta[i])
        difference, live = least_squares._difference(image, targets[i])
        jacobian = np.asarray(jacobian * live.reshape(1, -1), np.float64)
        variance = np.mean(np.square(difference))
        system = jacobian @ jacobian.T / variance + np.eye(len(jacobian))
        slope = jacobian @ np.asarray(difference).reshape(-1) / variance + np.asarray(theta[i])
        np.testing.assert_allclose(found[True][i], -np.linalg.solve(system, slope), atol=2e-2)


def test_conjugate_gradients_alone_bring_the_residual_down(model, cases):
    options = {"jacobians": 1, "chords": 1}
    near = estimate(model, cases["antipodal"], slice(None), gradients=(8, 8, 8), **options)
    far = estimate(model, cases["antipodal"], slice(None), gradients=(), **options)
    assert np.all(near.residual < 0.5 * far.residual)


def test_fixed_nuisance_directions_stay_at_zero(model, cases):
    found = estimate(model, cases["antipodal"], slice(0, 2), nuisance=8, jacobians=2)
    part = np.asarray(found.latents - model[1].mean[None]) @ np.asarray(model[1].nuisance)
    np.testing.assert_allclose(part[:, 8:], 0.0, atol=1e-5)
    assert np.abs(part[:, :8]).max() > 0.1


def test_images_are_on_their_own(model, cases):
    case = cases["antipodal"]
    options = {"jacobians": 2}
    whole = estimate(model, case, slice(None), **options)
    few = estimate(model, case, slice(1, 2), **options)
    wide = estimate(model, case, slice(None), batch=3, seed=9, **options)
    # Rounding differs with the batch, and many steps on a curved valley let it grow.
    np.testing.assert_allclose(whole.latents[1], few.latents[0], atol=5e-3)
    np.testing.assert_allclose(whole.latents, wide.latents, atol=5e-3)


def test_the_chunked_jacobian_is_the_jacobian(model):
    generator, space = model
    frame = least_squares.whiten(space, strength=1.0, code="antipodal", nuisance=None)
    theta = jax.random.normal(jax.random.key(0), (FREE + BITS,))
    image, chunked = jax.jit(least_squares._jacobian)(generator, frame, theta)
    plain = jax.jit(
        lambda generator, frame, theta: jax.jacfwd(
            lambda t: least_squares._model(generator, frame, t)
        )(theta)
    )(generator, frame, theta)
    assert chunked.shape == (FREE + BITS, image.size)
    np.testing.assert_allclose(chunked, plain.reshape(-1, FREE + BITS).T, atol=1e-5)


def test_an_overshoot_of_a_clipped_pixel_does_not_pull():
    target = jnp.array([1.0, 1.0, -1.0, -1.0, 0.5])
    made = jnp.array([1.4, 0.7, -1.4, -0.7, 1.4])
    difference, live = least_squares._difference(made, target)
    np.testing.assert_allclose(difference, [0.0, -0.3, 0.0, 0.3, 0.9], atol=1e-6)
    np.testing.assert_array_equal(live, [False, True, False, True, True])


def test_soft_bits_are_surer_where_noise_is_lower(model):
    frame = least_squares.whiten(model[1], strength=1.0, code="antipodal", nuisance=None)
    theta = jnp.linspace(-1.0, 1.0, FREE + BITS)
    jacobian = 0.02 * jax.random.normal(jax.random.key(0), (FREE + BITS, 64))
    (factor,) = least_squares._factors(jacobian[None])
    loud, quiet = (
        least_squares._soft_bits(frame, theta, least_squares._damp(factor, variance))
        for variance in (1e-2, 1e-3)
    )
    assert (np.abs(quiet - 0.5) > np.abs(loud - 0.5)).all()
    # Nuisance marginalised: the variance is the inverse's diagonal, not the diagonal's inverse.
    matrix = np.asarray(jacobian @ jacobian.T / 1e-2 + jnp.eye(FREE + BITS))
    variance = np.diag(np.linalg.inv(matrix))[FREE:]
    expected = 1.0 / (1.0 + np.exp(-2.0 * np.asarray(theta[FREE:]) / variance))
    np.testing.assert_allclose(loud, expected, rtol=1e-3)


def test_the_factor_holds_what_a_cholesky_factor_in_float32_cannot():
    scales = np.logspace(0.5, -5.5, 48)  # of the directions: 12 decades in the product
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((48, 48)))[0]
    jacobian = (turn * scales @ rng.standard_normal((48, 900))).astype(np.float32)
    unit, quantum = np.eye(48), least_squares._QUANTUM
    exact = np.linalg.inv(jacobian.astype(np.float64) @ jacobian.T / quantum + unit)
    plain = jnp.linalg.cholesky(jnp.asarray(jacobian @ jacobian.T / quantum + unit, jnp.float32))
    assert np.isnan(plain).any()
    factor = np.asarray(least_squares._factors(jnp.asarray(jacobian)[None])[0], np.float64)
    np.testing.assert_array_equal(factor, np.tril(factor))
    variances = np.sum(np.square(np.linalg.inv(factor)), axis=0)
    np.testing.assert_allclose(variances, np.diag(exact), rtol=0.01)


def test_a_step_that_gives_nan_is_not_taken(model, cases):
    generator, space = model
    broken = generator.replace(synthesis=jax.tree.map(lambda x: x * jnp.nan, generator.synthesis))
    found = estimate((broken, space), cases["antipodal"], slice(0, 2))
    start = least_squares.nearest(cases["antipodal"][2], cases["antipodal"][1][:2])[:, 0]
    offset = np.asarray(found.latents - start) @ np.asarray(space.nuisance)
    np.testing.assert_allclose(offset, 0.0, atol=1e-4)
    np.testing.assert_array_equal(found.soft_bits, 0.5)


def test_evaluations_are_counted(model, cases):
    case = cases["antipodal"]
    # 24 + 8 tangents fill one chunk of 64. The last forward gives the residual.
    options = {"starts": 1, "jacobians": 1, "chords": 1}
    found = estimate(model, case, slice(0, 2), gradients=(), **options)
    # After one chord step, three short ones are tried beside it.
    assert found.evaluations.tolist() == [1 + 64 + 1 + 3 + 1] * 2
    # 12 iterations in two calls: two images, the slope, 3 an iteration, five lengths of the step.
    more = estimate(model, case, slice(0, 2), gradients=(12,), **options)
    assert (more.evaluations - found.evaluations).tolist() == [2 + 2 + 3 * 12 + 5] * 2


def test_a_failed_start_is_left_for_the_next(model, cases):
    generator, space = model
    keys, made, bank = cases["antipodal"]
    # A bank that holds a far sample under the first image's own thumbnail: a start that misleads.
    fooled = bank.replace(
        latents=jnp.concatenate([space.mean[None] + 30.0 * space.nuisance[:, :1].T, bank.latents]),
        thumbnails=jnp.concatenate([least_squares.thumbnails(made[:1]), bank.thumbnails]),
    )
    options = {"gradients": (), "jacobians": 1}
    case = keys, made, fooled
    one = estimate(model, case, slice(0, 1), starts=1, **options)
    more = estimate(model, case, slice(0, 1), starts=4, **options)
    assert more.residual[0] < 0.5 * one.residual[0]
    assert more.evaluations[0] > one.evaluations[0]


def test_a_bank_is_the_prior_and_its_nearest_sample_is_found(model):
    generator, _ = model
    bank = least_squares.make_bank(jax.random.key(7), generator, size=10, batch=4)
    expected = generator.sample(jax.random.key(7), 10)
    np.testing.assert_allclose(bank.latents, expected, atol=1e-5)
    found = least_squares.nearest(bank, generator.decode(expected)[3:6], count=2)
    assert found.shape == (3, 2, expected.shape[1])
    np.testing.assert_allclose(found[:, 0], expected[3:6], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jacobians": 0}, "jacobians must be >= 1; got 0."),
        ({"chords": 0}, "chords must be >= 1; got 0."),
        ({"starts": 0}, "starts must be >= 1; got 0."),
        ({"starts": 10_000}, "starts must be <= the bank's .* samples; got 10000."),
        ({"batch": 0}, "batch must be >= 1; got 0."),
        ({"gradients": (5, 0)}, r"gradients must be >= 1.*got \(5, 0\)"),
        ({"nuisance": -1}, "nuisance >= 0; got .* and -1"),
    ],
)
def test_bad_options_are_user_errors(model, cases, options, message):
    with pytest.raises(UserError, match=message):
        estimate(model, cases["antipodal"], slice(0, 2), **options)


def test_an_empty_bank_is_a_user_error(model):
    with pytest.raises(UserError, match="A bank's size must be >= 1; got 0."):
        least_squares.make_bank(jax.random.key(0), model[0], size=0)
