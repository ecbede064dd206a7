"""The SQLite file under a registry: whose it is, its schema, transactions, errors in words."""

import contextlib
import functools
import itertools
import os
import random
import sqlite3
import time
from collections.abc import Iterable, Iterator
from typing import Any

from lfp_jax.errors import UserError

_APPLICATION = 0x6C66706A  # "lfpj", in the file's header
_BUSY_SECONDS = 30.0
_POLL_SECONDS = (0.0005, 0.005)  # between tries, at random, so that no process always comes late
_CACHE_KIB = 65_536  # a million keys of random bytes scatter over all pages of their index
NOW = "strftime('%Y-%m-%dT%H:%M:%SZ', 'now')"

# One entry a schema version: the statements that lead to it from the version before.
_MIGRATIONS = (
    (
        f"""CREATE TABLE generators (
            id INTEGER PRIMARY KEY, name TEXT NOT NULL, sha256 TEXT NOT NULL UNIQUE,
            created TEXT NOT NULL DEFAULT ({NOW}))""",
        f"""CREATE TABLE bases (
            id INTEGER PRIMARY KEY, generator INTEGER NOT NULL REFERENCES generators,
            sha256 TEXT NOT NULL, bits INTEGER NOT NULL CHECK (bits > 0),
            shift INTEGER NOT NULL CHECK (shift >= 0), strength REAL NOT NULL CHECK (strength > 0),
            code TEXT NOT NULL, location TEXT, created TEXT NOT NULL DEFAULT ({NOW}),
            UNIQUE (generator, sha256, bits, shift, strength, code))""",
        f"""CREATE TABLE users (
            id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,
            created TEXT NOT NULL DEFAULT ({NOW}))""",
        f"""CREATE TABLE keys (
            id INTEGER PRIMARY KEY, user INTEGER NOT NULL REFERENCES users,
            basis INTEGER NOT NULL REFERENCES bases, bits BLOB NOT NULL,
            created TEXT NOT NULL DEFAULT ({NOW}), revoked TEXT, UNIQUE (basis, bits))""",
        "CREATE UNIQUE INDEX active_keys ON keys (basis, user) WHERE revoked IS NULL",
        "CREATE INDEX keys_of_users ON keys (user)",
        """CREATE TRIGGER keys_stay BEFORE DELETE ON keys
            BEGIN SELECT RAISE (ABORT, 'keys are revoked, never deleted'); END""",
        """CREATE TRIGGER keys_do_not_change BEFORE UPDATE ON keys
            WHEN OLD.revoked IS NOT NULL OR NEW.bits IS NOT OLD.bits OR NEW.user IS NOT OLD.user
            BEGIN SELECT RAISE (ABORT, 'keys are revoked, never changed'); END""",
        f"""CREATE TABLE issues (
            id INTEGER PRIMARY KEY, key INTEGER NOT NULL REFERENCES keys,
            kind TEXT NOT NULL CHECK (kind IN ('images', 'generator')),
            start INTEGER NOT NULL, images INTEGER NOT NULL, noise TEXT NOT NULL,
            settings TEXT NOT NULL, created TEXT NOT NULL DEFAULT ({NOW}),
            CHECK (images > 0 OR kind = 'generator'))""",
        "CREATE UNIQUE INDEX issued_images ON issues (key, start) WHERE kind = 'images'",
        f"""CREATE TABLE verdicts (
            id INTEGER PRIMARY KEY, basis INTEGER NOT NULL REFERENCES bases,
            key INTEGER REFERENCES keys, image_sha256 TEXT NOT NULL,
            p_value REAL NOT NULL CHECK (p_value BETWEEN 0 AND 1), threshold REAL NOT NULL,
            agreeing INTEGER NOT NULL, soft_score REAL NOT NULL, users INTEGER NOT NULL,
            created TEXT NOT NULL DEFAULT ({NOW}))""",
    ),
)

# All that a file holds besides rows. A trigger or a view of another's making is a program.
_SCHEMA = (
    "SELECT type, name, tbl_name, sql FROM sqlite_master "
    "WHERE sql IS NOT NULL AND NOT (type = 'table' AND name LIKE 'sqlite_stat_') ORDER BY 1, 2"
)

# What a failure of SQLite means to a user, and what to do.
_SAYINGS = {
    sqlite3.SQLITE_NOTADB: "is not a registry: it is no SQLite file.",
    sqlite3.SQLITE_CORRUPT: "is damaged. Restore it from a backup.",
    sqlite3.SQLITE_FULL: "cannot grow: the disk is full. Nothing of this change was kept.",
    sqlite3.SQLITE_READONLY: "is read-only. Nothing of this change was kept.",
    sqlite3.SQLITE_BUSY: f"was locked by another program for {_BUSY_SECONDS:.0f} s. Try again.",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened: it, or its folder, may not be read or written.",
    sqlite3.SQLITE_PERM: "cannot be opened: it may not be read or written.",
    sqlite3.SQLITE_IOERR: "cannot be read or written: the disk gave an error.",
}


