"""The design space on latent diffusion of FFHQ at 256 x 256, with the published settings.

Download https://ommer-lab.com/files/latent-diffusion/ffhq.zip (2.4 GB; code MIT, weights as their
authors state, trained on FFHQ, CC BY-NC-SA 4.0), unpack it as ldm_ffhq/ with model.ckpt in it and,
beside that, config.yaml of the project's models/ldm/ffhq256. Then, on a TPU v4-8 or a GPU:

    python -m lfp_jax.main --config=configs/ldm_ffhq.py
    python -m lfp_jax.main --mode=grid --config=configs/ldm_ffhq.py

The same geometry with random weights, to rehearse memory and time without the download, or with
few steps and samples on a CPU:

    python -m lfp_jax.main --config=configs/ldm_ffhq.py:untrained

What a latent, a decode and an estimate cost is computed from operations counted by
`python -m bench.latent_diffusion`: see the README.
"""

import ml_collections

from configs import ldm
from configs.common import parse_arg


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Describe one design point.

    Args:
      arg: `untrained` for random weights and very little of everything.
    """
    switches = parse_arg(arg, untrained=False)
    config = ldm.get_config("paper")
    config.generator = "ldm_ffhq/model.ckpt"
    config.sample_steps = 50
    config.basis_samples = 50_000
    config.users, config.images = 1_000, 1_000
    config.fd_images = 5_000
    if switches.untrained:
        config.generator, config.sample_steps = "ldm-ffhq-untrained", 1
        config.basis_samples, config.metric_samples = 64, 1
        config.users = config.images = 1
        config.bits, config.repeat, config.shift = 8, 1, 0
        config.channels = None
        config.estimator, config.fd_images = "encoder", 0
    return config


def sweep(add) -> None:
    """Add the paper's design points: strengths, shifts and bits.

    Args:
      add: called with the fields to change, once a design point.
    """
    for strength in (0.25, 0.5, 1.0, 2.0, 4.0, 6.0):
        add(strength=strength)
    for shift in (0, 128, 256):
        add(shift=shift)
    for bits in (32, 96, 128):
        add(bits=bits)
