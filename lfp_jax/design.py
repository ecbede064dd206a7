"""A design point made ready: generator, basis, carrier, and the estimator that reads it back.

Every mode needs these, and finds in a work folder what an earlier one has made: a basis is used
again where the same generator, directions, samples and seed made it.
"""

import dataclasses
import hashlib
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lfp_jax import attacks, basis, fingerprint, generators, payload, sharding
from lfp_jax.attribution import bank, encoder, inversion, least_squares
from lfp_jax.attribution import estimator as learner
from lfp_jax.errors import UserError, brief, choose
from lfp_jax.generators import ldm, stylegan2, untrained, zoo
from lfp_jax.metrics import features, perceptual
from lfp_jax.weights import store

REGISTRY = "registry.sqlite"  # of a work folder, unless another one is given

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
    if config.get("channels") is not None and config.basis != "pca":
        raise UserError(f"channels={config.channels} needs basis=pca; got basis={config.basis}.")
    choose(config.estimator, _ESTIMATORS, "estimator")
    attacks.find(config.attack)
    if config.get("payload") is not None and config.code != "antipodal":
        raise UserError(f"payload={config.payload} needs code=antipodal; got code={config.code}.")
    choose(config.loss, dict.fromkeys(perceptual.NAMES), "loss")


def load_generator(source, *, sample_steps=None, quantize=True):
    """Load a generator, or make one of `untrained.NAMES`.

    Args:
        source: as `generators.load` takes it, or one of those names.
        sample_steps: DDIM steps behind a latent of a latent-diffusion model; None: its own number.
        quantize: whether the decoder of a latent-diffusion model does, where it can.
    """
    named = source in untrained.NAMES
    generator = untrained.make(source) if named else generators.load(source)
    if not isinstance(generator, ldm.LatentDiffusion):
        return generator
    steps = generator.sample_steps if sample_steps is None else sample_steps
    return generator.replace(sample_steps=steps, quantizes=quantize)


def generator_settings(config):
    """Give what the generator of a config follows from; some of it a config may leave out."""
    options = {"quantize": config.get("quantize", True), "sample_steps": config.get("sample_steps")}
    return {"source": config.generator} | options


def load_configured(config):
    """Load the generator of a config."""
    return load_generator(**generator_settings(config))


def codebook(space, config):
    """Give the Codebook of a design point; None where its keys carry no payload."""
    if config.get("payload") is None:
        return None
    # Not the digest that answers tell, from which anybody could make the mask.
    secret = digest(space, purpose="payload").encode()
    return payload.codebook(bits=config.bits, payload=config.payload, secret=secret)


def digest(tree, *, purpose=""):
    """Compute the SHA-256 of a purpose and all arrays of a tree, in hex digits."""
    digest = hashlib.sha256(purpose.encode())
    for leaf in jax.tree.leaves(tree):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype}{list(array.shape)}".encode() + array.tobytes())
    return digest.hexdigest()


def prepare(key, config, workdir, *, generator=None, refit=True):
    """Make a design point ready.

    Args:
        key: draws the latents behind the basis.
        config: see configs/stylegan2.py.
        workdir: folder of the basis, read or written.
        generator: that of the config, where it is loaded already.
        refit: make a basis where the workdir holds none that fits; else that is an error.

    Returns:
        A Design.

    Raises:
        UserError: no basis that fits, or one that users' keys rest on would be replaced.
    """
    generator = load_configured(config) if generator is None else generator
    directions, metric = _basis(key, generator, config, Path(workdir), refit)
    carrier = _carrier(config, metric, math.prod(generator.image_shape))
    space = basis.split(directions, **carrier)
    return Design(generator, metric, space, {"strength": config.strength, "code": config.code})


def basis_path(workdir):
    """Give the folder of the basis in a work folder."""
    return str(Path(workdir).absolute() / "basis")


