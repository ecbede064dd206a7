"""Trains the demo's attribute classifier, whose features measure the demo generators."""

import os
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lfp_jax import images as image_files
from lfp_jax import logs, sharding
from lfp_jax.metrics import distances, features
from lfp_jax.training import data as pictures
from lfp_jax.training.steps import from_uint8

_LOG_EVERY = 50
_CHUNK = 256  # pictures at once when measuring; bounds the memory
_NOTE = (
    "Trained on faces of the DiceBear style toon-head, a remix of 'Toon Head' by Johan Melin, "
    "licensed under CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/)."
)


def train(
    *,
    data: str,
    workdir: str | os.PathLike,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> dict[str, Any]:
    """Train the classifier and measure it on the held-out pictures.

    Args:
        data: folder that toon_head.mjs wrote.
        workdir: gets `demo-classifier` (float16 weights), `log.jsonl` and `metrics.json`.
        steps: gradient steps.
        batch_size: pictures a step; must divide by the number of devices.
        learning_rate: of Adam, at its highest; it falls to zero along a cosine.
        seed: of weights, order of pictures and augmentation.

    Returns:
        What `metrics.json` holds: held-out accuracy of each attribute, and the Fréchet distance of
        training to held-out pictures.

    Raises:
        UserError: the folder is missing or not complete, or the batch does not fit the devices.
    """
    # Input.
    begin = time.monotonic()
    images, labels = pictures.load_split(data, "train")
    held_out, truth = pictures.load_split(data, "held_out")
    choices = pictures.read_choices(data)

    # Model and optimiser, the same on each device.
    mesh = sharding.mesh()
    key_init, key_steps, key_measure = jax.random.split(jax.random.key(seed), 3)
    classifier = features.init(key_init, choices=choices)
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    optimizer = optax.adam(schedule)
    state = sharding.replicate(mesh, (classifier, optimizer.init(classifier.params)))

    # Training.
    log = logs.MetricLog(os.path.join(workdir, "log.jsonl"))
    log.truncate(0)  # a run starts from the beginning
    with logs.Progress(steps * batch_size, label="classifier") as progress:
        for step in range(steps):
            index = pictures.batch_indices(seed, len(images), batch=batch_size, step=step)
            batch = (images[index], {name: label[index] for name, label in labels.items()})
            key = jax.random.fold_in(key_steps, step)
            state, loss = _update(key, state, *sharding.shard(mesh, batch), optimizer=optimizer)
            if (step + 1) % _LOG_EVERY == 0 or step + 1 == steps:
                log.write(step + 1, loss=float(loss))
                progress.update((step + 1) * batch_size, loss=float(loss))

    # What ships is float16 with features of unit variance: measure that.
    classifier = jax.device_get(state[0])
    pooled = features.features_in_batches(classifier, images[: len(held_out)])
    classifier = features.round_to_float16(features.standardize(classifier, pooled))
    metrics, reference = measure(
        key_measure, classifier, seen=images[: len(held_out)], held_out=held_out, truth=truth
    )
    metrics["seconds"] = {"value": round(time.monotonic() - begin, 1)}
    settings: dict[str, float] = {"steps": steps, "batch_size": batch_size, "seed": seed}
    settings["learning_rate"] = learning_rate
    metadata = {"note": _NOTE, "settings": settings, "metrics": metrics}
    path = os.path.join(workdir, "demo-classifier")
    features.save(path, classifier, metadata, reference=reference)
    logs.write_json(os.path.join(workdir, "metrics.json"), metrics)
    return metrics


def measure(
    key: jax.Array,
    classifier: features.Classifier,
    *,
    seen: np.ndarray,
    held_out: np.ndarray,
    truth: dict[str, np.ndarray],
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    """Measure accuracy, and the distance of training to held-out pictures.

    No generator can be asked for a distance below that floor.

    Args:
        key: random key, for the interval.
        classifier: the classifier.
        seen: uint8 training pictures [n, 64, 64, 3].
        held_out: uint8 held-out pictures [m, 64, 64, 3].
        truth: labels of those, {attribute: int [m]}.

    Returns:
        {"accuracy": ..., "fd_floor": ...}, and mean and covariance of the held-out features.
    """
    found = features.features_in_batches(classifier, held_out)
    floor = distances.frechet_interval(
        features.features_in_batches(classifier, seen), found, key=key, draws=20
    )
    metrics = {
        "accuracy": accuracy(classifier, held_out, truth),
        "fd_floor": {
            "value": floor.value, "low": floor.low, "high": floor.high,
            "features": features.NAME, "images": len(seen), "reference_images": len(held_out),
        },
    }  # fmt: skip
    return metrics, distances.moments(found)


def accuracy(
    classifier: features.Classifier, images: np.ndarray, labels: dict[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """Measure the share of right labels: {attribute: {"value", "images"}}.

    Args:
        classifier: the classifier.
        images: uint8 [n, 64, 64, 3].
        labels: {attribute: int [n]}.
    """
    right = dict.fromkeys(labels, 0)
    for start in range(0, len(images), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        found = features.attributes(classifier, image_files.from_uint8(images[chunk]))
        for name in right:
            right[name] += int((found[name] == labels[name][chunk]).sum())
    return {name: {"value": n / len(images), "images": len(images)} for name, n in right.items()}


@partial(jax.jit, static_argnames="optimizer", donate_argnames="state")
def _update(key, state, images, labels, *, optimizer):
    """Take a gradient step on uint8 images [n, 64, 64, 3]; returns the new state and the loss."""
    classifier, moments = state
    images = augment(key, images)

    def loss_of(params):
        logits = features.logits(classifier.replace(params=params), images)
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(part, labels[name]).mean()
            for name, part in logits.items()
        ]
        return jnp.mean(jnp.stack(losses))

    loss, gradient = jax.value_and_grad(loss_of)(classifier.params)
    updates, moments = optimizer.update(gradient, moments)
    params = optax.apply_updates(classifier.params, updates)
    return (classifier.replace(params=params), moments), loss


def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Vary pictures mildly: mirror half of them, shift the brightness, add a little noise.

    Args:
        key: random key.
        images: uint8 [n, H, W, 3].

    Returns:
        float32 of the same shape, nominally in [-1, 1].
    """
    key_flip, key_light, key_sigma, key_noise = jax.random.split(key, 4)
    x = from_uint8(images)
    each = (len(images), 1, 1, 1)
    x = jnp.where(jax.random.bernoulli(key_flip, 0.5, each), x[:, :, ::-1], x)
    light = jax.random.uniform(key_light, each, minval=-0.05, maxval=0.05)
    sigma = jax.random.uniform(key_sigma, each, maxval=0.05)
    return x + light + sigma * jax.random.normal(key_noise, x.shape)
