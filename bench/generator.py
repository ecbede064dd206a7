"""Times StyleGAN2 in JAX against the same network written plainly in PyTorch.

    pip install .[bench]
    python -m bench.generator --json generator.json
    python -m bench.generator --sizes 64 --batches 1 --work forward gradient --rounds 5

Each cell (size, batch, work) runs in a fresh process, both libraries in turn on the same weights,
after a check that images, gradients and logits agree. Random weights; channels of stylegan2-demo
at 64, of the official table (config-f) at 256 and 1024. Of PyTorch's plain forms (see
bench/torch_stylegan2.py) the quickest in that cell runs. `ratio` is PyTorch / JAX: above 1 JAX is
quicker. Its interval spans the 10th to the 90th percentile of the rounds. Memory is the peak of a
second run (the first compiles) in a process with one library only, above what it held after the
imports: weights, optimisers, compiled programs, and what the run takes.

Work: `forward` is w to image; `gradient` that and the gradient of a squared error in w; `train` one
discriminator and one generator update with mixing, noise, Adam and the moving average; `train_r1`
the same with the R1 penalty, which every 16th step has.
"""

import argparse
import copy
import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import torch
import torch.nn.functional as F

from bench import command, race
from bench import torch_stylegan2 as plain
from lfp_jax.generators import stylegan2
from lfp_jax.training import gan_step

_DEMO = {"generator": (128, 128, 96, 32, 16), "discriminator": (128, 96, 64, 32, 16)}
_LIBRARIES = ("jax", "torch")
_WORK = ("forward", "gradient", "train", "train_r1")
_RATE, _R1, _R1_EVERY, _MIXING, _EMA_IMAGES = 0.002, 10.0, 16, 0.9, 10_000


