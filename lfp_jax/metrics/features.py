"""The demo's image features: a small attribute classifier of the 64x64 avatar faces.

Its pooled features give the Fréchet distance ("FD, demo classifier") and a perceptual loss. Images
are float32 [n, 64, 64, 3], nominally in [-1, 1]; computed in float32 at HIGHEST precision.
"""

import dataclasses
from collections.abc import Callable
from importlib import resources
from typing import Any, cast

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lfp_jax import images as image_files
from lfp_jax.errors import UserError
from lfp_jax.weights import store

NAME = "demo classifier"  # what reports call these features
SIZE = 64
WIDTHS = (24, 48, 96, 128)  # channels at 32x32, 16x16, 8x8, 4x4; the last are the features
_HE = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")

Choices = tuple[tuple[str, tuple[str, ...]], ...]
Network = Callable[[Any, jax.Array], jax.Array]  # (model, images [n, H, W, C]) -> [n, f]


class FeatureNet(nn.Module):
    """Four levels of 3x3 convolutions, then the mean over places: [n, 64, 64, 3] -> [n, 128].

    Halving folds 2x2 places into channels, with no loss, where strided convolutions would train at
    half as many operations a second on CPU (measured). SiLU is smooth, so that losses on the
    features descend well.
    """

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Compute the features of a batch."""
        x = images
        for i, width in enumerate(WIDTHS):
            x = _fold(x)
            if i > 0:
                mix = nn.Dense(width, precision="highest", kernel_init=_HE, name=f"mix{i}")
                x = nn.silu(mix(x))
            conv = nn.Conv(width, (3, 3), precision="highest", kernel_init=_HE, name=f"conv{i}")
            x = nn.silu(conv(x))
        return x.mean(axis=(1, 2))


def _fold(x: jax.Array) -> jax.Array:
    """Fold 2x2 places into channels: [n, h, w, c] -> [n, h/2, w/2, 4c]."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, height // 2, width // 2, 4 * channels)


@flax.struct.dataclass
class Classifier:
    """A frozen classifier; its leaves are its params, so it goes into jit as an argument."""

    params: dict[str, Any]  # {"net": conv0, mix1, conv1 .., "head": {"kernel" [f, c], "bias" [c]}}
    scale: jax.Array  # [], of the features: their mean variance over pictures is 1 after training
    choices: Choices = flax.struct.field(pytree_node=False)  # ((attribute, its values), ...)


def init(key: jax.Array, *, choices: dict[str, list[str]]) -> Classifier:
    """Make an untrained classifier.

    Args:
        key: random key.
        choices: {attribute: names of its values}, in label order.
    """
    names = tuple((name, tuple(values)) for name, values in choices.items())
    outputs = sum(len(values) for _, values in names)
    net = FeatureNet().init(key, jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    head = {"kernel": jnp.zeros((WIDTHS[-1], outputs)), "bias": jnp.zeros(outputs)}
    return Classifier(params={"net": net, "head": head}, scale=jnp.ones(()), choices=names)


def save(
    path: str,
    classifier: Classifier,
    metadata: dict[str, Any],
    *,
    reference: tuple[np.ndarray, np.ndarray],
) -> None:
    """Write a classifier to the native store, in float16.

    Args:
        path: the folder to make.
        classifier: the classifier.
        metadata: how it was made, JSON-able.
        reference: mean [f] and covariance [f, f] of the features of the reference pictures; kept
            in float32, so that distances to them need no pictures.
    """
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), classifier.params)
    mean, covariance = (np.asarray(part, np.float32) for part in reference)
    tree = {
        "params": params,
        "scale": np.float32(classifier.scale),
        "reference": {"mean": mean, "covariance": covariance},
    }
    store.save(path, tree, {**metadata, "choices": [list(c) for c in classifier.choices]})


def round_to_float16(classifier: Classifier) -> Classifier:
    """Round the params to what `save` keeps of them, as float32."""
    params = jax.tree.map(lambda leaf: jnp.float32(np.float16(leaf)), classifier.params)
    return dataclasses.replace(classifier, params=params)


def standardize(classifier: Classifier, pooled: np.ndarray) -> Classifier:
    """Scale the features so that their mean variance is 1: distances then have a known size.

    Args:
        classifier: the classifier; what it says of an image stays the same.
        pooled: its features [n, f] of many pictures.
    """
    factor = 1.0 / np.sqrt(np.asarray(pooled, np.float64).var(axis=0).mean())
    head = dict(classifier.params["head"], kernel=classifier.params["head"]["kernel"] / factor)
    params = dict(classifier.params, head=head)
    scale = jnp.float32(classifier.scale * factor)
    return dataclasses.replace(classifier, params=params, scale=scale)


