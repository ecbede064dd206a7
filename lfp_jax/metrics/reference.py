"""Statistics of real images that others are measured against: from a folder, or from a file.

A folder's statistics are computed once for its content and the features, and kept in the cache.
"""

import dataclasses
import hashlib
import os
from typing import Any

import jax
import numpy as np

from lfp_jax import images as image_files
from lfp_jax import sharding
from lfp_jax.errors import UserError
from lfp_jax.logs import Progress
from lfp_jax.metrics import distances, features, inception
from lfp_jax.weights import downloads
from lfp_jax.weights import statistics as files

_VERSION = 1  # of how features are computed: another one leaves kept statistics aside


@dataclasses.dataclass(frozen=True)
class Reference:
    """Mean and covariance of the features of a set of images."""

    mean: np.ndarray  # [f], float64
    covariance: np.ndarray  # [f, f], float64
    images: int | None  # how many; None where a file does not say
    source: str  # the folder or file

    @property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """The two, as `distances.frechet_interval` takes a fixed set."""
        return self.mean, self.covariance


def load(
    source: str | os.PathLike,
    model: Any,
    *,
    network: features.Network = inception.features,
    batch: int = 32,
) -> Reference:
    """Read or compute reference statistics.

    With several processes each takes its share of a folder; all must call this, on the same folder.

    Args:
        source: a folder of images (all below it count); or an .npz file with `mu` and `sigma`,
            whose features must be those of the network.
        model: the network's params, e.g. from `inception.load`.
        network: (model, images [n, H, W, 3] in [-1, 1]) -> features [n, f], at module level.
        batch: images at once.

    Raises:
        UserError: no such file or folder; a damaged file; fewer than two images; a file of another
            number of features than the network's.
    """
    source = os.fspath(source)
    if os.path.isdir(source):
        return _of_folder(source, model, network, batch)
    mean, covariance, count = files.read(source)
    _check_width(source, mean.size, model, network)
    return Reference(mean, covariance, count, source)


def _check_width(source: str, found: int, model: Any, network: features.Network) -> None:
    needed = _width(model, network, (64, 64, 3))
    if found != needed:
        raise UserError(f"'{source}' has statistics of {found} features; needed: {needed}.")


def _width(model: Any, network: features.Network, shape: tuple[int, ...]) -> int:
    """Give the number of features that the network gives for images of a shape."""
    image = jax.ShapeDtypeStruct((1, *shape), np.float32)
    return jax.eval_shape(network, model, image).shape[-1]


def _of_folder(folder: str, model: Any, network: features.Network, batch: int) -> Reference:
    paths = image_files.find(folder)
    if len(paths) < 2:
        raise UserError(f"A reference needs at least 2 images; '{folder}' holds {len(paths)}.")
    kept = downloads.cache_folder("statistics", f"{_key(paths, model, network)}.npz")
    # All or none: were they to differ, some would wait for ever.
    if all(sharding.gather([os.path.isfile(kept)])):
        mean, covariance, count = files.read(kept)
        return Reference(mean, covariance, count, folder)
    own = paths[jax.process_index() :: jax.process_count()]
    width = _width(model, network, image_files.read(paths[0]).shape)
    total = distances.merge_processes(_statistics(own, width, model, network, batch))
    mean, covariance = total.moments
    files.write(kept, mean=mean, covariance=covariance, count=total.count)
    return Reference(mean, covariance, total.count, folder)


def _key(paths: list[str], model: Any, network: features.Network) -> str:
    """Name what the statistics depend on: contents, network, params."""
    digest = hashlib.sha256(image_files.digest(paths).encode())
    digest.update(f"{_VERSION} {network.__module__}.{network.__qualname__}".encode())
    for place, leaf in jax.tree_util.tree_leaves_with_path(model):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(place)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _statistics(
    paths: list[str], width: int, model: Any, network: features.Network, batch: int
) -> distances.Statistics:
    """Gather the statistics of image files; a batch is of images of one size."""
    total = distances.statistics(np.zeros((0, width)))
    batch = max(1, min(batch, len(paths)))
    waiting: list[np.ndarray] = []
    with Progress(len(paths), label="reference") as progress:
        for i, path in enumerate(paths):
            image = image_files.read(path)
            if waiting and (len(waiting) == batch or image.shape != waiting[0].shape):
                total = distances.merge(total, _batch(waiting, model, network, batch))
                waiting = []
                progress.update(i)
            waiting.append(image)
        if waiting:
            total = distances.merge(total, _batch(waiting, model, network, batch))
        progress.update(len(paths))
    return total


def _batch(
    waiting: list[np.ndarray], model: Any, network: features.Network, batch: int
) -> distances.Statistics:
    """Compute the statistics of up to `batch` images, filled up so as to compile once."""
    filled = np.stack(waiting + waiting[-1:] * (batch - len(waiting)))
    rows = features.in_batches(network, model, filled, batch=batch)
    return distances.statistics(rows[: len(waiting)])
