"""Diffusion: noise schedules (arXiv 2006.11239, 2102.09672) and the DDIM sampler (2010.02502).

A latent x_t is sqrt(a_t) x_0 + sqrt(1 - a_t) noise, with `alphas_cumprod` a [timesteps] falling
from almost 1. Schedules are float64 on the host, everything after them float32.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from lfp_jax.errors import UserError, brief, choose


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a model predicts, and which steps its sampler takes.

    `spacing` of DDIM's steps: "range" is CompVis' range(0, timesteps, timesteps // steps), which
    gives more than `steps` where these do not divide; "leading", "trailing" and "linspace" are
    diffusers'. `offset` is added to the first two. After the last step the image is clean
    (`end_at_one`), or as clean as training step 0.
    """

    timesteps: int = 1000
    prediction: str = "noise"  # or "velocity" (arXiv 2202.00512), or "image"
    spacing: str = "range"
    offset: int = 1
    end_at_one: bool = False
    clip: float | None = None  # bound of the predicted clean latents


def _cosine(start, end, timesteps, offset):
    t = np.arange(timesteps + 1) / timesteps
    alphas = np.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    return np.clip(1 - alphas[1:] / alphas[:-1], 0, 0.999)


_SCHEDULES = {
    "linear": lambda start, end, n, _: np.linspace(start, end, n),
    "scaled_linear": lambda start, end, n, _: np.linspace(start**0.5, end**0.5, n) ** 2,
    "sqrt": lambda start, end, n, _: np.linspace(start, end, n) ** 0.5,
    "cosine": _cosine,
}


