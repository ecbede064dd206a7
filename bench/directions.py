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

from bench import command, parts
from bench.rows import draw_bits
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
_FORESEEN = ("jointly", "known", "alone")  # shares of a plan: what is drawn, and its ends
_FLOOR = 1e-4  # of a plot of bit errors


class Carrier:
    """A basis and a shift, at the strength that changes pictures as asked."""

    def __init__(self, options, name, shift, bench):
        """Find that strength."""
        self.config = config = command.load_config(options.config)
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
            variance=variance, attack=self.config.lm.attack, **mark,
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
    """Give the share of wrong bits and its ends, none wrong drawn at the foot of the plot."""
    right = result["metrics"]["bit_accuracy"]
    return tuple(max(1.0 - right[end], _FLOOR) for end in ("value", "high", "low"))


def plot(path, results):
    """Draw measured shares of wrong bits by attack, and against predicted ones, as a PNG."""
    carriers = list(dict.fromkeys(map(_carrier, results)))
    attacks_run = sorted({r["attack"] for r in results}, key=lambda name: (":" in name, name))
    figure = Figure(figsize=(11, 5.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(6, 5))
    for i, carrier in enumerate(carriers):
        rows = [r for r in results if _carrier(r) == carrier]
        look = plots.look((carrier, carrier), (carriers, carriers)) | {"linestyle": ""}
        look |= {"markersize": 5, "elinewidth": 0.7}
        place = 0.7 * ((i + 0.5) / len(carriers) - 0.5)
        x = [attacks_run.index(r["attack"]) + place for r in rows]
        left.errorbar(x, *plots.bars([_wrong(r) for r in rows]), label=_label(rows), **look)
        planned = [r for r in rows if r["plan"]]
        if planned:
            foreseen = [[r["plan"][key]["value"] for r in planned] for key in _FORESEEN]
            wrong, ends = plots.bars([_wrong(r) for r in planned])
            middle, reach = plots.bars(list(zip(*np.maximum(foreseen, _FLOOR), strict=True)))
            right.errorbar(middle, wrong, ends, reach, **look)
    for edge in np.arange(len(attacks_run) - 1) + 0.5:
        left.axvline(edge, color="0.85", linewidth=0.8)
    right.plot([_FLOOR, 0.5], [_FLOOR, 0.5], color="0.45", linewidth=0.8, linestyle="--")
    left.set(yscale="log", ylim=(0.7 * _FLOOR, 0.7), ylabel="measured bit error")
    left.set_xticks(
        range(len(attacks_run)), [name.partition(":")[2] or name for name in attacks_run]
    )
    right.set(
        xscale="log",
        xlim=(0.7 * _FLOOR, 0.7),
        xlabel="predicted bit error, jointly; from all others known to alone",
    )
    for axis in (left, right):
        axis.grid(alpha=0.25, linewidth=0.6, axis="y" if axis is left else "both")
    figure.legend(loc="outside lower center", ncols=3)
    plots.write(figure, path)


def _carrier(result):
    return result["basis"], result["shift"], result["asked"]


def _label(rows):
    """Name a carrier, and what it costs."""
    r = rows[0]
    found = r["metrics"]
    fd = f", FD {found['fd']['value']:.1f}" if "fd" in found else ""
    return f"{r['basis']}, from {r['shift']} ({found['psnr']['value']:.1f} dB{fd})"


def table(results):
    """Lay the results out as lines of text."""
    lines = [
        f"{'carrier':<18}{'attack':<20}{'asked':>6}{'PSNR':>6}{'FD':>7}{'sd':>6}{'alone':>9}"
        f"{'joint':>9}{'known':>9}{'measured':>10}{'words':>8}{'first':>8}{'evals':>7}{'images':>7}"
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
            line += f"{1.0 - r['metrics']['bit_accuracy']['value']:>10.4f}"
            line += f"{found['word_accuracy']:>8}{found['right_user_first']:>8}"
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
        for attack in command.attack_names(options.attacks):
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
        plot(options.plot, [r for r in results if "metrics" in r])


if __name__ == "__main__":
    command.run(main)
