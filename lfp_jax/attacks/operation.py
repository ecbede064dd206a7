"""What turns a formula for one image into an attack: batches, keys, bounds, drawn strengths."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("low", "high"), meta_fields=("log",)
)
@dataclasses.dataclass(frozen=True)
class Uniform:
    """A strength that every image draws for itself, from [low, high); `log` draws its logarithm."""

    low: float
    high: float
    log: bool = False

    def draw(self, key):
        """Draw one value; it depends on the key only."""
        if self.log:
            return jnp.exp(jax.random.uniform(key, (), jnp.float32, *map(jnp.log, self._ends())))
        return jax.random.uniform(key, (), jnp.float32, *self._ends())

    def _ends(self):
        return jnp.float32(self.low), jnp.float32(self.high)


class Operation:
    """An attack on batches [n, H, W, C] in [-1, 1], made of a formula for one image.

    Image i gets the key fold_in(key, start + i); the result is clamped to [-1, 1].

    Attributes:
        one: the formula, `one(key, image, **options)` on [H, W, C], unclamped: what a model of the
            attack differentiates, also in its strengths.
        bounds: {strength: (least, most)}. Strengths may be traced; the other options may not.
    """

    def __init__(self, one, bounds):
        functools.update_wrapper(self, one)
        self.one, self.bounds = one, bounds

    def __call__(self, key, images, *, start=0, **options):
        """Attack a batch; a strength may be a number, traced or not, or a `Uniform`."""
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(start + jnp.arange(len(images)))
        return self.with_keys(keys, images, **options)

    def with_keys(self, keys, images, **options):
        """Attack images [n, H, W, C] with keys [n], one each."""

        def attack(key, image):
            key, draws = jax.random.split(key)
            drawn = {
                name: value.draw(jax.random.fold_in(draws, i)) if _is_random(value) else value
                for i, (name, value) in enumerate(sorted(options.items()))
            }
            return jnp.clip(self.one(key, image, **drawn), -1.0, 1.0)

        return jax.vmap(attack)(keys, images)


def operation(**bounds):
    """Decorate a formula for one image; `name=(least, most)` bounds each of its strengths."""
    return functools.partial(Operation, bounds=bounds)


def _is_random(value):
    return isinstance(value, Uniform)


ANY = (-math.inf, math.inf)
POSITIVE = (0.0, math.inf)
SHARE = (0.0, 1.0)


@jax.custom_jvp
def floor_through(x):
    """Round down; the derivative is that of the identity, in both modes."""
    return jnp.floor(x)


floor_through.defjvp(lambda primals, tangents: (jnp.floor(primals[0]), tangents[0]))


def round_through(x):
    """Round to the nearest whole number, half up; the derivative is that of the identity."""
    return floor_through(x + 0.5)
