"""Where frames come from: a path, URL, bytes or file as a seekable file; images in a folder."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from numpy.typing import NDArray

from vidlm.errors import InvalidArgument, MediaError, MediaLimitError, MediaNotFound
from vidlm.media.fetch import (
    DEFAULT_POLICY,
    MAX_BYTES,
    FetchPolicy,
    check_local,
    fetch,
    local_path,
)
from vidlm.media.stills import Still

Source = str | Path | bytes | BinaryIO | Sequence[Still] | NDArray[Any]

# What counts as an image in a folder.
PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_URL = re.compile(r"(?:(?:https?|file):/|data:)", re.IGNORECASE)
_SCHEME = re.compile(r"(?:[a-z][a-z0-9+.-]+:/|data:)", re.IGNORECASE)


@contextmanager
def opened(source: Source, access: FetchPolicy = DEFAULT_POLICY) -> Iterator[tuple[BinaryIO, str]]:
    """The source as a seekable binary file, and a name for messages."""
    if isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(source), "video"
    elif hasattr(source, "read"):
        yield _seekable(source), _file_name(source)
    elif isinstance(source, str) and _URL.match(source) and not _is_file_url(source):
        yield io.BytesIO(fetch(source, policy=access)), _url_name(source)
    elif isinstance(source, str | Path):
        path = _path(source)
        with _open(check_local(path, access)) as file:
            yield file, path.name
    else:
        raise InvalidArgument(
            f"a {type(source).__name__} is no video; give a path, a URL, bytes, a binary file, "
            "a list of images, or a uint8 array (F, H, W, 3)"
        )


def _is_file_url(source: str) -> bool:
    return source[:5].lower() == "file:"


def _path(source: str | Path) -> Path:
    if isinstance(source, Path):
        return source
    if _is_file_url(source):
        return local_path(source)
    scheme = re.match(r"[a-z][a-z0-9+.-]+://", source, re.IGNORECASE)
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
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or device may never end
        raise MediaError(f"{path} is no regular file; read it yourself and give its bytes")
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


def _seekable(file: Any) -> BinaryIO:
    """The file itself, or its contents where it only reads forward (a pipe, a socket)."""
    if isinstance(file, io.TextIOBase):
        raise InvalidArgument("the file is open for text; open it for bytes: open(path, 'rb')")
    if getattr(file, "closed", False):
        raise InvalidArgument("the file is closed; open it again, or give its path")
    seekable = getattr(file, "seekable", None)
    if hasattr(file, "seek") and hasattr(file, "tell") and (seekable is None or seekable()):
        return file  # type: ignore[no-any-return]
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise MediaLimitError(
            f"a stream of more than {MAX_BYTES >> 20} MiB that cannot seek; save it to a file first"
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


def pictures(source: Any, access: FetchPolicy) -> list[Path] | None:
    """The images of a folder, or that a pattern such as "frames/*.jpg" names, in the order of the
    numbers in their names; None where the source is neither."""
    if not isinstance(source, str | Path) or (isinstance(source, str) and _SCHEME.match(source)):
        return None
    path, text = Path(source), str(source)
    folder = os.path.isdir(text)
    pattern = is_pattern(text)
    if not folder and not pattern:
        return None
    check_local(path, access)
    if folder:
        found = [each for each in path.iterdir() if each.suffix.lower() in PICTURES]
    else:
        found = [Path(each) for each in glob(text)]
    if not found:
        what = "is a folder without images" if folder else "matches no file"
        raise MediaError(f"{source} {what}; give a video file, or images ({', '.join(PICTURES)})")
    return sorted(found, key=_natural)


def is_pattern(path: str) -> bool:
    """Whether a path that names no file is a pattern such as "frames/*.jpg"."""
    return any(mark in path for mark in "*?[") and not os.path.exists(path)


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key by which frame_2 comes before frame_10."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), part) if part.isdecimal() else (0, part) for part in parts]
