"""What steps of several trainers share: randomness by example, pixels, rates, moving averages."""

import jax
import jax.numpy as jnp
import optax


def per_example(key, n, draw):
    """Draw for examples 0..n-1 of the global batch, each from its own key.

    Args:
        key: random key of the step.
        n: how many.
        draw: function of a key, for one example.

    Returns:
        What `draw` gives, stacked along a new first axis.
    """
    return jax.vmap(lambda i: draw(jax.random.fold_in(key, i)))(jnp.arange(n))


def from_uint8(u8):
    """Turn uint8 pixels into float32 in [-1, 1], inside a compiled step."""
    return u8.astype(jnp.float32) / 127.5 - 1.0


def learning_rates(peak, *, warmup, decay):
    """Give the schedule of a learning rate: from 0 to its peak, then to 0 along a cosine.

    Args:
        peak: the highest.
        warmup: steps to the peak.
        decay: steps to the end of the cosine, above `warmup`; 0 to stay at the peak.

    Returns:
        An optax schedule.
    """
    if not decay:
        return optax.linear_schedule(0.0, peak, warmup)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, decay)


def average_decay(step, *, batch, ema_images):
    """Decay of a moving average of parameters in a step.

    The average warms up: its half-life is a twentieth of the images seen, at most `ema_images`.
    """
    half_life = jnp.minimum(ema_images, jnp.maximum(step * batch * 0.05, 1.0))
    return 0.5 ** (batch / half_life)


def average(old, new, decay):
    """Move an average of parameters on: decay * old + (1 - decay) * new, leaf by leaf."""
    return jax.tree.map(lambda a, p: p + decay * (a - p), old, new)
