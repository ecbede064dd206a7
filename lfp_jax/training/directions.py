"""Measures the directions of a generator's latents once, for all who use it."""

import os

from lfp_jax import basis, generators, seeds


def train(
    *,
    workdir: str | os.PathLike,
    generator: str,
    samples: int,
    metric_samples: int,
    sample_steps: int | None = None,
    seed: int = 0,
) -> None:
    """Measure principal directions and mean metric, and write them as a store.

    Args:
        workdir: gets `directions`, which `basis.measure_generator` finds as
            lfp_jax/assets/bases/NAME.
        generator: what `generators.load` takes.
        samples: latents behind the principal directions.
        metric_samples: images behind the metric.
        sample_steps: DDIM steps behind a latent of a latent-diffusion model; None: its own number.
        seed: of the experiments that will use them.
    """
    source = generators.load(generator)
    if sample_steps is not None:
        source = source.replace(sample_steps=sample_steps)
    path = os.path.join(workdir, "directions")
    key = seeds.key(seed, seeds.BASIS)
    basis.ship(key, path, source, samples=samples, metric_samples=metric_samples)
    print(f"Directions: {path}/")
