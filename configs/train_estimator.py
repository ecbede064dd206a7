"""Trains the network of the estimator `learned` for the design point of the main job.

    python -m lfp_jax.main --config=configs/train_estimator.py

The same command goes on with a run that was stopped. Training pairs are drawn from the generator
itself, without end; new users need no training. The folder `estimator` of the workdir is what
`learned` loads; beside it are `curve.png` and `log.jsonl`, with bit accuracy on fresh keys under
each attack on the way.

The two of `stylegan2-demo` that ship: the first on one core in half an hour; the second from the
first, likewise, and from that twice more on an H200, 300,000 and 700,000 pairs, at 38,000 pairs a
second:

    ... --config.attacks=none --config.total_pairs=56000 --config.batch=32 \\
        --config.learning_rate=1.5e-3
    ... --config.total_pairs=42000 --config.batch=32 --config.begin=runs/none/estimator
    ... --config.total_pairs=300000 --config.batch=256 --config.begin=runs/second/estimator
    ... --config.total_pairs=700000 --config.batch=256 --config.begin=runs/third/estimator \\
        --config.learning_rate=2e-3

And that of `ldm-demo`, where the time goes to DDIM, at 5,000 pairs a second of an H200:

    ... --config.generator=ldm-demo --config.sample_steps=10 --config.basis_samples=10000 \\
        --config.shift=48 --config.strength=5 --config.total_pairs=500000 --config.batch=256 \\
        --config.learning_rate=2e-3

Over several processes, here two on one machine, the losses are the same:

    python -m lfp_jax.main --config=configs/train_estimator.py --distributed \\
        --coordinator=localhost:12345 --processes=2 --process=0    (and --process=1)
"""

import ml_collections
from ml_collections.config_dict import placeholder

from configs.common import parse_arg


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Describe the training run.

    Args:
        arg: `tiny` for a few steps of a small network.
    """
    switches = parse_arg(arg, tiny=False)
    config = ml_collections.ConfigDict()
    config.task = "estimator"
    config.generator = "stylegan2-demo"  # a name in the zoo or a path
    config.seed = 0
    # As in the experiments it is for, with the seed; of latent diffusion, DDIM steps too.
    config.basis_samples = 50_000
    config.metric_samples = 4_096
    config.sample_steps = placeholder(int)
    config.bits = 64
    config.directions = "sensitivity"  # the experiments' `basis`
    config.shift = 64
    config.strength = 4.0
    config.code = "antipodal"
    config.nuisance = 64  # leading directions; those beyond hardly move a pixel

    config.total_pairs = 1_000_000
    config.attacks = "paper-history"  # covers "paper" too; or "none"
    config.begin = placeholder(str)  # a trained estimator to start from, e.g. without attacks
    config.network = ml_collections.ConfigDict(
        {
            "patch": 4, "channels": (32, 96), "blocks": 1, "grid": 8, "head": 24, "width": 384,
            "rounds": 2,
        }
    )  # fmt: skip
    config.batch = 64
    config.learning_rate = 1e-3
    config.warmup = 200
    config.bit_weight = 1.0
    config.clip = 1.0
    config.ema_pairs = 50_000
    config.log_every = 50
    config.save_every = 1_000
    config.evaluate_every = 1_000
    config.evaluate_pairs = 1_024
    if switches.tiny:
        config.network.channels, config.network.blocks = (8,), 1
        config.network.head, config.network.width = 8, 32
        config.basis_samples, config.metric_samples = 1024, 64
        config.bits, config.batch, config.total_pairs = 8, 8, 64
        config.warmup, config.log_every, config.save_every = 2, 1, 4
        config.evaluate_every, config.evaluate_pairs = 4, 8
    return config
