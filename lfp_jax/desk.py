"""The counter of `ownership`: its modes on the command line, answers in lines, and `doctor`.

Answers go to standard output, one line each and at once, so that a run that is cut short leaves
whole ones; what could not be done goes to standard error, with its cause and a remedy.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from lfp_jax import design, generators, images, keys, logs, ownership, sharding
from lfp_jax.errors import UserError

_HEADER = f"{'verdict':<20} {'p-value':>9} {'threshold':>9} {'bits':>8} {'residual':>8}  file"


def run(mode, config, workdir, **flags):
    """Do what one of `options.OWNERSHIP` asks.

    Args:
        mode: "issue", "generate", "attribute" or "doctor".
        config: the design point, see configs/stylegan2.py.
        workdir: folder of the basis, and of the registry unless another is given.
        **flags: `paths` of attribute, and the flags of the command line that belong to a mode.

    Returns:
        The exit status: 0, or 1 where something could not be done.

    Raises:
        UserError: a flag that is missing, and whatever `ownership` refuses.
    """
    return _MODES[mode](config, Path(workdir), **flags)


def _issue(config, workdir, *, user, count, registry, rate, export, **_):
    names = [_needed(user, "issue", "user=NAME")]
    if count:
        if export:
            raise UserError("--export is for one user, not with --count.")
        names = [f"{user}-{i:0{len(str(count))}d}" for i in range(1, count + 1)]
    rate = _rate(rate)
    if not (export and ownership.has_key(config, workdir, user, registry=registry)):
        start = time.monotonic()
        ownership.issue(config, workdir, names, registry=registry, rate=rate)
        told = f"'{user}'" if count is None else f"{count:,} users, '{names[0]}' to '{names[-1]}'"
        print(f"Issued: a key to {told}, in {time.monotonic() - start:.2f} s.", flush=True)
    if export:
        written = ownership.export(config, workdir, user, export, registry=registry)
        print(f"Generator of '{user}': {', '.join(written.values())}")
        if "store" in written and "rosinality" not in written:
            print("No rosinality .pt: that format cannot hold this network.", file=sys.stderr)
    return 0


def _generate(config, workdir, *, user, n, registry, target, **_):
    user, n = _needed(user, "generate", "user=NAME"), _needed(n, "generate", "n=COUNT")
    made = ownership.generate(config, workdir, user, n, registry=registry, target=target)
    print(f"Images of '{user}': {len(made)}, {made[0]}" + (f" to {made[-1]}" if n > 1 else ""))
    return 0


def _attribute(config, workdir, *, paths, registry, rate, pool, form, **_):
    if not paths:
        raise UserError("--mode=attribute needs files or folders: --mode=attribute PATH...")
    table, failed = form == "table", 0
    # On a terminal the answers themselves show how far it is.
    options: dict[str, Any] = {"progress": not (sys.stdout.isatty() and sys.stderr.isatty())}
    options |= {"registry": registry, "rate": _rate(rate), "pool": pool}
    if table and sharding.is_first():
        print(_HEADER, flush=True)
    for answer in ownership.attribute(config, workdir, paths, **options):
        if "error" in answer:
            failed += 1
            print(f"lfp_jax: {answer['error']}", file=sys.stderr, flush=True)
        else:
            print(row(answer) if table else logs.to_line(answer), flush=True)
    if failed:
        print(f"lfp_jax: {failed} of the files could not be judged: see above.", file=sys.stderr)
    return int(failed > 0)


def row(answer):
    """Lay an answer of `ownership.attribute` out as a line of a table."""
    agreeing = f"{answer['agreeing']}/{answer['bits']}"
    residual = f"{answer['residual']:.4f}" if "residual" in answer else ""
    name = answer["file"] or f"({answer['pooled']} files together)"
    return (
        f"{answer['verdict']:<20} {answer['p_value']:>9.1e} {answer['threshold']:>9.1e} "
        f"{agreeing:>8} {residual:>8}  {name}"
    )


def _doctor(config, workdir, **_):
    """Make an image, save it, attribute it and one without a key, and tell of each step."""
    place, user = workdir / "doctor", "doctor"
    registry = workdir / "doctor.sqlite"  # its key is not one of the users'
    devices = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    _say("machine", f"{os.cpu_count()} cores; JAX on {jax.device_count()} x {devices}")
    _say("versions", ", ".join(f"{name} {each}" for name, each in logs.versions().items()))
    clock = _Clock()
    generator = design.load_configured(config)
    _say("generator", f"{generators.describe(generator)}; loaded in {clock()}")
    if not ownership.has_key(config, workdir, user, registry=registry):
        ownership.issue(config, workdir, [user], registry=registry)
    _say("key", f"{config.bits} bits, strength {config.strength:g}; with the basis in {clock()}")
    [marked] = ownership.generate(
        config, workdir, user, 1, registry=registry, target=place, progress=False
    )
    _say("image", f"{marked}, {os.path.getsize(marked):,} bytes, made in {clock()}")
    latent = generator.sample(jax.random.key(time.time_ns() % 2**31), 1)
    u8 = images.to_uint8(design.decode(generator, latent))
    [plain] = images.write_pngs(place, u8, prefix="plain-")
    _say("plain image", f"{plain}, made in {clock()}")
    well = True
    for answer in ownership.attribute(
        config, workdir, [marked, plain], registry=registry, progress=False
    ):
        expected = user if answer["file"] == marked else "unknown"
        well &= answer["verdict"] == expected
        figures = f"p {answer['p_value']:.1e}, {answer['agreeing']} of {answer['bits']} bits agree"
        cost = f"{answer['evaluations']} evaluations, {answer['seconds']} s after set-up"
        _say("attributed", f"{answer['verdict']} (expected: {expected}); {figures}; {cost}")
    _say("verdict", "all is well" if well else "NOT as expected: see the lines above")
    return int(not well)


class _Clock:
    """Tells the seconds since it was last asked."""

    def __init__(self):
        self._then = time.monotonic()

    def __call__(self):
        then, self._then = self._then, time.monotonic()
        return f"{self._then - then:.1f} s"


def _say(what, text):
    print(f"{what:<12} {text}", flush=True)


def _needed(value, mode, flag):
    if value is None:
        raise UserError(f"--mode={mode} needs --{flag}.")
    return value


def _rate(rate):
    return keys.FALSE_POSITIVE_RATE if rate is None else rate


_MODES: dict[str, Callable[..., int]] = {
    "issue": _issue,
    "generate": _generate,
    "attribute": _attribute,
    "doctor": _doctor,
}
