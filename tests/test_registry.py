"""Keys are given once, to one user, and stay; many processes lose nothing; mistakes are named."""

import contextlib
import json
import multiprocessing
import os
import sqlite3
import stat

import numpy as np
import pytest

from lfp_jax import keys
from lfp_jax.errors import UserError
from lfp_jax.registry import DesignPoint, Registry, database

POINT = DesignPoint(
    generator="stylegan2-demo", generator_sha256="a" * 64, basis_sha256="b" * 64,
    bits=64, shift=448, strength=1.0, code="antipodal",
)  # fmt: skip
WRITERS, ISSUES = 8, 500


@pytest.fixture
def path(tmp_path):
    return tmp_path / "registry.db"


@pytest.fixture
def registry(path):
    with Registry(path, create=True) as opened:
        opened.add_design(POINT)
        yield opened


def _other(**changes):
    return DesignPoint(**{**POINT.__dict__, **changes})


def _issue(registry, user, images=3):
    return registry.issue(
        user, design=1, images=images, noise="constant", settings={"truncation": 0.7}
    )


def test_a_key_comes_back_also_after_reopening(path, registry):
    assert registry.register(["alice", "bob"], design=1) == 2
    alice = registry.key("alice", design=1)
    assert (alice.user, alice.design, alice.bits.shape, alice.bits.dtype) == (
        "alice", 1, (64,), np.uint8,
    )  # fmt: skip
    with Registry(path) as again:
        np.testing.assert_array_equal(again.key("alice", design=1).bits, alice.bits)
        packed = again.packed_keys(design=1)
        assert [again.key_by_id(i).user for i in packed.ids] == ["alice", "bob"]
        np.testing.assert_array_equal(
            np.unpackbits(packed.packed, axis=1, count=64)[1], again.key("bob", design=1).bits
        )
        assert again.designs() == {1: POINT}


def test_only_the_owner_may_read_the_file(path, registry):
    registry.register(["alice"], design=1)
    for name in os.listdir(path.parent):  # the write-ahead file holds keys too
        assert stat.S_IMODE(os.stat(path.parent / name).st_mode) == 0o600, name
    assert len(os.listdir(path.parent)) > 1


def test_a_design_point_has_one_number(registry):
    assert registry.add_design(POINT) == 1
    assert registry.add_design(_other(strength=0.5)) == 2
    assert registry.add_design(_other(location="/bases/1")) == 1
    assert registry.designs()[1].location == "/bases/1"
    registry.register(["alice"], design=1)
    registry.register(["alice"], design=2)  # the same user elsewhere
    assert not np.array_equal(
        registry.key("alice", design=1).bits, registry.key("alice", design=2).bits
    )
    assert len(registry.packed_keys(design=1).ids) == 1


def test_a_revoked_key_is_gone_for_good(registry):
    registry.register(["alice", "bob"], design=1)
    old = registry.key("alice", design=1)
    registry.revoke("alice", design=1)
    for call in (registry.key, registry.revoke):
        with pytest.raises(UserError, match="key of user 'alice' was revoked on 20"):
            call("alice", design=1)
    with pytest.raises(UserError, match="was revoked"):
        _issue(registry, "alice")
    assert list(registry.packed_keys(design=1).ids) == [2]
    assert list(registry.packed_keys(design=1, revoked=True).ids) == [1, 2]
    assert registry.key_by_id(old.id).revoked
    registry.register(["alice"], design=1)
    assert not np.array_equal(registry.key("alice", design=1).bits, old.bits)


def test_no_key_is_given_twice_though_few_are_left(registry):
    small = registry.add_design(_other(bits=8))
    options = {"design": small, "rate": 0.999}
    registry.register([f"a{i}" for i in range(120)], **options)
    for i in range(120):
        registry.revoke(f"a{i}", design=small)
    registry.register([f"b{i}" for i in range(136)], **options)  # all 256 are given now
    packed = registry.packed_keys(design=small, revoked=True).packed
    assert len(np.unique(packed)) == 256
    with pytest.raises(UserError, match="Of 256 keys of 8 bits 256 have been given"):
        registry.register(["c"], **options)


def test_binary_keys_are_never_near_all_zero(registry):
    design = registry.add_design(_other(bits=24, code="binary"))
    registry.register([f"u{i}" for i in range(300)], design=design, rate=0.01)
    packed = registry.packed_keys(design=design).packed
    assert np.unpackbits(packed, axis=1).sum(axis=1).min() >= 6


def test_the_file_itself_keeps_keys(path, registry):
    registry.register(["alice"], design=1)
    with sqlite3.connect(path) as db:
        for change in (
            "DELETE FROM keys",
            "UPDATE keys SET bits = x'00'",
            "UPDATE keys SET revoked = 'x'; UPDATE keys SET revoked = NULL",
        ):
            with pytest.raises(sqlite3.IntegrityError, match="keys are revoked, never"):
                db.executescript(change)
    db.close()


