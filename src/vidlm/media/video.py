"""Anything that shows frames in order -> Video: files, bytes, URLs, lists of images, arrays."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vidlm.errors import InvalidArgument, MediaError, MediaLimitError, MediaNotFound
from vidlm.media import decode, stills
from vidlm.media.clip import DEFAULT_LIMITS, Limits, Video
from vidlm.media.fetch import MAX_BYTES, fetch, local_path
from vidlm.media.sample import FramePolicy
from vidlm.media.stills import Still

__all__ = [
    "Limits",
    "Source",
    "Video",
    "load_video",
    "replace_video_with_images",
    "sample_frames",
]

Source = str | Path | bytes | BinaryIO | Sequence[Still] | NDArray[Any]

_URL = re.compile(r"(?:(?:https?|file):/|data:)", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def load_video(
    source: Source,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    start: float | str | None = None,
    end: float | str | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Video:
    """The frames of a video that a policy chooses, as a player shows them.

    source: a path; an http(s), file or data URL; the bytes of a file; a binary file object, read
        from its beginning and left open; a list of PIL images, arrays (H, W, 3) or paths of images;
        an array (F, H, W, 3) RGB or (F, H, W) grey, uint8.
    num_frames: that many, evenly spread; or fps: one every 1/fps seconds; or every frame.
        max_frames caps each of them. start, end: seconds or "mm:ss", frames on screen in between.
        See FramePolicy for the exact rules.
    limits: see Limits.

    Only the chosen frames are held in memory. Rotation, edit lists and non-square pixels are
    applied. A chosen frame that cannot be decoded is left out, logged, and named in
    `Video.warnings`.

    Raises InvalidArgument for a policy or source that makes no sense; MediaNotFound,
    MediaFetchError or MediaError where there is nothing to read; MediaLimitError before too much
    memory is taken.
    """
    policy = FramePolicy(num_frames, fps, max_frames, start, end)
    if isinstance(source, np.ndarray):
        return stills.from_array(source, policy, limits)
    if isinstance(source, list | tuple):
        return stills.from_list(source, policy, limits)
    with opened(source) as (file, name):
        head = _head(file, name)
        if stills.is_webp(head):
            return stills.from_webp(file, name, policy, limits)
        return decode.read(file, name, policy, limits)


def sample_frames(url: str | Path, num_frames: int) -> list[Image.Image]:
    """`num_frames` images evenly spread over a video, fewer where it has fewer.

    The function of this name in Hugging Face's video-text-to-text guide, for a URL or a path; it
    keeps only the chosen frames in memory and writes no file.
    """
    return load_video(url, num_frames=num_frames).images()


def replace_video_with_images(text: str, frames: int) -> str:
    """Each "<video>" of a prompt as `frames` times "<image>", for models that take images only."""
    return text.replace("<video>", "<image>" * frames)


def _head(file: BinaryIO, name: str) -> bytes:
    try:
        file.seek(0)
        head = file.read(12)
    except (OSError, ValueError) as error:  # ValueError: it is closed
        raise MediaError(
            f"{name}: cannot be read ({error}); give an open, readable file"
        ) from error
    if not head:
        raise MediaError(f"{name}: empty, 0 bytes; was the download or copy complete?")
    return head


@contextmanager
def opened(source: Source) -> Iterator[tuple[BinaryIO, str]]:
    """The source as a seekable binary file, and a name for messages."""
    if isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(source), "video"
    elif hasattr(source, "read"):
        yield _seekable(source), _file_name(source)
    elif isinstance(source, str) and _URL.match(source) and not _is_file_url(source):
        yield io.BytesIO(fetch(source)), _url_name(source)
    elif isinstance(source, str | Path):
        path = _path(source)
        with _open(path) as file:
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
    scheme = _SCHEME.match(source)
    if scheme:
        raise InvalidArgument(
            f"{scheme[0]} is not fetched; give http://, https://, file:// or data:, "
            "or download the video and give its path or bytes"
        )
    return Path(source)


def _open(path: Path) -> BinaryIO:
    if os.path.isdir(path):
        raise MediaError(
            f"{path} is a folder; give one video file, or a list of image paths: "
            f"sorted(Path({str(path)!r}).glob('*.jpg'))"
        )
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
