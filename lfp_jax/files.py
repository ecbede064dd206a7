"""Files written whole or not at all, and the hash of a file."""

import contextlib
import hashlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """Write a file in one step: readers see the old one or the new one, never half of it.

    Yields:
        The path of a hidden file beside it, to be written; it takes the place of `path` when the
        block ends, and is removed if the block fails.
    """
    folder, name = os.path.split(os.fspath(path))
    part = os.path.join(folder, f".{name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def write(path: str | os.PathLike, data: bytes) -> None:
    """Write a file in one step, making its folder."""
    os.makedirs(os.path.dirname(os.fspath(path)) or ".", exist_ok=True)
    with replacing(path) as part, open(part, "wb") as file:
        file.write(data)


def sha256(path: str | os.PathLike) -> str:
    """Compute the SHA-256 of a file's content, in hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
