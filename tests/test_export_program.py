"""A latent-diffusion model with a user's key in it, as one program from noise to images."""

import jax
import jax.export
import numpy as np
import pytest

from configs import ldm
from lfp_jax import design, fingerprint, main
from lfp_jax.registry import Registry

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_an_exported_program_makes_the_users_images(tmp_path, capsys):
    config = ldm.get_config("tiny")
    command = ["lfp_jax", "--config=configs/ldm.py:tiny", f"--workdir={tmp_path}"]
    target = tmp_path / "erin"
    more = ["--config.bits=24", "--config.shift=8", "--mode=issue", "--user=erin"]
    assert main.main([*command, *more, f"--export={target}"]) == 0
    assert f"Generator of 'erin': {target}/generator.jax" in capsys.readouterr().out
    config.update(bits=24, shift=8)
    point = design.prepare(jax.random.key(0), config, tmp_path, refit=False)
    with Registry(tmp_path / design.REGISTRY) as ledger:
        bits = ledger.key("erin", design=1).bits
    program = jax.export.deserialize(bytearray((target / "generator.jax").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    for n in (1, 3):
        noise = jax.random.normal(jax.random.key(n), (n, *point.generator.latent_shape))
        plain = point.generator.denoise(noise, steps=point.generator.sample_steps)
        marked = fingerprint.inject(point.space, plain, bits, **point.mark)
        wanted = design.decode(point.generator, marked)
        np.testing.assert_allclose(program.call(noise), wanted, rtol=0, atol=1e-4)
        moved = np.abs(wanted - design.decode(point.generator, plain)).max()
        assert moved > 1e-2
