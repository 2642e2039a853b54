"""The frames that a player shows, in order, without keeping any: the index of a video file.

Three ways, from fast to sure: an MP4's own tables; the packets' presentation stamps, which takes
reading the file; and decoding everything once. Each is checked by the next step, which reads frames
by their stamps (decode.py); where those contradict it, the next way is taken.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, BinaryIO

import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

from vidlm.errors import MediaError
from vidlm.media.clip import Timeline, clock
from vidlm.media.container import Reader, hint
from vidlm.media.gif import as_browsers_show
from vidlm.media.mp4 import sample_table
from vidlm.media.pyav import fraction
from vidlm.media.tracks import Presentation

Stamps = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Index:
    """The frames a player shows.

    stamps: theirs, ascending; None where frames go by count. presentation: crop and pixel aspect.
    losses: signs of damage. notes: what had to be assumed.
    """

    timeline: Timeline
    stamps: Stamps | None
    presentation: Presentation
    losses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def row(self, stamp: int | None, guess: int) -> int | None:
        """The row with this stamp, where there are stamps; quickly if it is the one guessed."""
        if stamp is None or self.stamps is None:
            return None
        if guess < len(self.stamps) and self.stamps[guess] == stamp:
            return guess
        row = int(np.searchsorted(self.stamps, stamp))
        return row if row < len(self.stamps) and self.stamps[row] == stamp else None


def list_table(reader: Reader, file: BinaryIO) -> Index | None:
    """The index from an MP4's tables, without reading its frames; None where they are not all
    there, or tell of more than a plain sequence of frames."""
    if "mp4" not in reader.container.format.name.split(","):
        return None
    entries = reader.stream.index_entries
    reader.limits.check_length(reader.name, len(entries), 0.0)
    at = file.tell()  # FFmpeg reads on from where it left the file
    table = sample_table(file, reader.stream.id, len(entries))
    end = file.seek(0, os.SEEK_END) or file.tell()
    file.seek(at)
    if table is None or not len(entries):
        return None
    rows = [(e.timestamp, e.flags, e.pos, e.size) for e in entries]
    decoding, flags, places, sizes = np.asarray(rows, np.int64).T
    whole = bool((sizes > 0).all() and (places + sizes).max() <= end)
    plain = bool((flags & ~_KEY == 0).all() and flags[0] & _KEY)
    if not whole or not plain or not _steps_agree(decoding, table.durations):
        return None
    stamps = decoding + table.offsets
    order = np.argsort(stamps, kind="stable")
    ticks = stamps[order]
    if (np.diff(ticks) == 0).any():
        return None
    timeline = _timeline(reader.stream, ticks, int(table.durations[order[-1]]), flags[order] & _KEY)
    reader.limits.check_length(reader.name, len(ticks), timeline.stop)
    return Index(timeline, ticks, reader.presentation)


_KEY = 1  # AVINDEX_KEYFRAME; the other flag marks what an edit list cuts


def _steps_agree(decoding: Stamps, durations: Stamps) -> bool:
    """Whether the demuxer's times are the file's, but for where they begin."""
    return bool((np.diff(decoding) == durations[:-1]).all())


def list_quickly(reader: Reader, file: BinaryIO) -> Index | None:
    """The index from an MP4's tables, or else from packets."""
    index = list_table(reader, file)
    return index if index is not None else list_packets(reader, file)


def list_packets(reader: Reader, file: BinaryIO) -> Index | None:
    """The index from packets alone; None where their stamps do not tell frames apart."""
    stamps, lengths, keys = array("q"), array("q"), array("b")
    early, started, unstamped = 0, False, False
    most = reader.limits.frames
    for packet in reader.packets():
        key = packet.is_keyframe
        started = started or key
        if not _is_shown(packet, reader.stream):
            continue
        early += not started
        unstamped = unstamped or packet.pts is None
        stamps.append(packet.pts or 0)
        lengths.append(packet.duration or 0)
        keys.append(key)
        if len(stamps) > most:
            reader.limits.check_length(reader.name, len(stamps), 0.0)
    if not stamps:
        raise MediaError(f"{reader.name}: its video stream holds no frames; is the file complete?")
    if early < len(stamps):  # nothing is shown before the first key frame, if there is one
        del stamps[:early], lengths[:early], keys[:early]
    order = np.argsort(np.asarray(stamps), kind="stable")
    ticks: Stamps = np.asarray(stamps)[order]
    if unstamped or (np.diff(ticks) == 0).any():
        return None
    timeline = _timeline(reader.stream, ticks, lengths[order[-1]], np.asarray(keys)[order])
    reader.limits.check_length(reader.name, len(ticks), timeline.stop)
    losses = tuple(_cut_off(reader.stream, timeline, reader.faults))
    return Index(timeline, ticks, reader.presentation, losses)


