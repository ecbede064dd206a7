"""One design point, top to bottom: generator, basis, keys, images, estimate, measure, show."""

import dataclasses
import importlib.metadata
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lfp_jax import attacks, basis, design, fingerprint, generators, images, keys, logs
from lfp_jax.attribution import inversion, verdict
from lfp_jax.generators import stylegan2, zoo
from lfp_jax.metrics import accuracy, distances, features, perceptual
from lfp_jax.report import plots

_BATCH = 64
_COLUMNS = 8
_DRAWS = 100  # bootstrap draws of a distance

# Everything random in a run comes from one of these folds of the seed.
_FOLDS = range(11)
(
    _BASIS, _IMAGES, _KEYS, _BANK, _ESTIMATE, _QUALITY, _QUALITY_KEYS, _BOOTSTRAP, _ATTACK, _DECOYS,
    _NOISE,
) = _FOLDS  # fmt: skip


def run(config, workdir):
    """Run one design point and write metrics.json and pictures into `workdir`.

    Args:
        config: see configs/stylegan2.py.
        workdir: folder for results; a basis it holds is used again if it fits.

    Returns:
        The metrics, as written.

    Raises:
        UserError: a setting out of bounds, or weights that cannot be read.
    """
    workdir = Path(workdir)
    design.check(config)
    key = jax.random.key(config.seed)
    fold = [jax.random.fold_in(key, i) for i in _FOLDS]

    # --- generator and basis -----------------------------------------------------------------
    generator = design.load_configured(config)
    print(generators.describe(generator), flush=True)
    point = design.prepare(fold[_BASIS], config, workdir, generator=generator)
    space, mark = point.space, point.mark

    # --- users, keys, images through 8 bits ----------------------------------------------------
    # An experiment must be repeatable, so its keys come from the seed; real ones do not.
    users = _draw_bits(fold[_KEYS], config.users, config.bits)
    owner = np.arange(config.images) % config.users
    truth = users[owner]
    latents = basis.sample(fold[_IMAGES], generator, config.images)
    marked = fingerprint.inject(space, latents, truth, **mark)
    makers = _makers(fold[_NOISE], generator, config)
    plain = images.png_round_trip(_make(makers, generator, latents))
    made = images.png_round_trip(_make(makers, generator, marked))
    images.write_pngs(workdir / "images", images.to_uint8(made))
    issued = {"keys": [keys.to_hex(user) for user in users], "user_of_image": owner}
    logs.write_json(workdir / "keys.json", issued)

    # --- attack --------------------------------------------------------------------------------
    attack = attacks.find(config.attack)
    seen = attacks.apply(fold[_ATTACK], made, attack)
    if attack.steps:
        images.write_pngs(workdir / "attacked", images.to_uint8(seen))

    # --- estimate ------------------------------------------------------------------------------
    estimator, setup_seconds = design.estimator(fold[_BANK], point, config)
    start = time.monotonic()
    solution = _estimate(estimator, fold[_ESTIMATE], makers, point, seen, config)
    seconds = time.monotonic() - start

    # --- measure -------------------------------------------------------------------------------
    n = config.images
    ratios = verdict.ratios(solution.soft_bits)
    decoys = _draw_bits(fold[_DECOYS], config.decoys, config.bits)
    metrics = {
        "bit_accuracy": _rate(accuracy.bit_accuracy(solution.bits, truth), n),
        "word_accuracy": _rate(accuracy.word_accuracy(solution.bits, truth), n),
        "right_user_first": _rate(accuracy.first_among(ratios, truth, decoys), n)
        | {"decoys": config.decoys},
        "psnr": _mean(jax.vmap(perceptual.psnr)(made, plain), unit="dB"),
        "ssim": _mean(jax.vmap(perceptual.ssim)(made, plain)),
        "residual": _mean(solution.residual),
        "generator_evaluations": _mean(solution.evaluations),
        "seconds_per_image": {"value": seconds / n, "images": n, "setup_seconds": setup_seconds},
    }
    if config.fd_images:
        metrics |= _frechet(fold, point, config)
    bins = accuracy.reliability(solution.soft_bits, truth)
    metrics["reliability"] = [dataclasses.asdict(each) for each in bins]
    metrics |= {
        "settings": config.to_dict(),
        "versions": _versions(),
        "generator": {"name": generator.name, "sha256": generator.sha256},
    }

    # --- show ----------------------------------------------------------------------------------
    logs.write_json(workdir / "metrics.json", metrics)
    found = solution.latents.reshape(-1, *generator.latent_shape)
    rebuilt = design.decode(generator, jnp.asarray(found))
    sheet = _sheet(plain, made, *([seen] if attack.steps else []), rebuilt)
    images.write_png(workdir / "grid.png", images.enlarge(sheet, max(1, 96 // made.shape[1])))
    plots.reliability(workdir / "reliability.png", metrics["reliability"])
    print(table(metrics))
    print(f"Results: {workdir}/metrics.json, pictures: {workdir}/grid.png, {workdir}/images/")


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


def _estimate(estimator, key, makers, point, seen, config):
    """Estimate: of images whose noise is known each with its own, else without noise."""
    generator, space, mark = point.generator, point.space, point.mark
    if config.noise == "known":
        rows = zip(makers, seen, strict=True)
        found = [inversion.host(estimator(key, maker, space, x[None], **mark)) for maker, x in rows]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)
    if config.noise == "unknown":
        generator = design.quiet(generator)
    return inversion.host(estimator(key, generator, space, seen, **mark))


def _frechet(fold, point, config):
    """Fréchet distances of fresh plain and fingerprinted images to the reference pictures.

    The reference of the demos is the held-out pictures; that of another generator a second set of
    its own plain images, so that `fd_plain` is then the floor of the distance.
    """
    n, classifier = config.fd_images, features.load_classifier()
    generator = point.generator
    demo = generator.name in zoo.BUNDLED
    latents = basis.sample(fold[_QUALITY], generator, n)
    bits = _draw_bits(fold[_QUALITY_KEYS], n, config.bits)
    groups = [latents, fingerprint.inject(point.space, latents, bits, **point.mark)]
    groups += [] if demo else [basis.sample(fold[_QUALITY], generator, n, start=n)]
    rows = []
    with logs.Progress(len(groups) * n, label="distance") as progress:
        for group in groups:
            parts = []
            for start in range(0, n, _BATCH):
                made = images.to_uint8(design.decode(generator, group[start : start + _BATCH]))
                parts.append(features.features_in_batches(classifier, _fit(made), batch=_BATCH))
                progress.update(start + len(rows) * n)
            rows.append(np.concatenate(parts))
    reference = features.load_reference() if demo else distances.moments(rows[2])
    name = "held-out pictures" if demo else "other plain images"
    note = {"features": features.NAME, "reference": name, "images": n}
    out = {}
    for label, found in (("fd_plain", rows[0]), ("fd", rows[1])):
        distance = distances.frechet_interval(found, reference, key=fold[_BOOTSTRAP], draws=_DRAWS)
        value = {"value": distance.value, "low": distance.low, "high": distance.high}
        out[label] = value | note
    return out


def _draw_bits(key, n, bits):
    return np.asarray(jax.random.bernoulli(key, 0.5, (n, bits)), np.uint8)


def _fit(u8):
    """Bring images to the size and channels the demo's features take."""
    u8 = np.repeat(u8, 3, axis=-1) if u8.shape[-1] == 1 else u8
    size = (features.SIZE, features.SIZE)
    if u8.shape[1:3] == size:
        return u8
    resized = jax.image.resize(u8.astype(np.float32), (len(u8), *size, 3), "bilinear")
    return np.clip(np.round(resized), 0, 255).astype(np.uint8)


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


def _sheet(plain, made, *others):
    """Rows: plain, fingerprinted, difference times ten, attacked if it was, reconstruction."""
    difference = np.clip((made - plain) * 10.0, -1.0, 1.0)
    rows = [np.asarray(row)[:_COLUMNS] for row in (plain, made, difference, *others)]
    return images.grid(np.concatenate(rows), columns=len(rows[0]))


def _versions():
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
