"""The main job, end to end on a random-weight network, as a user runs it."""

import json

import jax
import numpy as np
import pytest

from configs.stylegan2 import get_config
from lfp_jax import design, experiment, images, keys, main
from lfp_jax.attribution import inversion
from lfp_jax.generators import stylegan2

CONFIG = "--config=configs/stylegan2.py:tiny"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run the tiny main job once; give its folder."""
    workdir = tmp_path_factory.mktemp("tiny")
    assert main.main(["main", CONFIG, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(scope="module")
def metrics(run):
    return json.loads((run / "metrics.json").read_text())


def test_every_quantity_says_its_value_interval_and_count(metrics):
    for name in (
        "bit_accuracy",
        "word_accuracy",
        "right_user_first",
        "psnr",
        "ssim",
        "fd",
        "fd_plain",
    ):
        entry = metrics[name]
        assert entry["low"] <= entry["value"] <= entry["high"], name
        assert entry["images"] >= 4, name
    assert metrics["fd"]["features"] == "demo classifier"
    assert metrics["generator_evaluations"]["value"] > 50  # rounding decides when descents end
    assert metrics["seconds_per_image"]["value"] > 0
    assert metrics["settings"]["bits"] == 8
    assert metrics["versions"]["jax"]


def test_bits_come_back_from_the_pixels(metrics):
    # 32 bits: chance alone gives 0.75 or more once in 286 runs; the run is the same every time.
    assert metrics["bit_accuracy"]["value"] >= 0.75


def test_all_that_attribution_needs_is_stored(run):
    issued = json.loads((run / "keys.json").read_text())
    assert len(issued["user_of_image"]) == 4
    assert {keys.from_hex(text, bits=8).shape for text in issued["keys"]} == {(8,)}
    assert (run / "basis" / "metadata.json").exists()
    pictures = [images.read(path) for path in sorted((run / "images").glob("*.png"))]
    assert [picture.shape for picture in pictures] == [(32, 32, 3)] * 4


def test_stated_probabilities_are_held_against_the_truth(run, metrics):
    bins = metrics["reliability"]
    assert sum(each["bits"] for each in bins) == 4 * 8
    assert all(each["low"] <= each["wrong"] <= each["high"] for each in bins)
    assert images.read(run / "reliability.png").shape == (600, 600, 3)


def test_grid_shows_plain_marked_difference_and_reconstruction(run):
    sheet = images.read(run / "grid.png")
    factor = 3
    height = 4 * (32 + 2) + 2
    assert sheet.shape[:2] == (height * factor, height * factor)
    marked = images.read(run / "images" / "00000.png")
    top = (2 + 34) * factor
    cell = sheet[top : top + 32 * factor : factor, 2 * factor : (2 + 32) * factor : factor]
    np.testing.assert_array_equal(cell, marked)


def test_a_second_run_gives_the_same_numbers(run, metrics):
    assert main.main(["main", CONFIG, f"--workdir={run}"]) == 0
    again = json.loads((run / "metrics.json").read_text())
    for name in ("bit_accuracy", "word_accuracy", "psnr", "ssim", "fd", "residual"):
        assert again[name] == metrics[name], name


def test_an_attack_comes_between_the_model_and_the_estimator(run, metrics, tmp_path):
    argv = ["main", CONFIG, f"--workdir={tmp_path}", "--config.attack=paper:noise"]
    assert main.main([*argv, "--config.fd_images=0"]) == 0
    attacked = json.loads((tmp_path / "metrics.json").read_text())
    assert attacked["residual"]["value"] > metrics["residual"]["value"]
    before, after = (images.read(tmp_path / f / "00000.png") for f in ("images", "attacked"))
    assert 8 < np.std(before.astype(float) - after) < 15  # 0.1 of 127.5 levels
    assert images.read(tmp_path / "grid.png").shape[0] > images.read(run / "grid.png").shape[0]


def test_a_latent_diffusion_model_goes_the_same_way(tmp_path):
    argv = ["main", "--config=configs/ldm.py:tiny", f"--workdir={tmp_path}"]
    assert main.main([*argv, "--config.estimator=encoder", "--config.fd_images=0"]) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["generator"]["name"] == "ldm-tiny"
    assert found["generator_evaluations"]["value"] == 2
    assert 0 <= found["bit_accuracy"]["value"] <= 1
    assert images.read(tmp_path / "grid.png").ndim == 3


def test_random_synthesis_noise_is_each_images_own_and_left_out_where_unknown():
    arch = stylegan2.Architecture(
        resolution=8, channels=(4, 4), z_dim=4, w_dim=4, mapping_layers=1, mapping_width=4
    )
    generator = stylegan2.random_generator(jax.random.key(0), arch, noise_strength=0.5)
    config = get_config()
    config.images = 3
    assert experiment._makers(jax.random.key(1), generator, config) is None
    point = design.Design(generator, np.eye(4), None, {})
    seen, latents = [], np.zeros((3, 4), np.float32)

    def estimator(key, maker, space, images, **mark):
        seen.append((maker, images))
        n = len(images)
        return inversion.Solution(*(np.zeros(s) for s in ((n, 2), (n, 4), (n,), (n,))))

    for config.noise in ("known", "unknown"):
        makers = experiment._makers(jax.random.key(1), generator, config)
        made = experiment._make(makers, generator, latents)
        assert np.std(made[0] - made[1]) > 0.01
        found = experiment._estimate(estimator, None, makers, point, made, config, np.arange(3))
        assert found.soft_bits.shape == (3, 2)
    *known, unknown = seen
    for i, (maker, one) in enumerate(known):
        np.testing.assert_allclose(maker.decode(latents[i : i + 1]), one, atol=1e-5)
        np.testing.assert_array_equal(one[0], made[i])
    plain = generator.decode(latents, noise=0)
    np.testing.assert_allclose(unknown[0].decode(latents), plain, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("strength=-1.0", "strength must be > 0; got -1.0."),
        ("images=0", "users and images must be >= 1"),
        ("bits=40", "bits must be 1..32, the latent dim; got 40."),
        ("shift=30", "shift + bits must be <= latent dim; got 30 + 8 > 32."),
        ("code=binari", "Did you mean 'binary'"),
        ("estimator=adma", "Did you mean 'adam'"),
        ("generator=stylegan2-dmo", "Did you mean 'stylegan2-demo'"),
        ("noise=unknwon", "Did you mean 'unknown'"),
        ("decoys=0", "decoys must be >= 1; got 0."),
        ("basis=sensitivty", "Did you mean 'sensitivity'"),
        ("estimator=learned", "No trained network ships for 'stylegan2-tiny'."),
        ("network=nowhere", "nowhere"),
        ("estimator=encoder", "'stylegan2-tiny' has no encoder"),
        ("attack=paper:blurr", "Did you mean 'blur'"),
        ("attack=papr:blur", "Did you mean 'paper'"),
        ("loss=lapacian", "Did you mean 'laplacian'"),
    ],
)
def test_a_bad_setting_is_one_line_and_status_2(override, message, run, capsys):
    argv = ["main", CONFIG, f"--workdir={run}", f"--config.{override}"]
    assert main.main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_a_run_can_be_reported(run):
    assert main.main(["main", "--mode=report", f"--workdir={run}"]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    for text in ("1 design point.", "Attack: none", "stylegan2-tiny", "demo classifier"):
        assert text in page
    assert page.count("<img ") == 5  # against PSNR and FD, reliability, spectrum, pictures
