"""Reads latent-diffusion models, CompVis checkpoints and diffusers folders, into our trees.

Trees are those of lfp_jax/generators/first_stage.py and unet.py: float32, NHWC, kernels HWIO.
Nothing in a file is run (see pickles.py and safetensors.py). Every tensor of a network is used or
is an error; tensors of other networks (text encoders, losses) are left alone by name.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lfp_jax import files
from lfp_jax.errors import UserError, brief, did_you_mean
from lfp_jax.weights import (
    compvis,
    diffusers,
    hyperparameters,
    latent_tables,
    pickles,
    safetensors,
    tables,
)

_MODEL = "latent diffusion model"
_UNET_PREFIXES = ("model.diffusion_model.", "")
_FIRST_PREFIXES = ("first_stage_model.", "")
_CODEBOOK = "quantize.embedding.weight"
# Parts of a checkpoint that are no part of the generator, and buffers that follow from the betas.
_OTHER = re.compile(
    r"(cond_stage_model|loss|first_stage_model\.loss)\..*|model_ema\.(decay|num_updates)|"
    r"(sqrt_|log_|posterior_)\w+|betas|alphas_cumprod(_prev)?|logvar|lvlb_weights|cond_ids|"
    r"scale_factor"
)
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_SCHEDULES = {
    "linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine", "sqrt": "sqrt",
}  # fmt: skip
_PREDICTIONS = {"eps": "noise", "v": "velocity", "x0": "image"}


@dataclass(frozen=True)
class Checkpoint:
    """A latent-diffusion model as numpy arrays; what a file lacks is None."""

    first_stage: dict | None  # {"encoder", "decoder", "codebook"}: what there is of it
    first_stage_hparams: dict | None
    unet: dict | None
    unet_hparams: dict | None
    diffusion: dict  # settings of schedule and sampler, see generators/diffusion.py
    alphas_cumprod: np.ndarray | None  # [timesteps], where the file has them
    scale_factor: float
    shift: float
    size: int | None  # height and width of latents
    source: str  # "compvis" or "diffusers"
    sha256: str = field(default="")


def read(path, *, hparams=None, ema=True):
    """Read a latent-diffusion model.

    Args:
        path: a CompVis .ckpt (or the same tensors as .safetensors), or a diffusers folder.
        hparams: CompVis: the hyperparameters, instead of the YAML file beside the checkpoint;
            diffusers: only {"scale_factor": ...}.
        ema: take the averaged UNet where a checkpoint has one.

    Returns:
        A Checkpoint.

    Raises:
        UserError: the file is missing, damaged, hostile or another architecture; a tensor is
            missing, unknown or of another shape; a hyperparameter is missing or impossible.
    """
    if os.path.isdir(path):
        return _read_folder(path, hparams or {})
    content = safetensors.read(path) if safetensors.is_safetensors(path) else pickles.read(path)
    return convert(content, path, hparams=hparams, ema=ema)


def holds(content):
    """Tell whether the content of a file looks like a latent-diffusion checkpoint."""
    if not isinstance(content, dict):
        return False
    state = _state(content)
    return any(_prefix(state, *part) is not None for part in (_UNET_PART, _FIRST_PART))


_UNET_PART = (_UNET_PREFIXES, ("input_blocks.", "time_embed."))
_FIRST_PART = (_FIRST_PREFIXES, ("decoder.", "post_quant_conv."))


def _state(content):
    inner = content.get("state_dict")
    return inner if isinstance(inner, dict) else content


def _prefix(state, prefixes, starts):
    """Return the prefix under which a network's tensors stand, or None if there are none."""
    for prefix in prefixes:
        wanted = tuple(prefix + start for start in starts)
        if any(isinstance(name, str) and name.startswith(wanted) for name in state):
            return prefix
    return None


def convert(content, path, *, hparams=None, ema=True):
    """Turn the content of a CompVis checkpoint into a Checkpoint; see `read`."""
    if not holds(content):
        raise UserError(f"'{path}' holds no {_MODEL}: neither a UNet nor a first stage.")
    state = _state(content)
    parts = hyperparameters.sections(hyperparameters.beside(path) if hparams is None else hparams)
    unet_prefix, first_prefix = _prefix(state, *_UNET_PART), _prefix(state, *_FIRST_PART)
    _refuse_strangers(state, (unet_prefix, first_prefix), path)
    diffusion = parts["diffusion"]
    size, unet, unet_sizes = diffusion["image_size"], None, None
    if unet_prefix is not None:
        unet, unet_sizes = _compvis_unet(state, unet_prefix, parts["unet"], path, size, ema=ema)
        size = size or unet_sizes["size"]
    first, first_sizes = None, None
    if first_prefix is not None:
        lone = ema and unet is None
        given = parts["first_stage"]
        first, first_sizes = _compvis_first(state, first_prefix, given, path, size, ema=lone)
    return Checkpoint(
        first_stage=first,
        first_stage_hparams=first_sizes,
        unet=unet,
        unet_hparams=unet_sizes,
        diffusion=compvis_diffusion(diffusion),
        alphas_cumprod=_buffer(state, "alphas_cumprod", (diffusion["timesteps"],), path),
        scale_factor=_scale_factor(state, diffusion, path),
        shift=0.0,
        size=size,
        source="compvis",
        sha256=_sha256([path]),
    )


