"""Tables of NVlabs' StyleGAN2 pickles: stylegan2-ada-pytorch, and stylegan3's StyleGAN2."""

import numpy as np

from lfp_jax.errors import UserError
from lfp_jax.weights import tables
from lfp_jax.weights.machine import Opaque, show
from lfp_jax.weights.tables import Row, channels_last, conv, conv_scaled, flattened, linear, shaped

_MAX_MODULES = 2000
_MAPPING_LR = 0.01  # where a file does not say it


def generator(network, *, what):
    """Convert a pickled generator: ({"mapping", "synthesis", "noise", "w_avg"} tree, hparams)."""
    modules, tensors = _flatten(network, what)
    _check(modules, "skip", what)
    hparams = _generator_sizes(modules, tensors, what)
    channels = hparams["channels"]
    blocks = [f"synthesis.b{8 * 2**i}" for i in range(len(channels) - 1)]
    used = [f"{block}{part}.resample_filter" for block in blocks for part in ("", ".conv0")]
    hparams["fir"], rows = _filters(tensors, used, what)
    rows += _mapping_rows(hparams, hparams["z_dim"], hparams["w_dim"])
    rows += _synthesis_rows(hparams)
    if "mapping.w_avg" in tensors:
        rows.append(Row("mapping.w_avg", (hparams["w_dim"],), "w_avg"))
    return tables.convert(tensors, rows, what=what), hparams


def discriminator(network, *, what):
    """Convert a pickled discriminator: (tree, hparams)."""
    modules, tensors = _flatten(network, what)
    _check(modules, "resnet", what)
    hparams = _discriminator_sizes(modules, tensors, what)
    blocks = [f"b{8 * 2**i}" for i in range(len(hparams["channels"]) - 1)]
    used = [f"{block}.{part}.resample_filter" for block in blocks for part in ("conv1", "skip")]
    hparams["fir"], rows = _filters(tensors, used, what)
    if hparams["label_dim"]:
        rows += _mapping_rows(hparams, 0, hparams["cmap_dim"])
    return tables.convert(tensors, rows + _discriminator_rows(hparams), what=what), hparams


def _flatten(network, what):
    """Give all submodules {dotted name: Opaque} and all tensors {dotted name: array}."""
    modules, tensors, queue = {}, {}, [("", network)]
    while queue:
        name, module = queue.pop(0)
        if not isinstance(module, Opaque):
            raise UserError(f"{what}: '{show(name)}' is no module.")
        modules[name] = module
        if len(modules) > _MAX_MODULES:
            raise UserError(f"{what} has more than {_MAX_MODULES} modules.")
        dot = f"{name}." if name else ""
        for kind in ("_parameters", "_buffers", "_modules"):
            for key, value in _dict(module, kind, what).items():
                if kind == "_modules" and value is not None:
                    queue.append((f"{dot}{key}", value))
                elif value is not None:
                    if not isinstance(value, np.ndarray):
                        raise UserError(f"{what}: '{show(dot + key)}' is a '{show(value)}'.")
                    tensors[f"{dot}{key}"] = value
    return modules, tensors


def _dict(module, kind, what):
    found = module.state.get(kind, {})
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"{what}: '{show(module.name)}' is no torch module ('{kind}' is no dict).")
    return found


def _check(modules, architecture, what):
    """Refuse what has StyleGAN2's names but computes something else."""
    for name, module in modules.items():
        found = module.state.get("architecture", architecture)
        if not (isinstance(found, str) and found == architecture):
            raise UserError(
                f"{what} has the architecture '{show(found)}' (in '{show(name)}'); "
                f"only '{architecture}' is supported."
            )
        activation = module.state.get("activation", "lrelu")
        if not (isinstance(activation, str) and activation in ("lrelu", "linear")):
            raise UserError(f"{what} has the activation '{show(activation)}'; needed: 'lrelu'.")
        if module.state.get("use_noise", True) is not True:
            raise UserError(f"{what} has no noise inputs (in '{show(name)}'), as StyleGAN2 needs.")


