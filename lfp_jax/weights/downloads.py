"""Published weight files: where they come from, and where on this machine they are kept.

A file is looked for by the path given, then in the cache, and is fetched only where that is asked
for. The cache is $LFP_JAX_CACHE, by default ~/.cache/lfp_jax; a file in it is complete and has the
SHA-256 of the table, however it came there.
"""

import hashlib
import http.client
import os
import urllib.request
from typing import NamedTuple

from lfp_jax import files
from lfp_jax.errors import UserError, choose
from lfp_jax.logs import Progress

_CHUNK = 2**20
_TIMEOUT = 30.0  # seconds without a byte
_TORCHVISION = "https://download.pytorch.org/models/"
_LPIPS = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/"
_FID = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"


class File(NamedTuple):
    """One published file."""

    name: str  # in the cache
    address: str
    size: int  # bytes
    sha256: str
    licence: str


FILES = {
    "lpips-vgg-backbone": File(
        "vgg16-397923af.pth",
        _TORCHVISION + "vgg16-397923af.pth",
        553_433_881,
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        "BSD-3-Clause (torchvision)",
    ),
    "lpips-alex-backbone": File(
        "alexnet-owt-7be5be79.pth",
        _TORCHVISION + "alexnet-owt-7be5be79.pth",
        244_408_911,
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        "BSD-3-Clause (torchvision)",
    ),
    "lpips-squeeze-backbone": File(
        "squeezenet1_1-b8a52dc0.pth",
        _TORCHVISION + "squeezenet1_1-b8a52dc0.pth",
        4_958_839,
        "b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b",
        "BSD-3-Clause (torchvision)",
    ),
    "lpips-vgg-heads": File(
        "lpips-v0.1-vgg.pth",
        _LPIPS + "v0.1/vgg.pth",
        7_289,
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
        "BSD-2-Clause (lpips)",
    ),
    "lpips-alex-heads": File(
        "lpips-v0.1-alex.pth",
        _LPIPS + "v0.1/alex.pth",
        6_009,
        "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
        "BSD-2-Clause (lpips)",
    ),
    "lpips-squeeze-heads": File(
        "lpips-v0.1-squeeze.pth",
        _LPIPS + "v0.1/squeeze.pth",
        10_811,
        "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76",
        "BSD-2-Clause (lpips)",
    ),
    "fid-inception": File(
        "pt_inception-2015-12-05-6726825d.pth",
        _FID + "pt_inception-2015-12-05-6726825d.pth",
        95_628_359,
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        "Apache-2.0 (pytorch-fid)",
    ),
}


def cache_folder(*parts):
    """Return the path of the cache, or of something in it; nothing is made."""
    root = os.environ.get("LFP_JAX_CACHE") or os.path.join("~", ".cache", "lfp_jax")
    return os.path.join(os.path.expanduser(root), *parts)


def locate(name, *, path=None, download=False):
    """Find a published file on this machine, or fetch it.

    Args:
        name: in FILES.
        path: the file, where the user has one; it may be another than the published one.
        download: fetch it into the cache where it is not there.

    Returns:
        The path of an existing file.

    Raises:
        UserError: no such file; a damaged one in the cache; or it could not be fetched. The message
            says which file to put where.
    """
    file = choose(name, FILES, "weight file")
    if path is not None:
        if not os.path.isfile(path):
            raise UserError(f"No such file: '{os.fspath(path)}' ({name}).")
        return os.fspath(path)
    kept = cache_folder(file.name)
    if os.path.isfile(kept):
        found = files.sha256(kept)
        if found != file.sha256:
            raise UserError(
                f"'{kept}' is not the published file: its SHA-256 is {found}, needed is "
                f"{file.sha256}. Delete it, or put {file.address} in its place."
            )
        return kept
    if not download:
        raise UserError(
            f"The weights '{name}' are not on this machine: put {file.address} at '{kept}', "
            "give a path, or ask for the download."
        )
    _fetch(name, file, kept)
    return kept


def _fetch(name, file, kept):
    """Download a file next to its place, check it, and move it there in one step."""
    try:
        os.makedirs(os.path.dirname(kept), exist_ok=True)
        with files.replacing(kept) as part:
            found = _copy(name, file, part)
            if found != file.sha256:
                raise UserError(
                    f"{file.address} is not the published file: its SHA-256 is {found}, needed is "
                    f"{file.sha256}; nothing was kept."
                )
    except (OSError, http.client.HTTPException) as error:
        cause = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        raise UserError(
            f"Could not download {file.address} ({cause}): put that file at '{kept}', "
            "or give a path."
        ) from None


def _copy(name, file, part):
    """Copy a file from its address, showing progress; returns the SHA-256."""
    digest, done = hashlib.sha256(), 0
    with (
        urllib.request.urlopen(file.address, timeout=_TIMEOUT) as source,
        open(part, "wb") as target,
        Progress(file.size, unit="bytes", label=name) as progress,
    ):
        while chunk := source.read(_CHUNK):
            target.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            progress.update(done)
            if done > file.size:  # an endless answer must not fill the disk
                break
    return digest.hexdigest()
