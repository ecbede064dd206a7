"""What a registry holds, as it is handed to a caller. No repr shows a key."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class DesignPoint:
    """A generator, a basis of its latents, and how keys are carried in it."""

    generator: str  # a name in the zoo, or a path
    generator_sha256: str
    basis_sha256: str
    bits: int
    shift: int  # the first carrying direction
    strength: float
    code: str  # "binary" or "antipodal"
    location: str | None = None  # where the basis lies; its hash tells whether it is the one


@dataclasses.dataclass(frozen=True, eq=False)
class Key:
    """A user's key."""

    id: int
    user: str
    design: int
    created: str  # UTC, ISO 8601
    revoked: str | None
    bits: np.ndarray = dataclasses.field(repr=False)  # uint8 [k]


@dataclasses.dataclass(frozen=True, eq=False)
class PackedKeys:
    """All keys of a design point, as they are matched."""

    ids: np.ndarray  # int64 [N], for `Registry.key_by_id`
    packed: np.ndarray = dataclasses.field(repr=False)  # uint8 [N, ceil(k / 8)], np.packbits
    bits: int


@dataclasses.dataclass(frozen=True)
class Issue:
    """What was handed out under a key."""

    id: int
    user: str
    design: int
    kind: str  # "images" or "generator"
    start: int  # number of the first image; image i is drawn by fold_in(key, i)
    images: int
    noise: str  # the synthesis noise: "constant", "none", ...
    settings: dict[str, Any]  # whatever else makes the images again
    created: str
