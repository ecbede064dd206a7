"""Image files <-> arrays; the one place where pixels become 8 bits.

Float images are [n, H, W, C], nominally in [-1, 1]; `u8` arrays and files hold 0..255. Everything
here runs on the host in float32: one rounding rule, the same on every machine.
"""

import glob
import hashlib
import importlib.util
import io
import os
import re
import warnings
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lfp_jax import files
from lfp_jax.errors import UserError

_MOST_PIXELS = 64_000_000  # 8000 x 8000: above this a file is taken for a decompression bomb
_MOST_BYTES = 512_000_000  # of a file: more than any image of that many pixels
_PATTERN = re.compile(r"[*?[]")
_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
# Pillow knows more: PostScript, which it hands to another program to be run; JPEG 2000, of which a
# kilobyte can take gigabytes; and rare ones that nobody tests.
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM") + (
    ("AVIF",) if importlib.util.find_spec("PIL.AvifImagePlugin") else ()
)
_BOMBS = (Image.DecompressionBombWarning, Image.DecompressionBombError)
_STRIP = 2**20  # pixels that are converted at once: a copy of all of them may not fit in memory

# Of damaged EXIF data and the like, which no pixel depends on.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Clip to [-1, 1] and round to 8 bits, half to even.

    Args:
        images: float array of any shape, nominally in [-1, 1].

    Returns:
        uint8 array of the same shape.

    Raises:
        UserError: a value is NaN.
        TypeError: the images are not floats, so that their range is not [-1, 1].
    """
    array = np.asarray(images)
    if array.dtype.kind in "biu":
        raise TypeError(f"Images must be floats in [-1, 1]; got {array.dtype}.")
    array = array.astype(np.float32)
    bad = int(np.isnan(array).sum())
    if bad:
        raise UserError(f"{bad} of {array.size} pixel values are NaN; they have no 8-bit value.")
    return np.round((np.clip(array, -1.0, 1.0) + 1.0) * np.float32(127.5)).astype(np.uint8)


def from_uint8(u8: np.ndarray) -> np.ndarray:
    """Map 0..255 to float32 in [-1, 1]; `to_uint8` undoes it exactly."""
    return np.asarray(u8, np.float32) / np.float32(127.5) - np.float32(1.0)


def encode_png(u8: np.ndarray) -> bytes:
    """Encode one uint8 image [H, W, 1 or 3] as PNG bytes, with no metadata.

    Raises:
        ValueError: another shape or dtype.
    """
    u8 = np.asarray(u8)
    if u8.dtype != np.uint8 or u8.ndim != 3 or u8.shape[-1] not in (1, 3):
        raise ValueError(f"A PNG needs uint8 [H, W, 1 or 3]; got {u8.dtype} {list(u8.shape)}.")
    buffer = io.BytesIO()
    Image.fromarray(u8[..., 0] if u8.shape[-1] == 1 else u8).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """Decode PNG bytes to uint8: [H, W, 1] of a greyscale file, else RGB [H, W, 3].

    Raises:
        UserError: the bytes are no PNG, damaged, or larger than 64 million pixels.
    """
    return _decode(io.BytesIO(data), "PNG bytes", formats=("PNG",), grey=True)


def encode_jpeg(u8: np.ndarray, *, quality: int, subsampling: str) -> bytes:
    """Encode one uint8 image [H, W, 1 or 3] as baseline JPEG bytes.

    Args:
        u8: the image; one channel becomes a greyscale file, which has no chroma.
        quality: libjpeg's, 1 to 100.
        subsampling: of chroma, "4:4:4", "4:2:2" or "4:2:0".
    """
    buffer = io.BytesIO()
    image = Image.fromarray(u8[..., 0] if u8.shape[-1] == 1 else u8)
    image.save(buffer, format="JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()


def decode_jpeg(data: bytes) -> np.ndarray:
    """Decode JPEG bytes to uint8: [H, W, 1] of a greyscale file, else RGB [H, W, 3].

    Raises:
        UserError: the bytes are no JPEG, damaged, or larger than 64 million pixels.
    """
    return _decode(io.BytesIO(data), "JPEG bytes", formats=("JPEG",), grey=True)


def png_round_trip(images: np.ndarray) -> np.ndarray:
    """Send float images [n, H, W, C] through real PNG bytes: what a file keeps of them."""
    u8 = to_uint8(images)
    return from_uint8(np.stack([decode_png(encode_png(image)) for image in u8]))


def write_png(path: str | os.PathLike, u8: np.ndarray) -> None:
    """Write one uint8 image [H, W, 1 or 3] in one step: readers never see half a file."""
    data = encode_png(u8)
    with files.replacing(path) as part, open(part, "wb") as file:
        file.write(data)


def write_pngs(
    folder: str | os.PathLike, u8: np.ndarray, *, start: int = 0, prefix: str = ""
) -> list[str]:
    """Write uint8 images [n, H, W, 1 or 3] as 00000.png, 00001.png, ..., making the folder.

    Args:
        folder: where to.
        u8: the images.
        start: number of the first.
        prefix: of the files' names.

    Returns:
        The paths.
    """
    os.makedirs(folder, exist_ok=True)
    paths = [os.path.join(folder, f"{prefix}{start + i:05d}.png") for i in range(len(u8))]
    for path, image in zip(paths, u8, strict=True):
        write_png(path, image)
    return paths


def read(path: str | os.PathLike) -> np.ndarray:
    """Read an image file of any common format.

    Args:
        path: PNG, JPEG, WebP, TIFF, BMP, GIF, PPM, or AVIF where Pillow has it. EXIF rotation is
            applied, alpha is dropped, greyscale is repeated, 16-bit greyscale is rounded to 8 bits;
            of an animation the first frame counts.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        UserError: the file is missing, no image, damaged, or larger than 64 million pixels.
    """
    return _decode(os.fspath(path), f"'{os.fspath(path)}'", formats=_FORMATS, grey=False)


def read_hashed(path: str | os.PathLike) -> tuple[np.ndarray, str]:
    """Read an image file as `read` does, and hash the very bytes that were read.

    Returns:
        uint8 [H, W, 3], and the SHA-256 of the file in hex digits.

    Raises:
        UserError: as `read`; or the file is empty, may not be read, or is no regular file: a pipe
            might never end.
    """
    path = os.fspath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"'{path}' is no regular file. Give image files or folders.")
    try:
        size = os.path.getsize(path)
        if not 0 < size <= _MOST_BYTES:
            what = (
                "is empty" if not size else f"has {size:,} bytes; at most {_MOST_BYTES:,} are read"
            )
            raise UserError(f"'{path}' {what}. Give the image itself.")
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise UserError(f"No such image file: '{path}'. Check the path.") from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}. Check its rights.") from None
    pixels = _decode(io.BytesIO(data), f"'{path}'", formats=_FORMATS, grey=False)
    return pixels, hashlib.sha256(data).hexdigest()


def gather(paths: Iterable[str | os.PathLike]) -> list[tuple[str, str | None]]:
    """List the image files that paths name: files, folders and all in them, patterns with * and **.

    Links are followed where they are given themselves. Inside a folder or a pattern one that leads
    out of it is a problem: what lies there was not given.

    Returns:
        Pairs of a path and None, or of a path and what is wrong with it, in the order given.
    """
    found: list[tuple[str, str | None]] = []
    for given in paths:
        path = os.fspath(given)
        if os.path.isdir(path):
            try:
                found += _inside(path, find(path))
            except UserError as error:  # there is none
                found.append((path, str(error)))
        elif (special := _PATTERN.search(path)) and not os.path.lexists(path):
            plain = path[: special.start()]
            matches = glob.glob(path, recursive=True)
            matches = sorted(each for each in matches if not os.path.isdir(each))
            found += _inside(os.path.dirname(plain) or ".", matches)
            found += [] if matches else [(path, f"No file matches '{path}'. Check the pattern.")]
        else:
            found.append((path, None))
    return found


def _inside(folder: str, paths: Iterable[str]) -> list[tuple[str, str | None]]:
    """Pair paths with None, or with the complaint that they lead out of the folder."""
    root, out = os.path.realpath(folder), []
    for path in paths:
        within = os.path.commonpath([root, os.path.realpath(path)]) == root
        leads = f"'{path}' is a link out of '{folder}', not followed. Name its target to read it."
        out.append((path, None if within else leads))
    return out


def fit(u8: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Bring an image to the shape that a generator makes.

    Another size is resized by Pillow's bicubic filter, which averages where it shrinks; the aspect
    is not kept, for a picture of another one has been stretched or cut. One channel is the luma of
    ITU-R BT.601.

    Args:
        u8: uint8 [h, w, 3].
        shape: (H, W, 1 or 3).

    Returns:
        uint8 [H, W, C]; the very pixels where the size is right and C is 3.
    """
    height, width, channels = shape
    image = Image.fromarray(u8)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(shape)


