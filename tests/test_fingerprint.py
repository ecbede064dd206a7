"""The bits come back exactly, the nuisance part is untouched, the reference's numbers are met."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfp_jax import basis, fingerprint
from lfp_jax.errors import UserError

GOLDEN = Path(__file__).parent / "golden" / "fingerprint_sg2" / "io.npz"
CODES = pytest.mark.parametrize("code", ["binary", "antipodal"])


@pytest.fixture(scope="module")
def golden():
    """The reference's basis, keys and latents."""
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def recorded_space(golden):
    """The space of the recorded components."""
    recorded = basis.Basis(
        mean=jnp.asarray(golden["pca_mean"]),
        components=jnp.asarray(golden["pca_components"].T),
        stddev=jnp.sqrt(golden["pca_explained_variance"]),
    )
    return basis.split(recorded, bits=int(golden["key_len"]), shift=int(golden["shift"]))


@pytest.fixture(scope="module")
def space():
    """Sixteen bits in 48 dimensions, in the middle of the spectrum."""
    scale = np.geomspace(5.0, 0.01, 48)
    latents = np.random.default_rng(0).normal(size=(400, 48)) * scale + 1.0
    return basis.split(basis.fit(latents), bits=16, shift=20)


def _latents_and_bits(n, shape=(48,), seed=1):
    rng = np.random.default_rng(seed)
    latents = rng.normal(0.0, 3.0, (n, *shape)).astype(np.float32)
    return latents, rng.integers(0, 2, (n, 16), np.uint8)


