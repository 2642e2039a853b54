"""A container through PyAV: open it safely, pick the stream a player shows, read and seek in it."""

from __future__ import annotations

import codecs
import os
from collections.abc import Container, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from fractions import Fraction
from typing import BinaryIO, cast

import av
from av.codec.codec import UnknownCodecError
from av.codec.context import CodecContext
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vidlm.errors import MediaError
from vidlm.media.clip import Deadline, Limits
from vidlm.media.mjpeg import is_sequence
from vidlm.media.pyav import fraction, open_input
from vidlm.media.tracks import Presentation, Track, check_complete, track_of

# Frame threads multiply a decoder's memory, and a server decodes several clips at a time.
_THREADS = 2
# Up to these pixels a second thread costs more than it does (dav1d's more than others').
_SMALL, _SMALL_AV1 = 400 * 300, 1280 * 720
# Above these, threads share a picture instead of holding several at once.
_LARGE = 2048 * 1152

# Containers and raw streams that hold their own pictures. Playlists and lists of further files
# (hls, dash, concat, sdp ...) are not among them; FFmpeg checks this before a demuxer starts.
_FORMATS = (
    "mov,matroska,avi,flv,mpegts,mpeg,asf,ogg,gif,apng,mxf,nut,rm,wtv,dv,gxf,nsv,ivf,obu,"
    "h264,hevc,vvc,m4v,mpegvideo,vc1,h263,h261,yuv4mpegpipe,mjpeg"
)
_NO_ALPHA = "no decoder here reads its transparency: the colours below it show"
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
_NO_VIDEO = Disposition.attached_pic | Disposition.dependent  # covers, and tiles of a picture
_JPEG = b"\xff\xd8\xff"
_STILL = "a still image; give images in a list: load_video([path])"
# No protocol bears this name: nothing can be opened from inside a file.
_PROTOCOLS = "none"

# PyAV lets OSError and ValueError of the Python file that it reads through.
_READ_ERRORS = (av.FFmpegError, OSError, ValueError)


class Reader:
    """The video stream of an open container: its packets, its pictures, its key frames.

    codec: what decodes it. presentation: how its pictures are shown. faults: what the demuxer or
    the decoder refused so far, in its words.
    """

    def __init__(
        self,
        stream: VideoStream,
        codec: VideoCodecContext,
        presentation: Presentation,
        name: str,
        limits: Limits,
        deadline: Deadline,
    ) -> None:
        self.stream, self.codec, self.presentation = stream, codec, presentation
        self.name, self.limits = name, limits
        self.faults: list[str] = []
        self._deadline = deadline
        self._packets: Iterator[Packet[VideoStream]] = iter(())
        self._begun = False

    @property
    def fresh(self) -> bool:
        """Whether nothing was read yet."""
        return not self._begun

    @property
    def container(self) -> InputContainer:
        assert isinstance(self.stream.container, InputContainer)
        return self.stream.container

    def check_time(self) -> None:
        """Raises MediaLimitError after the deadline."""
        self._deadline.check()

    def packets(self) -> Iterator[Packet[VideoStream]]:
        """Packets up to the end, or to where the file breaks off; the last flushes the decoder."""
        if not self._begun:
            self._demux()
        while True:
            self._deadline.check()
            try:
                packet = next(self._packets)
            except (StopIteration, IndexError):
                # PyAV's demux loses count of streams that appear late (MPEG-TS, FLV), at its end.
                return
            except _READ_ERRORS as error:
                self.faults.append(_reason(error))
                self._packets = iter(())
                yield cast("Packet[VideoStream]", Packet())
                return
            yield packet

    def pictures(self, packet: Packet[VideoStream]) -> list[VideoFrame]:
        try:
            return self.codec.decode(packet)
        except (av.FFmpegError, ValueError) as error:
            self.faults.append(_reason(error))
            return []

    def decoded(
        self, wanted: Container[int] | None = None, whole: int = 0
    ) -> Generator[VideoFrame, None, None]:
        """The frames in the order the decoder gives them, past damage.

        With `wanted`, stamps: behind the first `whole` packets, pictures that no other refers to
        are decoded only where they are wanted. That changes no other picture.
        """
        codec = self.codec
        for number, packet in enumerate(self.packets()):
            skips = wanted is not None and number >= whole and packet.pts not in wanted
            if skips != (codec.skip_frame == "NONREF"):
                codec.skip_frame = "NONREF" if skips else "DEFAULT"
            yield from self.pictures(packet)

    def seek(self, stamp: int) -> bool:
        """Go on with the key frame of this stamp; False where that cannot be done, and then where
        the reader is cannot be told."""
        try:
            self.container.seek(stamp, stream=self.stream)
            self.codec.flush_buffers()
            self._demux()
            first = next(self._packets, None)
        except (*_READ_ERRORS, IndexError):  # see `packets`
            return False
        if first is None or not first.is_keyframe or first.pts is None or first.pts > stamp:
            return False
        rest = self._packets
        self._packets = (packet for each in ([first], rest) for packet in each)
        return True

    def others(self, streams: Sequence[Stream], moment: float) -> Iterator[Packet[Stream]]:
        """The packets of any streams from about `moment` on, in seconds of the container's time.

        Afterwards the reader stands at the end; `seek` leads back.
        """
        base = fraction(streams[0].time_base) or Fraction(1, 1000)
        self._begun, self._packets = True, iter(())
        try:
            self.container.seek(int(moment / base), stream=streams[0])
            for packet in self.container.demux(*streams):
                self._deadline.check()
                if packet.size:
                    yield packet
        except (*_READ_ERRORS, IndexError):  # see `packets`
            return

    def _demux(self) -> None:
        self._packets, self._begun = iter(self.container.demux(self.stream)), True


