"""Principal directions against the recorded ones, and the split's bounds."""

from pathlib import Path

import jax
import jax.numpy as jnp
import linear_generator
import numpy as np
import pytest

from configs import ldm as ldm_config
from configs import stylegan2 as stylegan2_config
from lfp_jax import basis, design, fingerprint, generators, sensitivity
from lfp_jax.errors import UserError
from lfp_jax.generators import stylegan2, untrained, zoo
from lfp_jax.training import directions

GOLDEN = Path(__file__).parent / "golden" / "fingerprint_sg2" / "io.npz"


@pytest.fixture(scope="module")
def golden():
    """2,000 latents of the reference and their PCA by scikit-learn."""
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def fitted(golden):
    """The basis of the recorded latents."""
    return basis.fit(golden["w_samples"])


def _latents(n, d, seed=0):
    scale = np.geomspace(10.0, 0.01, d)
    mixing = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
    return (np.random.default_rng(seed + 1).normal(size=(n, d)) * scale) @ mixing + 3.0


def test_golden_directions_up_to_sign(golden, fitted):
    recorded = golden["pca_components_f64"].T
    agreement = np.abs(np.sum(recorded * np.asarray(fitted.components), axis=0))
    np.testing.assert_allclose(agreement, 1.0, rtol=0.0, atol=1e-5)
    np.testing.assert_allclose(fitted.mean, golden["pca_mean"], atol=1e-5)
    spread = np.sqrt(golden["pca_explained_variance_f64"])
    np.testing.assert_allclose(fitted.stddev, spread, rtol=1e-5)


def test_golden_carrier_as_a_subspace(golden, fitted):
    shift, bits = int(golden["shift"]), int(golden["key_len"])
    space = basis.split(fitted, bits=bits, shift=shift)
    recorded = golden["pca_components"][shift : shift + bits].T
    cosines = np.linalg.svd(recorded.T @ np.asarray(space.carrier), compute_uv=False)
    np.testing.assert_allclose(cosines, 1.0, atol=1e-5)
    np.testing.assert_allclose(space.nuisance_stddev, golden["sigma_U"][:, 0], rtol=1e-4)


@pytest.mark.parametrize("n", [400, 12])
def test_orthonormal_falling_and_signed(n):
    fitted = basis.fit(_latents(n, 24))
    m = min(24, n - 1)
    v = np.asarray(fitted.components)
    assert v.shape == (24, m)
    assert v.dtype == np.float32
    np.testing.assert_allclose(v.T @ v, np.eye(m), atol=1e-5)
    assert np.all(np.diff(np.asarray(fitted.stddev)) <= 0.0)
    assert np.all(v[np.abs(v).argmax(axis=0), np.arange(m)] > 0.0)


def test_sign_rule_forgets_the_sign_of_the_data():
    x = _latents(300, 10)
    there, back = basis.fit(x), basis.fit(-x)
    np.testing.assert_allclose(there.components, back.components, atol=1e-6)
    np.testing.assert_allclose(there.mean, -np.asarray(back.mean), atol=1e-6)


def test_projected_latents_have_the_stated_spread():
    x = _latents(500, 16)
    fitted = basis.fit(x)
    coordinates = (x - np.asarray(fitted.mean)) @ np.asarray(fitted.components)
    np.testing.assert_allclose(coordinates.std(axis=0, ddof=1), fitted.stddev, rtol=1e-3)


def test_chunks_and_latent_shape_change_nothing(monkeypatch):
    x = _latents(200, 12)
    whole = basis.fit(x)
    monkeypatch.setattr(basis, "_CHUNK", 17)
    parts = basis.fit(jnp.asarray(x, jnp.float32).reshape(200, 2, 3, 2))
    np.testing.assert_allclose(whole.components, parts.components, atol=2e-5)


def test_split_shares_out_every_direction(fitted):
    space = basis.split(fitted, bits=8, shift=20)
    v = np.asarray(fitted.components)
    np.testing.assert_array_equal(space.carrier, v[:, 20:28])
    np.testing.assert_array_equal(space.nuisance, np.delete(v, range(20, 28), axis=1))
    np.testing.assert_array_equal(space.carrier_stddev, fitted.stddev[20:28])
    np.testing.assert_array_equal(space.nuisance_stddev, np.delete(fitted.stddev, range(20, 28)))


