"""Names the users of attacked images among a million, and nobody for images of elsewhere.

    python -m bench.identification --out runs/identification
    python -m bench.identification --attacks none paper waves --images 500 --out runs/identification
    python -m bench.identification --attacks --foreign 100 --photos FOLDER --out runs/identification

An attack is one of a suite, or a suite's name for all of its attacks; the estimator is not told of
it. Every image has a key of its own, and its user stands among all others with keys drawn at
random. `--foreign N` adds N images each of the same generator without a key, of the other bundled
generator, of flat colours, noise and stripes, and squares out of the files of `--photos`; whoever
is named for one of those is named wrongly. A null trial is an image and a key that did not make it,
at a rate of 1e-3.

What the estimator says is kept in OUT/parts: give the command again to go on
where it was stopped, or several times at once to share the work. What is there is judged anew.
"""

import argparse
import dataclasses
from functools import partial
from pathlib import Path

import numpy as np

from bench import command, parts
from bench.rows import draw_bits, mean, rate
from lfp_jax import basis, design, generators, images, logs, seeds
from lfp_jax.attribution import verdict
from lfp_jax.experiment import Bench
from lfp_jax.generators import zoo
from lfp_jax.metrics import accuracy

_NULL_RATE, _NULL_KEYS = 1e-3, 1_000  # of null trials, and keys that each image is tried against


def _parse(argv):
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
    parser.add_argument("--part", type=int, default=25, help="images estimated before any is kept")
    parser.add_argument("--no-judging", action="store_true", help="estimate alone")
    return parser.parse_args(argv)


def _config(options):
    config = command.load_config(options.config)
    config.update(estimator=options.estimator, images=options.images, users=options.images)
    return config


# --- images, and what is read from them ----------------------------------------------------------


def _sets(options, config, bench):
    """Give the sets of `parts.estimate`."""
    sets = {}
    for name in command.attack_names(options.attacks):
        sets[name.replace(":", "-")] = (
            options.images, partial(_attacked, name, options, config, bench),
        )  # fmt: skip
    if options.foreign:
        other = next(name for name in zoo.BUNDLED if name != bench.generator(config).name)
        names = ["plain", other, "flat", "noise", "stripes", *["photos"][: bool(options.photos)]]
        for name in names:
            make = partial(_foreign, name, options, config, bench)
            sets[f"foreign-{name}"] = options.foreign, make
    return sets


def _attacked(name, options, config, bench):
    config.attack = name
    marked = bench.marked(config, options.out)
    seen = bench.attacked(config, options.out)
    return _reader(seen, marked.users[marked.owner], options, config, bench)


def _reader(seen, bits, options, config, bench):
    """Give a function of `parts.estimate`, which keeps the keys beside what is read."""

    def read(start, stop):
        found = bench.estimate(config, options.out, seen, rows=np.arange(start, stop))
        return found.solution, {"bits": bits[start:stop]}

    return read


def _foreign(name, options, config, bench):
    """Make images of a source, and no keys."""
    generator, n = bench.generator(config), options.foreign
    rng, shape = np.random.default_rng(seeds.FOREIGN), generator.image_shape
    if name == "flat":
        made = np.broadcast_to(rng.integers(0, 256, (n, 1, 1, shape[2])), (n, *shape))
    elif name == "noise":
        made = rng.integers(0, 256, (n, *shape))
    elif name == "stripes":
        made = [_stripes(rng, shape) for _ in range(n)]
    elif name == "photos":
        paths = images.find(options.photos)
        made = [_square(rng, images.read(paths[i % len(paths)])) for i in range(n)]
    else:
        maker = generator if name == "plain" else generators.load(name)
        latents = basis.sample(seeds.key(config.seed, seeds.FOREIGN), maker, n)
        made = images.to_uint8(design.decode(maker, latents))
    fitted = np.stack([images.fit(np.asarray(each, np.uint8), shape) for each in made])
    nobodys = np.zeros((n, 0), np.uint8)
    return _reader(images.from_uint8(fitted), nobodys, options, config, bench)


