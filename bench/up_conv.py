"""Times the weight-gradient rule of `layers.up_conv` against automatic differentiation.

    python -m bench.up_conv [--rounds 15]

Both run in turn on the shapes of stylegan2-demo, batch 16; prints the median of each and the median
ratio with the interval its rounds span from the 10th to the 90th percentile.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp

from bench import race
from lfp_jax.generators import layers

_SHAPES = ((4, 128, 128), (8, 128, 96), (16, 96, 32), (32, 32, 16))  # size in, channels in and out
_BATCH = 16
_FIR = (1, 3, 3, 1)


def _gradient(trainable):
    def energy(x, kernel):
        return jnp.sum(jnp.square(layers.up_conv(x, kernel, _FIR, trainable=trainable)))

    return jax.jit(jax.grad(energy, argnums=(0, 1)))


def _run(function, *args):
    jax.block_until_ready(function(*args))


def main():
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    plain, ruled = _gradient(False), _gradient(True)
    print(f"{race.described(race.machine())}, batch {_BATCH}, {rounds} rounds in turn, ms")
    for size, inputs, outputs in _SHAPES:
        x = jax.random.normal(jax.random.key(0), (_BATCH, size, size, inputs))
        kernel = jax.random.normal(jax.random.key(1), (3, 3, inputs, outputs))
        forms = [partial(_run, function, x, kernel) for function in (plain, ruled)]
        times = 1e3 * race.race(forms, rounds=rounds)
        ratio = race.ratio(times[:, 0], times[:, 1])
        print(
            f"{size:>3} -> {2 * size:<3} {inputs:>3} -> {outputs:<3} channels: "
            f"automatic {race.median(times[:, 0]):7.1f}, ruled {race.median(times[:, 1]):7.1f}, "
            f"ratio {ratio['value']:.2f} ({ratio['low']:.2f} - {ratio['high']:.2f})"
        )


if __name__ == "__main__":
    main()