def test_split_defaults_to_the_least_variance(fitted):
    np.testing.assert_array_equal(
        basis.split(fitted, bits=16).carrier, np.asarray(fitted.components)[:, 48:]
    )
    assert basis.split(fitted).nuisance.shape == (64, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 16, "shift": 60}, r"shift \+ bits must be <= latent dim; got 60 \+ 16 > 64\."),
        ({"bits": 0}, r"bits must be 1..64, the latent dim; got 0\."),
        ({"bits": 65}, r"bits must be 1..64, the latent dim; got 65\."),
        ({"bits": 8, "shift": -1}, r"shift must be >= 0; got -1\."),
        ({"bits": 8, "repeat": 0}, r"repeat must be >= 1; got 0\."),
        (
            {"bits": 16, "shift": 20, "repeat": 3},
            r"shift \+ repeat \* bits must be <= latent dim; got 20 \+ 3 \* 16 > 64\.",
        ),
    ],
)
def test_split_bounds(fitted, options, message):
    with pytest.raises(UserError, match=message):
        basis.split(fitted, **options)


@pytest.mark.parametrize("turned", [False, True])
def test_a_repeated_bit_is_carried_by_several_directions(turned):
    fitted, latents = basis.fit(_latents(400, 24)), _latents(5, 24, seed=7)
    fitted = basis.turn(fitted, np.diag(np.arange(1.0, 25.0))) if turned else fitted
    space = basis.split(fitted, bits=4, shift=6, repeat=3)
    v = np.asarray(fitted.components)
    for bit in range(4):  # each third direction's step is the same
        steps = np.linalg.lstsq(v, np.asarray(space.carrier)[:, bit], rcond=None)[0]
        np.testing.assert_allclose(steps[[6 + bit, 10 + bit, 14 + bit]], 1.0, atol=1e-3)
        np.testing.assert_allclose(np.abs(steps).sum(), 3.0, atol=2e-2)
    bits = np.random.default_rng(0).integers(0, 2, (5, 4)).astype(np.uint8)
    marked = fingerprint.inject(space, latents, bits, strength=2.0)
    np.testing.assert_array_equal(fingerprint.read(space, marked, strength=2.0), bits)
    before, after = (fingerprint.whitened_nuisance(space, w) for w in (latents, marked))
    assert before.shape == (5, 20)
    np.testing.assert_allclose(before, after, atol=1e-2)
    # The spread of what a sum measures is the one that is stated.
    coordinates = fingerprint.carrier_part(space, _latents(400, 24))
    np.testing.assert_allclose(np.std(coordinates, axis=0, ddof=1), space.carrier_stddev, rtol=1e-3)


def test_the_leading_directions_of_a_block_lie_in_its_channels():
    latents = _latents(400, 24).reshape(400, 2, 4, 3)
    split = basis.block(basis.fit(latents), shape=(2, 4, 3), channels=1)
    v = np.asarray(split.components)
    np.testing.assert_allclose(v.T @ v, np.eye(24), atol=1e-5)
    assert not v.reshape(2, 4, 3, 24)[:, :, 1:, :8].any()
    assert not v.reshape(2, 4, 3, 24)[:, :, :1, 8:].any()
    alone = basis.fit(latents[..., :1])
    np.testing.assert_allclose(split.stddev[:8], alone.stddev, rtol=1e-3)
    np.testing.assert_allclose(v.reshape(8, 3, 24)[:, 0, :8], alone.components, atol=1e-3)
    with pytest.raises(UserError, match=r"channels must be 1..2, or unset; got 3\."):
        basis.block(basis.fit(latents), shape=(2, 4, 3), channels=3)


def test_bad_latents():
    with pytest.raises(UserError, match="at least 2 latents; got 1"):
        basis.fit(np.zeros((1, 4)))
    x = _latents(20, 4)
    x[3, 2], x[4, 2] = np.inf, -np.inf
    with pytest.raises(UserError, match="2 values of the latents are not finite"):
        basis.fit(x)


