"""Predict of a design point how many bits will be wrong and what it costs, before it is run.

A few pictures as an experiment would make them, each linearised where it is: with the image's
derivatives J by the whitened unknowns (`coordinates`: nuisance and bits, prior N(0, I)) and noise
of variance v, an estimator that found the right place is left with the posterior covariance
(I + J^T J / v)^-1. Let C be its part that belongs to the k bits: with the nuisance marginalised by
its prior, the image says z = c + error of the bits c, each -1 or 1, with F = C^-1 - I the inverse
of the error's covariance. Three shares of wrong bits follow, from more to less:

- alone: each bit is told by its own posterior mean, the others counted as nuisance of the same
  spread, Q(sqrt(1 / C_ii - 1)) for Q the tail of a Gaussian;
- jointly: all are told together by the decoder that the estimators use, on draws of z;
- others known: Q(sqrt(F_ii)); no decoder can do better.

The model is an optimist: it leaves out how images bend between the place found and the right one,
descents that end elsewhere, and that estimators are not told of the attack.
"""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr

from lfp_jax import attacks, basis, design, fingerprint, images, logs, seeds, sensitivity
from lfp_jax.attribution import channel, coordinates, decoding, gauss_newton
from lfp_jax.attribution.inversion import decode_flat
from lfp_jax.errors import UserError
from lfp_jax.metrics import perceptual

PICTURES = 4  # linearised, unless told otherwise

_DRAWS = 8  # of the noise of each picture, for the decoder
_LEAST = 1e-6  # share of a bit's prior variance that is left at least, as in `decoding`


@dataclasses.dataclass(frozen=True)
class Plan:
    """What n pictures of a design point say."""

    alone: np.ndarray  # [n] share of wrong bits, each told by itself
    jointly: np.ndarray  # [n], told together
    known: np.ndarray  # [n], all other bits known
    words: np.ndarray  # [n] share of draws with every bit right, told together
    told: np.ndarray  # [n] share of the key's squared image change that the nuisance does not hide
    change: np.ndarray  # [n] root mean square change of the image, of 8 bits in [-1, 1]
    psnr: np.ndarray  # [n] dB, against the plain twin


def noise_variance(attack):
    """Give the variance of a pixel's error, rounding and attack, images in [-1, 1].

    Args:
        attack: of `attacks.find`.

    Raises:
        UserError: an attack that is not noise alone.
    """
    variance = gauss_newton.QUANTUM
    for name, options in attack.steps:
        options = dict(options)
        if name != "noise" or options.get("wrap") or not isinstance(options["std"], float):
            raise UserError(
                f"A plan reckons with noise of one strength or none; got attack '{attack.name}'."
            )
        variance += options["std"] ** 2 + gauss_newton.QUANTUM
    return variance


def predict(generator, space, metric, latents, bits, *, strength, code, variance):
    """Predict how a key is read from pictures of given latents, and how it changes them.

    Args:
        generator: a frozen generator.
        space: carrier, nuisance and mean.
        metric: [d, d] of `sensitivity.mean_metric`; tells no more than the order of unknowns.
        latents: [n, *latent_shape], plain.
        bits: [n, k], injected into them.
        strength, code: as injected.
        variance: of a pixel's noise, images in [-1, 1]; that of rounding to 8 bits at least.

    Returns:
        A Plan.
    """
    frame = coordinates.whiten(space, metric, strength=strength, code=code, free=None)
    marked = fingerprint.inject(space, latents, bits, strength=strength, code=code)
    places = coordinates.begin(frame, space, marked, bits=jnp.asarray(bits, jnp.float32))
    rows = []
    with logs.Progress(len(marked), label="plan") as progress:
        for i, place in enumerate(places):
            covariance, energy = _posterior(generator, frame, place, variance)
            rows.append(_rates(i, np.asarray(covariance, np.float64), float(energy), bits[i]))
            progress.update(i + 1)
    made, plain = (images.png_round_trip(design.decode(generator, w)) for w in (marked, latents))
    change = np.sqrt(np.square(made - plain).mean((1, 2, 3)))
    psnr = np.asarray(jax.vmap(perceptual.psnr)(jnp.asarray(made), jnp.asarray(plain)))
    alone, jointly, known, words, told = np.array(rows).T
    return Plan(alone, jointly, known, words, told, change, psnr)


