"""Trains the bundled generator, `stylegan2-demo`, on 64 x 64 faces of the style toon-head.

    node lfp_jax/training/toon_head.mjs --out data/toon_head      (see the README, Training)
    python -m lfp_jax.main --config=configs/train_stylegan2_demo.py --config.data=data/toon_head

The same command goes on with a run that was stopped. About 37 images a second on two cores with
nothing else to do: six hours for 808,000 images. The distance stood at 28.6 after 704,000 images
and at 28.8 after 800,000, so training ended there. The run that made the shipped weights began with
r1_gamma 0.5 at full size and had 8 from 336,000 images on, where a smaller one had stopped helping.

The folder `stylegan2-demo` of the workdir is what ships as `lfp_jax/assets/stylegan2-demo`; beside
it are `curve.png`, `log.jsonl` and grids of samples. To write them from the latest checkpoint of a
run that is stopped, or still goes on, ask for no more images than it has seen:

    python -m lfp_jax.main --config=configs/train_stylegan2_demo.py --config.total_images=1
"""

import ml_collections

from configs.common import parse_arg


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Describe the training run.

    Args:
      arg: `tiny` for a few steps of a small network.
    """
    switches = parse_arg(arg, tiny=False)
    config = ml_collections.ConfigDict()
    config.task = "stylegan2"
    config.data = "data/toon_head"
    config.total_images = 808_000
    config.resolution = 64
    config.growth = ((16, 96_000), (32, 96_000))
    config.channels = (128, 128, 96, 32, 16)
    config.discriminator_channels = (128, 96, 64, 32, 16)
    config.w_dim = 512
    config.mapping_layers = 8
    config.batch = 16
    config.learning_rate = 0.002
    config.learning_rate_drop = 768_000
    config.r1_gamma = 8.0  # 0.5 at 16 x 16, where it was chosen
    config.r1_every = 16
    config.path_weight = 0.0
    config.path_every = 4
    config.mixing = 0.9
    config.flip = False  # partings and jackets are not symmetric
    config.ema_images = 10_000
    config.seed = 0
    config.log_every = 50
    config.save_every = 1_000
    config.grid_every = 500
    config.fd_every = 2_000
    config.fd_images = 5_000
    if switches.tiny:
        config.channels = config.discriminator_channels = (16, 16, 8)
        config.growth = ((8, 32),)
        config.resolution, config.w_dim, config.mapping_layers, config.batch = 16, 32, 2, 8
        config.total_images, config.log_every = 64, 1
        config.save_every = config.grid_every = 4
        config.fd_every = config.fd_images = 0  # the features take 64 x 64
    return config
