"""The spectrum of a generator's Jacobian: how far images move along each direction of a basis."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from lfp_jax import images, sensitivity
from lfp_jax.errors import UserError
from lfp_jax.weights import store

_LARGEST = 4_096  # latent dimensions of which the principal directions take seconds, not an hour


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Image change along the directions of a basis, in their order."""

    basis: str  # its name
    stddev: np.ndarray  # [m], of the prior
    sensitivity: np.ndarray  # [m], by one unit
    unit: str  # of the sensitivity


def read(workdir: Path) -> list[Spectrum]:
    """Read WORKDIR/spectrum.json, or else work the spectra out from WORKDIR/basis.

    Of a basis turned to the metric the principal directions, which it was turned from, come too.

    Returns:
        The spectra; none where the folder holds neither.

    Raises:
        UserError: a file that is damaged.
    """
    path = workdir / "spectrum.json"
    if path.exists():
        return [_load(path)]
    path = workdir / "basis"
    if not store.is_store(path):
        return []
    tree, metadata = store.load(path)
    try:
        spectra = of_basis(tree["basis"], tree["metric"], name=str(metadata["directions"]))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"'{path}' is left out: it holds no basis with its metric.") from None
    return [_in_rms(each, workdir) for each in spectra]


def of_basis(basis: dict[str, np.ndarray], metric: np.ndarray, *, name: str) -> list[Spectrum]:
    """Work out the spectra of a stored basis.

    Args:
        basis: "components" [d, m] and "stddev" [m]; "duals" where they are not orthonormal.
        metric: [d, d] of `sensitivity.mean_metric`.
        name: of its directions.

    Returns:
        That along its own directions and, where those are not the principal ones, along these.
    """
    components, stddev = (np.asarray(basis[each], np.float64) for each in ("components", "stddev"))
    unit = "root of summed squares"
    spectra = [Spectrum(name, stddev, sensitivity.along(metric, components), unit)]
    if basis.get("duals") is not None and len(components) <= _LARGEST:
        # Latents are uncorrelated along the components, so these span the covariance.
        principal, spread, _ = np.linalg.svd(components * stddev, full_matrices=False)
        spectra.append(Spectrum("pca", spread, sensitivity.along(metric, principal), unit))
    return spectra


def _in_rms(spectrum, workdir):
    """Bring the image change to rms, where a picture tells how many values an image has."""
    path = next(iter(sorted((workdir / "images").glob("*.png"))), None)
    if path is None:
        return spectrum
    change = spectrum.sensitivity / np.sqrt(images.read(path).size)
    return dataclasses.replace(spectrum, sensitivity=change, unit="rms")


def _load(path):
    try:
        record = json.loads(path.read_bytes())
        rows = [np.asarray(record[name], np.float64) for name in ("stddev", "sensitivity")]
        if rows[0].ndim != 1 or rows[0].shape != rows[1].shape or not np.isfinite(rows).all():
            raise ValueError
        return Spectrum(str(record["basis"]), *rows, "rms")
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(
            f"'{path}' is left out: it must hold a 'basis' and as many numbers in 'stddev' as in "
            "'sensitivity'."
        ) from None
