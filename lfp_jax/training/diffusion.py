"""One training step of an unconditional UNet on the latents of a frozen first stage.

Everything random in a step comes from fold_in(key, step) and, per example, from the index in the
global batch, so a result depends neither on the number of devices nor on when a run was resumed.

Sources: DDPM (arXiv 2006.11239) for the loss, in the form of its algorithm 1; velocities are those
of arXiv 2202.00512.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import optax

from lfp_jax.generators import assemble, ldm, unet
from lfp_jax.training.steps import average, average_decay, learning_rates, per_example


class State(flax.struct.PyTreeNode):
    """All that a step changes."""

    params: dict  # of the UNet
    average: dict  # exponential moving average of `params`
    optimizer: tuple


@flax.struct.dataclass
class Hyperparameters:
    """Static choices of a run (see `ldm.train`)."""

    arch: ldm.Architecture
    batch: int
    learning_rate: float
    warmup: int
    decay: int  # steps
    clip: float
    ema_images: float


def _optimizer(hyper):
    schedule = learning_rates(hyper.learning_rate, warmup=hyper.warmup, decay=hyper.decay)
    return optax.chain(optax.clip_by_global_norm(hyper.clip), optax.adam(schedule, b2=0.99))


@partial(jax.jit, static_argnames=("hyper",))
def init_state(key, hyper):
    """Draw the initial training state; the UNet starts by predicting zero."""
    params = assemble.random_params(key, hyper.arch)["unet"]
    params["conv_out"]["kernel"] = jnp.zeros_like(params["conv_out"]["kernel"])
    return State(params, jax.tree.map(jnp.copy, params), _optimizer(hyper).init(params))


def target_of(latents, noise, alpha, *, prediction):
    """Give what a network should predict at sqrt(alpha) latents + sqrt(1 - alpha) noise.

    Args:
        latents, noise: [n, h, w, c].
        alpha: alphas_cumprod [n, 1, 1, 1].
        prediction: as in `generators.diffusion.Settings`.

    Returns:
        [n, h, w, c].
    """
    if prediction == "velocity":
        return jnp.sqrt(alpha) * noise - jnp.sqrt(1.0 - alpha) * latents
    return noise if prediction == "noise" else latents


def loss_of(key, params, alphas, latents, hyper):
    """Compute the mean squared error of the prediction, at a random time for each example.

    Times are spread evenly over a batch, from a random place on: less noisy than independent ones.

    Args:
        key: random key.
        params: of the UNet.
        alphas: alphas_cumprod [timesteps].
        latents: [n, h, w, c], scaled.
        hyper: the choices of the run.

    Returns:
        [].
    """
    n, settings = len(latents), hyper.arch.diffusion
    time_key, noise_key = jax.random.split(key)
    place = (jax.random.uniform(time_key) + jnp.arange(n) / n) % 1.0
    t = jnp.minimum(place * settings.timesteps, settings.timesteps - 1).astype(jnp.int32)
    noise = per_example(noise_key, n, lambda k: jax.random.normal(k, latents.shape[1:]))
    alpha = alphas[t][:, None, None, None]
    x = jnp.sqrt(alpha) * latents + jnp.sqrt(1.0 - alpha) * noise
    found = unet.UNet(hyper.arch.unet).apply({"params": params}, x, t)
    wanted = target_of(latents, noise, alpha, prediction=settings.prediction)
    return jnp.mean(jnp.square(found - wanted))


@partial(jax.jit, static_argnames=("hyper",), donate_argnames=("state",))
def train_step(key, state, alphas, latents, step, *, hyper):
    """Make one update.

    Args:
        key: of the run; folded with `step` here.
        state: consumed: its buffers are used again.
        alphas: alphas_cumprod [timesteps].
        latents: [batch, h, w, c], scaled, of any float type.
        step: [] int32, from 0 on.
        hyper: the choices of the run.

    Returns:
        The next state, and the metrics to log, each [].
    """
    key, latents = jax.random.fold_in(key, step), latents.astype(jnp.float32)
    loss, grads = jax.value_and_grad(partial(loss_of, key), argnums=0)(
        state.params, alphas, latents, hyper
    )
    updates, moments = _optimizer(hyper).update(grads, state.optimizer)
    params = optax.apply_updates(state.params, updates)
    decay = average_decay(step, batch=hyper.batch, ema_images=hyper.ema_images)
    return State(params, average(state.average, params, decay), moments), {"loss": loss}
