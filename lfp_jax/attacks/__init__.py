"""What happens to an image between the model and the judge: attacks, and suites of them by name.

Every attack starts from and ends in 8 bits. Strengths and their units are told by the functions in
`photometric`, `geometric`, `degradation`, `occlusion`, `jpeg` and `regeneration`; the suites below
are those of published tables, with the values of the cited code. The image size stays.
"""

import dataclasses
import inspect
import numbers

import jax

from lfp_jax import images as files
from lfp_jax.attacks.degradation import blur, median, noise, salt_and_pepper
from lfp_jax.attacks.geometric import crop, flip, perspective, resize, rotate, translate
from lfp_jax.attacks.jpeg import jpeg, jpeg_approximate
from lfp_jax.attacks.occlusion import erase, text
from lfp_jax.attacks.operation import Uniform as Uniform
from lfp_jax.attacks.photometric import brightness, contrast, greyscale, hue, saturation, sharpness
from lfp_jax.attacks.regeneration import rediffuse, regenerate
from lfp_jax.errors import UserError, choose, did_you_mean

FUNCTIONS = {
    function.__name__: function
    for function in (
        blur, brightness, contrast, crop, erase, flip, greyscale, hue, jpeg, jpeg_approximate,
        median, noise, perspective, rediffuse, regenerate, resize, rotate, salt_and_pepper,
        saturation, sharpness, text, translate,
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


def find(name):
    """Return one attack of a suite, e.g. "paper:blur"; "none" is that of the suite of this name.

    Raises:
        UserError: an unknown suite, or an attack that it does not have.
    """
    table, _, row = name.partition(":")
    return choose(row or table, {each.name: each for each in suite(table)}, f"attack of '{table}'")


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
        images = FUNCTIONS[name](key, images, start=start, step=index, **dict(options))
    return files.from_uint8(files.to_uint8(images))


def in_jax(name):
    """Return the function of an attack that runs within a JAX program: JPEG is approximated."""
    return jpeg_approximate if name == "jpeg" else FUNCTIONS[name]


def simulate(key, images, attack, *, start=0):
    """Attack images within a JAX program: differentiable, JPEG approximated, no 8-bit rounding.

    Args and result are those of `apply`, but for JAX arrays; keys, and so what is drawn, agree.
    """
    for index, (name, options) in enumerate(attack.steps):
        images = in_jax(name)(key, images, start=start, step=index, **dict(options))
    return images


def _options(name, given):
    """Check the options of one step; strengths become floats. ((option, value), ...)"""
    function = choose(name, FUNCTIONS, "attack")
    spec = inspect.getfullargspec(getattr(function, "one", function))
    known = [option for option in spec.kwonlyargs if option not in ("start", "step")]
    for option in given:
        if option not in known:
            raise UserError(did_you_mean(option, known, f"option of attack '{name}':"))
    missing = set(known) - set(given) - set(spec.kwonlydefaults or ())
    if missing:
        raise UserError(f"Attack '{name}' needs a value of {', '.join(sorted(missing))}.")
    bounds = function.bounds
    return tuple(
        (option, _strength(name, option, value, bounds[option]) if option in bounds else value)
        for option, value in given.items()
    )


def _strength(name, option, value, bounds):
    """Check a number, a pair of them, or a `Uniform`, against (least, most)."""
    leaves, form = jax.tree.flatten(value)
    low, high = bounds
    if not all(isinstance(leaf, numbers.Real) and low <= leaf <= high for leaf in leaves):
        raise UserError(f"{option} of '{name}' must be in {low:g} .. {high:g}; got {value}.")
    return jax.tree.unflatten(form, map(float, leaves))


def _sweep(function, option, *values, **others):
    """One attack for each value of an option, named after both."""
    return tuple(
        chain(f"{function}-{value:g}", **{function: {option: value, **others}}) for value in values
    )


def _waves(strength):
    """The distortions of WAVES at a strength in 0..1, which maps linearly to each one's range."""
    geometric = {
        "rotate": {"degrees": 45.0 * strength},
        "crop": {"keep": (1.0 - 0.5 * strength) ** 0.5, "random": True},
        "erase": {"area": 0.25 * strength},
    }
    photometric = {
        "brightness": {"factor": 1.0 + strength},
        "contrast": {"factor": 1.0 + strength},
    }
    degradation = {
        "blur": {"sigma": 20.0 * strength, "window": 161},
        "noise": {"std": _OF_0_1 * 0.1 * strength},
        "jpeg": {"quality": round(90 - 80 * strength)},
    }
    every = geometric | photometric | degradation
    combined = {
        "geometric": geometric,
        "photometric": photometric,
        "degradation": degradation,
        "all": every,
    }
    rows = {name: {name: options} for name, options in every.items()} | combined
    return tuple(chain(f"{name}-{strength:g}", **steps) for name, steps in rows.items())


_OF_0_1 = 2.0  # a standard deviation stated on [0, 1] is twice that on [-1, 1]
_JITTER_6 = Uniform(0.0, 7.0)  # "brightness 6" of torchvision's ColorJitter: factor 1 - 6 to 1 + 6

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
    # Kim et al. 2021, Decentralized Attribution; noise on [-1, 1], sigma a third of the window.
    "kim21": (
        chain("crop", crop={"keep": 0.8}),
        chain("noise", noise={"std": 0.3}),
        chain("blur", blur={"sigma": 3.0, "window": 9}),
        chain("jpeg", jpeg={"quality": 50}),
        chain(
            "combination",
            blur={"sigma": 3.0, "window": 9},
            crop={"keep": 0.8},
            noise={"std": 0.1},
            jpeg={"quality": 50},
        ),
    ),
    # Kim et al. 2024, WOUAF. Strengths are drawn for each image.
    "wouaf": (
        chain("translate", translate={"down": Uniform(-0.1, 0.1), "right": Uniform(-0.1, 0.1)}),
        chain("rotate", rotate={"degrees": Uniform(-30.0, 30.0)}),
        *_sweep("blur", "window", 3, 5, 7, sigma=Uniform(1.0, 3.0)),
        chain("brightness", brightness={"factor": Uniform(0.7, 1.3)}),
        chain("noise", noise={"std": _OF_0_1 * 0.2}),
        chain("erase", erase={"area": Uniform(0.02, 0.33), "aspect": Uniform(0.3, 3.3, log=True)}),
        chain("jpeg", jpeg={"quality": 50}),
    ),
    # Fernandez et al. 2023. Crop and resize are named by area, as its code takes them.
    "stable-signature": (
        chain("crop-0.5", crop={"keep": 0.5**0.5}),
        chain("crop-0.1", crop={"keep": 0.1**0.5}),
        *_sweep("rotate", "degrees", 25, 90),
        *_sweep("jpeg", "quality", 80, 50),
        *_sweep("brightness", "factor", 1.5, 2.0),
        *_sweep("contrast", "factor", 1.5, 2.0),
        *_sweep("saturation", "factor", 1.5, 2.0),
        *_sweep("sharpness", "factor", 1.5, 2.0),
        chain("resize-0.5", resize={"scale": 0.5**0.5}),
        chain("resize-0.1", resize={"scale": 0.1**0.5}),
        chain("text", text={}),
        chain(
            "combination",
            crop={"keep": 0.5**0.5},
            brightness={"factor": 1.5},
            jpeg={"quality": 80},
        ),
    ),
    # An et al. 2024, WAVES; its strength runs from 0 to 1.
    "waves": (*_waves(0.25), *_waves(0.5), *_waves(1.0)),
    # Wen et al. 2023. The crop takes 0.75 of the area at an aspect of 0.75: full height, 0.75 wide.
    "tree-ring": (
        chain("rotate", rotate={"degrees": 75.0}),
        chain("jpeg", jpeg={"quality": 25}),
        chain("crop", crop={"keep": (1.0, 0.75), "random": True}),
        chain("blur", blur={"sigma": 4.0, "window": 33}),
        chain("noise", noise={"std": _OF_0_1 * 0.1}),
        chain("brightness", brightness={"factor": _JITTER_6}),
    ),
    # Yang et al. 2024. Crop and drop keep, or blacken, a square of 0.6 or 0.8 of each side.
    "gaussian-shading": (
        chain("jpeg", jpeg={"quality": 25}),
        chain("crop", erase={"area": 0.6**2, "outside": True}),
        chain("drop", erase={"area": 0.8**2}),
        chain("blur", blur={"sigma": 4.0, "window": 33}),
        chain("median", median={"window": 7}),
        chain("noise", noise={"std": _OF_0_1 * 0.05}),
        chain("salt-and-pepper", salt_and_pepper={"amount": 0.05}),
        chain("resize", resize={"scale": 0.25}),
        chain("brightness", brightness={"factor": _JITTER_6}),
    ),
    # The noise of the two above as their code adds it: in uint8, where it wraps around.
    "wrapped-noise": (
        chain("tree-ring", noise={"std": _OF_0_1 * 0.1, "wrap": True}),
        chain("gaussian-shading", noise={"std": _OF_0_1 * 0.05, "wrap": True}),
    ),
    # Zhao et al. 2023: made anew by the latent-diffusion model of the demo.
    "regeneration": (chain("vae", regenerate={}), *_sweep("rediffuse", "level", 30, 60, 100)),
    # Fernandez et al. 2024, Video Seal, on single frames.
    "videoseal": (
        chain("flip", flip={}),
        *_sweep("rotate", "degrees", 5, 10, 30, 45, 90),
        *_sweep("resize", "scale", 0.32, 0.45, 0.55, 0.63, 0.71, 0.77, 0.84, 0.89, 0.95, 1.0),
        *_sweep("crop", "keep", 0.32, 0.45, 0.55, 0.63, 0.71, 0.77, 0.84, 0.89, 0.95, 1.0),
        *_sweep("perspective", "distortion", 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
        *_sweep("brightness", "factor", 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0),
        *_sweep("contrast", "factor", 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0),
        *_sweep("hue", "turn", -0.4, -0.3, -0.2, -0.1, 0.1, 0.2, 0.3, 0.4, 0.5),
        chain("greyscale", greyscale={}),
        *_sweep("jpeg", "quality", 40, 50, 60, 70, 80, 90),
        *(
            chain(f"blur-{w}", blur={"sigma": 0.3 * ((w - 1) / 2 - 1) + 0.8, "window": w})
            for w in (3, 5, 9, 13, 17)
        ),
        chain(
            "combination",
            jpeg={"quality": 40},
            crop={"keep": 0.71},
            brightness={"factor": 0.5},
        ),
    ),
}