@contextmanager
def opened(file: BinaryIO, name: str, limits: Limits, deadline: Deadline) -> Iterator[Reader]:
    options = {
        "format_whitelist": _FORMATS,
        "protocol_whitelist": _PROTOCOLS,
        "max_pixels": str(limits.pixels),  # for decoders that look into the first pictures
    }
    _check_size(file, name, limits)
    try:
        file.seek(0)
        head = file.read(16)
        check_complete(file, head, name)
        series = is_sequence(file)
        if head.startswith(_JPEG) and not series:  # of which FFmpeg would show every part
            raise MediaError(f"{name}: {_STILL}")
        file.seek(0)
        container = open_input(file, options, "mjpeg" if series else None)
    except MediaError:  # a ValueError too, but ours already
        raise
    except _READ_ERRORS as error:
        raise MediaError(f"{name}: {_why_unreadable(file, error)}") from error
    with container:
        stream = _video_stream(container, name)
        track = _track(file, stream, name)
        if stream.codec_context is None:
            raise MediaError(
                f"{name}: PyAV has no decoder for its video stream; convert it: "
                "ffmpeg -i INPUT -c:v libx264 output.mp4"
            )
        limits.check(name, 1, *_picture_size(file, stream, options))
        presentation, codec = _presentation(stream, track), _codec(stream)
        if codec is None:
            codec = stream.codec_context
            presentation = replace(presentation, notes=(*presentation.notes, _NO_ALPHA))
        elif codec is not stream.codec_context:
            presentation = replace(presentation, follows_frames=False)
        codec.options = {"max_pixels": str(limits.pixels)}  # the header may lie
        _set_threads(codec, stream.codec_context)
        yield Reader(stream, codec, presentation, name, limits, deadline)


def _picture_size(file: BinaryIO, stream: VideoStream, options: dict[str, str]) -> tuple[int, int]:
    """Height and width by the header. A decoder that refuses them for their size forgets them, so
    the header is then read without one."""
    codec = stream.codec_context
    if codec.height and codec.width:
        return codec.height, codec.width
    at = file.tell()  # FFmpeg reads on from where it left the file
    size = 0, 0
    with suppress(*_READ_ERRORS, IndexError):
        file.seek(0)
        with open_input(file, {**options, "codec_whitelist": "none"}) as bare:
            codec = bare.streams.video[stream.container.streams.video.index(stream)].codec_context
            size = codec.height, codec.width
    file.seek(at)
    return size


def _track(file: BinaryIO, stream: VideoStream, name: str) -> Track:
    """What the header says of the stream. Raises MediaError for an encrypted one."""
    container = stream.container
    ordinal = container.streams.video.index(stream)
    try:
        track = track_of(file, container.format.name, stream.id, ordinal)
    except (OSError, ValueError) as error:
        raise MediaError(f"{name}: {_why_unreadable(file, error)}") from error
    if track.encryption:
        raise MediaError(
            f"{name}: its video is encrypted ({track.encryption}); decrypt it with the tool and "
            "the key of whoever owns it, or ask them for a clear copy"
        )
    return track


