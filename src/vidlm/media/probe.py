"""Whether a source can be read and has the frames asked for, found out in about 10 ms.

A caller probes before it does something expensive, such as loading a model. `probe` opens the
container, decodes one picture, and compares the frames asked for with the file's own account of its
length. Only where that account says that a frame does not exist is the file read to be sure.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from vidlm.media import container, decode, stills
from vidlm.media.clip import DEFAULT_LIMITS, Deadline, Limits, ReadOptions, Timeline
from vidlm.media.container import Reader
from vidlm.media.fetch import DEFAULT_POLICY, FetchPolicy
from vidlm.media.flv_bounds import check_key_frames
from vidlm.media.folder import is_image, pictures
from vidlm.media.image import load_image
from vidlm.media.listing import list_frames, list_quickly, list_table
from vidlm.media.mp4_bounds import check_tables
from vidlm.media.pillow import reading
from vidlm.media.policy import FramePolicy, seconds
from vidlm.media.source import Source, opened
from vidlm.media.video import kind_of

# Packets in which a sound stream shows its first picture; decoders hold back at most 16.
_PACKETS = 64
# A file of unknown length is read to its end only up to this size.
_SMALL = 64 << 20


def probe(
    source: Source | Image.Image,
    policy: FramePolicy | None = None,
    *,
    limits: Limits = DEFAULT_LIMITS,
    access: FetchPolicy = DEFAULT_POLICY,
) -> None:
    """Check a video or an image that `load_video` or `load_image` would read.

    Raises what they raise: MediaNotFound, MediaFetchError or MediaError where there is nothing to
    read, MediaLimitError for a file or a picture that is too large, InvalidArgument where `policy`
    asks for frames beyond the end. Damage further into a file is not found. A URL of the web is
    downloaded; fetch it first to download it once.
    """
    options = ReadOptions(policy or FramePolicy(), limits, access=access)
    if isinstance(source, Image.Image):
        return
    if isinstance(source, str | Path):
        found = pictures(source, access)
        if found is not None:
            _probe_stills(found, options, str(source))
            return
        if is_image(source):
            load_image(source, limits=limits, access=access)
            return
    with opened(source, access) as (file, name):
        match kind_of(file, name):
            case "still":
                stills.from_still(file, name, options)
            case "video":
                _probe_video(file, name, options)
            case animation:
                _probe_animation(file, name, options, animation)


def _probe_stills(paths: Sequence[Path], options: ReadOptions, name: str) -> None:
    """The number of images, and the first of them."""
    options.limits.check_length(name, len(paths), 0.0)
    _check_choice(_counted(len(paths)), options.policy)
    first = replace(options, policy=FramePolicy(), max_side=1)
    stills.from_list(paths[:1], first, name)


def _probe_animation(file: BinaryIO, name: str, options: ReadOptions, form: str) -> None:
    """The number of frames of a format by Pillow's name. Times take decoding all of them, so they
    are not checked."""
    with reading(name), Image.open(file, formats=[form]) as image:
        options.limits.check(name, 1, image.height, image.width)
        count = getattr(image, "n_frames", 1)
        options.limits.check_length(name, count, 0.0)
        image.load()
    if options.policy.indices is not None:
        _check_choice(_counted(count), options.policy)


def _probe_video(file: BinaryIO, name: str, options: ReadOptions) -> None:
    limits = options.limits
    deadline = Deadline(name, limits.seconds)
    check_tables(file, name, limits, deadline)
    check_key_frames(file, name, deadline)
    with container.opened(file, name, limits, deadline) as reader:
        shows = _shows_a_picture(reader)
        index = list_table(reader, file) if _names_moments(options.policy) else None
        unsure = index is None and _may_lack(reader, file, options.policy)
        if index is not None:
            index = decode.with_sound(index, reader, options.policy)
    if index is not None:
        _check_choice(index.timeline, options.policy)
    if not unsure and shows:
        return
    for lister in (list_quickly, list_frames) if shows else (list_frames,):
        with container.opened(file, name, limits, deadline) as reader:
            listed = lister(reader, file)
            if listed is not None:
                listed = decode.with_sound(listed, reader, options.policy)
        if listed is not None:
            _check_choice(listed.timeline, options.policy)
            return


def _counted(count: int) -> Timeline:
    """So many frames without a clock."""
    return Timeline(np.arange(count, dtype=np.float64), float(count))


def _names_moments(policy: FramePolicy) -> bool:
    """Whether a policy asks for frames that a clip may not have."""
    return any(v is not None for v in (policy.start, policy.end, policy.times, policy.indices))


def _check_choice(timeline: Timeline, policy: FramePolicy) -> None:
    """Raises InvalidArgument where no frame, or not every frame that is named, exists."""
    if policy.sampling == "scenes":  # which takes looking at the frames
        policy = replace(policy, sampling="uniform")
    timeline.choose(policy)


def _may_lack(reader: Reader, file: BinaryIO, policy: FramePolicy) -> bool:
    """Whether the container's own account leaves open that a frame asked for does not exist."""
    if not _names_moments(policy):
        return False
    small = (file.seek(0, os.SEEK_END) or file.tell()) <= _SMALL
    if policy.indices is not None:
        count = reader.stream.frames
        return max(policy.indices) >= count if count else small
    if policy.sampling == "keyframes":  # a window may have none
        return small
    moments = [policy.window[0], *(seconds("times", each) for each in policy.times or ())]
    latest = max((moment for moment in moments if moment is not None), default=0.0)
    length = reader.container.duration  # microseconds
    return small if length is None else latest >= length / 1_000_000


def _shows_a_picture(reader: Reader) -> bool:
    """Whether a picture can be decoded; True too where the first packets do not tell."""
    for number, packet in enumerate(reader.packets()):
        if number >= _PACKETS or reader.pictures(packet):
            return True
    return False