def _filters(tensors, used, what):
    """Read the filter from the layers that use it; every layer stores one, most without use."""
    named = {name: x for name, x in tensors.items() if name.endswith("resample_filter")}
    taps = tables.filter_taps({n: named[n] for n in used if n in named}, gain=1, what=what)
    rows = [Row(name, (len(taps),) * 2, "") for name in used if name not in named]
    return taps, rows + [Row(name, x.shape, "") for name, x in named.items()]


def _number(modules, name, attribute, default, what):
    module = modules.get(name)
    value = default if module is None else module.state.get(attribute, default)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise UserError(f"{what}: '{attribute}' of '{name}' is no number.")
    return value


def _clamp(modules, name, what):
    clamp = _number(modules, name, "conv_clamp", None, what)
    return None if clamp is None else float(clamp)


def _mapping_sizes(modules, tensors, what):
    """Sizes of a mapping network, as far as its tensors and attributes tell."""
    layers = tables.highest(tensors, r"mapping\.fc(\d{1,6})\..+", what=what) + 1
    sizes = {"label_dim": 0, "embed_dim": 0}
    if any(name.startswith("mapping.embed.") for name in tensors):
        sizes = {
            "label_dim": tables.size(tensors, "mapping.embed.weight", 1, what=what, dims=2),
            "embed_dim": tables.size(tensors, "mapping.embed.weight", 0, what=what, dims=2),
        }
    return sizes | {
        "mapping_layers": layers,
        "mapping_width": tables.size(tensors, "mapping.fc0.weight", 0, what=what, dims=2),
        "mapping_lr": float(_number(modules, "mapping.fc0", "bias_gain", _MAPPING_LR, what)),
    }


def _generator_sizes(modules, tensors, what):
    def size(name, axis, dims):
        return tables.size(tensors, name, axis, what=what, dims=dims)

    resolution = tables.highest(tensors, r"synthesis\.b(\d{1,6})\..+", what=what)
    channels = [size("synthesis.b4.const", 0, 3)]
    channels += [size(f"synthesis.b{n}.conv1.bias", 0, 1) for n in _doublings(resolution)]
    mapping = _mapping_sizes(modules, tensors, what)
    return mapping | {
        "resolution": resolution,
        "image_channels": size("synthesis.b4.torgb.bias", 0, 1),
        "channels": tuple(channels),
        "z_dim": size("mapping.fc0.weight", 1, 2) - mapping["embed_dim"],
        "w_dim": size("synthesis.b4.conv1.affine.weight", 1, 2),
        "clamp": _clamp(modules, "synthesis.b4.conv1", what),
    }


def _doublings(resolution):
    """Resolutions 8, 16, ... up to the largest."""
    return [8 * 2**i for i in range(20) if 8 * 2**i <= resolution]


def _mapping_rows(hparams, inputs, outputs):
    rows, embed = [], hparams["embed_dim"]
    if embed:
        label = hparams["label_dim"]
        rows += [
            Row("mapping.embed.weight", (embed, label), "mapping/embed/kernel", linear),
            Row("mapping.embed.bias", (embed,), "mapping/embed/bias"),
        ]
    layers = hparams["mapping_layers"]
    sizes = [inputs + embed, *[hparams["mapping_width"]] * (layers - 1), outputs]
    for i in range(layers):
        name, place = f"mapping.fc{i}", f"mapping/fc{i}"
        rows += [
            Row(f"{name}.weight", (sizes[i + 1], sizes[i]), f"{place}/kernel", linear),
            Row(f"{name}.bias", (sizes[i + 1],), f"{place}/bias"),
        ]
    return rows


def _modulated_rows(name, place, kernel_shape, w_dim, turn):
    outputs, inputs = kernel_shape[:2]
    return [
        Row(f"{name}.affine.weight", (inputs, w_dim), f"{place}/affine/kernel", linear),
        Row(f"{name}.affine.bias", (inputs,), f"{place}/affine/bias"),
        Row(f"{name}.weight", kernel_shape, f"{place}/kernel", turn),
        Row(f"{name}.bias", (outputs,), f"{place}/bias"),
    ]


