"""Frozen generators as pure functions, and the one door to them: `load`."""

import dataclasses
import os

import jax.numpy as jnp
import numpy as np
from clu import parameter_overview

from lfp_jax.errors import UserError, brief
from lfp_jax.generators import assemble, ldm, stylegan2, zoo
from lfp_jax.weights import ldm as ldm_files
from lfp_jax.weights import pickles, rosinality, safetensors, store
from lfp_jax.weights import stylegan2 as stylegan2_files


def load(source, *, hparams=None, ema=True):
    """Load a generator.

    Args:
        source: a name in the zoo, a folder made by `convert`, or a foreign checkpoint
            (rosinality `.pt`, NVlabs `.pkl`, CompVis `.ckpt`, a diffusers folder).
        hparams: what the file itself cannot tell, e.g. {"mapping_lr": 0.01}; for CompVis the
            hyperparameters of the networks, by default those of the YAML file beside it.
        ema: take the averaged weights (the default) or the raw ones.

    Returns:
        A frozen generator; its leaves are its parameters, so pass it *into* jit.

    Raises:
        UserError: unknown name, or a file that is missing, damaged or of another kind.
    """
    path = zoo.resolve(source)
    if store.is_store(path):
        tree, metadata = store.load(path)
        with store.taken_apart(path, "generator"):
            return _from_store(tree, metadata)
    return _from_checkpoint(_read(path, hparams=hparams, ema=ema), path)


def _read(path, *, hparams, ema):
    """Read a foreign file, of which kind it may be."""
    options = {"hparams": hparams, "ema": ema}
    if os.path.isdir(path) or safetensors.is_safetensors(path):
        return ldm_files.read(path, **options)
    content = pickles.read(path)
    source = ldm_files if ldm_files.holds(content) else stylegan2_files
    return source.convert(content, path, **options)


def _from_checkpoint(checkpoint, path):
    name = os.path.basename(os.path.normpath(path))
    if isinstance(checkpoint, ldm_files.Checkpoint):
        return assemble.from_checkpoint(checkpoint, name=name)
    if checkpoint.generator is None:
        raise UserError(f"'{path}' holds no generator.")
    arch = _architecture(stylegan2.Architecture, checkpoint.generator_hparams)
    return _build(
        checkpoint.generator, checkpoint.w_avg, checkpoint.noise, arch,
        name=name, sha256=checkpoint.sha256,
    )  # fmt: skip


def load_discriminator(path):
    """Load the discriminator of a checkpoint: `logits = d(images)`.

    Raises:
        UserError: the file is missing, damaged, of another kind, or has no discriminator.
    """
    checkpoint = stylegan2_files.read(path)
    if checkpoint.discriminator is None:
        raise UserError(f"'{path}' holds no discriminator.")
    arch = _architecture(stylegan2.DiscriminatorArchitecture, checkpoint.discriminator_hparams)
    return stylegan2.Discriminator(_to_jax(checkpoint.discriminator), arch)


def convert(source, target, *, hparams=None, ema=True):
    """Convert a foreign checkpoint into the native store.

    Args:
        source: what `load` takes, but no store.
        target: the folder to write; loading it needs no converter.
        hparams, ema: as `load`.

    Returns:
        The generator.

    Raises:
        UserError: a source that cannot be read, or a target that exists and is no store.
    """
    if os.path.exists(target) and not store.is_store(target):
        raise UserError(f"'{target}' exists and is no weight store; it is left as it is.")
    checkpoint = _read(source, hparams=hparams, ema=ema)
    generator = _from_checkpoint(checkpoint, source)
    save(
        target, generator, source_format=checkpoint.source, licence=zoo.LICENCES[checkpoint.source]
    )
    return generator


