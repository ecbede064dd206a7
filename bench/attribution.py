"""Times the project's estimator against the published algorithm written plainly in PyTorch.

    pip install .[bench]
    python -m bench.attribution --json attribution.json
    python -m bench.attribution --config tiny --rounds 2 --steps 10

One side is what `python -m lfp_jax.main --config=configs/stylegan2.py` does: all images given to
the default estimator, its wall clock an image as that run reports it. The other takes the PNG files
of that run, batch 1, one start after the other: 20 starts x 2000 steps of Adam, generator weights,
cores and design point the same, the Laplacian pyramid for a loss. As that takes hours, a number of
steps is timed and scaled up; every step does the same work. The rounds of both take turns. Nothing
of the first side's compilation counts, its first run is told apart; nor does the bank of starts,
made once a generator and shared by all images, which is told as well.

`ratio` is PyTorch / JAX: how many times quicker the estimator is. Its interval spans the 10th to
the 90th percentile of the rounds.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from bench import command, race
from bench import torch_stylegan2 as plain
from bench.torch_inversion import Descent
from configs.stylegan2 import get_config
from lfp_jax import basis, design, experiment, images
from lfp_jax.metrics import perceptual
from lfp_jax.weights import store

_WARM_UP = 3  # steps that do not count


def estimate(config, workdir):
    """Run the experiment; give what it measured."""
    experiment.run(config, workdir)
    return json.loads((workdir / "metrics.json").read_text(encoding="utf-8"))


class Rival:
    """The published algorithm on the images of an experiment."""

    def __init__(self, config, workdir):
        """Read generator, basis and images of a finished experiment."""
        self.generator = design.load_generator(config.generator)
        fitted = basis.Basis(**store.load(str(workdir / "basis"))[0]["basis"])
        space = basis.split(fitted, bits=config.bits, shift=config.shift)
        names = ("mean", "carrier", "nuisance", "nuisance_stddev")
        self.space = {name: torch.tensor(np.asarray(getattr(space, name))) for name in names}
        self.noise = [plain.to_torch(one) for one in self.generator.noise]
        files = images.find(workdir / "images")[: config.images]
        self.images = images.from_uint8(np.stack([images.read(file) for file in files]))
        adam = config.adam
        self.count = adam.starts * adam.steps
        self.options = {name: adam[name] for name in ("learning_rate", "decay", "penalty")}
        self.options |= {"strength": config.strength, "code": config.code}
        self.form = race.quickest({form: partial(self._steps, form) for form in plain.FORMS})
        self._check()

    def start(self, i, form):
        """Give a start on image i."""
        synthesis = plain.Synthesis(self.generator.arch, form=form)
        synthesis = plain.copy_weights(self.generator.synthesis, synthesis).requires_grad_(False)
        image = plain.to_torch(self.images[i : i + 1])
        return Descent(synthesis, self.noise, self.space, image, **self.options)

    def seconds(self, i, steps):
        """Time steps on image i; give the seconds of the whole algorithm at that pace."""
        descent = self.start(i, self.form)
        for _ in range(_WARM_UP):
            descent.step()

        def run():
            for _ in range(steps):
                descent.step()

        return race.seconds(run) * self.count / steps

    def _steps(self, form):
        descent = self.start(0, form)

        def run():
            for _ in range(_WARM_UP):
                descent.step()

        return run

    def _check(self):
        """Compare the loss of a start with the project's."""
        descent = self.start(0, self.form)
        with torch.no_grad():
            w, theirs = descent.latent().numpy(), descent.loss().numpy()
        made = jax.jit(type(self.generator).decode)(self.generator, jnp.asarray(w)[None])[0]
        loss = perceptual.loss("laplacian")
        ours = loss.distance(loss.prepare(jnp.asarray(self.images[0])), made)
        race.check_agreement(ours, theirs)  # no start is outside the box: nothing is added


def _parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="", help="text after the colon of configs/stylegan2.py")
    parser.add_argument("--images", type=int, help="default: the config's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="of PyTorch, timed in each round")
    parser.add_argument("--workdir", help="holds basis and images; default a temporary folder")
    parser.add_argument("--json", help="file for the results")
    return parser.parse_args()


def measure(options, workdir):
    """Run both sides in turn; give the results as they go into JSON."""
    config = get_config(options.config)
    config.images, config.fd_images = options.images or config.images, 0
    first = estimate(config, workdir)
    rival = Rival(config, workdir)
    ours, theirs = [], []
    for i in range(options.rounds):
        found = estimate(config, workdir)
        ours.append(found["seconds_per_image"]["value"])
        theirs.append(rival.seconds(i % config.images, options.steps))
    return {
        "estimator": config.estimator, "generator": config.generator, "images": config.images,
        "word_accuracy": found["word_accuracy"],
        "generator_evaluations": found["generator_evaluations"],
        "jax_seconds_per_image": race.median(ours),
        "jax_first_run_seconds_per_image": first["seconds_per_image"]["value"],
        "jax_setup_seconds": found["seconds_per_image"]["setup_seconds"],
        "torch_seconds_per_image": race.median(theirs),
        "torch_form": rival.form, "torch_steps_timed": options.steps,
        "torch_steps_of_the_algorithm": rival.count,
        "ratio": race.ratio(theirs, ours),
    }  # fmt: skip


def table(result):
    """Lay the result out as lines of text."""
    ratio, count = result["ratio"], result["torch_steps_of_the_algorithm"]
    steps = result["torch_steps_timed"]
    return "\n".join([
        f"{result['generator']}, {result['images']} images, {ratio['rounds']} rounds in turn",
        f"JAX, {result['estimator']}: {result['jax_seconds_per_image']:.3f} s an image; "
        f"{result['jax_first_run_seconds_per_image']:.3f} s with compilation; "
        f"set-up, once: {result['jax_setup_seconds']:.1f} s",
        f"PyTorch, published: {result['torch_seconds_per_image']:.0f} s an image, "
        f"form {result['torch_form']}; {steps} of {count} steps timed a round, on one image, "
        f"and scaled by {count / steps:g}",
        f"PyTorch / JAX: {ratio['value']:.1f} ({ratio['low']:.1f} - {ratio['high']:.1f})",
    ])  # fmt: skip


def main():
    """Run the benchmark."""
    options, machine = _parse(), plain.machine()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(options, Path(options.workdir or scratch))
    print(race.described(machine))
    print(table(result))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(machine | result, file, indent=1)


if __name__ == "__main__":
    command.run(main)
