"""Puts latent-diffusion models together: from a checkpoint, from a store's tree, or at random."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lfp_jax.generators import diffusion, first_stage, ldm, unet
from lfp_jax.weights import compvis, hyperparameters
from lfp_jax.weights import ldm as files

_SCHEDULE = (
    "schedule",
    "beta_start",
    "beta_end",
    "timesteps",
    "cosine_offset",
    "betas",
    "zero_snr",
)
_PARTS = ("encoder", "decoder", "codebook", "unet")


def from_checkpoint(checkpoint, *, name):
    """Build the generator of a weights.ldm.Checkpoint."""
    arch = _architecture(
        checkpoint.first_stage_hparams, checkpoint.unet_hparams, checkpoint.diffusion,
        checkpoint.size,
    )  # fmt: skip
    params = dict(checkpoint.first_stage or {})
    if checkpoint.unet is not None:
        params["unet"] = checkpoint.unet
    alphas = checkpoint.alphas_cumprod
    return _build(
        arch, params, _alphas(checkpoint.diffusion) if alphas is None else alphas,
        checkpoint.scale_factor, checkpoint.shift, name=name, sha256=checkpoint.sha256,
    )  # fmt: skip


def to_tree(generator, *, dtype):
    """Give what a store keeps of a generator.

    Args:
        generator: a LatentDiffusion.
        dtype: stored type of the networks' weights.

    Returns:
        (tree of numpy arrays, metadata of the architecture: JSON values).
    """
    parts = {part: getattr(generator, part) for part in _PARTS}
    tree = {
        part: jax.tree.map(lambda x: np.asarray(x, dtype), params)
        for part, params in parts.items()
        if params is not None
    }
    for name in ("alphas_cumprod", "scale_factor", "shift"):
        tree[name] = np.asarray(getattr(generator, name))
    return tree, {"architecture": dataclasses.asdict(generator.arch)}


def from_tree(tree, metadata):
    """Build the generator that `to_tree` took apart."""
    arch = metadata["architecture"]
    arch = _architecture(arch["first_stage"], arch["unet"], arch["diffusion"], arch["size"])
    params = {part: tree[part] for part in _PARTS if part in tree}
    return _build(
        arch, params, tree["alphas_cumprod"], tree["scale_factor"], tree["shift"],
        name=metadata["name"], sha256=metadata["sha256"],
    )  # fmt: skip


def random_latent_diffusion(key, hparams):
    """Make a model with random weights, for training, tests and timing.

    Args:
        key: kernels have the variance 1 / fan_in, norms are identities, biases 0, codes and class
            embeddings N(0, I).
        hparams: as of a CompVis checkpoint: {"first_stage": {...}, "unet": {...}, ...}; a part that
            is left out is not made.

    Returns:
        A LatentDiffusion.

    Raises:
        UserError: a hyperparameter is missing or impossible.
    """
    parts = hyperparameters.sections(hparams)
    size, what = parts["diffusion"]["image_size"], "The model"
    unet_sizes, first_sizes = None, None
    none = {"tensors": {}, "prefix": "", "what": what}
    if parts["unet"]:
        unet_sizes, _ = compvis.unet(parts["unet"], size=size, **none)
        size = size or unet_sizes["size"]
    if parts["first_stage"]:
        first_sizes = compvis.first_stage(parts["first_stage"], size=size, **none)
    settings = files.compvis_diffusion(parts["diffusion"])
    arch = _architecture(first_sizes, unet_sizes, settings, size)
    params, factor = random_params(key, arch), parts["diffusion"]["scale_factor"]
    return _build(arch, params, _alphas(settings), factor, 0.0, name="random", sha256="")


def _architecture(first, net, settings, size):
    """Make the architecture of dicts, which a store's JSON may have turned into lists."""
    first = first and _struct(first_stage.Architecture, first)
    return ldm.Architecture(
        first_stage=first,
        unet=net and _struct(unet.Architecture, net),
        diffusion=_struct(diffusion.Settings, settings),
        size=size or first.resolution // first.factor,
    )


def _struct(kind, values):
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: _tuples(x) for name, x in values.items() if name in names})


def _tuples(value):
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _alphas(settings):
    given = {key: settings[key] for key in _SCHEDULE if key in settings}
    return diffusion.alphas_cumprod(**given)


def _build(arch, params, alphas, scale_factor, shift, *, name, sha256):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    return ldm.LatentDiffusion(
        **{part: params.get(part) for part in _PARTS},
        alphas_cumprod=jnp.asarray(alphas, jnp.float32),
        scale_factor=jnp.asarray(scale_factor, jnp.float32),
        shift=jnp.asarray(shift, jnp.float32),
        arch=arch,
        name=name,
        sha256=sha256,
    )


def random_params(key, arch):
    """Draw parameters: {"encoder", "decoder", "codebook", "unet"}, what the architecture has.

    Kernels have the variance 1 / fan_in, norms are identities, biases 0, codes and labels N(0, I).
    """
    shapes = jax.eval_shape(lambda: _shapes(arch))
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    # One draw for all: a network's worth of separate draws takes minutes to compile.
    sizes = [leaf.size for _, leaf in leaves]
    quick = jax.random.key(jax.random.bits(key), impl="unsafe_rbg")
    flat = jax.random.normal(quick, (sum(sizes),))
    made, start = [], 0
    for (path, leaf), size in zip(leaves, sizes, strict=True):
        normal = flat[start : start + size].reshape(leaf.shape)
        start += size
        name = path[-1].key
        if name == "kernel":
            fan_in = size // leaf.shape[-1]
            made.append(normal / fan_in**0.5)
        elif name in ("scale", "bias"):
            made.append(jnp.full(leaf.shape, float(name == "scale")))
        else:
            made.append(normal)
    return jax.tree_util.tree_unflatten(structure, made)


def _shapes(arch):
    """Initialise every network of an architecture, to be traced for its shapes."""
    key, params = jax.random.key(0), {}
    if arch.first_stage is not None:
        first = arch.first_stage
        side = arch.size * first.factor
        image = jnp.zeros((1, side, side, first.image_channels))
        z = jnp.zeros((1, arch.size, arch.size, first.latent_channels))
        params["encoder"] = first_stage.Encoder(first).init(key, image)["params"]
        params["decoder"] = first_stage.Decoder(first).init(key, z)["params"]
        if first.codes:
            params["codebook"] = jnp.zeros((first.codes, first.latent_channels))
    if arch.unet is not None:
        net = arch.unet
        x = jnp.zeros((1, arch.size, arch.size, net.in_channels))
        context = jnp.zeros((1, 1, net.context_dim)) if net.context_dim else None
        label = jnp.zeros((1,), jnp.int32) if net.classes else None
        made = unet.UNet(net).init(key, x, jnp.zeros((1,)), context, label)
        params["unet"] = made["params"]
    return params