def describe(generator):
    """Say in one line what a generator is: its shapes, and the parameters of its networks."""
    networks = {name: field for name, field in vars(generator).items() if isinstance(field, dict)}
    counts = {n: parameter_overview.count_parameters(params) for n, params in networks.items()}
    parts = ", ".join(f"{name} {int(count):,}" for name, count in counts.items())
    latent, image = ("x".join(map(str, s)) for s in (generator.latent_shape, generator.image_shape))
    return f"{generator.name}: images {image} of latents {latent}, parameters: {parts}"


def save(target, generator, *, source_format, licence, dtype=np.float32, **more):
    """Write a generator as a native store.

    Args:
        target: the folder to make.
        source_format: where the weights come from, e.g. "rosinality".
        licence: one line on what the weights may be used for.
        dtype: stored type of the networks' weights; the rest stays float32.
        **more: further metadata, e.g. of the training; JSON values.
    """
    is_ldm = isinstance(generator, ldm.LatentDiffusion)
    tree, architecture = (assemble.to_tree if is_ldm else _to_tree)(generator, dtype=dtype)
    metadata = {
        "kind": "ldm" if is_ldm else "stylegan2",
        "name": generator.name,
        "source_format": source_format,
        "sha256": generator.sha256,
        "licence": licence,
        **architecture,
        **more,
    }
    store.save(target, tree, metadata)


def save_rosinality(path, generator):
    """Write a StyleGAN2 as a checkpoint of rosinality's, which needs `rosinality.can_hold`."""
    tree, _ = _to_tree(generator, dtype=np.float32)
    tree["noise"] = {str(i): np.asarray(each) for i, each in enumerate(generator.noise)}
    rosinality.write(path, tree, generator.arch)


def _to_tree(generator, *, dtype):
    """Give what a store keeps of a StyleGAN2: arrays, and metadata of the architecture."""
    networks = {"mapping": generator.mapping, "synthesis": generator.synthesis}
    tree = {
        **{k: _cast(v, dtype) for k, v in networks.items()},
        "w_avg": np.asarray(generator.w_avg),
        "noise": {f"{i:02d}": np.asarray(m) for i, m in enumerate(generator.noise)},
    }
    arch = generator.arch
    return tree, {"resolution": arch.resolution, "architecture": dataclasses.asdict(arch)}


def _from_store(tree, metadata):
    if metadata.get("kind") == "ldm":
        return assemble.from_tree(tree, metadata)
    if metadata.get("kind") != "stylegan2":
        raise UserError(f"A store of kind {brief(metadata.get('kind'))} holds no generator.")
    arch = _architecture(stylegan2.Architecture, metadata["architecture"])
    networks = {k: tree[k] for k in ("mapping", "synthesis")}
    noise = [tree["noise"][name] for name in sorted(tree["noise"])]
    return _build(
        networks, tree["w_avg"], noise, arch, name=metadata["name"], sha256=metadata["sha256"]
    )


def _build(networks, w_avg, noise, arch, *, name, sha256):
    networks = _to_jax(networks)
    no_mean = w_avg is None
    generator = stylegan2.StyleGAN2(
        mapping=networks["mapping"],
        synthesis=networks["synthesis"],
        w_avg=jnp.zeros((arch.w_dim,)) if no_mean else jnp.asarray(w_avg, jnp.float32),
        noise=tuple(jnp.asarray(m, jnp.float32) for m in noise),
        arch=arch,
        name=name,
        sha256=sha256,
    )
    if no_mean and not arch.label_dim:
        generator = generator.replace(w_avg=stylegan2.mean_latent(generator))
    return generator


def _architecture(kind, hparams):
    fields = {field.name for field in dataclasses.fields(kind)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in hparams.items() if k in fields}
    return kind(**values)


def _cast(tree, dtype):
    if isinstance(tree, dict):
        return {k: _cast(v, dtype) for k, v in tree.items()}
    return np.asarray(tree, dtype)


def _to_jax(tree):
    if isinstance(tree, dict):
        return {k: _to_jax(v) for k, v in tree.items()}
    return jnp.asarray(tree, jnp.float32)
