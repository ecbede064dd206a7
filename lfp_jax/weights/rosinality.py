"""Tables of rosinality's StyleGAN2 checkpoints (names as in its state dicts)."""

import numpy as np

from lfp_jax.errors import UserError
from lfp_jax.weights import tables, torch_file
from lfp_jax.weights.tables import Row, conv, conv_batched, flattened, linear, shaped

_STDDEV_GROUP = 4
_MAPPING_LR = 0.01  # not in the file
_SIZES = (
    "image_channels", "channels", "z_dim", "w_dim", "mapping_layers", "mapping_width",
)  # fmt: skip


def generator(tensors, *, what):
    """Convert a generator's state dict: ({"mapping", "synthesis", "noise"} tree, hparams)."""
    hparams = _generator_sizes(tensors, what)
    rows = _mapping_rows(hparams) + _synthesis_rows(hparams) + _noise_rows(hparams)
    filters = {name: x for name, x in tensors.items() if name.endswith(".kernel")}
    hparams["fir"] = tables.filter_taps(filters, gain=4, what=what)
    rows += _filter_rows(filters, _up_filters(hparams["channels"]), len(hparams["fir"]))
    return tables.convert(tensors, rows, what=what), hparams


def can_hold(arch):
    """Tell whether the format can hold a generator: it knows no labels, no clamp, only RGB."""
    return arch.image_channels == 3 and not arch.label_dim and arch.clamp is None


def write(path, tree, arch):
    """Write a generator as a checkpoint of rosinality's, `{"g_ema": ..., "latent_avg": ...}`.

    Args:
        path: the file.
        tree: {"mapping", "synthesis", "noise", "w_avg"} of numpy arrays, as `generator` reads them.
        arch: its sizes, see `can_hold`.
    """
    sizes = {name: getattr(arch, name) for name in _SIZES}
    rows = _mapping_rows(sizes) + _synthesis_rows(sizes) + _noise_rows(sizes)
    tensors = tables.revert(tree, rows)
    for name in tensors:
        if name.startswith("style."):  # the file does not tell the rate, so it must be the usual
            tensors[name] = tensors[name] * np.float32(arch.mapping_lr / _MAPPING_LR)
    taps = np.asarray(arch.fir, np.float64)
    kernel = 4.0 * np.outer(taps, taps) / taps.sum() ** 2
    tensors |= dict.fromkeys(_up_filters(sizes["channels"]), kernel)
    torch_file.write(path, {"g_ema": tensors, "latent_avg": tree["w_avg"]})


def discriminator(tensors, *, what):
    """Convert a discriminator's state dict: (tree, hparams)."""
    hparams = _discriminator_sizes(tensors, what)
    filters = {name: x for name, x in tensors.items() if name.endswith(".kernel")}
    hparams["fir"] = tables.filter_taps(filters, gain=1, what=what)
    blocks = range(1, len(hparams["channels"]))
    needed = [f"convs.{i}.{part}.0.kernel" for i in blocks for part in ("conv2", "skip")]
    rows = _discriminator_rows(hparams) + _filter_rows(filters, needed, len(hparams["fir"]))
    return tables.convert(tensors, rows, what=what), hparams


def _filter_rows(filters, needed, n):
    return [Row(name, filters[name].shape if name in filters else (n, n), "") for name in needed]


def _generator_sizes(tensors, what):
    def size(name, axis, dims):
        return tables.size(tensors, name, axis, what=what, dims=dims)

    layers = tables.highest(tensors, r"style\.(\d{1,6})\..+", what=what)
    width = size("style.1.weight", 0, 2)
    doublings = tables.highest(tensors, r"to_rgbs\.(\d{1,6})\..+", what=what) + 1
    channels = [size("input.input", 1, 4)]
    channels += [size(f"convs.{2 * i + 1}.activate.bias", 0, 1) for i in range(doublings)]
    return {
        "resolution": 4 * 2**doublings,
        "image_channels": size("to_rgb1.bias", 1, 4),
        "channels": tuple(channels),
        "z_dim": size("style.1.weight", 1, 2),
        "w_dim": size(f"style.{layers}.weight", 0, 2),
        "label_dim": 0,
        "embed_dim": 0,
        "mapping_layers": layers,
        "mapping_width": width,
        "mapping_lr": _MAPPING_LR,
        "clamp": None,
    }


def _mapping_rows(hparams):
    layers, width = hparams["mapping_layers"], hparams["mapping_width"]
    sizes = [hparams["z_dim"], *[width] * (layers - 1), hparams["w_dim"]]
    rows = []
    for i in range(layers):
        place = f"mapping/fc{i}"
        rows += [
            Row(f"style.{i + 1}.weight", (sizes[i + 1], sizes[i]), f"{place}/kernel", linear),
            Row(f"style.{i + 1}.bias", (sizes[i + 1],), f"{place}/bias"),
        ]
    return rows


def _affine_rows(name, place, inputs, w_dim):
    return [
        Row(f"{name}.weight", (inputs, w_dim), f"{place}/affine/kernel", linear),
        Row(f"{name}.bias", (inputs,), f"{place}/affine/bias"),
    ]


