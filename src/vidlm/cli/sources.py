"""What a command line names: files, URLs and stdin, and which frames of them. Checked early."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vidlm.errors import InvalidArgument, MediaNotFound

STDIN = "-"


def check_sources(sources: Sequence[str]) -> None:
    """Raises MediaError or InvalidArgument where there is nothing to open; URLs are not tried."""
    if sources.count(STDIN) > 1:
        raise InvalidArgument("- is stdin, which holds one video; give it once")
    for source in sources:
        if source == STDIN:
            _check_stdin()
        elif "://" not in source and source[:5].lower() != "data:":
            _check_file(source, alone=len(sources) == 1)


def check_frames(frames: int | None, fps: float | None, start: str | None, end: str | None) -> None:
    """Raises InvalidArgument where the choice of frames makes no sense whatever the video."""
    from vidlm.media import FramePolicy

    if frames is not None and fps is not None:
        raise InvalidArgument(f"--frames {frames} and --fps {fps:g} exclude each other; give one")
    FramePolicy(frames, fps, None, start, end)


def read(source: str) -> str | bytes:
    """The source as the library takes it: stdin as its bytes, all else by name."""
    return sys.stdin.buffer.read() if source == STDIN else source


def _check_stdin() -> None:
    if sys.stdin.isatty():
        raise InvalidArgument("- is stdin, and nothing is piped into it: vidlm ... - < clip.mp4")


def _check_file(source: str, alone: bool) -> None:
    from vidlm.media.video import opened

    try:
        with opened(source):
            return
    except MediaNotFound as error:
        if alone or "." in source:
            raise
        raise InvalidArgument(
            f"{source!r}: there is no such file; if it is a word of the question, put the whole "
            'question in quotes: vidlm ask clip.mp4 "What happens?"'
        ) from error