def _cut_off(stream: VideoStream, timeline: Timeline, faults: list[str]) -> Iterator[str]:
    """Signs that the file once held more."""
    end = clock(timeline.stop)
    if faults:
        yield f"the file breaks off after {len(timeline.pts)} frames, at {end}{hint(faults)}"
    assert isinstance(stream.container, InputContainer)
    announced = 0.0
    if stream.duration:
        announced = float(stream.duration * _time_base(stream))
    elif stream.container.duration and len(stream.container.streams) == 1:  # no longer sound
        announced = stream.container.duration / 1_000_000
    if announced > 1.1 * timeline.stop + 0.5:
        yield f"the header announces {clock(announced)}, the frames end at {end}: perhaps cut off"


def list_frames(reader: Reader, file: BinaryIO) -> Index:
    """The index from decoding everything and keeping nothing: what is shown, in that order."""
    stamps, lengths, keys = array("q"), array("q"), array("b")
    unstamped = False
    stream, faults = reader.stream, reader.faults
    for packet in reader.packets():
        if _is_shown(packet, stream):
            lengths.append(packet.duration or 0)
        for frame in reader.pictures(packet):
            unstamped = unstamped or frame.pts is None
            stamps.append(frame.pts or 0)
            keys.append(frame.key_frame)
        if len(stamps) > reader.limits.frames:
            reader.limits.check_length(reader.name, len(stamps), 0.0)
    if not stamps:
        raise MediaError(
            f"{reader.name}: none of its {len(lengths)} frames could be decoded{hint(faults)}"
        )
    losses: list[str] = []
    notes: list[str] = []
    if len(lengths) != len(stamps):
        said = losses if faults else notes
        said.append(
            f"the file lists {len(lengths)} pictures and the decoder shows {len(stamps)}; frames "
            f"are numbered by what is shown{hint(faults)}"
        )
    ticks: Stamps = np.sort(np.asarray(stamps))
    if unstamped or (np.diff(ticks) == 0).any():
        step = int(np.median(lengths)) or _guessed_step(stream)
        ticks = np.arange(len(stamps), dtype=np.int64) * step
        rate = float(1 / (step * _time_base(stream)))
        notes.append(f"frames carry no times of their own; {rate:g} a second is assumed")
    timeline = _timeline(stream, ticks, 0, np.asarray(keys))
    reader.limits.check_length(reader.name, len(ticks), timeline.stop)
    losses += _cut_off(stream, timeline, [])
    return Index(timeline, None, reader.presentation, tuple(losses), tuple(notes))


def _timeline(stream: VideoStream, ticks: Stamps, last_length: int, keys: NDArray[Any]) -> Timeline:
    """Stamps as seconds on the player's clock, which begins with the container; and the key
    frames, where `keys` is not 0."""
    base = _time_base(stream)
    if stream.codec_context.name == "gif":
        ticks, last_length = as_browsers_show(ticks, last_length)
    first = int(ticks[0]) * base
    assert isinstance(stream.container, InputContainer)
    began = stream.container.start_time  # microseconds, rounded
    origin = first if began is None else min(Fraction(began, 1_000_000), first)
    nearest = round(origin / base)
    if abs(nearest * base - origin) <= Fraction(1, 1_000_000):
        origin = nearest * base
        pts = (ticks - nearest) * base.numerator / base.denominator  # rounded once
    else:
        pts = ticks * base.numerator / base.denominator - float(origin)
    if last_length <= 0:
        last_length = int(np.median(np.diff(ticks))) if len(ticks) > 1 else _guessed_step(stream)
    stop = float(pts[-1]) + float(last_length * base)
    return Timeline(pts, stop, float(origin), np.flatnonzero(keys))


def _time_base(stream: VideoStream) -> Fraction:
    return fraction(stream.time_base) or Fraction(1, 1000)


def _guessed_step(stream: VideoStream) -> int:
    """Ticks from frame to frame by the header's rate, or 25 a second where it has none."""
    rate = fraction(stream.average_rate) or fraction(stream.guessed_rate) or Fraction(25)
    return max(round(1 / (rate * _time_base(stream))), 1)


def _is_shown(packet: Packet[VideoStream], stream: VideoStream) -> bool:
    # An edit list marks what it cuts; a packet of no bytes repeats the picture before it.
    if packet.is_discard or not packet.size:
        return False
    if stream.codec_context.name in ("vp8", "libvpx"):  # a golden picture, for reference only
        return bool(memoryview(packet)[0] & 0x10)  # show_frame, RFC 6386 section 9.1
    return True