def _stripes(rng, shape):
    """Draw stripes of any direction, width and two colours."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    angle, period = rng.uniform(0.0, np.pi), rng.uniform(3.0, 40.0)
    wave = np.sin(2.0 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period)
    colours = rng.integers(0, 256, (2, 1, 1, shape[2]))
    return np.where(wave[..., None] > 0.0, *colours)


def _square(rng, u8):
    """Cut a square of any size out of an image, not smaller than 64 pixels."""
    least = min(*u8.shape[:2])
    side = int(rng.integers(min(64, least), least + 1))
    down, right = (int(rng.integers(0, length - side + 1)) for length in u8.shape[:2])
    return u8[down : down + side, right : right + side]


# --- judging -------------------------------------------------------------------------------------


def _judge(name, found, own, strangers, rivals, decoys, options):
    """Judge the images of a set; the table's row.

    Args:
        name: of the set.
        found: what was read of its images.
        own: their keys [n, k], of the first of all users; [n, 0] where they have none.
        strangers: keys [m, k] of users who made none.
        rivals: how many of them the right key should fit better than.
        decoys: of `verdict.draw_decoys`.
        options: of the command line.
    """
    n, bits = found.soft_bits.shape
    users = np.concatenate([own, strangers])[: options.users] if own.size else strangers
    users = verdict.index(np.packbits(users, axis=1), bits=bits)
    ratios = verdict.ratios(found.soft_bits)
    row = {"name": name, "evaluations": mean(found.evaluations)}
    for score in ("soft", "hard"):
        form = {"rate": options.rate, "score": score, "decoys": decoys}
        named = [verdict.judge(llr, users, **form).user for llr in ratios]
        hits = sum(user == i for i, user in enumerate(named)) if own.size else 0
        wrong = sum(user is not None for user in named) - hits
        row[score] = {"right": rate(accuracy.rate(hits, n)), "wrong": rate(accuracy.rate(wrong, n))}
        row[score]["null"] = _null(ratios, strangers[:_NULL_KEYS], score)
    if own.size:
        read = found.soft_bits > 0.5
        row["bit_accuracy"] = rate(accuracy.bit_accuracy(read, own))
        row["word_accuracy"] = rate(accuracy.word_accuracy(read, own))
        row["right_user_first"] = rate(accuracy.first_among(ratios, own, strangers[:rivals]))
    return row


def _reliability(sets):
    """Give the fields of an `accuracy.Bin` each of the bits of all attacked images together."""
    told = [(found.soft_bits, more["bits"]) for found, more in sets if more["bits"].size]
    if not told:
        return []
    soft, keys = (np.concatenate(each) for each in zip(*told, strict=True))
    return [dataclasses.asdict(each) for each in accuracy.reliability(soft, keys)]


def _null(ratios, strangers, score):
    """Rate at which keys [m, k] that made none of the images are taken for theirs, one by one."""
    bits, passed = strangers.shape[1], 0
    by_count = np.array([verdict.hard_p_value(m, bits=bits) for m in range(bits + 1)])
    for llr in ratios:
        disagree = strangers != (llr > 0.0)[None]
        if score == "soft":
            p_values = verdict.soft_p_value(llr, disagree @ np.abs(llr))
        else:
            p_values = by_count[bits - disagree.sum(axis=1)]
        passed += int((p_values <= _NULL_RATE).sum())
    return rate(accuracy.rate(passed, len(ratios) * len(strangers)))


def _line(row):
    parts = [f"{row['name']:<32}"]
    for score in ("soft", "hard"):
        for what in ("right", "wrong"):
            entry = row[score][what]
            ends = f"{entry['value']:.3f} ({entry['low']:.3f} - {entry['high']:.3f})"
            parts.append(f"{score} {what} {ends}")
        parts.append(f"null {row[score]['null']['value']:.5f}")
    shares = {"bits": "bit_accuracy", "words": "word_accuracy", "first": "right_user_first"}
    parts += [f"{name} {row[key]['value']:.4f}" for name, key in shares.items() if key in row]
    evaluations, n = row["evaluations"]["value"], row["evaluations"]["images"]
    return "  ".join([*parts, f"evaluations {evaluations:.0f}", f"n {n}"])


def main(argv=None):
    """Estimate what is missing, judge all, print a table and write identification.json."""
    options = _parse(argv)
    config, bench, out = _config(options), Bench(), Path(options.out)
    parts.estimate(out, _sets(options, config, bench), size=options.part)
    if options.no_judging:
        return
    key = seeds.key(config.seed, seeds.STRANGERS)
    strangers, rows = draw_bits(key, options.users, config.bits), []
    decoys = verdict.draw_decoys(bits=config.bits)
    sets = {name: parts.load(out, name) for name in parts.names(out)}
    for name, (found, more) in sets.items():
        rows.append(_judge(name, found, more["bits"], strangers, config.decoys, decoys, options))
        print(_line(rows[-1]), flush=True)
    bins = _reliability(sets.values())
    for each in bins:
        print(f"stated {each['stated']:.4f}  wrong {each['wrong']:.4f}  of {each['bits']} bits")
    about = {"settings": config.to_dict(), "users": options.users, "rate": options.rate}
    about["reliability"] = bins
    logs.write_json(out / "identification.json", about | {"rows": rows})


if __name__ == "__main__":
    command.run(main)
