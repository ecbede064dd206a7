"""Hyperparameters of latent-diffusion checkpoints: sorted, checked, read from the file beside one.

They come as the original's YAML gives them, or flat ({"unet": ..., "first_stage": ...}).
"""

import difflib
import os
import re

import numpy as np
import yaml

from lfp_jax.errors import UserError, brief, did_you_mean
from lfp_jax.weights import tables

MOST_BLOCKS = 1000  # of a level, and timesteps below: no network or schedule has as many
MOST_TIMESTEPS = 100_000
_LARGEST = 2**62  # of any other number
_MAX_FILE = 2**20  # bytes of a JSON or YAML file
_FIRST_STAGE = ("embed_dim", "n_embed", "ddconfig")
_DDCONFIG = (
    "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution", "in_channels", "out_ch",
    "z_channels", "double_z", "dropout", "resamp_with_conv", "attn_type", "use_linear_attn",
    "tanh_out", "give_pre_end",
)  # fmt: skip
_UNET = (
    "image_size", "in_channels", "out_channels", "model_channels", "num_res_blocks",
    "attention_resolutions", "channel_mult", "conv_resample", "num_classes", "num_heads",
    "num_head_channels", "num_heads_upsample", "use_scale_shift_norm", "resblock_updown",
    "use_new_attention_order", "use_spatial_transformer", "transformer_depth", "context_dim",
    "legacy",
)  # fmt: skip
# What changes nothing here: training, precision, and where a matrix is stored as a kernel.
_UNET_IGNORED = ("dropout", "use_checkpoint", "use_fp16", "use_bf16", "use_linear_in_transformer")
# What would change the network, with the only value that is supported.
_UNET_FIXED = {
    "dims": 2, "n_embed": None, "disable_self_attentions": None, "num_attention_blocks": None,
    "disable_middle_self_attn": False, "adm_in_channels": None,
}  # fmt: skip
DIFFUSION = {
    "beta_schedule": "linear", "linear_start": 1e-4, "linear_end": 2e-2, "cosine_s": 8e-3,
    "timesteps": 1000, "parameterization": "eps", "scale_factor": 1.0, "scale_by_std": False,
    "image_size": None,
}  # fmt: skip
_DIFFUSION_KINDS = {
    "beta_schedule": str, "parameterization": str, "timesteps": int, "image_size": int,
    "scale_by_std": bool,
}  # fmt: skip
_TOP = (
    *_FIRST_STAGE, *DIFFUSION, "model", "unet", "first_stage", "unet_config", "first_stage_config",
    "use_ema",
)  # fmt: skip


def sections(hparams):
    """Sort hyperparameters of any supported form.

    Args:
        hparams: a dict: the original's YAML, its model.params, or flat; one network's alone too.

    Returns:
        {"unet": dict, "first_stage": dict, "diffusion": dict}; a part not spoken of is empty.

    Raises:
        UserError: a part is no dict, or an entry looks like a mistyped one.
    """
    top = _dict(hparams, "hparams")
    for outer in ("model", "params"):
        top = _dict(top[outer], outer) if outer in top else top
    unet = _params(top, "unet", "unet_config")
    first = _params(top, "first_stage", "first_stage_config")
    if "model_channels" in top:
        unet = {key: top[key] for key in top if key in _UNET + _UNET_IGNORED or key in _UNET_FIXED}
    elif "ddconfig" in top:
        first = {key: top[key] for key in _FIRST_STAGE if key in top}
    else:
        _refuse_near_misses(top, _TOP)
    _check_unet(unet)
    _refuse_near_misses(_dict(first.get("ddconfig", {}), "ddconfig"), _DDCONFIG)
    given = {key: top[key] for key in DIFFUSION if top.get(key) is not None}
    for key, value in given.items():
        most = MOST_TIMESTEPS if key == "timesteps" else None
        checked(key, value, _DIFFUSION_KINDS.get(key, float), most=most)
    if "model_channels" in top:
        given.pop("image_size", None)
    return {"unet": unet, "first_stage": first, "diffusion": DIFFUSION | given}


def _dict(value, name):
    if not isinstance(value, dict):
        raise UserError(f"'{name}' must be a dict of hyperparameters; got {brief(value)}.")
    return value


def _params(top, name, original):
    found = top[name] if name in top else top.get(original, {})
    found = _dict(found, name)
    return _dict(found["params"], name) if "params" in found else found


def _refuse_near_misses(given, known):
    # The original's files have many entries for training: only what looks mistyped is an error.
    for key in given:
        if key not in known and difflib.get_close_matches(str(key), known, n=1, cutoff=0.85):
            raise UserError(did_you_mean(key, list(known), "hyperparameter"))


