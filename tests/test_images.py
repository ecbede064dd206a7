"""Files and 8 bits: exact round trips, and every bad file in one line."""

import io
import os
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lfp_jax import images
from lfp_jax.errors import UserError


@pytest.fixture
def picture():
    """A random uint8 picture, wider than high."""
    return np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)


def test_every_level_comes_back():
    levels = np.arange(256, dtype=np.uint8)
    floats = images.from_uint8(levels)
    assert floats.dtype == np.float32
    assert floats[0] == -1.0
    assert floats[-1] == 1.0
    np.testing.assert_array_equal(images.to_uint8(floats), levels)


def test_rounding_is_half_to_even_after_clipping():
    floats = np.array([0.5, 1.5, 2.5, 253.5], np.float64) / 127.5 - 1.0
    exact = np.array([-1.0, 1.0, -7.0, 7.0, np.inf, -np.inf, 0.0])
    np.testing.assert_array_equal(images.to_uint8(exact), [0, 255, 0, 255, 255, 0, 128])
    # In float32 a half may land a hair to either side: never off by more than the tie itself.
    near = images.to_uint8(floats).astype(int)
    assert np.all(np.abs(near - [0.5, 1.5, 2.5, 253.5]) <= 0.5)


def test_jax_arrays_are_taken():
    u8 = images.to_uint8(jnp.linspace(-1.0, 1.0, 16, dtype=jnp.bfloat16))
    assert u8.dtype == np.uint8
    assert (u8[0], u8[-1]) == (0, 255)


def test_nan_and_integers_are_errors():
    with pytest.raises(UserError, match="1 of 3 pixel values are NaN"):
        images.to_uint8(np.array([0.0, np.nan, 1.0]))
    with pytest.raises(TypeError, match="got uint8"):
        images.to_uint8(np.zeros(3, np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_bytes_keep_every_pixel(picture, channels):
    u8 = picture[..., :channels]
    np.testing.assert_array_equal(images.decode_png(images.encode_png(u8)), u8)
    batch = images.from_uint8(np.stack([u8, 255 - u8]))
    np.testing.assert_array_equal(images.png_round_trip(batch), batch)


def test_png_round_trip_loses_what_8_bits_lose():
    x = np.random.default_rng(1).normal(0.0, 1.0, (2, 8, 8, 3)).astype(np.float32)
    y = images.png_round_trip(x)
    assert y.dtype == np.float32
    assert 0.0 < np.abs(np.clip(x, -1, 1) - y).max() <= 0.5 / 127.5 + 1e-6


@pytest.mark.parametrize("bad", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3))])
def test_encode_png_names_what_it_needs(bad):
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 1 or 3\]; got"):
        images.encode_png(bad)


def test_write_is_whole_or_not_at_all(tmp_path, picture, monkeypatch):
    path = tmp_path / "a.png"
    images.write_png(path, picture)
    np.testing.assert_array_equal(images.read(path), picture)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        images.write_png(path, 255 - picture)
    assert os.listdir(tmp_path) == ["a.png"]
    np.testing.assert_array_equal(images.read(path), picture)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_read_gives_rgb_of_every_mode(tmp_path, mode):
    grey = np.full((5, 7), 200, np.uint8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    u8 = images.read(path)
    assert (u8.shape, u8.dtype) == ((5, 7, 3), np.uint8)
    assert u8.flags.writeable
    if mode != "1":
        assert np.abs(u8.astype(int) - 200).max() <= 3


def test_palette_with_transparency(tmp_path):
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4), mode=None).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(16)))
    np.testing.assert_array_equal(images.read(tmp_path / "a.png")[..., 0].ravel(), np.arange(16))


def test_exif_rotation_is_applied(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(images.read(tmp_path / "a.png"), np.rot90(picture, -1))


def _bomb():
    """A PNG header that promises 20,000 x 20,000 pixels."""
    header = (20_000).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", b"")


def _chunk(kind, data):
    return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)


BAD = {
    "text": (b"not an image", "is not a readable image: no known format"),
    "empty": (b"", "is not a readable image: no known format"),
    "truncated": (None, "is not a readable image"),
    "bomb": (_bomb(), "has too many pixels; at most 64,000,000"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_named_in_one_line(tmp_path, picture, kind):
    data, cause = BAD[kind]
    noise = np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8)
    data = images.encode_png(noise)[:6000] if data is None else data
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(UserError, match=cause) as caught:
        images.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_size_limit_between_ours_and_pillows(tmp_path):
    Image.new("1", (8001, 8001)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="64,016,001 pixels; at most 64,000,000"):
        images.read(tmp_path / "a.png")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="No such image file: '.*a.png'"):
        images.read(tmp_path / "a.png")
    with pytest.raises(UserError, match="is not a readable image"):
        images.read(tmp_path)


def test_damaged_bytes_never_escape_as_another_error(picture):
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(picture).save(buffer, format="PNG", exif=exif)
    whole = np.frombuffer(buffer.getvalue(), np.uint8)
    rng = np.random.default_rng(3)
    for _ in range(200):
        data = whole.copy()
        data[rng.integers(8, len(data), 3)] = rng.integers(0, 256, 3)
        try:
            assert images.decode_png(data.tobytes()).dtype == np.uint8
        except UserError as error:
            assert "PNG bytes" in str(error)


def test_grid_places_images_in_reading_order():
    x = np.stack([np.full((2, 3, 1), v, np.float32) for v in (-1.0, 0.0, 0.5)])
    sheet = images.grid(x, columns=2, margin=1)
    assert sheet.shape == (7, 9, 3)
    assert sheet[1, 1].tolist() == [0, 0, 0]
    assert sheet[1, 5].tolist() == [128, 128, 128]
    assert sheet[4, 1].tolist() == [191, 191, 191]
    assert sheet[4, 5].tolist() == [255, 255, 255]  # no fourth image
    assert images.enlarge(sheet, 2).shape == (14, 18, 3)


def test_a_folder_is_listed_in_one_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for place in ("c.JPG", "a.png", "b/z.webp", "b/a.txt", ".hidden/d.png", ".e.png"):
        (tmp_path / place).write_bytes(place.encode())
    found = images.find(tmp_path)
    assert [os.path.relpath(path, tmp_path) for path in found] == ["a.png", "b/z.webp", "c.JPG"]
    with pytest.raises(UserError, match="No such folder of images: '.*nowhere'"):
        images.find(tmp_path / "nowhere")


def test_a_digest_is_of_contents(tmp_path):
    paths = [str(tmp_path / name) for name in "abc"]
    for path, content in zip(paths, (b"1", b"2", b"3"), strict=True):
        with open(path, "wb") as file:
            file.write(content)
    whole = images.digest(paths)
    assert images.digest(paths[::-1]) == whole
    assert len({whole, images.digest(paths[:2]), images.digest([*paths, paths[0]])}) == 3
    with pytest.raises(UserError, match="Cannot read '.*/d': No such file"):
        images.digest([str(tmp_path / "d")])
