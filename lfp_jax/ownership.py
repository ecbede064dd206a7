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
import hashlib
import secrets
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np

from lfp_jax import (
    basis,
    court,
    design,
    enrolment,
    files,
    fingerprint,
    generators,
    images,
    keys,
    logs,
    sharding,
)  # fmt: skip
from lfp_jax.attribution import inversion, verdict
from lfp_jax.errors import UserError
from lfp_jax.generators import stylegan2
from lfp_jax.registry import Registry
from lfp_jax.weights import rosinality

_BATCH = 64  # images made at once
_AT_ONCE = 8  # images read at once, on each device but a CPU: there each answer comes when it can


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
        form = {"noise": config.noise, "settings": {"seed": seed.tolist(), **logs.versions()}}
        issued = ledger.issue(user, design=number, images=n, **form)
    folder = Path(target or Path(workdir) / "users" / _folder_name(user))
    draw, paths = jax.random.wrap_key_data(jnp.asarray(seed)), []
    with logs.Progress(n, label="generate") if progress else inversion.Silent() as line:
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

    Of several processes each reads its share of the files; process 0 judges, and gets the answers.

    Yields:
        A JSON-able dict a file: `verdict` (a user's name or "unknown"), the figures behind it, and
        what they rest on. Of a file that cannot be read only `file` and `error`.

    Raises:
        UserError: no users, more than the bits tell apart at the rate, or a generator, basis or
            noise other than those of the registry.
    """
    enrolment.check(config)
    with contextlib.ExitStack() as stack:
        point, rolls = court.open_keys(stack, config, workdir, registry, rate)
        reader, files = court.Reader(point, config), images.gather(paths)
        judge = None if rolls is None else court.Court(rolls, point, config, rate)
        at_once = 1 if jax.default_backend() == "cpu" else _AT_ONCE * jax.local_device_count()
        ratios, digests, all_at_once = [], [], at_once * jax.process_count()
        bar = logs.Progress(len(files), label="attribute") if progress else inversion.Silent()
        with bar as line:
            for start in range(0, len(files), all_at_once):
                own = start + at_once * jax.process_index()
                found = sharding.gather(list(reader.read(files[own : own + at_once])))
                for case in found:
                    if judge is None:
                        break
                    if "error" not in case:
                        ratios.append(case.pop("llr"))
                        digests.append(case["image_sha256"])
                        case = judge.say(ratios[-1], **case)
                    yield case
                line.update(min(start + all_at_once, len(files)))
        if judge is not None and pool and ratios:
            together = hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()
            figures = {"image_sha256": together, "pooled": len(ratios)}
            yield judge.say(verdict.pool(np.stack(ratios)), file=None, **figures)
    sharding.wait_for_all("attribute")


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
