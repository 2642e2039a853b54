"""Anything that shows frames in order -> Video: files, bytes, URLs, lists of images, arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from vidlm.errors import MediaError
from vidlm.media import decode, stills
from vidlm.media.clip import DEFAULT_LIMITS, Limits, ReadOptions, Video
from vidlm.media.fetch import DEFAULT_POLICY, FetchPolicy
from vidlm.media.folder import pictures
from vidlm.media.heif import is_still
from vidlm.media.pillow import formats
from vidlm.media.policy import FramePolicy
from vidlm.media.source import Source, opened
from vidlm.media.tracks import has_alpha_track

__all__ = [
    "Limits",
    "Source",
    "Video",
    "load_video",
    "replace_video_with_images",
    "sample_frames",
]


def load_video(
    source: Source,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    start: float | str | None = None,
    end: float | str | None = None,
    sampling: str = "uniform",
    indices: Sequence[int] | None = None,
    times: Sequence[float | str] | None = None,
    max_side: int | None = None,
    on_error: str = "warn",
    limits: Limits = DEFAULT_LIMITS,
    access: FetchPolicy = DEFAULT_POLICY,
) -> Video:
    """The frames of a video that a policy chooses, as a player shows them.

    source: a path; an http(s), file or data URL; the bytes of a file; a binary file object, read
        from its beginning and left open; a folder of images or a pattern such as "frames/*.jpg", in
        the order of the numbers in their names; a list of PIL images, arrays (H, W, 3) or paths of
        images; an array (F, H, W, 3) RGB or (F, H, W) grey, uint8.
    num_frames: that many, evenly spread; or fps: one every 1/fps seconds; or every frame.
        min_frames and max_frames bound these. start, end: seconds or "mm:ss", frames on screen in
        between. sampling: "linspace", "slowfast", "videollama3", "keyframes", "scenes". Or indices
        or times: exactly these. See FramePolicy for the exact rules.
    max_side: pictures are scaled down, as they are decoded, until their longer side is at most
        this; None leaves them as they are, which is what models are exact with.
    on_error: "warn" leaves out what is damaged, logs it and names it in `Video.warnings`; "raise"
        raises MediaError instead.
    limits: see Limits. access: which URLs and folders may be read, see FetchPolicy.

    Only the chosen frames are held in memory. Rotation, edit lists and non-square pixels are
    applied.

    Raises InvalidArgument for a policy or source that makes no sense; MediaNotFound,
    MediaFetchError or MediaError where there is nothing to read; MediaLimitError before too much
    memory or time is taken.
    """
    policy = FramePolicy(
        num_frames, fps, max_frames, start, end, min_frames, sampling, indices, times
    )
    options = ReadOptions(policy, limits, on_error, max_side, access)
    if isinstance(source, np.ndarray):
        return stills.from_array(source, options)
    if isinstance(source, list | tuple):
        return stills.from_list(source, options)
    found = pictures(source, access)
    if found is not None:
        return stills.from_list(found, options, str(source))
    with opened(source, access) as (file, name):
        match kind_of(file, name):
            case "still":
                return stills.from_still(file, name, options)
            case "video":
                return decode.read(file, name, options)
            case animation:
                return stills.from_animation(file, name, options, animation)


def sample_frames(url: str | Path, num_frames: int) -> list[Image.Image]:
    """`num_frames` images evenly spread over a video, fewer where it has fewer.

    The function of this name in Hugging Face's video-text-to-text guide, for a URL or a path; it
    keeps only the chosen frames in memory and writes no file.
    """
    return load_video(url, num_frames=num_frames).images()


def replace_video_with_images(text: str, frames: int) -> str:
    """Each "<video>" of a prompt as `frames` times "<image>", for models that take images only."""
    return text.replace("<video>", "<image>" * frames)


def kind_of(file: BinaryIO, name: str) -> str:
    """ "video", "still" for a HEIF image, or Pillow's name of an animation that is left to it.

    Raises MediaError for an empty file, and for one that cannot be read.
    """
    try:
        file.seek(0)
        head = file.read(12)
        if not head:
            raise MediaError(f"{name}: empty, 0 bytes; was the download or copy complete?")
        if stills.is_webp(head):
            return "WEBP"
        if is_still(file):
            return "still"
        if "AVIF" in formats() and head[8:] == b"avis" and has_alpha_track(file):
            return "AVIF"
        return "video"
    except MediaError:  # a ValueError too, but ours already
        raise
    except (OSError, ValueError) as error:  # ValueError: it is closed
        raise MediaError(
            f"{name}: cannot be read ({error}); give an open, readable file"
        ) from error
