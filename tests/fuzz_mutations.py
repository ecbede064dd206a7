"""Damages files: at random bytes, and within what a format protects by checksums and lengths.

Blind damage of a zip, a PNG or a store seldom comes further than a checksum. So half of the mutants
are damaged inside, and wrapped up again as a hostile writer would.
"""

import contextlib
import io
import json
import pickletools
import re
import sqlite3
import tempfile
import zipfile
import zlib

import yaml


def nested(depth, inner=None):
    """Nest dicts as deep as a parser lets pass."""
    for _ in range(depth):
        inner = {"a": inner}
    return inner


# Values that a field may hold in place of its own.
ODD = (
    None, True, 0, -1, 1, 3, 2**31, 2**63, 10**30, 10**400, 0.5, -0.5, 1e308, float("nan"),
    float("inf"), "", "text", "../../outside", "/etc/passwd", "\ud800", "\0", "a\nb", [], {}, [[]],
    [None], [1, 2], [{}], {"a": 1}, {"value": "x"}, nested(300), "[" * 100_000,
)  # fmt: skip
_LENGTHS = (0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
_NUMBERS = (b"0", b"-1", b"7", b"65536", b"99999999", b"2147483648", b"9" * 20, b"1e999")


def mutate(rng, data, name):
    """Damage the content of a file.

    Args:
        rng: a NumPy generator.
        data: bytes.
        name: of the file, whose ending tells YAML from other text.

    Returns:
        bytes, different as a rule.
    """
    inside = _inside(data, name)
    if inside is not None and rng.random() < 0.6:
        with contextlib.suppress(ValueError):  # of what only looks like the format
            return inside(rng, data)
    for _ in range(rng.integers(1, 4)):
        data = _BLIND[rng.integers(len(_BLIND))](rng, data)
    return data


def _inside(data, name):
    """Give the damage that a format's reader will not notice at once; None for other formats."""
    if name.endswith(".yaml"):
        return _yaml
    if name.endswith(".jsonl"):
        return _lines
    if data[:4] == b"PK\x03\x04":
        return _zip
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _png
    if data[:6] == b"SQLite":
        return _sqlite
    if data[8:10] == b'{"':
        return _safetensors
    if data[:1] in (b"{", b"["):
        return _json
    return _pickle if data[:1] == b"\x80" else None


# --- blind ---------------------------------------------------------------------------------------


def _span(rng, data, most=64):
    start = int(rng.integers(len(data) + 1))
    return start, min(len(data), start + int(rng.integers(1, most)))


def _truncate(rng, data):
    return data[: rng.integers(len(data) + 1)]


def _flip(rng, data):
    out = bytearray(data)
    for _ in range(rng.integers(1, 9) if data else 0):
        out[rng.integers(len(out))] ^= 1 << rng.integers(8)
    return bytes(out)


def _overwrite(rng, data):
    start, end = _span(rng, data)
    kinds = (b"\0" * (end - start), b"\xff" * (end - start), rng.bytes(end - start))
    return data[:start] + kinds[rng.integers(3)] + data[end:]


def _remove(rng, data):
    start, end = _span(rng, data)
    return data[:start] + data[end:]


def _duplicate(rng, data):
    start, end = _span(rng, data)
    return data[:end] + data[start:end] * int(rng.integers(1, 4)) + data[end:]


def _length(rng, data):
    """Put a number where a length might stand, in either byte order."""
    width, order = int(rng.choice((2, 4, 8))), ("little", "big")[rng.integers(2)]
    value = _LENGTHS[rng.integers(len(_LENGTHS))] % 2 ** (8 * width)
    start = int(rng.integers(len(data) + 1))
    return data[:start] + value.to_bytes(width, order) + data[start + width :]


def _digits(rng, data):
    """Replace a number that is written out."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?", data))
    if not found:
        return _flip(rng, data)
    match = found[rng.integers(len(found))]
    return data[: match.start()] + _NUMBERS[rng.integers(len(_NUMBERS))] + data[match.end() :]


_BLIND = (_truncate, _flip, _overwrite, _remove, _duplicate, _length, _digits)


# --- inside --------------------------------------------------------------------------------------


def _change_value(rng, value):
    """Change one entry of nested dicts and lists: another value, another name, or none."""
    holders, queue = [], [value]
    while queue:
        holder = queue.pop()
        if isinstance(holder, dict | list) and holder:
            holders.append(holder)
            queue += holder.values() if isinstance(holder, dict) else holder
    if not holders or rng.random() < 0.03:
        return ODD[rng.integers(len(ODD))]
    holder = holders[rng.integers(len(holders))]
    names = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    name, action = names[rng.integers(len(names))], rng.random()
    if action < 0.2:
        del holder[name]
    elif action < 0.3 and isinstance(holder, dict):
        holder[f"{name}x"] = holder.pop(name)
    else:
        holder[name] = ODD[rng.integers(len(ODD))]
    return value


def _json(rng, data):
    return json.dumps(_change_value(rng, json.loads(data))).encode()


def _lines(rng, data):
    lines = data.splitlines()
    at = rng.integers(len(lines))
    return b"\n".join([*lines[:at], _json(rng, lines[at]), *lines[at + 1 :], b""])


def _yaml(rng, data):
    changed = _change_value(rng, yaml.safe_load(data))
    return yaml.safe_dump(changed, allow_unicode=True).encode("utf-8", "surrogatepass")


def _safetensors(rng, data):
    end = 8 + int.from_bytes(data[:8], "little")
    header = _json(rng, data[8:end])
    return len(header).to_bytes(8, "little") + header + data[end:]


def _pickle(rng, data):
    """Replace, drop or repeat one instruction."""
    places = []
    for opcode, _, position in pickletools.genops(data):
        places.append((position, opcode.name))
    at = int(rng.integers(1, len(places)))
    start = places[at][0]
    end = places[at + 1][0] if at + 1 < len(places) else start + 1
    odd = (b"", data[start:end] * 2, b"N", b"K\x05", b"]", b"}", b")", b"\x88", b"X\1\0\0\0a",
           b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"cos\nsystem\n", b"R", b"(",
           b"G\x7f\xf0\0\0\0\0\0\0")  # fmt: skip
    return data[:start] + odd[rng.integers(len(odd))] + data[end:]


def _zip(rng, data):
    """Damage a member, and write the file anew: its checksums fit."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    told = [name for name in members if name.endswith((".pkl", ".npy"))]  # how others are read
    names = told if told and rng.random() < 0.5 else list(members)
    name = names[rng.integers(len(names))]
    members[name] = mutate(rng, members[name], name)
    how = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[int(rng.random() < 0.2)]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how) as archive:
        for each, content in members.items():
            archive.writestr(each, content)
    return buffer.getvalue()


