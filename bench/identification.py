"""Names the users of attacked images among a million, and nobody for images of elsewhere.

    python -m bench.identification --out runs/identification
    python -m bench.identification --attacks none paper waves --images 500 --out runs/identification
    python -m bench.identification --attacks --foreign 100 --photos FOLDER --out runs/identification

An attack is one of a suite, or a suite's name for all of its attacks; the estimator is not told of
it. Every image has a key of its own, and its user stands among all others with keys drawn at
random. `--foreign N` adds N images each of the same generator without a key, of the other bundled
generator, of flat colours, noise and stripes, and squares out of the files of `--photos`; whoever
is named for one of those is named wrongly. What the estimator says of each image is kept in
OUT/NAME.npz: the command goes on where it was stopped, and judges what is there anew.
"""

import argparse
from pathlib import Path

import numpy as np

from bench.rows import attack_names, draw_bits, load_config, mean, rate
from lfp_jax import basis, design, files, generators, images, logs, seeds
from lfp_jax.attribution import inversion, verdict
from lfp_jax.experiment import Bench
from lfp_jax.generators import zoo
from lfp_jax.metrics import accuracy


def _parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="stylegan2", help="of configs/, and its switches")
    parser.add_argument("--attacks", nargs="*", default=["none", "paper"])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--rate", type=float, default=1e-6, help="of naming anybody wrongly")
    parser.add_argument("--estimator", default="hybrid")
    parser.add_argument("--foreign", type=int, default=0, help="images of each source")
    parser.add_argument("--photos", help="folder of image files, to cut squares from")
    parser.add_argument("--out", default="runs/identification", help="folder of results")
    parser.add_argument("--no-judging", action="store_true", help="estimate alone")
    return parser.parse_args()


def _config(options):
    config = load_config(options.config)
    config.update(estimator=options.estimator, images=options.images, users=options.images)
    return config


def _keep(path, solution, **more):
    fields = ("soft_bits", "evaluations", "residual")
    arrays = {name: getattr(solution, name) for name in fields} | more
    with files.replacing(path) as part, open(part, "wb") as file:
        np.savez_compressed(file, **arrays)


# --- images of elsewhere -------------------------------------------------------------------------


def _stripes(rng, shape):
    """Draw stripes of any direction, width and two colours."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    angle, period = rng.uniform(0.0, np.pi), rng.uniform(3.0, 40.0)
    wave = np.sin(2.0 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period)
    colours = rng.integers(0, 256, (2, 1, 1, shape[2]))
    return np.where(wave[..., None] > 0.0, *colours)


def _part(rng, u8):
    """Cut a square of any size out of an image, not smaller than 64 pixels."""
    least = min(*u8.shape[:2])
    side = int(rng.integers(min(64, least), least + 1))
    down, right = (int(rng.integers(0, length - side + 1)) for length in u8.shape[:2])
    return u8[down : down + side, right : right + side]


def _foreign(options, config, bench):
    """Give {source: uint8 images}."""
    generator, n = bench.generator(config), options.foreign
    key = seeds.key(config.seed, seeds.FOREIGN)
    rng, shape = np.random.default_rng(seeds.FOREIGN), generator.image_shape
    other = next(name for name in zoo.BUNDLED if name != generator.name)
    out = {}
    for name, each in (("plain", generator), (other, generators.load(other))):
        made = images.to_uint8(design.decode(each, basis.sample(key, each, n)))
        out[name] = np.stack([images.fit(image, shape) for image in made])
    out["flat"] = np.broadcast_to(rng.integers(0, 256, (n, 1, 1, shape[2])), (n, *shape))
    out["noise"] = rng.integers(0, 256, (n, *shape))
    out["stripes"] = np.stack([_stripes(rng, shape) for _ in range(n)])
    if options.photos:
        paths = images.find(options.photos)
        photos = [_part(rng, images.read(paths[i % len(paths)])) for i in range(n)]
        out["photos"] = np.stack([images.fit(photo, shape) for photo in photos])
    return {name: each.astype(np.uint8) for name, each in out.items()}


def _look_elsewhere(options, config, bench):
    sources = _foreign(options, config, bench)
    point, key = bench.prepare(config, options.out), seeds.key(config.seed, seeds.ESTIMATE)
    estimator, _ = design.estimator(seeds.key(config.seed, seeds.BANK), point, config)
    for name, u8 in sources.items():
        path = Path(options.out) / f"foreign-{name}.npz"
        if not path.exists():
            seen = images.from_uint8(u8)
            found = estimator(key, point.generator, point.space, seen, **point.mark)
            _keep(path, inversion.host(found))


# --- judging -------------------------------------------------------------------------------------


def _judge(path, others, decoys, options):
    """Judge the images of a file; the table's row.

    Args:
        path: of a file of `_keep`; images with keys of their own are of the first of all users.
        others: keys [m, k] of users who made none.
        decoys: of `verdict.draw_decoys`.
        options: of the command line.
    """
    with np.load(path) as file:
        found = dict(file)
    own, (n, bits) = found.get("bits"), found["soft_bits"].shape
    users = others if own is None else np.concatenate([own, others])[: options.users]
    users = verdict.index(np.packbits(users, axis=1), bits=bits)
    ratios = verdict.ratios(found["soft_bits"])
    row = {"name": path.stem, "evaluations": mean(found["evaluations"])}
    for score in ("soft", "hard"):
        form = {"rate": options.rate, "score": score, "decoys": decoys}
        named = [verdict.judge(llr, users, **form).user for llr in ratios]
        hits = 0 if own is None else sum(user == i for i, user in enumerate(named))
        wrong = sum(user is not None for user in named) - hits
        row[score] = {"right": _rate(hits, n), "wrong": _rate(wrong, n)}
    if own is not None:
        row["bit_accuracy"] = rate(accuracy.bit_accuracy(found["soft_bits"] > 0.5, own))
    return row


def _rate(count, n):
    low, high = accuracy.wilson(count, n)
    return {"value": count / n, "low": low, "high": high, "images": n}


def _line(row):
    parts = [f"{row['name']:<32}"]
    for score in ("soft", "hard"):
        for what, entry in row[score].items():
            ends = f"{entry['value']:.3f} ({entry['low']:.3f} - {entry['high']:.3f})"
            parts.append(f"{score} {what} {ends}")
    bits = f"{row['bit_accuracy']['value']:.4f}" if "bit_accuracy" in row else "-"
    evaluations, n = row["evaluations"]["value"], row["evaluations"]["images"]
    return "  ".join([*parts, f"bits {bits}", f"evaluations {evaluations:.0f}", f"n {n}"])


def main():
    """Estimate what is missing, judge all, print a table and write identification.json."""
    options = _parse()
    config, bench, out = _config(options), Bench(), Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in attack_names(options.attacks):
        path = out / f"{name.replace(':', '-')}.npz"
        if not path.exists():
            config.attack = name
            marked = bench.marked(config, out)
            _keep(path, bench.estimate(config, out).solution, bits=marked.users[marked.owner])
    if options.foreign:
        config.attack = "none"
        _look_elsewhere(options, config, bench)
    if options.no_judging:
        return
    key = seeds.key(config.seed, seeds.STRANGERS)
    others, rows = draw_bits(key, options.users, config.bits), []
    decoys = verdict.draw_decoys(bits=config.bits)
    for path in sorted(out.glob("*.npz")):
        rows.append(_judge(path, others, decoys, options))
        print(_line(rows[-1]), flush=True)
    about = {"settings": config.to_dict(), "users": options.users, "rate": options.rate}
    logs.write_json(out / "identification.json", about | {"rows": rows})


if __name__ == "__main__":
    main()
