"""What a command line names: files, folders, URLs and stdin, and which frames of them.

`take` checks each source before a model is loaded: it reads stdin and pipes, downloads URLs once,
and probes every video. The errors are those that the library would raise much later.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidlm.errors import InvalidArgument, MediaLimitError, MediaNotFound

if TYPE_CHECKING:
    from PIL.Image import Image

    from vidlm.cli.options import Chooses, Reads
    from vidlm.cli.progress import Progress
    from vidlm.media import FetchPolicy

STDIN = "-"
SAVED = ".safetensors"  # what the names of videos that `vidlm index` saved end with
NEED_A_NUMBER = ("linspace", "slowfast")  # which is 8 unless given
MANY_IMAGES = 4  # of one folder, from which on they look like the frames of a video
WEB = ("http://", "https://")


class Contents(io.BytesIO):
    """The bytes of a source that can be read only once, with a name for messages."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


def check_sources(sources: Sequence[str]) -> None:
    """Raises MediaError or InvalidArgument where there is nothing to open.

    URLs are not tried, and neither are pipes, as `<(command)`: they can be read only once.
    """
    from vidlm.media.source import is_pipe, is_url

    if sources.count(STDIN) > 1:
        raise InvalidArgument("- is stdin, which holds one video; give it once")
    for source in sources:
        if not source:
            raise InvalidArgument("a video is empty; give a path, a URL, or - for stdin")
        if source == STDIN:
            _check_stdin()
        elif "://" not in source and not is_url(source) and not is_pipe(source):
            _check_file(source, alone=len(sources) == 1)


def take(
    sources: Sequence[str], given: Reads, frames: Mapping[str, Any], progress: Progress
) -> list[Any]:
    """The sources as the library takes them, each checked to be readable and to have `frames`.

    Raises MediaError or InvalidArgument.
    """
    check_sources(sources)
    access = policy(given)
    _advise(sources, progress)
    return [_taken(source, frames, access, progress) for source in sources]


def policy(given: Reads) -> FetchPolicy:
    """Which URLs may be fetched, and how long that may take."""
    from vidlm.media import FetchPolicy

    patience = FetchPolicy.timeout if given.timeout is None else given.timeout
    return FetchPolicy(allow_private=given.allow_private, timeout=patience)


def chosen_frames(given: Chooses) -> dict[str, Any]:
    """Which frames, as keywords of load_video, without what was not given.

    Raises InvalidArgument where the choice makes no sense whatever the video.
    """
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
    _frame_policy(keywords)
    return keywords


def is_saved(source: str) -> bool:
    return source.endswith(SAVED)


def file_stem(source: str) -> str:
    """What files made of a source are named after: "talk" for talk.mp4, "imgs" for imgs/*.png."""
    from vidlm.media.folder import is_pattern

    url = "://" in source
    path = Path(source.partition("?")[0] if url else source)
    if not url and is_pattern(source):
        path = path.parent
    return path.stem or path.resolve().stem or "frames"


# ---- one source ------------------------------------------------------------------------------


def _taken(
    source: str, frames: Mapping[str, Any], access: FetchPolicy, progress: Progress
) -> str | Contents | Image:
    from vidlm.media import is_image, load_image, probe

    if is_saved(source) and not source.startswith(WEB):
        _check_saved(source, frames)
        return source
    taken: str | Contents = _read_once(source, access, progress)
    if isinstance(taken, Contents) and is_image(source):
        return load_image(taken)
    probe(taken, _frame_policy(frames), access=access)
    return taken


def _read_once(source: str, access: FetchPolicy, progress: Progress) -> str | Contents:
    """The contents of stdin, a pipe or a URL of the web; all else by name."""
    from vidlm.media.fetch import fetch
    from vidlm.media.source import is_pipe, opened

    if source == STDIN:
        progress.now("reading stdin")
        return _read_pipe(sys.stdin.buffer, "stdin")
    if source.lower().startswith(WEB):
        progress.now("downloading")
        return Contents(fetch(source, policy=access), source)
    if is_pipe(source):
        progress.now(f"reading {source}")
        with opened(source, access) as (pipe, _):  # gives a silent pipe up after the timeout
            return Contents(pipe.read(), source)
    return source


def _read_pipe(pipe: Any, name: str) -> Contents:
    from vidlm.media.fetch import MAX_BYTES

    data = pipe.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise MediaLimitError(
            f"{name} holds more than {MAX_BYTES >> 20} MiB; save it to a file and give its path"
        )
    return Contents(data, name)


def _check_saved(source: str, frames: Mapping[str, Any]) -> None:
    from vidlm.api import check_saved

    check_saved(Path(source), frames)


def _frame_policy(frames: Mapping[str, Any]) -> Any:
    from vidlm.media import FramePolicy

    number = {"num_frames": 8} if frames.get("sampling") in NEED_A_NUMBER else {}
    return FramePolicy(**{**number, **frames})


def _numbers(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError as error:
        raise InvalidArgument(
            f"--indices {text!r} are not numbers of frames; give them as --indices 0,25,50"
        ) from error


def _check_stdin() -> None:
    if sys.stdin is None or sys.stdin.isatty():
        raise InvalidArgument("- is stdin, and nothing is piped into it: vidlm ... - < clip.mp4")


def _check_file(source: str, alone: bool) -> None:
    from vidlm.media.fetch import DEFAULT_POLICY
    from vidlm.media.folder import pictures
    from vidlm.media.source import is_pipe, opened

    if is_pipe(source):
        return  # opening it would take what is in it
    if pictures(source, DEFAULT_POLICY) is not None:
        return
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


def _advise(sources: Sequence[str], progress: Progress) -> None:
    """Say how images of one folder, which a shell made of a pattern, become one video."""
    from vidlm.media import is_image

    folders = {os.path.dirname(source) for source in sources}
    if len(sources) >= MANY_IMAGES and len(folders) == 1 and all(map(is_image, sources)):
        ending = os.path.splitext(sources[0])[1]
        pattern = os.path.join(folders.pop(), f"*{ending}")
        progress.note(
            f"these are {len(sources)} images; to give them as the frames of one video, quote the "
            f"pattern: '{pattern}'"
        )