def test_too_few_bits_for_the_users_are_refused_with_the_arithmetic(registry):
    short = registry.add_design(_other(bits=32))
    names = [f"u{i}" for i in range(4295)]
    with pytest.raises(UserError, match=r"32 bits and 4,295 users: .* 4,295 / 4,294,967,295"):
        registry.register(names, design=short)
    registry.register(names[:-1], design=short)
    with pytest.raises(UserError, match="32 bits and 4,295 users"):
        registry.register(names[-1:], design=short)
    registry.revoke("u0", design=short)  # its key is matched no more
    registry.register(names[-1:], design=short)


def test_a_refused_registration_leaves_nothing(registry):
    registry.register(["carol"], design=1)
    with pytest.raises(UserError, match="User 'carol' already has a key here. Revoke it"):
        registry.register(["dave", "carol"], design=1)
    with pytest.raises(UserError, match="Unknown user 'dave'. 1 users are registered."):
        registry.key("dave", design=1)
    with pytest.raises(UserError, match="'dave' is listed twice"):
        registry.register(["erin", "dave", "dave"], design=1)
    assert len(registry.packed_keys(design=1).ids) == 1


@pytest.mark.parametrize("name", ["", " a", "a\n", "a\x1b[2J", "x" * 201])
def test_names_are_printable(registry, name):
    with pytest.raises(UserError, match="1 to 200 printable characters"):
        registry.register([name], design=1)


def test_a_name_is_one_however_it_is_typed(registry):
    registry.register(["Zo\u00eb"], design=1)
    assert registry.key("Zoe\u0308", design=1).user == "Zo\u00eb"
    with pytest.raises(UserError, match="cannot be called 'unknown'"):
        registry.register(["unknown"], design=1)
    with pytest.raises(TypeError, match="single string"):
        registry.register("alice", design=1)


def test_an_unknown_user_is_told_the_nearest(registry, monkeypatch):
    registry.register([*(f"user-{i:04d}" for i in range(1200)), "alice", "alina"], design=1)
    for few in (10_000, 100):  # all names, or the alphabetical neighbours
        monkeypatch.setattr("lfp_jax.registry._FEW", few)
        with pytest.raises(UserError, match="Unknown user 'alicia'. Did you mean .*'alice'.*1,202"):
            registry.key("alicia", design=1)
    with pytest.raises(UserError, match="has no key of design point 2: register them"):
        registry.add_design(_other(shift=0))
        registry.key("alice", design=2)
    with pytest.raises(UserError, match="no design point 7. Available: 1, 2"):
        registry.key("alice", design=7)
    with pytest.raises(UserError, match="no key number 99999"):
        registry.key_by_id(99999)


def test_images_are_numbered_on_from_issue_to_issue(registry):
    registry.register(["alice", "bob"], design=1)
    first = _issue(registry, "alice")
    export = registry.issue(
        "alice", design=1, images=0, noise="none", settings={}, kind="generator"
    )
    second = _issue(registry, "alice", 5)
    assert (first.start, export.images, second.start, second.images) == (0, 0, 3, 5)
    assert _issue(registry, "bob").start == 0
    assert registry.issues("alice") == [first, export, second]
    assert first.settings == {"truncation": 0.7}
    for images, kind in ((0, "images"), (-1, "images"), (2, "generator")):
        with pytest.raises(UserError, match="An issue has images >= 1"):
            registry.issue("bob", design=1, images=images, noise="", settings={}, kind=kind)


def test_verdicts_are_kept(path, registry):
    registry.register(["alice"], design=1)
    entry = {"image_sha256": "c" * 64, "p_value": 1e-12, "threshold": 1e-6, "agreeing": 64}
    entry |= {"soft_score": 40.0, "users": 1}
    assert registry.record_verdict(design=1, key_id=np.int64(1), **entry) == 1
    assert registry.record_verdict(design=1, key_id=None, **entry) == 2
    with pytest.raises(UserError, match="no key number 5"):
        registry.record_verdict(design=1, key_id=5, **entry)
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT key, p_value FROM verdicts").fetchall() == [
            (1, 1e-12), (None, 1e-12),
        ]  # fmt: skip
    db.close()


def test_keys_are_shown_only_when_asked_for(registry):
    registry.register(["alice"], design=1)
    key = registry.key("alice", design=1)
    text, packed = keys.to_hex(key.bits), registry.packed_keys(design=1)
    shown = f"{key} {packed} {registry!r} {list(registry.export())}"
    for secret in (text, text[:4], str(key.bits)[1:20], str(packed.packed)[2:10]):
        assert secret not in shown
    assert "alice" in shown
    [entry] = registry.export(show_keys=True)
    np.testing.assert_array_equal(keys.from_hex(entry["key"], bits=64), key.bits)
    json.dumps(entry)