def find(folder: str | os.PathLike) -> list[str]:
    """List the image files of a folder and the folders in it, by their extensions.

    Hidden files and folders are left out.

    Returns:
        Paths, sorted by their place in the folder: the same order on every machine.

    Raises:
        UserError: no such folder, or no image in it.
    """
    folder = os.fspath(folder)
    if not os.path.isdir(folder):
        raise UserError(f"No such folder of images: '{folder}'.")
    places = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        places += [
            os.path.relpath(os.path.join(root, name), folder).split(os.sep)
            for name in names
            if name.lower().endswith(_EXTENSIONS) and not name.startswith(".")
        ]
    if not places:
        kinds = ", ".join(_EXTENSIONS)
        raise UserError(f"'{folder}' holds no image: no file ends in {kinds}.")
    return [os.path.join(folder, *place) for place in sorted(places)]


def digest(paths: list[str]) -> str:
    """Compute the SHA-256 over the contents of files, in any order and under any names.

    Raises:
        UserError: a file cannot be read.
    """
    digests = []
    for path in paths:
        try:
            digests.append(bytes.fromhex(files.sha256(path)))
        except OSError as error:
            raise UserError(f"Cannot read '{path}': {error.strerror}.") from None
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def grid(images: np.ndarray, *, columns: int, margin: int = 2) -> np.ndarray:
    """Lay images out in rows on white.

    Args:
        images: float [n, H, W, 1 or 3] in [-1, 1].
        columns: images in a row.
        margin: white pixels around each image.

    Returns:
        uint8 [height, width, 3].
    """
    u8 = to_uint8(images)
    n, height, width, _ = u8.shape
    rows = -(-n // columns)
    shape = (rows * (height + margin) + margin, columns * (width + margin) + margin, 3)
    sheet = np.full(shape, 255, np.uint8)
    for i, image in enumerate(u8):
        top = margin + (i // columns) * (height + margin)
        left = margin + (i % columns) * (width + margin)
        sheet[top : top + height, left : left + width] = image  # one channel repeats to three
    return sheet


def enlarge(u8: np.ndarray, factor: int) -> np.ndarray:
    """Repeat every pixel `factor` times in both directions, so that small pictures can be seen."""
    return np.repeat(np.repeat(u8, factor, axis=0), factor, axis=1)


def shrink(u8: np.ndarray, size: int) -> np.ndarray:
    """Average square blocks of uint8 images [n, H, W, C] down to size x size, rounded to uint8.

    `size` divides the images' height and width.
    """
    n, height, width, channels = u8.shape
    if (height, width) == (size, size):
        return u8
    blocks = u8.reshape(n, size, height // size, size, width // size, channels)
    return np.stack([np.rint(x.mean(axis=(1, 3))).astype(np.uint8) for x in blocks])


def _decode(
    source: str | io.BytesIO, name: str, *, formats: tuple[str, ...] | None, grey: bool
) -> np.ndarray:
    """Decode a path or file object to uint8 [H, W, 3]; [H, W, 1] where `grey` and the file is."""
    try:
        with Image.open(source, formats=formats) as image:
            pixels = image.width * image.height
            if pixels > _MOST_PIXELS:
                raise UserError(f"{name} has {pixels:,} pixels; at most {_MOST_PIXELS:,} are read.")
            ImageOps.exif_transpose(image, in_place=True)
            return _pixels(image, grey)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"No such image file: {name}.") from None
    except _BOMBS:
        raise UserError(
            f"{name} has too many pixels; at most {_MOST_PIXELS:,} are read. Make it smaller first."
        ) from None
    except UnidentifiedImageError:
        raise UserError(
            f"{name} is not a readable image: no known format. Give one of {', '.join(_FORMATS)}."
        ) from None
    except Exception as error:  # on hostile bytes Pillow raises nearly anything: struct.error ...
        cause = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UserError(
            f"{name} is not a readable image: {cause}. Get a whole copy of it."
        ) from None


def _pixels(image: Image.Image, grey: bool) -> np.ndarray:
    """Convert an image strip by strip."""
    width, height = image.size
    rows = max(1, _STRIP // width)
    first = _strip(image.crop((0, 0, width, min(rows, height))), grey)
    out = np.empty((height, *first.shape[1:]), np.uint8)
    out[:rows] = first
    for start in range(rows, height, rows):
        strip = image.crop((0, start, width, min(start + rows, height)))
        out[start : start + rows] = _strip(strip, grey)
    return out


def _strip(image: Image.Image, grey: bool) -> np.ndarray:
    """Convert a part of an image to uint8 [h, W, 3]; [h, W, 1] where `grey` and it is."""
    image = _to_8_bits(image)
    if grey and image.mode == "L":
        return np.array(image)[..., None]
    return np.array(image.convert("RGB"))


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Bring odd modes to ones that convert to RGB without clipping or warnings."""
    if image.mode.startswith("I"):  # 16-bit greyscale, which Pillow would clip at 255
        wide = np.clip(np.array(image, np.int64), 0, 65535)
        return Image.fromarray(np.round(wide / 257.0).astype(np.uint8))
    return image.convert("RGBA") if image.has_transparency_data else image
