"""Predict of a design point how many bits will be wrong and what it costs, before it is run.

A few pictures as an experiment would make them, each linearised where it is, at theta: with the
image's derivatives J by the unknowns of `lm` (`coordinates`: nuisance and bits; before them
contrast, brightness and blur, where estimators are not told of the attack; prior N(0, I)) and noise
of variance v, an estimator that found the right place is left with the posterior covariance
S = (I + J^T J / v)^-1. Images bend, so that J is not theirs everywhere: what it misses at places
drawn from that posterior counts as noise with a covariance of its own (the approximation error of
Kaipio and Somersalo, Statistical and Computational Inverse Problems, 2005, section 5.8), which is
the same as more unknowns, with prior N(0, I), that add it to the image.

The estimate is Gaussian about theta - S theta, since the prior draws it to the middle, and spreads
by S - S^2 as the noise does. Let C be the part of S that belongs to the k bits. Three shares of
wrong bits follow, from more to less:

- alone: each bit is told by its own posterior mean;
- jointly: all are told together by the decoder that the estimators use, on draws of the estimate;
- others known: Q(sqrt(F_ii)), F = C^-1 - I and Q the tail of a Gaussian, which no decoder can beat
  on average over the prior.

The model is an optimist: it leaves out descents that end elsewhere.
"""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve, solve_triangular
from scipy.special import ndtr

from lfp_jax import attacks, basis, design, fingerprint, images, logs, seeds, sensitivity
from lfp_jax.attribution import channel, coordinates, decoding, gauss_newton
from lfp_jax.attribution.inversion import decode_flat
from lfp_jax.errors import UserError, choose
from lfp_jax.metrics import perceptual

PICTURES = 4  # linearised, unless told otherwise

_BENDS = 128  # places at which a picture is held against its linearisation
_CHUNK = 16  # of them at once
_DRAWS = 8  # of the noise of each picture, for the decoder
_STRENGTHS = {"none": 0, "unknown": 3}  # of an attack that are unknowns: contrast, brightness, blur
_LEAST = 1e-6  # share of a bit's prior variance that is left at least, as in `decoding`


_product = partial(jnp.matmul, precision="highest")


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


def predict(generator, space, metric, latents, bits, *, strength, code, variance, attack="unknown"):
    """Predict how a key is read from pictures of given latents, and how it changes them.

    Args:
        generator: a frozen generator.
        space: carrier, nuisance and mean.
        metric: [d, d] of `sensitivity.mean_metric`; tells no more than the order of unknowns.
        latents: [n, *latent_shape], plain.
        bits: [n, k], injected into them.
        strength, code: as injected.
        variance: of a pixel's noise, images in [-1, 1]; that of rounding to 8 bits at least.
        attack: what the estimator is told of it, as of `lm`: "none", or "unknown".

    Returns:
        A Plan.
    """
    strengths = np.zeros(choose(attack, _STRENGTHS, "attack"), np.float32)
    frame = coordinates.whiten(space, metric, strength=strength, code=code, free=None)
    marked = fingerprint.inject(space, latents, bits, strength=strength, code=code)
    places = coordinates.begin(frame, space, marked, bits=jnp.asarray(bits, jnp.float32))
    rows = []
    with logs.Progress(len(marked), label="plan") as progress:
        for i, place in enumerate(places):
            found = _posterior(jax.random.key(i), generator, frame, strengths, place, variance)
            rows.append(_rates(i, bits[i], *(np.asarray(each, np.float64) for each in found)))
            progress.update(i + 1)
    made, plain = (images.png_round_trip(design.decode(generator, w)) for w in (marked, latents))
    change = np.sqrt(np.square(made - plain).mean((1, 2, 3)))
    psnr = np.asarray(jax.vmap(perceptual.psnr)(jnp.asarray(made), jnp.asarray(plain)))
    alone, jointly, known, words, told = np.array(rows).T
    return Plan(alone, jointly, known, words, told, change, psnr)


@jax.jit
def _posterior(key, generator, frame, strengths, theta, variance):
    """How bits are estimated at unknowns theta [q], from the image and a posterior about it.

    Returns the mean [k] of the estimate, its spread [k, k] by the noise, the covariance [k, k] that
    the estimator states, and the squared change of the image by the bits, over the noise.
    A pixel that the 8-bit range clips says less (`channel.told`).
    """
    view = channel.View(jnp.zeros(generator.image_shape), strengths)

    def decode(theta):
        return decode_flat(generator, coordinates.place(frame, theta[None]))[0]

    def model(unknowns):
        image = decode(unknowns[len(strengths) :])
        return channel.transmit(view, unknowns[: len(strengths)], image).reshape(-1)

    weights = jnp.sqrt(channel.told(decode(theta).reshape(-1), jnp.sqrt(variance)))
    right = jnp.pad(theta, (len(strengths), 0))
    image, jacobian = sensitivity.columns(model, right, jnp.eye(len(right)))
    jacobian = jacobian * weights[None]

    def missed(step):
        return weights * (model(right + step) - image) - step @ jacobian

    def damped(rows):
        return gauss_newton.damp(gauss_newton.factorise(rows), variance)

    draws = jax.random.normal(key, (len(right), _BENDS))
    steps = solve_triangular(damped(jacobian), draws, lower=True, trans="T").T
    bends = jax.lax.map(missed, steps, batch_size=_CHUNK) / _BENDS**0.5
    factor = damped(jnp.concatenate([jacobian, bends]))
    rows = jnp.pad(frame.bits, ((0, 0), (len(strengths), _BENDS)))
    stated = gauss_newton.marginal(rows, factor)
    pull = cho_solve((factor, True), rows.T).T  # S [k, q] of the bits and all unknowns
    mean = _product(rows - pull, jnp.pad(right, (0, _BENDS)))
    responses = _product(rows[:, : len(right)], jacobian)
    spread = stated - gauss_newton.gram(pull)
    return mean, spread, stated, jnp.sum(jnp.square(responses)) / variance


def _rates(seed, bits, mean, spread, covariance, energy):
    """Give shares of wrong bits (alone, jointly, others known), of whole words, of energy left."""
    signs, rng = 2.0 * np.asarray(bits, np.float64) - 1.0, np.random.default_rng(seed)
    alone = ndtr(-signs * mean / np.sqrt(np.clip(np.diag(spread), _LEAST, None))).mean()
    values, axes = np.linalg.eigh(covariance)
    values = np.clip(values, _LEAST, 1.0 - _LEAST)
    told = np.square(axes) @ (1.0 / values - 1.0)  # F_ii
    wrong = []
    for draw, drawn in enumerate(rng.multivariate_normal(mean, spread, _DRAWS, method="eigh")):
        soft = decoding.soft_bits([seed, draw], drawn, covariance)
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
        point.generator, point.space, point.metric, latents, bits,
        variance=variance, attack=config.lm.attack, **point.mark,
    )  # fmt: skip
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
