"""What an estimator says of sets of images, kept part by part: work that is stopped and shared.

    OUT/parts/NAME-00025.npz    soft bits, evaluations, residual of images 25, ... of the set NAME

Any number of processes may be given the same folder; each takes up parts that no other is at.
"""

from pathlib import Path

import numpy as np

from lfp_jax import files
from lfp_jax.attribution.inversion import Solution
from lfp_jax.cells import Folder

_FIELDS = ("soft_bits", "latents", "residual", "evaluations")


def estimate(out, sets, *, size):
    """Estimate what is missing and nobody else is at.

    Args:
        out: the folder.
        sets: {name: (count, make)}; make() gives a function (start, stop) -> (Solution, {more
            arrays [n, ...]}) of its images, and is called only where some are missing.
        size: images in a part, of which all are lost when the process is stopped amid it.

    Returns:
        Whether all is there; else another process is at the rest.
    """
    folder, parts, complete = Folder(out), Path(out) / "parts", True
    parts.mkdir(parents=True, exist_ok=True)
    for name, (count, make) in sets.items():
        read = None
        for start in range(0, count, size):
            part = f"{name}-{start:05}"
            path = parts / f"{part}.npz"
            if path.exists():
                continue
            claim = folder.claim(part)
            if claim is None:
                complete = False
                continue
            with claim:
                if not path.exists():  # by now
                    print(part, flush=True)
                    read = read or make()
                    _keep(path, *read(start, min(start + size, count)))
    return complete


def _keep(path, solution, more):
    arrays = {name: np.asarray(getattr(solution, name)) for name in _FIELDS} | more
    with files.replacing(path) as part, open(part, "wb") as file:
        np.savez_compressed(file, **arrays)


def names(out):
    """List the sets of which there is a part."""
    paths = sorted((Path(out) / "parts").glob("*.npz"))
    return list(dict.fromkeys(path.stem.rpartition("-")[0] for path in paths))


def load(out, name):
    """Read what is there of a set.

    Returns:
        A Solution, and {more arrays}.
    """
    found = []
    for path in sorted((Path(out) / "parts").glob(f"{name}-*.npz")):
        if path.stem.rpartition("-")[0] == name:
            with np.load(path) as file:
                found.append(dict(file))
    arrays = {key: np.concatenate([part[key] for part in found]) for key in found[0]}
    return Solution(*(arrays.pop(key) for key in _FIELDS)), arrays
