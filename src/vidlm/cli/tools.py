"""The commands beside `ask`: `demo` and `info`."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import typer

from vidlm.cli.loading import loading
from vidlm.cli.machine import kernel_lines, prepare_kernels
from vidlm.cli.options import Demo, Info
from vidlm.cli.progress import Progress
from vidlm.cli.sources import is_saved, take
from vidlm.errors import InvalidArgument

if TYPE_CHECKING:
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
    source = None if given.video is None else _video(given.video, given)
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
    if source is not None:
        taken = sampling(folder) if given.frames is None else {"num_frames": given.frames}
        video = load_video(source, **taken)
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


def _video(source: str, given: Info) -> Any:
    """The video to plan for, which can be read."""
    from vidlm.media import is_image

    if is_saved(source) or is_image(source):
        raise InvalidArgument(
            f"--video {source}: give a video; what a saved one or an image takes is not planned"
        )
    with Progress(quiet=False) as progress:
        return take([source], given, {}, progress)[0]


def _about(video: Video) -> dict[str, Any]:
    return {"name": video.name, "seconds": video.duration, "frames": video.total_frames}
