"""The folder of a grid: results as files, and which process is at which of them.

    WORKDIR/cells/HASH.json, HASH.png      the result of a cell, and its pictures
    WORKDIR/claims/NAME.N                  who took up the piece of work NAME, at the N-th try
    WORKDIR/bases/NAME/                    bases that cells share

Files are written whole or not at all. Any number of processes may share the folder, on a file
system of several machines too, or in a bucket (by `etils.epath`; a bucket keeps no bases).

A claim is a file that only one process can create. (A bucket lacks that: there whoever wrote last
holds it, and looks again after a while before it believes so.) Its holder rewrites it now and then;
the claim is void when it was given up, when its process has ended on this machine, or when it has
stood still for two minutes, as seen by whoever asks: no clocks are compared. What is void is taken
over by creating the file of the next number, which again only one process can.
"""

import contextlib
import os
import socket
import tempfile
import threading
import time
import uuid
from typing import Any, Self

import numpy as np
from etils import epath

from lfp_jax import images, logs
from lfp_jax.errors import UserError

_BEAT = 20.0  # seconds between rewritings of a claim
_PATIENCE = 120.0  # seconds after which one that stands still is void
_SETTLED = 5.0  # seconds after which two processes that create a claim in a bucket see who did


class Folder:
    """The folder of a grid."""

    def __init__(self, workdir: str | os.PathLike):
        """Name the folder; it is made when something is written.

        Args:
            workdir: a path, or the address of a bucket's folder.
        """
        self.path = epath.Path(workdir)
        self._bases: tempfile.TemporaryDirectory[str] | None = None
        self._seen: dict[epath.Path, tuple[str, float]] = {}  # {claim: (its text, since when)}

    def read(self, name: str) -> dict[str, Any] | None:
        """Read the result of a cell; None where there is none.

        Raises:
            UserError: the file is damaged.
        """
        path = self.path / "cells" / f"{name}.json"
        try:
            record = logs.from_text(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            record = None
        if not _is_result(record):
            raise UserError(f"'{path}' is no result of a cell. Delete it, to have it made again.")
        return record

    def names(self) -> set[str]:
        """List the names of the results there are."""
        return {path.name.removesuffix(".json") for path in (self.path / "cells").glob("*.json")}

    def read_all(self) -> list[dict[str, Any]]:
        """Read the results of all cells, those of other sweeps too, by name."""
        records = (self.read(name) for name in sorted(self.names()))
        return [record for record in records if record is not None]

    def write(self, record: dict[str, Any], *, sheet: np.ndarray | None = None) -> None:
        """Write the result of a cell.

        Args:
            record: with "hash", its name.
            sheet: uint8 [height, width, 3], its pictures, or None; written first.
        """
        name = f"cells/{record['hash']}"
        if sheet is not None:
            self._write(f"{name}.png", images.encode_png(sheet))
        self.put(f"{name}.json", logs.to_text(record))

    def put(self, name: str, text: str) -> None:
        """Write a text file in one step."""
        self._write(name, text.encode())

    def _write(self, name: str, data: bytes) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.parent / f".{path.name}.{uuid.uuid4().hex}.part"
        part.write_bytes(data)
        part.replace(path)

    def basis(self, name: str) -> str:
        """Give the folder of a basis; that of a bucket's grid is on this machine, and passes."""
        if not _in_bucket(self.path):
            return str(self.path / "bases" / name)
        self._bases = self._bases or tempfile.TemporaryDirectory()
        return os.path.join(self._bases.name, name)

    def claim(self, name: str) -> "Claim | None":
        """Take up a piece of work; None where another process is at it.

        Args:
            name: a file name without a dot.

        Returns:
            A Claim, held from now on until it is left (`with claim: ...`).
        """
        folder = self.path / "claims"
        folder.mkdir(parents=True, exist_ok=True)
        endings = [path.name.rpartition(".")[2] for path in folder.glob(f"{name}.*")]
        numbers = [int(ending) for ending in endings if ending.isdecimal()]
        last = max(numbers, default=-1)
        if numbers and not self._void(folder / f"{name}.{last}"):
            return None
        claim = Claim(folder / f"{name}.{last + 1}")
        return claim if claim.create() else None

    def wait(self, name: str, *, seconds: float = 1.0) -> "Claim":
        """Take up a piece of work as soon as nobody else is at it."""
        while (claim := self.claim(name)) is None:
            time.sleep(seconds)
        return claim

    def _void(self, path: epath.Path) -> bool:
        text = path.read_bytes()
        # Of one that is just being rewritten; a damaged one is void when it has stood still.
        with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError):
            holder = logs.from_text(text)
            if holder["released"]:
                return True
            if holder["host"] == socket.gethostname() and not _alive(holder["pid"]):
                return True
        now = time.monotonic()
        before, since = self._seen.get(path, (None, now))
        if text != before:
            since = now
        self._seen[path] = text, since
        return now - since > _PATIENCE


class Claim:
    """A piece of work that this process has taken up; its file is rewritten while it is held."""

    def __init__(self, path: epath.Path):
        """Prepare the claim of a file; `create` makes it."""
        self._path, self._left = path, threading.Event()
        self._holder = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
        self._beats = threading.Thread(target=self._beat, daemon=True)

    def create(self) -> bool:
        """Create the file and hold the claim; False where another process was quicker."""
        exclusive = _create_in_bucket if _in_bucket(self._path) else _create
        created = exclusive(self._path, self._text())
        if created:
            self._beats.start()
        return created

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Give the work up, done or not."""
        self._left.set()
        self._beats.join()
        self._path.write_text(self._text(released=True))

    def _beat(self) -> None:
        while not self._left.wait(_BEAT):
            with contextlib.suppress(OSError):  # the next one may succeed
                self._path.write_text(self._text())

    def _text(self, *, released: bool = False) -> str:
        return logs.to_line(self._holder | {"time": time.time(), "released": released})


def _is_result(record: Any) -> bool:
    """Tell whether a record is what `Folder.write` is given: settings, and metrics or an error."""
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        return False
    if "error" in record:
        return isinstance(record["error"], str) and type(record.get("attempts")) is int
    return isinstance(record.get("metrics"), dict)


def _in_bucket(path: epath.Path) -> bool:
    return "://" in os.fspath(path)


def _create(path: epath.Path, text: str) -> bool:
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _create_in_bucket(path: epath.Path, text: str) -> bool:
    if path.exists():
        return False
    path.write_text(text)
    time.sleep(_SETTLED)
    return path.read_text() == text


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True
