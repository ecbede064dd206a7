"""The attribute classifier whose features measure the demo generators.

    node lfp_jax/training/toon_head.mjs --out DIR      (see the README, Training)
    python -m lfp_jax.main --config=configs/train_demo_classifier.py --config.data=DIR

Expect, over 5,600 held-out pictures, accuracy 0.97 for the mouth and at least 0.998 for each other
attribute, and a Fréchet distance of 0.35 (0.27 to 0.46) between training and held-out pictures,
5,600 each. It took 14 minutes on two cores that trained a GAN at the same time. The folder
`demo-classifier` of the workdir is what ships as `lfp_jax/assets/demo-classifier`.
"""

import ml_collections

from configs.common import parse_arg


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Describe the training run.

    Args:
      arg: takes no switches.
    """
    parse_arg(arg)
    config = ml_collections.ConfigDict()
    config.task = "classifier"
    config.data = "data/toon_head"
    config.steps = 5000
    config.batch_size = 32
    config.learning_rate = 2e-3
    config.seed = 0
    return config
