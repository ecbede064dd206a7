"""The court: reads the ratios of bits from image files, and judges whose they are.

Two sides that know little of each other: a Reader has the generator and sees no key, a Court has
the keys and sees no image. Of several processes all read, each its share of the files, and only
process 0 judges and holds the registry.
"""

import dataclasses
import time
from functools import partial

import numpy as np

from lfp_jax import design, enrolment, images, keys, logs, seeds, sharding
from lfp_jax.attribution import inversion, verdict
from lfp_jax.errors import UserError
from lfp_jax.registry import Registry

_LEAST_SIDE = 8  # pixels; what is smaller tells nothing


@dataclasses.dataclass(frozen=True)
class _Case:
    """An image file to be judged."""

    path: str
    sha256: str
    size: tuple[int, int]  # width, height of the file
    pixels: np.ndarray  # uint8 [H, W, C], as the generator would make them


def open_keys(stack, config, workdir, registry, rate):
    """Give the design point, and the keys to compare: only process 0 judges, others have None."""
    if not sharding.is_first():
        return enrolment.prepare(config, workdir, refit=False), None
    place = enrolment.place(workdir, registry)
    if registry is None and config.get("payload") is not None and not place.exists():
        point = enrolment.prepare(config, workdir, refit=False)
        return point, _Numbers(design.codebook(point.space, config), rate)
    ledger = stack.enter_context(Registry(place))
    number, point = enrolment.open_design(ledger, config, workdir)
    return point, _Users(ledger, number, config, rate)


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


class Reader:
    """What reads the log-likelihood ratios of bits from image files."""

    def __init__(self, point, config):
        bound, _ = design.estimator(seeds.key(config.seed, seeds.BANK), point, config)
        options = {"space": point.space, **point.mark, "progress": False}
        generator = design.quiet(point.generator) if config.noise == "unknown" else point.generator
        key = seeds.key(config.seed, seeds.ESTIMATE)
        self._estimate = partial(bound, key, generator, **options)
        self._shape = point.generator.image_shape

    def read(self, listed):
        """Give of each file what `Court.say` takes, as JSON values; or its error.

        Args:
            listed: of `images.gather`.
        """
        cases = []
        for path, problem in listed:
            try:
                cases.append(_read(path, problem, self._shape))
            except UserError as error:
                yield {"file": path, "error": str(error)}
        if not cases:
            return
        start = time.monotonic()
        pixels = images.from_uint8(np.stack([case.pixels for case in cases]))
        solution = inversion.host(self._estimate(images=pixels))
        seconds = (time.monotonic() - start) / len(cases)
        ratios = verdict.ratios(solution.soft_bits)
        for i, case in enumerate(cases):
            height, width = case.pixels.shape[:2]
            yield {
                "file": case.path,
                "image_sha256": case.sha256,
                "llr": ratios[i].tolist(),
                "size": list(case.size),
                "resized_to": None if case.size == (width, height) else [width, height],
                "residual": round(float(solution.residual[i]), 5),
                "evaluations": int(solution.evaluations[i]),
                "seconds": round(seconds, 2),
            }


class Court:
    """What is the same for all verdicts: the keys to compare, and what they rest on."""

    def __init__(self, rolls, point, config, rate):
        self._rolls = rolls
        self._basis = {
            "estimator": config.estimator,
            "rate": rate,
            "users": len(rolls),
            "generator": {"name": point.generator.name, "sha256": point.generator.sha256},
            "basis_sha256": design.digest(point.space),
            "versions": logs.versions(),
        }

    def say(self, llr, *, file, image_sha256, **figures):
        """Judge ratios [k], have the verdict recorded, and put it in words and figures."""
        found = self._rolls.judge(llr)
        numbers = {
            "p_value": found.p_value,
            "threshold": found.threshold,
            "agreeing": found.agreeing,
            "soft_score": found.soft_score,
        }
        self._rolls.record(found.user, image_sha256=image_sha256, users=found.users, **numbers)
        user = None if found.user is None else self._rolls.name(found.user)
        answer = {"file": file, "verdict": user or "unknown", "user": user}
        answer |= numbers | {"bits": found.bits, "runner_up": self._name(found.runner_up)}
        return answer | figures | {"image_sha256": image_sha256} | self._basis

    def _name(self, match):
        if match is None:
            return None
        user = self._rolls.name(match.user)
        return {"user": user, "p_value": match.p_value, "agreeing": match.agreeing}


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
