"""Who reads keys from latent diffusion, at what cost: every estimator but the paper's.

    python -m lfp_jax.main --config=configs/ldm_grid.py --mode=grid

The main job's design point (`configs/ldm.py`), clean and under the attacks of `paper`, with and
without the quantiser in the decoder: 40 cells of 16 images. Two processes make the most of two
cores, with a core each, as in `configs/stylegan2_grid.py`. For the paper's estimator add `adam`
below: 120,021 evaluations a picture, some hours of a CPU each, or a second or two of an H200.

With random weights and everything small, for tests:

    python -m lfp_jax.main --config=configs/ldm_grid.py:tiny --mode=grid
"""

import ml_collections

from configs import ldm
from configs.common import parse_arg


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Describe the design point that the sweep changes.

    Args:
      arg: `tiny` for a random-weight network.
    """
    switches = parse_arg(arg, tiny=False)
    config = ldm.get_config(arg)
    if not switches.tiny:
        config.users, config.images = 16, 16
    return config


def sweep(add, arg: str = "") -> None:
    """Add every estimator with and without the quantiser, clean and under the paper's attacks.

    Args:
      add: called with the fields to change, once a cell or a suite of them.
      arg: as of `get_config`.
    """
    switches = parse_arg(arg, tiny=False)
    # No network ships for random weights.
    estimators = ("encoder", "lm") if switches.tiny else ("learned", "encoder", "lm", "hybrid")
    for quantize in (True, False):
        for attack in ("none", "paper:noise" if switches.tiny else "paper"):
            for estimator in estimators:
                add(quantize=quantize, estimator=estimator, attack=attack)
