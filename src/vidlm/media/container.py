"""A container through PyAV: open it safely, pick the stream a player shows, list its frames.

The list comes from the packets' presentation stamps, sorted, and decodes nothing. Where stamps do
not tell the story (see decode.py) it comes from decoding everything once and keeping nothing.
"""

from __future__ import annotations

import codecs
from array import array
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO, cast

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from vidlm.errors import MediaError
from vidlm.media.clip import Limits, Timeline, clock

# Frame threads multiply a decoder's memory, and a server decodes several clips at a time.
_THREADS = 2

# Containers and raw streams that hold their own pictures. Playlists and lists of further files
# (hls, dash, concat, sdp ...) are not among them; FFmpeg checks this before a demuxer starts.
_FORMATS = (
    "mov,matroska,avi,flv,mpegts,mpeg,asf,ogg,gif,apng,mxf,nut,rm,wtv,dv,gxf,nsv,ivf,obu,"
    "h264,hevc,vvc,m4v,mpegvideo,vc1,h263,h261,yuv4mpegpipe"
)
# No protocol bears this name: nothing can be opened from inside a file.
_PROTOCOLS = "none"

Stamps = NDArray[np.int64]
# PyAV lets OSError and ValueError of the Python file that it reads through.
_READ_ERRORS = (av.FFmpegError, OSError, ValueError)


# ---- opening ---------------------------------------------------------------------------------


@contextmanager
def opened(file: BinaryIO, name: str, limits: Limits) -> Iterator[VideoStream]:
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": _PROTOCOLS}
    try:
        file.seek(0)
        container = av.open(file, "r", options=options, metadata_errors="replace")
    except _READ_ERRORS as error:
        raise MediaError(f"{name}: {_why_unreadable(file, error)}") from error
    with container:
        stream = _video_stream(container, name)
        limits.check(name, 1, stream.codec_context.height, stream.codec_context.width)
        stream.codec_context.options = {"max_pixels": str(limits.pixels)}  # the header may lie
        stream.codec_context.thread_type = "AUTO"
        stream.codec_context.thread_count = _THREADS
        yield stream


def _why_unreadable(file: BinaryIO, error: Exception) -> str:
    try:
        file.seek(0)
        head = file.read(512)
    except (OSError, ValueError):
        return f"cannot be read ({_reason(error)}); check the file and where it lies"
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*")):
        return "a still image, or several in a row; give images in a list: load_video([path])"
    if head[4:8] == b"ftyp":
        return (
            "an MP4 without its index (moov): it was cut off, is damaged or is still being "
            "written; get the complete file"
        )
    if _is_text(head):
        return (
            f"text, not a video (it begins {head[:24]!r}); playlists and web pages are not "
            "followed: give the video file itself"
        )
    return (
        "not a video that vidlm reads, or a damaged one; give MP4, MOV, MKV, WebM, AVI, MPEG, GIF "
        "or the like, or convert it: ffmpeg -i INPUT output.mp4"
    )