def png_chunk(kind, body):
    """Write a chunk of a PNG file."""
    return len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4)


def _png(rng, data):
    """Damage a chunk's content, and write it with a checksum that fits."""
    chunks, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    chosen = rng.integers(len(chunks))
    kind, body = chunks[chosen]
    if kind == b"IDAT" and rng.random() < 0.5:
        body = zlib.compress(mutate(rng, zlib.decompress(body), ""))
    else:
        body = mutate(rng, body, "")
    chunks[chosen] = kind, body
    return data[:8] + b"".join(png_chunk(*chunk) for chunk in chunks)


def _sqlite(rng, data):
    """Put an odd value into a column, whatever the schema says to it."""
    with tempfile.NamedTemporaryFile(suffix=".sqlite") as file:
        file.write(data)
        file.flush()
        database = sqlite3.connect(file.name, isolation_level=None)
        database.execute("PRAGMA journal_mode = DELETE")
        for setting in ("foreign_keys = OFF", "ignore_check_constraints = ON"):
            database.execute(f"PRAGMA {setting}")
        query = "SELECT name, sql FROM sqlite_master WHERE type = ?"
        triggers = database.execute(query, ("trigger",)).fetchall()
        tables = [name for name, _ in database.execute(query, ("table",))]
        for name, _ in triggers:
            database.execute(f"DROP TRIGGER {name}")
        _change_row(rng, database, tables[rng.integers(len(tables))])
        for _, sql in triggers:
            database.execute(sql)
        database.execute("PRAGMA journal_mode = WAL")
        database.close()
        file.seek(0)
        with open(file.name, "rb") as changed:
            return changed.read()


def _change_row(rng, database, table):
    columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
    odd = (None, 0, -1, 1, 2**62, 0.5, float("inf"), "", "text", "[" * 100_000, "{", b"", b"\xff",
           rng.bytes(8), b"\0" * 9)  # fmt: skip
    column, value = columns[rng.integers(len(columns))], odd[rng.integers(len(odd))]
    try:
        if rng.random() < 0.3:  # text that is no UTF-8
            value = "CAST(x'ff80fe' AS TEXT)"
            database.execute(f"UPDATE {table} SET {column} = {value}")
        else:
            database.execute(f"UPDATE {table} SET {column} = ?", (value,))
    except (sqlite3.Error, OverflowError):  # a value that no table can hold: one less mutant
        database.execute(f"DELETE FROM {table}")
