"""Attacks: what all of them promise, the suites, and the mistakes one can make with them."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfp_jax import attacks
from lfp_jax import images as files
from lfp_jax.attacks import Attack, Uniform, apply, attack, chain, simulate, suite
from lfp_jax.errors import UserError

KEY = jax.random.key(3)

# Strengths at which an attack changes nothing.
HARMLESS = {
    "noise": {"std": 0.0},
    "salt_and_pepper": {"amount": 0.0},
    "blur": {"sigma": 0.0},
    "median": {"window": 1},
    "crop": {"keep": 1.0},
    "resize": {"scale": 1.0},
    "rotate": {"degrees": 0.0},
    "translate": {"down": 0.0, "right": 0.0},
    "perspective": {"distortion": 0.0},
    "brightness": {"factor": 1.0},
    "contrast": {"factor": 1.0},
    "saturation": {"factor": 1.0},
    "sharpness": {"factor": 1.0},
    "hue": {"turn": 0.0},
    "erase": {"area": 0.0},
    "text": {"opacity": 0.0},
}
NETWORKS = {"regenerate", "rediffuse"}  # attacks by a model, see test_regeneration.py
RANDOM = {
    "noise": chain("noise", noise={"std": 0.1}),
    "salt and pepper": chain("salt and pepper", salt_and_pepper={"amount": 0.05}),
    "crop": chain("crop", crop={"keep": 0.75, "random": True}),
    "perspective": chain("perspective", perspective={"distortion": 0.5}),
    "erase": chain("erase", erase={"area": 0.25}),
    "drawn strength": chain("drawn strength", brightness={"factor": Uniform(0.5, 1.5)}),
    "sequence": chain(
        "sequence", rotate={"degrees": Uniform(-30, 30)}, noise={"std": 0.1}, jpeg={"quality": 50}
    ),
}


def _pictures(n=2, height=50, width=70, channels=3, grain=0.1):
    """Smooth colours with some grain, in 8 bits."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(-1.0, 1.0, (n, 5, 5, channels))
    smooth = jax.image.resize(coarse, (n, height, width, channels), "cubic")
    rough = np.asarray(smooth) + grain * rng.normal(size=smooth.shape)
    return files.from_uint8(files.to_uint8(rough))


def test_none_rounds_to_8_bits_and_clamps():
    floats = np.linspace(-1.5, 1.5, 48, dtype=np.float32).reshape(1, 4, 4, 3)
    [none] = suite("none")
    np.testing.assert_array_equal(
        apply(KEY, floats, none), files.from_uint8(files.to_uint8(floats))
    )


@pytest.mark.parametrize("name", attacks.SUITES)
def test_suites_run_and_keep_shape_range_and_8_bits(name):
    images = _pictures()
    names = [one.name for one in suite(name)]
    assert len(set(names)) == len(names)
    for one in suite(name):
        hash(one)
        result = apply(KEY, images, one)
        assert result.shape == images.shape, one
        assert result.dtype == np.float32, one
        np.testing.assert_array_equal(result, files.from_uint8(files.to_uint8(result)))
        assert one.name.endswith(("none", "-1")) or np.any(result != images), one


@pytest.mark.parametrize("shape", [(64, 64, 3), (64, 64, 1), (50, 70, 1), (3, 2, 3)])
def test_suites_trace_at_any_shape(shape):
    kinds = {tuple(step for step, _ in one.steps): one for s in attacks.SUITES for one in suite(s)}
    for one in kinds.values():
        images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
        result = jax.eval_shape(lambda images, one=one: simulate(KEY, images, one), images)
        assert (result.shape, result.dtype) == (images.shape, images.dtype), one


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", attacks.SUITES)
def test_suites_run_in_grey_and_at_64(name, channels):
    images = _pictures(height=64, width=64, channels=channels)
    for one in suite(name):
        assert apply(KEY, images, one).shape == images.shape, one


def test_the_papers_suites():
    assert [one.name for one in suite("paper")] == ["noise", "blur", "jpeg", "combination"]
    assert [step for step, _ in suite("paper")[-1].steps] == ["blur", "noise", "jpeg"]
    assert [step for step, _ in suite("paper-history")[-1].steps] == [
        "blur", "crop", "noise", "jpeg",
    ]  # fmt: skip


SEEDS = st.integers(0, 2**32 - 1)


def _noise(seed):
    """Two pictures of nothing, in 8 bits."""
    u8 = np.random.default_rng(seed).integers(0, 256, (2, 24, 36, 3), np.uint8)
    return files.from_uint8(u8)


@pytest.mark.parametrize("name", HARMLESS)
@settings(max_examples=5)
@given(seed=SEEDS)
def test_strength_zero_is_the_identity(name, seed):
    images = _noise(seed)
    key = jax.random.key(seed)
    np.testing.assert_array_equal(apply(key, images, attack(name, **HARMLESS[name])), images)


