"""Measures what an adversary does to the fingerprints of a design point, who knows how it works.

    python -m bench.adversary --images 24 --out runs/adversary
    python -m bench.adversary --config stylegan2:tiny --attacks none reinvert collude-mean-3

The adversary has the plain generator; for `remove` and `transplant` the basis too. What it knows of
a picture's latents it estimates from the PNG as the judge does, whose estimator reads the result.

Attacks:
  none              the picture as it came
  reinvert          made again from the estimated latents
  remove-zero       and with the carrier part 0, or that of a random key (remove-random)
  transplant        and with the key of the next user: the target
  plant-N           a plain picture, to which the mean difference between N pictures of a user, the
                    target, and plain ones is added
  plant-latents-N   the same in latents, all of them known exactly, which no adversary has
  collude-HOW-N     N users' copies of the same picture, blended value by value: mean, median,
                    minimum, maximum, majority, pick
  pgd-E             pixels changed by at most E of 255 to mislead the network that ships

`right_user_first`: among random keys the owner's fits best; with colluders one of theirs does.
`target_first` and `target_bit_accuracy`: the same of the target. `psnr` is against the picture that
was attacked.

What the judge reads is kept in OUT/parts: give the command again to go on where it was stopped, or
several times at once to share the work, and once more then for a table of all.
"""

import argparse
import re
from functools import cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bench import command, parts
from bench.rows import draw_bits, line, mean, rate, row
from lfp_jax import adversary, basis, design, fingerprint, images, logs, seeds
from lfp_jax.attribution import estimator as learner
from lfp_jax.attribution import verdict
from lfp_jax.errors import UserError, did_you_mean
from lfp_jax.experiment import Bench
from lfp_jax.generators import zoo
from lfp_jax.metrics import accuracy, perceptual

ATTACKS = (
    "none", "reinvert", "remove-zero", "remove-random", "transplant", "plant-64",
    "plant-latents-64", "collude-mean-2", "collude-mean-5", "collude-majority-5",
    "collude-pick-5", "pgd-4",
)  # fmt: skip


class Busy(Exception):
    """Another process is reading what is needed."""


class Scene:
    """Users, their pictures, and what the judge reads from them."""

    def __init__(self, config, out, part):
        """Make pictures of a design point; what is read of them, so many at a time, is in `out`."""
        self.fold = partial(seeds.key, config.seed)
        self.config, self.out, self.part, self.bench = config, out, part, Bench()
        design.check(config)
        self.point = self.bench.prepare(config, out)
        self.users = draw_bits(self.fold(seeds.KEYS), config.users, config.bits)
        self.decoys = draw_bits(self.fold(seeds.DECOYS), config.decoys, config.bits)
        self.owner = np.arange(config.images) % config.users
        self.latents = basis.sample(self.fold(seeds.IMAGES), self.point.generator, config.images)
        self.plain = self.make(self.latents)
        self.made = self.copy(0)

    def read(self, name, seen):
        """Give what the judge reads of the pictures of an attack.

        Raises:
            Busy: another process is at some of them.
        """

        def estimate(start, stop):
            rows = np.arange(start, stop)
            return self.bench.estimate(self.config, self.out, seen, rows=rows).solution, {}

        sets = {name: (len(seen), lambda: estimate)}
        if not parts.estimate(self.out, sets, size=self.part):
            raise Busy
        return parts.load(self.out, name)[0]

    @cached_property
    def found(self):
        """What is read of the pictures as they came."""
        return self.read("none", self.made)

    def make(self, latents):
        """Make pictures of latents, through 8 bits."""
        shaped = jnp.asarray(latents).reshape(-1, *self.point.generator.latent_shape)
        return images.png_round_trip(design.decode(self.point.generator, shaped))

    def key_of(self, away):
        """Give the keys of the users so many places after the owners."""
        return self.users[(self.owner + away) % len(self.users)]

    def mark(self, latents, bits):
        """Put keys into latents."""
        return fingerprint.inject(self.point.space, latents, bits, **self.point.mark)

    def copy(self, away):
        """Make the pictures as other users' copies of the model make them."""
        return self.make(self.mark(self.latents, self.key_of(away)))


# An attack gives the pictures, those that were attacked, and places after the owner: of the users
# to whom the pictures belong, and of the target, if there is one.


def _none(scene):
    return scene.made, scene.made, [0], None


def _reinvert(scene):
    return scene.make(scene.found.latents), scene.made, [0], None


def _remove(scene, how):
    latents = adversary.remove(
        scene.fold(seeds.ATTACK),
        scene.point.space,
        scene.found.latents,
        how=how,
        **scene.point.mark,
    )
    return scene.make(latents), scene.made, [0], None


def _transplant(scene):
    latents = scene.mark(jnp.asarray(scene.found.latents), scene.key_of(1))
    return scene.make(latents), scene.made, [0], 1


