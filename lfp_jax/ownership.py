"""Whose image is it: give users keys, make images under them, and tell whose a file is.

    issue      a user gets a key in a registry, for a design point: a generator, the directions that
               carry keys, the strength
    generate   images with that key in them, as PNG files
    attribute  image files -> the user whose key each carries, or nobody, with a p-value that holds
    export     a generator that makes nothing but one user's images

The design point is that of a config; its basis lies in the work folder, since users' keys rest on
it, and so does the registry unless another is named. Both are needed to attribute, and both are
secret: whoever has a basis can remove or forge marks.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import secrets
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np

import lfp_jax
from lfp_jax import (
    basis,
    design,
    enrolment,
    files,
    fingerprint,
    generators,
    images,
    keys,
    seeds,
)  # fmt: skip
from lfp_jax.attribution import inversion, verdict
from lfp_jax.errors import UserError
from lfp_jax.generators import stylegan2
from lfp_jax.logs import Progress
from lfp_jax.registry import Registry
from lfp_jax.weights import rosinality

_BATCH = 64  # images made at once
_AT_ONCE = 8  # images read at once, on each device but a CPU: there each answer comes when it can
_LEAST_SIDE = 8  # pixels; what is smaller tells nothing


@dataclasses.dataclass(frozen=True)
class _Case:
    """An image file to be judged."""

    path: str
    sha256: str
    size: tuple[int, int]  # width, height of the file
    pixels: np.ndarray  # uint8 [H, W, C], as the generator would make them


def issue(
    config: Any,
    workdir: str | Path,
    names: Iterable[str],
    *,
    registry: str | Path | None = None,
    rate: float = keys.FALSE_POSITIVE_RATE,
) -> int:
    """Give users their keys; all of them, or on any error none.

    The generator is loaded for the first ones only: with them the design point is entered.

    Args:
        config: the design point, see configs/stylegan2.py.
        workdir: folder of the basis, which is made if it is not there.
        names: of the users.
        registry: its file; made if it is not there. None: in the workdir.
        rate: the false-positive rate at which images will be attributed.

    Returns:
        How many keys were given.

    Raises:
        UserError: a name that is taken or bad, more users than the bits tell apart at the rate, or
            a setting out of bounds.
    """
    names = list(names)
    enrolment.check(config)
    keys.check_capacity(bits=config.bits, users=len(names), rate=rate, code=config.code)
    place = enrolment.place(workdir, registry)
    # A first basis is made before there is a registry, whose presence protects it.
    point = None if place.exists() else enrolment.prepare(config, workdir, refit=True)
    with Registry(place, create=True) as ledger:
        number = enrolment.find(ledger, config, workdir) if point is None else None
        if number is None:
            point = point or enrolment.prepare(config, workdir, refit=True)
            number = ledger.add_design(enrolment.describe(point, config, workdir))
        book = enrolment.codebook(config, workdir)
        encode = None if book is None else book.encode
        return ledger.register(names, design=number, rate=rate, encode=encode)


def has_key(
    config: Any, workdir: str | Path, user: str, *, registry: str | Path | None = None
) -> bool:
    """Tell whether a user has a key of this design point, without loading the generator."""
    place = enrolment.place(workdir, registry)
    if not place.exists():
        return False
    with Registry(place) as ledger:
        number = enrolment.find(ledger, config, workdir)
        try:
            return number is not None and ledger.key(user, design=number) is not None
        except UserError:
            return False


def generate(
    config: Any,
    workdir: str | Path,
    user: str,
    n: int,
    *,
    registry: str | Path | None = None,
    target: str | Path | None = None,
    progress: bool = True,
) -> list[str]:
    """Make images with a user's key, as PNG files without metadata.

    No two images are alike, whichever process makes them: each issue draws its latents from a seed
    of its own, which the registry keeps.

    Args:
        config, workdir, registry: as of `issue`.
        user: a name.
        n: how many images.
        target: folder of the files, named by issue and number. None: users/USER in the workdir.
        progress: show a progress line.

    Returns:
        The paths.

    Raises:
        UserError: an unknown user, one whose key was revoked, or a generator, basis or noise other
            than those of the registry.
        OSError: a file cannot be written.
    """
    enrolment.check(config)
    with Registry(enrolment.place(workdir, registry)) as ledger:
        number, point, key = enrolment.open_for(user, ledger, config, workdir)
        seed = np.frombuffer(secrets.token_bytes(8), np.uint32)
        form = {"noise": config.noise, "settings": {"seed": seed.tolist(), **versions()}}
        issued = ledger.issue(user, design=number, images=n, **form)
    folder = Path(target or Path(workdir) / "users" / _folder_name(user))
    draw, paths = jax.random.wrap_key_data(jnp.asarray(seed)), []
    with Progress(n, label="generate") if progress else inversion.Silent() as line:
        for i in range(issued.start, issued.start + n, _BATCH):
            count = min(_BATCH, issued.start + n - i)
            latents = basis.sample(draw, point.generator, count, start=i)
            marked = fingerprint.inject(point.space, latents, key.bits, **point.mark)
            u8 = images.to_uint8(_decode(draw, point.generator, marked, config.noise, i))
            paths += images.write_pngs(folder, u8, prefix=f"{issued.id:04d}-", start=i)
            line.update(len(paths))
    return paths


def attribute(
    config: Any,
    workdir: str | Path,
    paths: Iterable[str | Path],
    *,
    registry: str | Path | None = None,
    rate: float = keys.FALSE_POSITIVE_RATE,
    pool: bool = False,
    progress: bool = True,
) -> Iterator[dict[str, Any]]:
    """Tell of image files whose they are, each as soon as it is known.

    Keys with a payload say a number, so that no registry is needed; where there is one, it tells
    whose the number is, and revoked ones are nobody's.

    Args:
        config, workdir, registry: as of `issue`.
        paths: files, folders and patterns (`images.gather`).
        rate: the chance that anybody is named for a file that no user's key made.
        pool: at last also tell of all files together, as pictures of one unknown user.
        progress: show a progress line.

    Yields:
        A JSON-able dict a file: `verdict` (a user's name or "unknown"), the figures behind it, and
        what they rest on. Of a file that cannot be read only `file` and `error`.

    Raises:
        UserError: no users, more than the bits tell apart at the rate, or a generator, basis or
            noise other than those of the registry.
    """
    enrolment.check(config)
    with contextlib.ExitStack() as stack:
        place = enrolment.place(workdir, registry)
        if registry is None and config.get("payload") is not None and not place.exists():
            point = enrolment.prepare(config, workdir, refit=False)
            rolls: _Numbers | _Users = _Numbers(design.codebook(point.space, config), rate)
        else:
            ledger = stack.enter_context(Registry(place))
            number, point = enrolment.open_design(ledger, config, workdir)
            rolls = _Users(ledger, number, config, rate)
        court = _Court(rolls, point, config, rate)
        files, ratios, digests = images.gather(paths), [], []
        at_once = 1 if jax.default_backend() == "cpu" else _AT_ONCE * jax.device_count()
        with Progress(len(files), label="attribute") if progress else inversion.Silent() as line:
            for start in range(0, len(files), at_once):
                cases = []
                for path, problem in files[start : start + at_once]:
                    try:
                        cases.append(_read(path, problem, point.generator.image_shape))
                    except UserError as error:
                        yield {"file": path, "error": str(error)}
                for case, llr, figures in court.estimate(cases):
                    ratios.append(llr)
                    digests.append(case.sha256)
                    yield court.say(llr, case.sha256, file=case.path, **figures)
                line.update(min(start + at_once, len(files)))
        if pool and ratios:
            together = hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()
            yield court.say(verdict.pool(np.stack(ratios)), together, file=None, pooled=len(ratios))


def export(
    config: Any,
    workdir: str | Path,
    user: str,
    target: str | Path,
    *,
    registry: str | Path | None = None,
) -> dict[str, str]:
    """Write a generator that makes a user's fingerprinted images, and no others.

    It holds the key: the holder needs nothing from here. A StyleGAN2 takes it into its weights and
    pays nothing at run time; a latent-diffusion model becomes a program from noise to images, with
    the injection between its sampler and its decoder (`fingerprint.program`).

    Args:
        config, workdir, registry: as of `issue`.
        user: a name.
        target: the folder to write.

    Returns:
        What was written: of a StyleGAN2 `store`, and `rosinality` unless that format cannot hold
        this network; else `program`.

    Raises:
        UserError: as of `generate`, or a model that samples on conditions.
        OSError: a file cannot be written.
    """
    enrolment.check(config)
    with Registry(enrolment.place(workdir, registry)) as ledger:
        number, point, key = enrolment.open_for(user, ledger, config, workdir)
        if isinstance(point.generator, stylegan2.StyleGAN2):
            folded = fingerprint.fold(point.space, point.generator, key.bits, **point.mark)
            folded = folded.replace(sha256=design.digest(folded))
            sha256, licence = folded.sha256, f"as that of '{config.generator}'"
            write = partial(_write_folded, Path(target), folded, licence)
        else:
            data = fingerprint.program(point.space, point.generator, key.bits, **point.mark)
            sha256, write = hashlib.sha256(data).hexdigest(), partial(_write_program, target, data)
        # Entered before it is written: nobody holds a generator that the registry does not know.
        form = {"noise": config.noise, "settings": {"sha256": sha256}}
        ledger.issue(user, design=number, images=0, kind="generator", **form)
    return write()


def _write_folded(target, folded, licence):
    written = {"store": str(target / "generator")}
    generators.save(written["store"], folded, source_format="lfp_jax", licence=licence)
    if rosinality.can_hold(folded.arch):
        written["rosinality"] = str(target / "generator.pt")
        generators.save_rosinality(written["rosinality"], folded)
    return written


def _write_program(target, data):
    written = {"program": str(Path(target) / "generator.jax")}
    files.write(written["program"], data)
    return written


class _Users:
    """The keys of a registry."""

    def __init__(self, ledger, number, config, rate):
        packed = ledger.packed_keys(design=number)
        if not len(packed.ids):
            raise UserError("No user has a key of this design point: --mode=issue --user=NAME.")
        form = {"bits": config.bits, "code": config.code}
        keys.check_capacity(users=len(packed.ids), rate=rate, **form)
        self._ledger, self._number, self._ids = ledger, number, packed.ids
        users, decoys = verdict.index(packed.packed, bits=config.bits), verdict.draw_decoys(**form)
        options = {"rate": rate, "code": config.code, "decoys": decoys}
        self.judge = partial(verdict.judge, users=users, **options)

    def __len__(self):
        return len(self._ids)

    def name(self, row):
        """Give the user whose key stands in a row."""
        return self._ledger.key_by_id(int(self._ids[row])).user

    def record(self, row, **entry):
        """Enter a verdict in the registry."""
        named = None if row is None else int(self._ids[row])
        self._ledger.record_verdict(design=self._number, key_id=named, **entry)


class _Numbers:
    """The keys of all numbers, without a registry."""

    def __init__(self, book, rate):
        self._book, self.judge = book, partial(book.read, rate=rate)

    def __len__(self):
        return 2**self._book.payload

    def name(self, row):
        """Name a number."""
        return f"number {row}"

    def record(self, row, **entry):
        """Keep nothing: there is no registry."""


class _Court:
    """What is the same for all files: the estimator, and the keys to compare."""

    def __init__(self, rolls, point, config, rate):
        self._rolls = rolls
        bound, _ = design.estimator(seeds.key(config.seed, seeds.BANK), point, config)
        options = {"space": point.space, **point.mark, "progress": False}
        generator = design.quiet(point.generator) if config.noise == "unknown" else point.generator
        key = seeds.key(config.seed, seeds.ESTIMATE)
        self._estimate = partial(bound, key, generator, **options)
        self._basis = {
            "estimator": config.estimator,
            "rate": rate,
            "users": len(rolls),
            "generator": {"name": point.generator.name, "sha256": point.generator.sha256},
            "basis_sha256": design.digest(point.space),
            "versions": versions(),
        }

    def estimate(self, cases):
        """Give of each case its log-likelihood ratios [k], and figures of the estimate."""
        if not cases:
            return
        start = time.monotonic()
        pixels = images.from_uint8(np.stack([case.pixels for case in cases]))
        solution = inversion.host(self._estimate(images=pixels))
        seconds = (time.monotonic() - start) / len(cases)
        ratios = verdict.ratios(solution.soft_bits)
        for i, case in enumerate(cases):
            height, width = case.pixels.shape[:2]
            figures = {
                "size": list(case.size),
                "resized_to": None if case.size == (width, height) else [width, height],
                "residual": round(float(solution.residual[i]), 5),
                "evaluations": int(solution.evaluations[i]),
                "seconds": round(seconds, 2),
            }
            yield case, ratios[i], figures

    def say(self, llr, digest, **figures):
        """Judge ratios [k], have the verdict recorded, and put it in words and figures."""
        found = self._rolls.judge(llr)
        numbers = {
            "p_value": found.p_value,
            "threshold": found.threshold,
            "agreeing": found.agreeing,
            "soft_score": found.soft_score,
        }
        self._rolls.record(found.user, image_sha256=digest, users=found.users, **numbers)
        user = None if found.user is None else self._rolls.name(found.user)
        answer = {"file": figures.pop("file"), "verdict": user or "unknown", "user": user}
        answer |= numbers | {"bits": found.bits, "runner_up": self._name(found.runner_up)}
        return answer | figures | {"image_sha256": digest} | self._basis

    def _name(self, match):
        if match is None:
            return None
        user = self._rolls.name(match.user)
        return {"user": user, "p_value": match.p_value, "agreeing": match.agreeing}


def versions() -> dict[str, str]:
    """Give the versions of what an answer rests on."""
    others = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    return {"lfp_jax": lfp_jax.__version__, **others}


def _read(path, problem, shape):
    if problem:
        raise UserError(problem)
    pixels, sha256 = images.read_hashed(path)
    height, width = pixels.shape[:2]
    if min(height, width) < _LEAST_SIDE:
        raise UserError(
            f"'{path}' has {width} x {height} pixels, too few to tell anything; at least "
            f"{_LEAST_SIDE} a side are needed."
        )
    return _Case(path, sha256, (width, height), images.fit(pixels, shape))


def _decode(key, generator, latents, noise, start):
    """Decode latents start, ... with the stored noise, or each with noise of its own."""
    if noise == "constant":
        return design.decode(generator, latents)
    design.quiet(generator)  # an error where there is no noise
    made, noise_key = [], jax.random.split(key)[1]
    for i, latent in enumerate(latents, start=start):
        drawn = stylegan2.draw_noise(jax.random.fold_in(noise_key, i), generator.arch, 1)
        made.append(design.decode_one(generator.replace(noise=tuple(drawn)), latent))
    return np.stack(made)


def _folder_name(user):
    """Give a name that every file system takes for a folder, another one for each user."""
    return quote(user, safe=" ").replace(".", "%2E")[:250]