def test_what_is_no_registry_is_refused_and_left_alone(tmp_path):
    text, foreign, empty = (tmp_path / name for name in ("a.txt", "b.db", "c.db"))
    text.write_text("a line of text, longer than the header of an SQLite file\n" * 3)
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE users (name)")
    db.close()
    empty.touch()
    before = [text.read_bytes(), foreign.read_bytes()]
    for create in (False, True):
        with pytest.raises(UserError, match="a.txt' is not a registry: it is no SQLite file"):
            Registry(text, create=create)
        with pytest.raises(UserError, match="b.db' is not a registry: another program made it"):
            Registry(foreign, create=create)
        with pytest.raises(UserError, match="not a registry: it is a folder"):
            Registry(tmp_path, create=create)
    assert [text.read_bytes(), foreign.read_bytes()] == before
    with pytest.raises(UserError, match="c.db' is not a registry: it is empty"):
        Registry(empty)
    with pytest.raises(UserError, match="There is no registry '.*d.db'"):
        Registry(tmp_path / "d.db")
    assert not (tmp_path / "d.db").exists()
    with pytest.raises(UserError, match="e/d.db' cannot be made: No such file or directory"):
        Registry(tmp_path / "e" / "d.db", create=True)


def test_a_damaged_registry_is_named(path, registry):
    registry.register([f"u{i}" for i in range(500)], design=1)
    registry.close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(bytes(data))
    with (
        pytest.raises(UserError, match="is damaged. Restore it from a backup"),
        Registry(path) as r,
    ):
        r.packed_keys(design=1)


def test_an_older_schema_is_brought_up_to_date_and_a_newer_one_refused(path, registry, monkeypatch):
    registry.register(["alice"], design=1)
    newer = (*database._MIGRATIONS, ("ALTER TABLE users ADD COLUMN email TEXT",))
    with monkeypatch.context() as patch:
        patch.setattr(database, "_MIGRATIONS", newer)
        with Registry(path) as again:
            assert again.key("alice", design=1).id == 1
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT name, email FROM users").fetchall() == [("alice", None)]
    db.close()
    with pytest.raises(UserError, match="schema 2; this program knows schemas up to 1. Update"):
        Registry(path)


@pytest.mark.parametrize(
    ("pragma", "message"),
    [("max_page_count = 1", "the disk is full"), ("query_only = 1", "is read-only")],
)
def test_a_failed_write_leaves_nothing(registry, pragma, message):
    registry._database.rows(f"PRAGMA {pragma}", ())
    with pytest.raises(UserError, match=f"registry.db' .*{message}.*Nothing of this change"):
        registry.register([f"u{i}" for i in range(2000)], design=1)
    registry._database.rows("PRAGMA query_only = 0", ())
    assert len(registry.packed_keys(design=1).ids) == 0
    assert registry._database.row("SELECT count(*) FROM users", ()) == (0,)


def test_a_locked_registry_is_named(path, registry, monkeypatch):
    monkeypatch.setattr(database, "_BUSY_SECONDS", 0.01)
    with sqlite3.connect(path) as db:
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(UserError, match="locked by another program"):
            registry.register(["alice"], design=1)
        registry.packed_keys(design=1)  # readers do not wait
    db.close()
    registry.register(["alice"], design=1)


def _write(path, number):
    """Make the registry if it is not there, and issue keys and images."""
    with Registry(path, create=True) as registry:
        design = registry.add_design(POINT)
        # Locks are the same; only power cuts, which no test makes, are another matter.
        registry._database.rows("PRAGMA synchronous = OFF", ())
        with_all = f"shared-{number % 2}"
        with contextlib.suppress(UserError):  # a sibling was quicker
            registry.register([with_all], design=design)
        for i in range(ISSUES // 2):
            registry.register([f"user-{number}-{i}"], design=design)
            _issue(registry, with_all, 1 + i % 3)


def test_many_processes_lose_and_double_nothing(path):
    """8 writers x 500 issues: 250 keys each, and 250 lots of images of a user that four share."""
    context = multiprocessing.get_context("forkserver")  # jax's threads do not survive a fork
    context.set_forkserver_preload(["lfp_jax.registry"])
    writers = [context.Process(target=_write, args=(path, i)) for i in range(WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * WRITERS
    with Registry(path) as registry:
        entries = list(registry.export(show_keys=True))
        assert len(entries) == WRITERS * ISSUES // 2 + 2
        assert len({entry["user"] for entry in entries}) == len(entries)
        assert len({entry["key"] for entry in entries}) == len(entries)
        for shared in ("shared-0", "shared-1"):
            issues = registry.issues(shared)
            assert len(issues) == WRITERS // 2 * ISSUES // 2
            images = [n for issue in issues for n in range(issue.start, issue.start + issue.images)]
            assert sorted(images) == list(range(len(images)))
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    db.close()
