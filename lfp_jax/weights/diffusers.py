"""diffusers models: their config.json, and their names of layers.

Missing entries have the library's own defaults. What would change the network and is not supported
is an error that names the entry.
"""

import re

from lfp_jax.errors import UserError, brief, did_you_mean
from lfp_jax.weights.hyperparameters import MOST_BLOCKS, MOST_TIMESTEPS, divisible
from lfp_jax.weights.latent_tables import DIFFUSERS, DIFFUSERS_OLD

FIRST_STAGES = ("VQModel", "AutoencoderKL")
UNETS = ("UNet2DModel", "UNet2DConditionModel")
_SCALING = 0.18215  # of a first stage that does not say

# Entries that must have this value, where they are there at all.
_FIRST_FIXED = {
    "act_fn": ("silu", "swish"), "norm_type": ("group", None), "lookup_from_codebook": (False,),
    "latents_mean": (None,), "latents_std": (None,),
}  # fmt: skip
_UNET_FIXED = {
    "act_fn": ("silu", "swish"), "center_input_sample": (False,), "mid_block_scale_factor": (1,),
    "time_embedding_type": ("positional", None), "class_embed_type": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"), "dual_cross_attention": (False,),
    "only_cross_attention": (False,), "addition_embed_type": (None,), "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,), "time_embedding_act_fn": (None,), "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,), "conv_in_kernel": (3, None), "conv_out_kernel": (3, None),
    "attention_type": ("default", None), "class_embeddings_concat": (False, None),
    "mid_block_only_cross_attention": (False, None), "cross_attention_norm": (None,),
    "resnet_skip_time_act": (False,), "resnet_out_scale_factor": (1,),
    "reverse_transformer_layers_per_block": (None,), "conv_norm_out": (True,), "dropout": None,
    "num_attention_heads": (None,), "upcast_attention": None,
}  # fmt: skip
_DOWN = {"DownBlock2D": 0, "AttnDownBlock2D": 1, "CrossAttnDownBlock2D": 2,
         "ResnetDownsampleBlock2D": 0}  # fmt: skip
_UP = {"UpBlock2D": 0, "AttnUpBlock2D": 1, "CrossAttnUpBlock2D": 2,
       "ResnetUpsampleBlock2D": 0}  # fmt: skip
_SCHEDULES = {
    "linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine",
}  # fmt: skip
_PREDICTIONS = {"epsilon": "noise", "v_prediction": "velocity", "sample": "image"}
_SPACINGS = ("leading", "trailing", "linspace")


def style(tensors):
    """Tell by the names which names attention has: today's, or those of older folders."""
    old = any(name.endswith((".query.weight", ".proj_attn.weight")) for name in tensors)
    return DIFFUSERS_OLD if old else DIFFUSERS


class _Config:
    """A config.json with checked entries."""

    def __init__(self, config, what):
        self.config, self.what = config, what

    def fail(self, key, wanted):
        value = self.config.get(key)
        raise UserError(f"{self.what}: '{key}' is {brief(value)}; supported: {wanted}.")

    def get(self, key, default):
        """Return an entry; null counts as missing."""
        value = self.config.get(key)
        return default if value is None else value

    def number(self, key, default, *, low=1, most=2**62):
        """Return a whole number from `low` to `most`."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= most:
            self.fail(key, f"a whole number from {low} to {most:,}")
        return value

    def real(self, key, default):
        """Return a number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            self.fail(key, "a number")
        return float(value)

    def flag(self, key, default):
        """Return True or False."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, "true or false")
        return value

    def numbers(self, key, default, *, count=None, most=2**62):
        """Return a tuple of whole numbers, 1 to `most`; one number stands for `count` of them."""
        value = self.get(key, default)
        value = [value] * count if count and isinstance(value, int) else value
        good = isinstance(value, list | tuple) and count in (None, len(value)) and len(value)
        if not good or not all(type(n) is int and 1 <= n <= most for n in value):
            self.fail(key, f"a list of {count or 'some'} whole numbers from 1 to {most:,}")
        return tuple(value)

    def kinds(self, key, default, known):
        """Return a list of names, each known."""
        value = self.get(key, default)
        if not isinstance(value, list | tuple) or not all(isinstance(n, str) for n in value):
            self.fail(key, "a list of names")
        for name in value:
            if name not in known:
                raise UserError(f"{self.what}: {did_you_mean(name, list(known), key[:-1])}")
        return value

    def check(self, fixed):
        """Refuse entries with a value that is not supported."""
        for key, values in fixed.items():
            if values is not None and key in self.config and self.config[key] not in values:
                self.fail(key, " or ".join(repr(value) for value in values))


def first_stage(config, *, what):
    """Give the sizes of a VQModel or AutoencoderKL, with the fields of first_stage.Architecture."""
    c = _Config(config, what)
    c.check(_FIRST_FIXED)
    is_vq = config["_class_name"] == "VQModel"
    channels = c.numbers("block_out_channels", [64])
    levels = len(channels)
    down = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
    up = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
    down_kinds = c.kinds("down_block_types", ["DownEncoderBlock2D"], down)
    up_kinds = c.kinds("up_block_types", ["UpDecoderBlock2D"], up)
    if not len(down_kinds) == len(up_kinds) == levels:
        c.fail("block_out_channels", "as many as there are blocks up and down")
    groups, latent = c.number("norm_num_groups", 32), c.number("latent_channels", 3 + (not is_vq))
    divisible(what, channels, groups=groups)
    return {
        "kind": "vq" if is_vq else "kl",
        "resolution": c.number("sample_size", 32) if not _pair(config) else _pair(config),
        "channels": channels,
        "stem": channels[0],
        "z_channels": latent,
        "latent_channels": c.number("vq_embed_dim", latent) if is_vq else latent,
        "codes": c.number("num_vq_embeddings", 256) if is_vq else 0,
        "image_channels": c.number("in_channels", 3),
        "out_channels": c.number("out_channels", 3),
        "blocks": c.number("layers_per_block", 1, most=MOST_BLOCKS),
        "encoder_attention": tuple(down[kind] for kind in down_kinds),
        "decoder_attention": tuple(up[kind] for kind in up_kinds)[::-1],
        "middle_attention": c.flag("mid_block_add_attention", True),
        "attention": "vanilla",
        "resample_conv": True,
        "groups": groups,
        "quant_conv": is_vq or c.flag("use_quant_conv", True),
        "post_quant_conv": is_vq or c.flag("use_post_quant_conv", True),
        "tanh_out": False,
        "give_pre_end": False,
    }


def _pair(config):
    """The size where it is written as [height, width] of a square."""
    size = config.get("sample_size")
    if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1]:
        return size[0]
    return None


def scaling(config, *, what):
    """Return the scale factor and shift of a first stage's latents."""
    c = _Config(config, what)
    return c.real("scaling_factor", _SCALING), c.real("shift_factor", 0.0)