@jax.jit
def _posterior(generator, frame, theta, variance):
    """Covariance [k, k] of the bits at unknowns theta [q], and their image change over the noise.

    A pixel that the 8-bit range clips says less (`channel.told`).
    """

    def model(theta):
        return decode_flat(generator, coordinates.place(frame, theta[None]))[0].reshape(-1)

    image, jacobian = sensitivity.columns(model, theta, jnp.eye(len(theta)))
    jacobian = jacobian * jnp.sqrt(channel.told(image, jnp.sqrt(variance)))[None]
    factor = gauss_newton.damp(gauss_newton.factorise(jacobian), variance)
    responses = jnp.einsum("kq,qp->kp", frame.bits, jacobian, precision="highest")
    return gauss_newton.marginal(frame.bits, factor), jnp.sum(jnp.square(responses)) / variance


def _rates(seed, covariance, energy, bits):
    """Give shares of wrong bits (alone, jointly, others known), of whole words, of energy left."""
    values, axes = np.linalg.eigh(covariance)
    values = np.clip(values, _LEAST, 1.0 - _LEAST)
    strengths = 1.0 / values - 1.0  # F along its axes
    alone = ndtr(-np.sqrt(1.0 / np.clip(np.diag(covariance), _LEAST, 1.0 - _LEAST) - 1.0)).mean()
    told = np.square(axes) @ strengths  # F_ii
    signs, rng = 2.0 * np.asarray(bits, np.float64) - 1.0, np.random.default_rng(seed)
    wrong = []
    for draw in range(_DRAWS):
        noise = rng.standard_normal(len(signs)) / np.sqrt(strengths)
        mean = axes @ ((1.0 - values) * (axes.T @ signs + noise))
        soft = decoding.soft_bits([seed, draw], mean, covariance)
        wrong.append((soft > 0.5) != (signs > 0.0))
    words = 1.0 - np.any(wrong, axis=1).mean()
    return alone, np.mean(wrong), ndtr(-np.sqrt(told)).mean(), words, told.sum() / energy


def run(config, workdir, *, pictures):
    """Predict the design point of a config; print a table and write plan.json into `workdir`.

    Args:
        config: see configs/stylegan2.py; its first pictures and keys are those of an experiment.
        workdir: folder of the basis, made if it holds none that fits.
        pictures: how many to look at.

    Returns:
        The table's quantities, as written.

    Raises:
        UserError: a setting out of bounds, or an attack or synthesis noise that no plan foresees.
    """
    design.check(config)
    variance = noise_variance(attacks.find(config.attack))
    if config.noise != "constant":
        raise UserError(f"A plan needs noise=constant; got noise={config.noise}.")
    fold = partial(seeds.key, config.seed)
    point = design.prepare(fold(seeds.BASIS), config, workdir)
    latents = basis.sample(fold(seeds.IMAGES), point.generator, pictures)
    users = jax.random.bernoulli(fold(seeds.KEYS), 0.5, (config.users, config.bits))
    bits = np.asarray(users, np.uint8)[np.arange(pictures) % config.users]
    plan = predict(
        point.generator, point.space, point.metric, latents, bits, variance=variance, **point.mark
    )
    quantities = summary(plan)
    logs.write_json(Path(workdir) / "plan.json", {"plan": quantities, "settings": config.to_dict()})
    print(
        f"{config.basis} from {config.shift}, {config.bits} bits, {config.code}, strength "
        f"{config.strength:g}, attack {config.attack}\n{table(quantities)}"
    )
    return quantities


_NAMES = {
    "jointly": "bit error, bits told jointly", "alone": "bit error, each alone",
    "known": "bit error, others known", "words": "word accuracy, told jointly",
    "told": "share of the change that tells", "change": "rms change, images in [-1, 1]",
    "psnr": "PSNR, dB",
}  # fmt: skip


def summary(plan):
    """Give {quantity: mean and standard error over the pictures} of a Plan."""
    out = {}
    for name in _NAMES:
        values = getattr(plan, name)
        spread = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
        out[name] = {"value": float(values.mean()), "stderr": spread, "images": len(values)}
    return out


def table(quantities):
    """Lay a summary out as lines of text."""
    lines = [f"{'predicted':<32}{'value':>10}  {'standard error':<16}{'images':>6}"]
    for name, entry in quantities.items():
        spread = "" if entry["stderr"] is None else f"{entry['stderr']:.2g}"
        lines.append(f"{_NAMES[name]:<32}{entry['value']:>10.4g}  {spread:<16}{entry['images']:>6}")
    return "\n".join(lines)
