"""JPEG: the real codec against golden files, and the differentiable one against the real."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.fft import dctn

from lfp_jax import images as files
from lfp_jax.attacks import Uniform, jpeg, jpeg_approximate
from lfp_jax.attacks.jpeg import block_dct, block_idct, quantisation_tables
from lfp_jax.errors import UserError

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "jpeg" / "io.npz"))
CODED = [name for name in GOLDEN if "/q" in name and not name.startswith("qtable")]
KEY = jax.random.key(0)


def _approximate(u8, **options):
    return files.to_uint8(jpeg_approximate(KEY, files.from_uint8(u8)[None], **options))[0]


def _gap(ours, theirs):
    """Absolute differences in levels, as integers."""
    return np.abs(ours.astype(int) - theirs.astype(int))


@pytest.mark.parametrize("name", CODED)
def test_both_against_golden(name):
    picture, code = name.split("/")
    u8 = GOLDEN[f"{picture}/original"]
    options = {
        "quality": int(code[1:3]),
        "subsampling": "4:4:4" if code.endswith("444") else "4:2:0",
    }
    real = files.to_uint8(jpeg(KEY, files.from_uint8(u8)[None], **options))[0]
    assert _gap(real, GOLDEN[name]).max() <= 1  # another libjpeg may differ in the last bit
    gap = _gap(_approximate(u8, **options), real)
    assert gap.mean() < 0.25
    assert np.mean(gap == 0) > 0.8
    assert gap.max() <= 16  # a coefficient on the tie between two steps


@pytest.mark.parametrize(
    ("shape", "subsampling"),
    [((1, 1), "4:2:0"), ((17, 33), "4:2:0"), ((51, 69), "4:2:2"), ((3, 5), "4:4:4")],
)
def test_any_size_and_subsampling(shape, subsampling):
    height, width = shape
    u8 = GOLDEN["coffee_odd/original"]
    u8 = np.pad(u8, ((0, 1), (0, 0), (0, 0)), mode="reflect")[:height, :width]
    options = {"quality": 50, "subsampling": subsampling}
    real = files.to_uint8(jpeg(KEY, files.from_uint8(u8)[None], **options))[0]
    gap = _gap(_approximate(u8, **options), real)
    assert gap.mean() < 0.25
    assert gap.max() <= 4


def test_greyscale_is_luma_alone():
    u8 = GOLDEN["coffee_odd/original"][..., :1]
    real = files.to_uint8(jpeg(KEY, files.from_uint8(u8)[None], quality=50))[0]
    gap = _gap(_approximate(u8, quality=50), real)
    assert real.shape == u8.shape
    assert gap.mean() < 0.1


@pytest.mark.parametrize("quality", [10, 50, 90])
def test_quantisation_tables(quality):
    luma, chroma = jax.jit(quantisation_tables)(quality)
    np.testing.assert_array_equal(luma, GOLDEN[f"qtable/q{quality}_luma"])
    np.testing.assert_array_equal(chroma, GOLDEN[f"qtable/q{quality}_chroma"])
    assert luma.dtype == jnp.int32


def test_quality_100_quantises_by_one():
    assert all(np.all(table == 1) for table in quantisation_tables(100))


def test_block_dct():
    plane = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    coefficients = block_dct(plane)
    assert coefficients.shape == (2, 3, 8, 8)
    np.testing.assert_allclose(coefficients[1, 2], dctn(plane[8:, 16:], norm="ortho"), atol=1e-5)
    np.testing.assert_allclose(block_idct(coefficients), plane, atol=1e-5)


def test_derivatives_pass_through_rounding_in_both_modes():
    image = 0.8 * files.from_uint8(GOLDEN["coffee_odd/original"])
    rng = np.random.default_rng(1)
    push, pull = (rng.normal(size=image.shape).astype(np.float32) for _ in range(2))

    @jax.jit
    def both(image, push, pull):
        def code(image):
            return jpeg_approximate.one(KEY, image, quality=50)

        forward = jnp.vdot(pull, jax.jvp(code, (image,), (push,))[1], precision="highest")
        backward = jnp.vdot(jax.vjp(code, image)[1](pull)[0], push, precision="highest")
        return forward, backward, jax.jvp(code, (image,), (jnp.ones_like(image),))[1]

    forward, backward, grey = both(image, push, pull)
    np.testing.assert_allclose(forward, backward, rtol=1e-3)
    np.testing.assert_allclose(np.median(grey), 1.0, atol=1e-3)  # all brighter: all brighter


def test_cubic_rounding_stays_near():
    images = files.from_uint8(GOLDEN["coffee_odd/original"])[None]
    straight = jpeg_approximate(KEY, images, quality=50)
    cubic = jpeg_approximate(KEY, images, quality=50, rounding="cubic")
    assert 0.0 < jnp.mean(jnp.abs(straight - cubic)) < 0.02


def test_quality_may_differ_from_image_to_image():
    images = np.repeat(files.from_uint8(GOLDEN["coffee_odd/original"])[None], 2, axis=0)
    both = jpeg(KEY, images, quality=np.array([10, 90]))
    np.testing.assert_array_equal(both[1:], jpeg(KEY, images[1:], quality=90))
    drawn = jpeg(KEY, images, quality=Uniform(10, 90), start=4)
    assert np.any(drawn[0] != drawn[1])
    np.testing.assert_array_equal(
        drawn[1:], jpeg(KEY, images[1:], quality=Uniform(10, 90), start=5)
    )


def test_mistakes():
    image = np.zeros((1, 8, 8, 3), np.float32)
    with pytest.raises(UserError, match="quality must be in 1 .. 100; got 101"):
        jpeg(KEY, image, quality=101)
    for coder in (jpeg, jpeg_approximate):
        with pytest.raises(UserError, match=r"Unknown subsampling '4:2:1'\. Did you mean"):
            coder(KEY, image, quality=50, subsampling="4:2:1")
    with pytest.raises(UserError, match="Unknown rounding 'cubc'. Did you mean 'cubic'"):
        jpeg_approximate(KEY, image, quality=50, rounding="cubc")
