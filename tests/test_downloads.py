"""Weight files: found, fetched, checked; and what is said where they are not there."""

import hashlib

import pytest

from lfp_jax.errors import UserError
from lfp_jax.weights import downloads

CONTENT = bytes(range(256)) * 20


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("LFP_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A published file 'net' at an address that needs no network."""
    source = tmp_path / "source.pth"
    source.write_bytes(CONTENT)
    digest = hashlib.sha256(CONTENT).hexdigest()
    entry = downloads.File("net.pth", source.as_uri(), len(CONTENT), digest, "MIT")
    monkeypatch.setitem(downloads.FILES, "net", entry)
    return source


def test_a_download_is_whole_checked_and_shown(cache, published, capsys):
    path = downloads.locate("net", download=True)
    assert path == str(cache / "net.pth")
    assert (cache / "net.pth").read_bytes() == CONTENT
    assert f"net: {len(CONTENT)}/{len(CONTENT)} bytes" in capsys.readouterr().err
    published.unlink()
    assert downloads.locate("net") == path  # the cache needs no source
    assert [file.name for file in cache.iterdir()] == ["net.pth"]


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[::-1], CONTENT * 1000])
def test_another_file_at_the_address_is_not_kept(cache, published, content):
    published.write_bytes(content)
    with pytest.raises(
        UserError, match="is not the published file: its SHA-256 is .*nothing was kept"
    ):
        downloads.locate("net", download=True)
    assert list(cache.iterdir()) == []


def test_without_network_it_says_which_file_to_put_where(cache, published):
    published.unlink()
    with pytest.raises(UserError) as caught:
        downloads.locate("net", download=True)
    message = str(caught.value)
    assert published.as_uri() in message
    assert f"put that file at '{cache / 'net.pth'}'" in message
    assert "\n" not in message
    assert list(cache.iterdir()) == []


def test_nothing_is_fetched_unasked(cache, published):
    with pytest.raises(UserError, match="put file:.*source.pth at '.*net.pth', give a path, or"):
        downloads.locate("net")
    assert not cache.exists()


def test_a_damaged_file_in_the_cache_is_said(cache, published):
    cache.mkdir()
    (cache / "net.pth").write_bytes(b"half")
    with pytest.raises(UserError, match="'.*net.pth' is not the published file.*Delete it"):
        downloads.locate("net", download=True)


def test_a_path_wins_and_may_be_another_file(cache, published, tmp_path):
    own = tmp_path / "own.pth"
    with pytest.raises(UserError, match=r"No such file: '.*own.pth' \(net\)"):
        downloads.locate("net", path=own)
    own.write_bytes(b"trained here")
    assert downloads.locate("net", path=own) == str(own)


def test_unknown_names_and_the_table():
    with pytest.raises(UserError, match="Did you mean 'fid-inception'"):
        downloads.locate("fid-incepton")
    for file in downloads.FILES.values():
        assert len(bytes.fromhex(file.sha256)) == 32
        assert file.address.startswith("https://")
        assert file.size > 0
        assert file.licence
