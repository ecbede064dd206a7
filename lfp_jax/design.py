"""A design point made ready: generator, basis, carrier, and the estimator that reads it back.

Every mode needs these, and finds in a work folder what an earlier one has made: a basis is used
again where the same generator, directions, samples and seed made it.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lfp_jax import attacks, basis, fingerprint, generators
from lfp_jax.attribution import bank, encoder, inversion, least_squares
from lfp_jax.attribution import estimator as learner
from lfp_jax.errors import UserError, choose
from lfp_jax.generators import assemble, ldm, stylegan2, zoo
from lfp_jax.metrics import features, perceptual
from lfp_jax.weights import store

_BATCH = 64
_NOISES = dict.fromkeys(("constant", "known", "unknown"))
_ESTIMATORS = dict.fromkeys(("hybrid", "lm", "learned", "encoder", "adam"))


@dataclasses.dataclass(frozen=True)
class Design:
    """What a key is carried by."""

    generator: Any
    metric: np.ndarray  # [d, d], E[J^T J] of `sensitivity.mean_metric`
    space: basis.Space
    mark: dict  # strength and code, as the functions of `fingerprint` take them


def check(config):
    """Check the settings of a design point.

    Raises:
        UserError: one is out of bounds, or a name is unknown.
    """
    if config.images < 1 or config.users < 1:
        raise UserError(f"users and images must be >= 1; got {config.users}, {config.images}.")
    if config.decoys < 1:
        raise UserError(f"decoys must be >= 1; got {config.decoys}.")
    if not config.strength > 0:
        raise UserError(f"strength must be > 0; got {config.strength}.")
    choose(config.noise, _NOISES, "noise")
    choose(config.basis, basis.DIRECTIONS, "basis")
    choose(config.code, fingerprint.CODES, "code")
    choose(config.estimator, _ESTIMATORS, "estimator")
    attacks.find(config.attack)
    choose(config.loss, dict.fromkeys(perceptual.NAMES), "loss")


def load_generator(source, *, sample_steps=None):
    """Load a generator; "stylegan2-tiny" and "ldm-tiny" are of random weights, for tests.

    Args:
        source: as `generators.load` takes it, or one of the two.
        sample_steps: DDIM steps behind a latent of a latent-diffusion model; None: its own number.
    """
    if source == "stylegan2-tiny":
        return _tiny_stylegan2(source)
    generator = _tiny_ldm(source) if source == "ldm-tiny" else generators.load(source)
    if sample_steps is not None and isinstance(generator, ldm.LatentDiffusion):
        return generator.replace(sample_steps=sample_steps)
    return generator


def _tiny_stylegan2(name):
    arch = stylegan2.Architecture(
        resolution=32, channels=(16, 16, 8, 8), z_dim=32, w_dim=32,
        mapping_layers=2, mapping_width=32,
    )  # fmt: skip
    return stylegan2.random_generator(jax.random.key(0), arch, name=name)


def _tiny_ldm(name):
    networks = {
        "first_stage": {
            "embed_dim": 3, "n_embed": 64, "ddconfig": {
                "double_z": False, "z_channels": 3, "resolution": 8, "in_channels": 3, "out_ch": 3,
                "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [],
                "attn_type": "none",
            },
        },
        "unet": {
            "image_size": 4, "in_channels": 3, "out_channels": 3, "model_channels": 32,
            "num_heads": 2, "attention_resolutions": [1], "num_res_blocks": 1, "channel_mult": [1],
        },
    }  # fmt: skip
    return assemble.random_latent_diffusion(jax.random.key(0), networks).replace(name=name)


def prepare(key, config, workdir, *, generator=None):
    """Make a design point ready.

    Args:
        key: draws the latents behind the basis.
        config: see configs/stylegan2.py.
        workdir: folder of the basis, read or written.
        generator: that of the config, where it is loaded already.

    Returns:
        A Design.
    """
    if generator is None:
        generator = load_generator(config.generator, sample_steps=config.get("sample_steps"))
    directions, metric = _basis(key, generator, config, Path(workdir))
    space = basis.split(directions, bits=config.bits, shift=config.shift)
    return Design(generator, metric, space, {"strength": config.strength, "code": config.code})


def _basis(key, generator, config, workdir):
    """Fit the basis and the mean metric, or take those in the workdir if the same made them."""
    path = str(workdir / "basis")
    wanted = {"kind": "basis", "generator": generator.name, "sha256": generator.sha256}
    wanted |= {"directions": config.basis, "samples": config.basis_samples, "seed": config.seed}
    wanted |= {"metric_samples": config.metric_samples}
    if isinstance(generator, ldm.LatentDiffusion):
        wanted |= {"sample_steps": generator.sample_steps}
    if store.is_store(path):
        tree, metadata = store.load(path)
        if metadata == wanted:
            return basis.Basis(**tree["basis"]), tree["metric"]
    fitted, metric = basis.measure_generator(
        key, generator, samples=config.basis_samples, metric_samples=config.metric_samples,
        directions=config.basis,
    )  # fmt: skip
    arrays = {name: each for name, each in vars(fitted).items() if each is not None}
    store.save(path, {"basis": arrays, "metric": metric}, wanted)
    return fitted, metric


@jax.jit
def _decode_batch(generator, latents):
    return generator.decode(latents)


def decode(generator, latents):
    """Decode latents [n, ...] in batches of one shape; float32 [n, H, W, C] on the host."""
    parts = []
    for start in range(0, len(latents), _BATCH):
        rows = np.minimum(np.arange(start, start + _BATCH), len(latents) - 1)
        parts.append(np.asarray(_decode_batch(generator, latents[rows])))
    return np.concatenate(parts)[: len(latents)]


def decode_one(generator, latent):
    """Decode one latent [...]; float32 [H, W, C] on the host."""
    return np.asarray(_decode_batch(generator, jnp.asarray(latent)[None]))[0]


def estimator(key, design, config):
    """Bind the configured estimator to its options.

    Args:
        key: draws the bank.
        design: a Design.
        config: see configs/stylegan2.py.

    Returns:
        A function (key, generator, space, images, *, strength, code) -> Solution, and the seconds
        that its set-up took.

    Raises:
        UserError: a network that is missing or was trained for another design point.
    """
    if config.estimator == "adam":
        options = config.adam.to_dict() | {"loss": _loss(config.loss)}
        return partial(inversion.adam, **options), 0.0
    if config.estimator == "encoder":
        return encoder.encoder, 0.0
    start, network = time.monotonic(), None
    if config.estimator in ("learned", "hybrid"):
        network = _network(design, config)
    if config.estimator == "learned":
        return partial(learner.learned, estimator=network), time.monotonic() - start
    options = config.lm.to_dict()
    options["bank"] = bank.make_bank(
        key, design.generator, size=options["bank"], metric=design.metric
    )
    if config.estimator == "lm":
        return partial(least_squares.lm, **options), time.monotonic() - start
    bound = partial(least_squares.hybrid, estimator=network, **options)
    return bound, time.monotonic() - start


def _network(design, config):
    """Load the network at the path given, or that which ships with the generator.

    None where none was trained for this design point, and `hybrid` can do without.
    """
    path, given, generator = config.network, config.network is not None, design.generator
    if not given:
        trained = "none" if config.lm.attack == "none" else "attacks"
        path = zoo.estimator(generator.name, trained)
    if path is None:
        problem = f"No trained network ships for '{generator.name}'."
    else:
        try:
            return learner.load(path, generator, design.space, **design.mark)
        except UserError as error:
            problem = str(error)
    if given or config.estimator == "learned":
        raise UserError(problem)
    start = "the encoder" if encoder.has_encoder(generator) else "the bank alone"
    print(f"hybrid: starts from {start}. {problem}")
    return None


def _loss(name):
    if name != "classifier":
        return perceptual.loss(name)
    classifier = features.load_classifier()
    return perceptual.loss(name, network=features.features, params=classifier)