def test_golden_compose(golden, recorded_space):
    alpha, key, strength = golden["alpha"].T, golden["key"].T, float(golden["sigma"])
    plain = fingerprint.compose(recorded_space, alpha, 0 * key, strength=strength, code="binary")
    marked = fingerprint.compose(recorded_space, alpha, key, strength=strength, code="binary")
    np.testing.assert_allclose(plain, golden["w0"], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(marked, golden["wx"], rtol=2e-5, atol=2e-5)


def test_golden_inject_and_read(golden, recorded_space):
    key, options = golden["key"].T, {"strength": float(golden["sigma"]), "code": "binary"}
    marked = fingerprint.inject(recorded_space, golden["w0"], key, **options)
    np.testing.assert_allclose(marked, golden["wx"], rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(
        fingerprint.read(recorded_space, golden["wx"], **options), key.astype(np.uint8)
    )


@CODES
@pytest.mark.parametrize("shape", [(48,), (4, 4, 3)])
@pytest.mark.parametrize("strength", [0.05, 1.0, 30.0])
def test_bits_come_back_exactly(space, code, shape, strength):
    latents, bits = _latents_and_bits(200, shape)
    marked = fingerprint.inject(space, latents, bits, strength=strength, code=code)
    assert marked.shape == latents.shape
    decoded = fingerprint.read(space, marked, strength=strength, code=code)
    assert decoded.dtype == jnp.uint8
    np.testing.assert_array_equal(decoded, bits)


@st.composite
def _spaces(draw):
    """Five bits in 12 dimensions: a carrier that is orthonormal, or askew and read by its duals."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    directions = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    duals, askew = directions, draw(st.booleans())
    if askew:
        directions = directions @ (np.eye(12) + 0.3 * np.triu(rng.normal(size=(12, 12)), 1))
        duals = np.linalg.inv(directions).T
    carrier, nuisance, carrier_dual, nuisance_dual = (
        jnp.asarray(part, jnp.float32)
        for each in (directions, duals)
        for part in (each[:, :5], each[:, 5:])
    )
    return basis.Space(
        mean=jnp.asarray(draw(st.floats(-10.0, 10.0)) * rng.normal(size=12), jnp.float32),
        carrier=carrier,
        nuisance=nuisance,
        nuisance_stddev=jnp.ones(7),
        carrier_stddev=jnp.ones(5),
        carrier_dual=carrier_dual if askew else None,
        nuisance_dual=nuisance_dual if askew else None,
    )


@given(
    space=_spaces(),
    seed=st.integers(0, 2**32 - 1),
    strength=st.floats(0.1, 50.0),
    code=st.sampled_from(list(fingerprint.CODES)),
)
def test_injection_replaces_the_carrier_part_and_nothing_else(space, seed, strength, code):
    rng = np.random.default_rng(seed)
    latents, options = rng.normal(0.0, 3.0, (4, 12)), {"strength": strength, "code": code}
    old, bits = rng.integers(0, 2, (2, 4, 5), np.uint8)
    marked = fingerprint.inject(space, latents, bits, **options)
    size = np.abs(latents - np.asarray(space.mean)[None]).max() + strength
    close = partial(np.testing.assert_allclose, rtol=0.0, atol=3e-5 * size)
    np.testing.assert_array_equal(fingerprint.read(space, marked, **options), bits)
    steps = strength * np.asarray(fingerprint.code(bits, form=code))
    close(fingerprint.carrier_part(space, marked), steps)
    close(
        fingerprint.whitened_nuisance(space, marked), fingerprint.whitened_nuisance(space, latents)
    )
    before = fingerprint.inject(space, latents, old, **options)
    close(fingerprint.inject(space, before, bits, **options), marked)  # the last key counts


def test_one_key_for_all_and_batch_against_loop(space):
    latents, bits = _latents_and_bits(6)
    each = fingerprint.inject(space, latents, bits, strength=1.5)
    loop = [
        fingerprint.inject(space, w[None], b, strength=1.5)[0]
        for w, b in zip(latents, bits, strict=True)
    ]
    np.testing.assert_allclose(each, np.stack(loop), atol=1e-5)
    same = fingerprint.inject(space, latents, bits[0], strength=1.5)
    repeated = fingerprint.inject(space, latents, np.tile(bits[:1], (6, 1)), strength=1.5)
    np.testing.assert_array_equal(same, repeated)


def test_jit_against_eager(space):
    latents, bits = _latents_and_bits(8)
    jitted = fingerprint.inject(space, latents, bits, strength=1.5)
    with jax.disable_jit():
        eager = fingerprint.inject(space, latents, bits, strength=1.5)
        decoded = fingerprint.read(space, jitted, strength=1.5)
    np.testing.assert_allclose(jitted, eager, atol=1e-5)
    np.testing.assert_array_equal(decoded, bits)


def test_compose_inverts_the_split(space):
    latents, bits = _latents_and_bits(8)
    marked = fingerprint.inject(space, latents, bits, strength=1.5)
    alpha = (marked - space.mean[None]) @ space.nuisance
    together = fingerprint.compose(space, alpha, bits, strength=1.5)
    np.testing.assert_allclose(together, marked, atol=2e-5)
    alone = fingerprint.compose(space, alpha[0], bits[0], strength=1.5)
    np.testing.assert_allclose(alone, together[0], atol=1e-5)


def test_strength_is_traced_once(space):
    latents, bits = _latents_and_bits(3)
    before = fingerprint.inject._cache_size()
    for strength in (0.5, 0.75, 1.25):
        fingerprint.inject(space, latents, bits, strength=strength)
    assert fingerprint.inject._cache_size() - before <= 1


def test_no_d_by_d_matrix_at_the_size_of_a_first_stage():
    d, n, k = 12_288, 2, 4
    carrier = jnp.zeros((d, k)).at[jnp.arange(k), jnp.arange(k)].set(1.0)
    wide = basis.Space(
        mean=jnp.zeros(d),
        carrier=carrier,
        nuisance=jnp.zeros((d, 1)),
        nuisance_stddev=jnp.ones(1),
        carrier_stddev=jnp.ones(k),
    )
    latents = jax.ShapeDtypeStruct((n, 64, 64, 3), jnp.float32)
    bits = jax.ShapeDtypeStruct((n, k), jnp.uint8)
    program = fingerprint.inject.lower(wide, latents, bits, strength=1.0).compile()
    assert program.memory_analysis().temp_size_in_bytes < 8 * 4 * d * max(n, k)


def test_mistakes_name_the_value_and_the_bound(space):
    latents, bits = _latents_and_bits(3)
    with pytest.raises(UserError, match="Unknown code 'antipodol'. Did you mean 'antipodal'"):
        fingerprint.inject(space, latents, bits, strength=1.0, code="antipodol")
    with pytest.raises(ValueError, match=r"Latents must have 48 values each; got 24"):
        fingerprint.inject(space, latents[:, :24], bits, strength=1.0)
    with pytest.raises(ValueError, match=r"bits must be \[3, 16\] or \[16\]; got \[2, 16\]"):
        fingerprint.inject(space, latents, bits[:2], strength=1.0)
