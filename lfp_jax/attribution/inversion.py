"""Estimate the key of images by inverting the generator: the paper's estimator, `adam`.

Minimise over (alpha, phi), arXiv 2304.09752, equation 5:

    loss(g(m + U alpha + strength V c(phi)), x) + penalty * sum relu(|alpha| - 3 s)

with phi = sigmoid(logits). Every estimator here has one signature, (key, generator, space, images)
and keyword options, and returns a `Solution`. None takes the true key; starts are chosen by loss.
Images are [n, H, W, C] in [-1, 1]; nuisance coordinates alpha are in latent units.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lfp_jax import fingerprint
from lfp_jax.errors import UserError
from lfp_jax.logs import Progress

# On CPU a gradient step inside a scan runs several times slower than the same step unrolled and
# driven from Python; on accelerators one compiled scan is right.
_CPU_UNROLL = 4
_SCAN = 100


class Solution(flax.struct.PyTreeNode):
    """What an estimator found."""

    soft_bits: jax.Array | np.ndarray  # [n, k] in [0, 1]
    latents: jax.Array | np.ndarray  # [n, d]
    residual: jax.Array | np.ndarray  # [n], root mean square difference to the image, [-1, 1] scale
    evaluations: jax.Array | np.ndarray  # [n], generator evaluations; one with gradient counts 3

    @property
    def bits(self):
        """Hard bits, uint8 [n, k]."""
        return (self.soft_bits > 0.5).astype(jnp.uint8)


def check(generator, images, **counts):
    """Check what every estimator is given: images [n, H, W, C] and options that count something.

    Raises:
        UserError: no image, images of another shape than the generator's, or a count below 1.
    """
    expected = generator.image_shape
    if images.ndim != 4 or images.shape[1:] != tuple(expected) or not len(images):
        wanted = ", ".join(map(str, expected))
        raise UserError(f"Images must be [n, {wanted}] with n >= 1; got {list(images.shape)}.")
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name} must be >= 1; got {count}.")


def decode_flat(generator, w):
    """Decode flat latents [n, d] whatever shape the generator's latents have."""
    return generator.decode(w.reshape(len(w), *generator.latent_shape))


def latin_hypercube(key, n, dim):
    """Draw a centred Latin hypercube [n, dim] in [-1, 1]: one point a stratum and axis."""
    strata = (jnp.arange(n) + 0.5) / n * 2.0 - 1.0
    keys = jax.random.split(key, dim)
    return jax.vmap(lambda k: jax.random.permutation(k, strata), out_axes=1)(keys)


def _optimizer(learning_rate, decay):
    return optax.adam(lambda step: learning_rate * jnp.exp(-decay * step))


@partial(jax.jit, static_argnames=("code",))
def _losses(generator, space, prepared, unknowns, *, loss, strength, code, penalty):
    """Loss [n * starts] of every start; `prepared` holds each image's target features once."""
    alpha, logits = unknowns
    soft = jax.nn.sigmoid(logits)
    w = fingerprint.compose(space, alpha, soft, strength=strength, code=code)
    made = decode_flat(generator, w)
    starts = len(made) // len(jax.tree.leaves(prepared)[0])
    distance = jax.vmap(
        jax.vmap(loss.distance, in_axes=(None, 0)), in_axes=(0, 0)
    )(prepared, made.reshape(-1, starts, *made.shape[1:]))  # fmt: skip
    outside = jax.nn.relu(jnp.abs(alpha) - 3.0 * space.nuisance_stddev[None])
    return distance.reshape(-1) + penalty * jnp.sum(outside, axis=-1)


@partial(jax.jit, static_argnames=("code", "steps", "unroll"))
def _adam_steps(
    generator, space, prepared, carry, *, loss, strength, code, penalty, rate, decay, steps, unroll
):
    """Run `steps` Adam steps from carry = (unknowns, optimizer state)."""
    optimizer = _optimizer(rate, decay)

    def objective(unknowns):
        return jnp.sum(
            _losses(
                generator, space, prepared, unknowns,
                loss=loss, strength=strength, code=code, penalty=penalty,
            )
        )  # fmt: skip

    def step(carry, _):
        unknowns, state = carry
        updates, state = optimizer.update(jax.grad(objective)(unknowns), state)
        return (optax.apply_updates(unknowns, updates), state), None

    if unroll:
        for _ in range(steps):
            carry, _ = step(carry, None)
        return carry
    return jax.lax.scan(step, carry, length=steps)[0]


