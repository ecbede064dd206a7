"""The training pictures: a folder rendered by toon_head.mjs, indexed by tensorflow-datasets.

The index (file paths and labels) is an array_record data set read back as a random-access source,
which needs no TensorFlow; the pictures themselves stay plain PNG files. Images are uint8 here.
"""

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lfp_jax import images
from lfp_jax.errors import UserError, did_you_mean
from lfp_jax.logs import from_text

SPLITS = ("train", "held_out")


def read_choices(folder: str) -> dict[str, list[str]]:
    """Read the attributes of a rendered folder: {attribute: names of its values, in label order}.

    Raises:
        UserError: the folder is missing, not complete or damaged.
    """
    if not os.path.isfile(os.path.join(folder, "labels.jsonl")):
        raise UserError(f"No complete picture folder at '{folder}'. {_render(folder)}")
    choices = _read_json(folder, "choices.json")
    if not isinstance(choices, dict) or not all(map(_are_names, choices.values())):
        path = os.path.join(folder, "choices.json")
        raise UserError(f"'{path}' holds no lists of names. {_render(folder)}")
    return choices


def _are_names(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def load_split(folder: str, split: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Read one split into memory, in the order of the file names.

    Args:
        folder: what toon_head.mjs wrote; the index is made in its subfolder `tfds` when first read.
        split: "train" or "held_out".

    Returns:
        uint8 images [n, H, W, 3] and labels {attribute: int32 [n]}.

    Raises:
        UserError: the folder is missing, not complete or damaged, or the split is unknown.
    """
    if split not in SPLITS:
        raise UserError(did_you_mean(split, SPLITS, "split"))
    rows = _read_index(os.path.abspath(folder), split)
    paths = [os.path.join(folder, row.pop("file")) for row in rows]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise UserError(
            f"'{folder}' lacks {len(missing)} of {len(paths)} {split} pictures, the first is "
            f"'{missing[0]}'. {_render(folder)}"
        )
    with ThreadPoolExecutor() as pool:
        pixels = list(pool.map(images.read, paths))
    odd = next((i for i, image in enumerate(pixels) if image.shape != pixels[0].shape), None)
    if odd is not None:
        raise UserError(
            f"The pictures must be of one size; '{paths[0]}' is {pixels[0].shape[:2]} and "
            f"'{paths[odd]}' is {pixels[odd].shape[:2]}."
        )
    labels = {name: np.array([row[name] for row in rows], np.int32) for name in rows[0]}
    return np.stack(pixels), labels


def batch_indices(seed: int, size: int, *, batch: int, step: int) -> np.ndarray:
    """Choose the pictures of a step: a pure function of (seed, step), so that resuming is exact.

    Every epoch is one permutation; a batch may end one epoch and begin the next.

    Args:
        seed: of the whole run.
        size: pictures in the split.
        batch: pictures a step.
        step: from 0 on.

    Returns:
        int64 indices [batch], each in [0, size).
    """
    places = np.arange(step * batch, (step + 1) * batch)
    out = np.empty(batch, np.int64)
    for epoch in np.unique(places // size):
        order = np.random.default_rng((seed, int(epoch))).permutation(size)
        mine = places // size == epoch
        out[mine] = order[places[mine] % size]
    return out


def _render(folder: str) -> str:
    script = os.path.join(os.path.dirname(__file__), "toon_head.mjs")
    return f"Render it: node {script} --out {folder}"


def _read_json(folder: str, name: str) -> Any:
    try:
        with open(os.path.join(folder, name), "rb") as file:
            return from_text(file.read())
    except (OSError, ValueError) as error:
        path = os.path.join(folder, name)
        raise UserError(f"'{path}' is not readable: {error}. {_render(folder)}") from None


def _rows(folder: str, split: str, choices: dict[str, list[str]]) -> Iterator[dict[str, Any]]:
    """Yield {"file", attribute: int ...} of a split from labels.jsonl."""
    path = os.path.join(folder, "labels.jsonl")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = from_text(line)
                example = _example(row["file"], row["labels"], choices)
                if row["split"] not in SPLITS:
                    raise ValueError("unknown split")
            except (ValueError, KeyError, TypeError) as error:
                cause = f"{path}' is damaged: {error}"
                raise UserError(f"Line {number} of '{cause}. {_render(folder)}") from None
            if row["split"] == split:
                yield example


def _example(file: str, labels: dict[str, int], choices: dict[str, list[str]]) -> dict[str, Any]:
    """Check a row: its picture lies in the folder, and its labels are some of the choices."""
    if not isinstance(file, str) or os.path.isabs(file) or ".." in file.split("/") or "\0" in file:
        raise ValueError("its picture does not lie in the folder")
    if not isinstance(labels, dict) or set(labels) != set(choices):
        raise ValueError("unknown attributes")
    if not all(type(n) is int and 0 <= n < len(choices[name]) for name, n in labels.items()):
        raise ValueError("a label is none of the choices")
    return {"file": file, **labels}


def _read_index(folder: str, split: str) -> list[dict[str, Any]]:
    """Return the rows of a split, in file order, making the array_record index where needed."""
    choices = read_choices(folder)
    for other in SPLITS:
        if next(_rows(folder, other, choices), None) is None:
            raise UserError(f"'{folder}' has no {other} pictures. {_render(folder)}")
    builder = _builder(folder, choices)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
        builder.download_and_prepare()
    source = builder.as_data_source(split=split)
    rows = [source[i] for i in range(len(source))]
    for row in rows:
        row["file"] = row["file"].decode() if isinstance(row["file"], bytes) else str(row["file"])
    return sorted(rows, key=lambda row: row["file"])


def _builder(folder: str, choices: dict[str, list[str]]) -> Any:
    """Make the tensorflow-datasets builder over a rendered folder."""
    try:
        import tensorflow_datasets as tfds  # heavy, and an optional extra
    except ImportError:
        raise UserError(
            "Reading training pictures needs the extra: pip install 'lfp_jax[data]'."
        ) from None

    # Its class takes the argument, but tells no types.
    class ToonHead(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """Faces of the DiceBear style toon-head (CC BY 4.0): file path and labels."""

        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = folder

        def _info(self):
            labels = dict.fromkeys(choices, np.int32)
            features = tfds.features.FeaturesDict({"file": tfds.features.Text(), **labels})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            del dl_manager  # nothing is downloaded
            return {split: self._generate_examples(split) for split in SPLITS}

        def _generate_examples(self, split):
            for row in _rows(folder, split, choices):
                yield row["file"], row

    # A folder that was rendered further gets a new index: its name is a hash of the labels.
    with open(os.path.join(folder, "labels.jsonl"), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    return ToonHead(data_dir=os.path.join(folder, "tfds", digest), file_format="array_record")
