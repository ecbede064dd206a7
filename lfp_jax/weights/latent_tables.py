"""Tables of latent-diffusion networks: the layers of an architecture, and their names in a file.

An architecture is a dict with the fields of `Architecture` in lfp_jax/generators/first_stage.py or
unet.py. `encoder`, `decoder` and `unet` list its layers by their place in our tree; `rows` turns
them into table rows for one file, given the names that the file's own code gives to the places.
"""

from typing import NamedTuple

import numpy as np

from lfp_jax.weights.tables import Row, conv, linear


class Layer(NamedTuple):
    """One layer with parameters: what it is, where it stands, how wide it is."""

    kind: str  # norm, conv, dense, block, attention, linear_attention, transformer, embedding
    place: str
    inputs: int
    outputs: int
    more: dict = {}  # of a block: embed, scale_shift; of an attention: heads, head_dim, ...


class Style(NamedTuple):
    """How a family of files calls the parts of a block and of an attention."""

    block: dict
    attention: dict
    fused: str | None = None  # q, k and v in one tensor "qkv": "legacy" (head by head) or "new"


_TRANSFORMER = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
FIRST_STAGE = Style(
    block={
        "norm0": "norm1", "conv0": "conv1", "norm1": "norm2", "conv1": "conv2",
        "skip": "nin_shortcut",
    },
    attention={"norm": "norm", "q": "q", "k": "k", "v": "v", "out": "proj_out"},
)  # fmt: skip
OPENAI = {
    fused: Style(
        block={
            "norm0": "in_layers.0", "conv0": "in_layers.2", "embed": "emb_layers.1",
            "norm1": "out_layers.0", "conv1": "out_layers.3", "skip": "skip_connection",
        },
        attention={"norm": "norm", "out": "proj_out"},
        fused=fused,
    )
    for fused in ("legacy", "new")
}  # fmt: skip
DIFFUSERS = Style(
    block={
        "norm0": "norm1", "conv0": "conv1", "embed": "time_emb_proj", "norm1": "norm2",
        "conv1": "conv2", "skip": "conv_shortcut",
    },
    attention={"norm": "group_norm", **_TRANSFORMER},
)  # fmt: skip
DIFFUSERS_OLD = DIFFUSERS._replace(
    attention={
        "norm": "group_norm", "q": "query", "k": "key", "v": "value", "out": "proj_attn",
    },
)  # fmt: skip


def _first_attention(sizes, place, width):
    if sizes["attention"] == "linear":
        return Layer("linear_attention", place, width, width)
    more = {"heads": 1, "head_dim": width, "norm": True}
    return Layer("attention", place, width, width, more)


def _first_level(sizes, place, inputs, outputs, blocks, attends):
    layers = []
    for j in range(blocks):
        layers.append(Layer("block", f"{place}/block{j}", inputs if j == 0 else outputs, outputs))
        if attends:
            layers.append(_first_attention(sizes, f"{place}/attn{j}", outputs))
    return layers


def _first_middle(sizes, width):
    layers = [Layer("block", f"mid/block{j}", width, width) for j in (0, 1)]
    if sizes["middle_attention"]:
        layers.append(_first_attention(sizes, "mid/attn", width))
    return layers


def encoder(sizes):
    """List the layers of a first stage's encoder."""
    channels, width = sizes["channels"], sizes["stem"]
    double = 2 if sizes["kind"] == "kl" else 1
    layers = [Layer("conv", "stem", sizes["image_channels"], width)]
    for i, outputs in enumerate(channels):
        attends, blocks = sizes["encoder_attention"][i], sizes["blocks"]
        layers += _first_level(sizes, f"down{i}", width, outputs, blocks, attends)
        width = outputs
        if i < len(channels) - 1 and sizes["resample_conv"]:
            layers.append(Layer("conv", f"down{i}/resample", width, width))
    layers += _first_middle(sizes, width)
    layers.append(Layer("norm", "norm_out", width, width))
    layers.append(Layer("conv", "conv_out", width, double * sizes["z_channels"]))
    if sizes["quant_conv"]:
        inputs, outputs = double * sizes["z_channels"], double * sizes["latent_channels"]
        layers.append(Layer("dense", "quant", inputs, outputs))
    return layers


def decoder(sizes):
    """List the layers of a first stage's decoder."""
    channels = sizes["channels"]
    width, layers = channels[-1], []
    if sizes["post_quant_conv"]:
        layers.append(Layer("dense", "post_quant", sizes["latent_channels"], sizes["z_channels"]))
    layers.append(Layer("conv", "stem", sizes["z_channels"], width))
    layers += _first_middle(sizes, width)
    for i in reversed(range(len(channels))):
        attends, blocks = sizes["decoder_attention"][i], sizes["blocks"] + 1
        layers += _first_level(sizes, f"up{i}", width, channels[i], blocks, attends)
        width = channels[i]
        if i and sizes["resample_conv"]:
            layers.append(Layer("conv", f"up{i}/resample", width, width))
    # A file has the last two even where give_pre_end leaves them unused.
    layers.append(Layer("norm", "norm_out", width, width))
    layers.append(Layer("conv", "conv_out", width, sizes["out_channels"]))
    return layers


