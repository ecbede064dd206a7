"""CompVis latent-diffusion checkpoints: their hyperparameters, and their names of layers.

Hyperparameters come as the original's YAML gives them, or flat ({"unet": ..., "first_stage": ...});
what they leave out is read off the tensors where these can tell. Defaults are the original's.
"""

import difflib
import re

import numpy as np

from lfp_jax.errors import UserError, did_you_mean
from lfp_jax.weights import tables

GROUPS = 32  # of every group norm
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
    if "model_channels" in top:
        given.pop("image_size", None)
    return {"unet": unet, "first_stage": first, "diffusion": DIFFUSION | given}


def _dict(value, name):
    if not isinstance(value, dict):
        raise UserError(f"'{name}' must be a dict of hyperparameters; got {value!r:.80}.")
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
                    f"The UNet option {key}={value!r:.80} is not supported, only "
                    f"{_UNET_FIXED[key]}."
                )
        elif key not in _UNET + _UNET_IGNORED:
            raise UserError(did_you_mean(key, list(_UNET), "hyperparameter of the UNet"))


class _Reader:
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

    def get(self, key, inferred, *, kind=int):
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
        return _checked(key, value, kind)

    def sizes(self, key, inferred):
        """Return a list of whole numbers as a tuple."""
        value = self.given.get(key)
        value = inferred if value is None else value
        if value is None:
            return self.get(key, None)
        if not isinstance(value, list | tuple):
            raise UserError(f"'{key}' must be a list of numbers; got {value!r:.80}.")
        return tuple(_checked(key, item, int) for item in value)


def _checked(key, value, kind):
    good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not good or (kind is int and value < 1):
        wanted = {int: "a whole number from 1", bool: "True or False", str: "a name"}[kind]
        raise UserError(f"'{key}' must be {wanted}; got {value!r:.80}.")
    return value


def _divisible(what, widths, groups=GROUPS):
    for width in widths:
        if width % groups:
            raise UserError(f"{what}: {width} channels do not divide into {groups} groups.")


def first_stage(given, *, tensors, prefix, what, size):
    """Give the sizes of a first stage, with the fields of first_stage.Architecture.

    Args:
        given: {"embed_dim", "n_embed", "ddconfig"}, any of them.
        tensors: the file's tensors; {} to go by the hyperparameters alone.
        prefix: of the first stage's tensors.
        what: the file, for messages.
        size: height and width of latents if known from the UNet, else None.

    Raises:
        UserError: a size that is neither given nor in the tensors, or is impossible.
    """
    outer = _Reader(given, tensors, prefix, what)
    dd = _Reader(given.get("ddconfig", {}), tensors, prefix, what)
    is_vq = outer.has("quantize.") if tensors else "n_embed" in given
    stem, channels = _widths(dd)
    factor = 2 ** (len(channels) - 1)
    resolution = dd.get("resolution", size and size * factor)
    attention = dd.get("attn_type", _attention_kind(dd), kind=str)
    if dd.get("use_linear_attn", False, kind=bool):
        attention = "linear"
    attention = attention.removesuffix("-xformers")  # another kernel for the same thing
    if attention not in ("vanilla", "linear", "none"):
        raise UserError(did_you_mean(attention, ["vanilla", "linear", "none"], "attn_type"))
    if dd.get("double_z", not is_vq, kind=bool) == is_vq:
        raise UserError(f"{what}: double_z must be {not is_vq} for a {'VQ' if is_vq else 'KL'}.")
    if attention == "vanilla":
        _divisible(what, channels)
    down, up = _attention_levels(dd, resolution, len(channels))
    attends = attention != "none"
    return {
        "kind": "vq" if is_vq else "kl",
        "resolution": resolution,
        "channels": channels,
        "stem": stem,
        "z_channels": dd.get("z_channels", dd.size("decoder.conv_in.weight", 1)),
        "latent_channels": outer.get("embed_dim", dd.size("post_quant_conv.weight", 1)),
        "codes": outer.get("n_embed", dd.size("quantize.embedding.weight", 0)) if is_vq else 0,
        "image_channels": dd.get("in_channels", dd.size("encoder.conv_in.weight", 1) or 3),
        "out_channels": dd.get("out_ch", dd.size("decoder.conv_out.weight", 0)),
        "blocks": dd.get("num_res_blocks", dd.highest(r"decoder\.up\.0\.block\.(\d{1,6})\..+")),
        "encoder_attention": tuple(attends and level for level in down),
        "decoder_attention": tuple(attends and level for level in up),
        "middle_attention": attends,
        "attention": "vanilla" if attention == "none" else attention,
        "resample_conv": dd.get("resamp_with_conv", _resample_conv(dd), kind=bool),
        "groups": GROUPS,
        "quant_conv": True,
        "post_quant_conv": True,
        "tanh_out": dd.get("tanh_out", False, kind=bool),
        "give_pre_end": dd.get("give_pre_end", False, kind=bool),
    }


