"""A video file: list what a player shows, choose, decode what that takes, keep the chosen frames.

Where few frames are wanted, the decoder begins at the key frame before each, and leaves out what
no other picture refers to.
Frames are told by their presentation stamps, so that a packet lost on the way shifts nothing; what
contradicts the list (fields, pictures never shown, stamps in decoding order, a seek that lands
elsewhere) is noticed, and a slower and surer way is taken, in the end counting what comes out.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import BinaryIO

import av
import numpy as np
from av.video.frame import VideoFrame

from vidlm.errors import MediaError
from vidlm.media.clip import Deadline, Frames, ReadOptions, Video, clock
from vidlm.media.container import Reader, hint, opened
from vidlm.media.flv_bounds import check_key_frames
from vidlm.media.listing import Index, list_frames, list_packets, list_quickly
from vidlm.media.mp4_bounds import check_tables
from vidlm.media.other_streams import sound_end
from vidlm.media.picture import Painter, resized, thumbnail, unconvertible
from vidlm.media.policy import FramePolicy
from vidlm.media.sample import Rows, Times, between
from vidlm.media.scene import Shots
from vidlm.media.tracks import Presentation
from vidlm.media.walk import Astray, File, walk

log = logging.getLogger(__name__)


def read(file: BinaryIO, name: str, options: ReadOptions) -> Video:
    """The chosen frames of a seekable binary file, which is left open.

    Raises MediaError where there is no video to read, MediaLimitError before memory is taken.
    """
    source = File(file, name, options, Deadline(name, options.limits.seconds))
    check_tables(file, name, options.limits, source.deadline)
    check_key_frames(file, name, source.deadline)
    for lister in (list_quickly, list_packets, list_frames):
        with opened(file, name, options.limits, source.deadline) as reader:
            index = lister(reader, file)
            if index is not None:
                index = with_sound(index, reader, options.policy)
            video = _chosen(source, index, reader) if index is not None else None
        if video is None and index is not None:  # the same from the beginning, without seeking
            video = _chosen(source, index, None)
        if video is not None:
            for warning in video.warnings:
                log.warning("%s: %s", name, warning)
            return video
    raise AssertionError("a frame that is counted cannot go astray")


def with_sound(index: Index, reader: Reader, policy: FramePolicy) -> Index:
    """The index, whose last picture stays while the sound goes on where `policy` depends on it."""
    by_time = policy.times is not None or policy.start is not None or policy.fps is not None
    if not by_time or index.is_moved:
        return index
    end = sound_end(reader, index.timeline)
    return replace(index, timeline=replace(index.timeline, end=end))


def _chosen(source: File, index: Index, reader: Reader | None) -> Video | None:
    """The frames a policy takes, through a reader that can seek, or from the beginning."""
    if reader is not None and index.stamps is None:
        return None
    policy, timeline = source.options.policy, index.timeline
    shown = timeline.span(policy)
    source.options.limits.check_length(source.name, len(timeline.pts), shown)
    try:
        shots = None
        if policy.sampling == "scenes":
            shots = _shots(source, index, reader)
        return _take(source, index, timeline.choose(policy, shots), reader)
    except Astray:
        return None


def _shots(source: File, index: Index, reader: Reader | None) -> Rows:
    """The rows where a shot begins, of those that the policy's window has."""
    timeline = index.timeline
    first, last = between(timeline.pts, *source.options.policy.window, stop=timeline.until)
    shots = Shots(timeline.fps)
    walk(
        *(source, index, np.arange(first, last), reader),
        lambda row, frame: shots.see(row, _in_colour(source.name, thumbnail, frame)),
        ordered=True,
    )
    return shots.starts()