def _plant(scene, where, count):
    """Forge the owners' keys on plain pictures, each from `count` others of the owner."""
    show = np.asarray if where else scene.make
    fresh = basis.sample(scene.fold(seeds.FORGERS), scene.point.generator, 2 * int(count))
    theirs, plain, targets = fresh[: int(count)], show(fresh[int(count) :]), show(scene.latents)
    forged = np.empty_like(targets)
    for user in np.unique(scene.owner):
        marked, rows = show(scene.mark(theirs, scene.users[user])), scene.owner == user
        forged[rows] = adversary.plant(targets[rows], marked, plain)
    seen = scene.make(forged) if where else images.png_round_trip(forged)
    return seen, scene.plain, [], 0


def _collude(scene, how, count):
    if not 1 <= int(count) <= len(scene.users):
        raise UserError(f"{count} colluders need as many users; got {len(scene.users)}.")
    copies = np.stack([scene.copy(away) for away in range(int(count))])
    blended = adversary.collude(scene.fold(seeds.ATTACK), copies, how=how)
    return images.png_round_trip(blended), scene.made, range(int(count)), None


def _mislead(scene, budget):
    generator, space = scene.point.generator, scene.point.space
    path = zoo.estimator(generator.name, "none")
    if path is None:
        raise UserError(f"pgd needs a trained network; none ships for '{generator.name}'.")
    network = learner.load(path, generator, space, **scene.point.mark)
    changed = adversary.pgd(
        scene.fold(seeds.ATTACK),
        generator,
        space,
        scene.made,
        estimator=network,
        budget=float(budget),
    )
    return images.png_round_trip(changed), scene.made, [0], None


_FORMS = {
    "none": _none,
    "reinvert": _reinvert,
    "remove-(zero|random)": _remove,
    "transplant": _transplant,
    r"plant-(latents-)?([1-9]\d*)": _plant,
    rf"collude-({'|'.join(adversary.COLLUSIONS)})-(\d+)": _collude,
    r"pgd-(\d+(?:\.\d+)?)": _mislead,
}


def find(name):
    """Find an attack: a function of the scene.

    Raises:
        UserError: an unknown name.
    """
    for form, function in _FORMS.items():
        match = re.fullmatch(form, name)
        if match:
            return lambda scene: function(scene, *match.groups())
    raise UserError(did_you_mean(name, ATTACKS, "attack"))


def judge(scene, name, seen, before, belong, target):
    """Read the pictures of an attack; say whose keys they seem to carry."""
    found = scene.read(name, seen)
    llr = verdict.ratios(found.soft_bits)
    metrics = {}
    if seen is not before:
        metrics["psnr"] = mean(jax.vmap(perceptual.psnr)(seen, before), unit="dB")
    if belong:
        truth = scene.key_of(belong[0])
        metrics["bit_accuracy"] = rate(accuracy.bit_accuracy(found.bits, truth))
        metrics["word_accuracy"] = rate(accuracy.word_accuracy(found.bits, truth))
        metrics["right_user_first"] = _first(scene, llr, belong)
    if target is not None:
        truth = scene.key_of(target)
        metrics["target_bit_accuracy"] = rate(accuracy.bit_accuracy(found.bits, truth))
        metrics["target_first"] = _first(scene, llr, [target])
    return metrics


def _first(scene, llr, belong):
    """Give the share of pictures on which one of these users' keys fits better than every decoy."""
    keys = np.stack([scene.key_of(away) for away in belong])
    return rate(accuracy.first_among(llr, keys, scene.decoys)) | {"decoys": len(scene.decoys)}


def measure(options):
    """Measure every attack that no other process is at; give a row each."""
    config = command.load_config(options.config)
    for field in ("images", "users", "estimator", "decoys"):
        if getattr(options, field) is not None:
            config[field] = getattr(options, field)
    found = {each: find(each) for each in options.attacks}
    scene, rows = Scene(config, options.out, options.part), []
    settings = config.to_dict() | {"generator_sha256": scene.point.generator.sha256}
    for each, attack in found.items():
        try:
            metrics = judge(scene, each, *attack(scene))
        except Busy:
            print(f"{each}: another process is at it", flush=True)
            continue
        rows.append(row(settings | {"adversary": each}, metrics, changes=("adversary",)))
        print(line(rows[-1]), flush=True)
    return rows


def parse(argv):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="stylegan2", help="of configs/, e.g. stylegan2:tiny")
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS))
    for field, kind in (("images", int), ("users", int), ("decoys", int), ("estimator", str)):
        parser.add_argument(f"--{field}", type=kind, help="default: the config's")
    parser.add_argument("--out", default="runs/adversary", help="folder of results")
    parser.add_argument("--part", type=int, default=12, help="pictures read before any is kept")
    return parser.parse_args(argv)


def main(argv=None):
    """Measure what is missing, print a line an attack and write adversary.json."""
    options = parse(argv)
    logs.write_json(Path(options.out) / "adversary.json", measure(options))


if __name__ == "__main__":
    command.run(main)
