"""One training step of the learned estimator: pairs out of the generator, losses, averages.

Nothing comes from the host but the number of the step. Pair i of a run has the global index
step * batch + i; its latent, key and attack are drawn from that index alone, so that a result
depends neither on the number of devices or processes nor on when a run was resumed, and no pair is
ever seen twice. Images are float32 in [-1, 1], rounded to 8 bits before and after an attack.
"""

import dataclasses
from functools import cache, partial

import flax.struct
import jax
import jax.numpy as jnp
import optax

from lfp_jax import attacks, fingerprint, sharding
from lfp_jax.attribution import estimator as estimators

# Attacks of training, by the name of the suite (`lfp_jax.attacks.SUITES`) they prepare for:
# (operation, its strength, mild, harsh), in the order in which the suite combines them. Training
# draws between mild and harsh; harsh is what the suite states.
CHAINS = {
    "none": (),
    "paper": (
        ("blur", "sigma", 0.1, 0.5),
        ("noise", "std", 0.0, 0.1),
        ("jpeg", "quality", 95.0, 50.0),
    ),
    "paper-history": (
        ("blur", "sigma", 0.1, 2.0),
        ("crop", "keep", 1.0, 0.8),
        ("noise", "std", 0.0, 0.1),
        ("jpeg", "quality", 95.0, 50.0),
    ),
}


class State(flax.struct.PyTreeNode):
    """All that a step changes."""

    params: dict
    average: dict  # exponential moving average of `params`
    optimizer: tuple


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """Static choices of a run (see `lfp_jax.training.estimator.train`)."""

    batch: int
    steps: int
    learning_rate: float
    warmup: int
    bit_weight: float
    clip: float
    ema_pairs: float
    chain: tuple


class Pairs(flax.struct.PyTreeNode):
    """Images and what made them."""

    images: jax.Array  # [n, H, W, C]
    theta: jax.Array  # [n, nuisance], whitened
    bits: jax.Array  # [n, k] of 0 and 1


def attack_names(chain):
    """Name the attacks of a chain: none, each of its operations, and all of them in a row."""
    names = ["none", *(operation for operation, *_ in chain)]
    return [*names, "combination"] if len(chain) > 1 else names


def degrade(key, image, *, chain, choice, amounts):
    """Attack one image [H, W, C] by the operations of a chain that a choice switches on.

    Args:
        key: random key.
        image: in [-1, 1].
        chain: an entry of CHAINS.
        choice: index into `attack_names`; may be traced.
        amounts: [operations of the chain], how harsh, from 0 (mild) to 1.
    """
    image = _round_to_8_bits(image)
    for i, (operation, strength, mild, harsh) in enumerate(chain):
        options = {strength: mild + amounts[i] * (harsh - mild)}
        function = attacks.in_jax(operation)
        changed = function.one(jax.random.fold_in(key, i), image, **options)
        on = (choice == i + 1) | (choice > len(chain))
        image = jnp.where(on, jnp.clip(changed, -1.0, 1.0), image)
    return _round_to_8_bits(image)


def _round_to_8_bits(image):
    return jnp.round((jnp.clip(image, -1.0, 1.0) + 1.0) * 127.5) / 127.5 - 1.0


def draw_pairs(key, generator, space, start, *, n, design, chain, choice=None):
    """Draw pairs start, ..., start + n - 1 of a key.

    Args:
        key: random key; a pair depends on it and on its global index.
        generator: a frozen generator.
        space: carrier, nuisance and mean.
        start: global index of the first pair; may be traced.
        n: how many.
        design: a `Design`: strength, code, how many nuisance directions.
        chain: an entry of CHAINS.
        choice: index into `attack_names`, at its harshest; None to draw attack and strength.
    """
    latent_key, own_key = jax.random.split(key)
    keys = jax.vmap(partial(jax.random.fold_in, own_key))(start + jnp.arange(n))
    latents = generator.sample(latent_key, n, start=start).reshape(n, -1)
    bits = jax.vmap(lambda k: jax.random.bernoulli(k, shape=(design.bits,)))(keys)
    bits = bits.astype(jnp.float32)
    marked = fingerprint.inject(space, latents, bits, strength=design.strength, code=design.code)
    made = generator.decode(marked.reshape(n, *generator.latent_shape))

    def attack(key, image):
        choice_key, amount_key, key = jax.random.split(jax.random.fold_in(key, 1), 3)
        if choice is not None:
            return degrade(key, image, chain=chain, choice=choice, amounts=jnp.ones(len(chain)))
        drawn = jax.random.randint(choice_key, (), 0, len(attack_names(chain)))
        amounts = jax.random.uniform(amount_key, (len(chain),))
        return degrade(key, image, chain=chain, choice=drawn, amounts=amounts)

    theta = fingerprint.whitened_nuisance(space, latents, count=design.nuisance)
    return Pairs(jax.vmap(attack)(keys, made), theta, bits)


