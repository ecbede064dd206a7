"""Measures the bundled directions of a generator, with the settings of its main job.

    python -m lfp_jax.main --config=configs/train_directions.py
    python -m lfp_jax.main --config=configs/train_directions.py:ldm

The folder `directions` of the workdir is what ships as `lfp_jax/assets/bases/NAME`: experiments
with the same generator, samples and seed then start at once, and from the same directions on every
machine. The first takes two minutes of a core, the second 40, most of it DDIM.
"""

import ml_collections

from configs import ldm, stylegan2
from configs.common import parse_arg


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Describe the measurement.

    Args:
        arg: `ldm` for `ldm-demo`; `tiny` for few samples.
    """
    switches = parse_arg(arg, ldm=False, tiny=False)
    experiment = ldm.get_config() if switches.ldm else stylegan2.get_config()
    config = ml_collections.ConfigDict()
    config.task = "directions"
    config.generator = experiment.generator
    config.seed = experiment.seed
    config.samples = experiment.basis_samples
    config.metric_samples = experiment.metric_samples
    if switches.ldm:
        config.sample_steps = experiment.sample_steps
    if switches.tiny:
        config.samples, config.metric_samples = 128, 32
    return config