def _presentation(stream: VideoStream, track: Track) -> Presentation:
    """How the container wants the pictures to be shown."""
    aspect = fraction(stream.sample_aspect_ratio)
    # Where the container has an aspect of its own, that counts; else each frame's does.
    follows = not track.has_aspect and aspect == fraction(stream.codec_context.sample_aspect_ratio)
    notes: tuple[str, ...] = ()
    if stream.container.format.name == "mjpeg":
        notes = ("JPEGs in a row carry no times of their own; 25 a second is assumed",)
    if track.has_alpha_beside:
        notes = (_NO_ALPHA,)
    return Presentation(aspect, track.crop, follows, notes)


def _codec(stream: VideoStream) -> VideoCodecContext | None:
    """The decoder to use; None where only one is left that does not see the transparency.

    FFmpeg's own decoders of VP8 and VP9 do not know the alpha that WebM keeps beside a picture.
    """
    metadata = {key.lower(): value for key, value in stream.metadata.items()}
    name = _ALPHA_DECODERS.get(stream.codec_context.name)
    if name is None or metadata.get("alpha_mode") != "1":
        return stream.codec_context
    try:
        codec = CodecContext.create(name, "r")
    except UnknownCodecError:
        return None
    assert isinstance(codec, VideoCodecContext)
    codec.extradata = stream.codec_context.extradata
    return codec


def _set_threads(codec: VideoCodecContext, declared: VideoCodecContext) -> None:
    """`declared` has the size that the header gives."""
    pixels = declared.height * declared.width
    small = pixels <= (_SMALL_AV1 if "av1" in codec.name else _SMALL)
    codec.thread_type = "SLICE" if pixels > _LARGE else "AUTO"
    codec.thread_count = 1 if small else _THREADS


def _check_size(file: BinaryIO, name: str, limits: Limits) -> None:
    try:
        size = file.seek(0, os.SEEK_END) or file.tell()
    except (OSError, ValueError) as error:
        raise MediaError(f"{name}: {_why_unreadable(file, error)}") from error
    limits.check_file(name, size)


def _why_unreadable(file: BinaryIO, error: Exception) -> str:
    try:
        file.seek(0)
        head = file.read(512)
    except (OSError, ValueError):
        return f"cannot be read ({_reason(error)}); check the file and where it lies"
    if head.startswith((_JPEG, b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*")):
        return _STILL
    if _is_sound(head):
        return "sound alone, without pictures; give a file with moving pictures"
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


def _is_sound(head: bytes) -> bool:
    """WAV, AIFF, FLAC, MP3, AAC and the like, which are no containers of pictures."""
    named = head.startswith((b"ID3", b"fLaC", b"caff", b".snd", b"#!AMR", b"MThd", b"\x0b\x77"))
    chunks = ((b"RIFF", b"WAVE"), (b"FORM", b"AIFF"), (b"FORM", b"AIFC"))
    chunked = (head[:4], head[8:12]) in chunks
    frame = head[:1] == b"\xff" and head[1:2] >= b"\xe0"  # MPEG audio, ADTS
    return named or chunked or frame


def _is_text(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # may end within a character
    except UnicodeDecodeError:
        return False
    return all(byte >= 32 or byte in b"\t\n\r\f" for byte in head)


def _video_stream(container: InputContainer, name: str) -> VideoStream:
    """The stream a player shows: FFmpeg's best one, but never a cover picture."""
    pictures = container.streams.video
    streams = [s for s in pictures if not s.disposition & _NO_VIDEO]
    if pictures and all(s.disposition & Disposition.dependent for s in pictures):
        raise MediaError(
            f"{name}: a picture in {len(pictures)} tiles of a form that vidlm does not put "
            "together; save it as JPEG or PNG"
        )
    if not streams:
        kinds = {"a cover picture" if s in pictures else s.type for s in container.streams}
        raise MediaError(
            f"{name}: no video stream, only {' and '.join(sorted(kinds)) or 'an empty container'}; "
            "give a file with moving pictures"
        )
    best = container.streams.best("video")
    return next((s for s in streams if best is not None and s.index == best.index), streams[0])


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def hint(faults: Sequence[str]) -> str:
    """The first of them in brackets, if there is one."""
    return f" ({faults[0]})" if faults else ""
