"""Where frames come from: a path, URL, bytes, pipe or file as a seekable binary file."""

from __future__ import annotations

import io
import os
import re
import select
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from numpy.typing import NDArray

from vidlm.errors import InvalidArgument, MediaError, MediaLimitError, MediaNotFound
from vidlm.media.fetch import (
    DEFAULT_POLICY,
    FetchPolicy,
    check_local,
    fetch,
    local_path,
)
from vidlm.media.http import too_large
from vidlm.media.stills import Still

Source = str | Path | bytes | BinaryIO | Sequence[Still] | NDArray[Any]

_URL = re.compile(r"(?:https?|file):/|data:", re.IGNORECASE)
_OTHER_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_LONGEST_PATH = 4096
_CHUNK = 1 << 20


@contextmanager
def opened(source: Source, access: FetchPolicy = DEFAULT_POLICY) -> Iterator[tuple[BinaryIO, str]]:
    """The source as a seekable binary file, and a name for messages."""
    if isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(source), "video"
    elif hasattr(source, "read"):
        yield _seekable(source, access), _file_name(source)
    elif isinstance(source, str) and is_url(source) and not _is_file_url(source):
        yield io.BytesIO(fetch(source, policy=access)), _url_name(source)
    elif isinstance(source, str | Path):
        path = _path(source)
        real = check_local(path, access)
        with _open(real) if not is_pipe(real) else io.BytesIO(_drained(real, access)) as file:
            yield file, path.name
    else:
        raise InvalidArgument(
            f"a {type(source).__name__} is no video; give a path, a URL, bytes, a binary file, "
            "a list of images, or a uint8 array (F, H, W, 3)"
        )


def is_url(source: str) -> bool:
    """Whether a text is a URL to fetch, and not a file of an odd name, as "data:1.mp4"."""
    match = _URL.match(source)
    if match is None:
        return False
    is_name = len(source) <= _LONGEST_PATH and not source.startswith("//", match.end() - 1)
    return not (is_name and "\0" not in source and os.path.lexists(source))


def is_pipe(source: str | Path) -> bool:
    """Whether a path is a pipe, as `<(command)` of a shell, which can be read only once."""
    try:
        return stat.S_ISFIFO(os.stat(source).st_mode)
    except (OSError, ValueError):
        return False


def _is_file_url(source: str) -> bool:
    return source[:5].lower() == "file:"


def _path(source: str | Path) -> Path:
    if isinstance(source, Path):
        return source
    if _is_file_url(source) and is_url(source):
        return local_path(source)
    scheme = _OTHER_URL.match(source)
    if scheme:
        raise InvalidArgument(
            f"{scheme[0]} is not fetched; give http://, https://, file:// or data:, "
            "or download the video and give its path or bytes"
        )
    if not source:
        raise InvalidArgument("an empty path names no video; give a path, a URL or bytes")
    return Path(source)


def _open(path: Path) -> BinaryIO:
    if os.path.isdir(path):
        raise MediaError(f"{path} is a folder; give the path of one file in it")
    if os.path.exists(path) and not os.path.isfile(path):  # a device may never end
        raise MediaError(
            f"{path} is no regular file and no pipe; read it yourself and give its bytes"
        )
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise MediaNotFound(
            f"{path}: there is no such file (looked in {path.absolute().parent}); "
            "check the spelling, or give an absolute path"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{path}: cannot be opened ({reason}); give a readable file") from error


def _drained(path: Path, access: FetchPolicy) -> bytes:
    """What comes out of a pipe until its writers close it."""
    data = io.BytesIO()
    waiter = select.poll() if hasattr(select, "poll") else None
    try:
        # Without O_NONBLOCK, opening waits for a writer, and for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            if waiter is not None:
                waiter.register(descriptor, select.POLLIN)
            while data.tell() <= access.max_bytes:
                if waiter is not None and not waiter.poll(access.timeout * 1000):
                    raise MediaError(
                        f"{path}: a pipe into which nobody wrote for {access.timeout:g} s; check "
                        "the command that should, or save its output to a file first"
                    )
                chunk = os.read(descriptor, _CHUNK)
                if not chunk:
                    return data.getvalue()
                data.write(chunk)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise MediaError(f"{path}: cannot be read ({error.strerror}); check the pipe") from error
    raise too_large(str(path), access.max_bytes)


def _seekable(file: Any, access: FetchPolicy) -> BinaryIO:
    """The file itself, or its contents where it only reads forward (a pipe, a socket)."""
    if isinstance(file, io.TextIOBase):
        raise InvalidArgument("the file is open for text; open it for bytes: open(path, 'rb')")
    if getattr(file, "closed", False):
        raise InvalidArgument("the file is closed; open it again, or give its path")
    seekable = getattr(file, "seekable", None)
    if hasattr(file, "seek") and hasattr(file, "tell") and (seekable is None or seekable()):
        return file  # type: ignore[no-any-return]
    data = file.read(access.max_bytes + 1)
    if len(data) > access.max_bytes:
        raise MediaLimitError(
            f"a stream of more than {access.max_bytes} bytes that cannot seek; save it to a file "
            "first, or raise FetchPolicy.max_bytes"
        )
    return io.BytesIO(data)


def _file_name(file: Any) -> str:
    name = getattr(file, "name", None)
    return Path(name).name if isinstance(name, str) else "video"


def _url_name(url: str) -> str:
    if url[:5].lower() == "data:":
        return "data URL"
    parts = urlsplit(url)
    return Path(parts.path).name or parts.hostname or "video"
