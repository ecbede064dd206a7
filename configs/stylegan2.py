"""The main job: fingerprinted pictures of a StyleGAN2, and whose they are.

    python -m lfp_jax.main --config=configs/stylegan2.py

Expect word accuracy 1.0, PSNR 33.5 dB, 540 generator evaluations a picture, in a few minutes on
two cores.

With random weights and everything small, for tests and notebooks (word accuracy means nothing
there), 19 seconds on two cores:

    python -m lfp_jax.main --config=configs/stylegan2.py:tiny

The paper's estimator and its design point; bit accuracy 0.68 and word accuracy 0 on 4 pictures,
35 minutes on two cores beside other work, and hours for all 24 (leave `images` out):

    python -m lfp_jax.main --config=configs/stylegan2.py:paper --config.images=4
"""

import ml_collections
from ml_collections.config_dict import placeholder

from configs.common import parse_arg


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Describe one design point.

    Args:
      arg: `tiny` for a random-weight network; `paper` for the published settings.
    """
    switches = parse_arg(arg, tiny=False, paper=False)
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.generator = "stylegan2-demo"  # a name in the zoo or a path
    config.users = 8
    config.images = 24

    config.basis_samples = 50_000
    config.metric_samples = 4_096
    config.bits = 64
    config.basis = "sensitivity"  # "pca", the paper's; "random", "jacobian" or "fisher"
    # Of the latter: pixels' noise that it reckons with, images in [-1, 1], and whole Jacobians.
    config.fisher = ml_collections.ConfigDict({"noise": 0.1, "samples": 32})
    config.shift = 64  # the first direction that carries
    config.strength = 4.0  # a bit is +- half of it, here in standard deviations of the prior
    config.equalise = False  # all bits change the image alike, and strength is rms of that change
    config.code = "antipodal"  # or "binary", the paper's
    # Bits of a user's number, coded against wrong bits (BCH); unset: keys are drawn at random.
    config.payload = placeholder(int)

    config.noise = "constant"  # of the synthesis; or random an image, "known" or "unknown" later
    config.attack = "none"  # between the model and the estimator: one of a suite, "paper:blur"
    config.estimator = "hybrid"  # or "lm", "learned", and "adam", the paper's
    config.network = placeholder(str)  # of learned and hybrid; unset: what ships
    config.loss = "laplacian"  # of adam: "mse", "laplacian" or "classifier"
    config.lm = ml_collections.ConfigDict(
        {
            "bank": 8_192,
            "attack": "unknown",  # what it reckons with; or "none"
            "free": placeholder(int),
            "ranks": (16, 32, 64, 128, 256),
            "jacobians": 2,
            "chords": 12,
            "starts": 4,
        }
    )
    config.adam = ml_collections.ConfigDict(
        {"starts": 20, "steps": 2000, "learning_rate": 0.2, "decay": 0.001, "penalty": 0.1}
    )
    config.decoys = 100_000  # random keys among which the right one should fit best
    config.fd_images = 5_000  # for each distance; 0: none

    if switches.paper:
        config.estimator, config.code = "adam", "binary"
        config.basis, config.shift, config.strength = "pca", 448, 1.0
    if switches.tiny:
        _shrink(config)
    return config


def _shrink(config: ml_collections.ConfigDict) -> None:
    config.generator = "stylegan2-tiny"
    config.users, config.images = 2, 4
    config.basis_samples, config.bits, config.shift = 1024, 8, 20
    config.fisher.samples = 8
    config.lm.bank, config.lm.ranks, config.lm.jacobians = 256, (8,), 4
    config.adam.starts, config.adam.steps = 2, 20
    config.fd_images = 64


def sweep(add) -> None:
    """Add the design points of the accuracy-quality curve: one strength each.

    Args:
      add: called with the fields to change, once a design point.
    """
    for strength in (0.25, 0.5, 1.0, 2.0, 4.0):
        add(strength=strength)
