"""Clips that begin late or in an open group of pictures, and clips whose sound goes on."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
import pytest

import clips
from vidlm.errors import InvalidArgument, MediaError
from vidlm.media import decode, load_video

# ---- clips that do not begin at 0 ------------------------------------------------------------


def later(seconds: float) -> clips.Edit:
    def edit(packets: list[av.Packet]) -> list[av.Packet]:
        for packet in packets:
            steps = round(seconds / packet.time_base)
            packet.pts, packet.dts = packet.pts + steps, packet.dts + steps
        return packets

    return edit


@pytest.mark.parametrize("seconds", [10.0, 1.7e9])
@pytest.mark.parametrize("container", ["matroska", "mpegts", "flv", "mp4", "mov", "nut"])
def test_a_whole_clip_that_begins_late_is_whole(container: str, seconds: float) -> None:
    if seconds > 1e6 and container != "matroska":
        seconds = 20_000.0  # others have shorter clocks
    video = load_video(clips.clip(20, container=container, edit=later(seconds)), on_error="raise")
    clips.check(video, range(20))
    assert video.start_time == pytest.approx(seconds)
    assert (video.pts[0], video.warnings) == (0.0, ())
    assert video.duration == pytest.approx(0.8, abs=0.05)


def boxes(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        yield data[at : at + size]
        at += size


def test_a_stream_from_its_third_segment_on_is_whole() -> None:
    target = io.BytesIO()
    flags = {"movflags": "dash+frag_keyframe+empty_moov"}
    with av.open(target, "w", format="mp4", options=flags) as output:
        stream = output.add_stream("libx264", rate=25, options={"g": "10", "sc_threshold": "0"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for number in range(50):
            frame = av.VideoFrame.from_ndarray(clips.picture(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    parts = list(boxes(target.getvalue()))
    fragments = [place for place, part in enumerate(parts) if part[4:8] == b"moof"]
    kept = parts[: fragments[0]] + parts[fragments[2] :]
    video = load_video(b"".join(part for part in kept if part[4:8] != b"sidx"), on_error="raise")
    assert clips.numbers(video.frames) == list(range(20, 50))
    assert (video.pts[0], video.warnings) == (0.0, ())


def test_a_late_clip_that_was_cut_off_still_says_so() -> None:
    data = clips.clip(100, container="matroska", codec="mpeg4", edit=later(1000))
    video = load_video(data[: len(data) * 6 // 10])
    assert "the header announces 00:04" in video.warnings[0]
    with pytest.raises(MediaError, match="perhaps cut off"):
        load_video(data[: len(data) * 6 // 10], on_error="raise")


# ---- clips that begin in an open group of pictures -------------------------------------------

OPEN = [
    (
        "libx265",
        {"x265-params": "log-level=0:keyint=12:min-keyint=12:open-gop=1:bframes=3:scenecut=0"},
    ),
    (
        "libx264",
        {"x264-params": "keyint=12:min-keyint=12:open-gop=1:b-adapt=0:bframes=3:scenecut=0"},
    ),
    ("mpeg2video", {"bf": "2", "g": "12"}),
]


def from_second_key(packets: list[av.Packet]) -> list[av.Packet]:
    return packets[[place for place, p in enumerate(packets) if p.is_keyframe][1] :]


@pytest.mark.parametrize("container", ["matroska", "mpegts", "mp4", "mov"])
@pytest.mark.parametrize(("codec", "options"), OPEN, ids=[codec for codec, _ in OPEN])
def test_pictures_that_lead_into_a_clip_cost_no_decoding(
    codec: str, options: dict, container: str, monkeypatch
) -> None:
    monkeypatch.setattr(decode, "list_frames", None)  # would be called to decode everything
    how = {"container": container, "codec": codec, "options": options}
    data = clips.clip(60, edit=from_second_key, **how)
    video = load_video(data)
    assert clips.numbers(video.frames) == list(range(12, 60))
    few = load_video(data, num_frames=4)
    assert clips.numbers(few.frames) == [12, 24, 36, 48]
    assert few.indices.tolist() == [0, 12, 24, 36]
    assert clips.numbers(load_video(data, indices=[0, 47, 1]).frames) == [12, 59, 13]
    if container in ("matroska", "mpegts"):  # an edit list hides them elsewhere
        assert "the decoder shows 48; frames are numbered by what is shown" in video.warnings[0]


# ---- sound that goes on ----------------------------------------------------------------------


def with_sound(seconds: float, container: str, frames: int = 3) -> bytes:
    """A picture a second, and sound."""
    target = io.BytesIO()
    codecs = ("libvpx", "libopus") if container == "webm" else ("libx264", "aac")
    with av.open(target, "w", format=container) as output:
        stream = output.add_stream(codecs[0], rate=1)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        audio = output.add_stream(codecs[1], rate=48000)
        packets = []
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(clips.picture(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        kind = "flt" if codecs[1] == "libopus" else "fltp"
        size = audio.codec_context.frame_size or 1024
        shape = (1, 2 * size) if kind == "flt" else (2, size)
        for place in range(round(seconds * 48000 / size)):
            sound = av.AudioFrame.from_ndarray(np.zeros(shape, np.float32), kind, "stereo")
            sound.sample_rate, sound.pts = 48000, place * size
            packets += audio.encode(sound)
        packets += audio.encode(None)
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            output.mux(packet)
    return target.getvalue()


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska", "webm", "flv", "mpegts"])
def test_the_last_picture_stays_while_the_sound_goes_on(container: str) -> None:
    data = with_sound(20, container)
    clips.check(load_video(data, times=[10, 0.5, "0:19"]), [2, 0, 2])
    clips.check(load_video(data, start=10), [2])
    clips.check(load_video(data, start=5, end=7, fps=1), [2])
    clips.check(load_video(data, fps=1), [0, 1, 2])
    whole = load_video(data)
    assert (whole.duration, whole.fps) == pytest.approx((3, 1), abs=0.1)
    with pytest.raises(InvalidArgument, match="beyond the end of the clip at 20"):
        load_video(data, times=[21])


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_sound_that_is_a_little_longer_changes_nothing(container: str) -> None:
    data = with_sound(3.3, container)
    with pytest.raises(InvalidArgument, match="beyond the end of the clip at 3 s"):
        load_video(data, times=[3.1])


def test_sound_that_was_cut_off_is_not_waited_for() -> None:
    data = with_sound(60, "matroska", frames=40)
    end = data.index(b"\x1f\x43\xb6\x75", len(data) // 3)  # a cluster
    video = load_video(data[:end])
    with pytest.raises(InvalidArgument, match="beyond the end"):
        load_video(data[:end], times=[video.duration + 5])


# ---- pictures that go on in another stream ---------------------------------------------------


def ts(first: int, pid: int) -> bytes:
    target = io.BytesIO()
    with av.open(target, "w", format="mpegts", options={"mpegts_start_pid": str(pid)}) as output:
        stream = output.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for number in range(25):
            frame = av.VideoFrame.from_ndarray(clips.picture(first + number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return target.getvalue()


def test_pictures_that_go_on_in_another_stream_are_named() -> None:
    video = load_video(ts(0, 0x100) + ts(25, 0x200))
    clips.check(video, range(25))
    assert "the pictures go on in another stream (0x200 after 0x100)" in video.warnings[0]
    same = load_video(ts(0, 0x100) + ts(25, 0x100))
    assert clips.numbers(same.frames) == list(range(50))
    assert "another stream" not in " ".join(same.warnings)


def test_a_second_stream_at_the_same_time_is_none_that_follows() -> None:
    target = io.BytesIO()
    with av.open(target, "w", format="mpegts") as output:
        streams = [output.add_stream("mpeg2video", rate=25) for _ in range(2)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for number in range(25):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(clips.picture(number), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                output.mux(stream.encode(frame))
        for stream in streams:
            output.mux(stream.encode(None))
    video = load_video(target.getvalue())
    clips.check(video, range(25))
    assert video.warnings == ()