def _check_unet(unet):
    for key, value in unet.items():
        if key in _UNET_FIXED:
            if value != _UNET_FIXED[key]:
                raise UserError(
                    f"The UNet option {key}={brief(value)} is not supported, only "
                    f"{_UNET_FIXED[key]}."
                )
        elif key not in _UNET + _UNET_IGNORED:
            raise UserError(did_you_mean(key, list(_UNET), "hyperparameter of the UNet"))


class Reader:
    """Hyperparameters as given, with what the tensors tell where they are silent."""

    def __init__(self, given, tensors, prefix, what):
        self.given, self.tensors, self.prefix, self.what = given, tensors, prefix, what

    def has(self, *names):
        """Tell whether the file has a tensor whose name starts with one of these."""
        wanted = tuple(self.prefix + name for name in names)
        return any(name.startswith(wanted) for name in self.tensors)

    def size(self, name, axis):
        """Return one size of a tensor, or None without it."""
        found = self.tensors.get(self.prefix + name)
        if not isinstance(found, np.ndarray) or found.ndim <= axis:
            return None
        return found.shape[axis]

    def highest(self, pattern):
        """Return the highest number that a pattern finds in the names, or -1."""
        return tables.highest(self.tensors, re.escape(self.prefix) + pattern, what=self.what)

    def get(self, key, inferred, *, kind=int, low=1, most=None):
        """Return a hyperparameter: as given, else as inferred.

        Raises:
            UserError: it is of another kind, or neither given nor in the tensors.
        """
        value = self.given.get(key)
        value = inferred if value is None else value
        if value is None:
            raise UserError(
                f"{self.what} does not tell '{key}': give it by hparams, or in the model's YAML "
                "file beside the checkpoint."
            )
        return checked(key, value, kind, low=low, most=most)

    def sizes(self, key, inferred, *, most=None, least=0):
        """Return a list of at least so many whole numbers as a tuple."""
        value = self.given.get(key)
        value = inferred if value is None else value
        if value is None:
            return self.get(key, None)
        if not isinstance(value, list | tuple) or len(value) < least:
            raise UserError(f"'{key}' must be a list of numbers; got {brief(value)}.")
        return tuple(checked(key, item, int, most=most) for item in value)


def checked(key, value, kind, *, low=1, most=None):
    """Return a hyperparameter, or raise a UserError if it is not of its kind."""
    most = _LARGEST if most is None else most
    allowed = int | float if kind is float else kind
    good = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
    if (
        not good
        or (kind is int and not low <= value <= most)
        or (kind is float and not -most < value < most)
    ):
        to = f" to {most:,}" if good and value > most else ""
        wanted = {
            int: f"a whole number from {low}{to}",
            bool: "True or False",
            str: "a name",
            float: "a number",
        }[kind]
        raise UserError(f"'{key}' must be {wanted}; got {brief(value)}.")
    return value


def divisible(what, widths, *, groups):
    """Check that widths divide into the groups of a group norm."""
    for width in widths:
        if width % groups:
            raise UserError(f"{what}: {width} channels do not divide into {groups} groups.")


def beside(path):
    """Read the hyperparameters from the YAML file of a checkpoint, or {} without one.

    It is the file of the same name, or config.yaml, or project.yaml, or the only one in the folder;
    or the newest *-project.yaml of ../configs, as CompVis' trainer lays them out.
    """
    folder, stem = os.path.dirname(os.path.abspath(path)), os.path.splitext(path)[0]
    named = [stem + ".yaml", stem + ".yml"]
    named += [os.path.join(folder, name) for name in ("config.yaml", "project.yaml")]
    found = [name for name in named if os.path.isfile(name)]
    if not found:
        alone = [n for n in sorted(os.listdir(folder)) if n.endswith((".yaml", ".yml"))]
        found = [os.path.join(folder, alone[0])] if len(alone) == 1 else []
    configs = os.path.join(os.path.dirname(folder), "configs")
    if not found and os.path.isdir(configs):
        names = [n for n in sorted(os.listdir(configs)) if n.endswith("-project.yaml")]
        found = [os.path.join(configs, name) for name in names[-1:]]
    if not found:
        return {}
    return settings(found[0], yaml.safe_load, yaml.YAMLError)


def settings(path, parse, error):
    """Read a small text file of settings: a dict."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MAX_FILE + 1)
        if len(text) > _MAX_FILE:
            raise UserError(f"Cannot read '{path}': it is larger than {_MAX_FILE} bytes.")
        content = parse(text)
    except OSError as cause:
        raise UserError(f"Cannot read '{path}': {cause.strerror}.") from None
    except (error, ValueError, RecursionError) as cause:
        if isinstance(cause, UserError):
            raise
        line = " ".join(str(cause).split())[:200]
        raise UserError(f"Cannot read '{path}': it is damaged ({line}).") from None
    if not isinstance(content, dict):
        raise UserError(f"'{path}' holds no settings but a {type(content).__name__}.")
    return content