def stored_basis(config, workdir):
    """Read the basis in a work folder, without the generator that it belongs to.

    Returns:
        The SHA-256 of that generator, and the Space; None where there is no basis of this config's
        settings.
    """
    if not store.is_store(basis_path(workdir)):
        return None
    tree, metadata = store.load(basis_path(workdir))
    if not _fits(metadata, basis_settings(config)):
        return None
    if config.get("equalise") and not metadata.get("pixels"):
        return None
    with store.taken_apart(basis_path(workdir), "basis"):
        carrier = _carrier(config, tree["metric"], basis.stored_pixels(metadata))
        return metadata["sha256"], basis.split(basis.Basis(**tree["basis"]), **carrier)


def _carrier(config, metric, pixels):
    """Give the options of `basis.split`; pixels of an image, colours apart."""
    out = {"bits": config.bits, "shift": config.shift, "repeat": config.get("repeat", 1)}
    return out | ({"metric": metric / pixels} if config.get("equalise") else {})


def _fits(metadata, wanted):
    return all(metadata.get(name) == value for name, value in wanted.items())


def basis_settings(config):
    """Give what a basis depends on besides its generator; some configs leave some of it out."""
    out = {"directions": config.basis, "samples": config.basis_samples, "seed": config.seed}
    out |= {name: config.get(name) for name in ("sample_steps", "channels")}
    out |= {"metric_samples": config.metric_samples, "quantize": config.get("quantize", True)}
    return out | ({"fisher": config.fisher.to_dict()} if config.basis == "fisher" else {})


def _basis(key, generator, config, workdir, refit):
    """Fit the basis and the mean metric, or take those in the workdir if the same made them."""
    path = basis_path(workdir)
    wanted = {"kind": "basis", "generator": generator.name, "sha256": generator.sha256}
    wanted |= basis_settings(config)
    if store.is_store(path):
        tree, metadata = store.load(path)
        if _fits(metadata, wanted):
            with store.taken_apart(path, "basis"):
                return basis.Basis(**tree["basis"]), tree["metric"]
        if not refit or (workdir / REGISTRY).exists():
            raise UserError(_other_basis(path, metadata, wanted))
    elif not refit:
        raise UserError(f"There is no basis '{path}': give the --workdir where keys were issued.")
    fitted, metric = basis.measure_generator(
        key, generator, samples=config.basis_samples, metric_samples=config.metric_samples,
        directions=config.basis, noise=config.fisher.noise, fisher_samples=config.fisher.samples,
    )  # fmt: skip
    if config.get("channels") is not None:
        shape = generator.latent_shape
        fitted = basis.block(fitted, shape=shape, channels=config.channels)
    arrays = {name: each for name, each in vars(fitted).items() if each is not None}
    pixels = math.prod(generator.image_shape)
    if sharding.is_first():
        store.save(path, {"basis": arrays, "metric": metric}, wanted | {"pixels": pixels})
    return fitted, metric


def _other_basis(path, metadata, wanted):
    """Say in what a basis is another one than wanted."""
    differ = [name for name in wanted if metadata.get(name) != wanted[name]]
    given = {name: brief(metadata.get(name)).strip("'") for name in differ}
    pairs = ", ".join(f"{name} {given[name]}, not {wanted[name]}" for name in differ)
    return (
        f"The basis '{path}' was made with {pairs}. Users' keys rest on it, so it stays: give the "
        "settings it was made with, or another --workdir."
    )


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


def quiet(generator):
    """Switch off a generator's synthesis noise, for images that were made with another one.

    Raises:
        UserError: a generator without any.
    """
    if not isinstance(generator, stylegan2.StyleGAN2):
        raise UserError(f"'{generator.name}' has no synthesis noise; noise must be 'constant'.")
    return generator.replace(noise=jax.tree.map(np.zeros_like, generator.noise))


def estimator(key, design, config, *, make_bank=bank.make_bank):
    """Bind the configured estimator to its options.

    Args:
        key: draws the bank.
        design: a Design.
        config: see configs/stylegan2.py.
        make_bank: makes the bank, or gives one that it has made before.

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
    options["bank"] = make_bank(key, design.generator, size=options["bank"], metric=design.metric)
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
    print(f"hybrid: starts from {start}. {problem}", file=sys.stderr)
    return None


def _loss(name):
    if name != "classifier":
        return perceptual.loss(name)
    classifier = features.load_classifier()
    return perceptual.loss(name, network=features.features, params=classifier)