def _synthesis_rows(hparams):
    channels, w_dim = hparams["channels"], hparams["w_dim"]
    const = Row("synthesis.b4.const", (channels[0], 4, 4), "synthesis/const", channels_last)
    rows, noise = [const], 0
    for i, outputs in enumerate(channels):
        side = 4 * 2**i
        block, place = f"synthesis.b{side}", f"synthesis/b{side}"
        for layer in ("conv0", "conv1") if i else ("conv1",):
            inputs = channels[i - 1] if layer == "conv0" else outputs
            shape, name = (outputs, inputs, 3, 3), f"{block}.{layer}"
            strength = f"{place}/{layer}/noise_strength"
            rows += [
                *_modulated_rows(name, f"{place}/{layer}", shape, w_dim, conv_scaled),
                Row(f"{name}.noise_strength", (), strength),
                Row(f"{name}.noise_const", (side,) * 2, f"noise/{noise}", shaped(1, side, side, 1)),
            ]
            noise += 1
        shape = (hparams["image_channels"], outputs, 1, 1)
        rows += _modulated_rows(f"{block}.torgb", f"{place}/torgb", shape, w_dim, conv)
    return rows


def _discriminator_sizes(modules, tensors, what):
    def size(name, axis, dims):
        return tables.size(tensors, name, axis, what=what, dims=dims)

    resolution = tables.highest(tensors, r"b(\d{1,6})\..+", what=what)
    channels = [size("b4.fc.weight", 0, 2)]
    channels += [size(f"b{n}.conv0.bias", 0, 1) for n in _doublings(resolution)]
    sizes = {
        "label_dim": 0,
        "embed_dim": 0,
        "mapping_layers": 0,
        "mapping_width": 0,
        "mapping_lr": _MAPPING_LR,
    }
    if any(name.startswith("mapping.") for name in tensors):
        sizes = _mapping_sizes(modules, tensors, what)
    group = _number(modules, "b4.mbstd", "group_size", None, what)
    stddev = size("b4.conv.weight", 1, 4) - channels[0]
    if stddev < 1 or not group:
        raise UserError(f"{what} has no minibatch standard deviation by groups, which is needed.")
    return sizes | {
        "resolution": resolution,
        "image_channels": size(f"b{resolution}.fromrgb.weight", 1, 4),
        "channels": tuple(channels),
        "cmap_dim": size("b4.out.weight", 0, 2) if sizes["label_dim"] else 0,
        "stddev_group": group,
        "stddev_channels": stddev,
        "clamp": _clamp(modules, "b4.conv", what),
    }


def _discriminator_rows(hparams):
    channels, resolution = hparams["channels"], hparams["resolution"]
    first, last, image = channels[0], channels[-1], hparams["image_channels"]
    rows = [
        Row(f"b{resolution}.fromrgb.weight", (last, image, 1, 1), "fromrgb/kernel", conv),
        Row(f"b{resolution}.fromrgb.bias", (last,), "fromrgb/bias"),
    ]
    for i, (outputs, inputs) in enumerate(zip(channels, channels[1:], strict=False)):
        block = f"b{8 * 2**i}"
        rows += [
            Row(f"{block}.conv0.weight", (inputs, inputs, 3, 3), f"{block}/conv0/kernel", conv),
            Row(f"{block}.conv0.bias", (inputs,), f"{block}/conv0/bias"),
            Row(f"{block}.conv1.weight", (outputs, inputs, 3, 3), f"{block}/conv1/kernel", conv),
            Row(f"{block}.conv1.bias", (outputs,), f"{block}/conv1/bias"),
            Row(f"{block}.skip.weight", (outputs, inputs, 1, 1), f"{block}/skip/kernel", conv),
        ]
    wide, out = first + hparams["stddev_channels"], hparams["cmap_dim"] or 1
    return [
        *rows,
        Row("b4.conv.weight", (first, wide, 3, 3), "b4/conv/kernel", conv),
        Row("b4.conv.bias", (first,), "b4/conv/bias"),
        Row("b4.fc.weight", (first, 16 * first), "b4/fc/kernel", flattened(first)),
        Row("b4.fc.bias", (first,), "b4/fc/bias"),
        Row("b4.out.weight", (out, first), "b4/out/kernel", linear),
        Row("b4.out.bias", (out,), "b4/out/bias"),
    ]
