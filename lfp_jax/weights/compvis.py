"""CompVis latent-diffusion checkpoints: the sizes of their networks, and their names of layers.

What the hyperparameters leave out is read off the tensors where these can tell. Defaults are the
original's.
"""

import re

from lfp_jax.errors import UserError, brief, did_you_mean
from lfp_jax.weights.hyperparameters import MOST_BLOCKS, Reader, checked, divisible

GROUPS = 32  # of every group norm


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
    outer = Reader(given, tensors, prefix, what)
    dd = Reader(given.get("ddconfig", {}), tensors, prefix, what)
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
        divisible(what, channels, groups=GROUPS)
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
        "blocks": dd.get(
            "num_res_blocks",
            dd.highest(r"decoder\.up\.0\.block\.(\d{1,6})\..+"),
            most=MOST_BLOCKS,
        ),
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
        return ch, tuple(ch * mult for mult in dd.sizes("ch_mult", None, least=1))
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
    r = Reader(given, tensors, prefix, what)
    stem = r.get("model_channels", r.size("input_blocks.0.0.weight", 0))
    told = all(given.get(k) is not None for k in ("num_res_blocks", "attention_resolutions"))
    level = _levels_by_hparams(r, stem) if told or not tensors else _levels_by_tensors(r)
    channels = level["channels"]
    divisible(what, (stem, *channels), groups=GROUPS)
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
        "classes": r.get("num_classes", r.size("label_emb.weight", 0) or 0, low=0),
        "scale_shift": r.get("use_scale_shift_norm", scale_shift, kind=bool),
        "groups": GROUPS,
        "middle_groups": GROUPS,
    }
    new = r.get("use_new_attention_order", False, kind=bool)
    return sizes, "new" if new else "legacy"


def _levels_by_hparams(r, stem):
    mult = r.sizes("channel_mult", (1, 2, 4, 8), least=1)
    blocks = r.given.get("num_res_blocks")
    blocks = [blocks] * len(mult) if isinstance(blocks, int) else r.sizes("num_res_blocks", None)
    if len(blocks) != len(mult):
        raise UserError(
            f"'num_res_blocks' must have {len(mult)} numbers, as channel_mult has; got "
            f"{brief(blocks)}."
        )
    wanted = r.sizes("attention_resolutions", None)
    return {
        "channels": tuple(stem * m for m in mult),
        "blocks": tuple(checked("num_res_blocks", b, int, most=MOST_BLOCKS) for b in blocks),
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
    depth = r.get("transformer_depth", found or 1, most=MOST_BLOCKS)
    context = r.given.get("context_dim")
    if isinstance(context, list | tuple):
        widths = set(r.sizes("context_dim", None))  # one a transformer block
        context = widths.pop() if len(widths) == 1 else context
    if context is None:
        context = r.get("context_dim", r.size(f"{place}.0.attn2.to_k.weight", 1))
    return (depth,) * levels, checked("context_dim", context, int)


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
        heads = checked("num_heads", heads, int)
    else:
        heads = width // checked("num_head_channels", head_dim, int)
    if not heads or width % heads:
        raise UserError(f"{r.what}: {width} channels do not divide into {heads} heads.")
    return heads, width // heads, depth


def unet_names(sizes, *, prefix):
    """Give the original's names of a UNet's layers: dict from place to name."""
    levels = len(sizes["channels"])
    names = {"time0": "time_embed.0", "time1": "time_embed.2", "label": "label_emb"}
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