def _is_text(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # may end within a character
    except UnicodeDecodeError:
        return False
    return all(byte >= 32 or byte in b"\t\n\r\f" for byte in head)


def _video_stream(container: InputContainer, name: str) -> VideoStream:
    """The stream a player shows: FFmpeg's best one, but never a cover picture."""
    pictures = container.streams.video
    streams = [s for s in pictures if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = {"a cover picture" if s in pictures else s.type for s in container.streams}
        raise MediaError(
            f"{name}: no video stream, only {' and '.join(sorted(kinds)) or 'an empty container'}; "
            "give a file with moving pictures"
        )
    best = container.streams.best("video")
    stream = next((s for s in streams if best is not None and s.index == best.index), streams[0])
    if stream.codec_context is None:
        raise MediaError(
            f"{name}: PyAV has no decoder for its video stream; convert it: "
            "ffmpeg -i INPUT -c:v libx264 output.mp4"
        )
    return stream


# ---- listing ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Index:
    """The frames a player shows. stamps: theirs, ascending; None where frames go by count."""

    timeline: Timeline
    stamps: Stamps | None
    warnings: tuple[str, ...] = ()

    def row(self, stamp: int | None) -> int | None:
        """The row with this stamp, where there are stamps."""
        if stamp is None or self.stamps is None:
            return None
        row = int(np.searchsorted(self.stamps, stamp))
        return row if row < len(self.stamps) and self.stamps[row] == stamp else None


def list_packets(stream: VideoStream, name: str) -> Index | None:
    """The index from packets alone; None where their stamps do not tell frames apart."""
    stamps, lengths = array("q"), array("q")
    early, started, unstamped = 0, False, False
    faults: list[str] = []
    for packet in _packets(stream, faults):
        started = started or packet.is_keyframe
        if not _is_shown(packet, stream):
            continue
        early += not started
        unstamped = unstamped or packet.pts is None
        stamps.append(packet.pts or 0)
        lengths.append(packet.duration or 0)
    if not stamps:
        raise MediaError(f"{name}: its video stream holds no frames; is the file complete?")
    if early < len(stamps):  # nothing is shown before the first key frame, if there is one
        del stamps[:early], lengths[:early]
    order = np.argsort(np.asarray(stamps), kind="stable")
    ticks: Stamps = np.asarray(stamps)[order]
    if unstamped or (np.diff(ticks) == 0).any():
        return None
    timeline = _timeline(stream, ticks, lengths[order[-1]])
    return Index(timeline, ticks, tuple(_cut_off(stream, timeline, faults)))


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


def list_frames(stream: VideoStream, name: str) -> Index:
    """The index from decoding everything and keeping nothing: what is shown, in that order."""
    stamps, lengths = array("q"), array("q")
    unstamped = False
    faults: list[str] = []
    for packet in _packets(stream, faults):
        if _is_shown(packet, stream):
            lengths.append(packet.duration or 0)
        for frame in _pictures(stream, packet, faults):
            unstamped = unstamped or frame.pts is None
            stamps.append(frame.pts or 0)
    if not stamps:
        raise MediaError(
            f"{name}: none of its {len(lengths)} frames could be decoded{hint(faults)}"
        )
    warnings = []
    if len(lengths) != len(stamps):
        warnings.append(
            f"the file lists {len(lengths)} pictures and the decoder shows {len(stamps)}; frames "
            f"are numbered by what is shown{hint(faults)}"
        )
    ticks: Stamps = np.sort(np.asarray(stamps))
    if unstamped or (np.diff(ticks) == 0).any():
        step = int(np.median(lengths)) or _guessed_step(stream)
        ticks = np.arange(len(stamps), dtype=np.int64) * step
        rate = float(1 / (step * _time_base(stream)))
        warnings.append(f"frames carry no times of their own; {rate:g} a second is assumed")
    timeline = _timeline(stream, ticks, 0)
    return Index(timeline, None, (*warnings, *_cut_off(stream, timeline, [])))


def _timeline(stream: VideoStream, ticks: Stamps, last_length: int) -> Timeline:
    """Stamps as seconds on the player's clock, which begins with the container."""
    base = _time_base(stream)
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
    return Timeline(pts, float(pts[-1]) + float(last_length * base), float(origin))


def _time_base(stream: VideoStream) -> Fraction:
    return stream.time_base or Fraction(1, 1000)


def _guessed_step(stream: VideoStream) -> int:
    """Ticks from frame to frame by the header's rate, or 25 a second where it has none."""
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    return max(round(1 / (rate * _time_base(stream))), 1)


# ---- reading ---------------------------------------------------------------------------------


def decoded(stream: VideoStream, faults: list[str]) -> Generator[VideoFrame, None, None]:
    """The frames in the order the decoder gives them, past damage; what it refused, in `faults`."""
    for packet in _packets(stream, faults):
        yield from _pictures(stream, packet, faults)


def _packets(stream: VideoStream, faults: list[str]) -> Iterator[Packet[VideoStream]]:
    """Packets up to the end, or to where the file breaks off; the last one flushes the decoder."""
    assert isinstance(stream.container, InputContainer)
    try:
        yield from stream.container.demux(stream)
    except _READ_ERRORS as error:
        faults.append(_reason(error))
        yield cast(Packet[VideoStream], Packet())


def _pictures(
    stream: VideoStream, packet: Packet[VideoStream], faults: list[str]
) -> list[VideoFrame]:
    try:
        return stream.codec_context.decode(packet)
    except (av.FFmpegError, ValueError) as error:
        faults.append(_reason(error))
        return []


def _is_shown(packet: Packet[VideoStream], stream: VideoStream) -> bool:
    # An edit list marks what it cuts; a packet of no bytes repeats the picture before it.
    if packet.is_discard or not packet.size:
        return False
    if stream.codec_context.name in ("vp8", "libvpx"):  # a golden picture, for reference only
        return bool(memoryview(packet)[0] & 0x10)  # show_frame, RFC 6386 section 9.1
    return True


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def hint(faults: list[str]) -> str:
    return f" ({faults[0]})" if faults else ""