def first_stage_name(place, *, network, levels):
    """Give the library's name of a layer of a first stage's "encoder" or "decoder"."""
    if place in ("quant", "post_quant"):
        return f"{place}_conv"
    return f"{network}.{_name(place, levels=levels, block_resample=False)}"


def _name(place, *, levels, block_resample):
    found = re.fullmatch(r"(down|up)(\d+)/(block|attn|resample)(\d*)", place)
    if not found:
        return _NAMES[place]
    side, i, part, j = found.groups()
    i = int(i) if side == "down" else levels - 1 - int(i)
    if part == "resample":
        return f"{side}_blocks.{i}.{side}samplers.0{'' if block_resample else '.conv'}"
    return f"{side}_blocks.{i}.{'resnets' if part == 'block' else 'attentions'}.{j}"


_NAMES = {
    "stem": "conv_in", "mid/block0": "mid_block.resnets.0", "mid/block1": "mid_block.resnets.1",
    "mid/attn": "mid_block.attentions.0", "norm_out": "conv_norm_out", "conv_out": "conv_out",
    "time0": "time_embedding.linear_1", "time1": "time_embedding.linear_2",
    "label": "class_embedding",
}  # fmt: skip


def unet_name(place, *, sizes):
    """Give the library's name of a layer of a UNet."""
    side, _, part = place.partition("/")
    block = False
    if part == "resample":
        level = int(re.sub(r"\D", "", side))
        how = sizes["down_resample"][level] if side[:2] == "do" else sizes["up_resample"][level - 1]
        block = how == "block"
    return _name(place, levels=len(sizes["channels"]), block_resample=block)


