"""Fetching without a network: file and data URLs, which files may be read, and the rules."""

from __future__ import annotations

import base64
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidlm.errors import InvalidArgument, MediaFetchError, MediaLimitError, MediaNotFound
from vidlm.media import fetch as module
from vidlm.media.fetch import FetchPolicy, check_local, fetch, local_path

BODY = bytes(range(256)) * 40


def get(url: str, **rules: object) -> bytes:
    return fetch(url, policy=FetchPolicy(**rules))  # type: ignore[arg-type]


# ---- file URLs -------------------------------------------------------------------------------


def test_a_file_url_names_a_file_of_this_machine(tmp_path: Path) -> None:
    file = tmp_path / "a b#é.mp4"
    file.write_bytes(BODY)
    assert local_path(file.as_uri()) == file
    assert fetch(file.as_uri()) == BODY
    assert get(file.as_uri().replace("file://", "FILE://localhost"), max_bytes=len(BODY)) == BODY
    with pytest.raises(MediaLimitError, match="more than the limit of 100 bytes"):
        get(file.as_uri(), max_bytes=100)
    with pytest.raises(MediaNotFound, match="there is no such file"):
        fetch((tmp_path / "gone").as_uri())
    with pytest.raises(MediaFetchError, match="cannot be read"):
        fetch(tmp_path.as_uri())
    with pytest.raises(MediaFetchError, match="9000 characters, at most 8192"):
        fetch("file:///" + "a" * 8992)


