"""`vidlm index`: pay for videos once, and keep what was paid for."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

from vidlm.cli.ask import frame_keywords, legible
from vidlm.cli.loading import load_model, loading
from vidlm.cli.options import Index
from vidlm.cli.progress import Progress
from vidlm.cli.sources import (
    SAVED,
    STDIN,
    check_sources,
    chosen_frames,
    file_stem,
    is_saved,
    take,
)
from vidlm.errors import InvalidArgument
from vidlm.files import make_folder, output_error


def index(given: Index) -> None:
    """The files' paths on stdout. What can be wrong without a model is found before it is there."""
    chosen = chosen_frames(given)
    frames = frame_keywords(chosen)
    targets = target_files(given)
    check_sources(given.videos)
    system = None if given.system is None else legible("--system", given.system)
    if given.quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with Progress(given.quiet) as progress:
        loading(given)
        videos = take(given.videos, given, chosen, progress)
        for target in targets:
            check_writable(target.parent)
        lm = load_model(given.model, given, progress)
        for source, taken, target in zip(given.videos, videos, targets, strict=True):
            began = time.perf_counter()
            progress.now(f"reading {source}")
            video = lm.video(taken, **frames)
            count = f"{len(video.frames)} frames" if video.frames else "an image"
            progress.done(time.perf_counter() - began, "read", f"{source}, {count}")
            began = time.perf_counter()
            progress.now(f"{count} for {target}")
            make_folder(target.parent)
            video.save(target, kv=not given.no_kv, system=system)
            size = f"{target.stat().st_size / 1e6:,.1f} MB"
            progress.done(time.perf_counter() - began, "save", f"{target}, {size}")
            print(target, flush=True)


def target_files(given: Index) -> list[Path]:
    """Where each video is saved. Raises InvalidArgument where two would be one file, or where one
    exists and may not be replaced."""
    saved = [source for source in given.videos if is_saved(source)]
    if saved:
        raise InvalidArgument(f"{saved[0]} is a saved video already; give the video itself")
    if given.output is not None and len(given.videos) == 1 and not given.output.is_dir():
        targets = [_named(given.output)]
    else:
        folder = given.output or Path()
        targets = [folder / _name(source) for source in given.videos]
    if len(set(targets)) < len(targets):
        raise InvalidArgument(
            f"two of the videos would be saved as one file: {', '.join(map(str, targets))}; save "
            "them one by one, each with an --output of its own"
        )
    there = [target for target in targets if target.exists()]
    if there and not given.force:
        raise InvalidArgument(
            f"{there[0]} exists already; replace it with --force, or name another with --output"
        )
    return targets


def check_writable(folder: Path) -> None:
    """Raises OutputError, before any work is done, where no file can be written into a folder,
    which may not be there yet."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        raise output_error(folder, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(there, os.W_OK | os.X_OK):
        raise output_error(there, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def _named(output: Path) -> Path:
    if output.suffix != SAVED:
        raise InvalidArgument(
            f"--output {output}: a saved video ends with {SAVED}; name it "
            f"{output.with_name(output.stem + SAVED)}"
        )
    return output


def _name(source: str) -> str:
    from vidlm.media.source import is_pipe, is_url

    if source == STDIN or is_pipe(source) or (source[:5].lower() == "data:" and is_url(source)):
        raise InvalidArgument("what is piped in has no name; give one with --output")
    return file_stem(source) + SAVED
