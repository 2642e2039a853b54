"""The frames that a player shows, in order, without keeping any: the index of a video file.

Three ways, from fast to sure: an MP4's own tables; the packets' presentation stamps, which takes
reading the file; and decoding everything once. Each is checked by the next step, which reads frames
by their stamps (decode.py); where those contradict it, the next way is taken.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, BinaryIO, NoReturn

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
from vidlm.media.other_streams import later_pictures, sound_length
from vidlm.media.pyav import fraction
from vidlm.media.timestamps import (
    STILL_SECONDS,
    Mended,
    Stamps,
    Ticks,
    is_plausible,
    is_sound,
    mend,
)
from vidlm.media.tracks import Presentation


@dataclass(frozen=True, eq=False)
class Index:
    """The frames a player shows.

    stamps: theirs, ascending; None where frames go by count. presentation: crop and pixel aspect.
    losses: signs of damage. notes: what had to be assumed. is_mended: whether the times are not
    quite the stamps, two of which may be equal; is_moved: whether some are far from them.
    """

    timeline: Timeline
    stamps: Stamps | None
    presentation: Presentation
    losses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    is_mended: bool = False
    is_moved: bool = False

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
    decoding, flags, places, sizes = _index_entries(reader).T
    whole = bool((sizes > 0).all() and (places + sizes).max() <= end)
    plain = bool((flags & ~_KEY == 0).all() and flags[0] & _KEY)
    if not whole or not plain or not _steps_agree(decoding, table.durations):
        return None
    stamps = decoding + table.offsets
    order = np.argsort(stamps, kind="stable")
    ticks = stamps[order]
    if order[0] != 0 or not is_sound(ticks, _time_base(reader.stream), sound_length(reader)):
        return None
    timeline = _timeline(reader.stream, ticks, int(table.durations[order[-1]]), flags[order] & _KEY)
    return Index(timeline, ticks, reader.presentation)


def _index_entries(reader: Reader) -> NDArray[np.int64]:
    """(N, 4): time stamp, flags, position and size of each sample, without an object for each."""
    entries = reader.stream.index_entries
    rows = np.empty((len(entries), 4), np.int64)
    for start in range(0, len(rows), _ENTRIES):
        reader.check_time()
        part = entries[start : start + _ENTRIES]
        rows[start : start + _ENTRIES] = [(e.timestamp, e.flags, e.pos, e.size) for e in part]
    return rows


_ENTRIES = 1 << 14  # that are converted at a time
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
    table = _Packets(reader)
    if not len(table.stamps):
        raise MediaError(f"{reader.name}: its video stream holds no frames; is the file complete?")
    if table.unstamped:
        return None
    stream, base = reader.stream, _time_base(reader.stream)
    order = np.argsort(table.stamps, kind="stable")
    ticks, last = table.stamps[order], int(table.lengths[order[-1]])
    sound = sound_length(reader)
    if not is_plausible(order, ticks, base, sound):
        return None
    mended = None
    if not is_sound(ticks, base, sound):
        mended = mend(ticks, np.ones(len(ticks), bool), last, base, sound)
        if mended is None:
            return None
    timeline = _timeline(stream, ticks, last, table.keys[order], mended)
    notes = (*table.notes, *(mended.notes if mended is not None else ()))
    stamped = _timeline(stream, ticks, last, table.keys)  # the header knows of no other times
    losses = (*_cut_off(stream, stamped, reader.faults), *later_pictures(reader))
    shown, moved = reader.presentation, mended is not None and mended.is_moved
    return Index(timeline, ticks, shown, losses, notes, mended is not None, moved)


class _Packets:
    """The stamps, lengths and key flags of the packets that are shown, in decoding order."""

    def __init__(self, reader: Reader) -> None:
        stamps, lengths, keys, known = array("q"), array("q"), array("b"), array("b")
        head: list[Packet[VideoStream]] = []
        early, started, room = 0, False, _HEAD_BYTES
        most = _most_frames(reader)
        for packet in reader.packets():
            key = packet.is_keyframe
            started = started or key
            if started and len(head) < _HEAD and packet.size <= room:
                head.append(packet)
                room -= packet.size
            if not _is_shown(packet, reader.stream):
                continue
            early += not started
            known.append(packet.pts is not None)
            stamps.append(packet.pts or 0)
            lengths.append(packet.duration or 0)
            keys.append(key)
            if len(stamps) > most:
                _refuse(reader, len(stamps))
        if early == len(stamps):  # nothing is shown before the first key frame, if there is one
            early = 0
        columns = [np.asarray(column)[early:] for column in (stamps, lengths, keys, known)]
        self.stamps, self.lengths, self.keys, stamped = columns
        self.notes: tuple[str, ...] = ()
        lost = self._lost(reader, head, stamped.astype(bool))
        if lost.any():
            shown = len(lost) - int(lost.sum())
            self.notes = (_say_counts(len(lost), shown, ()),)
            self.stamps, self.lengths, self.keys = (c[~lost] for c in columns[:3])
            stamped = stamped[~lost]
        self.unstamped = not stamped.all()

    def _lost(
        self, reader: Reader, head: list[Packet[VideoStream]], stamped: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Which packets lead the first key frame and are lost with what they refer to.

        Where a file begins in an open group of pictures, those that are shown before its key frame
        refer to pictures before the file. Some decoders drop them, some show them: this one is
        asked.
        """
        first = self.stamps[0] if len(stamped) else 0
        leads = ~stamped | (self.stamps < first)
        leads[_HEAD // 2 :] = False
        if not leads.any() or not stamped[0]:
            return np.zeros(len(leads), bool)
        faults = list(reader.faults)
        frames = [frame for packet in head for frame in reader.pictures(packet)]
        reader.faults[:] = faults  # a walk meets its own
        shown = [frame.pts for frame in frames if frame.pts is not None]
        if len(shown) < len(frames) or max(shown, default=first) <= first:
            return np.zeros(len(leads), bool)
        return leads & ~(stamped & np.isin(self.stamps, shown))


# What is decoded to learn which of the first packets are lost.
_HEAD, _HEAD_BYTES = 64, 16 << 20


def _most_frames(reader: Reader) -> int:
    """How many frames are listed before `_refuse` is called: one for each byte, and more only of a
    short list."""
    return min(reader.limits.frames, max(reader.container.size, _FREE_FRAMES))


def _refuse(reader: Reader, frames: int) -> NoReturn:
    reader.limits.check_length(reader.name, frames, 0.0)
    raise MediaError(
        f"{reader.name}: lists more than {frames - 1} frames in {reader.container.size} bytes; "
        "the file is damaged: make another one of it: ffmpeg -i INPUT output.mp4"
    )


_FREE_FRAMES = 100_000  # whose times take less than two megabytes


def _say_counts(listed: int, shown: int, faults: Sequence[str]) -> str:
    return (
        f"the file lists {listed} pictures and the decoder shows {shown}; frames are numbered by "
        f"what is shown{hint(faults)}"
    )


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
    if announced > timeline.start_time > 0:  # some containers count from 0, wherever they begin
        announced -= timeline.start_time
    if announced > 1.1 * timeline.stop + 0.5:
        yield f"the header announces {clock(announced)}, the frames end at {end}: perhaps cut off"


def list_frames(reader: Reader, file: BinaryIO) -> Index:
    """The index from decoding everything and keeping nothing: what is shown, in that order."""
    stamps, lengths, keys, known = array("q"), array("q"), array("b"), array("b")
    stream, faults, most = reader.stream, reader.faults, _most_frames(reader)
    for packet in reader.packets():
        if _is_shown(packet, stream):
            lengths.append(packet.duration or 0)
        for frame in reader.pictures(packet):
            known.append(frame.pts is not None)
            stamps.append(frame.pts or 0)
            keys.append(frame.key_frame)
        if len(stamps) > most:
            _refuse(reader, len(stamps))
    if not stamps:
        raise MediaError(
            f"{reader.name}: none of its {len(lengths)} frames could be decoded{hint(faults)}"
        )
    losses: list[str] = []
    notes: list[str] = []
    if len(lengths) != len(stamps):
        said = losses if faults else notes
        said.append(_say_counts(len(lengths), len(stamps), faults))
    ticks: Stamps = np.asarray(stamps)
    base, sound, mended = _time_base(stream), sound_length(reader), None
    last, stamped = int(lengths[-1]) if lengths else 0, np.asarray(known, bool)
    if not stamped.all() or not is_sound(ticks, base, sound):
        mended = mend(ticks, stamped, last, base, sound)
        if mended is not None:
            notes += mended.notes
            ticks = np.sort(ticks[stamped])
        else:
            step = int(np.median(lengths)) or _guessed_step(stream)
            ticks = np.arange(len(stamps), dtype=np.int64) * step
            rate = float(1 / (step * base))
            notes.append(f"frames carry no times of their own; {rate:g} a second is assumed")
    timeline = _timeline(stream, ticks, 0, np.asarray(keys), mended)
    losses += _cut_off(stream, _timeline(stream, ticks, 0, np.asarray(keys)), [])
    losses += later_pictures(reader)
    shown, moved = reader.presentation, mended is not None and mended.is_moved
    return Index(timeline, None, shown, tuple(losses), tuple(notes), mended is not None, moved)


def _timeline(
    stream: VideoStream,
    ticks: Stamps,
    last_length: float,
    keys: NDArray[Any],
    mended: Mended | None = None,
) -> Timeline:
    """Stamps as seconds on the player's clock, which begins with the container; and the key
    frames, where `keys` is not 0."""
    base = _time_base(stream)
    times: Stamps | Ticks = ticks
    if mended is not None:
        times, last_length = mended.ticks, mended.stop - float(mended.ticks[-1])
    elif stream.codec_context.name == "gif":
        times, last_length = as_browsers_show(ticks, int(last_length))
    first = int(times[0]) * base
    assert isinstance(stream.container, InputContainer)
    began = stream.container.start_time  # microseconds, rounded
    origin = first if began is None else min(Fraction(began, 1_000_000), first)
    if mended is not None and mended.is_moved and first - origin > STILL_SECONDS:
        origin = first  # the container begins with a stamp that is hours off
    nearest = round(origin / base)
    if abs(nearest * base - origin) <= Fraction(1, 1_000_000):
        origin = nearest * base
        pts = (times - nearest) * base.numerator / base.denominator  # rounded once
    else:
        pts = times * base.numerator / base.denominator - float(origin)
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