def test_a_name_that_is_no_utf8_comes_back(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    try:
        file.write_bytes(BODY)
    except OSError:
        pytest.skip("names are UTF-8 here")
    assert fetch(file.as_uri()) == BODY


def test_a_pipe_or_device_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(MediaFetchError, match="is no regular file"):
            fetch(path.as_uri())


@pytest.mark.parametrize(
    "url",
    [
        *("file://server/share/a.mp4", "file://user:pw@host/a", "file://[", "file://"),
        *("file:///a%00b", "file:///a\nb", "file:///et\tc/passwd", "file:///\ud800"),
    ],
)
def test_other_file_urls_are_refused(url: str) -> None:
    with pytest.raises(MediaFetchError, match=r"file URL|control character") as caught:
        fetch(url)
    assert "pw" not in str(caught.value)


# ---- which files -----------------------------------------------------------------------------


@pytest.fixture
def yard(tmp_path: Path) -> Path:
    """open/ may be read; beside it lie files that may not, and links that lead to them."""
    for name in ("open/in.mp4", "open/sub/deep.mp4", "opening/out.mp4", "out.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(name.encode())
    open_ = tmp_path / "open"
    (open_ / "leak.mp4").symlink_to(tmp_path / "out.mp4")
    (open_ / "leaks").symlink_to(tmp_path, target_is_directory=True)
    (open_ / "dangling.mp4").symlink_to(tmp_path / "gone.mp4")
    (open_ / "loop.mp4").symlink_to(open_ / "loop.mp4")
    (open_ / "same.mp4").symlink_to(Path("sub", "deep.mp4"))
    (tmp_path / "way").symlink_to(open_, target_is_directory=True)
    return tmp_path


INSIDE = {
    "open/in.mp4": "open/in.mp4",
    "open/../open/sub/deep.mp4": "open/sub/deep.mp4",
    "open/same.mp4": "open/sub/deep.mp4",
    "way/in.mp4": "open/in.mp4",
    "open/leaks/open/in.mp4": "open/in.mp4",
}
OUTSIDE = [
    *("out.mp4", "opening/out.mp4", "open/../out.mp4", "open/sub/../../out.mp4", "open/leak.mp4"),
    *("open/leaks/out.mp4", "open/leaks/open/../out.mp4", "open/dangling.mp4", "gone.mp4"),
    *("open/gone/../../out.mp4", ".", "way/../out.mp4", "open\0/in.mp4", "a" * 70_000, "\ud800"),
]


@pytest.mark.parametrize(("name", "real"), INSIDE.items())
def test_files_inside_are_read(yard: Path, name: str, real: str) -> None:
    for folder in ("open", "way", "open/../open/"):
        policy = FetchPolicy(folders=(yard / "opening", yard / folder))
        assert check_local(f"{yard}/{name}", policy) == (yard / real).resolve()
        assert fetch(f"file://{yard}/{name}", policy=policy) == real.encode()
        assert fetch(f"file://{yard}/{name.replace('.', '%2e')}", policy=policy) == real.encode()


@pytest.mark.parametrize("name", OUTSIDE)
def test_files_outside_are_refused_alike(yard: Path, name: str) -> None:
    """The message tells what is allowed, and nothing of the file: not even whether it exists."""
    policy = FetchPolicy(folders=(str(yard / "open"), yard / "open" / "sub"))
    allowed = f"{yard.resolve()}/open, {yard.resolve()}/open/sub"
    said = "a local file outside the folders that may be read; put it into one of them "
    said += f"({allowed}), or send the file itself"
    with pytest.raises(MediaFetchError) as caught:
        check_local(f"{yard}/{name}", policy)
    assert str(caught.value) == said
    if name.isprintable() and len(name) < 100:
        for url in (f"file://{yard}/{name}", f"file://{yard}/{name.replace('.', '%2E')}"):
            with pytest.raises(MediaFetchError) as caught:
                fetch(url, policy=policy)
            assert str(caught.value) == said


def test_relative_paths_count_from_here(yard: Path, monkeypatch) -> None:
    monkeypatch.chdir(yard / "open")
    policy = FetchPolicy(folders=(".",))
    monkeypatch.chdir(yard / "open" / "sub")
    assert check_local("deep.mp4", policy) == (yard / "open/sub/deep.mp4").resolve()
    assert check_local("../in.mp4", policy) == (yard / "open/in.mp4").resolve()
    with pytest.raises(MediaFetchError, match="outside the folders"):
        check_local("../../out.mp4", policy)


def test_what_is_not_there_inside_says_so(yard: Path) -> None:
    policy = FetchPolicy(folders=(yard / "open",))
    with pytest.raises(MediaNotFound, match="there is no such file"):
        fetch((yard / "open" / "gone.mp4").as_uri(), policy=policy)
    with pytest.raises(MediaFetchError, match="cannot be read"):
        fetch((yard / "open" / "loop.mp4").as_uri(), policy=policy)


def test_no_folder_is_no_local_file(yard: Path) -> None:
    policy = FetchPolicy(folders=())
    for path in (yard / "open" / "in.mp4", yard / "gone.mp4", Path("/")):
        with pytest.raises(MediaFetchError, match="local files are not read here"):
            fetch(path.as_uri(), policy=policy)
        with pytest.raises(MediaFetchError, match="local files are not read here"):
            check_local(path, policy)


def test_any_path_is_left_as_it_is_where_all_are_allowed() -> None:
    assert check_local("some/../where.mp4", FetchPolicy()) == Path("some/../where.mp4")


# ---- data URLs -------------------------------------------------------------------------------


@given(st.binary(max_size=200), st.booleans())
def test_data_urls_give_back_what_was_put_in(data: bytes, padded: bool) -> None:
    text = base64.b64encode(data).decode()
    assert fetch(f"data:video/mp4;base64,{text if padded else text.rstrip('=')}") == data
    assert fetch(f"DATA:;BASE64,{text.replace('+', '%2B').replace('=', '%3D')}") == data
    assert fetch("data:," + "".join(f"%{byte:02x}" for byte in data)) == data
    wrapped = "\r\n".join(text[i : i + 16] for i in range(0, len(text), 16))
    assert get(f"data:video/mp4;base64,{wrapped}", max_bytes=len(data)) == data


@given(st.binary(max_size=60), st.integers(3, 9), st.text("ab%4", max_size=4))
def test_percent_decoding_in_pieces(data: bytes, piece: int, rest: str) -> None:
    """Escapes and what only looks like one, across the ends of pieces."""
    text = "".join(f"%{b:02X}" if b % 3 else "%" if b % 2 else chr(97 + b % 26) for b in data)
    with pytest.MonkeyPatch.context() as patch:
        expected = fetch(f"data:,{text}{rest}")
        patch.setattr(module, "_CHUNK", piece)
        assert fetch(f"data:,{text}{rest}") == expected


def test_data_urls_are_measured_before_they_are_decoded(monkeypatch) -> None:
    monkeypatch.setattr(base64, "b64decode", None)  # would be called
    with pytest.raises(MediaLimitError, match="data URL: more than the limit of 10 bytes"):
        get("data:;base64," + base64.b64encode(b"x" * 11).decode(), max_bytes=10)


class Unread(str):
    """A string that is too long to be gone through or copied."""

    def refuse(self, *args: object) -> None:
        raise AssertionError("gone through")

    partition = encode = translate = __iter__ = __contains__ = refuse  # type: ignore[assignment]


@pytest.mark.parametrize("filler", ["A", "=", " ", "%41", "%0A", ",", ";base64,", "é"])
def test_bombs_are_measured_before_they_are_read(filler: str) -> None:
    for head in ("data:;base64,", "data:,", "data:"):
        with pytest.raises(MediaLimitError, match="data URL: more than the limit of 1000 bytes"):
            get(Unread(head + filler * 10_000), max_bytes=1000)


@pytest.mark.parametrize("head", ["data:;base64,", "data:,"])
def test_escapes_do_not_multiply_in_memory(head: str) -> None:
    url = head + "%41" * 400_000
    tracemalloc.start()
    try:
        assert len(fetch(url)) in (300_000, 400_000)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("data:video/mp4;base64", "without a comma"),
        ("data:video/mp4;base64,****", "data URL that is damaged"),
        ("data:video/mp4;base64,QQ=A", "data URL that is damaged"),
        ("data:video/mp4;base64,QQé=", "data URL that is damaged"),
        ("data:video/mp4;base64,Q", "data URL that is damaged"),
        ("data:video/mp4;base64,\ud800%41", "data URL that is damaged"),
        ("data:,\ud800", "data URL that is damaged"),
    ],
)
def test_damaged_data_urls(url: str, said: str) -> None:
    with pytest.raises(MediaFetchError, match=said):
        fetch(url)