def _refuse_strangers(state, prefixes, path):
    known = tuple(prefix for prefix in prefixes if prefix)
    strangers = [
        name
        for name in state
        if not (isinstance(name, str) and (name.startswith(known) or _OTHER.fullmatch(name)))
        and not (isinstance(name, str) and name.startswith("model_ema."))
    ]
    if "" not in prefixes and strangers:
        raise UserError(
            f"'{path}' has entries with no place in a {_MODEL}: {tables.some(strangers)}."
        )


def _part(state, prefix):
    """The tensors of a network; at the top level all but those known to be something else."""
    return {
        name: x
        for name, x in state.items()
        if isinstance(name, str)
        and name.startswith(prefix)
        and not _OTHER.fullmatch(name)
        and not name.startswith("model_ema.")
    }


def _averaged(state, tensors, owner, path):
    """Replace tensors by their running averages, whose names have no dots.

    Args:
        state: the whole state dict.
        tensors: the network's tensors, by full name.
        owner: the part of the name above the module that was averaged, e.g. "model.".
        path: the file, for messages.
    """
    averages = {
        name: x
        for name, x in state.items()
        if isinstance(name, str) and name.startswith("model_ema.") and not _OTHER.fullmatch(name)
    }
    if not averages:
        return tensors
    names = {name: "model_ema." + name.removeprefix(owner).replace(".", "") for name in tensors}
    missing = [theirs for theirs in names.values() if theirs not in averages]
    strangers = [name for name in averages if name not in set(names.values())]
    strangers = [name for name in strangers if not name.startswith("model_ema.loss")]
    if missing or strangers or len(set(names.values())) != len(names):
        what = "lacks the averages" if missing else "has averages of no tensor"
        some = tables.some(missing or strangers)
        raise UserError(
            f"'{path}' {what}: {some}. Read it with ema=False for the weights as trained."
        )
    return {name: averages[theirs] for name, theirs in names.items()}


def _compvis_unet(state, prefix, given, path, size, *, ema):
    tensors = _part(state, prefix)
    if ema:
        tensors = _averaged(state, tensors, "model.", path)
    sizes, order = compvis.unet(given, tensors=tensors, prefix=prefix, what=f"'{path}'", size=size)
    rows = latent_tables.rows(
        latent_tables.unet(sizes),
        names=compvis.unet_names(sizes, prefix=prefix),
        style=latent_tables.OPENAI[order],
        tensors=tensors,
        root="",
    )
    return tables.convert(tensors, rows, what=f"'{path}'", model="UNet"), sizes


def _compvis_first(state, prefix, given, path, size, *, ema):
    tensors, what = _part(state, prefix), f"'{path}'"
    if ema:
        tensors = _averaged(state, tensors, "", path)
    sizes = compvis.first_stage(given, tensors=tensors, prefix=prefix, what=what, size=size)

    def name(place, network):
        return compvis.first_stage_name(place, network=network, prefix=prefix)

    style = latent_tables.FIRST_STAGE
    return _first_stage(tensors, sizes, name, style, prefix, what), sizes


def _first_stage(tensors, sizes, name, style, prefix, what):
    """Convert a first stage; a file may leave the encoder out."""
    rows, networks = [], {"decoder": latent_tables.decoder(sizes)}
    if any(key.startswith((f"{prefix}encoder.", f"{prefix}quant_conv.")) for key in tensors):
        networks["encoder"] = latent_tables.encoder(sizes)
    for network, layers in networks.items():
        names = {layer.place: name(layer.place, network) for layer in layers}
        rows += latent_tables.rows(
            layers, names=names, style=style, tensors=tensors, root=f"{network}/"
        )
    if sizes["kind"] == "vq":
        shape = (sizes["codes"], sizes["latent_channels"])
        rows.append(tables.Row(prefix + _CODEBOOK, shape, "codebook"))
    return tables.convert(tensors, rows, what=what, model="first stage")


def compvis_diffusion(given):
    """Turn CompVis' hyperparameters of the diffusion into settings; see generators/diffusion.py.

    Raises:
        UserError: a schedule or parameterization that is not known.
    """
    for key, known in (("beta_schedule", _SCHEDULES), ("parameterization", _PREDICTIONS)):
        if given[key] not in known:
            raise UserError(did_you_mean(given[key], list(known), key))
    return {
        "schedule": _SCHEDULES[given["beta_schedule"]],
        "beta_start": float(given["linear_start"]),
        "beta_end": float(given["linear_end"]),
        "cosine_offset": float(given["cosine_s"]),
        "timesteps": given["timesteps"],
        "prediction": _PREDICTIONS[given["parameterization"]],
        "spacing": "range",
        "offset": 1,
        "end_at_one": False,
    }