def load_classifier(*, path: str | None = None) -> Classifier:
    """Read a classifier, as float32.

    Args:
        path: a folder that `save` made; default the one that ships with the package.

    Raises:
        UserError: the folder is missing, damaged, or holds something else.
    """
    tree, choices = _load(path)
    with store.taken_apart(path, "attribute classifier"):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree["params"])
        return Classifier(params=params, scale=jnp.asarray(tree["scale"]), choices=choices)


def load_reference(*, path: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read mean [f] and covariance [f, f] of the features of the held-out pictures, float64.

    Args:
        path: a folder that `save` made; default the one that ships with the package.

    Raises:
        UserError: the folder is missing, damaged, or holds something else.
    """
    reference = _load(path)[0]["reference"]
    with store.taken_apart(path, "statistics of features"):
        return reference["mean"].astype(np.float64), reference["covariance"].astype(np.float64)


def _load(path: str | None) -> tuple[dict[str, Any], Choices]:
    if path is None:
        path = str(resources.files("lfp_jax") / "assets" / "demo-classifier")
    tree, metadata = store.load(path)
    if "choices" not in metadata or set(tree) != {"params", "scale", "reference"}:
        raise UserError(f"'{path}' holds no attribute classifier.")
    with store.taken_apart(path, "attribute classifier"):
        return tree, tuple((name, tuple(values)) for name, values in metadata["choices"])


@jax.jit
def features(classifier: Classifier, images: jax.Array) -> jax.Array:
    """Compute features [n, 128] of images [n, 64, 64, 3] in [-1, 1]; differentiable.

    Raises:
        UserError: the images are of another size.
    """
    if images.ndim != 4 or images.shape[1:] != (SIZE, SIZE, 3):
        raise UserError(
            f"The {NAME} takes images [n, {SIZE}, {SIZE}, 3]; got {list(images.shape)}."
        )
    pooled = FeatureNet().apply({"params": classifier.params["net"]}, images)
    return classifier.scale * cast(jax.Array, pooled)


@jax.jit
def logits(classifier: Classifier, images: jax.Array) -> dict[str, jax.Array]:
    """Compute {attribute: logits [n, values]} of images [n, 64, 64, 3] in [-1, 1]."""
    head = classifier.params["head"]
    pooled = features(classifier, images)
    joint = jnp.einsum("nf,fc->nc", pooled, head["kernel"], precision="highest")
    joint = joint + head["bias"][None]
    ends = np.cumsum([len(values) for _, values in classifier.choices])
    parts = jnp.split(joint, ends[:-1], axis=1)
    return {name: part for (name, _), part in zip(classifier.choices, parts, strict=True)}


def attributes(classifier: Classifier, images: np.ndarray) -> dict[str, np.ndarray]:
    """Say what is on the images: {attribute: most likely label, int [n]}.

    The names of the labels are in `classifier.choices`.
    """
    return {name: np.argmax(part, -1) for name, part in logits(classifier, images).items()}


def features_in_batches(
    classifier: Classifier, images: np.ndarray, *, batch: int = 256
) -> np.ndarray:
    """Compute the features of many images, a batch at a time.

    Args:
        classifier: the classifier.
        images: host array [n, 64, 64, 3], uint8 or float in [-1, 1].
        batch: images at once; bounds the memory.

    Returns:
        float32 [n, 128].
    """
    return in_batches(features, classifier, images, batch=batch)


def in_batches(network: Network, model: Any, images: np.ndarray, *, batch: int) -> np.ndarray:
    """Apply a feature network to many images, a batch at a time.

    Args:
        network: (model, images [batch, H, W, C] in [-1, 1]) -> features [batch, f]. It sees no
            other number of images where there are more than one batch: it is compiled once.
        model: the network's params.
        images: host array [n, H, W, C], uint8 or float in [-1, 1], n at least 1.
        batch: images at once; bounds the memory.

    Returns:
        float32 [n, f].
    """
    rows = []
    for start in range(0, len(images), batch):
        chunk = images[start : start + batch]
        count = len(chunk)
        if start and count < batch:
            chunk = np.concatenate([chunk, np.repeat(chunk[-1:], batch - count, axis=0)])
        chunk = image_files.from_uint8(chunk) if chunk.dtype == np.uint8 else chunk
        rows.append(np.asarray(network(model, jnp.asarray(chunk)))[:count])
    return np.concatenate(rows)
