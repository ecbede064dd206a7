"""Reads StyleGAN2 checkpoints of rosinality (.pt) and NVlabs (.pkl) into our parameter trees.

Trees are those of lfp_jax/generators/stylegan2.py: float32, NHWC, kernels HWIO and un-scaled. All
sizes come from the file; nothing in it is run (see pickles.py).
"""

from dataclasses import dataclass

import numpy as np

from lfp_jax import files
from lfp_jax.errors import UserError, did_you_mean
from lfp_jax.weights import nvlabs, pickles, rosinality, tables
from lfp_jax.weights.machine import Opaque, show

_KEYS_SHOWN = 6


@dataclass(frozen=True)
class Checkpoint:
    """A StyleGAN2 as numpy arrays; what a file lacks is None."""

    generator: dict | None  # {"mapping": ..., "synthesis": ...}
    generator_hparams: dict | None
    w_avg: np.ndarray | None  # [w_dim]
    noise: list | None  # of [1, r, r, 1]: the 4 x 4 map, then two a resolution
    discriminator: dict | None
    discriminator_hparams: dict | None
    source: str  # "rosinality" or "nvlabs"
    sha256: str  # of the file


def read(path, *, hparams=None, ema=True):
    """Read a StyleGAN2 checkpoint.

    Args:
        path: a rosinality .pt or an NVlabs .pkl file.
        hparams: overrides of hyperparameters that a file may not tell, e.g. {"mapping_lr": 0.01};
            for generator and discriminator alike.
        ema: take the averaged generator, else the one as trained.

    Returns:
        A Checkpoint.

    Raises:
        UserError: the file is missing, damaged, hostile or another architecture; a tensor is
            missing, unknown or of another shape; an unknown hyperparameter.
    """
    return convert(pickles.read(path), path, hparams=hparams, ema=ema)


def convert(content, path, *, hparams=None, ema=True):
    """Turn the content of a StyleGAN2 checkpoint into a Checkpoint; see `read`."""
    if not isinstance(content, dict):
        raise UserError(f"'{path}' holds no StyleGAN2 but a {type(content).__name__}.")
    source, keys, parts = _parts(content, path)
    wanted, other, discriminator_key = keys if ema else (keys[1], keys[0], keys[2])
    if wanted not in parts and other in parts:
        raise UserError(f"'{path}' has no '{wanted}', only '{other}': read it with ema={not ema}.")
    generator, sizes = {}, None
    if wanted in parts:
        generator, sizes = source.generator(parts[wanted], what=f"'{wanted}' of '{path}'")
        sizes = _override(sizes, hparams or {})
    discriminator, discriminator_sizes = None, None
    if discriminator_key in parts:
        what = f"'{discriminator_key}' of '{path}'"
        discriminator, discriminator_sizes = source.discriminator(
            parts[discriminator_key], what=what
        )
        if sizes is None:
            _override(discriminator_sizes, hparams or {})
        shared = {k: v for k, v in (hparams or {}).items() if k in discriminator_sizes}
        discriminator_sizes = discriminator_sizes | shared
    noise, w_avg = generator.pop("noise", None), generator.pop("w_avg", None)
    if source is rosinality and sizes is not None:
        w_avg = _latent_avg(content, sizes["w_dim"], path)
    return Checkpoint(
        generator=generator or None,
        generator_hparams=sizes,
        w_avg=w_avg,
        noise=noise and [noise[str(i)] for i in range(len(noise))],
        discriminator=discriminator,
        discriminator_hparams=discriminator_sizes,
        source=source.__name__.rsplit(".", 1)[-1],
        sha256=files.sha256(path),
    )


def _parts(content, path):
    """Tell whose file it is: the table module, its three keys, and the networks under them."""
    for source, keys, is_network in (
        (nvlabs, ("G_ema", "G", "D"), _is_module),
        (rosinality, ("g_ema", "g", "d"), _is_state),
    ):
        parts = {key: content[key] for key in keys if is_network(content.get(key))}
        if parts:
            return source, keys, parts
    raise UserError(f"'{path}' holds no StyleGAN2: {_describe(content)}.")


def _latent_avg(content, w_dim, path):
    if content.get("latent_avg") is None:
        return None
    mean = {"latent_avg": content["latent_avg"]}
    rows = [tables.Row("latent_avg", (w_dim,), "latent_avg")]
    return tables.convert(mean, rows, what=f"'{path}'")["latent_avg"]


def _is_module(value):
    return isinstance(value, Opaque) and "_modules" in value.state


def _is_state(value):
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return False
    return any(isinstance(x, np.ndarray) for x in value.values())


def _describe(content):
    if not content:
        return "it is an empty dict"
    keys = [_entry(key, content[key]) for key in list(content)[:_KEYS_SHOWN]]
    text = f"its entries are {', '.join(keys)}{', ...' if len(content) > _KEYS_SHOWN else ''}"
    inner = content.get("state_dict")
    if isinstance(inner, dict) and inner:
        text += f"; its state_dict begins with '{show(next(iter(inner)))}'"
    return text


def _entry(key, value):
    made = f" (a {show(value.name)}, which is never run)" if isinstance(value, Opaque) else ""
    return f"'{show(key)}'{made}"


def _override(sizes, hparams):
    for name in hparams:
        if name not in sizes:
            raise UserError(did_you_mean(name, list(sizes), "hyperparameter"))
    return sizes | hparams