def _buffer(state, name, shape, path):
    if name not in state:
        return None
    rows = [tables.Row(name, shape, "value")]
    return tables.convert({name: state[name]}, rows, what=f"'{path}'", model=_MODEL)["value"]


def _scale_factor(state, diffusion, path):
    """The factor of latents: measured in training and stored, else a hyperparameter."""
    stored = _buffer(state, "scale_factor", (), path)
    if stored is None and diffusion["scale_by_std"]:
        raise UserError(f"'{path}' lacks 'scale_factor', which scale_by_std puts there.")
    return _positive(diffusion["scale_factor"] if stored is None else float(stored))


def _positive(factor):
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < np.inf:
        raise UserError(f"scale_factor must be a number above 0; got {brief(factor)}.")
    return float(factor)


def _read_folder(path, hparams):
    """Read a diffusers folder: one model, or a pipeline with its models in folders below."""
    unknown = [key for key in hparams if key != "scale_factor"]
    if unknown:
        raise UserError(
            f"A diffusers folder takes only the hyperparameter scale_factor; got {brief(unknown)}."
        )
    models = _models(path)
    first = next((m for m in models if m[0]["_class_name"] in diffusers.FIRST_STAGES), None)
    unet = next((m for m in models if m[0]["_class_name"] in diffusers.UNETS), None)
    scale, shift = 1.0, 0.0
    if first and unet:
        # Alone a first stage is what its own code computes; the factor is a pipeline's.
        scale, shift = diffusers.scaling(first[0], what=f"'{first[1]}'")
    scale = _positive(hparams.get("scale_factor", scale))
    made: dict[str, Any] = {}
    weights = []
    for name, model, reader in (("first_stage", first, _hub_first), ("unet", unet, _hub_unet)):
        tree, sizes = None, None
        if model:
            tensors, file = _hub_tensors(model[1])
            tree, sizes = reader(tensors, model[0], file)
            weights.append(file)
        made |= {name: tree, f"{name}_hparams": sizes}
    scheduler = _scheduler(path)
    return Checkpoint(
        **made,
        diffusion=diffusers.diffusion(scheduler, what=f"The scheduler of '{path}'"),
        alphas_cumprod=None,
        scale_factor=scale,
        shift=shift,
        size=made["unet_hparams"]["size"] if unet else None,
        source="diffusers",
        sha256=_sha256(weights),
    )


def _models(path):
    """Find the models: list of (config, folder)."""
    folders = [path, *sorted(entry.path for entry in os.scandir(path) if entry.is_dir())]
    found, others = [], []
    for folder in folders:
        file = os.path.join(folder, "config.json")
        if not os.path.isfile(file):
            continue
        config = hyperparameters.settings(file, json.loads, json.JSONDecodeError)
        kind = config.get("_class_name")
        if kind in diffusers.FIRST_STAGES + diffusers.UNETS:
            found.append((config, folder))
        else:
            others.append(kind)
    if not found:
        known = ", ".join(diffusers.FIRST_STAGES + diffusers.UNETS)
        there = f"; it has {tables.some(others)}" if others else ""
        raise UserError(f"'{path}' holds no model that is known here ({known}){there}.")
    return found


def _scheduler(path):
    for folder in (path, os.path.join(path, "scheduler")):
        file = os.path.join(folder, "scheduler_config.json")
        if os.path.isfile(file):
            return hyperparameters.settings(file, json.loads, json.JSONDecodeError)
    return {}


def _hub_tensors(folder):
    """Read a model's weights: the tensors and the file's path."""
    found = [name for name in _WEIGHTS if os.path.isfile(os.path.join(folder, name))]
    if not found:
        found = [n for n in sorted(os.listdir(folder)) if n.endswith(".safetensors")]
        if len(found) != 1:
            raise UserError(f"'{folder}' has no {_WEIGHTS[0]} (or {_WEIGHTS[1]}).")
    file = os.path.join(folder, found[0])
    content = pickles.read(file) if file.endswith(".bin") else safetensors.read(file)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"'{file}' holds no tensors by name.")
    return content, file


def _hub_first(tensors, config, file):
    sizes = diffusers.first_stage(config, what=f"'{os.path.dirname(file)}/config.json'")
    levels = len(sizes["channels"])

    def name(place, network):
        return diffusers.first_stage_name(place, network=network, levels=levels)

    style = diffusers.style(tensors)
    return _first_stage(tensors, sizes, name, style, "", f"'{file}'"), sizes


def _hub_unet(tensors, config, file):
    sizes = diffusers.unet(config, what=f"'{os.path.dirname(file)}/config.json'")
    layers = latent_tables.unet(sizes)
    names = {layer.place: diffusers.unet_name(layer.place, sizes=sizes) for layer in layers}
    rows = latent_tables.rows(
        layers, names=names, style=diffusers.style(tensors), tensors=tensors, root=""
    )
    return tables.convert(tensors, rows, what=f"'{file}'", model="UNet"), sizes


def _sha256(paths):
    """The SHA-256 of a file; of several, that of their hashes one after another."""
    hashes = [files.sha256(path) for path in paths]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