def loss_of(params, estimator, generator, space, pairs, *, bit_weight):
    """Compute the loss: of theta a Gaussian's negative log-likelihood, of bits cross-entropy.

    Both are means, over pairs, coordinates and the estimator's rounds; the Gaussian's variance is
    learnt, one a coordinate and round, so that what can be told weighs more than what cannot. What
    cannot be told still adds noise to the gradient: hundreds of directions that move no pixel drown
    the few that do, so a Design names the leading ones only.

    Args:
        params: the estimator's parameters.
        estimator: an Estimator, for all but its parameters.
        generator, space: what the pairs were drawn from.
        pairs: Pairs.
        bit_weight: of the bits against theta.

    Returns:
        The loss [] and what to log, of the last round: "bit_accuracy", "bit_loss" (nats a bit) and
        "theta_error" (mean square, 1 at the prior mean).
    """
    estimator = estimator.replace(params=params)
    total = 0.0
    found = estimators.guesses(estimator, generator, space, pairs.images)
    for guess in found:
        square = jnp.square(guess.theta - pairs.theta)
        log_variance = guess.log_variance[None]
        theta_loss = 0.5 * jnp.mean(square * jnp.exp(-log_variance) + log_variance)
        bit_loss = jnp.mean(optax.sigmoid_binary_cross_entropy(guess.logits, pairs.bits))
        total = total + (theta_loss + bit_weight * bit_loss) / len(found)
    right = (guess.logits > 0.0) == (pairs.bits > 0.5)
    aux = {"bit_accuracy": jnp.mean(right), "bit_loss": bit_loss, "theta_error": jnp.mean(square)}
    return total, aux


def _optimizer(hyper):
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, hyper.learning_rate, hyper.warmup, max(hyper.steps, hyper.warmup + 1)
    )
    return optax.chain(optax.clip_by_global_norm(hyper.clip), optax.adam(schedule))


def initial_state(estimator, hyper):
    """Start from an estimator's parameters."""
    params = estimator.params
    return State(params, jax.tree.map(jnp.copy, params), _optimizer(hyper).init(params))


def average_decay(step, *, batch, ema_pairs):
    """Decay of the average in a step; its half-life grows with the pairs seen, to `ema_pairs`."""
    half_life = jnp.minimum(ema_pairs, jnp.maximum(step * batch * 0.1, 1.0))
    return 0.5 ** (batch / half_life)


def _step(key, state, estimator, generator, space, step, *, mesh, hyper):
    pairs = draw_pairs(
        key, generator, space, step * hyper.batch, n=hyper.batch, design=estimator.design,
        chain=hyper.chain,
    )  # fmt: skip
    pairs = jax.lax.with_sharding_constraint(pairs, sharding.batch_sharding(mesh))
    gradient_of = jax.value_and_grad(loss_of, has_aux=True)
    (loss, aux), gradient = gradient_of(
        state.params, estimator, generator, space, pairs, bit_weight=hyper.bit_weight
    )
    updates, optimizer = _optimizer(hyper).update(gradient, state.optimizer)
    params = optax.apply_updates(state.params, updates)
    decay = average_decay(step, batch=hyper.batch, ema_pairs=hyper.ema_pairs)
    average = jax.tree.map(lambda a, p: p + decay * (a - p), state.average, params)
    return State(params, average, optimizer), {"loss": loss, **aux}


@cache
def make_step(*, mesh, hyper):
    """Compile a training step for a mesh: the batch is split, everything else replicated.

    Args:
        mesh: of `sharding.mesh`.
        hyper: the choices of the run.

    Returns:
        step(key, state, estimator, generator, space, number) -> (state, metrics). The state is
        consumed: its buffers are used again. The estimator's own parameters are not used.
    """
    full = sharding.replicated_sharding(mesh)
    step = partial(_step, mesh=mesh, hyper=hyper)
    return jax.jit(step, in_shardings=full, out_shardings=full, donate_argnums=1)


@cache
def make_evaluation(*, mesh, batch, chain):
    """Compile the measurement of one batch of fresh pairs.

    Args:
        mesh: of `sharding.mesh`.
        batch: pairs at once.
        chain: an entry of CHAINS.

    Returns:
        evaluate(key, estimator, generator, space, start, choice) -> metrics as of `loss_of`.
    """

    def evaluate(key, estimator, generator, space, start, choice):
        pairs = draw_pairs(
            key, generator, space, start, n=batch, design=estimator.design, chain=chain,
            choice=choice,
        )  # fmt: skip
        pairs = jax.lax.with_sharding_constraint(pairs, sharding.batch_sharding(mesh))
        return loss_of(estimator.params, estimator, generator, space, pairs, bit_weight=1.0)[1]

    full = sharding.replicated_sharding(mesh)
    return jax.jit(evaluate, in_shardings=full, out_shardings=full)