def alphas_cumprod(
    *, schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, timesteps=1000,
    cosine_offset=0.008, betas=None, zero_snr=False,
):  # fmt: skip
    """Make a schedule: the share of signal power left after each training step.

    Args:
        schedule: of the betas: "linear"; "scaled_linear", linear in the square root (what CompVis
            calls linear); "sqrt"; "cosine" (arXiv 2102.09672, eq. 17; squaredcos_cap_v2).
        beta_start, beta_end: first and last beta; unused by "cosine".
        timesteps: how many.
        cosine_offset: s of the cosine schedule.
        betas: the betas themselves, instead of a schedule.
        zero_snr: shift and scale so that nothing is left at the end (arXiv 2305.08891, alg. 1).

    Returns:
        float64 [timesteps], numpy.

    Raises:
        UserError: an unknown schedule, or betas outside [0, 1); or with zero_snr none above 0.
    """
    needs = f"A schedule needs {timesteps} betas from 0 to below 1"
    if betas is None:
        make = choose(schedule, _SCHEDULES, "schedule")
        if not (0 <= beta_start < 1 and 0 <= beta_end < 1 and 0 <= cosine_offset <= 1e3):
            given = f"from {beta_start:.4g} to {beta_end:.4g}, offset {cosine_offset:.4g}"
            raise UserError(f"{needs}; got {given}.")
        betas = make(beta_start, beta_end, timesteps, cosine_offset)
    try:
        betas = np.asarray(betas, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{needs}; got {brief(betas)}.") from None
    if betas.shape != (timesteps,) or not (np.all(betas >= 0) and np.all(betas < 1)):
        bounds = f" from {betas.min():.4g} to {betas.max():.4g}" if betas.size else ""
        raise UserError(f"{needs}; got {betas.size}{bounds}.")
    alphas = np.cumprod(1 - betas)
    if not zero_snr:
        return alphas
    root = np.sqrt(alphas)
    if not root[0] > root[-1]:
        raise UserError("A schedule that is scaled to end without signal must fall; it does not.")
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


_SPACINGS = {
    "range": lambda total, steps, offset: np.arange(0, total, total // steps) + offset,
    "leading": lambda total, steps, offset: np.arange(steps) * (total // steps) + offset,
    "trailing": lambda total, steps, _: np.round(np.arange(total, 0, -total / steps))[::-1] - 1,
    "linspace": lambda total, steps, _: np.round(np.linspace(0, total - 1, steps)),
}


def timesteps(settings, *, steps):
    """Choose the training steps that DDIM visits.

    Args:
        settings: Settings.
        steps: how many, 1 to settings.timesteps.

    Returns:
        int64 array, rising (the sampler goes through it backwards).

    Raises:
        UserError: an impossible number of steps.
    """
    total = settings.timesteps
    if not 1 <= steps <= total:
        raise UserError(f"steps must be from 1 to {total}; got {steps}.")
    chosen = choose(settings.spacing, _SPACINGS, "spacing")(total, steps, settings.offset)
    # With as many steps as there are in training the offset would lead beyond the last.
    return chosen[chosen < total].astype(np.int64)


def plan(alphas, settings, *, steps, eta):
    """Compute the coefficients of each DDIM step.

    Args:
        alphas: alphas_cumprod [timesteps].
        settings: Settings.
        steps: how many.
        eta: 0 is deterministic, 1 has the noise of DDPM (eq. 16).

    Returns:
        Dict of arrays [steps taken], first (noisiest) step first: "t", "alpha", "alpha_prev",
        "sigma".
    """
    t = jnp.asarray(timesteps(settings, steps=steps)[::-1].copy(), jnp.int32)
    before = t - settings.timesteps // steps
    last = 1.0 if settings.end_at_one else alphas[0]
    alpha = alphas[t]
    alpha_prev = jnp.where(before >= 0, alphas[jnp.maximum(before, 0)], last)
    variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
    return {"t": t, "alpha": alpha, "alpha_prev": alpha_prev, "sigma": eta * jnp.sqrt(variance)}


def noise_and_image(output, x, alpha, prediction):
    """Turn a network's output at x into the noise and the clean latent that it implies.

    Args:
        output, x: [n, h, w, c].
        alpha: alphas_cumprod at the step; a scalar or [n, 1, 1, 1].
        prediction: what the network predicts, as in Settings.

    Returns:
        (noise, clean latent).
    """
    signal, rest = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
    if prediction == "noise":
        return output, (x - rest * output) / signal
    if prediction == "velocity":
        return signal * output + rest * x, signal * x - rest * output
    return (x - signal * output) / rest, output


def step(x, output, at, *, noise, settings):
    """Take one DDIM step (arXiv 2010.02502, eq. 12).

    Args:
        x: [n, h, w, c].
        output: the network's output at x.
        at: one entry of each array of `plan`.
        noise: N(0, I) of x's shape, or None for none.
        settings: Settings.

    Returns:
        (x at the step before, the predicted clean latent).
    """
    eps, clean = noise_and_image(output, x, at["alpha"], settings.prediction)
    if settings.clip is not None:
        clean = jnp.clip(clean, -settings.clip, settings.clip)
    direction = jnp.sqrt(jnp.maximum(1 - at["alpha_prev"] - at["sigma"] ** 2, 0.0)) * eps
    x = jnp.sqrt(at["alpha_prev"]) * clean + direction
    return (x if noise is None else x + at["sigma"] * noise), clean


def ddim(network, x, alphas, *, settings, steps, eta, draw, progress=None):
    """Sample: from noise to clean latents, one compiled loop.

    Args:
        network: function (x [n, h, w, c], t [n]) -> output of x's shape.
        x: noise ~ N(0, I).
        alphas: alphas_cumprod [timesteps].
        settings: Settings.
        steps: how many; see Settings.spacing.
        eta: see `plan`.
        draw: function of the step's number (0 is the noisiest) -> noise of x's shape, or None.
        progress: function (steps done, all steps), called as the loop goes; None for none.

    Returns:
        [n, h, w, c].
    """
    coefficients = plan(alphas, settings, steps=steps, eta=eta)
    count = len(coefficients["t"])

    def body(x, item):
        i, at = item
        output = network(x, jnp.full((x.shape[0],), at["t"]))
        x, _ = step(x, output, at, noise=None if draw is None else draw(i), settings=settings)
        if progress is not None:
            jax.debug.callback(lambda i: progress(int(i) + 1, count), i, ordered=True)
        return x, None

    return jax.lax.scan(body, x, (jnp.arange(count), coefficients))[0]