def test_turned_directions_are_white_and_move_the_image_apart():
    fitted = basis.fit(_latents(400, 24))
    rows = np.random.default_rng(3).normal(size=(60, 24))
    metric = rows.T @ rows
    turned = basis.turn(fitted, metric)
    v, duals = (np.asarray(each, np.float64) for each in (turned.components, turned.duals))
    np.testing.assert_allclose(duals.T @ v, np.eye(24), atol=1e-4)
    changes = v.T @ metric @ v
    np.testing.assert_allclose(changes - np.diag(np.diag(changes)), 0.0, atol=1e-3 * changes.max())
    assert np.all(np.diff(np.diag(changes)) < 0.0)
    # The same prior: coordinates of the samples are uncorrelated and of spread 1.
    alpha = (_latents(400, 24) - np.asarray(turned.mean)) @ duals
    np.testing.assert_allclose(np.cov(alpha.T), np.eye(24), atol=1e-3)
    assert np.all(np.take_along_axis(v, np.abs(v).argmax(0)[None], 0) > 0.0)


def test_unknown_directions_are_named():
    with pytest.raises(UserError, match="Did you mean 'sensitivity'"):
        basis.measure_generator(None, None, samples=2, directions="sensitivty")


def test_shipped_directions_are_those_measured(tmp_path, monkeypatch):
    generator = untrained.make("stylegan2-tiny")
    path, key = str(tmp_path / "directions"), jax.random.fold_in(jax.random.key(7), 0)
    counts = {"samples": 80, "metric_samples": 8}
    monkeypatch.setattr(zoo, "basis", lambda name: None)
    wanted = basis.measure_generator(key, generator, directions="sensitivity", **counts)
    generators.save(str(tmp_path / "generator"), generator, source_format="lfp_jax", licence="")
    source = str(tmp_path / "generator")
    directions.train(workdir=str(tmp_path), generator=source, seed=7, **counts)
    monkeypatch.setattr(zoo, "basis", {"stylegan2-tiny": path}.get)
    measured = []
    monkeypatch.setattr(basis, "_measure", lambda *args: measured.append(args) or wanted)
    found = basis.measure_generator(key, generator, directions="sensitivity", **counts)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert not measured
    other = generator.replace(sha256="0")
    for own_key, source, more in (
        (jax.random.key(4), generator, {}),
        (key, other, {}),
        (key, generator, {"metric_samples": 9}),
    ):
        basis.measure_generator(own_key, source, directions="pca", **counts | more)
    assert len(measured) == 3


LINEAR = linear_generator.make()
METRIC = np.asarray(LINEAR.jacobian, np.float64).T @ np.asarray(LINEAR.jacobian, np.float64)


@pytest.fixture(scope="module")
def named():
    """Give bases of a linear generator by name, all of the same latents."""
    fitted = basis.fit(basis.sample(jax.random.key(0), LINEAR, 2_000))
    key = jax.random.key(1)
    return {
        "pca": fitted,
        "sensitivity": basis.turn(fitted, METRIC),
        "random": basis.random_directions(key, fitted),
        "jacobian": basis.jacobian_directions(fitted, METRIC),
        "fisher": basis.fisher_directions(key, LINEAR, fitted, METRIC, noise=0.05, samples=6),
    }


def test_random_and_jacobian_directions_are_orthonormal(named):
    for name in ("random", "jacobian"):
        v = np.asarray(named[name].components)
        np.testing.assert_allclose(v.T @ v, np.eye(16), atol=1e-5)
    v = np.asarray(named["jacobian"].components, np.float64)
    changes = v.T @ METRIC @ v
    np.testing.assert_allclose(changes, np.diag(np.diag(changes)), atol=1e-5 * changes.max())
    assert np.all(np.diff(np.diag(changes)) < 0.0)


@pytest.mark.parametrize("repeat", [1, 2])
@pytest.mark.parametrize("name", ["random", "jacobian", "fisher"])
def test_what_a_correlated_carrier_leaves_is_uncorrelated_with_it(named, name, repeat):
    space = basis.split(named[name], bits=4, shift=3, repeat=repeat)
    latents = basis.sample(jax.random.key(0), LINEAR, 2_000)  # those the basis was fitted to
    part = np.asarray(fingerprint.carrier_part(space, latents), np.float64)
    rest = np.asarray(fingerprint.whitened_nuisance(space, latents), np.float64)
    assert rest.shape == (2_000, 12)
    covariance = np.cov(np.concatenate([part / part.std(0), rest], axis=1).T)
    np.testing.assert_allclose(covariance[4:], np.eye(16)[4:], atol=2e-3)
    np.testing.assert_allclose(part.std(axis=0, ddof=1), space.carrier_stddev, rtol=1e-3)
    bits = np.random.default_rng(0).integers(0, 2, (2_000, 4)).astype(np.uint8)
    marked = fingerprint.inject(space, latents, bits, strength=0.5)
    np.testing.assert_array_equal(fingerprint.read(space, marked, strength=0.5), bits)
    np.testing.assert_allclose(
        fingerprint.whitened_nuisance(space, marked)[:50], rest[:50], atol=2e-3
    )


