"""One training step of a VQ first stage: losses, codebook, moving averages.

A step draws random numbers only to revive codes, by the code's number, so a result depends neither
on the number of devices nor on when a run was resumed. Images come as uint8, those made are
float32, nominally in [-1, 1].

Sources: VQ-VAE (arXiv 1711.00937), its codebook by moving averages (appendix A.1) and the
commitment loss (eq. 3); latent diffusion (arXiv 2112.10752) for its use.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import optax

from lfp_jax.generators import assemble, ldm
from lfp_jax.generators.first_stage import Decoder, Encoder, quantize
from lfp_jax.metrics import features
from lfp_jax.training.steps import average, average_decay, from_uint8, learning_rates

_ALIVE = 0.05  # positions of a batch that a code must stand for, on average, to be kept


class State(flax.struct.PyTreeNode):
    """All that a step changes."""

    params: dict  # {"encoder", "decoder"}
    average: dict  # exponential moving average of `params`
    optimizer: tuple
    codebook: jax.Array  # [codes, latent_channels]
    uses: jax.Array  # [codes], moving average of the positions a batch that a code stands for
    sums: jax.Array  # [codes, latent_channels], likewise of what those positions held


@flax.struct.dataclass
class Hyperparameters:
    """Static choices of a run (see `ldm.train`)."""

    arch: ldm.Architecture
    batch: int
    learning_rate: float
    warmup: int
    decay: int  # steps
    commitment: float
    perceptual: float
    codebook_decay: float
    ema_images: float


def _optimizer(hyper):
    schedule = learning_rates(hyper.learning_rate, warmup=hyper.warmup, decay=hyper.decay)
    return optax.adam(schedule, b1=0.9, b2=0.99)


@partial(jax.jit, static_argnames=("hyper",))
def init_state(key, hyper):
    """Draw the initial training state; no code is alive, so the first batch sets them all."""
    params = assemble.random_params(key, hyper.arch)
    codebook = params.pop("codebook")
    return State(
        params=params,
        average=jax.tree.map(jnp.copy, params),
        optimizer=_optimizer(hyper).init(params),
        codebook=codebook,
        uses=jnp.zeros(len(codebook)),
        sums=jnp.zeros_like(codebook),
    )


def losses_of(params, codebook, images, hyper, classifier):
    """Compute what a step lowers.

    Args:
        params: {"encoder", "decoder"}.
        codebook: [codes, c].
        images: [n, H, W, 3] in [-1, 1].
        hyper: the choices of the run.
        classifier: whose features are compared; unused where `hyper.perceptual` is 0.

    Returns:
        The loss [], and (latents [n, h, w, c] before quantisation, indices [n, h, w], what to log:
        "l1" mean absolute difference of pixels, "commitment" mean squared distance of latents to
        their codes, "perceptual" mean squared difference of features).
    """
    first = hyper.arch.first_stage
    z = Encoder(first).apply({"params": params["encoder"]}, images)
    quantised, indices = quantize(z, codebook)
    made = Decoder(first).apply({"params": params["decoder"]}, quantised)
    aux = {
        "l1": jnp.mean(jnp.abs(made - images)),
        "commitment": jnp.mean(jnp.square(z - jax.lax.stop_gradient(quantised))),
    }
    loss = aux["l1"] + hyper.commitment * aux["commitment"]
    if hyper.perceptual:
        wanted, found = (features.features(classifier, x) for x in (images, made))
        aux["perceptual"] = jnp.mean(jnp.square(found - wanted))
        loss = loss + hyper.perceptual * aux["perceptual"]
    return loss, (z, indices, aux)


def update_codebook(key, state, z, indices, *, decay):
    """Move each code to the mean of what it stands for, and dead codes to where latents are.

    Args:
        key: random key.
        state: State.
        z: latents [n, h, w, c] before quantisation.
        indices: of their codes [n, h, w].
        decay: of the moving averages.

    Returns:
        The next (codebook, uses, sums), and the share of codes that were alive [].
    """
    codes, channels = state.codebook.shape
    rows, index = z.reshape(-1, channels), indices.reshape(-1)
    uses = jax.ops.segment_sum(jnp.ones(len(index)), index, num_segments=codes)
    sums = jax.ops.segment_sum(rows, index, num_segments=codes)
    uses = average(state.uses, uses, decay)
    sums = average(state.sums, sums, decay)
    alive = uses >= _ALIVE
    # A dead code starts anew as one latent of this batch, as if seen once.
    chosen = rows[jax.random.randint(key, (codes,), 0, len(rows))]
    uses = jnp.where(alive, uses, 1.0)
    sums = jnp.where(alive[:, None], sums, chosen)
    return (sums / uses[:, None], uses, sums), jnp.mean(alive)


@partial(jax.jit, static_argnames=("hyper",), donate_argnames=("state",))
def train_step(key, state, classifier, u8, step, *, hyper):
    """Make one update of networks and codebook.

    Args:
        key: of the run; folded with `step` here.
        state: consumed: its buffers are used again.
        classifier: a features.Classifier, or None where `hyper.perceptual` is 0.
        u8: images [batch, H, W, 3] uint8.
        step: [] int32, from 0 on.
        hyper: the choices of the run.

    Returns:
        The next state, and the metrics to log, each [].
    """
    images = from_uint8(u8)
    gradient_of = jax.grad(losses_of, has_aux=True)
    grads, (z, indices, aux) = gradient_of(state.params, state.codebook, images, hyper, classifier)
    updates, moments = _optimizer(hyper).update(grads, state.optimizer)
    params = optax.apply_updates(state.params, updates)
    (codebook, uses, sums), alive = update_codebook(
        jax.random.fold_in(key, step), state, z, indices, decay=hyper.codebook_decay
    )
    decay = average_decay(step, batch=hyper.batch, ema_images=hyper.ema_images)
    new = State(params, average(state.average, params, decay), moments, codebook, uses, sums)
    return new, {**aux, "codes_alive": alive}
