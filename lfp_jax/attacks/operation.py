"""What turns a formula for one image into an attack: batches, keys, bounds, drawn strengths."""

import dataclasses
import functools
import inspect
import math

import jax
import jax.numpy as jnp

ANY = (-math.inf, math.inf)  # bounds of strengths
POSITIVE = (0.0, math.inf)
SHARE = (0.0, 1.0)


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
        """Draw one value."""
        low, high = jnp.float32(self.low), jnp.float32(self.high)
        if self.log:
            return jnp.exp(jax.random.uniform(key, (), jnp.float32, jnp.log(low), jnp.log(high)))
        return jax.random.uniform(key, (), jnp.float32, low, high)


class Operation:
    """An attack on batches, made of a formula for one image.

    Attributes:
        one: the formula, `one(key, image, **options)` on [H, W, C], unclamped: what a model of the
            attack differentiates, also in its strengths.
        bounds: {strength: (least, most)}. Strengths are arguments of the compiled program and may
            be traced; the other options are compiled in.
    """

    def __init__(self, one, bounds):
        functools.update_wrapper(self, one)
        self.one, self.bounds = one, bounds
        fixed = [name for name in inspect.getfullargspec(one).kwonlyargs if name not in bounds]
        self._compiled = jax.jit(self._each, static_argnames=fixed)

    def __call__(self, key, images, *, start=0, step=0, **options):
        """Attack images [n, H, W, C] in [-1, 1]; the result is clamped to [-1, 1].

        Args:
            key: PRNG key; image i uses a fold of fold_in(key, start + i) by `step`.
            images: the images.
            start: global index of the first image.
            step: position of this attack in a sequence of several.
            **options: of the formula. A strength may be one number, [n], or a `Uniform`.
        """
        keys, options = draw(key, options, count=len(images), start=start, step=step)
        return self._compiled(keys, images, **options)

    def _each(self, keys, images, **options):
        strengths = {name: options.pop(name) for name in self.bounds if name in options}

        def attack(key, image, strengths):
            return jnp.clip(self.one(key, image, **strengths, **options), -1.0, 1.0)

        own = jax.tree.map(lambda strength: 0 if jnp.ndim(strength) else None, strengths)
        return jax.vmap(attack, in_axes=(0, 0, own))(keys, images, strengths)


def operation(**bounds):
    """Decorate a formula for one image; `name=(least, most)` bounds each of its strengths."""
    return functools.partial(Operation, bounds=bounds)


def bounded(**bounds):
    """Decorate an attack on batches with the bounds of its strengths, as `operation` does."""

    def attach(function):
        function.bounds = bounds
        return function

    return attach


def draw(key, options, *, count, start, step):
    """Give every image its key, and its own strength where an option is a `Uniform`.

    Keys are drawn apart from the attacks: one small program, instead of a part of each of them.

    Args:
        key: PRNG key.
        options: of an attack.
        count: n, how many images.
        start: global index of the first.
        step: position of the attack in a sequence.

    Returns:
        keys [n], and the options with an array [n] in place of each `Uniform`.
    """
    keys, draws = _image_keys(key, start, step, count=count)
    random = {name: value for name, value in options.items() if isinstance(value, Uniform)}
    return keys, options | _draw(draws, random) if random else options


@functools.partial(jax.jit, static_argnames="count")
def _image_keys(key, start, step, *, count):
    """Keys [count] of the images, and others [count] to draw their strengths with."""

    def split(i):
        return jax.random.split(jax.random.fold_in(jax.random.fold_in(key, i), step))

    keys = jax.vmap(split)(start + jnp.arange(count))
    return keys[:, 0], keys[:, 1]


@jax.jit
def _draw(keys, strengths):
    return {
        name: jax.vmap(lambda key, i=i, value=value: value.draw(jax.random.fold_in(key, i)))(keys)
        for i, (name, value) in enumerate(sorted(strengths.items()))
    }


@jax.custom_jvp
def floor_through(x):
    """Round down; the derivative is that of the identity, in both modes."""
    return jnp.floor(x)


floor_through.defjvp(lambda primals, tangents: (jnp.floor(primals[0]), tangents[0]))


def round_through(x):
    """Round to the nearest whole number, half up; the derivative is that of the identity."""
    return floor_through(x + 0.5)
