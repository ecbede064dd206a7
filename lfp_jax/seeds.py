"""Everything random follows from one seed: what draws from which fold of it.

Modes that must meet again share a fold: keys are read along the directions that they went in by.
"""

import jax

# Of design points and experiments.
(
    BASIS, IMAGES, KEYS, BANK, ESTIMATE, QUALITY, QUALITY_KEYS, BOOTSTRAP, ATTACK, DECOYS, NOISE,
) = range(11)  # fmt: skip
# Of estimators' training: no image of an experiment of the same seed was ever trained on.
NETWORK, PAIRS, FRESH = range(1000, 1003)
# Of benchmarks.
STRANGERS, FOREIGN, FORGERS = range(2000, 2003)


def key(seed: int, fold: int) -> jax.Array:
    """Make the random key of a fold of a seed, a whole number."""
    return jax.random.fold_in(jax.random.key(seed), fold)
