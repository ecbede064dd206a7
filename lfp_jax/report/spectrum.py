"""The spectrum of a generator's Jacobian: how far images move along each direction of a basis."""

import dataclasses
from pathlib import Path

import numpy as np

from lfp_jax import logs, sensitivity
from lfp_jax.basis import stored_pixels
from lfp_jax.errors import UserError
from lfp_jax.weights import store

_LARGEST = 4_096  # latent dimensions of which the principal directions take seconds, not an hour
_RMS = "rms (images in [-1, 1])"
_SUM = "norm (images in [-1, 1])"


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Image change along the directions of a basis, in their order."""

    basis: str  # its name
    stddev: np.ndarray  # [m], of the prior
    sensitivity: np.ndarray  # [m], by one unit
    unit: str  # of the sensitivity


def find(workdir: Path) -> list[Path]:
    """List what `read` can read in a work folder: spectrum.json, or else the bases."""
    path = workdir / "spectrum.json"
    stores = [workdir / "basis", *sorted((workdir / "bases").glob("*/basis"))]
    return [path] if path.exists() else [each for each in stores if store.is_store(each)]


def read(path: Path) -> list[Spectrum]:
    """Read a file of a spectrum, or work the spectra of a stored basis out.

    Args:
        path: a JSON file of "basis" (its name), "stddev" and "sensitivity", in rms; or the folder
            of a basis and its metric, with the image's number of "pixels" in its metadata, without
            which there is no rms.

    Returns:
        That of the basis and, where it is not the principal one, that along the principal
        directions.

    Raises:
        UserError: a file that is damaged.
    """
    if path.suffix == ".json":
        return [_load(path)]
    tree, metadata = store.load(path)
    try:
        pixels = stored_pixels(metadata)
        unit, metric = (_SUM, tree["metric"]) if pixels is None else (_RMS, tree["metric"] / pixels)
        found = along(tree["basis"], metric, name=str(metadata["directions"]))
    except (KeyError, TypeError, ValueError, ArithmeticError):
        raise UserError(f"'{path}' is left out: it holds no basis with its metric.") from None
    return [Spectrum(*each, unit) for each in found]


def along(
    basis: dict[str, np.ndarray], metric: np.ndarray, *, name: str
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Measure how far images move along the directions of a basis, and along the principal ones.

    Args:
        basis: "components" [d, m] and "stddev" [m]; where those are not principal directions also
            "duals", and where they are correlated "prior" [d, m].
        metric: [d, d] of `sensitivity.mean_metric`.
        name: of the directions.

    Returns:
        (name, standard deviations, image change by one unit) of each.
    """
    components, stddev = (np.asarray(basis[each], np.float64) for each in ("components", "stddev"))
    found = [(name, stddev, sensitivity.along(metric, components))]
    if name != "pca" and len(components) <= _LARGEST:
        spread = basis["prior"] if basis.get("prior") is not None else components * stddev
        principal, stddev, _ = np.linalg.svd(spread, full_matrices=False)
        found.append(("pca", stddev, sensitivity.along(metric, principal)))
    return found


def _load(path: Path) -> Spectrum:
    try:
        record = logs.from_text(path.read_bytes())
        names = ("stddev", "sensitivity")
        spread, change = (np.asarray(record[name], np.float64) for name in names)
        if spread.ndim != 1 or spread.shape != change.shape:
            raise ValueError
        if not np.isfinite([spread, change]).all():
            raise ValueError
        return Spectrum(str(record["basis"]), spread, change, _RMS)
    except (ValueError, TypeError, KeyError, OverflowError):
        raise UserError(
            f"'{path}' is left out: it must hold a 'basis' and as many numbers in 'stddev' as in "
            "'sensitivity'."
        ) from None
