"""What a command line names: files, URLs and stdin, and which frames of them. Checked early."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vidlm.errors import InvalidArgument, MediaLimitError, MediaNotFound

if TYPE_CHECKING:
    from vidlm.cli.options import Chooses

STDIN = "-"
SAVED = ".safetensors"  # what the names of videos that `vidlm index` saved end with
NEED_A_NUMBER = ("linspace", "slowfast")  # which is 8 unless given


def check_sources(sources: Sequence[str]) -> None:
    """Raises MediaError or InvalidArgument where there is nothing to open.

    URLs are not tried, and neither are pipes, as `<(command)`: they can be read only once.
    """
    from vidlm.media.source import is_pipe, is_url

    if sources.count(STDIN) > 1:
        raise InvalidArgument("- is stdin, which holds one video; give it once")
    for source in sources:
        if source == STDIN:
            _check_stdin()
        elif "://" not in source and not is_url(source) and not is_pipe(source):
            _check_file(source, alone=len(sources) == 1)


def chosen_frames(given: Chooses) -> dict[str, Any]:
    """Which frames, as keywords of load_video, without what was not given.

    Raises InvalidArgument where the choice makes no sense whatever the video.
    """
    from vidlm.media import FramePolicy

    rule = given.sampling or "uniform"
    if given.frames is not None and given.fps is not None and rule == "uniform":
        raise InvalidArgument(
            f"--frames {given.frames} and --fps {given.fps:g} exclude each other; give one"
        )
    keywords: dict[str, Any] = {
        "num_frames": given.frames,
        **{name: getattr(given, name) for name in ("fps", "start", "end", "sampling")},
        "times": given.times.split(",") if given.times is not None else None,
        "indices": _numbers(given.indices) if given.indices is not None else None,
    }
    keywords = {name: value for name, value in keywords.items() if value is not None}
    FramePolicy(**{"num_frames": 8, **keywords} if rule in NEED_A_NUMBER else keywords)
    return keywords


def _numbers(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError as error:
        raise InvalidArgument(
            f"--indices {text!r} are not numbers of frames; give them as --indices 0,25,50"
        ) from error


def is_saved(source: str) -> bool:
    return source.endswith(SAVED)


def read(source: str) -> str | bytes:
    """The source as the library takes it: stdin and pipes as their bytes, all else by name.

    Raises MediaLimitError for more bytes than a FetchPolicy lets through.
    """
    from vidlm.media.source import is_pipe, opened

    if source == STDIN:
        return _stdin()
    if not is_pipe(source):
        return source
    with opened(source) as (file, _):
        return file.read()


def _stdin() -> bytes:
    from vidlm.media.fetch import MAX_BYTES

    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise MediaLimitError(
            f"stdin: more than {MAX_BYTES} bytes; save it to a file and give the path"
        )
    return data


def _check_stdin() -> None:
    if sys.stdin.isatty():
        raise InvalidArgument("- is stdin, and nothing is piped into it: vidlm ... - < clip.mp4")


def _check_file(source: str, alone: bool) -> None:
    from vidlm.media.source import opened

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