def _widths(dd):
    """Channels after the first convolution, and of each level."""
    if dd.given.get("ch") is not None and dd.given.get("ch_mult") is not None:
        ch = dd.get("ch", None)
        return ch, tuple(ch * mult for mult in dd.sizes("ch_mult", None))
    levels = dd.highest(r"decoder\.up\.(\d{1,6})\..+") + 1
    found = [dd.size(f"decoder.up.{i}.block.0.conv1.weight", 0) for i in range(levels)]
    if not found or None in found:
        dd.get("ch", None), dd.sizes("ch_mult", None)
    return dd.size("encoder.conv_in.weight", 0) or found[0], tuple(found)


def _attention_kind(dd):
    if dd.has("decoder.mid.attn_1.to_qkv"):
        return "linear"
    return "vanilla" if not dd.tensors or dd.has("decoder.mid.attn_1.") else "none"


def _resample_conv(dd):
    up = dd.has("decoder.up.1.upsample.conv.")
    return not dd.tensors or up or not dd.has("decoder.up.1.")


def _attention_levels(dd, resolution, levels):
    """Which levels attend, on the way down and up: by resolution, as the original counts it."""
    if dd.given.get("attn_resolutions") is None and dd.tensors:
        up = [dd.has(f"decoder.up.{i}.attn.") for i in range(levels)]
        has_encoder = dd.has("encoder.")
        down = [dd.has(f"encoder.down.{i}.attn.") for i in range(levels)] if has_encoder else up
        return down, up
    wanted = dd.sizes("attn_resolutions", None)
    coarsest = resolution // 2 ** (levels - 1)
    down = [resolution // 2**i in wanted for i in range(levels)]
    return down, [coarsest * 2 ** (levels - 1 - i) in wanted for i in range(levels)]


def first_stage_name(place, *, network, prefix):
    """Give the original's name of a layer of a first stage's "encoder" or "decoder"."""
    if place in ("quant", "post_quant"):
        return f"{prefix}{place}_conv"
    found = re.fullmatch(r"(down|up)(\d+)/(block|attn|resample)(\d*)", place)
    if not found:
        other = {"stem": "conv_in", "mid/block0": "mid.block_1", "mid/block1": "mid.block_2"}
        name = (other | {"mid/attn": "mid.attn_1"}).get(place, place)
    elif found[3] == "resample":
        name = f"{found[1]}.{found[2]}.{found[1]}sample.conv"
    else:
        name = f"{found[1]}.{found[2]}.{found[3]}.{found[4]}"
    return f"{prefix}{network}.{name}"


def unet(given, *, tensors, prefix, what, size):
    """Give the sizes of a UNet, with the fields of unet.Architecture, and the qkv order.

    Args:
        given: arguments of the original's UNetModel, any of them.
        tensors: the file's tensors; {} to go by the hyperparameters alone.
        prefix: of the UNet's tensors.
        what: the file, for messages.
        size: height and width of its maps if `given` does not say, or None.

    Returns:
        (sizes, "legacy" or "new").

    Raises:
        UserError: a size that is neither given nor in the tensors, or is impossible.
    """
    r = _Reader(given, tensors, prefix, what)
    stem = r.get("model_channels", r.size("input_blocks.0.0.weight", 0))
    told = all(given.get(k) is not None for k in ("num_res_blocks", "attention_resolutions"))
    level = _levels_by_hparams(r, stem) if told or not tensors else _levels_by_tensors(r)
    channels = level["channels"]
    _divisible(what, (stem, *channels))
    transformer = r.get("use_spatial_transformer", r.has("middle_block.1.proj_in."), kind=bool)
    depth, context = _transformer(r, len(channels)) if transformer else ((0,) * len(channels), 0)
    down = [_attends(r, c, d, up=False) for c, d in zip(channels, depth, strict=True)]
    up = [_attends(r, c, d, up=True) for c, d in zip(channels, depth, strict=True)]
    how = "conv" if r.get("conv_resample", level["conv"], kind=bool) else "pool"
    how = "block" if r.get("resblock_updown", False, kind=bool) else how
    scale_shift = r.size("input_blocks.1.0.emb_layers.1.weight", 0) == 2 * channels[0]
    sizes = {
        "size": r.get("image_size", size),
        "in_channels": r.get("in_channels", r.size("input_blocks.0.0.weight", 1)),
        "out_channels": r.get("out_channels", r.size("out.2.weight", 0)),
        "stem": stem,
        "channels": channels,
        "blocks": level["blocks"],
        "down_attention": tuple(
            a if yes else None for a, yes in zip(down, level["attends"], strict=True)
        ),
        "middle_attention": down[-1],
        "up_attention": tuple(
            a if yes else None for a, yes in zip(up, level["attends"], strict=True)
        ),
        "down_resample": (how,) * (len(channels) - 1),
        "up_resample": (how,) * (len(channels) - 1),
        "embed_dim": 4 * stem,
        "context_dim": context,
        "classes": r.given.get("num_classes") or r.size("label_emb.weight", 0) or 0,
        "scale_shift": r.get("use_scale_shift_norm", scale_shift, kind=bool),
        "groups": GROUPS,
        "middle_groups": GROUPS,
    }
    new = r.get("use_new_attention_order", False, kind=bool)
    return sizes, "new" if new else "legacy"


def _levels_by_hparams(r, stem):
    mult = r.sizes("channel_mult", (1, 2, 4, 8))
    blocks = r.given.get("num_res_blocks")
    blocks = [blocks] * len(mult) if isinstance(blocks, int) else r.sizes("num_res_blocks", None)
    if len(blocks) != len(mult):
        raise UserError(
            f"'num_res_blocks' must have {len(mult)} numbers, as channel_mult has; got {blocks}."
        )
    wanted = r.sizes("attention_resolutions", None)
    return {
        "channels": tuple(stem * m for m in mult),
        "blocks": tuple(_checked("num_res_blocks", b, int) for b in blocks),
        "attends": [2**i in wanted for i in range(len(mult))],
        "conv": True,
    }


def _levels_by_tensors(r):
    """Levels as the numbered blocks of a checkpoint show them; a gap is a mean without weights."""
    if r.given.get("resblock_updown"):
        r.get("num_res_blocks", None), r.sizes("attention_resolutions", None)
    count = r.highest(r"input_blocks\.(\d{1,6})\..+")
    channels, blocks, attends, gaps, open_level = [], [], [], 0, False
    for n in range(1, count + 1):
        width = r.size(f"input_blocks.{n}.0.out_layers.3.weight", 0)
        if width is None:
            gaps += not r.has(f"input_blocks.{n}.0.op.")
            open_level = False
            continue
        if not open_level:
            channels.append(width)
            blocks.append(0)
            attends.append(r.has(f"input_blocks.{n}.1."))
        open_level = True
        blocks[-1] += 1
    if not channels:
        raise UserError(f"{r.what} lacks '{r.prefix}input_blocks.1.0.out_layers.3.weight'.")
    return {
        "channels": tuple(channels),
        "blocks": tuple(blocks),
        "attends": attends,
        "conv": not gaps,
    }


def _transformer(r, levels):
    """Transformer blocks at each level, and the width of the context."""
    place = "middle_block.1.transformer_blocks"
    found = r.highest(r"middle_block\.1\.transformer_blocks\.(\d{1,6})\..+") + 1
    depth = r.get("transformer_depth", found or 1)
    context = r.given.get("context_dim")
    if isinstance(context, list | tuple) and len(set(context)) == 1:
        context = context[0]  # one a transformer block
    if context is None:
        context = r.get("context_dim", r.size(f"{place}.0.attn2.to_k.weight", 1))
    return (depth,) * levels, _checked("context_dim", context, int)


def _attends(r, width, depth, *, up):
    """Heads of one level, (heads, head_dim, depth), by the original's rules."""
    heads, head_dim = (r.given.get(key) or -1 for key in ("num_heads", "num_head_channels"))
    if heads == -1 and head_dim == -1:
        raise UserError(
            f"{r.what} does not tell 'num_heads' or 'num_head_channels': give one by hparams, or "
            "in the model's YAML file beside the checkpoint."
        )
    if head_dim == -1:
        upsample = r.given.get("num_heads_upsample", -1)
        if up and upsample != -1 and not depth and r.get("legacy", True, kind=bool):
            heads = upsample
        heads = _checked("num_heads", heads, int)
    else:
        heads = width // _checked("num_head_channels", head_dim, int)
    if not heads or width % heads:
        raise UserError(f"{r.what}: {width} channels do not divide into {heads} heads.")
    return heads, width // heads, depth


def unet_names(sizes, *, prefix):
    """Give the original's names of a UNet's layers: dict from place to name."""
    levels, names = len(sizes["channels"]), {}
    names |= {"time0": "time_embed.0", "time1": "time_embed.2", "label": "label_emb"}
    names |= {"stem": "input_blocks.0.0", "norm_out": "out.0", "conv_out": "out.2"}
    n = 1
    for i in range(levels):
        for j in range(sizes["blocks"][i]):
            names[f"down{i}/block{j}"] = f"input_blocks.{n}.0"
            names[f"down{i}/attn{j}"] = f"input_blocks.{n}.1"
            n += 1
        if i < levels - 1:
            block = sizes["down_resample"][i] == "block"
            names[f"down{i}/resample"] = f"input_blocks.{n}.0{'' if block else '.op'}"
            n += 1
    after = 1 if sizes["middle_attention"] is None else 2
    names |= {"mid/block0": "middle_block.0", "mid/attn": "middle_block.1"}
    names["mid/block1"] = f"middle_block.{after}"
    n = 0
    for i in reversed(range(levels)):
        for j in range(sizes["blocks"][i] + 1):
            names[f"up{i}/block{j}"] = f"output_blocks.{n}.0"
            names[f"up{i}/attn{j}"] = f"output_blocks.{n}.1"
            n += 1
        if i:
            position = 1 if sizes["up_attention"][i] is None else 2
            conv = "" if sizes["up_resample"][i - 1] == "block" else ".conv"
            names[f"up{i}/resample"] = f"output_blocks.{n - 1}.{position}{conv}"
    return {place: prefix + name for place, name in names.items()}