def unet(config, *, what):
    """Give the sizes of a UNet2DModel or UNet2DConditionModel, as unet.Architecture has them."""
    c = _Config(config, what)
    c.check(_UNET_FIXED)
    conditional = config["_class_name"] == "UNet2DConditionModel"
    first, last = ("CrossAttn", "") if conditional else ("", "Attn")
    levels = 4
    down_default = [f"{first}DownBlock2D"] + [f"{first or last}DownBlock2D"] * 2
    down_default.append("DownBlock2D" if conditional else "AttnDownBlock2D")
    up_default = [kind.replace("Down", "Up") for kind in down_default[::-1]]
    channels_default = [320, 640, 1280, 1280] if conditional else [224, 448, 672, 896]
    channels = c.numbers("block_out_channels", channels_default)
    down_kinds = c.kinds("down_block_types", down_default, _DOWN)
    up_kinds = c.kinds("up_block_types", up_default, _UP)[::-1]
    levels = len(channels)
    if not len(down_kinds) == len(up_kinds) == levels:
        c.fail("block_out_channels", "as many as there are blocks up and down")
    groups = c.number("norm_num_groups", 32)
    divisible(what, channels, groups=groups)
    heads = _heads(c, channels, conditional)
    down = [heads[i][_DOWN[kind]] for i, kind in enumerate(down_kinds)]
    up = [heads[i][_UP[kind]] for i, kind in enumerate(up_kinds)]
    scale_shift = c.get("resnet_time_scale_shift", "default") == "scale_shift"
    blocks = c.numbers("layers_per_block", 2, count=levels, most=MOST_BLOCKS)
    return {
        "size": _pair(config) or c.number("sample_size", 32),
        "in_channels": c.number("in_channels", 4 if conditional else 3),
        "out_channels": c.number("out_channels", 4 if conditional else 3),
        "stem": channels[0],
        "channels": channels,
        "blocks": blocks,
        "down_attention": tuple(down),
        "middle_attention": _middle(c, heads[-1], conditional),
        "up_attention": tuple(up),
        "down_resample": _resample(c, "downsample_type", down_kinds[:-1], "Downsample"),
        "up_resample": _resample(c, "upsample_type", up_kinds[1:], "Upsample"),
        "embed_dim": c.number("time_embedding_dim", 4 * channels[0]),
        "context_dim": c.number("cross_attention_dim", 1280) if conditional else 0,
        "classes": c.number("num_class_embeds", 0, low=0),
        "scale_shift": scale_shift,
        "groups": groups,
        "middle_groups": c.number("attn_norm_num_groups", 0 if scale_shift else groups, low=0),
        "eps": c.real("norm_eps", 1e-5),
        "down_padding": c.number("downsample_padding", 1, low=0),
        "sin_first": not c.flag("flip_sin_to_cos", True),
        "freq_shift": c.real("freq_shift", 0.0),
    }


def _heads(c, channels, conditional):
    """For each level: (None, plain attention, transformer) as unet.Architecture has them."""
    levels = len(channels)
    if not conditional:
        size = c.config.get("attention_head_dim", 8)
        dims = channels if size is None else c.numbers("attention_head_dim", 8, count=levels)
        return [
            (None, _split(c, width, dim), None) for width, dim in zip(channels, dims, strict=True)
        ]
    # The library's own misnomer: in this class the entry counts heads of transformers.
    counts = c.numbers("attention_head_dim", 8, count=levels)
    depths = c.numbers("transformer_layers_per_block", 1, count=levels, most=MOST_BLOCKS)
    made = []
    for width, count, depth in zip(channels, counts, depths, strict=True):
        made.append((None, _split(c, width, count), (count, width // count, depth)))
    return made


def _split(c, width, head_dim):
    if width < head_dim:
        c.fail("attention_head_dim", f"at most the {width} channels of its level")
    return width // head_dim, head_dim, 0


def _middle(c, heads, conditional):
    default = "UNetMidBlock2DCrossAttn" if conditional else "UNetMidBlock2D"
    if c.get("mid_block_type", default) != default:
        c.fail("mid_block_type", default)
    if not conditional and not c.flag("add_attention", True):
        return None
    return heads[2 if conditional else 1]


def _resample(c, key, kinds, word):
    how = c.get(key, "conv")
    if how not in ("conv", "resnet"):
        c.fail(key, "'conv' or 'resnet'")
    # The type is a matter of blocks with plain attention; others have one of their own.
    return tuple(
        "block" if word in kind or (kind.startswith("Attn") and how == "resnet") else "conv"
        for kind in kinds
    )


def diffusion(config, *, what):
    """Give a scheduler's settings, with the fields of diffusion.Settings and its betas."""
    c = _Config(config, what)
    is_ddim = config.get("_class_name", "DDIMScheduler") == "DDIMScheduler"
    c.check({"thresholding": (False,)})
    schedule = c.get("beta_schedule", "linear")
    for key, value, known in (
        ("beta_schedule", schedule, _SCHEDULES),
        ("prediction_type", c.get("prediction_type", "epsilon"), _PREDICTIONS),
        ("timestep_spacing", c.get("timestep_spacing", "leading"), _SPACINGS),
    ):
        if value not in list(known):  # it may be of a kind that no dict can hold
            raise UserError(f"{what}: {did_you_mean(value, list(known), key)}")
    clips = c.flag("clip_sample", is_ddim)
    return {
        "schedule": _SCHEDULES[schedule],
        "beta_start": c.real("beta_start", 1e-4),
        "beta_end": c.real("beta_end", 0.02),
        "timesteps": c.number("num_train_timesteps", 1000, most=MOST_TIMESTEPS),
        "betas": c.get("trained_betas", None),
        "zero_snr": c.flag("rescale_betas_zero_snr", False),
        "prediction": _PREDICTIONS[c.get("prediction_type", "epsilon")],
        "spacing": c.get("timestep_spacing", "leading"),
        "offset": c.number("steps_offset", 0, low=0),
        "end_at_one": c.flag("set_alpha_to_one", is_ddim),
        "clip": c.real("clip_sample_range", 1.0) if clips else None,
    }
