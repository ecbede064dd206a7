"""The main job: fingerprinted pictures of `stylegan2-demo`, and whose they are.

    python -m lfp_jax.main --config=configs/stylegan2.py

With random weights and everything small, for tests and notebooks:

    python -m lfp_jax.main --config=configs/stylegan2.py:tiny
"""

import ml_collections
from ml_collections.config_dict import placeholder

from configs.common import parse_arg


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Describe one design point.

    Args:
      arg: `tiny` for the random-weight network.
    """
    switches = parse_arg(arg, tiny=False)
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.generator = "stylegan2-demo"
    config.users = 8
    config.images = 64

    config.basis_samples = 50_000
    config.bits = 64
    config.shift = placeholder(int)  # unset: the directions of least variance
    config.strength = 1.0
    config.code = "antipodal"

    config.estimator = "lm"
    config.loss = "laplacian"
    config.lm = ml_collections.ConfigDict(
        {"bank": 16_384, "nuisance": 64, "jacobians": 5, "chords": 3}
    )
    config.adam = ml_collections.ConfigDict(
        {"starts": 4, "steps": 1000, "learning_rate": 0.2, "decay": 0.001, "penalty": 0.1}
    )
    config.fd_images = 5000

    if switches.tiny:
        _shrink(config)
    return config


def _shrink(config: ml_collections.ConfigDict) -> None:
    config.generator = "stylegan2-tiny"
    config.users, config.images = 2, 4
    config.basis_samples, config.bits = 1000, 8
    config.lm.bank, config.lm.nuisance, config.lm.jacobians = 256, 8, 3
    config.adam.starts, config.adam.steps = 2, 20
    config.fd_images = 64


def sweep(add) -> None:
    """Add the design points of the accuracy-quality curve: one strength each.

    Args:
      add: called with the fields to change, once a design point.
    """
    for strength in (0.25, 0.5, 1.0, 2.0, 4.0):
        add(strength=strength)
