"""Levenberg-Marquardt: keys come back exactly, each image on its own, at the cost it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfp_jax import attacks, basis, fingerprint, images, sensitivity
from lfp_jax.attribution import bank as banks
from lfp_jax.attribution import channel, coordinates, least_squares
from lfp_jax.attribution import estimator as estimators
from lfp_jax.attribution.inversion import Solution
from lfp_jax.errors import UserError
from lfp_jax.generators import stylegan2

BITS, FREE = 8, 24
BOTH_CODES = pytest.mark.parametrize("code", ["antipodal", "binary"])


@pytest.fixture(scope="module")
def model():
    """Give generator and space."""
    arch = stylegan2.Architecture(
        resolution=8, channels=(16, 8), z_dim=32, w_dim=32, mapping_layers=2, mapping_width=32
    )
    generator = stylegan2.random_generator(jax.random.key(0), arch)
    return generator, basis.split(basis.fit(generator.sample(jax.random.key(1), 512)), bits=BITS)


@pytest.fixture(scope="module")
def cases(model):
    """Give by code: keys [4, k], 8-bit images [4, H, W, C], a bank that holds near samples."""
    generator, space = model
    latents = generator.sample(jax.random.key(3), 4)
    far = generator.sample(jax.random.key(5), 28)
    shift = jax.random.normal(jax.random.key(4), latents.shape)
    near = latents + 0.2 * jnp.std(latents, axis=0)[None] * shift
    rows = jnp.concatenate([far, near])
    metric = sensitivity.mean_metric(jax.random.key(6), generator, samples=512)
    small = banks.thumbnails(generator.decode(rows))
    bank = banks.Bank(rows, small, jnp.asarray(metric, jnp.float32))
    keys = np.asarray(jax.random.bernoulli(jax.random.key(2), 0.5, (4, BITS)), np.uint8)
    made = {}
    for code in ("antipodal", "binary"):
        marked = fingerprint.inject(space, latents, keys, strength=1.0, code=code)
        made[code] = (keys, images.png_round_trip(generator.decode(marked)), bank)
    return made


def whiten(model, cases, *, free=None):
    metric = cases["antipodal"][2].metric
    return coordinates.whiten(model[1], metric, strength=1.0, code="antipodal", free=free)


def estimate(model, case, rows, *, code="antipodal", seed=0, **options):
    _, made, bank = case
    options = {"bank": bank, "ranks": (8,), "progress": False} | options
    key = jax.random.key(seed)
    return least_squares.lm(key, *model, made[rows], strength=1.0, code=code, **options)


@BOTH_CODES
def test_keys_come_back_from_8_bit_images(model, cases, code):
    found = estimate(model, cases[code], slice(None), code=code)
    np.testing.assert_array_equal(found.bits, cases[code][0])
    assert found.soft_bits.min() >= 0.0 and found.soft_bits.max() <= 1.0
    assert float(found.residual.max()) < 12.0 / 255.0
    again = fingerprint.read(model[1], found.latents, strength=1.0, code=code)
    np.testing.assert_array_equal(again, cases[code][0])


@pytest.mark.parametrize("name", [pytest.param("blur", marks=pytest.mark.slow), "brightness"])
def test_the_strength_of_an_attack_is_estimated_with_the_latent(model, cases, name):
    keys, made, bank = cases["antipodal"]
    options = {"blur": {"sigma": 0.7}, "brightness": {"factor": 0.8}}[name]
    seen = attacks.apply(jax.random.key(0), made, attacks.attack(name, **options))
    aware = estimate(model, (keys, seen, bank), slice(None), attack="unknown")
    naive = estimate(model, (keys, seen, bank), slice(None))
    assert aware.residual.mean() < 0.5 * naive.residual.mean()
    right = [np.mean(found.bits == keys) for found in (aware, naive)]
    assert right[0] > max(0.9, right[1])


def test_a_solution_of_another_estimator_is_a_start(model, cases):
    generator, space = model
    case = cases["antipodal"]
    keys, made, bank = case
    options = {"ranks": (), "jacobians": 1, "chords": 1, "starts": 1}
    alone = estimate(model, case, slice(0, 2), **options)
    near = estimate(model, case, slice(0, 2))
    for attack in ("none", "unknown"):
        found = estimate(model, case, slice(0, 2), near=near, attack=attack, **options)
        assert np.all(found.residual < 0.5 * alone.residual)
        np.testing.assert_array_equal(found.bits, keys[:2])


def test_hybrid_adds_the_cost_of_the_network_and_does_without_one(model, cases):
    generator, space = model
    _, made, bank = cases["antipodal"]
    mark = {"strength": 1.0, "code": "antipodal"}
    arch = estimators.Architecture(patch=2, channels=(4,), blocks=0, grid=2, head=2, width=4)
    network = estimators.initial(
        jax.random.key(0), *model, metric=bank.metric, arch=arch, nuisance=4, **mark
    )
    options = {"bank": bank, "ranks": (8,), "starts": 1, "jacobians": 1, "progress": False} | mark
    args = jax.random.key(0), *model, made[:2]
    plain = least_squares.hybrid(*args, **options)
    np.testing.assert_array_equal(plain.latents, least_squares.lm(*args, **options).latents)
    more = least_squares.hybrid(*args, estimator=network, **options)
    cost = estimators.learned(*args, estimator=network, progress=False, **mark).evaluations
    # An untrained one says the prior mean: a start more, which leads nowhere.
    assert np.all(more.evaluations > plain.evaluations + cost)


def test_a_batch_is_spread_over_the_devices_and_changes_nothing(model, cases):
    case = cases["antipodal"]
    whole, wide = (estimate(model, case, slice(None), batch=batch) for batch in (4, 8))
    np.testing.assert_allclose(whole.latents, wide.latents, atol=5e-3)
    np.testing.assert_array_equal(whole.evaluations, wide.evaluations)
    with pytest.raises(UserError, match="evenly over the devices; got 3 over 4"):
        estimate(model, case, slice(None), batch=3)


def test_few_directions_bring_the_residual_down(model, cases):
    options = {"jacobians": 1, "chords": 1, "starts": 1}
    near = estimate(model, cases["antipodal"], slice(None), ranks=(8, 8), **options)
    far = estimate(model, cases["antipodal"], slice(None), ranks=(), **options)
    assert near.residual.mean() < 0.8 * far.residual.mean()


def test_unknowns_are_ordered_by_how_much_the_image_moves(model, cases):
    generator, space = model
    frame = whiten(model, cases)
    view = channel.View(jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 0)), jnp.zeros(1))
    _, _, jacobian = least_squares._linearise(
        generator, frame, view, jnp.zeros((1, FREE + BITS)), 1, chunk=FREE + BITS
    )
    moves = np.sum(np.square(jacobian[0]), axis=1)
    assert moves[:6].sum() > 0.7 * moves.sum()
    # The same unknowns, turned: white under the prior, and the way back from latents is exact.
    turn = np.concatenate([frame.nuisance, frame.bits])
    np.testing.assert_allclose(turn.T @ turn, np.eye(FREE + BITS), atol=1e-5)
    latents = generator.sample(jax.random.key(8), 3)
    theta = coordinates.begin(frame, space, latents)
    np.testing.assert_allclose(theta @ frame.bits.T, 0.0, atol=1e-4)
    onto = space.nuisance @ space.nuisance.T
    placed = coordinates.place(frame, theta) - frame.mean[None]
    np.testing.assert_allclose(placed, (latents - space.mean[None]) @ onto, atol=1e-4)


def test_a_hopeless_start_is_left_for_the_next_and_only_the_best_goes_on(model, cases):
    target = jax.random.uniform(jax.random.key(0), (1, 8, 8, 3), minval=-1.0, maxval=1.0)
    case = None, target, cases["antipodal"][2]
    found = estimate(model, case, slice(None), ranks=(28, 30), jacobians=1, chords=1, starts=2)
    assert found.residual[0] > 0.1
    # It ends with the coarse ranks: what they left unlike the model, all directions leave too.
    assert found.evaluations.tolist() == [2 * (1 + 28 + 1 + 3) + (1 + 30 + 1 + 3)]


def test_directions_that_are_not_free_stay_at_zero(model, cases):
    found = estimate(model, cases["antipodal"], slice(0, 2), free=8, jacobians=2)
    frame = whiten(model, cases)
    offset = np.asarray(found.latents) - frame.mean[None]
    theta = np.linalg.solve(np.asarray(frame.directions), offset.T).T
    np.testing.assert_allclose(theta[:, 8:], 0.0, atol=1e-2)
    assert np.abs(theta[:, :8]).max() > 0.1


def test_images_are_on_their_own(model, cases):
    case = cases["antipodal"]
    options = {"jacobians": 2}
    whole = estimate(model, case, slice(None), **options)
    few = estimate(model, case, slice(1, 2), **options)
    again = estimate(model, case, slice(None), seed=9, **options)
    # Rounding differs with the batch, and many steps on a curved valley let it grow.
    np.testing.assert_allclose(whole.latents[1], few.latents[0], atol=5e-3)
    np.testing.assert_array_equal(whole.latents, again.latents)


def test_a_step_that_gives_nan_is_not_taken(model, cases):
    generator, space = model
    broken = generator.replace(synthesis=jax.tree.map(lambda x: x * jnp.nan, generator.synthesis))
    found = estimate((broken, space), cases["antipodal"], slice(0, 2))
    _, made, bank = cases["antipodal"]
    start = jnp.concatenate([banks.guesses(bank, image, count=1) for image in made[:2]])
    offset = np.asarray(found.latents - start) @ np.asarray(space.nuisance)
    np.testing.assert_allclose(offset, 0.0, atol=1e-4)
    np.testing.assert_array_equal(found.soft_bits, 0.5)


def test_evaluations_are_counted(model, cases):
    case = cases["antipodal"]
    # 24 + 8 tangents; the first forward is that of the Jacobian.
    options = {"starts": 1, "jacobians": 1, "chords": 1}
    found = estimate(model, case, slice(0, 2), ranks=(), **options)
    # After one chord step, three short ones are tried beside it.
    assert found.evaluations.tolist() == [1 + 32 + 1 + 3] * 2
    more = estimate(model, case, slice(0, 2), ranks=(4,), **options)
    assert (more.evaluations - found.evaluations).tolist() == [1 + 4 + 1 + 3] * 2


def test_a_failed_start_is_left_for_the_next(model, cases):
    _, space = model
    keys, made, bank = cases["antipodal"]
    offset = jnp.where(jnp.arange(len(bank.latents)) < 28, 0.0, 30.0)[:, None]
    fooled = bank.replace(latents=bank.latents + offset * space.nuisance[None, :, 0])
    options = {"ranks": (), "jacobians": 1}
    case = keys, made, fooled
    one = estimate(model, case, slice(0, 1), starts=1, **options)
    more = estimate(model, case, slice(0, 1), starts=4, **options)
    assert more.residual[0] < 0.5 * one.residual[0]
    assert more.evaluations[0] > one.evaluations[0]


def test_noise_settles_an_image_only_where_its_bits_are_sure(model, cases):
    generator, space = model
    keys, _, bank = cases["antipodal"]
    latents = generator.sample(jax.random.key(3), 4)
    noise, costs = attacks.attack("noise", std=0.2), []
    for strength, soft in ((8.0, keys), (0.01, np.full(keys.shape, 0.5))):
        mark = {"strength": strength, "code": "antipodal"}
        marked = fingerprint.inject(space, latents, keys, **mark)
        made = images.png_round_trip(generator.decode(marked))
        near = Solution(np.float32(soft), marked, np.zeros(4), np.zeros(4))
        options = {"ranks": (28,), "starts": 1, "jacobians": 1, "chords": 1, "progress": False}
        found = least_squares.lm(
            jax.random.key(0), generator, space, attacks.apply(jax.random.key(1), made, noise),
            bank=bank, near=near, attack="unknown", **mark, **options,
        )  # fmt: skip
        costs.append(found.evaluations)
    # The others go on: 24 + 8 tangents and those of contrast, brightness and blur.
    assert (costs[1] - costs[0]).tolist() == [1 + 35 + 1 + 3] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jacobians": 0}, "jacobians must be >= 1; got 0."),
        ({"chords": 0}, "chords must be >= 1; got 0."),
        ({"starts": 0}, "starts must be >= 1; got 0."),
        ({"starts": 10_000}, "starts must be <= the bank's .* samples; got 10000."),
        ({"ranks": (5, -1)}, r"ranks and free must be >= 1; got \(5, -1\)"),
        ({"free": 0}, "ranks and free must be >= 1; got .* and 0"),
    ],
)
def test_bad_options_are_user_errors(model, cases, options, message):
    with pytest.raises(UserError, match=message):
        estimate(model, cases["antipodal"], slice(0, 2), **options)