def _take(source: File, index: Index, rows: Rows, reader: Reader | None) -> Video:
    options, timeline = source.options, index.timeline
    unique, places = np.unique(rows, return_inverse=True)
    kept = _Kept(unique, source, index.presentation)
    trail = walk(source, index, unique, reader, kept.see)
    faults = trail.faults
    if index.stamps is not None and not faults and (trail.skipped or kept.wanted):
        raise Astray
    if reader is not None and (faults or kept.damaged or kept.resized):
        raise Astray  # what a decoder guesses, and which size is the first, needs all frames before
    if kept.frames is None:
        raise MediaError(
            f"{source.name}: none of the {len(unique)} chosen frames could be decoded"
            f"{hint(faults)}; choose other ones, or get an undamaged file"
        )
    losses = (*index.losses, *kept.losses(timeline.pts), *_refused(faults))
    if losses and options.on_error == "raise":
        raise MediaError(
            f"{source.name}: {'; '.join(losses)}; get an undamaged file, or take what is left of "
            "it with on_error='warn'"
        )
    have = np.array([row not in kept.wanted for row in rows.tolist()])
    pictures = kept.frames
    if not have.all() or not np.array_equal(unique, rows):
        pictures = pictures[places[have]]
    return timeline.video(pictures, rows[have], source.name, (*losses, *index.notes, *kept.notes()))


# ---- keeping ---------------------------------------------------------------------------------


class _Kept:
    """The chosen frames, each painted into its place as it comes."""

    def __init__(self, rows: Rows, source: File, presentation: Presentation) -> None:
        self._rows, self._limits, self._name = rows, source.options.limits, source.name
        self._presentation, self._scale = presentation, source.options.scale
        self._painters, self._own = list[Painter](), threading.local()
        self._first = threading.Lock()
        self.damaged: list[int] = []
        self.resized: list[int] = []
        self.wanted = {int(row): place for place, row in enumerate(rows)}  # not yet seen
        self.frames: Frames | None = None

    def see(self, row: int, frame: VideoFrame) -> None:
        """Keeps a frame that is wanted. May be called from several threads."""
        place = self.wanted.pop(row, None)
        if place is None:
            return
        try:
            self._keep(row, place, frame)
        except BaseException:
            self.wanted[row] = place  # another way to it may be tried, and must not pass it by
            raise

    def _keep(self, row: int, place: int, frame: VideoFrame) -> None:
        painter = self._painter()
        self._limits.check(self._name, 1, frame.height, frame.width)
        self._limits.check(self._name, len(self._rows), *painter.size(frame))
        picture = _in_colour(self._name, painter.paint, frame)
        with self._first:
            if self.frames is None:  # which way up it is, is known only now
                self.frames = np.empty((len(self._rows), *picture.shape), np.uint8)
        if picture.shape != self.frames.shape[1:]:
            self.resized.append(row)
            picture = resized(picture, *self.frames.shape[1:3])
        if frame.is_corrupt:
            self.damaged.append(row)
        self.frames[place] = picture

    def _painter(self) -> Painter:
        """This thread's own."""
        if not hasattr(self._own, "painter"):
            self._own.painter = Painter(self._presentation, self._scale)
            self._painters.append(self._own.painter)
        own: Painter = self._own.painter
        return own

    def losses(self, pts: Times) -> list[str]:
        """What could not be decoded, or not wholly."""
        return [
            *self._say(sorted(self.wanted), "could not be decoded and are left out", pts),
            *self._say(self.damaged, "are damaged: the decoder guessed parts of them", pts),
        ]

    def notes(self) -> list[str]:
        """What was changed or had to be assumed."""
        notes = list(self._presentation.notes)
        if self.resized:
            chosen = f"{len(self.resized)} of the {len(self._rows)} chosen frames"
            notes.append(f"{chosen} have another size than the first and were scaled to it")
        for aspect in {painter.ignored_aspect for painter in self._painters} - {None}:
            notes.append(f"the file gives pixels an aspect of {aspect}; they are taken as square")
        return notes

    def _say(self, rows: list[int], what: str, pts: Times) -> list[str]:
        times = ", ".join(clock(float(pts[row])) for row in rows[:8])
        more = " ..." if len(rows) > 8 else ""
        chosen = f"{len(rows)} of the {len(self._rows)} chosen frames"
        return [f"{chosen} {what}, at {times}{more}"] if rows else []


def _in_colour(name: str, convert: Callable[[VideoFrame], Frames], frame: VideoFrame) -> Frames:
    try:
        return convert(frame)
    except (av.FFmpegError, ValueError) as error:
        raise unconvertible(name, frame, error) from error


def _refused(faults: Sequence[str]) -> list[str]:
    return [f"the decoder refused {len(faults)} packets{hint(faults)}"] if faults else []