def test_equalised_steps_change_the_image_alike_and_strength_is_their_rms(named):
    pixels = 48
    for name, fitted in named.items():
        space = basis.split(fitted, bits=6, shift=4, metric=METRIC / pixels)
        bits = np.eye(6, dtype=np.uint8)  # each from all zeros: a bit's whole step
        both = [
            fingerprint.compose(space, np.zeros((6, 10)), b, strength=0.02)
            for b in (bits, 0 * bits)
        ]
        moved = LINEAR.decode(both[0]) - LINEAR.decode(both[1])
        mean_squares = np.square(moved).mean((1, 2, 3))
        np.testing.assert_allclose(mean_squares, 4 * 0.02**2 / 6, rtol=1e-3, err_msg=name)
        keys = np.array([[b >> i & 1 for i in range(6)] for b in range(64)])
        marked = fingerprint.compose(space, np.zeros((64, 10)), keys, strength=0.02)
        change = np.square(LINEAR.decode(marked) - LINEAR.decode(space.mean[None])).mean()
        np.testing.assert_allclose(change**0.5, 0.02, rtol=1e-3, err_msg=name)
        again = fingerprint.read(space, marked, strength=0.02)
        np.testing.assert_array_equal(again, keys)


def test_where_images_are_linear_the_fisher_directions_are_the_sensitive_ones(named):
    told, sensitive = (np.asarray(named[n].components) for n in ("fisher", "sensitivity"))
    told, sensitive = (each / np.linalg.norm(each, axis=0) for each in (told, sensitive))
    np.testing.assert_allclose(np.abs(np.sum(told * sensitive, axis=0)), 1.0, atol=1e-2)


@pytest.mark.slow
def test_the_mean_posterior_is_that_of_whole_jacobians_and_clipped_pixels_say_nothing():
    arch = stylegan2.Architecture(
        resolution=8, channels=(8, 8), z_dim=12, w_dim=12, mapping_layers=1, mapping_width=12
    )
    generator = stylegan2.random_generator(jax.random.key(0), arch)
    steps = np.random.default_rng(0).normal(size=(12, 5))
    found = sensitivity.mean_posterior(
        jax.random.key(3), generator, steps, noise=0.3, samples=6
    )  # over four devices, two of which do one more
    expected = 0.0
    for w in generator.sample(jax.random.key(3), 6):
        rows = np.asarray(jax.jacfwd(lambda w: generator.decode(w[None]).reshape(-1))(w)) @ steps
        rows = rows * (np.abs(generator.decode(w[None])).reshape(-1) < 1.0)[:, None]
        expected += np.linalg.inv(np.eye(5) + rows.T @ rows / 0.3**2) / 6
    np.testing.assert_allclose(found, expected, atol=1e-3)
    with pytest.raises(UserError, match=r"noise behind a basis must be >= 0\.02; got 0\.001\."):
        sensitivity.mean_posterior(jax.random.key(3), generator, steps, noise=1e-3)


@pytest.mark.parametrize(
    ("name", "family"),
    [("random", stylegan2_config), pytest.param("fisher", ldm_config, marks=pytest.mark.slow)],
)
def test_named_directions_are_stored_and_found_again(name, family, tmp_path):
    config = family.get_config("tiny")
    config.update(basis=name, equalise=True, strength=0.05, basis_samples=128, metric_samples=64)
    config.fisher.samples = 4
    point = design.prepare(jax.random.key(0), config, tmp_path)
    again = design.prepare(jax.random.key(5), config, tmp_path, generator=point.generator)
    found = design.stored_basis(config, tmp_path)
    for space in (again.space, found[1]):
        np.testing.assert_array_equal(space.carrier, point.space.carrier)
        np.testing.assert_array_equal(space.nuisance_dual, point.space.nuisance_dual)
    config.fisher.noise = 0.2  # only one of the two hangs on it
    assert (design.stored_basis(config, tmp_path) is None) == (name == "fisher")
