"""Tells from how many samples on the directions that carry keys are the generator's own.

    python -m bench.stability --config=ldm
    python -m bench.stability --config=stylegan2 --samples 6250 25000 --metric-samples 512 2048

Directions are found twice, from two halves of the samples that share none. `overlap` is the mean
squared cosine between the two carriers, in units of the prior's spread: 1 is the same subspace, and
`chance` that of two random ones. `change` is how far a carrying step moves the image, root mean
square over pixels in [-1, 1]: what a key costs and what it is read by.
"""

import argparse

import jax
import numpy as np

from bench import command
from lfp_jax import basis, design, seeds, sensitivity


def _half_metric(key, generator, first, last):
    """Estimate the mean metric from samples first, ..., last - 1 of a key."""
    whole = sensitivity.mean_metric(key, generator, samples=last) * last
    before = sensitivity.mean_metric(key, generator, samples=first) * first if first else 0.0
    return (whole - before) / (last - first)


def _carrier(latents, metric, shift, bits):
    turned = basis.turn(basis.fit(latents), metric)
    return np.asarray(turned.components, np.float64)[:, shift : shift + bits]


def _change(carrier, metric, pixels):
    return np.sqrt(np.einsum("dk,de,ek->", carrier, metric, carrier) / carrier.shape[1] / pixels)


def main():
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="stylegan2", help="a config of configs/, by its name")
    parser.add_argument("--samples", type=int, nargs="+", default=[512, 1_250, 2_500, 5_000])
    parser.add_argument("--metric-samples", type=int, nargs="+", default=[256, 512, 1_024, 2_048])
    options = parser.parse_args()
    config = command.load_config(options.config)
    generator = design.load_configured(config)
    key = seeds.key(config.seed, seeds.BASIS)
    metric_key = jax.random.fold_in(key, 1)
    half, half_metric = max(options.samples), max(options.metric_samples)
    latents = basis.sample(key, generator, 2 * half)
    metric = sensitivity.mean_metric(metric_key, generator, samples=2 * half_metric)
    units = np.asarray(basis.turn(basis.fit(latents), metric).duals, np.float64).T
    pixels, d = np.prod(generator.image_shape), units.shape[1]
    print(f"{generator.name}, {config.bits} directions of {d} from {config.shift} on")
    print(f"{'samples':>8} {'of metric':>9} {'overlap':>8} {'change':>8} {'change':>8}")
    for n, m in zip(options.samples, options.metric_samples, strict=True):
        carriers = [
            _carrier(
                latents[start : start + n],
                _half_metric(metric_key, generator, begin, begin + m),
                config.shift, config.bits,
            )
            for start, begin in ((0, 0), (half, half_metric))
        ]  # fmt: skip
        a, b = (np.linalg.qr(units @ carrier)[0] for carrier in carriers)
        overlap = np.sum(np.square(a.T @ b)) / config.bits
        changes = [f"{_change(carrier, metric, pixels):8.5f}" for carrier in carriers]
        print(f"{n:>8} {m:>9} {overlap:>8.3f} {' '.join(changes)}", flush=True)
    print(f"chance{'':>12} {config.bits / d:>8.3f}")


if __name__ == "__main__":
    command.run(main)
