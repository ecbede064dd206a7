"""Carriers against each other at the same change of the image, and the planner against the truth.

    python -m bench.directions --out runs/directions
    python -m bench.directions --out runs/directions --attacks none paper --images 64
    python -m bench.directions --config ldm --carriers pca:512,fisher:0 --out runs/ldm
    python -m bench.directions --plot directions.png --out runs/directions

Each carrier, a basis and a shift, takes steps that change the image alike, of a strength at which
key and all the carrier displaces change it by the asked root mean square, images in [-1, 1]. The
same latents, keys, noise and starts for all; the estimator, `lm` by default, is not told of the
attack. The result of a carrier under an attack is one JSON file; what was read of its images so
far, and bases, are kept in the same folder: give the command again to go on where it was stopped,
or several times at once to share the work. A carrier whose part of the plain picture alone is more
than the asked change is said to be out of reach. With --plan-only nothing is estimated, only
predicted.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bench import parts
from bench.rows import attack_names, draw_bits, load_config
from lfp_jax import attacks, basis, design, fingerprint, images, logs, planner, seeds
from lfp_jax.errors import UserError
from lfp_jax.experiment import Bench, Estimate
from lfp_jax.report import plots

CARRIERS = (
    ("sensitivity", 64), ("fisher", 0), ("pca", 448), ("jacobian", 64), ("pca", 256), ("random", 0),
    ("fisher", 64), ("jacobian", 128), ("pca", 128), ("sensitivity", 128), ("jacobian", 0),
    ("pca", 0),
)  # fmt: skip

_PROBES = 32  # pictures behind a strength


class Carrier:
    """A basis and a shift, at the strength that changes pictures as asked."""

    def __init__(self, options, name, shift, bench):
        """Find that strength."""
        self.config = config = load_config(options.config)
        config.update(basis=name, shift=shift, equalise=True, estimator=options.estimator)
        config.update(images=options.images, users=options.images, fd_images=options.fd_images)
        self.folder, self.bench = Path(options.out) / name, bench
        self.point = bench.prepare(config, self.folder)
        fold = partial(seeds.key, config.seed)
        self.latents = basis.sample(fold(seeds.IMAGES), self.point.generator, _PROBES)
        self.bits = draw_bits(fold(seeds.KEYS), _PROBES, config.bits)
        self.plain = images.png_round_trip(design.decode(self.point.generator, self.latents))
        self.displaced, strength = self._change(1e-6), options.change
        self.in_reach = self.displaced < options.change
        for _ in range(4 if self.in_reach else 0):  # squares add up, nearly
            key = max(self._change(strength) ** 2 - self.displaced**2, 1e-12)
            strength *= ((options.change**2 - self.displaced**2) / key) ** 0.5
        config.strength = strength

    def _change(self, strength):
        point, form = self.point, {"strength": strength, "code": self.config.code}
        w = fingerprint.inject(point.space, self.latents, self.bits, **form)
        made = images.png_round_trip(design.decode(point.generator, w))
        return float(np.sqrt(np.square(made - self.plain).mean()))

    def plan(self, attack, count):
        """Predict from `count` pictures; None under an attack that no plan foresees."""
        try:
            variance = planner.noise_variance(attacks.find(attack))
        except UserError:
            return None
        point, mark = self.point, {"strength": self.config.strength, "code": self.config.code}
        plan = planner.predict(
            point.generator, point.space, point.metric, self.latents[:count], self.bits[:count],
            variance=variance, **mark,
        )  # fmt: skip
        return planner.summary(plan)

    def reader(self, attack):
        """Give a function of `parts.estimate` for its images under an attack."""
        self.config.attack = attack
        config, folder, bench = self.config.copy_and_resolve_references(), self.folder, self.bench
        seen = bench.attacked(config, folder)

        def read(start, stop):
            found = bench.estimate(config, folder, seen, rows=np.arange(start, stop))
            each = found.seconds / (stop - start)
            return found.solution, {"seconds": np.full(stop - start, each)}

        return read

    def measure(self, attack, solution, seconds):
        """Measure what was read of all its images; {quantity: {"value", ...}}."""
        self.config.attack = attack
        seen = self.bench.attacked(self.config, self.folder)
        estimate = Estimate(solution, seconds, 0.0)
        return self.bench.assess(self.config, self.folder, seen, estimate).metrics


def result(carrier, attack, name, options):
    """Give what goes into the file of a carrier under an attack; None while images are left."""
    config = carrier.config
    about = {"basis": config.basis, "shift": config.shift, "attack": attack, "bits": config.bits}
    about |= {"displaced": carrier.displaced, "asked": options.change, "images": options.images}
    if not carrier.in_reach:
        return about
    spread = np.median(0.5 * config.strength / carrier.point.space.carrier_stddev)
    about |= {"strength": config.strength, "standard_deviations": float(spread)}
    if options.plan_only:
        return about | {"plan": carrier.plan(attack, options.planned)}
    sets = {name: (options.images, lambda: carrier.reader(attack))}
    if not parts.estimate(options.out, sets, size=options.part):
        return None
    solution, more = parts.load(options.out, name)
    metrics = carrier.measure(attack, solution, more["seconds"].sum())
    return about | {"plan": carrier.plan(attack, options.planned), "metrics": metrics}


def _wrong(result):
    return 1.0 - result["metrics"]["bit_accuracy"]["value"]


def plot(path, results):
    """Draw measured shares of wrong bits against predicted ones; none wrong as half a bit."""
    figure = Figure(figsize=(6.5, 6), dpi=120, layout="constrained")
    axis = figure.subplots()
    axis.plot([1e-4, 0.5], [1e-4, 0.5], color="grey", linewidth=0.8, label="as predicted")
    for marker, attack in zip("os^D", dict.fromkeys(r["attack"] for r in results), strict=False):
        rows = [r for r in results if r["attack"] == attack]
        planned = [np.array([r["plan"][key]["value"] for r in rows]) for key in ("known", "alone")]
        measured = np.array([_wrong(r) for r in rows])
        middle = np.maximum(np.sqrt(planned[0] * planned[1]), 1e-4)
        bars = np.maximum([middle - planned[0], planned[1] - middle], 0.0)
        count = np.array([r["bits"] * r["images"] for r in rows])
        spread = np.sqrt(measured * (1.0 - measured) / count)
        shown = np.maximum(measured, 0.5 / count)
        axis.errorbar(
            middle, shown, [np.minimum(spread, 0.9 * shown), spread], bars, fmt=marker,
            markersize=4, linewidth=0.8, label=f"{attack}, rms {rows[0]['asked']:g}",
        )  # fmt: skip
        for r, *place in zip(rows, middle, shown, strict=True):
            label = f"{r['basis']} {r['shift']}"
            axis.annotate(label, place, xytext=(5, 4), textcoords="offset points", fontsize=7)
    axis.set(
        xscale="log", yscale="log", ylabel="measured bit error",
        xlabel="predicted bit error: from all other bits known to none",
    )  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend()
    plots.write(figure, path)


def table(results):
    """Lay the results out as lines of text."""
    lines = [
        f"{'carrier':<18}{'attack':<20}{'asked':>6}{'PSNR':>6}{'FD':>7}{'sd':>6}{'alone':>9}"
        f"{'joint':>9}{'known':>9}{'measured':>10}{'words':>7}{'first':>7}{'evals':>7}{'images':>7}"
    ]
    for r in results:
        start = f"{r['basis'] + ' ' + str(r['shift']):<18}{r['attack']:<20}{r['asked']:>6}"
        if "plan" not in r:
            lines.append(f"{start}  out of reach: displaces {r['displaced']:.3f}")
            continue
        found = {name: f"{entry['value']:.4g}" for name, entry in r.get("metrics", {}).items()}
        line = f"{start}{found.get('psnr', '-'):>6.5}{found.get('fd', '-'):>7}"
        line += f"{r['standard_deviations']:>6.1f}"
        for key in ("alone", "jointly", "known"):
            line += f"{r['plan'][key]['value']:>9.5f}" if r["plan"] else f"{'-':>9}"
        if found:
            line += f"{_wrong(r):>10.4f}{found['word_accuracy']:>7}{found['right_user_first']:>7}"
            line += f"{r['metrics']['generator_evaluations']['value']:>7.0f}"
        lines.append(line + f"{r['images']:>7}")
    return "\n".join(lines)


def _parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="stylegan2", help="of configs/, and its switches")
    parser.add_argument("--out", default="runs/directions", help="folder of bases and results")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--fd-images", type=int, default=0, help="for each distance")
    parser.add_argument("--planned", type=int, default=4, help="pictures that a plan linearises")
    parser.add_argument("--attacks", nargs="+", default=["paper:noise"], help="or suites")
    parser.add_argument("--change", type=float, default=0.06, help="rms, images in [-1, 1]")
    parser.add_argument("--carriers", help="e.g. fisher:0,pca:448; default all")
    parser.add_argument("--estimator", default="lm")
    parser.add_argument("--part", type=int, default=8, help="images estimated before any is kept")
    parser.add_argument("--plan-only", action="store_true", help="predict alone")
    parser.add_argument("--plot", help="PNG to draw of all results in the folder")
    return parser.parse_args(argv)


def main(argv=None):
    """Run what has no result yet, print all results, draw them."""
    options, bench = _parse(argv), Bench()
    out, carriers = Path(options.out), CARRIERS
    if options.carriers:
        carriers = [(n, int(s)) for n, s in (c.split(":") for c in options.carriers.split(","))]
    for name, shift in () if options.plot else carriers:
        carrier = None
        for attack in attack_names(options.attacks):
            label = f"{name}-{shift}-{attack}-{options.change:g}-{options.images}".replace(":", "-")
            file = out / (label + ("-plan.json" if options.plan_only else ".json"))
            if not file.exists():
                carrier = carrier or Carrier(options, name, shift, bench)
                found = result(carrier, attack, label, options)
                if found:
                    logs.write_json(file, found)
    results = [json.loads(f.read_text()) for f in sorted(out.glob("*.json"))]
    print(table(results))
    if options.plot:
        plot(options.plot, [r for r in results if "metrics" in r and r["plan"]])


if __name__ == "__main__":
    main()