def _styled_rows(name, place, inputs, outputs, w_dim):
    kernel = (1, outputs, inputs, 3, 3)
    return [
        *_affine_rows(f"{name}.conv.modulation", place, inputs, w_dim),
        Row(f"{name}.conv.weight", kernel, f"{place}/kernel", conv_batched),
        Row(f"{name}.activate.bias", (outputs,), f"{place}/bias"),
        Row(f"{name}.noise.weight", (1,), f"{place}/noise_strength", shaped()),
    ]


def _torgb_rows(name, place, inputs, outputs, w_dim):
    kernel = (1, outputs, inputs, 1, 1)
    return [
        *_affine_rows(f"{name}.conv.modulation", place, inputs, w_dim),
        Row(f"{name}.conv.weight", kernel, f"{place}/kernel", conv_batched),
        Row(f"{name}.bias", (1, outputs, 1, 1), f"{place}/bias", shaped(outputs)),
    ]


def _synthesis_rows(hparams):
    channels, w_dim, image = hparams["channels"], hparams["w_dim"], hparams["image_channels"]
    first = channels[0]
    const = Row(
        "input.input", (1, first, 4, 4), "synthesis/const", lambda x: tables.channels_last(x[0])
    )
    rows = [
        const,
        *_styled_rows("conv1", "synthesis/b4/conv1", first, first, w_dim),
        *_torgb_rows("to_rgb1", "synthesis/b4/torgb", first, image, w_dim),
    ]
    for i, (inputs, outputs) in enumerate(zip(channels, channels[1:], strict=False)):
        block = f"synthesis/b{8 * 2**i}"
        rows += [
            *_styled_rows(f"convs.{2 * i}", f"{block}/conv0", inputs, outputs, w_dim),
            *_styled_rows(f"convs.{2 * i + 1}", f"{block}/conv1", outputs, outputs, w_dim),
            *_torgb_rows(f"to_rgbs.{i}", f"{block}/torgb", outputs, image, w_dim),
        ]
    return rows


def _noise_rows(hparams):
    sizes = [4] + [8 * 2**i for i in range(len(hparams["channels"]) - 1) for _ in (0, 1)]
    return [
        Row(f"noises.noise_{i}", (1, 1, n, n), f"noise/{i}", shaped(1, n, n, 1))
        for i, n in enumerate(sizes)
    ]


def _up_filters(channels):
    doublings = range(len(channels) - 1)
    blurs = [f"convs.{2 * i}.conv.blur.kernel" for i in doublings]
    return blurs + [f"to_rgbs.{i}.upsample.kernel" for i in doublings]


def _discriminator_sizes(tensors, what):
    def size(name, axis, dims):
        return tables.size(tensors, name, axis, what=what, dims=dims)

    blocks = tables.highest(tensors, r"convs\.(\d{1,6})\..+", what=what)
    channels = [size("convs.0.0.weight", 0, 4)]
    channels += [size(f"convs.{i}.conv2.1.weight", 0, 4) for i in range(1, blocks + 1)]
    stddev = size("final_conv.0.weight", 1, 4) - channels[-1]
    if stddev < 1:
        raise UserError(f"{what} has no minibatch standard deviation, which is needed.")
    return {
        "resolution": 4 * 2**blocks,
        "image_channels": size("convs.0.0.weight", 1, 4),
        "channels": tuple(channels[::-1]),
        "label_dim": 0,
        "cmap_dim": 0,
        "embed_dim": 0,
        "mapping_layers": 0,
        "mapping_width": 0,
        "mapping_lr": _MAPPING_LR,
        "stddev_group": _STDDEV_GROUP,
        "stddev_channels": stddev,
        "clamp": None,
    }


def _discriminator_rows(hparams):
    channels, image = hparams["channels"], hparams["image_channels"]
    last, first = channels[-1], channels[0]
    rows = [
        Row("convs.0.0.weight", (last, image, 1, 1), "fromrgb/kernel", conv),
        Row("convs.0.1.bias", (last,), "fromrgb/bias"),
    ]
    for i in range(1, len(channels)):
        inputs, outputs = channels[-i], channels[-i - 1]
        name, block = f"convs.{i}", f"b{hparams['resolution'] // 2 ** (i - 1)}"
        rows += [
            Row(f"{name}.conv1.0.weight", (inputs, inputs, 3, 3), f"{block}/conv0/kernel", conv),
            Row(f"{name}.conv1.1.bias", (inputs,), f"{block}/conv0/bias"),
            Row(f"{name}.conv2.1.weight", (outputs, inputs, 3, 3), f"{block}/conv1/kernel", conv),
            Row(f"{name}.conv2.2.bias", (outputs,), f"{block}/conv1/bias"),
            Row(f"{name}.skip.1.weight", (outputs, inputs, 1, 1), f"{block}/skip/kernel", conv),
        ]
    wide = first + hparams["stddev_channels"]
    return [
        *rows,
        Row("final_conv.0.weight", (first, wide, 3, 3), "b4/conv/kernel", conv),
        Row("final_conv.1.bias", (first,), "b4/conv/bias"),
        Row("final_linear.0.weight", (first, 16 * first), "b4/fc/kernel", flattened(first)),
        Row("final_linear.0.bias", (first,), "b4/fc/bias"),
        Row("final_linear.1.weight", (1, first), "b4/out/kernel", linear),
        Row("final_linear.1.bias", (1,), "b4/out/bias"),
    ]
