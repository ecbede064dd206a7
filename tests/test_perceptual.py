"""Distances against their formulas written out slowly, and losses as sums of squares."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfp_jax.errors import UserError
from lfp_jax.metrics import perceptual

SHAPES = pytest.mark.parametrize("shape", [(16, 16, 3), (13, 21, 1), (8, 9, 3)])


def _pair(shape, noise=0.1, seed=0):
    rng = np.random.default_rng(seed)
    x = np.clip(np.cumsum(rng.normal(0.0, 0.2, shape), axis=1), -1.0, 1.0)
    y = np.clip(x + rng.normal(0.0, noise, shape), -1.0, 1.0)
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


def _network(params, images):
    """A stand-in for the classifier: [n, H, W, C] -> [n, 6]."""
    return jnp.tanh(jnp.einsum("nhwc,cf->nf", images, params, precision="highest") / 100.0)


def _losses():
    weights = jnp.asarray(np.random.default_rng(9).normal(size=(3, 6)), jnp.float32)
    return {
        "mse": perceptual.loss("mse"),
        "laplacian": perceptual.loss("laplacian", levels=2),
        "classifier": perceptual.loss("classifier", network=_network, params=weights),
    }


LOSSES = pytest.mark.parametrize("name", ["mse", "laplacian", "classifier"])


def _slow_ssim(x, y):
    """SSIM in float64, window by window, from the definition."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    size = min(11, (min(x.shape[:2]) - 1) // 2 * 2 + 1)
    line = np.exp(-((np.arange(size) - size // 2) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for i in range(x.shape[0] - size + 1):
        for j in range(x.shape[1] - size + 1):
            a = x[i : i + size, j : j + size]
            b = y[i : i + size, j : j + size]
            weights = window[..., None]
            ma, mb = (weights * a).sum((0, 1)), (weights * b).sum((0, 1))
            va = (weights * (a - ma) ** 2).sum((0, 1))
            vb = (weights * (b - mb) ** 2).sum((0, 1))
            cov = (weights * (a - ma) * (b - mb)).sum((0, 1))
            c1, c2 = 0.02**2, 0.06**2
            top = (2 * ma * mb + c1) * (2 * cov + c2)
            values.append(top / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return np.mean(values)


@SHAPES
@pytest.mark.parametrize("noise", [0.02, 0.5])
def test_ssim_is_its_definition(shape, noise):
    x, y = _pair(shape, noise)
    np.testing.assert_allclose(perceptual.ssim(x, y), _slow_ssim(x, y), atol=1e-5)


def test_ssim_of_flat_images_by_hand():
    x, y = jnp.full((11, 11, 1), 0.5), jnp.full((11, 11, 1), -0.25)
    by_hand = (2 * 0.5 * -0.25 + 0.0004) / (0.25 + 0.0625 + 0.0004)
    np.testing.assert_allclose(perceptual.ssim(x, y), by_hand, rtol=1e-5)


@SHAPES
def test_bounds_symmetry_and_identity(shape):
    x, y = _pair(shape)
    np.testing.assert_allclose(perceptual.ssim(x, x), 1.0, atol=1e-6)
    assert perceptual.psnr(x, x) == jnp.inf
    assert perceptual.mse(x, x) == 0.0
    assert perceptual.laplacian_pyramid(x, x) == 0.0
    for distance in (perceptual.ssim, perceptual.psnr, perceptual.laplacian_pyramid):
        np.testing.assert_allclose(distance(x, y), distance(y, x), rtol=1e-6)
    assert perceptual.ssim(x, y) < 1.0
    assert perceptual.laplacian_pyramid(x, y) > 0.0


def test_psnr_by_hand():
    x = jnp.zeros((8, 8, 3))
    np.testing.assert_allclose(perceptual.psnr(x, x + 0.2), 20.0, rtol=1e-5)
    one_level = perceptual.psnr(x, x + 2 / 255)
    np.testing.assert_allclose(one_level, 20 * np.log10(255), rtol=1e-5)


@SHAPES
def test_gradient_of_ssim_is_finite_even_at_the_solution(shape):
    x, y = _pair(shape)
    gradient = jax.jit(jax.grad(perceptual.ssim))
    assert jnp.isfinite(gradient(x, y)).all()
    np.testing.assert_allclose(gradient(x, x), 0.0, atol=1e-4)


@pytest.mark.parametrize(
    "distance",
    [
        perceptual.mse,
        perceptual.psnr,
        perceptual.ssim,
        functools.partial(perceptual.laplacian_pyramid, levels=2),
    ],
)
def test_vmap_is_loop_and_jit_is_eager(distance):
    pairs = [_pair((9, 8, 3), seed=s) for s in range(3)]
    x, y = (jnp.stack(side) for side in zip(*pairs, strict=True))
    batched = jax.jit(jax.vmap(distance))(x, y)
    loop = jnp.stack([distance(*pair) for pair in pairs])
    np.testing.assert_allclose(batched, loop, rtol=2e-4)
    with jax.disable_jit():
        np.testing.assert_allclose(distance(*pairs[0]), loop[0], rtol=2e-4)


@SHAPES
def test_pyramid_rebuilds_the_image(shape):
    x, _ = _pair(shape)
    h, w, c = shape
    coefficients = np.asarray(perceptual.laplacian_features(x, levels=2))
    band = coefficients[: x.size].reshape(shape) * np.sqrt(x.size)
    coarse = coefficients[x.size :].reshape(-(-h // 2), -(-w // 2), c)
    coarse = jnp.asarray(coarse * np.sqrt(coarse.size / 2.0))
    doubled = jax.jit(lambda a: perceptual._double(perceptual._double(a, axis=0), axis=1))(coarse)
    np.testing.assert_allclose(band + doubled[:h, :w], x, atol=1e-5)


def test_pyramid_puts_flat_change_in_the_remainder_only():
    flat = jnp.full((16, 16, 3), 0.25)
    coefficients = perceptual.laplacian_features(flat, levels=4)
    remainder = 2 * 2 * 3
    np.testing.assert_allclose(coefficients[:-remainder], 0.0, atol=1e-6)
    np.testing.assert_allclose(jnp.sum(coefficients[-remainder:] ** 2), 8 * 0.25**2, rtol=1e-5)


def test_pyramid_weighs_smooth_change_more_than_fine():
    x, rows = jnp.zeros((16, 16, 1)), jnp.arange(16)
    checks = (0.1 * (-1.0) ** (rows[:, None] + rows[None]))[..., None]
    smooth = jnp.broadcast_to(
        0.1 * jnp.sqrt(2.0) * jnp.sin(rows / 16 * 2 * jnp.pi)[:, None, None], x.shape
    )
    np.testing.assert_allclose(perceptual.mse(x, checks), perceptual.mse(x, smooth), rtol=1e-4)
    fine = perceptual.laplacian_pyramid(x, x + checks)
    assert perceptual.laplacian_pyramid(x, x + smooth) > 2.0 * fine


@LOSSES
def test_loss_is_the_squared_distance_of_features(name):
    chosen = _losses()[name]
    x, y = _pair((16, 12, 3))
    prepared = chosen.prepare(x)
    difference = chosen.features(y) - prepared
    assert difference.ndim == 1
    value = chosen.distance(prepared, y)
    np.testing.assert_allclose(value, difference @ difference, rtol=1e-5)
    np.testing.assert_allclose(chosen.distance(prepared, x), 0.0, atol=1e-12)
    direct = {"mse": perceptual.mse(x, y)}
    direct["laplacian"] = perceptual.laplacian_pyramid(x, y, levels=2)
    weights = _losses()["classifier"].params
    direct["classifier"] = perceptual.mse(_network(weights, x[None]), _network(weights, y[None]))
    np.testing.assert_allclose(value, direct[name], rtol=1e-4)


@LOSSES
def test_gauss_newton_gradient_is_the_gradient(name):
    chosen = _losses()[name]
    x, y = _pair((9, 8, 3))
    prepared = chosen.prepare(x)
    gradient = jax.jit(jax.grad(perceptual.Loss.distance, argnums=2))

    @jax.jit
    def pulled_back(chosen, prepared, image):
        residual, pull = jax.vjp(lambda v: chosen.features(v) - prepared, image)
        return 2.0 * pull(residual)[0]

    ours = pulled_back(chosen, prepared, y)
    np.testing.assert_allclose(gradient(chosen, prepared, y), ours, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(gradient(chosen, prepared, x), 0.0, atol=1e-7)


@LOSSES
def test_loss_goes_into_jit_as_an_argument(name):
    traces = []

    @jax.jit
    def value(chosen, targets, images):
        traces.append(name)
        return jax.vmap(chosen.distance)(jax.vmap(chosen.prepare)(targets), images)

    x, y = (jnp.stack([image] * 2) for image in _pair((16, 12, 3)))
    first, second = value(_losses()[name], x, y), value(_losses()[name], x, y)
    assert len(traces) == 1
    np.testing.assert_array_equal(first, second)
    eager = _losses()[name].distance(_losses()[name].prepare(x[0]), y[0])
    np.testing.assert_allclose(first, jnp.stack([eager] * 2), rtol=1e-4)


def test_mistakes_name_the_value_and_the_choices():
    with pytest.raises(UserError, match="Unknown loss 'laplace'. Did you mean 'laplacian'"):
        perceptual.loss("laplace")
    with pytest.raises(UserError, match="'classifier' needs a network; got None"):
        perceptual.loss("classifier")
    with pytest.raises(UserError, match="'lpips' needs a network; got None"):
        perceptual.loss("lpips")
    with pytest.raises(UserError, match=r"levels must be 1..4 for images of 8 x 20; got 5"):
        perceptual.laplacian_features(jnp.zeros((8, 20, 3)), levels=5)
    with pytest.raises(ValueError, match="at least 8 x 8; got 7 x 9"):
        perceptual.ssim(jnp.zeros((7, 9, 1)), jnp.zeros((7, 9, 1)))
    with pytest.raises(ValueError, match=r"got \[8, 8, 3\], \[8, 8, 1\]"):
        perceptual.ssim(jnp.zeros((8, 8, 3)), jnp.zeros((8, 8, 1)))
