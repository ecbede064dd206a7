"""Design points, top to bottom: generator, basis, keys, images, attack, estimate, measure, show."""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lfp_jax import (
    attacks,
    basis,
    design,
    fingerprint,
    generators,
    images,
    keys,
    logs,
    quality,
    seeds,
    sharding,
)  # fmt: skip
from lfp_jax.attribution import bank, inversion, verdict
from lfp_jax.generators import stylegan2
from lfp_jax.metrics import accuracy, perceptual
from lfp_jax.report import plots

_COLUMNS = 8

# Settings of what happens to fingerprinted images later; all others are of the images themselves.
_LATER = {"attack", "estimator", "network", "loss", "lm", "adam", "decoys"}


def run(config, workdir):
    """Run one design point and write metrics.json and pictures into `workdir`.

    Of several processes each estimates its share of the images, and process 0 writes and speaks.

    Args:
        config: see configs/stylegan2.py.
        workdir: folder for results; a basis it holds is used again if it fits.

    Raises:
        UserError: a setting out of bounds, or weights that cannot be read.
    """
    workdir = Path(workdir)
    design.check(config)
    bench, first = Bench(together=True), sharding.is_first()
    if first:
        print(generators.describe(bench.generator(config)), flush=True)
    marked = bench.marked(config, workdir)
    if first:
        _write_marked(workdir, marked)
    result = bench.measure(config, workdir)
    if first:
        _write_result(workdir, config, bench.generator(config), result)
    sharding.wait_for_all("experiment")


def _write_marked(workdir, marked):
    images.write_pngs(workdir / "images", images.to_uint8(marked.images))
    issued = {"keys": [keys.to_hex(user) for user in marked.users], "user_of_image": marked.owner}
    logs.write_json(workdir / "keys.json", issued)


def _write_result(workdir, config, generator, result):
    if attacks.find(config.attack).steps:
        images.write_pngs(workdir / "attacked", images.to_uint8(result.seen))
    about = {"settings": config.to_dict()} | about_run(generator)
    record = result.metrics | {"reliability": result.reliability} | about
    logs.write_json(workdir / "metrics.json", record)
    images.write_png(workdir / "grid.png", sheet(result.rows))
    plots.reliability(workdir / "reliability.png", result.reliability)
    print(table(result.metrics))
    print(f"Results: {workdir}/metrics.json, pictures: {workdir}/grid.png, {workdir}/images/")


@dataclasses.dataclass(frozen=True)
class Marked:
    """The fingerprinted images of a design point."""

    users: np.ndarray  # [users, k], their keys
    owner: np.ndarray  # [n], the user of each image
    plain: np.ndarray  # [n, H, W, C] in [-1, 1], 8 bits; of the same latents without a key
    images: np.ndarray  # [n, H, W, C] in [-1, 1], 8 bits
    makers: list | None  # the generator of each, where they differ


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What an estimator read from images."""

    solution: inversion.Solution  # on the host
    seconds: float  # for all images
    setup_seconds: float


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured at a design point under one attack."""

    metrics: dict[str, dict[str, Any]]  # {quantity: {"value", "low", "high", "images", ...}}
    reliability: list[dict[str, Any]]  # fields of `accuracy.Bin`
    seen: np.ndarray  # [n, H, W, C], what the estimator was given
    rows: dict[str, np.ndarray]  # {what is shown: the first few images [8, H, W, C]}