# ---- the rules -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"max_bytes": -1}, "max_bytes=-1; give 0 or more"),
        ({"max_redirects": -1}, "max_redirects=-1; give 0 or more"),
        ({"max_url": -1}, "max_url=-1; give 0 or more"),
        ({"timeout": 0}, "timeout=0; give seconds above 0, at most 86400"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"timeout": float("inf")}, "timeout=inf"),
        ({"hosts": "example.org"}, "hosts is one host; give a tuple"),
        ({"folders": "videos"}, "folders is one folder; give a tuple"),
        ({"folders": Path("videos")}, "folders is one folder; give a tuple"),
        ({"folders": ("no-such-folder",)}, "'no-such-folder' is no folder; make it"),
        *(
            ({"hosts": (host,)}, "is no host name .*give names without scheme, port or path")
            for host in (
                "*",
                "*.",
                "",
                "http://a.b",
                "a.b:80",
                "host:80",
                "a.b/c",
                "a..b",
                "*.*.b",
                "a b",
            )
        ),
    ],
)
def test_rules_that_make_no_sense(rules: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        FetchPolicy(**rules)  # type: ignore[arg-type]


def test_a_policy_is_frozen_and_safe_unless_told() -> None:
    policy = FetchPolicy()
    assert policy == module.DEFAULT_POLICY
    assert (policy.allow_private, policy.max_redirects, policy.cache) == (False, 3, None)
    with pytest.raises(AttributeError):
        policy.allow_private = True  # type: ignore[misc]
