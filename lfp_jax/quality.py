"""How good a generator's images are, plain and fingerprinted: Fréchet distances to a reference.

The reference of the demos is the held-out pictures; that of another generator a second set of its
own plain images, so that the distance of plain ones is then its floor. Images are of 8 bits, and
their features those of the demo's classifier.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np

from lfp_jax import basis, design, images, logs, seeds
from lfp_jax.generators import zoo
from lfp_jax.metrics import distances, features

_BATCH = 64
_DRAWS = 100  # bootstrap draws of a distance


@dataclasses.dataclass(frozen=True)
class Reference:
    """What images of one generator are compared to."""

    latents: np.ndarray  # [n, ...], fresh ones
    moments: tuple[np.ndarray, np.ndarray]  # mean [f] and covariance [f, f] of the features
    name: str
    plain: dict[str, Any] | None = None  # distance of the plain images of the latents


def reference(generator, n, *, seed, spread):
    """Make the reference of a generator, and measure its plain images by it.

    Args:
        generator: a frozen generator.
        n: images behind each distance.
        seed: of the experiment.
        spread: calls a function of rows' indices for all of them, as `sharding.spread`.
    """
    draw = partial(basis.sample, seeds.key(seed, seeds.QUALITY), generator, n)
    if generator.name in zoo.BUNDLED:
        moments, name = features.load_reference(), "held-out pictures"
    else:
        rows = _features_of_all(generator, draw(start=n), spread)
        moments, name = distances.moments(rows), "other plain images"
    made = Reference(draw(), moments, name)
    plain = distance(generator, made.latents, made, seed=seed, spread=spread)
    return dataclasses.replace(made, plain=plain)


def distance(generator, latents, reference, *, seed, spread):
    """Measure the Fréchet distance of the images of latents [n, ...] to a Reference.

    Args:
        generator, seed, spread: as of `reference`.
        latents: flat or not.
        reference: of the same generator.

    Returns:
        {"value", "low", "high", "features", "reference", "images"}, the interval over bootstrap
        draws.
    """
    rows, key = _features_of_all(generator, latents, spread), seeds.key(seed, seeds.BOOTSTRAP)
    found = distances.frechet_interval(rows, reference.moments, key=key, draws=_DRAWS)
    about = {"features": features.NAME, "reference": reference.name, "images": len(rows)}
    return {"value": found.value, "low": found.low, "high": found.high} | about


def _features_of_all(generator, latents, spread):
    return spread(lambda rows: _features(generator, latents[rows]), len(latents))


def _features(generator, latents):
    """Features [n, f] of the images of latents, from 8 bits."""
    classifier, n, parts = features.load_classifier(), len(latents), []
    with logs.Progress(n, label="distance") as progress:
        for start in range(0, n, _BATCH):
            made = images.to_uint8(design.decode(generator, latents[start : start + _BATCH]))
            parts.append(features.features_in_batches(classifier, _fit(made), batch=_BATCH))
            progress.update(min(start + _BATCH, n))
    return np.concatenate(parts)


def _fit(u8):
    """Bring images to the size and channels the demo's features take."""
    u8 = np.repeat(u8, 3, axis=-1) if u8.shape[-1] == 1 else u8
    size = (features.SIZE, features.SIZE)
    if u8.shape[1:3] == size:
        return u8
    resized = jax.image.resize(u8.astype(np.float32), (len(u8), *size, 3), "bilinear")
    return np.clip(np.round(resized), 0, 255).astype(np.uint8)