def adam(
    key,
    generator,
    space,
    images,
    *,
    strength,
    code,
    loss,
    starts=20,
    steps=2000,
    learning_rate=0.2,
    decay=0.001,
    penalty=0.1,
    first=0,
    progress=True,
):
    """Estimate keys with the paper's gradient descent, all images and starts in one program.

    Args:
        key: draws the starts.
        generator: a frozen generator.
        space: carrier, nuisance and mean.
        images: [n, H, W, C] in [-1, 1], already through 8 bits.
        strength, code: as injected.
        loss: a `metrics.perceptual.Loss`.
        starts, steps, learning_rate, decay, penalty: the paper's 20, 2000, 0.2, 0.001, 0.1
            (0.005 for latent diffusion).
        first: global index of the first image, from which what is drawn follows.
        progress: show a progress line.

    Returns:
        A Solution; of each image's starts the one of least loss.

    Raises:
        UserError: images of another shape than the generator's; starts or steps below 1.
    """
    images = jnp.asarray(images)
    check(generator, images, starts=starts, steps=steps)
    n, bits = len(images), space.carrier.shape[1]
    prepared = _prepare(loss, images)
    keys = jax.vmap(partial(jax.random.fold_in, key))(first + jnp.arange(n))
    cube = jax.vmap(lambda k: latin_hypercube(k, starts, space.nuisance.shape[1]))(keys)
    alpha = (cube * space.nuisance_stddev[None, None]).reshape(n * starts, -1)
    unknowns = (alpha, jnp.zeros((n * starts, bits)))
    carry = (unknowns, _optimizer(learning_rate, decay).init(unknowns))
    options = {"loss": loss, "strength": strength, "code": code, "penalty": penalty}
    unroll = jax.default_backend() == "cpu"
    chunk = _CPU_UNROLL if unroll else _SCAN
    with Progress(steps, unit="steps", label="adam") if progress else Silent() as line:
        for done in range(0, steps, chunk):
            carry = _adam_steps(
                generator, space, prepared, carry, rate=learning_rate, decay=decay,
                steps=min(chunk, steps - done), unroll=unroll, **options,
            )  # fmt: skip
            line.update(min(done + chunk, steps))
    return _choose_start(generator, space, images, prepared, carry[0], starts, steps, options)


@jax.jit
def _prepare(loss, images):
    return jax.vmap(loss.prepare)(images)


def _choose_start(generator, space, images, prepared, unknowns, starts, steps, options):
    losses = _losses(generator, space, prepared, unknowns, **options)
    losses = jnp.where(jnp.isnan(losses), jnp.inf, losses)  # argmin would take a NaN for least
    n = len(images)
    best = jnp.argmin(losses.reshape(n, starts), axis=1) + starts * jnp.arange(n)
    soft = jax.nn.sigmoid(unknowns[1][best])
    strength, code = options["strength"], options["code"]
    w = fingerprint.compose(space, unknowns[0][best], soft, strength=strength, code=code)
    cost = starts * (3 * steps + 1) + 1
    return Solution(soft, w, residual(generator, w, images), jnp.full((n,), cost))


@jax.jit
def residual(generator, w, images):
    """Root mean square difference [n] between decoded latents [n, d] and images."""
    made = jnp.clip(decode_flat(generator, w), -1.0, 1.0)
    return jnp.sqrt(jnp.mean(jnp.square(made - images), axis=(1, 2, 3)))


class Silent:
    """A progress line that says nothing."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, done, **values):
        """Say nothing."""


def host(solution):
    """Bring a Solution to host memory as numpy arrays."""
    return jax.tree.map(np.asarray, solution)
