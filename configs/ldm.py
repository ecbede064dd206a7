"""The main job on a latent-diffusion model: keys in the latents between its sampler and decoder.

    python -m lfp_jax.main --config=configs/ldm.py

Expect word accuracy 1.0, PSNR 32.7 dB, 220 generator evaluations a picture; three minutes of one
core.

With random weights and everything small, for tests (word accuracy means nothing there):

    python -m lfp_jax.main --config=configs/ldm.py:tiny

One pass of the network that ships, or of the model's own encoder, instead of a descent:

    python -m lfp_jax.main --config=configs/ldm.py --config.estimator=learned
    python -m lfp_jax.main --config=configs/ldm.py --config.estimator=encoder

They give bit accuracy 1.00 for 4 evaluations, on 64 pictures, and 0.96 for 2, on 16.

The paper's design for latent diffusion: three principal directions of one latent channel a bit, and
its estimator, which takes hours:

    python -m lfp_jax.main --config=configs/ldm.py:paper --config.images=1
"""

import ml_collections
from ml_collections.config_dict import placeholder

from configs import stylegan2
from configs.common import parse_arg


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Describe one design point.

    Args:
      arg: `tiny` for a random-weight network; `paper` for the published settings.
    """
    switches = parse_arg(arg, tiny=False, paper=False)
    config = stylegan2.get_config()
    config.generator = "ldm-demo"
    # A latent costs many passes of the UNet: fewer steps and samples, and a smaller bank.
    config.sample_steps = 10  # of DDIM
    config.basis_samples = 10_000
    config.metric_samples = 4_096
    config.images, config.fd_images = 8, 256
    # The encoder and the network begin near: no need of fewer directions first.
    config.lm.bank, config.lm.ranks = 256, (64, 128, 256)
    config.shift, config.strength = 48, 5.0
    config.repeat = 1  # directions that carry each bit
    config.channels = placeholder(int)  # of the latent, that hold the first directions; unset: all
    # In the decoder, both of the model and of who reads its images. Published models do; without it
    # pictures are as good, and keys are read better (README).
    config.quantize = False
    if switches.paper:
        config.quantize = True
        config.estimator, config.code, config.adam.penalty = "adam", "binary", 0.005
        config.basis, config.channels, config.repeat = "pca", 1, 3
        config.shift, config.strength = 64, 1.0
    if switches.tiny:
        _shrink(config)
    return config


def _shrink(config: ml_collections.ConfigDict) -> None:
    config.generator = "ldm-tiny"
    config.sample_steps = 2
    config.users, config.images = 2, 4
    config.basis_samples, config.metric_samples, config.fisher.samples = 256, 64, 8
    config.bits, config.shift = 8, 20
    config.lm.bank, config.lm.ranks, config.lm.jacobians = 64, (8,), 2
    config.adam.starts, config.adam.steps = 2, 20
    config.fd_images = 64
