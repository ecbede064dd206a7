"""What the generators' trainers leave behind: grids, distances to held-out pictures, hashes."""

import hashlib
import os

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview

from lfp_jax import images as image_files
from lfp_jax.errors import UserError
from lfp_jax.logs import read_lines, write_file
from lfp_jax.metrics import distances, features
from lfp_jax.report import plots
from lfp_jax.training import data as faces

LICENCE = (
    "Apache-2.0; trained on faces of the DiceBear style toon-head, a remix of 'Toon Head' by "
    "Johan Melin, licensed under CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/)."
)
_COLUMNS = 8  # of a grid


def check_distance(size, *, fd_every, fd_images):
    """Check that a distance can be measured on images [H, W, C] = `size`.

    Raises:
        UserError: too few images, or `fd_every` for a size that the features do not take.
    """
    if fd_every and not measurable(size):
        raise UserError(
            f"fd_every needs images of {features.SIZE}x{features.SIZE}x3, which the "
            f"{features.NAME} takes; got {'x'.join(map(str, size))}. Set fd_every=0."
        )
    if (fd_every and fd_images < 2) or fd_images == 1:
        raise UserError(f"A distance needs fd_images >= 2; got {fd_images}.")


def load_pixels(data, split, *, resolution):
    """Read the pictures of a split: uint8 [n, resolution, resolution, 3].

    Raises:
        UserError: no picture folder, or pictures of another size.
    """
    pixels, _ = faces.load_split(data, split)
    if pixels.shape[1:3] != (resolution, resolution):
        height, width = pixels.shape[1:3]
        raise UserError(f"The pictures in '{data}' are {height}x{width}; resolution={resolution}.")
    return pixels


def write_parameters(folder, networks):
    """Write parameters.txt: each parameter of some networks, {name: params}, with its size."""
    overview = parameter_overview.get_parameter_overview(networks, include_stats=False)
    write_file(os.path.join(folder, "parameters.txt"), f"{overview}\n")


def write_grid(workdir, made, *, images):
    """Write float images [n, H, W, 3] in [-1, 1] as a sheet named after the images trained on."""
    path = os.path.join(workdir, f"samples-{images:08d}.png")
    image_files.write_png(path, image_files.grid(made, columns=_COLUMNS))


def frechet(key, draw, n, *, draws=0):
    """Measure the distance of n 8-bit images to the held-out pictures.

    Args:
        key: of the interval.
        draw: function of a global index -> float images [m, 64, 64, 3] from there on, as many as
            it likes; what is over n is dropped.
        n: images.
        draws: of the bootstrap; 0 for no interval.

    Returns:
        {"value", "low" and "high" if there are draws, "features", "reference", "images"}.
    """
    classifier = features.load_classifier()
    parts, count = [], 0
    while count < n:
        made = image_files.to_uint8(np.asarray(draw(count)))
        parts.append(features.features_in_batches(classifier, made, batch=len(made)))
        count += len(made)
    rows, reference = np.concatenate(parts)[:n], features.load_reference()
    note = {"features": features.NAME, "reference": "held-out pictures", "images": n}
    if not draws:
        return {"value": distances.frechet(*distances.moments(rows), *reference), **note}
    found = distances.frechet_interval(rows, reference, key=key, draws=draws)
    return {"value": found.value, "low": found.low, "high": found.high, **note}


def round_to_float16(params):
    """Round parameters to what a store in float16 keeps of them, as float32."""
    return jax.tree.map(lambda x: jnp.float32(np.float16(x)), params)


def hash_leaves(generator):
    """Compute the SHA-256 over a generator's leaves, in float32."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(generator):
        digest.update(np.asarray(leaf, np.float32).tobytes())
    return digest.hexdigest()


def measurable(size):
    """Tell whether the features of a distance take images [H, W, C] = `size`."""
    return tuple(size) == (features.SIZE, features.SIZE, 3)


def write_curve(folder, training, **options):
    """Draw curve.png of the log.jsonl in a folder.

    Args:
        folder: that of the run.
        training: {"images": seen, "fd": the last distance, where there is one}.
        **options: of `plots.training_curve`.
    """
    path = os.path.join(folder, "log.jsonl")
    lines = read_lines(path) if os.path.exists(path) else []
    if "fd" in training:
        lines.append({"images": training["images"], "fd": training["fd"]["value"]})
    path = os.path.join(folder, "curve.png")
    plots.training_curve(path, lines, features=features.NAME, **options)
