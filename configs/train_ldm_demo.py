"""Trains the bundled `ldm-demo`: a VQ first stage on 64 x 64 faces, then a UNet on its latents.

    node lfp_jax/training/toon_head.mjs --out data/toon_head      (see the README, Training)
    python -m lfp_jax.main --config=configs/train_ldm_demo.py --config.data=data/toon_head

One command does both stages in turn, and goes on with either where it was stopped. The folder
`ldm-demo` of the workdir is what ships as `lfp_jax/assets/ldm-demo`; it is there as soon as the
first stage is done, and complete when the UNet is. In `first_stage` and `diffusion-...` lie
`log.jsonl`, grids and `curve.png`. With these settings it took six minutes of an H200 that had
other work too; two CPU cores would need some days: take fewer pictures there, `total_images` and
`decay_images` of both stages alike. To write the store from the latest checkpoints of a run that is
stopped, ask for no more images than they have seen:

    python -m lfp_jax.main --config=configs/train_ldm_demo.py --config.data=data/toon_head \\
        --config.first_stage.total_images=1 --config.diffusion.total_images=1

The first stage alone: --config.diffusion.total_images=0.
"""

import ml_collections

from configs.common import parse_arg


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Describe the training run.

    Args:
      arg: `tiny` for a few steps of small networks.
    """
    switches = parse_arg(arg, tiny=False)
    config = ml_collections.ConfigDict()
    config.task = "ldm"
    config.data = "data/toon_head"
    config.resolution = 64
    config.seed = 0
    config.log_every = 500
    config.save_every = 10_000
    config.grid_every = 2_000
    config.fd_images = 5_000
    config.sample_steps = 10
    config.first_stage = ml_collections.ConfigDict(
        {
            "channels": (32, 64), "blocks": 1, "codes": 1024, "latent_channels": 3, "groups": 8,
            "patch": 2, "total_images": 800_000, "batch": 64, "learning_rate": 1e-3,
            "warmup": 200, "decay_images": 800_000, "commitment": 0.25, "perceptual": 0.1,
            "codebook_decay": 0.99, "ema_images": 20_000, "fd_every": 0,
        }
    )  # fmt: skip
    config.diffusion = ml_collections.ConfigDict(
        {
            "channels": (48, 96, 96), "blocks": 1, "attention": (False, True, True),
            "head_dim": 32, "groups": 8, "prediction": "velocity", "total_images": 2_500_000,
            "batch": 256, "learning_rate": 1e-3, "warmup": 300, "decay_images": 2_500_000,
            "clip": 1.0, "ema_images": 200_000, "fd_every": 0,
        }
    )  # fmt: skip
    if switches.tiny:
        _shrink(config)
    return config


def _shrink(config: ml_collections.ConfigDict) -> None:
    config.resolution = 8
    config.log_every, config.save_every, config.grid_every = 1, 2, 2
    config.fd_images, config.sample_steps = 0, 2  # the features take 64 x 64
    config.first_stage.update(
        channels=(8, 8), codes=16, groups=4, patch=1, total_images=32, batch=8, warmup=2,
        decay_images=0, perceptual=0.0,
    )  # fmt: skip
    config.diffusion.update(
        channels=(8,), attention=(), head_dim=4, groups=4, total_images=32, batch=8, warmup=2,
        decay_images=0,
    )  # fmt: skip