def architectures(size):
    """Give the sizes of generator and discriminator at a resolution."""
    widths = [min(32768 // 2**i, 512) for i in range(2, size.bit_length())]
    g, d = _DEMO.values() if size == 64 else (tuple(widths), tuple(widths))
    return (
        stylegan2.Architecture(resolution=size, channels=g),
        stylegan2.DiscriminatorArchitecture(resolution=size, channels=d),
    )


# --- JAX -----------------------------------------------------------------------------------------


@jax.jit
def _decode(generator, w):
    return generator.decode(w)


@jax.jit
def _gradient(generator, w, target):
    return jax.grad(lambda w: jnp.mean(jnp.square(generator.decode(w) - target)))(w)


def jax_work(work, generator, w, target):
    """Give a function that does the work in JAX and waits for it."""
    if work == "forward":
        return lambda: jax.block_until_ready(_decode(generator, w))
    if work == "gradient":
        return lambda: jax.block_until_ready(_gradient(generator, w, target))
    arch, d_arch = architectures(generator.arch.resolution)
    hyper = gan_step.Hyperparameters(
        arch, d_arch, len(w), _RATE, _R1, _R1_EVERY, 0.0, 4, _MIXING, False, _EMA_IMAGES
    )
    held = {"state": gan_step.init_state(jax.random.key(0), hyper), "step": 0}
    real = np.random.default_rng(0).integers(0, 256, (len(w), *generator.image_shape), np.uint8)

    def step():
        now = jnp.asarray(held["step"], jnp.int32)
        state, metrics = gan_step.train_step(
            jax.random.key(1), held["state"], real, now, hyper,
            penalise=work == "train_r1", path=False,
        )  # fmt: skip
        held.update(state=jax.block_until_ready(state), step=held["step"] + 1)
        return metrics

    return step


# --- PyTorch -------------------------------------------------------------------------------------


def torch_work(work, synthesis, noise, w, target):
    """Give a function that does the work in PyTorch; the training step draws its own noise."""
    if work in ("train", "train_r1"):
        nets = Training(synthesis.arch.resolution, len(w), form=synthesis.form)
        return partial(nets.step, penalise=work == "train_r1")
    synthesis.requires_grad_(False)
    if work == "forward":

        def forward():
            with torch.inference_mode():
                return synthesis(w, noise)

        return forward
    w = w.clone().requires_grad_()
    return lambda: torch.autograd.grad((synthesis(w, noise) - target).square().mean(), w)[0]


class Training:
    """Networks, optimisers and the step of `lfp_jax.training.gan_step`."""

    def __init__(self, size, batch, *, form):
        arch, d_arch = architectures(size)
        self.arch, self.batch, self.seen = arch, batch, 0
        parts = {"mapping": plain.Mapping(arch), "synthesis": plain.Synthesis(arch, form=form)}
        self.generator, self.discriminator = torch.nn.ModuleDict(parts), plain.Discriminator(d_arch)
        if form == "scaled, nhwc":
            self.generator.to(memory_format=torch.channels_last)
            self.discriminator.to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)
        self.w_avg = torch.zeros(arch.w_dim)
        ratio = _R1_EVERY / (_R1_EVERY + 1)
        self.generator_adam = torch.optim.Adam(
            self.generator.parameters(), lr=_RATE, betas=(0.0, 0.99)
        )
        self.discriminator_adam = torch.optim.Adam(
            self.discriminator.parameters(), lr=_RATE * ratio, betas=(0.0, 0.99**ratio)
        )
        u8 = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)
        self.real = torch.tensor(u8).permute(0, 3, 1, 2)

    def fakes(self):
        """Draw images with mixed styles and random noise, and their first latents."""
        arch, n = self.arch, self.batch
        first, second = (self.generator["mapping"](torch.randn(n, arch.z_dim)) for _ in range(2))
        cut = torch.randint(1, arch.num_ws, (n,))
        cut = torch.where(torch.rand(n) < _MIXING, cut, arch.num_ws)
        keep = torch.arange(arch.num_ws) < cut[:, None]
        ws = torch.where(keep[:, :, None], first[:, None], second[:, None])
        noise = [torch.randn(n, 1, *shape[1:3]) for shape in stylegan2.noise_shapes(arch)]
        return self.generator["synthesis"](ws, noise), first

    def step(self, *, penalise):
        """Make one discriminator and one generator update."""
        real = self.real.float() / 127.5 - 1.0
        with torch.no_grad():
            fake, w = self.fakes()
        self.discriminator.requires_grad_(True)
        loss = F.softplus(self.discriminator(fake)).mean()
        loss = loss + F.softplus(-self.discriminator(real)).mean()
        if penalise:
            real.requires_grad_()
            logits = self.discriminator(real)
            (slopes,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
            loss = loss + 0.5 * _R1 * _R1_EVERY * slopes.square().sum((1, 2, 3)).mean()
        self._update(self.discriminator_adam, loss)
        self.discriminator.requires_grad_(False)
        loss = F.softplus(-self.discriminator(self.fakes()[0])).mean()
        self._update(self.generator_adam, loss)
        self._follow(w)

    def _update(self, adam, loss):
        adam.zero_grad()
        loss.backward()
        adam.step()

    @torch.no_grad()
    def _follow(self, w):
        half_life = min(_EMA_IMAGES, max(self.seen * 0.05, 1.0))
        self.seen += self.batch
        pairs = zip(self.average.parameters(), self.generator.parameters(), strict=True)
        for average, now in pairs:
            average.lerp_(now, 1.0 - 0.5 ** (self.batch / half_life))
        self.w_avg.lerp_(w.mean(0), 0.005)


# --- cells ---------------------------------------------------------------------------------------


def _inputs(size, batch):
    """Give latents and a target image as numpy arrays, w and NHWC."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((batch, 512)).astype(np.float32)
    return w, rng.uniform(-1.0, 1.0, (batch, size, size, 3)).astype(np.float32)


def _random_noise(arch):
    return [torch.randn(shape).permute(0, 3, 1, 2) for shape in stylegan2.noise_shapes(arch)]


def time_cell(size, batch, work, forms, rounds, budget):
    """Check that both libraries agree, then race them; run in a process of its own."""
    arch, _ = architectures(size)
    generator = stylegan2.random_generator(jax.random.key(0), arch, noise_strength=0.1)
    noise = [plain.to_torch(one) for one in generator.noise]
    w, target = _inputs(size, batch)
    tensors = torch.tensor(w), plain.to_torch(target)
    ours = jax_work(work, generator, w, target)
    if work.startswith("train"):
        _check_discriminator(size, target)

    def rival(form):
        synthesis = plain.copy_weights(generator.synthesis, plain.Synthesis(arch, form=form))
        made = torch_work(work, synthesis, noise, *tensors)
        if not work.startswith("train"):
            race.check_agreement(ours(), made())
        return made

    makers = {form: partial(rival, form) for form in forms}
    form = race.quickest(makers) if len(forms) > 1 else forms[0]
    times = race.race([ours, rival(form)], rounds=rounds, budget=budget)
    return {
        "jax_seconds": race.median(times[:, 0]),
        "torch_seconds": race.median(times[:, 1]),
        "ratio": race.ratio(times[:, 1], times[:, 0]),
        "torch_form": form,
    }


def _check_discriminator(size, images):
    _, d_arch = architectures(size)
    discriminator = stylegan2.random_discriminator(jax.random.key(0), d_arch)
    module = plain.copy_weights(discriminator.params, plain.Discriminator(d_arch))
    with torch.no_grad():
        race.check_agreement(discriminator(images)[:, 0], module(plain.to_torch(images)))


def weigh_cell(library, size, batch, work, form):
    """Measure the memory of one library, MiB; run in a process of its own."""
    before = race.peak_mebibytes()
    arch, _ = architectures(size)
    w, target = _inputs(size, batch)
    if library == "jax":
        run = jax_work(work, stylegan2.random_generator(jax.random.key(0), arch), w, target)
    else:
        tensors = torch.tensor(w), plain.to_torch(target)
        synthesis = plain.Synthesis(arch, form=form)
        run = torch_work(work, synthesis, _random_noise(arch), *tensors)
    run()
    race.forget_peak()
    run()
    return race.peak_mebibytes() - before


_ROW = "{:>5} {:>5}  {:<9} {:>9} {:>9}  {:<19} {:>6} {:>8} {:>9}  {}"
_HEAD = _ROW.format(
    "size", "batch", "work", "JAX ms", "torch ms", "torch / JAX", "rounds", "JAX MiB", "torch MiB",
    "form",
)  # fmt: skip


def _line(cell):
    where = cell["size"], cell["batch"], cell["work"]
    if "ratio" not in cell:
        return f"{_ROW.format(*where, *[''] * 6, '').rstrip()} {cell['note']}"
    ratio, rounded = cell["ratio"], [f"{1e3 * cell[f'{name}_seconds']:.1f}" for name in _LIBRARIES]
    memory = [cell.get(f"{name}_mebibytes") for name in _LIBRARIES]
    return _ROW.format(
        *where, *rounded, f"{ratio['value']:.2f} ({ratio['low']:.2f} - {ratio['high']:.2f})",
        ratio["rounds"], *("-" if size is None else round(size) for size in memory),
        cell["torch_form"],
    )  # fmt: skip


def measure(where, options):
    """Measure one cell (size, batch, work): time, then memory; give it as it goes into JSON."""
    limit = options.gibibytes or psutil.virtual_memory().available / 2**30 - 1.0
    cell = dict(zip(("size", "batch", "work"), where, strict=True))
    timing = options.forms, options.rounds, options.budget
    timed = race.alone(time_cell, *where, *timing, gibibytes=limit)
    if timed is None:
        return cell | {"note": f"failed within {limit:.1f} GiB"}
    cell |= timed
    for library in () if options.no_memory else _LIBRARIES:
        peak = race.alone(weigh_cell, library, *where, cell["torch_form"], gibibytes=limit)
        cell[f"{library}_mebibytes"] = peak
    return cell


def _parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--work", nargs="+", choices=_WORK, default=_WORK)
    parser.add_argument(
        "--forms", nargs="+", choices=plain.FORMS, default=plain.FORMS, help="of PyTorch"
    )
    parser.add_argument("--rounds", type=int, default=15, help="of a cell, at most")
    parser.add_argument(
        "--budget", type=float, default=120.0, help="seconds of a cell after five rounds"
    )
    parser.add_argument(
        "--gibibytes", type=float, help="memory a process may take; default what is free less 1"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out")
    parser.add_argument("--json", help="file for the results")
    return parser.parse_args()


def main():
    """Run the benchmark."""
    options = _parse()
    machine = plain.machine()
    print(race.described(machine))
    print(f"{_HEAD}\n{'-' * len(_HEAD)}")
    cells = []
    for where in itertools.product(options.sizes, options.batches, options.work):
        cells.append(measure(where, options))
        print(_line(cells[-1]), flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(machine | {"cells": cells}, file, indent=1)


if __name__ == "__main__":
    command.run(main)
