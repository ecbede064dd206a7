"""Users and their keys: a ledger in one SQLite file.

A design point says how keys are carried: a generator, a basis, which directions, how strongly. A
user has at most one active key under each; a key is drawn uniformly, belongs to one user, can be
revoked, and is never given to anyone again. An issue is what was handed out under a key: which
images by number (no two processes make the same one), or a generator. A verdict is what was said
of an image.

Many processes on one machine may use a registry at once: the file is in write-ahead mode, every
change is one transaction, on disk when the call returns. (SQLite's write-ahead mode does not work
over network folders.) Only its owner may read the file: whoever has a key can forge its mark. Keys
are in no repr and no message, and in an export only if asked for.
"""

import collections
import dataclasses
import difflib
import itertools
import json
import os
import sqlite3
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Self

import numpy as np

from lfp_jax import keys, logs
from lfp_jax.errors import UserError
from lfp_jax.fingerprint import CODES
from lfp_jax.registry.database import NOW, Database
from lfp_jax.registry.records import DesignPoint, Issue, Key, PackedKeys

__all__ = ["DesignPoint", "Issue", "Key", "PackedKeys", "Registry"]

_LONGEST_NAME = 200
_MOST_BITS = 2**20  # of a key; no generator has as many latent directions
_FEW = 10_000  # so many names are searched for the nearest; of more, the alphabetical neighbours
_NEIGHBOURS = 500
_ROWS = 10_000  # fetched at once
_NOBODY = "unknown"


