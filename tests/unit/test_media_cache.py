"""The cache of downloads: what is kept, that it is confirmed before use, and what it survives."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidlm.errors import InvalidArgument, MediaFetchError, MediaLimitError
from vidlm.media import cache as module
from vidlm.media.cache import MediaCache
from vidlm.media.fetch import FetchPolicy, fetch
from web import BODY, Web, serve

DATE = "Wed, 21 Oct 2015 07:28:00 GMT"
TAG = {"ETag": '"one"'}


@pytest.fixture(scope="module")
def server() -> Iterator[Web]:
    with serve() as server:
        yield server


@pytest.fixture
def web(server: Web) -> Web:
    return server.forget()


@pytest.fixture
def cache(tmp_path: Path) -> MediaCache:
    return MediaCache(tmp_path / "cache", 10**6)


def get(web: Web, name: str, cache: MediaCache, **rules: object) -> bytes:
    policy = FetchPolicy(allow_private=True, cache=cache, **rules)  # type: ignore[arg-type]
    return fetch(f"{web.url}/{name}", policy=policy)


def files(cache: MediaCache, kind: str = "blobs") -> dict[str, Path]:
    return {path.name: path for path in Path(cache.folder, kind).iterdir()}


def name_of(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


# ---- asking again ----------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [TAG, {"Last_Modified": DATE}, {**TAG, "Last_Modified": DATE}])
def test_what_has_not_changed_is_not_sent_again(web: Web, cache: MediaCache, fields) -> None:
    web.pages["a"] = BODY, fields
    for _ in range(3):
        assert get(web, "page/a", cache) == BODY
    assert web.sent == [200, 304, 304]
    _, headers = web.seen[-1]
    asked = headers.get("If-None-Match"), headers.get("If-Modified-Since")
    assert asked == (fields.get("ETag"), fields.get("Last_Modified"))


def test_what_has_changed_is_sent_and_kept(web: Web, cache: MediaCache) -> None:
    web.pages["a"] = BODY, TAG
    get(web, "page/a", cache)
    web.pages["a"] = b"new", {"ETag": 'W/"two"'}
    assert [get(web, "page/a", cache) for _ in range(2)] == [b"new", b"new"]
    assert web.sent == [200, 200, 304]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"ETag": '"two"', "Cache_Control": "private, No-Store"},
        {"ETag": '"' + "x" * 300 + '"'},
        {"ETag": '"a\r\n X-Evil: 1"'},
        {"ETag": '"ä"'},
    ],
)
def test_what_cannot_be_asked_about_is_not_kept(web: Web, cache: MediaCache, fields) -> None:
    web.pages["a"] = b"old", TAG
    assert get(web, "page/a", cache) == b"old"
    web.pages["a"] = BODY, fields
    assert [get(web, "page/a", cache) for _ in range(2)] == [BODY, BODY]
    assert web.sent == [200, 200, 200]
    assert "If-None-Match" not in web.seen[2][1]
    assert name_of(BODY) not in files(cache)
    assert not files(cache, "urls")


def test_a_server_that_is_gone_gives_nothing_old(cache: MediaCache) -> None:
    with serve() as web:
        web.pages["a"] = BODY, TAG
        get(web, "page/a", cache)
    with pytest.raises(MediaFetchError, match="the transfer failed"):
        get(web, "page/a", cache)


def test_the_rules_hold_for_what_is_kept(web: Web, cache: MediaCache) -> None:
    web.pages["a"] = BODY, TAG
    url = f"{web.url}/page/a"
    get(web, "page/a", cache)
    for rules in ({"hosts": ("other.example",)}, {"allow_private": False}):
        with pytest.raises(MediaFetchError):
            fetch(url, policy=FetchPolicy(**{"allow_private": True, "cache": cache, **rules}))
    assert web.sent == [200]


def test_an_answer_behind_a_redirect_is_kept_where_it_is(web: Web, cache: MediaCache) -> None:
    web.pages["a"] = BODY, TAG
    for _ in range(2):
        assert get(web, "to/_page_a", cache) == BODY
    assert get(web, "page/a#fragment", cache) == BODY
    assert web.sent == [302, 200, 302, 304, 304]
    assert "If-None-Match" not in web.seen[2][1]


def test_a_304_that_was_not_asked_for_is_refused(web: Web, cache: MediaCache) -> None:
    with pytest.raises(MediaFetchError, match="answered 304 Not Modified"):
        get(web, "unasked", cache)


def test_a_smaller_limit_holds_for_what_is_kept(web: Web, cache: MediaCache) -> None:
    web.pages["a"] = BODY, TAG
    get(web, "page/a", cache)
    with pytest.raises(MediaLimitError, match="more than the limit of 100 bytes"):
        get(web, "page/a", cache, max_bytes=100)
    web.pages["a"] = b"small now", TAG
    assert get(web, "page/a", cache, max_bytes=100) == b"small now"


# ---- what lies in the folder -----------------------------------------------------------------


def test_no_url_is_written_down(web: Web, cache: MediaCache) -> None:
    web.pages["a"] = web.pages["b"] = BODY, TAG
    get(web, "page/a?token=hush", cache)
    get(web, "page/b", cache)
    assert list(files(cache)) == [name_of(BODY)]
    assert len(files(cache, "urls")) == 2
    for path in files(cache, "urls").values():
        text = f"{path} {path.read_text()}"
        assert "hush" not in text
        assert "page" not in text
        assert json.loads(path.read_text()) == {
            **{"blob": name_of(BODY), "etag": '"one"', "modified": ""}
        }


def test_the_folder_is_its_owners_alone(web: Web, cache: MediaCache) -> None:
    web.pages["a"] = BODY, TAG
    get(web, "page/a", cache)
    folder = Path(cache.folder)
    for path in (folder, folder / "blobs", folder / "urls"):
        assert path.stat().st_mode & 0o777 == 0o700
    for path in (*files(cache).values(), *files(cache, "urls").values()):
        assert path.stat().st_mode & 0o777 == 0o600
    assert MediaCache(str(folder), 10**6) == cache


def test_folders_that_will_not_do(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o750)
    with pytest.raises(InvalidArgument, match=r"others may enter it, .*`chmod 700` it"):
        MediaCache(tmp_path / "open", 1)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InvalidArgument, match="no cache can be kept there"):
        MediaCache(tmp_path / "file", 1)
    with pytest.raises(InvalidArgument, match="a cache of 0 bytes"):
        MediaCache(tmp_path / "new", 0)
    assert not (tmp_path / "new").exists()


# ---- how much --------------------------------------------------------------------------------


def fill(cache: MediaCache, *names: str, size: int = 300) -> None:
    """Contents of `size` bytes, used in this order, a second apart, a while ago."""
    for used, name in enumerate(names, 1000):
        cache.store(name, body(name, size), '"tag"', "")
        paths = (
            files(cache)[name_of(body(name, size))],
            files(cache, "urls")[name_of(name.encode())],
        )
        for path in paths:
            os.utime(path, (used, used))


def body(name: str, size: int = 300) -> bytes:
    return name.encode() * size


def kept(cache: MediaCache, *names: str) -> str:
    return "".join(name for name in names if name_of(body(name)) in files(cache))


def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    cache = MediaCache(tmp_path / "cache", 1000)
    fill(cache, "a", "b", "c")
    entry = cache.find("a")
    assert entry is not None
    assert cache.read(entry) == body("a")
    cache.store("d", body("d"), '"tag"', "")
    assert kept(cache, *"abcd") == "acd"
    assert cache.find("b") is None
    cache.store("e", b"e" * 1000, '"tag"', "")
    assert list(files(cache)) == [name_of(b"e" * 1000)]


def test_what_is_too_large_is_not_kept(web: Web, tmp_path: Path) -> None:
    cache = MediaCache(tmp_path / "cache", len(BODY) - 1)
    web.pages["a"] = BODY, TAG
    fill(cache, "b")
    assert [get(web, "page/a", cache) for _ in range(2)] == [BODY, BODY]
    assert web.sent == [200, 200]
    assert kept(cache, "b") == "b"


def test_storing_the_same_again_costs_nothing_else(tmp_path: Path) -> None:
    cache = MediaCache(tmp_path / "cache", 650)
    fill(cache, "a", "b")
    cache.store("other", body("b"), '"tag"', "")
    assert kept(cache, *"ab") == "ab"


def test_small_files_are_counted_too(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_MAX_FILES", 3)
    cache = MediaCache(tmp_path / "cache", 10**6)
    fill(cache, *"abcdef")
    assert kept(cache, *"abcdef") == "def"
    assert len(files(cache, "urls")) == 3


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 120)), max_size=20))
def test_the_limit_holds_whatever_comes(stored: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache = MediaCache(folder, 100)
        for name, size in stored:
            cache.store(name, body(name, size), '"tag"', "")
            assert sum(path.stat().st_size for path in files(cache).values()) <= 100
            entry = cache.find(name)
            assert (entry and cache.read(entry)) == (body(name, size) if size <= 100 else None)


# ---- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [b"", BODY[:-1], BODY + b"x", b"x" + BODY[1:]])
def test_a_damaged_content_is_fetched_again(web: Web, cache: MediaCache, damage, caplog) -> None:
    web.pages["a"] = BODY, TAG
    get(web, "page/a", cache)
    files(cache)[name_of(BODY)].write_bytes(damage)
    assert [get(web, "page/a", cache) for _ in range(2)] == [BODY, BODY]
    assert web.sent == [200, 304, 200, 304]
    assert "damaged, dropped from the cache" in caplog.text


def test_a_damaged_content_is_dropped(cache: MediaCache) -> None:
    cache.store("a", BODY, '"tag"', "")
    entry = cache.find("a")
    files(cache)[name_of(BODY)].write_bytes(b"other")
    assert entry is not None
    assert cache.read(entry) is None
    assert not files(cache)
    assert cache.find("a") is None


def test_a_lost_content_is_fetched_again(web: Web, cache: MediaCache) -> None:
    web.pages["a"] = BODY, TAG
    get(web, "page/a", cache)
    files(cache)[name_of(BODY)].unlink()
    assert [get(web, "page/a", cache) for _ in range(2)] == [BODY, BODY]
    assert web.sent == [200, 200, 304]


RECORD = {"blob": name_of(BODY), "etag": '"one"', "modified": ""}


@pytest.mark.parametrize(
    "record",
    [
        *(b"", b'{"blob": "', b"\xff\xfe", b"[]", b"{}"),
        {**RECORD, "blob": "../urls/" + "0" * 56},
        {**RECORD, "blob": None},
        {**RECORD, "etag": 1},
        {**RECORD, "etag": '"a"\r\nX-Evil: 1'},
        {**RECORD, "modified": "x" * 300},
        {**RECORD, "more": ""},
    ],
)
def test_a_damaged_record_counts_as_none(web: Web, cache: MediaCache, record) -> None:
    web.pages["a"] = BODY, TAG
    get(web, "page/a", cache)
    (path,) = files(cache, "urls").values()
    path.write_bytes(record if isinstance(record, bytes) else json.dumps(record).encode())
    assert [get(web, "page/a", cache) for _ in range(2)] == [BODY, BODY]
    assert web.sent == [200, 200, 304]


def test_a_damaged_record_leads_out_of_no_folder(web: Web, cache: MediaCache) -> None:
    web.pages["a"] = BODY, TAG
    get(web, "page/a", cache)
    other = Path(cache.folder).with_name("other.mp4")
    other.write_bytes(b"would be dropped as damaged")
    (path,) = files(cache, "urls").values()
    path.write_text(json.dumps({**RECORD, "blob": "../../other.mp4"}))
    assert get(web, "page/a", cache) == BODY
    assert other.exists()


@pytest.mark.parametrize("broken", ["write_bytes", "replace"])
def test_a_disk_that_refuses_costs_no_download(
    web: Web, cache: MediaCache, broken: str, monkeypatch, caplog
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os if broken == "replace" else Path, broken, refuse)
    web.pages["a"] = BODY, TAG
    assert get(web, "page/a", cache) == BODY
    assert "could not be cached (No space left on device)" in caplog.text
    assert files(cache) == files(cache, "urls") == {}


def test_what_a_crash_left_behind_goes_in_time(tmp_path: Path) -> None:
    cache = MediaCache(tmp_path / "cache", 1000)
    left = Path(cache.folder, "blobs", "tmp12345")
    left.write_bytes(b"x" * 600)
    os.utime(left, (0, 0))
    fill(cache, "a", "b")
    assert not left.exists()
    assert kept(cache, *"ab") == "ab"


# ---- many at once ----------------------------------------------------------------------------


def test_threads_that_fetch_the_same(web: Web, cache: MediaCache) -> None:
    web.pages["a"] = BODY, TAG
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: get(web, "page/a", cache), range(8))) == {BODY}
    assert list(files(cache)) == [name_of(BODY)]
    assert get(web, "page/a", cache) == BODY
    assert web.sent[-1] == 304


def test_threads_that_crowd_each_other_out(tmp_path: Path, caplog) -> None:
    """Each with its own view of one small folder, as processes have."""

    def work(seed: int) -> int:
        cache, hits = MediaCache(tmp_path / "cache", 1000), 0
        for turn in range(40):
            name = "abcdefg"[(seed * turn) % 7]
            entry = cache.find(name)
            found = entry and cache.read(entry)
            assert found in (None, body(name))
            hits += found is not None
            cache.store(name, body(name), '"tag"', "")
        return hits

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(1, 5))) > 0
    assert "damaged" not in caplog.text
    cache = MediaCache(tmp_path / "cache", 1000)
    cache.store("last", body("z"), '"tag"', "")
    assert sum(path.stat().st_size for path in files(cache).values()) <= 1000