def _unet_block(sizes, place, inputs, outputs):
    more = {"embed": sizes["embed_dim"], "scale_shift": sizes["scale_shift"]}
    return Layer("block", place, inputs, outputs, more)


def _unet_attention(sizes, place, width, kind, groups):
    if kind is None:
        return []
    heads, head_dim, depth = kind
    more = {"heads": heads, "head_dim": head_dim, "norm": bool(groups), "depth": depth}
    more["context_dim"] = sizes["context_dim"]
    return [Layer("transformer" if depth else "attention", place, width, width, more)]


def _unet_resample(sizes, place, how, width):
    if how == "block":
        return [_unet_block(sizes, f"{place}/resample", width, width)]
    return [Layer("conv", f"{place}/resample", width, width)] if how == "conv" else []


def unet(sizes):
    """List the layers of a UNet, in the order of the forward pass."""
    channels, embed, stem = sizes["channels"], sizes["embed_dim"], sizes["stem"]
    layers = [Layer("dense", "time0", stem, embed), Layer("dense", "time1", embed, embed)]
    if sizes["classes"]:
        layers.append(Layer("embedding", "label", sizes["classes"], embed))
    layers.append(Layer("conv", "stem", sizes["in_channels"], stem))
    width, skips, groups = stem, [stem], sizes["groups"]
    for i, outputs in enumerate(channels):
        for j in range(sizes["blocks"][i]):
            kind, place = sizes["down_attention"][i], f"down{i}/attn{j}"
            layers.append(_unet_block(sizes, f"down{i}/block{j}", width, outputs))
            layers += _unet_attention(sizes, place, outputs, kind, groups)
            width = outputs
            skips.append(width)
        if i < len(channels) - 1:
            layers += _unet_resample(sizes, f"down{i}", sizes["down_resample"][i], width)
            skips.append(width)
    layers.append(_unet_block(sizes, "mid/block0", width, width))
    kind = sizes["middle_attention"]
    groups_mid = groups if kind and kind[2] else sizes["middle_groups"]
    layers += _unet_attention(sizes, "mid/attn", width, kind, groups_mid)
    layers.append(_unet_block(sizes, "mid/block1", width, width))
    for i in reversed(range(len(channels))):
        for j in range(sizes["blocks"][i] + 1):
            layers.append(_unet_block(sizes, f"up{i}/block{j}", width + skips.pop(), channels[i]))
            width, kind = channels[i], sizes["up_attention"][i]
            layers += _unet_attention(sizes, f"up{i}/attn{j}", width, kind, groups)
        if i:
            layers += _unet_resample(sizes, f"up{i}", sizes["up_resample"][i - 1], width)
    layers.append(Layer("norm", "norm_out", width, width))
    layers.append(Layer("conv", "conv_out", width, sizes["out_channels"]))
    return layers


def rows(layers, *, names, style, tensors, root):
    """Make the table of a network.

    Args:
        layers: as `encoder`, `decoder` or `unet` list them.
        names: dict from a layer's place to its name in the file.
        style: a Style.
        tensors: the file's tensors; where a matrix may be stored as a 1 x 1 kernel, or attention
            under older names, the file's own form is taken.
        root: where the network stands in the tree, e.g. "decoder/".

    Returns:
        List of Row.
    """
    made = []
    for layer in layers:
        name, place = names[layer.place], root + layer.place
        made += _KINDS[layer.kind](layer, name, place, style, tensors)
    return made


def _norm_rows(name, place, width):
    return [
        Row(f"{name}.weight", (width,), f"{place}/scale"),
        Row(f"{name}.bias", (width,), f"{place}/bias"),
    ]


def _conv_rows(name, place, inputs, outputs):
    return [
        Row(f"{name}.weight", (outputs, inputs, 3, 3), f"{place}/kernel", conv),
        Row(f"{name}.bias", (outputs,), f"{place}/bias"),
    ]


def _dense_rows(name, place, inputs, outputs, tensors, *, bias=True):
    """A matrix [out, in], or the same as a 1 x 1 (or 1) kernel."""
    shape = (outputs, inputs, *_ones(tensors, f"{name}.weight"))

    def turn(x):
        return linear(x.reshape(outputs, inputs))

    made = [Row(f"{name}.weight", shape, f"{place}/kernel", turn)]
    return [*made, Row(f"{name}.bias", (outputs,), f"{place}/bias")] if bias else made


