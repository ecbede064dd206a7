"""The grid of `stylegan2_grid.py` on the paper's generators: FFHQ, AFHQ-cat and AFHQ-dog.

    python -m lfp_jax.main --config=configs/stylegan2_ffhq.py --mode=grid
    python -m lfp_jax.main --config=configs/stylegan2_ffhq.py:cat --mode=grid
    python -m lfp_jax.main --config=configs/stylegan2_ffhq.py:dog --mode=grid

1,000 images a cell, each with a key of its own, as published. The same command on any number of
machines with one --workdir shares the cells out, and goes on where it was stopped.

How long, reckoned and not measured: a pass of the generator is 90 GFLOP at 256 x 256 and 119 at
512 x 512, by XLA's count, and a column of a Jacobian up to twice that. 90 cells of 1,000 images at
660 evaluations an image (the demo's mean over these attacks) are 5 to 11 EFLOP at 256 x 256: 15 to
29 hours of a device that sustains 100 TFLOP/s, and a third more at 512.

To download and convert before (the paper took the same; their licences are not this project's):

- FFHQ, 256 x 256: `550000.pt`, linked from "Pretrained Checkpoints" in the README of
  https://github.com/rosinality/stylegan2-pytorch
- AFHQ-cat and AFHQ-dog, 512 x 512: `afhqcat.pkl` and `afhqdog.pkl` of
  https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/

    python -m lfp_jax.main --mode=convert --source=550000.pt --target=checkpoints/ffhq
    python -m lfp_jax.main --mode=convert --source=afhqcat.pkl --target=checkpoints/afhqcat
    python -m lfp_jax.main --mode=convert --source=afhqdog.pkl --target=checkpoints/afhqdog
"""

import ml_collections

from configs import stylegan2, stylegan2_grid
from configs.common import parse_arg


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Describe the design point that the sweep changes.

    Args:
      arg: `cat` or `dog` for AFHQ; else FFHQ.
    """
    switches = parse_arg(arg, cat=False, dog=False)
    config = stylegan2_grid.get_config()
    kind = "afhqcat" if switches.cat else "afhqdog" if switches.dog else "ffhq"
    config.generator = f"checkpoints/{kind}"
    config.users, config.images, config.fd_images = 1_000, 1_000, 5_000
    # The demo's short search is for two cores; these are the main job's.
    config.lm = stylegan2.get_config().lm
    return config


def sweep(add) -> None:
    """Add the design points, each clean and under the attacks of the paper.

    Args:
      add: called with the fields to change, once a design point.
    """
    stylegan2_grid.sweep(add)
