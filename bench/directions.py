"""Carriers against each other at the same change of the image, and the planner against the truth.

    python -m bench.directions --out runs/directions
    python -m bench.directions --out runs/directions --images 12 --planned 12 --plan-only
    python -m bench.directions --plot docs/plan_vs_measured.png --out runs/directions

Each carrier, a basis and a shift, takes steps that change the image alike, of a strength at which
key and all the carrier displaces change it by the asked root mean square, images in [-1, 1]. The
same latents, keys and noise for all; estimator `lm`, which is not told of the attack. A carrier's
result is one JSON file, so that the command goes on where it was stopped; a basis is kept in the
same folder. A carrier whose part of the plain picture alone is more than the asked change is said
to be out of reach. With --plan-only nothing is estimated, only predicted.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from configs.stylegan2 import get_config
from lfp_jax import attacks, basis, design, fingerprint, images, logs, planner
from lfp_jax.attribution import bank, least_squares
from lfp_jax.metrics import perceptual

CARRIERS = (
    ("sensitivity", 64), ("fisher", 0), ("pca", 448), ("jacobian", 64), ("pca", 256), ("random", 0),
    ("fisher", 64), ("jacobian", 128), ("pca", 128), ("sensitivity", 128), ("jacobian", 0),
    ("pca", 0),
)  # fmt: skip

_BASIS, _IMAGES, _KEYS, _BANK, _ATTACK = 0, 1, 2, 3, 8  # folds of the seed, as in an experiment


def measure(options, name, shift, starts):
    """Plan and run one carrier; give what goes into its file."""
    config = get_config(options.switches)
    config.update(basis=name, shift=shift, equalise=True, attack=options.attack)
    fold = partial(jax.random.fold_in, jax.random.key(config.seed))
    point = design.prepare(fold(_BASIS), config, Path(options.out) / name)
    generator, space, n = point.generator, point.space, options.images
    latents = basis.sample(fold(_IMAGES), generator, n)
    bits = np.asarray(jax.random.bernoulli(fold(_KEYS), 0.5, (n, config.bits)), np.uint8)
    plain = images.png_round_trip(design.decode(generator, latents))

    def marked(strength):
        w = fingerprint.inject(space, latents, bits, strength=strength, code=config.code)
        return images.png_round_trip(design.decode(generator, w))

    def change(strength):
        return float(np.sqrt(np.square(marked(strength) - plain).mean()))

    displaced, strength = change(1e-6), options.change
    result = {"basis": name, "shift": shift, "attack": options.attack, "images": n}
    result |= {"bits": config.bits, "displaced": displaced, "asked": options.change}
    if displaced >= options.change:
        return result
    for _ in range(4):  # squares add up, nearly
        key = max(change(strength) ** 2 - displaced**2, 1e-12)
        strength *= ((options.change**2 - displaced**2) / key) ** 0.5
    made = marked(strength)
    mark = {"strength": strength, "code": config.code}
    attack = attacks.find(options.attack)
    plan = planner.predict(
        generator, space, point.metric, latents[: options.planned], bits[: options.planned],
        variance=planner.noise_variance(attack), **mark,
    )  # fmt: skip
    result |= {
        "strength": strength, "change": change(strength), "plan": planner.summary(plan),
        "standard_deviations": float(np.median(0.5 * strength / space.carrier_stddev)),
        "psnr": float(np.mean(jax.vmap(perceptual.psnr)(made, plain))),
    }  # fmt: skip
    if options.plan_only:
        return result
    lm = config.lm.to_dict() | {"bank": starts(generator, fold(_BANK), point.metric)}
    seen = attacks.apply(fold(_ATTACK), made, attack)
    found = least_squares.lm(None, generator, space, seen, **mark, **lm)
    wrong = (found.bits != bits).sum(axis=1)
    return result | {"wrong": wrong, "evaluations": found.evaluations.mean()}


def plot(path, results):
    """Draw measured shares of wrong bits against predicted ones; none wrong as half a bit."""
    figure = Figure(figsize=(6.5, 6), dpi=120, layout="constrained")
    axis = figure.subplots()
    axis.plot([1e-4, 0.5], [1e-4, 0.5], color="grey", linewidth=0.8, label="as predicted")
    for marker, attack in zip("os^D", dict.fromkeys(r["attack"] for r in results), strict=False):
        rows = [r for r in results if r["attack"] == attack]
        planned = [np.array([r["plan"][key]["value"] for r in rows]) for key in ("known", "alone")]
        measured = np.array([r["wrong_share"] for r in rows])
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
        xscale="log", yscale="log", ylabel="measured bit error, `lm`",
        xlabel="predicted bit error: from all other bits known to none",
    )  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend()
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png")


def table(results):
    """Lay the results out as lines of text."""
    lines = [
        f"{'carrier':<18}{'attack':<14}{'PSNR':>6}{'sd':>6}{'planned':>9}{'joint':>9}{'known':>9}"
        f"{'measured':>10}  {'wrong of':<12}{'evaluations':>11}"
    ]
    for r in results:
        start = f"{r['basis'] + ' ' + str(r['shift']):<18}{r['attack']:<14}"
        if "plan" not in r:
            lines.append(f"{start}out of reach: {r['displaced']:.3f} displaced of {r['asked']}")
            continue
        planned = [r["plan"][key]["value"] for key in ("alone", "jointly", "known")]
        line = f"{start}{r['psnr']:>6.1f}{r['standard_deviations']:>6.1f}{planned[0]:>9.5f}"
        line += f"{planned[1]:>9.5f}{planned[2]:>9.5f}"
        if "wrong" in r:
            wrong = f"{sum(r['wrong'])}/{r['bits'] * r['images']}"
            line += f"{r['wrong_share']:>10.4f}  {wrong:<12}{r['evaluations']:>11.0f}"
        lines.append(line)
    return "\n".join(lines)


def _parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/directions", help="folder of bases and results")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--planned", type=int, default=4, help="of these, linearised")
    parser.add_argument("--attack", default="paper:noise", help="or none")
    parser.add_argument("--change", type=float, default=0.06, help="rms, images in [-1, 1]")
    parser.add_argument("--carriers", help="e.g. fisher:0,pca:448; default all")
    parser.add_argument("--switches", default="", help="text after the colon of the config")
    parser.add_argument("--bank", type=int, default=8_192, help="samples to start from")
    parser.add_argument("--plan-only", action="store_true", help="predict alone")
    parser.add_argument("--plot", help="PNG to draw of all results in the folder")
    return parser.parse_args()


def main():
    """Run the carriers that have no result yet, print all results, draw them."""
    options, banks = _parse(), {}
    carriers = CARRIERS
    if options.carriers:
        carriers = [(n, int(s)) for n, s in (c.split(":") for c in options.carriers.split(","))]

    def starts(generator, key, metric):
        if not banks:  # the same for all
            banks["one"] = bank.make_bank(key, generator, size=options.bank, metric=metric)
        return banks["one"]

    for name, shift in () if options.plot else carriers:
        label = f"{name}-{shift}-{options.attack}-{options.change:g}-{options.images}"
        label += "-plan.json" if options.plan_only else ".json"
        file = Path(options.out) / label.replace(":", "-")
        if not file.exists():
            logs.write_json(file, measure(options, name, shift, starts))
    results = [json.loads(f.read_text()) for f in sorted(Path(options.out).glob("*.json"))]
    for r in results:
        r["wrong_share"] = sum(r.get("wrong", [])) / (r["bits"] * r["images"])
    print(table(results))
    if options.plot:
        plot(options.plot, [r for r in results if "wrong" in r])


if __name__ == "__main__":
    main()
