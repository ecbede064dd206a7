"""Reads the networks of metrics from the files their authors publish: backbones, heads, Inception.

The network itself says what it needs: every leaf of its parameter tree has one tensor in the file,
named by torch's rules ("3/squeeze/kernel" is "features.3.squeeze.weight"), and nothing else may be
in the file but what is listed here as unused.
"""

import flax

from lfp_jax.errors import UserError
from lfp_jax.weights import pickles, safetensors, tables
from lfp_jax.weights.tables import Row, conv, linear, shaped

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
# The classifiers behind torchvision's backbones: weights that no metric uses.
_CLASSIFIERS: dict[str, dict[str, tuple[int, ...]]] = {
    "vgg": {"0": (4096, 25088), "3": (4096, 4096), "6": (1000, 4096)},
    "alex": {"1": (4096, 9216), "4": (4096, 4096), "6": (1000, 4096)},
    "squeeze": {"1": (1000, 512, 1, 1)},
}


def backbone(path, *, network, like):
    """Read a torchvision backbone, with or without its classifier.

    Args:
        path: a .pth file of `features.N...` tensors.
        network: "vgg", "alex" or "squeeze".
        like: the tree the network needs; leaves have shapes.

    Returns:
        The same tree of float32 arrays.

    Raises:
        UserError: the file is unreadable, or not exactly this backbone.
    """
    tensors = _state(path)
    rows = _rows(like, "features.")
    if any(str(name).startswith("classifier.") for name in tensors):
        for index, shape in _CLASSIFIERS[network].items():
            rows.append(Row(f"classifier.{index}.weight", shape, ""))
            rows.append(Row(f"classifier.{index}.bias", shape[:1], ""))
    model = f"{network} backbone"
    return tables.convert(tensors, rows, what=f"'{path}'", model=model)


def heads(path, *, widths):
    """Read the linear heads of LPIPS.

    Args:
        path: a .pth file of `linN.model.1.weight` tensors [1, c, 1, 1].
        widths: the channels of each layer.

    Returns:
        {"lin0": [c0], "lin1": [c1], ...}, float32.

    Raises:
        UserError: the file is unreadable, or not exactly these heads.
    """
    rows = [
        Row(f"lin{i}.model.1.weight", (1, width, 1, 1), f"lin{i}", shaped(width))
        for i, width in enumerate(widths)
    ]
    return tables.convert(_state(path), rows, what=f"'{path}'", model="set of LPIPS heads")


def inception(path, *, like):
    """Read the FID-Inception.

    Args:
        path: pytorch-fid's .pth file.
        like: the tree the network needs; leaves have shapes.

    Returns:
        The same tree of float32 arrays.

    Raises:
        UserError: the file is unreadable, or not exactly this network.
    """
    rows = _rows(like, "")
    counters = {  # of training steps, which torch keeps beside each running mean
        row.name.replace("running_mean", "num_batches_tracked")
        for row in rows
        if row.name.endswith(".running_mean")
    }
    tensors = {name: x for name, x in _state(path).items() if name not in counters}
    return tables.convert(tensors, rows, what=f"'{path}'", model="FID-Inception")


def _state(path):
    """Read a dict of tensors from a torch or safetensors file."""
    if safetensors.is_safetensors(path):
        return safetensors.read(path)
    state = pickles.read(path)
    if not isinstance(state, dict):
        raise UserError(f"'{path}' holds a {type(state).__name__}; needed: a dict of tensors.")
    return state


def _rows(like, prefix):
    """Give the rows of a tree by torch's names."""
    rows = []
    for place, leaf in flax.traverse_util.flatten_dict(like, sep="/").items():
        *parents, kind = place.split("/")
        name = prefix + ".".join([*parents, _LEAVES.get(kind, kind)])
        shape = leaf.shape
        if len(shape) == 4:
            rows.append(Row(name, (shape[3], shape[2], *shape[:2]), place, conv))
        elif len(shape) == 2:
            rows.append(Row(name, shape[::-1], place, linear))
        else:
            rows.append(Row(name, shape, place))
    return rows
