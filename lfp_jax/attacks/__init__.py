"""What happens to an image between the model and the judge: attacks, and suites of them by name.

Every attack starts from and ends in 8 bits. Strengths and their units are told by the functions in
`photometric`, `geometric`, `degradation`, `occlusion` and `jpeg`; the suites below are those of
published tables, with the values of the cited code. The image size stays.
"""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp

from lfp_jax import images as files
from lfp_jax.attacks.degradation import blur, median, noise, salt_and_pepper
from lfp_jax.attacks.geometric import crop, flip, perspective, resize, rotate, translate
from lfp_jax.attacks.jpeg import jpeg, jpeg_approximate
from lfp_jax.attacks.occlusion import erase, text
from lfp_jax.attacks.operation import Operation, Uniform
from lfp_jax.attacks.photometric import brightness, contrast, greyscale, hue, saturation, sharpness
from lfp_jax.errors import UserError, choose, did_you_mean

FUNCTIONS = {
    function.__name__: function
    for function in (
        blur, brightness, contrast, crop, erase, flip, greyscale, hue, jpeg, jpeg_approximate,
        median, noise, perspective, resize, rotate, salt_and_pepper, saturation, sharpness, text,
        translate,
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Attack:
    """A named sequence of steps; without steps, 8-bit rounding alone."""

    name: str
    steps: tuple = ()  # ((function name, ((option, value), ...)), ...)


def chain(name, **steps):
    """Make an attack of several steps, in the order given.

    Args:
        name: what tables call it.
        **steps: {function: {option: value}}. A strength may be a `Uniform`: each image draws its
            own.

    Raises:
        UserError: an unknown function or option, one that is missing, or a strength out of range.
    """
    return Attack(name, tuple((step, _options(step, given)) for step, given in steps.items()))


def attack(name, /, **options):
    """Make an attack of one step, e.g. `attack("noise", std=0.1)`.

    Raises:
        UserError: an unknown function or option, one that is missing, or a strength out of range.
    """
    label = ",".join(f"{option}={value}" for option, value in options.items())
    return chain(f"{name}({label})" if label else name, **{name: options})


def suite(name):
    """Return the attacks of a suite; see `SUITES`.

    Raises:
        UserError: an unknown name.
    """
    return choose(name, SUITES, "suite")


def apply(key, images, attack, *, start=0):
    """Attack images as a judge would meet them: from 8 bits to 8 bits, through the real JPEG.

    Every step is compiled once for a shape; strengths are arguments of the program.

    Args:
        key: PRNG key. Image i uses fold_in(key, start + i), and of that a fold for each step, so
            that the result does not depend on how images are batched.
        images: [n, H, W, 1 or 3], nominally in [-1, 1]; clamped.
        attack: an `Attack`.
        start: global index of the first image.

    Returns:
        float32 NumPy array of the same shape, levels of 8 bits mapped to [-1, 1].

    Raises:
        UserError: a pixel is NaN.
    """
    images = files.from_uint8(files.to_uint8(images))
    for index, (name, options) in enumerate(attack.steps):
        if isinstance(FUNCTIONS[name], Operation):
            images = _step(key, start, index, images, *_sort(name, options))
        else:
            images = FUNCTIONS[name](key, images, **dict(options))
    return files.from_uint8(files.to_uint8(images))


def simulate(key, images, attack, *, start=0):
    """Attack images within a JAX program: differentiable, JPEG approximated, no 8-bit rounding.

    Args and result are those of `apply`, but for JAX arrays; keys, and so what is drawn, agree.
    """
    for index, (name, options) in enumerate(attack.steps):
        name = "jpeg_approximate" if name == "jpeg" else name
        images = _step(key, start, index, images, *_sort(name, options))
    return images


@functools.partial(jax.jit, static_argnames=("name", "fixed"))
def _step(key, start, index, images, strengths, name, fixed):
    def one_key(i):
        return jax.random.fold_in(jax.random.fold_in(key, i), index)

    keys = jax.vmap(one_key)(start + jnp.arange(len(images)))
    return FUNCTIONS[name].with_keys(keys, images, **strengths, **dict(fixed))


def _sort(name, options):
    """Split options into strengths, which programs take as arguments, and those compiled in."""
    bounds = FUNCTIONS[name].bounds
    strengths = {option: value for option, value in options if option in bounds}
    return strengths, name, tuple(pair for pair in options if pair[0] not in bounds)


def _options(name, given):
    """Check the options of one step; strengths become floats. ((option, value), ...)"""
    function = choose(name, FUNCTIONS, "attack")
    known = {
        p.name: p for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }  # fmt: skip
    for option in given:
        if option not in known:
            raise UserError(did_you_mean(option, known, f"option of attack '{name}':"))
    missing = [n for n, p in known.items() if p.default is p.empty and n not in given]
    if missing:
        raise UserError(f"Attack '{name}' needs {', '.join(missing)}.")
    bounds = getattr(function, "bounds", {})
    return tuple(
        (option, _strength(name, option, value, bounds[option]) if option in bounds else value)
        for option, value in given.items()
    )


def _strength(name, option, value, bounds):
    """Check a number, a pair of them, or a `Uniform`, against (least, most)."""
    leaves, form = jax.tree.flatten(value)
    low, high = bounds
    if not all(low <= leaf <= high for leaf in leaves):
        raise UserError(f"{option} of '{name}' must be in {low:g} .. {high:g}; got {value}.")
    return jax.tree.unflatten(form, map(float, leaves))


SUITES = {
    # Every other attack starts from, and ends in, 8 bits too.
    "none": (Attack("none"),),
    # Nie et al. 2023, the paper as published; noise on the [-1, 1] scale.
    "paper": (
        chain("noise", noise={"std": 0.1}),
        chain("blur", blur={"sigma": 0.5, "window": 25}),
        chain("jpeg", jpeg={"quality": 50}),
        chain(
            "combination",
            blur={"sigma": 0.5, "window": 25},
            noise={"std": 0.1},
            jpeg={"quality": 50},
        ),
    ),
    # The same paper's code, at an earlier state.
    "paper-history": (
        chain("crop", crop={"keep": 0.8}),
        chain("noise", noise={"std": 0.1}),
        chain("blur", blur={"sigma": 2.0, "window": 25}),
        chain("jpeg", jpeg={"quality": 50}),
        chain(
            "combination",
            blur={"sigma": 2.0, "window": 25},
            crop={"keep": 0.8},
            noise={"std": 0.1},
            jpeg={"quality": 50},
        ),
    ),
}
