"""The paper's design space on the demo.

python -m lfp_jax.main --mode=grid --config=configs/stylegan2_grid.py
"""

import ml_collections

from configs import stylegan2
from configs.common import parse_arg


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Describe the design point that the sweep changes.

    Args:
      arg: `small` for fewer points and images; `tiny` for a random-weight network.
    """
    switches = parse_arg(arg, tiny=False, small=False)
    config = stylegan2.get_config("tiny" if switches.tiny else "")
    config.basis, config.code, config.estimator = "pca", "binary", "lm"
    config.shift, config.strength = 448, 1.0
    if switches.tiny:
        config.shift, config.metric_samples, config.decoys = 24, 64, 100
        config.lm.attack, config.lm.jacobians, config.lm.starts = "none", 1, 1
    return config


def sweep(add, arg: str = "") -> None:
    """Add the design points.

    Args:
      add: called with the fields to change, once a design point.
      arg: as of `get_config`.
    """
    if parse_arg(arg, tiny=False, small=False).tiny:
        add(strength=1.0, attack="none")
        add(strength=2.0, code="antipodal", attack="none")
        add(strength=2.0, code="antipodal", attack="paper:noise")