@pytest.mark.parametrize("name", sorted(set(attacks.FUNCTIONS) - NETWORKS))
@settings(max_examples=10)
@given(data=st.data())
def test_any_strength_keeps_shape_range_and_8_bits_and_hangs_on_the_key(name, data):
    function = attacks.FUNCTIONS[name]
    spec = inspect.getfullargspec(function.one if hasattr(function, "one") else function)
    needed = set(spec.kwonlyargs) - set(spec.kwonlydefaults or ()) - {"start", "step"}
    bounds = {option: function.bounds.get(option) for option in sorted(needed)}
    options = {
        option: 3 if span is None else data.draw(st.floats(max(span[0], -99), min(span[1], 99)))
        for option, span in bounds.items()
    }
    seed = data.draw(SEEDS)
    images, key, one = _noise(seed), jax.random.key(seed), attack(name, **options)
    made = apply(key, images, one)
    assert (made.shape, made.dtype) == (images.shape, np.float32)
    np.testing.assert_array_equal(made, files.from_uint8(files.to_uint8(made)))
    np.testing.assert_array_equal(made, apply(key, images, one))


def test_every_function_with_a_strength_is_among_the_harmless():
    strong = {name for name, f in attacks.FUNCTIONS.items() if f.bounds}
    assert strong - {"jpeg", "jpeg_approximate"} <= set(HARMLESS)


@pytest.mark.parametrize("name", RANDOM)
def test_randomness_hangs_on_key_and_global_index_only(name):
    images = np.repeat(_pictures(n=1), 4, axis=0)
    whole = apply(KEY, images, RANDOM[name], start=5)
    halves = [apply(KEY, images[:2], RANDOM[name], start=5)]
    halves.append(apply(KEY, images[2:], RANDOM[name], start=7))
    np.testing.assert_array_equal(np.concatenate(halves), whole)
    assert all(np.any(whole[0] != other) for other in whole[1:])
    assert np.any(apply(jax.random.key(4), images, RANDOM[name], start=5) != whole)


def test_simulation_draws_what_the_attack_draws():
    images = _pictures()
    one = chain("two", brightness={"factor": Uniform(0.5, 1.5)}, noise={"std": 0.1})
    simulated = jax.jit(lambda key, images: simulate(key, images, one, start=3))(KEY, images)
    gap = files.to_uint8(simulated).astype(int) - files.to_uint8(apply(KEY, images, one, start=3))
    assert np.max(np.abs(gap)) <= 1  # a tie, where the two programs differ in the last bit
    assert np.mean(gap != 0) < 1e-3


def test_strengths_may_be_given_image_by_image():
    images = _pictures()
    each = attacks.brightness(KEY, images, factor=jnp.array([0.5, 1.0]))
    np.testing.assert_allclose(each[0], 0.5 * (images[0] + 1.0) - 1.0, atol=1e-6)
    np.testing.assert_allclose(each[1], images[1], atol=1e-6)


def test_drawn_strengths_fill_their_range():
    keys = jax.random.split(KEY, 2000)
    draw = jax.jit(lambda keys, uniform: jax.vmap(uniform.draw)(keys))
    drawn = draw(keys, Uniform(0.5, 1.5))
    assert 0.5 <= drawn.min() < 0.51
    assert 1.49 < drawn.max() < 1.5
    np.testing.assert_allclose(drawn.mean(), 1.0, atol=0.03)
    aspects = draw(keys, Uniform(0.25, 4.0, log=True))
    np.testing.assert_allclose(np.mean(aspects < 1.0), 0.5, atol=0.04)


@pytest.mark.parametrize(
    ("name", "strength", "value"),
    [
        ("noise", "std", 0.1),
        ("blur", "sigma", 0.8),
        ("crop", "keep", 0.8),
        ("rotate", "degrees", 9.0),
        ("brightness", "factor", 1.2),
        ("contrast", "factor", 1.2),
        ("resize", "scale", 0.6),
    ],
)
def test_strengths_have_gradients(name, strength, value):
    image = _pictures(n=1, grain=0.0)[0]

    def loss(strength_value):
        made = attacks.FUNCTIONS[name].one(KEY, image, **{strength: strength_value})
        return jnp.mean(jnp.square(made - image[::-1]))

    step = 1e-2 * value
    strengths = jnp.array([value - step, value, value + step])
    losses, slopes = jax.jit(jax.vmap(jax.value_and_grad(loss)))(strengths)
    assert np.all(np.isfinite(slopes) & (slopes != 0.0))
    if name != "resize":  # there the number of pixels is rounded, straight through
        np.testing.assert_allclose(slopes[1], (losses[2] - losses[0]) / (2.0 * step), rtol=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: suite("papr"), "Unknown suite 'papr'. Did you mean 'paper'?"),
        (lambda: attack("jepg"), "Unknown attack 'jepg'. Did you mean 'jpeg'?"),
        (lambda: attack("blur", sigam=1), "'sigam'. Did you mean 'sigma'? Available: sigma, w"),
        (lambda: attack("translate", down=0.1), "Attack 'translate' needs a value of right."),
        (lambda: attack("crop", keep=1.5), "keep of 'crop' must be in 0 .. 1; got 1.5."),
        (lambda: attack("noise", std=Uniform(-1, 1)), "std of 'noise' must be in 0 .. inf; got U"),
        (lambda: attack("noise", std="loud"), "std of 'noise' must be in 0 .. inf; got loud."),
        (lambda: attack("jpeg", quality=0), "quality of 'jpeg' must be in 1 .. 100; got 0."),
        (lambda: apply(KEY, _pictures(), attack("blur", sigma=1, window=4)), ">= 1; got 4."),
    ],
)
def test_mistakes_are_said_in_one_line(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_attacks_made_by_hand_are_named_after_their_options():
    assert attack("noise", std=0.1) == Attack("noise(std=0.1)", (("noise", (("std", 0.1),)),))
    assert attack("flip").name == "flip"
