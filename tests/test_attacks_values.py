"""Every attack against Pillow, SciPy, NumPy or the standard library."""

import colorsys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import ndimage

from lfp_jax import attacks
from lfp_jax import images as files
from lfp_jax.attacks import geometric

KEY = jax.random.key(1)
with np.load(Path(__file__).parent / "golden" / "jpeg" / "io.npz") as golden:
    PHOTO = golden["coffee_odd/original"]  # uint8 [50, 70, 3]
FLOATS = files.from_uint8(PHOTO)


def _attacked(name, *, u8=PHOTO, **options):
    """The photo after one attack, in levels."""
    images = files.from_uint8(np.stack([u8, u8]))
    return files.to_uint8(attacks.apply(KEY, images, attacks.attack(name, **options)))[0]


def _assert_near(ours, theirs, *, most):
    """Compare uint8 images; `most` levels may lie between them."""
    assert ours.shape == theirs.shape
    assert np.max(np.abs(ours.astype(int) - theirs.astype(int))) <= most


@pytest.mark.parametrize(("sigma", "window"), [(0.5, 25), (2.0, 25)])
def test_blur(sigma, window):
    def smooth(x):
        for axis in (0, 1):
            x = ndimage.gaussian_filter1d(x, sigma, axis, mode="mirror", radius=window // 2)
        return x

    ours = attacks.blur(KEY, np.stack([FLOATS, FLOATS]), sigma=sigma, window=window)[0]
    np.testing.assert_allclose(ours, smooth(FLOATS), atol=2e-6)
    small = FLOATS[:5, :3]  # smaller than the window: reflected to and fro
    ours = attacks.blur(KEY, small[None], sigma=sigma, window=window)[0]
    np.testing.assert_allclose(ours, smooth(small), atol=2e-6)


def test_median():
    theirs = ndimage.median_filter(PHOTO, (7, 7, 1), mode="nearest")
    np.testing.assert_array_equal(_attacked("median", window=7), theirs)


def test_noise():
    images = jnp.zeros((4, 50, 70, 3))
    added = attacks.noise(KEY, images, std=0.1)
    np.testing.assert_allclose(added.std(), 0.1, rtol=0.02)
    np.testing.assert_allclose(added.mean(), 0.0, atol=0.002)


def test_wrapped_noise_turns_white_black():
    grey = np.full_like(PHOTO, 250)
    share = np.mean(_attacked("noise", u8=grey, std=0.2, wrap=True) < 64)
    np.testing.assert_allclose(share, 0.4, atol=0.02)


def test_salt_and_pepper():
    grey = np.full_like(PHOTO, 100)
    levels, counts = np.unique(
        _attacked("salt_and_pepper", u8=grey, amount=0.1), return_counts=True
    )
    assert list(levels) == [0, 100, 255]
    np.testing.assert_allclose(counts / counts.sum(), [0.05, 0.9, 0.05], atol=0.01)


def test_crop_on_whole_pixels():
    # 0.8 of 50 x 70 is 40 x 56: rows 5 to 45, columns 7 to 63.
    theirs = Image.fromarray(PHOTO[5:45, 7:63]).resize((70, 50), Image.Resampling.BILINEAR)
    _assert_near(_attacked("crop", keep=0.8), np.array(theirs), most=1)


@pytest.mark.parametrize("keep", [0.0, 0.1])
def test_crop_to_less_than_a_pixel_reads_pixels(keep):
    small = jnp.asarray(FLOATS[:3, :2])
    for seed in range(3):
        one = attacks.crop.one(jax.random.key(seed), small, keep=keep, random=True)
        assert small.min() - 1e-6 <= one.min() <= one.max() <= small.max() + 1e-6


def test_crop_by_a_pair_keeps_the_full_height():
    ramp = np.broadcast_to(np.arange(0, 250, 5, dtype=np.uint8)[:, None, None], PHOTO.shape)
    ours = _attacked("crop", u8=ramp, keep=(1.0, 0.75), random=True)
    np.testing.assert_array_equal(ours, ramp)


@pytest.mark.parametrize("scale", [0.25, 0.5])
def test_resize(scale):
    small = (int(70 * scale + 0.5), int(50 * scale + 0.5))
    theirs = Image.fromarray(PHOTO).resize(small, Image.Resampling.BILINEAR)
    theirs = theirs.resize((70, 50), Image.Resampling.BILINEAR)
    _assert_near(_attacked("resize", scale=scale), np.array(theirs), most=2)


def test_rotate():
    theirs = Image.fromarray(PHOTO).rotate(25, Image.Resampling.BILINEAR)
    ours = _attacked("rotate", degrees=25)
    gap = np.abs(ours.astype(int) - np.array(theirs))
    inside = np.zeros((50, 70), bool)
    inside[15:-15, 15:-15] = True  # at the frame Pillow repeats pixels where we go to black
    assert gap[inside].max() <= 2
    assert np.mean(gap > 2) < 0.08
    np.testing.assert_array_equal(_attacked("rotate", degrees=180), PHOTO[::-1, ::-1])


def test_flip():
    np.testing.assert_array_equal(_attacked("flip"), PHOTO[:, ::-1])


def test_translate():
    theirs = np.zeros_like(PHOTO)
    theirs[5:, :-7] = PHOTO[:-5, 7:]
    np.testing.assert_array_equal(_attacked("translate", down=0.1, right=-0.1), theirs)


def test_perspective_takes_its_corners_back():
    moved = jnp.array([[0.1, 0.2], [0.05, 0.9], [0.8, 0.7], [0.95, 0.15]])
    points = np.concatenate([moved, np.ones((4, 1))], axis=1)
    row, column, weight = np.asarray(geometric._to_square(moved)) @ points.T
    square = [[0, 0], [0, 1], [1, 1], [1, 0]]
    np.testing.assert_allclose(np.stack([row, column], axis=1) / weight[:, None], square, atol=1e-5)


def test_perspective_blackens_the_frame_it_leaves():
    white = np.full_like(PHOTO, 255)
    seen = _attacked("perspective", u8=white, distortion=0.5) > 0
    assert 0.25 < np.mean(seen) < 1.0  # each side keeps at least half
    assert seen[13:37, 18:52].all()  # no corner goes further in than a quarter


@pytest.mark.parametrize(
    ("name", "enhancer"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
        ("sharpness", ImageEnhance.Sharpness),
    ],
)
@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_factors(name, enhancer, factor):
    # Pillow rounds the grey or smoothed image to 8 bits first, and then down.
    theirs = np.array(enhancer(Image.fromarray(PHOTO)).enhance(factor))
    _assert_near(_attacked(name, factor=factor), theirs, most=2)


def test_greyscale():
    theirs = np.array(Image.fromarray(PHOTO).convert("L").convert("RGB"))
    _assert_near(_attacked("greyscale"), theirs, most=1)


@pytest.mark.parametrize("turn", [-0.4, 0.25, 0.5])
def test_hue(turn):
    ours = _attacked("hue", turn=turn)
    for row, column in np.random.default_rng(0).integers(0, (50, 70), (200, 2)):
        hue, saturation, value = colorsys.rgb_to_hsv(*(PHOTO[row, column] / 255.0))
        theirs = np.array(colorsys.hsv_to_rgb((hue + turn) % 1.0, saturation, value)) * 255.0
        np.testing.assert_allclose(ours[row, column], theirs, atol=0.51)


@pytest.mark.parametrize("outside", [False, True])
def test_erase(outside):
    white = np.full_like(PHOTO, 255)
    black = _attacked("erase", u8=white, area=0.36, outside=outside)[..., 0] == 0
    inside = black != outside
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    assert (len(rows), len(columns)) == (30, 42)
    assert inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert inside.sum() == 30 * 42


def test_text_is_red_and_leaves_the_rest():
    black = np.zeros_like(PHOTO)
    ours = _attacked("text", u8=black)
    assert ours[..., 0].max() > 200
    assert not ours[..., 1:].any()
    assert not ours[:25].any()  # it starts at half the height
    grey = _attacked("text", u8=black[..., :1])
    np.testing.assert_allclose(grey[..., 0], 0.299 * ours[..., 0], atol=0.6)
