"""Times the networks of published latent-diffusion models, with random weights.

    pip install .[bench]
    python -m bench.latent_diffusion --json latent_diffusion.json

One image, float32. Each call (a decode with the quantiser where there is one, an encode, one pass
of the UNet) runs in a fresh process; seconds are the median of its rounds after one that compiles.
Memory is the peak of a call above what the process held after the imports: weights, the compiled
program, and what the call takes.
"""

import argparse
import json

import jax
import jax.numpy as jnp

from bench import command, race
from lfp_jax.generators import untrained

_CELLS = (
    ("ldm-ffhq-untrained", "decode"),
    ("ldm-ffhq-untrained", "encode"),
    ("ldm-ffhq-untrained", "unet"),
    ("kl-f8-untrained", "decode"),
)


def _call(generator, work, keep):
    """Give a function that does the work with some parts of a generator, and its operations."""
    latent = jax.random.normal(jax.random.key(1), (1, *generator.latent_shape))
    image = jnp.tanh(jax.random.normal(jax.random.key(2), (1, *generator.image_shape)))
    drop = {part: None for part in ("encoder", "decoder", "codebook", "unet") if part not in keep}
    generator = generator.replace(**drop)
    step = jnp.full((1,), 500, jnp.int32)
    function, x = {
        "decode": (lambda g, x: g.decode(x), latent),
        "encode": (lambda g, x: g.encode(x), image),
        "unet": (lambda g, x: g.predict_noise(x, step), latent),
    }[work]
    compiled = jax.jit(function).lower(generator, x).compile()
    operations = compiled.cost_analysis()["flops"]
    return lambda: jax.block_until_ready(compiled(generator, x)), operations


def measure(name, work, rounds):
    """Measure one cell; run in a process of its own."""
    before = race.peak_mebibytes()
    keep = {"decode": ("decoder", "codebook"), "encode": ("encoder",), "unet": ("unet",)}[work]
    run, operations = _call(untrained.make(name), work, keep)
    run()
    race.forget_peak()
    seconds = [race.seconds(run) for _ in range(rounds)]
    return {
        "generator": name, "work": work, "seconds": race.median(seconds), "rounds": rounds,
        "gigaflop": operations / 1e9, "mebibytes": race.peak_mebibytes() - before,
    }  # fmt: skip


def main():
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gibibytes", type=float, default=16.0, help="a process may take")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    machine = race.machine()
    print(race.described(machine))
    print(f"{'generator':<20} {'work':<7} {'seconds':>8} {'GFLOP':>8} {'MiB':>6}")
    cells = []
    for cell in _CELLS:
        found = race.alone(measure, *cell, options.rounds, gibibytes=options.gibibytes)
        if found is None:
            print(f"{cell[0]:<20} {cell[1]:<7} failed within {options.gibibytes} GiB")
            continue
        cells.append(found)
        seconds, size = f"{found['seconds']:.2f}", round(found["mebibytes"])
        print(f"{cell[0]:<20} {cell[1]:<7} {seconds:>8} {found['gigaflop']:>8.0f} {size:>6}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(machine | {"cells": cells}, file, indent=1)


if __name__ == "__main__":
    command.run(main)
