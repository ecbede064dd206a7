"""The paper's design space on the demo: strength, shift, bits and code, clean and under attacks.

    python -m lfp_jax.main --config=configs/stylegan2_grid.py --mode=grid

One factor at a time about the paper's own point (principal directions, shift d - k = 448, 64 bits,
strength 1, code `binary`), the other code at three strengths, and the carriers of the main job at
three: 18 design points, each under `none` and the four attacks of `paper`, 90 cells. Two processes
make the most of two cores, with a core each; sharing both they would be in each other's way:

    for i in 0 1; do
        taskset -c $i python -m lfp_jax.main --config=configs/stylegan2_grid.py --mode=grid &
    done; wait

`lm` is too slow on a CPU for the 200 images a cell that one would want. So it is 10 images a cell
from one start each, and one Jacobian along all directions: of fewer it misses what the paper's
directions carry (bit accuracy of 10 clean images at the paper's point 1.000, for 1,020 evaluations;
of an earlier `lm` 0.997, and with 256 of the 512 free and two Jacobians 0.944, for 760).
`--config.images=200 --config.users=200` is the long form.

A quick look:

    python -m lfp_jax.main --config=configs/stylegan2_grid.py:small --mode=grid
"""

import ml_collections

from configs import stylegan2
from configs.common import parse_arg

_LATENT_DIM = 512


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Describe the design point that the sweep changes.

    Args:
      arg: `small` for three strengths and few images; `tiny` for a random-weight network.
    """
    switches = parse_arg(arg, tiny=False, small=False)
    config = stylegan2.get_config("tiny" if switches.tiny else "")
    config.basis, config.shift, config.strength, config.code = "pca", 448, 1.0, "binary"
    config.estimator = "lm"
    config.users, config.images, config.fd_images = 10, 10, 1_000
    config.lm.update(bank=2_048, ranks=(64, 128, 256), jacobians=1, starts=1)
    if switches.small:
        config.users, config.images, config.fd_images = 4, 4, 256
        config.lm.bank = 512
    if switches.tiny:
        config.shift, config.metric_samples, config.decoys = 24, 64, 100
        config.users, config.images, config.fd_images = 2, 4, 64
        config.lm.update(attack="none", bank=256, free=32, ranks=(8,), jacobians=1, starts=1)
    return config


def sweep(add, arg: str = "") -> None:
    """Add the design points, each clean and under the attacks of the paper.

    Args:
      add: called with the fields to change, once a design point.
      arg: as of `get_config`.
    """
    switches = parse_arg(arg, tiny=False, small=False)
    points, suites = _points(), ("none", "paper")
    if switches.small:
        points = [{"strength": strength} for strength in (0.5, 1.0, 2.0)]
        suites = ("none", "paper:noise")
    if switches.tiny:
        points = [{"strength": 1.0}, {"strength": 2.0, "code": "antipodal"}]
        suites = ("none", "paper:noise")
    for point in points:
        for suite in suites:
            add(**point, attack=suite)


def _points():
    points = [{"strength": strength} for strength in (0.25, 0.5, 1.0, 2.0, 4.0, 6.0)]
    points += [{"code": "antipodal", "strength": strength} for strength in (0.5, 1.0, 2.0)]
    points += [{"shift": shift} for shift in (0, 128, 256)]
    points += [{"bits": bits, "shift": _LATENT_DIM - bits} for bits in (32, 96, 128)]
    # A step of these directions is a standard deviation of the prior, not a unit of the latent.
    main_job = {"basis": "sensitivity", "shift": 64, "code": "antipodal"}
    return points + [main_job | {"strength": strength} for strength in (1.0, 2.0, 4.0)]