class Bench:
    """Measures one design point after another, and keeps what the next may share.

    The latest part of each kind is kept: points that need the same should follow one another.
    """

    def __init__(self, *, together=False):
        """Keep nothing yet.

        Args:
            together: several processes measure the same points and share the images out; else each
                goes its own way.
        """
        self._kept, self._together = {}, together

    def _keep(self, kind, settings, make):
        """Give the part of a kind, anew where the one kept was made with other settings."""
        if kind not in self._kept or self._kept[kind][0] != settings:
            self._kept.pop(kind, None)  # its memory is free before the next one needs it
            self._kept[kind] = settings, make()
        return self._kept[kind][1]

    def generator(self, config):
        """Give the generator of a config."""
        make = partial(design.load_configured, config)
        return self._keep("generator", design.generator_settings(config), make)

    def prepare(self, config, workdir):
        """Give the Design of a config, whose basis is in `workdir`, or will be."""
        key, generator = seeds.key(config.seed, seeds.BASIS), self.generator(config)
        make = partial(design.prepare, key, config, workdir, generator=generator)
        make = partial(sharding.first_alone, make) if self._together else make
        return self._keep("design", point_settings(config) | {"workdir": str(workdir)}, make)

    def marked(self, config, workdir):
        """Give the fingerprinted images of a config, from files of 8 bits, and their keys."""
        point = self.prepare(config, workdir)
        return self._keep("marked", point_settings(config), partial(self._mark, config, point))

    def _mark(self, config, point):
        # An experiment must be repeatable, so its keys come from the seed; real ones do not.
        users = _draw_bits(seeds.key(config.seed, seeds.KEYS), config.users, config.bits)
        book = design.codebook(point.space, config)
        if book is not None:  # the leading bits say a number
            users = book.encode([int("".join(map(str, row[: book.payload])), 2) for row in users])
        owner = np.arange(config.images) % config.users
        names = ("seed", "images", "noise")
        settings = design.generator_settings(config) | {name: config[name] for name in names}
        latents, makers, plain = self._keep("plain", settings, partial(_plain, config, point))
        with_key = fingerprint.inject(point.space, latents, users[owner], **point.mark)
        made = images.png_round_trip(_make(makers, point.generator, with_key))
        return Marked(users, owner, plain, made, makers)

    def attacked(self, config, workdir):
        """Give the attacked images of a config, [n, H, W, C] in [-1, 1].

        Args:
            config: see configs/stylegan2.py.
            workdir: folder of the basis.

        Raises:
            UserError: as of `run`.
        """
        attack = attacks.find(config.attack)
        made = self.marked(config, workdir).images
        return attacks.apply(seeds.key(config.seed, seeds.ATTACK), made, attack)

    def estimate(self, config, workdir, seen, *, rows=None, makers=None):
        """Estimate keys, from pixels alone.

        Args:
            config: see configs/stylegan2.py.
            workdir: folder of the basis.
            seen: images [n, H, W, C] in [-1, 1], of 8 bits.
            rows: indices of those to estimate; None: all.
            makers: the generator of each, where they differ and it is known.

        Returns:
            An Estimate.

        Raises:
            UserError: as of `run`.
        """
        point, make_bank = self.prepare(config, workdir), partial(self._bank, config=config)
        key = seeds.key(config.seed, seeds.BANK)
        estimator, setup_seconds = design.estimator(key, point, config, make_bank=make_bank)
        start, key = time.monotonic(), seeds.key(config.seed, seeds.ESTIMATE)
        rows = np.arange(len(seen)) if rows is None else rows
        read = partial(_estimate, estimator, key, makers, point, seen, config)
        solution = self._spread(lambda own: read(rows[own]), len(rows))
        return Estimate(solution, time.monotonic() - start, setup_seconds)

    def measure(self, config, workdir):
        """Attack, estimate and measure.

        Args:
            config: see configs/stylegan2.py.
            workdir: folder of the basis.

        Returns:
            A Result.

        Raises:
            UserError: as of `run`.
        """
        seen, makers = self.attacked(config, workdir), self.marked(config, workdir).makers
        estimate = self.estimate(config, workdir, seen, makers=makers)
        return self.assess(config, workdir, seen, estimate)

    def assess(self, config, workdir, seen, estimate):
        """Measure what was read from the attacked images of a config.

        Args:
            config, workdir: as of `measure`.
            seen: of `attacked`.
            estimate: an Estimate of all of them.

        Returns:
            A Result.
        """
        point, marked = self.prepare(config, workdir), self.marked(config, workdir)
        solution = estimate.solution
        n, truth = config.images, marked.users[marked.owner]
        plain, made = marked.plain, marked.images

        # --- measure ---------------------------------------------------------------------------
        ratios = verdict.ratios(solution.soft_bits)
        decoys = _draw_bits(seeds.key(config.seed, seeds.DECOYS), config.decoys, config.bits)
        metrics = {
            "bit_accuracy": _rate(accuracy.bit_accuracy(solution.bits, truth), n),
            "word_accuracy": _rate(accuracy.word_accuracy(solution.bits, truth), n),
            "right_user_first": _rate(accuracy.first_among(ratios, truth, decoys), n)
            | {"decoys": config.decoys},
            "psnr": _mean(jax.vmap(perceptual.psnr)(made, plain), unit="dB"),
            "ssim": _mean(jax.vmap(perceptual.ssim)(made, plain)),
            "residual": _mean(solution.residual),
            "generator_evaluations": _mean(solution.evaluations),
            "seconds_per_image": {
                "value": estimate.seconds / n, "images": n,
                "setup_seconds": estimate.setup_seconds,
            },
        }  # fmt: skip
        book = design.codebook(point.space, config)
        if book is not None:
            mended = np.stack([book.mend(llr) for llr in ratios])
            metrics["payload_accuracy"] = _rate(accuracy.word_accuracy(mended, truth), n)
        if config.fd_images:
            make = partial(self._distances, config, point)
            metrics |= self._keep("distances", point_settings(config), make)
        bins = accuracy.reliability(solution.soft_bits, truth)

        # --- show ------------------------------------------------------------------------------
        found = solution.latents[:_COLUMNS].reshape(-1, *point.generator.latent_shape)
        rows = {"plain": plain, "fingerprinted": made, "difference x 10": (made - plain) * 10.0}
        rows |= {"attacked": seen} if attacks.find(config.attack).steps else {}
        rows |= {"reconstructed": design.decode(point.generator, jnp.asarray(found))}
        rows = {name: np.clip(row[:_COLUMNS], -1.0, 1.0) for name, row in rows.items()}
        return Result(metrics, [dataclasses.asdict(each) for each in bins], seen, rows)

    def _spread(self, function, n):
        """Call a function of the indices of rows for all n, its results on the host."""
        return sharding.spread(function, n) if self._together else function(np.arange(n))

    def _bank(self, key, generator, *, config, size, metric):
        # The metric follows from these settings too, whatever the directions are.
        names = ("seed", "metric_samples")
        settings = design.generator_settings(config) | {name: config[name] for name in names}
        make = partial(bank.make_bank, key, generator, size=size, metric=metric)
        return self._keep("bank", settings | {"size": size}, make)

    def _distances(self, config, point):
        n, generator = config.fd_images, point.generator
        settings = design.generator_settings(config) | {"seed": config.seed, "images": n}
        make = partial(quality.reference, generator, n, seed=config.seed, spread=self._spread)
        reference = self._keep("reference", settings, make)
        bits = _draw_bits(seeds.key(config.seed, seeds.QUALITY_KEYS), n, config.bits)
        marked = fingerprint.inject(point.space, reference.latents, bits, **point.mark)
        form = {"seed": config.seed, "spread": self._spread}
        return {
            "fd_plain": reference.plain,
            "fd": quality.distance(generator, marked, reference, **form),
        }


