"""`vidlm frames`: contact sheets of the frames that are taken, or that a model sees."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vidlm.cli.index import check_writable
from vidlm.cli.options import FRAMES, Frames
from vidlm.cli.progress import Progress, printable
from vidlm.cli.sources import STDIN, check_sources, chosen_frames, file_stem, is_saved, take
from vidlm.errors import InvalidArgument
from vidlm.files import make_folder, write_bytes

if TYPE_CHECKING:
    from vidlm.hf import ProcessorMixin
    from vidlm.media import Video

SIDE = 640  # pixels of a frame kept for the sheet, which shows it smaller
THUMB = 192  # pixels that a sheet shows of a frame's longer side
STDOUT = Path("-")


def frames(given: Frames) -> None:
    """The sheets' paths on stdout, the frames and their times on stderr."""
    keywords = chosen_frames(given)
    _check_videos(given.videos)
    targets = _targets(given)
    with Progress(quiet=False) as progress:
        videos = take(given.videos, given, keywords, progress)
        for target in targets:
            if target != STDOUT:
                check_writable(target.parent)
        processor = None if given.model is None else _processor(given.model, progress)
        for source, taken, target in zip(given.videos, videos, targets, strict=True):
            progress.now(f"reading {source}")
            video = _read(taken, keywords, processor)
            progress.now(f"{len(video)} frames for {target}")
            _save(video, target, force=given.force)
            progress.clear()
            if given.model is not None or len(videos) > 1:
                _name(video, given.model)
            _tell(video, target)


def _check_videos(sources: list[str]) -> None:
    from vidlm.media import is_image

    check_sources(sources)
    for source in sources:
        if is_saved(source):
            raise InvalidArgument(f"{source} is a saved video, which holds no pixels")
        if source != STDIN and is_image(source):
            raise InvalidArgument(
                f"{source} is an image; give a video, or images as a folder or a quoted pattern"
            )


def _targets(given: Frames) -> list[Path]:
    """Where each sheet goes. Raises InvalidArgument where two would be one file, or where one
    exists and may not be replaced."""
    names = [f"{'stdin' if each == STDIN else file_stem(each)}_frames.png" for each in given.videos]
    if len(names) > 1 and given.output == STDOUT:
        raise InvalidArgument("--output - is one picture on stdout; give one video")
    if len(names) > 1 or (given.output is not None and given.output.is_dir()):
        targets = [(given.output or Path()) / name for name in names]
    else:
        targets = [given.output or Path(names[0])]
    for target in targets:
        if target != STDOUT and target.suffix.lower() != ".png":
            raise InvalidArgument(
                f"--output {target}: a contact sheet is a PNG; name it {target.stem}.png"
            )
        if target != STDOUT and target.exists() and not given.force:
            raise InvalidArgument(
                f"{target} exists already; replace it with --force, or name another with --output"
            )
    if len(set(targets)) < len(targets):
        raise InvalidArgument(
            f"two of the sheets would be one file: {', '.join(map(str, targets))}; save them one "
            "by one, each with an --output of its own"
        )
    return targets


def _processor(name: str, progress: Progress) -> ProcessorMixin:
    from vidlm.hf import AutoProcessor, find

    progress.now(f"looking at {name}")
    return AutoProcessor.from_pretrained(find(name))


def _read(source: Any, keywords: dict[str, Any], processor: ProcessorMixin | None) -> Video:
    """The frames as they are, by default 8 evenly spread; or as a model's rule and pixels have
    them."""
    from vidlm.media import load_video

    if processor is not None:
        from vidlm.hf import FrameOptions, shown

        chosen = FrameOptions(**keywords).over(processor.sampling)
        return _enlarged(shown(processor, load_video(source, **chosen)))
    if keywords.get("sampling") != "videollama3" and not keywords.keys() & {
        *("fps", "times", "indices")
    }:
        keywords = {"num_frames": FRAMES, **keywords}
    return load_video(source, max_side=SIDE, **keywords)


def _enlarged(video: Video) -> Video:
    """Small frames with each pixel as a square, so that a sheet does not smooth them."""
    times = max(THUMB // max(video.frames.shape[1:3]), 1)
    return replace(video, frames=video.frames.repeat(times, 1).repeat(times, 2))


def _save(video: Video, output: Path, force: bool) -> None:
    from vidlm.media import contact_sheet

    picture = io.BytesIO()
    contact_sheet(video, thumb=THUMB).save(picture, "PNG")
    if output == STDOUT:
        sys.stdout.buffer.write(picture.getvalue())
        sys.stdout.buffer.flush()
        return
    make_folder(output.parent)
    if output.exists() and not force:  # since it was looked for
        raise InvalidArgument(f"{output} exists already; replace it with --force")
    write_bytes(output, picture.getvalue())


def _name(video: Video, model: str | None) -> None:
    seen = f", as {model} sees them" if model else ""
    name = printable(video.name)
    typer.echo(f"{name}: {len(video)} of {video.total_frames} frames{seen}", err=True)


def _tell(video: Video, output: Path) -> None:
    from vidlm.media.clip import clock

    typer.echo(f"{'frame':>8}  time", err=True)
    for index, seconds in zip(video.indices, video.pts, strict=True):
        typer.echo(f"{index:>8}  {clock(seconds)}", err=True)
    if output != STDOUT:
        typer.echo(output)