def _ones(tensors, name):
    found = tensors.get(name)
    return (1,) * (found.ndim - 2) if isinstance(found, np.ndarray) and found.ndim in (3, 4) else ()


def _block_rows(layer, name, place, style, tensors):
    parts = {part: f"{name}.{theirs}" for part, theirs in style.block.items()}
    inputs, outputs = layer.inputs, layer.outputs
    made = _norm_rows(parts["norm0"], f"{place}/norm0", inputs)
    made += _conv_rows(parts["conv0"], f"{place}/conv0", inputs, outputs)
    if layer.more:
        width = 2 * outputs if layer.more["scale_shift"] else outputs
        embed = layer.more["embed"]
        made += _dense_rows(parts["embed"], f"{place}/embed", embed, width, tensors)
    made += _norm_rows(parts["norm1"], f"{place}/norm1", outputs)
    made += _conv_rows(parts["conv1"], f"{place}/conv1", outputs, outputs)
    if inputs != outputs:
        made += _dense_rows(parts["skip"], f"{place}/skip", inputs, outputs, tensors)
    return made


def _attention_rows(layer, name, place, style, tensors):
    heads, head_dim = layer.more["heads"], layer.more["head_dim"]
    parts, width, inner = style.attention, layer.inputs, heads * head_dim
    made = (
        _norm_rows(f"{name}.{parts['norm']}", f"{place}/norm", width) if layer.more["norm"] else []
    )
    for i, part in enumerate("qkv"):
        where = f"{place}/heads/{part}"
        if style.fused:
            source = f"{name}.qkv"
            made += _fused_rows(source, where, i, (heads, head_dim, width), style.fused, tensors)
        else:
            made += _dense_rows(f"{name}.{parts[part]}", where, width, inner, tensors)
    return made + _dense_rows(f"{name}.{parts['out']}", f"{place}/heads/out", inner, width, tensors)


def _fused_rows(name, place, i, sizes, order, tensors):
    """Rows that pick q, k or v (i = 0, 1, 2) out of one tensor of all three."""
    heads, head_dim, width = sizes
    inner = heads * head_dim

    def pick(x):
        if order == "legacy":
            return x.reshape(heads, 3, head_dim, -1)[:, i].reshape(inner, -1)
        return x.reshape(3, inner, -1)[i]

    shape = (3 * inner, width, *_ones(tensors, f"{name}.weight"))
    return [
        Row(f"{name}.weight", shape, f"{place}/kernel", lambda x: linear(pick(x))),
        Row(f"{name}.bias", (3 * inner,), f"{place}/bias", lambda x: pick(x)[:, 0]),
    ]


def _linear_attention_rows(layer, name, place, style, tensors):
    width = layer.inputs
    return [
        *_dense_rows(f"{name}.to_qkv", f"{place}/qkv", width, 3 * width, tensors, bias=False),
        *_dense_rows(f"{name}.to_out", f"{place}/out", width, width, tensors),
    ]


def _transformer_rows(layer, name, place, style, tensors):
    more, width = layer.more, layer.inputs
    inner = more["heads"] * more["head_dim"]
    made = _norm_rows(f"{name}.norm", f"{place}/norm", width)
    made += _dense_rows(f"{name}.proj_in", f"{place}/proj_in", width, inner, tensors)
    for i in range(more["depth"]):
        source, where = f"{name}.transformer_blocks.{i}", f"{place}/block{i}"
        for norm in ("norm1", "norm2", "norm3"):
            made += _norm_rows(f"{source}.{norm}", f"{where}/{norm}", inner)
        for attention, context in (("attn1", inner), ("attn2", more["context_dim"])):
            for part, theirs in _TRANSFORMER.items():
                made += _dense_rows(
                    f"{source}.{attention}.{theirs}", f"{where}/{attention}/{part}",
                    context if part in "kv" else inner, inner, tensors, bias=part == "out",
                )  # fmt: skip
        made += _dense_rows(f"{source}.ff.net.0.proj", f"{where}/ff_in", inner, 8 * inner, tensors)
        made += _dense_rows(f"{source}.ff.net.2", f"{where}/ff_out", 4 * inner, inner, tensors)
    return made + _dense_rows(f"{name}.proj_out", f"{place}/proj_out", inner, width, tensors)


_KINDS = {
    "norm": lambda layer, name, place, *_: _norm_rows(name, place, layer.inputs),
    "conv": lambda layer, name, place, *_: _conv_rows(name, place, layer.inputs, layer.outputs),
    "dense": lambda layer, name, place, style, tensors: _dense_rows(
        name, place, layer.inputs, layer.outputs, tensors
    ),
    "embedding": lambda layer, name, place, *_: [
        Row(f"{name}.weight", (layer.inputs, layer.outputs), place)
    ],
    "block": _block_rows,
    "attention": _attention_rows,
    "linear_attention": _linear_attention_rows,
    "transformer": _transformer_rows,
}