def point_settings(config):
    """Give the settings that fingerprinted images follow from: those of a design point."""
    return {name: value for name, value in config.to_dict().items() if name not in _LATER}


def about_run(generator):
    """Say what figures rest on besides the settings: versions, and the generator."""
    about = {"name": generator.name, "sha256": generator.sha256}
    return {"versions": logs.versions(), "generator": about}


def sheet(rows):
    """Lay rows of images out as one picture, uint8 [height, width, 3]."""
    pictures = np.concatenate(list(rows.values()))
    columns = len(pictures) // len(rows)
    return images.enlarge(images.grid(pictures, columns=columns), max(1, 96 // pictures.shape[1]))


def table(metrics):
    """Lay the measured quantities out as lines of text."""
    lines = [f"{'quantity':<24}{'value':>10}  {'95 % interval':<20}{'images':>7}  note"]
    for name, entry in metrics.items():
        if not isinstance(entry, dict) or "value" not in entry:
            continue
        interval = f"{entry['low']:.4g} - {entry['high']:.4g}" if "low" in entry else ""
        notes = [entry.get("unit"), entry.get("features"), entry.get("reference")]
        note = ", ".join(filter(None, notes))
        value = f"{entry['value']:>10.4g}"
        lines.append(f"{name:<24}{value}  {interval:<20}{entry['images']:>7}  {note}".rstrip())
    return "\n".join(lines)


def _plain(config, point):
    """Draw latents, the generator of each (None: all have one), and make plain images of them."""
    generator = point.generator
    latents = basis.sample(seeds.key(config.seed, seeds.IMAGES), generator, config.images)
    makers = _makers(seeds.key(config.seed, seeds.NOISE), generator, config)
    return latents, makers, images.png_round_trip(_make(makers, generator, latents))


def _makers(key, generator, config):
    """Give the generator of each image, apart in their synthesis noise; None: all have one."""
    if config.noise == "constant":
        return None
    design.quiet(generator)  # an error where there is no noise
    keys = [jax.random.fold_in(key, i) for i in range(config.images)]
    draw = partial(stylegan2.draw_noise, arch=generator.arch, n=1)
    return [generator.replace(noise=tuple(draw(key))) for key in keys]


def _make(makers, generator, latents):
    if makers is None:
        return design.decode(generator, latents)
    return np.stack([design.decode_one(*each) for each in zip(makers, latents, strict=True)])


def _estimate(estimator, key, makers, point, seen, config, rows):
    """Estimate of some images: where their noise is known each with its own, else without noise."""
    generator, space, mark = point.generator, point.space, point.mark
    if config.noise == "known":
        read = partial(estimator, key, space=space, **mark)
        found = [inversion.host(read(makers[i], images=seen[i : i + 1], first=i)) for i in rows]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)
    if config.noise == "unknown":
        generator = design.quiet(generator)
    return inversion.host(estimator(key, generator, space, seen[rows], first=rows[0], **mark))


def _draw_bits(key, n, bits):
    return np.asarray(jax.random.bernoulli(key, 0.5, (n, bits)), np.uint8)


def _rate(rate, n):
    return {"value": rate.value, "low": rate.low, "high": rate.high, "images": n}


def _mean(values, **more):
    values = np.asarray(values, np.float64)
    spread = 1.96 * values.std() / len(values) ** 0.5
    mean = float(values.mean())
    return {
        "value": mean,
        "low": mean - spread,
        "high": mean + spread,
        "images": len(values),
    } | more