class Database:
    """An open file. For one thread of one process, as SQLite's own."""

    def __init__(self, path: str, *, create: bool):
        """Open the file, bringing one of an older schema up to date.

        Args:
            path: the file.
            create: make it if there is none.

        Raises:
            UserError: no such file, another kind of file, or a newer schema.
        """
        self._path = path
        _check_file(path, create)
        with _in_words(path):
            self._db = sqlite3.connect(path, timeout=0.0, isolation_level=None)
        try:
            with _in_words(path):
                self._prepare(create)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def checked(self, values: Iterable[Any], kinds: Iterable[Any]) -> list[Any]:
        """Give values of a row, each of its kind: SQLite itself lets any column hold anything.

        Raises:
            UserError: one is of another kind, which nobody wrote there.
        """
        values = list(values)
        if not all(isinstance(v, kind) for v, kind in zip(values, kinds, strict=True)):
            raise self.damaged()
        return values

    def damaged(self) -> UserError:
        """Make the error of a file that holds what nobody wrote there."""
        return UserError(f"'{self._path}' {_SAYINGS[sqlite3.SQLITE_CORRUPT]}")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Do all or nothing; other processes' changes wait meanwhile."""
        with _in_words(self._path):
            self._execute("BEGIN IMMEDIATE", ())
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk has rolled back by itself
                    self._db.execute("ROLLBACK")
                raise

    def rows(self, sql: str, values: Any) -> list[tuple]:
        """Run a statement; all rows of its answer."""
        with _in_words(self._path):
            return self._execute(sql, values).fetchall()

    def row(self, sql: str, values: Any) -> tuple:
        """Run a statement; the one row of its answer."""
        [row] = self.rows(sql, values)
        return row

    def chunks(self, sql: str, values: Any, *, size: int) -> Iterator[list[tuple]]:
        """Run a statement; its answer in lists of at most `size` rows."""
        with _in_words(self._path):
            cursor = self._execute(sql, values)
            while rows := cursor.fetchmany(size):
                yield rows

    def run_many(self, sql: str, values: Iterable[Any]) -> int:
        """Run a statement once for each of the values; how many rows changed."""
        with _in_words(self._path):
            before = self._db.total_changes
            self._db.executemany(sql, values)
            return self._db.total_changes - before

    def _execute(self, sql: str, values: Any) -> sqlite3.Cursor:
        """Run a statement, waiting for our turn.

        SQLite's own waiting sleeps ever longer: of eight busy writers it starved one for 30 s.
        """
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                return self._db.execute(sql, values)
            except sqlite3.OperationalError as error:
                busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not busy or time.monotonic() > deadline:
                    raise
            time.sleep(random.uniform(*_POLL_SECONDS))

    def _prepare(self, create: bool) -> None:
        """Check whose file it is, and bring its schema up to date."""
        self._execute("PRAGMA foreign_keys = ON", ())
        self._execute("PRAGMA synchronous = FULL", ())  # a key handed out is on disk
        self._execute(f"PRAGMA cache_size = -{_CACHE_KIB}", ())
        application, version, tables = self.row(
            "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_master) "
            "FROM pragma_application_id, pragma_user_version",
            (),
        )
        if application != _APPLICATION and (application or version or tables):
            raise UserError(f"'{self._path}' is not a registry: another program made it.")
        if application != _APPLICATION and not create:
            raise UserError(f"'{self._path}' is not a registry: it is empty.")
        if version > len(_MIGRATIONS):
            raise UserError(
                f"'{self._path}' is a registry of schema {version}; this program knows schemas up "
                f"to {len(_MIGRATIONS)}. Update lfp_jax."
            )
        self._execute("PRAGMA journal_mode = WAL", ())
        if version < len(_MIGRATIONS):
            self._migrate()
        if self.rows(_SCHEMA, ()) != _schema(_MIGRATIONS):
            raise UserError(
                f"'{self._path}' is not a registry as this program makes it: its tables were "
                "changed. Restore it from a backup."
            )

    def _migrate(self) -> None:
        with self.transaction():
            [version] = self.row("PRAGMA user_version", ())  # another process may have been quicker
            for statements in _MIGRATIONS[version:]:
                for statement in statements:
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA application_id = {_APPLICATION}")
            self._db.execute(f"PRAGMA user_version = {max(version, len(_MIGRATIONS))}")


@functools.cache
def _schema(migrations: tuple[tuple[str, ...], ...]) -> list[Any]:
    """Give the schema that migrations lead to."""
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        for statement in itertools.chain.from_iterable(migrations):
            database.execute(statement)
        return database.execute(_SCHEMA).fetchall()


@contextlib.contextmanager
def _in_words(path: str) -> Iterator[None]:
    """Say what SQLite's errors mean; those that no user can mend pass through."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the finer distinction
        if isinstance(error, sqlite3.OperationalError) and not code:
            code = sqlite3.SQLITE_CORRUPT  # Python's own: a text is not UTF-8
        if code not in _SAYINGS:
            raise
        raise UserError(f"'{path}' {_SAYINGS[code]}") from None


def _check_file(path: str, create: bool) -> None:
    """Check that there is a file, or make an empty one that only its owner may read."""
    if os.path.isdir(path):
        raise UserError(f"'{path}' is not a registry: it is a folder.")
    if os.path.exists(path):
        return
    if not create:
        raise UserError(f"There is no registry '{path}'.")
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite's side files take the mode
    except OSError as error:
        raise UserError(f"The registry '{path}' cannot be made: {error.strerror}.") from None
