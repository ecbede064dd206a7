"""What ties a config to a registry: its design point there, and nothing that is not the same.

A registry knows design points by the hashes of the generator and of the directions that carry keys;
a config says how to get them. Users' keys rest on the basis in the work folder, so once there
are users it is taken as it is, or the error says in what it differs.
"""

import dataclasses
from pathlib import Path

from lfp_jax import design, seeds
from lfp_jax.errors import UserError
from lfp_jax.registry import DesignPoint

_NOISES = ("constant", "unknown")  # a file does not say which noise it was made with


def check(config):
    """Check the settings of a design point whose images are to be attributed as files.

    Raises:
        UserError: one is out of bounds, or the synthesis noise is one that no file tells.
    """
    design.check(config)
    if config.noise not in _NOISES:
        raise UserError(
            f"noise must be one of {', '.join(_NOISES)} here; got '{config.noise}': no file says "
            "with which noise it was made."
        )


def place(workdir, registry):
    """Give the path of the registry: the one named, or that of the work folder."""
    return Path(registry or Path(workdir) / design.REGISTRY)


def prepare(config, workdir, *, refit):
    """Make the design point of a config ready, as `design.prepare`."""
    key = seeds.key(config.seed, seeds.BASIS)
    return design.prepare(key, config, workdir, refit=refit)


def describe(point, config, workdir):
    """Put a design point as a registry knows it."""
    return DesignPoint(
        generator=config.generator,
        generator_sha256=point.generator.sha256,
        basis_sha256=design.digest(point.space),
        bits=config.bits,
        shift=config.shift,
        strength=config.strength,
        code=config.code,
        location=design.basis_path(workdir),
    )


def find(ledger, config, workdir):
    """Find the number of a design point by the basis in the workdir, without the generator.

    None where it is not there, or only under another name of the generator.
    """
    made = design.stored_basis(config, workdir)
    if made is None:
        return None
    sha256, space = made
    names = ("generator", "bits", "shift", "strength", "code")
    wanted = {name: getattr(config, name) for name in names}
    wanted |= {"generator_sha256": sha256, "basis_sha256": design.digest(space)}
    for number, known in ledger.designs().items():
        if all(getattr(known, name) == value for name, value in wanted.items()):
            return number
    return None


def open_design(ledger, config, workdir):
    """Make a design point ready, and find it in a registry.

    Returns:
        Its number, and a `design.Design`.

    Raises:
        UserError: it is not there, and in what it differs from the nearest that is; or images were
            issued with another noise.
    """
    point = prepare(config, workdir, refit=False)
    wanted = dataclasses.asdict(describe(point, config, workdir))
    differences: list[list[str]] = []
    for number, known in ledger.designs().items():
        known = dataclasses.asdict(known)
        told = [name for name in wanted if name not in ("generator", "location")]
        differ = [name for name in told if known[name] != wanted[name]]
        if not differ:
            _check_noise(ledger, number, config)
            return number, point
        differences.append([f"{name} {known[name]}, not {wanted[name]}" for name in differ])
    if not differences:
        raise UserError("The registry has no users yet: --mode=issue --user=NAME.")
    nearest = min(differences, key=len)
    issued = ", ".join(nearest)
    raise UserError(f"Nobody has a key of this design point. Keys were issued for {issued}.")


def open_for(user, ledger, config, workdir):
    """Do the same and get a user's key; that there is one is told before anything is loaded."""
    likely = find(ledger, config, workdir)
    if likely is not None:
        ledger.key(user, design=likely)
    number, point = open_design(ledger, config, workdir)
    return number, point, ledger.key(user, design=number)


def _check_noise(ledger, number, config):
    used = ledger.noises(design=number)
    if used and used != {config.noise}:
        others = ", ".join(sorted(used - {config.noise}))
        raise UserError(f"Images were issued with noise '{others}', not '{config.noise}'.")


def codebook(config, workdir):
    """Give the Codebook of the basis in the workdir; None where keys carry no payload."""
    if config.get("payload") is None:
        return None
    made = design.stored_basis(config, workdir)
    if made is None:
        raise UserError(f"There is no basis of this design point in '{workdir}'.")
    return design.codebook(made[1], config)
