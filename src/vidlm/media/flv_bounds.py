"""What an FLV's list of key frames declares against what its bytes can hold.

Its metadata may list the key frames as two arrays of numbers in AMF, 9 bytes each, after their
count. FFmpeg takes the memory for the count that is declared, wherever the metadata stands.
"""

from __future__ import annotations

from typing import BinaryIO

from vidlm.errors import MediaError
from vidlm.media.clip import Deadline

_LISTS = (b"\0\x0dfilepositions\x0a", b"\0\5times\x0a")  # length, name, type: a strict array
_NUMBER_BYTES = 9
_FREE = 100_000  # numbers that take less than a megabyte
_CHUNK = 1 << 22
_OVERLAP = 64


def check_key_frames(file: BinaryIO, name: str, deadline: Deadline) -> None:
    """Raises MediaError where an FLV declares more key frames than it can hold."""
    try:
        size = file.seek(0, 2) or file.tell()
        file.seek(0)
        at, chunk = 0, file.read(_CHUNK)
        if not chunk.startswith(b"FLV"):
            return
        while chunk:
            deadline.check()
            for marker in _LISTS:
                _check(chunk, at, marker, size, name)
            at += max(len(chunk) - _OVERLAP, 1)
            file.seek(at)
            chunk = file.read(_CHUNK) if at + _OVERLAP < size else b""
    except MediaError:
        raise
    except (OSError, ValueError):  # the reader that comes next says so
        return


def _check(chunk: bytes, at: int, marker: bytes, size: int, name: str) -> None:
    place = chunk.find(marker)
    while place >= 0:
        end = place + len(marker)
        count = int.from_bytes(chunk[end : end + 4], "big")
        if count > _FREE and count * _NUMBER_BYTES > size - at - end:
            raise MediaError(
                f"{name}: its metadata declares {count} key frames in a file of {size} bytes; the "
                "file is damaged or was cut off: get the complete file"
            )
        place = chunk.find(marker, end)
