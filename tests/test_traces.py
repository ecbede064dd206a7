"""One compilation a shape, whatever the weights, keys and values; no weights inside programs."""

import contextlib
import logging
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfp_jax import basis
from lfp_jax.attribution import bank as banks
from lfp_jax.attribution import inversion, least_squares
from lfp_jax.generators import stylegan2
from lfp_jax.metrics import perceptual

# Sizes that no other test has: nothing of it is compiled when these tests begin.
ARCH = stylegan2.Architecture(
    resolution=8, channels=(12, 8), z_dim=28, w_dim=28, mapping_layers=2, mapping_width=28
)
BITS, IMAGES, BANK = 6, 3, 16
LEAST_WEIGHTS = 2_000  # bytes; most kernels of the generator have more
MANY = 10  # arguments of a program that takes a network


@pytest.fixture(scope="module")
def cases(quick_compilation):
    """Give two of (generator, space, bank, images) with one set of shapes and no value alike."""

    def draw(seed):
        keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(3)]
        generator = stylegan2.random_generator(keys[0], ARCH)
        space = basis.split(basis.fit(np.asarray(generator.sample(keys[1], 64))), bits=BITS)
        latents = generator.sample(keys[2], BANK)
        made = jnp.clip(decoded(generator, latents), -1.0, 1.0)
        metric = jnp.eye(ARCH.w_dim)
        small = banks.thumbnails(made)
        bank = banks.Bank(latents, small, metric)
        return generator, space, bank, made[:IMAGES]

    return draw(0), draw(1)


@jax.jit
def decoded(generator, latents):
    return generator.decode(latents)


def adam(key, case, strength):
    generator, space, _, made = case
    options = {"loss": perceptual.loss("laplacian", levels=2), "starts": 2, "steps": 8}
    options |= {"strength": strength, "code": "binary", "progress": False}
    return inversion.adam(key, generator, space, made, **options)


def lm(key, case, strength):
    generator, space, bank, made = case
    options = {"bank": bank, "ranks": (ARCH.w_dim,), "jacobians": 2, "chords": 2}
    options |= {"strength": strength, "code": "antipodal", "progress": False}
    return least_squares.lm(key, generator, space, made, **options)


def decode(key, case, strength):
    generator = case[0]
    return decoded(generator, strength * jax.random.normal(key, (5, ARCH.w_dim)))


@contextlib.contextmanager
def compilations():
    """Count, by program, what is compiled: of all programs, and of those that take a network."""
    every, networks = Counter(), Counter()

    class Collector(logging.Handler):
        def emit(self, record):
            message = record.getMessage()
            named = re.match(r"Compiling (\S+) with global shapes", message)
            if named:
                every[named[1]] += 1
                if message.count("ShapedArray") >= MANY:
                    networks[named[1]] += 1

    collector, logger = Collector(), logging.getLogger("jax")
    propagates, logger.propagate = logger.propagate, False  # the log is read, not shown
    level = logger.level
    logger.setLevel(logging.WARNING)  # the command line, tried in another test, quiets it
    logger.addHandler(collector)
    try:
        with jax.log_compiles():
            yield every, networks
    finally:
        logger.removeHandler(collector)
        logger.propagate = propagates
        logger.setLevel(level)


@pytest.fixture
def small_constants_only():
    """Make constants of a kernel's size an error: jax warns, and warnings are errors here."""
    before = jax.config.jax_captured_constants_warn_bytes
    jax.config.update("jax_captured_constants_warn_bytes", LEAST_WEIGHTS)
    yield
    jax.config.update("jax_captured_constants_warn_bytes", before)


@pytest.mark.parametrize("work", [decode, adam, lm])
def test_one_compilation_a_shape_and_no_weights_in_it(work, cases, small_constants_only):
    with compilations() as (_, networks):
        first = jax.block_until_ready(work(jax.random.key(5), cases[0], 0.5))
    assert networks and set(networks.values()) == {1}, networks
    with compilations() as (every, _):
        second = jax.block_until_ready(work(jax.random.key(6), cases[1], 0.75))
    assert not every, "other weights, images, keys and strength: nothing new to compile"
    for one, other in zip(jax.tree.leaves(first)[:1], jax.tree.leaves(second)[:1], strict=True):
        assert np.abs(np.asarray(one) - np.asarray(other)).max() > 0.0


def test_weights_in_a_closure_would_be_found(cases, small_constants_only):
    generator = cases[0][0]
    with pytest.raises(UserWarning, match="constants were captured"):
        jax.jit(lambda w: generator.decode(w))(jnp.zeros((5, ARCH.w_dim)))
