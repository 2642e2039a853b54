"""The commands beside `ask`: `demo`, `info` and `frames`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vidlm.cli.loading import loading
from vidlm.cli.machine import kernel_lines, prepare_kernels
from vidlm.cli.options import FRAMES, Demo, Frames, Info
from vidlm.cli.progress import Progress
from vidlm.cli.sources import check_sources, chosen_frames, read
from vidlm.errors import InvalidArgument
from vidlm.files import replaced

SIDE = 640  # pixels of a frame kept for the sheet, which shows it smaller

if TYPE_CHECKING:
    from PIL.Image import Image

    from vidlm.media import Video


def demo(given: Demo) -> None:
    from vidlm.demo.show import show

    with Progress(quiet=False) as progress:
        prepare_kernels(progress)
    show(given.out, given.seed, typer.echo)


def info(given: Info) -> None:
    """With a video, for as many frames as would be taken of it."""
    from vidlm.hf import find
    from vidlm.media import load_video
    from vidlm.native import status
    from vidlm.plan import check_room, free_memory, plan, sampling

    told = loading(given)
    folder = find(given.model)
    check_room(folder, told)
    planned = partial(
        plan,
        folder,
        memory=free_memory(told.device, told.max_memory),
        dtype=told.dtype,
        quantize=told.quantize,
        kv_dtype=told.kv_dtype,
    )
    plans = planned(frames=given.frames)
    video = None
    if given.video is not None:
        check_sources([given.video])
        taken = sampling(folder) if given.frames is None else {"num_frames": given.frames}
        video = load_video(read(given.video), **taken)
        plans = planned(frames=len(video))
    with Progress(quiet=given.json) as progress:
        prepare_kernels(progress)
    if given.json:
        about = _about(video) if video else None
        kernels = asdict(status())
        kernels["path"] = kernels["path"] and str(kernels["path"])
        told_of = {"model": given.model, "video": about, "kernels": kernels}
        typer.echo(json.dumps({**told_of, **plans.to_dict()}))
        return
    typer.echo(f"{'model':<8} {given.model}")
    if video:
        typer.echo(
            f"{'video':<8} {video.name}, {video.duration:.2f} s, {video.total_frames} frames"
        )
    typer.echo(str(plans))
    for line, label in zip_longest(kernel_lines(), ["kernels"], fillvalue=""):
        typer.echo(f"{label:<8} {line}")


def frames(given: Frames) -> None:
    """The sheet's path on stdout, the frames and their times on stderr."""
    from vidlm.media import contact_sheet, load_video
    from vidlm.media.clip import clock

    keywords = chosen_frames(given)
    check_sources([given.video])
    if given.sampling != "videollama3" and not keywords.keys() & {"fps", "times", "indices"}:
        keywords = {"num_frames": FRAMES, **keywords}
    video = load_video(read(given.video), max_side=SIDE, **keywords)
    output = given.output or Path(f"{Path(video.name).stem}_frames.png")
    _save(contact_sheet(video), output, force=given.force)
    typer.echo(f"{'frame':>8}  time", err=True)
    for index, seconds in zip(video.indices, video.pts, strict=True):
        typer.echo(f"{index:>8}  {clock(seconds)}", err=True)
    if str(output) != "-":
        typer.echo(output)


def _save(sheet: Image, output: Path, force: bool) -> None:
    if str(output) == "-":
        sheet.save(sys.stdout.buffer, "PNG")
        return
    if output.suffix.lower() != ".png":
        raise InvalidArgument(
            f"--output {output}: a contact sheet is a PNG; name it {output.stem}.png"
        )
    if output.exists() and not force:
        raise InvalidArgument(
            f"{output} exists already; replace it with --force, or name another with --output"
        )
    with replaced(output) as partial:
        sheet.save(partial, "PNG")


def _about(video: Video) -> dict[str, Any]:
    return {"name": video.name, "seconds": video.duration, "frames": video.total_frames}