class Registry:
    """An open registry; a context manager. For one thread of one process, as SQLite's own."""

    def __init__(self, path: str | os.PathLike, *, create: bool = False):
        """Open a registry, bringing one of an older schema up to date.

        Args:
            path: the file.
            create: make it if there is none.

        Raises:
            UserError: no such file, another kind of file, or a newer schema.
        """
        self._database = Database(os.fspath(path), create=create)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was done is on disk already."""
        self._database.close()

    def add_design(self, point: DesignPoint) -> int:
        """Give the number of a design point, entering it if it is new.

        Raises:
            UserError: bits below 1, a negative shift, strength not above 0, or an unknown code.
        """
        keys.available(bits=point.bits, code=point.code)
        if point.shift < 0 or not 0.0 < point.strength < float("inf"):
            given = f"{point.shift}, {point.strength}"
            raise UserError(f"A design point needs shift >= 0 and strength > 0; got {given}.")
        row = dataclasses.asdict(point)
        with self._database.transaction():
            self._database.rows(
                "INSERT INTO generators (name, sha256) VALUES (:generator, :generator_sha256) "
                "ON CONFLICT (sha256) DO NOTHING",
                row,
            )
            return self._database.row(
                "INSERT INTO bases (generator, sha256, bits, shift, strength, code, location) "
                "SELECT id, :basis_sha256, :bits, :shift, :strength, :code, :location "
                "FROM generators WHERE sha256 = :generator_sha256 "
                "ON CONFLICT (generator, sha256, bits, shift, strength, code) "
                "DO UPDATE SET location = coalesce(excluded.location, location) RETURNING id",
                row,
            )[0]

    def designs(self) -> dict[int, DesignPoint]:
        """List the design points by number."""
        rows = self._database.rows(
            "SELECT bases.id, name, generators.sha256, bases.sha256, bits, shift, strength, code, "
            "location FROM bases JOIN generators ON generators.id = generator ORDER BY bases.id",
            (),
        )
        return {number: self._read_point(fields) for number, *fields in rows}

    def register(
        self,
        names: Iterable[str],
        *,
        design: int,
        rate: float = keys.FALSE_POSITIVE_RATE,
        encode: Callable[[range], np.ndarray] | None = None,
    ) -> int:
        """Give each of these users a key; all of them, or on any error none.

        Users that the registry does not know are entered. One whose key was revoked gets another.

        Args:
            names: printable, 1 to 200 characters, unlike one another.
            design: number of the design point.
            rate: the false-positive rate at which images will be attributed.
            encode: gives the keys [n, k] that say so many numbers, those of the keys here. None:
                keys are drawn.

        Returns:
            How many keys were given.

        Raises:
            UserError: a bad name, a name twice, a user with an active key here, more users than
                this many bits tell apart at the rate, or no key left.
        """
        if isinstance(names, str):
            raise TypeError(f"names is a list of names; got the single string {names!r}.")
        names = [_check_name(name) for name in names]
        if len(set(names)) < len(names):
            [(twice, _)] = collections.Counter(names).most_common(1)
            raise UserError(f"User '{twice}' is listed twice.")
        point = self._design(design)
        try:
            with self._database.transaction():
                self._check_room(len(names), design, point, rate)
                self._database.run_many(
                    "INSERT INTO users (name) VALUES (?) ON CONFLICT DO NOTHING",
                    ((name,) for name in names),
                )
                if encode is None:
                    self._give_keys(names, design, point)
                else:
                    self._give_numbers(names, design, encode)
        except sqlite3.IntegrityError:
            taken = next((name for name in names if self._has_key(name, design)), None)
            if taken is None:
                raise
            raise UserError(
                f"User '{taken}' already has a key here. Revoke it to give them another."
            ) from None
        return len(names)

    def key(self, user: str, *, design: int) -> Key:
        """Get a user's active key.

        Raises:
            UserError: an unknown user (the line names the nearest), one without a key of this
                design point, or one whose key was revoked.
        """
        self._design(design)
        found = self._keys(
            "WHERE name = ? AND basis = ? ORDER BY revoked IS NOT NULL, keys.id DESC LIMIT 1",
            (_normal(user), design),
        )
        if not found:
            self._check_known(user)
            raise UserError(f"User '{user}' has no key of design point {design}: register them.")
        [key] = found
        if key.revoked:
            since = f"was revoked on {key.revoked}"
            raise UserError(f"The key of user '{user}' {since}. Register them again for another.")
        return key

    def key_by_id(self, number: int) -> Key:
        """Get a key by its number, revoked or not; a UserError if there is none."""
        for key in self._keys("WHERE keys.id = ?", (int(number),)):
            return key
        raise UserError(f"There is no key number {number}.")

    def revoke(self, user: str, *, design: int) -> None:
        """Revoke a user's key: no issue follows, and images are matched with it only if asked.

        Raises:
            UserError: as `key`.
        """
        with self._database.transaction():
            number = self.key(user, design=design).id
            self._database.rows(f"UPDATE keys SET revoked = {NOW} WHERE id = ?", (number,))

    def packed_keys(self, *, design: int, revoked: bool = False) -> PackedKeys:
        """Get all keys of a design point, a million in about a second.

        Args:
            design: number of the design point.
            revoked: also the revoked ones, for images made before.

        Raises:
            UserError: no such design point.
        """
        bits = self._design(design).bits
        sql = "SELECT id, bits FROM keys WHERE basis = ?"
        sql += "" if revoked else " AND revoked IS NULL"
        width = -(-bits // 8)
        ids, packed = [np.zeros(0, np.int64)], [np.zeros((0, width), np.uint8)]
        for rows in self._database.chunks(f"{sql} ORDER BY id", (design,), size=_ROWS):
            some_ids, some_keys = zip(*rows, strict=True)
            ids.append(np.array(some_ids, np.int64))
            if {len(key) if isinstance(key, bytes) else None for key in some_keys} != {width}:
                raise self._database.damaged()
            packed.append(np.frombuffer(b"".join(some_keys), np.uint8).reshape(-1, width))
        return PackedKeys(np.concatenate(ids), np.concatenate(packed), bits)

    def issue(
        self,
        user: str,
        *,
        design: int,
        images: int,
        noise: str,
        settings: dict[str, Any],
        kind: str = "images",
    ) -> Issue:
        """Enter what is handed out under a user's key, and allot the images their numbers.

        Args:
            user: a name.
            design: number of the design point.
            images: how many; their numbers follow those of the user's last issue.
            noise: the synthesis noise.
            settings: JSON-able; whatever else makes the images again.
            kind: "images", or "generator" with images 0.

        Raises:
            UserError: as `key`, or an impossible number of images.
        """
        if images < 0 or (images == 0) != (kind == "generator"):
            raise UserError(f"An issue has images >= 1, of a generator 0; got {images} ({kind}).")
        with self._database.transaction():
            key = self.key(user, design=design)
            row = self._database.row(
                "INSERT INTO issues (key, kind, start, images, noise, settings) SELECT "
                ":key, :kind, coalesce(max(start + images), 0), :images, :noise, :settings "
                "FROM issues WHERE key = :key RETURNING id, start, created",
                {
                    "key": key.id,
                    "kind": kind,
                    "images": images,
                    "noise": noise,
                    "settings": json.dumps(settings),
                },
            )
        number, start, created = row
        return Issue(number, key.user, design, kind, start, images, noise, settings, created)

    def issues(self, user: str) -> list[Issue]:
        """List all issues of a user, under revoked keys too.

        Raises:
            UserError: an unknown user.
        """
        self._check_known(user)
        rows = self._database.rows(
            "SELECT issues.id, name, basis, kind, start, images, noise, settings, issues.created "
            "FROM issues JOIN keys ON keys.id = key JOIN users ON users.id = user "
            "WHERE name = ? ORDER BY issues.id",
            (_normal(user),),
        )
        return [self._read_issue(row) for row in rows]

    def noises(self, *, design: int) -> set[str]:
        """List the kinds of synthesis noise with which images of a design point were issued."""
        sql = "SELECT DISTINCT noise FROM issues JOIN keys ON keys.id = key WHERE basis = ?"
        return {noise for (noise,) in self._database.rows(sql, (design,))}

    def record_verdict(
        self,
        *,
        design: int,
        key_id: int | None,
        image_sha256: str,
        p_value: float,
        threshold: float,
        agreeing: int,
        soft_score: float,
        users: int,
    ) -> int:
        """Enter what was said of an image; returns the entry's number.

        Args:
            design: number of the design point.
            key_id: number of the key that was named; None for `unknown`.
            image_sha256: of the file.
            p_value, threshold, agreeing, soft_score: of the best match.
            users: how many keys were compared.

        Raises:
            UserError: no such design point or key.
        """
        self._design(design)
        if key_id is not None:
            key_id = self.key_by_id(key_id).id
        return self._database.row(
            "INSERT INTO verdicts (basis, key, image_sha256, p_value, threshold, agreeing, "
            "soft_score, users) VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
            (design, key_id, image_sha256, p_value, threshold, agreeing, soft_score, users),
        )[0]

    def export(self, *, show_keys: bool = False) -> Iterator[dict[str, Any]]:
        """Give every key's entry as a JSON-able dict, by number.

        Args:
            show_keys: write the keys themselves too, as `keys.to_hex` does.
        """
        chunks = self._database.chunks(
            "SELECT name, basis, keys.created, revoked, keys.bits, bases.bits FROM keys "
            "JOIN users ON users.id = user JOIN bases ON bases.id = basis ORDER BY keys.id",
            (),
            size=_ROWS,
        )
        for *fields, packed, bits in itertools.chain.from_iterable(chunks):
            entry = dict(zip(("user", "design", "created", "revoked"), fields, strict=True))
            if show_keys:
                entry["key"] = keys.to_hex(self._unpack(packed, bits))
            yield entry

    def _keys(self, where: str, values: tuple) -> list[Key]:
        rows = self._database.rows(
            "SELECT keys.id, name, basis, keys.created, revoked, keys.bits, bases.bits FROM keys "
            f"JOIN users ON users.id = user JOIN bases ON bases.id = basis {where}",
            values,
        )
        kinds = (int, str, int, str, str | None)
        return [
            Key(*[*self._database.checked(fields, kinds), self._unpack(packed, bits)])
            for *fields, packed, bits in rows
        ]

    def _unpack(self, packed: Any, bits: Any) -> np.ndarray:
        width = -(-bits // 8) if isinstance(bits, int) else None
        if not isinstance(packed, bytes) or len(packed) != width:
            raise self._database.damaged()
        return np.unpackbits(np.frombuffer(packed, np.uint8), count=bits)

    def _read_point(self, fields: Sequence[Any]) -> DesignPoint:
        kinds = (str, str, str, int, int, float, str, str | None)
        point = DesignPoint(*self._database.checked(fields, kinds))
        if not 1 <= point.bits <= _MOST_BITS or point.code not in CODES:
            raise self._database.damaged()
        return point

    def _read_issue(self, row: Sequence[Any]) -> Issue:
        kinds = (int, str, int, str, int, int, str, str, str)
        row = self._database.checked(row, kinds)
        try:
            row[-2] = logs.from_text(row[-2])
        except ValueError:
            raise self._database.damaged() from None
        return Issue(*row)

    def _design(self, number: int) -> DesignPoint:
        designs = self.designs()
        if number not in designs:
            known = ", ".join(map(str, designs)) or "none"
            raise UserError(f"There is no design point {number}. Available: {known}.")
        return designs[number]

    def _check_room(self, n: int, design: int, point: DesignPoint, rate: float) -> None:
        """Check that n more users can be told apart, and that there are n unused keys."""
        [last] = self._database.row("SELECT max(id) FROM keys", ())  # quicker than counting
        most = (last or 0) + n
        available = keys.available(bits=point.bits, code=point.code)
        check = partial(keys.check_capacity, bits=point.bits, code=point.code, rate=rate)
        try:
            check(users=most)
        except UserError:
            sql = "SELECT count(*) FROM keys WHERE basis = ? AND revoked IS NULL"
            users = self._database.row(sql, (design,))[0] + n
            check(users=users)
        if most > available:
            [used] = self._database.row("SELECT count(*) FROM keys WHERE basis = ?", (design,))
            if used + n > available:
                raise UserError(
                    f"Of {available:,} keys of {point.bits} bits {used:,} have "
                    f"been given, revoked ones among them; {n:,} more are not left."
                )

    def _give_keys(self, names: list[str], design: int, point: DesignPoint) -> None:
        """Enter keys for users without one, drawing again where one was given before."""
        while names:
            drawn = np.packbits(keys.draw(len(names), bits=point.bits, code=point.code), axis=1)
            given = self._database.run_many(
                "INSERT INTO keys (user, basis, bits) SELECT id, ?, ? FROM users WHERE name = ? "
                "ON CONFLICT (basis, bits) DO NOTHING",
                ((design, row.tobytes(), name) for row, name in zip(drawn, names, strict=True)),
            )
            if given == len(names):
                return
            names = [name for name in names if not self._has_key(name, design)]

    def _give_numbers(
        self, names: list[str], design: int, encode: Callable[[range], np.ndarray]
    ) -> None:
        """Enter the keys that say the numbers under which they are entered."""
        [last] = self._database.row("SELECT max(id) FROM keys", ())
        numbers = range((last or 0) + 1, (last or 0) + 1 + len(names))
        packed = np.packbits(encode(numbers), axis=1)
        self._database.run_many(
            "INSERT INTO keys (id, user, basis, bits) SELECT ?, id, ?, ? FROM users WHERE name = ?",
            (
                (number, design, row.tobytes(), name)
                for number, row, name in zip(numbers, packed, names, strict=True)
            ),
        )

    def _has_key(self, name: str, design: int) -> bool:
        sql = (
            "SELECT 1 FROM keys JOIN users ON users.id = user "
            "WHERE basis = ? AND name = ? AND revoked IS NULL"
        )
        return bool(self._database.rows(sql, (design, name)))

    def _check_known(self, user: str) -> None:
        """Raise a UserError naming the nearest users if there is no such user."""
        name = _normal(user)
        if self._database.rows("SELECT 1 FROM users WHERE name = ?", (name,)):
            return
        [count] = self._database.row("SELECT count(*) FROM users", ())
        if count <= _FEW:
            rows = self._database.rows("SELECT name FROM users", ())
        else:
            below = "SELECT name FROM users WHERE name < ? ORDER BY name DESC LIMIT ?"
            above = "SELECT name FROM users WHERE name > ? ORDER BY name LIMIT ?"
            rows = self._database.rows(below, (name, _NEIGHBOURS)) + self._database.rows(
                above, (name, _NEIGHBOURS)
            )
        near = difflib.get_close_matches(name, [row[0] for row in rows], n=3)
        guess = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UserError(f"Unknown user '{user}'.{guess} {count:,} users are registered.")


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _check_name(name: str) -> str:
    """Give the one form of a user's name."""
    name = _normal(name)
    if not 1 <= len(name) <= _LONGEST_NAME or not name.isprintable() or name != name.strip():
        raise UserError(
            f"A user's name is 1 to {_LONGEST_NAME} printable characters, with no space at either "
            f"end; got {name[:_LONGEST_NAME]!r}."
        )
    if name == _NOBODY:
        raise UserError(f"A user cannot be called '{_NOBODY}': that is a verdict.")
    return name
