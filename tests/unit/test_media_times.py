"""Time stamps that repeat, are missing or are hours off; and clips that begin or end oddly."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction

import av
import numpy as np
import pytest

import clips
from vidlm.errors import InvalidArgument, MediaError, MediaLimitError
from vidlm.media import Limits, decode, load_video
from vidlm.media.timestamps import Mended, is_sound, mend

MS = Fraction(1, 1000)
HOUR = 3600.0
# Ten frames a second, then a still picture every five seconds, then ten frames a second.
TIMES = [*(i * 0.1 for i in range(20)), *(2 + i * 5.0 for i in range(13))]
TIMES += [62.1 + i * 0.1 for i in range(10)]
BY_FPS = [0, *range(20, 32)]  # every five seconds

FORMATS = [
    {"container": "matroska"},
    {"container": "matroska", "options": {"bf": "2", "g": "10"}},
    {"container": "mp4"},
    {"container": "mp4", "options": {"bf": "2", "g": "10"}},
    {"container": "mov", "options": {"bf": "2", "g": "10"}},
    {"container": "mpegts", "options": {"bf": "2", "g": "10"}},
    {"container": "flv"},
    {"container": "webm", "codec": "libvpx", "options": {"deadline": "realtime"}},
]
WIDE = [how for how in FORMATS if how["container"] not in ("mp4", "mov")]  # of wide stamps


def named(how: dict) -> str:
    return how["container"] + ("-b" if "bf" in how.get("options", {}) else "")


Change = Callable[[list[float]], None]


def restamped(change: Change) -> clips.Edit:
    """Other presentation times, in seconds and in the order of display, and times to decode at."""

    def edit(packets: list[av.Packet]) -> list[av.Packet]:
        shown = sorted(range(len(packets)), key=lambda place: packets[place].pts)
        base = packets[0].time_base
        times = [float(packets[place].pts * base) for place in shown]
        change(times)
        for time, place in zip(times, shown, strict=True):
            packets[place].pts = round(time / base)
        decoded = -(1 << 40)
        for place, packet in enumerate(packets):
            ahead = min(p.pts for p in packets[place:])
            packet.dts = decoded = max(decoded + 1, ahead - len(packets) + place)
        return packets

    return edit


def changed(how: dict, change: Change) -> bytes:
    return clips.clip(len(TIMES), times=TIMES, edit=restamped(change), **how)


def check_kept(data: bytes, note: str, least: float = 62.5, most: float = 63.3) -> None:
    """All frames, by number and by time, and a word of what was mended."""
    video = load_video(data)
    clips.check(video, range(len(TIMES)))
    assert (np.diff(video.pts) > 0).all()
    assert note in " ".join(video.warnings)
    assert "cut off" not in " ".join(video.warnings)
    assert least < video.duration < most
    assert load_video(data, fps=0.2).indices.tolist()[1:] == BY_FPS[1:]
    clips.check(load_video(data, times=[30]), [25])
    clips.check(load_video(data, num_frames=5), [0, 8, 17, 25, 34])
    clips.check(load_video(data, start=20.5, end=31), [23, 24, 25])
    load_video(data, on_error="raise")


# ---- stamps that repeat, go back a little, or are missing ------------------------------------


def equal(*places: int) -> Change:
    def change(times: list[float]) -> None:
        for place in places:
            times[place] = times[place - 1]

    return change


@pytest.mark.parametrize("how", FORMATS, ids=named)
@pytest.mark.parametrize("places", [(11,), (11, 12), (5, 36), (42,), (41, 42)], ids=str)
def test_equal_stamps_cost_no_other_frame_its_time(how: dict, places: tuple[int, ...]) -> None:
    check_kept(changed(how, equal(*places)), f"{len(places)} of 43 frames share their time stamp")


@pytest.mark.parametrize("how", WIDE, ids=named)
def test_equal_stamps_at_the_beginning(how: dict) -> None:
    check_kept(changed(how, equal(1)), "1 of 43 frames share their time stamp")


@pytest.mark.parametrize("how", FORMATS, ids=named)
def test_a_stamp_that_goes_back_a_little_is_sorted(how: dict) -> None:
    def back(times: list[float]) -> None:
        times[11] -= 0.12

    check_kept(changed(how, back), "1 of 43 frames are stamped earlier than the one before")


def test_frames_without_a_stamp_are_placed_between_their_neighbours() -> None:
    def drop(packets: list[av.Packet]) -> list[av.Packet]:
        for place in (11, 12):
            packets[place].pts = None
        return packets

    how = {"container": "mpegts", "options": {"bf": "2", "g": "10"}, "edit": drop}
    video = load_video(clips.clip(len(TIMES), times=TIMES, **how))
    clips.check(video, range(len(TIMES)))
    assert "2 of 43 frames carry no time stamp" in " ".join(video.warnings)
    assert video.pts == pytest.approx(TIMES, abs=0.001)


def mended(*stamps: int | None, last: int = 40, sound: float = 0.0) -> Mended | None:
    values = np.array([0 if stamp is None else stamp for stamp in stamps])
    return mend(values, np.array([stamp is not None for stamp in stamps]), last, MS, sound)


FAR = 36_000_000  # ten hours in milliseconds


@pytest.mark.parametrize(
    ("stamps", "times"),
    [
        ((0, 40, 40, 120), [0, 40, 80, 120]),
        ((0, 40, 40, 60), [0, 40, 50, 60]),
        ((0, 40, 80, 80, 80, 9000), [0, 40, 80, 120, 160, 9000]),
        ((0, 40, 80, 80, 80, 95), [0, 40, 80, 85, 90, 95]),
        ((0, 40, 80, 80), [0, 40, 80, 100]),
        ((0, 0, 40, 80), [0, 20, 40, 80]),
        ((0, 80, 40, 120), [0, 40, 80, 120]),
        ((0, None, 80, 120), [0, 40, 80, 120]),
        ((None, None, 80, 120, 160), [0, 40, 80, 120, 160]),
        ((0, 40, 80, None, None), [0, 40, 80, 120, 160]),
        ((0, 40, 80, 120, FAR), [0, 40, 80, 120, 160]),
        ((0, 40, 80, FAR, FAR + 40), [0, 40, 80, 120, 160]),
        ((0, 40, FAR, 120, 160), [0, 40, 80, 120, 160]),
        ((0, 40, FAR, FAR + 40, 160, 200), [0, 40, 80, 120, 160, 200]),
        ((FAR, 40, 80, 120), [0, 40, 80, 120]),
        ((0, 40, 2000, 120, 160), [0, 40, 80, 120, 160]),
        ((0, 40, -FAR, 120, 160), [0, 40, 80, 120, 160]),
        ((5000, 5040, 5080, 0, 40), [5000, 5040, 5080, 5120, 5160]),
        # A still picture of two hours is one, and so is a clip of nothing else.
        ((0, 40, 7_200_000, 7_200_040), [0, 40, 7_200_000, 7_200_040]),
        ((0, FAR), [0, FAR]),
        ((0, FAR, 2 * FAR, 3 * FAR), [0, FAR, 2 * FAR, 3 * FAR]),
    ],
)
def test_where_mended_frames_come(stamps: tuple[int | None, ...], times: list[float]) -> None:
    result = mended(*stamps)
    assert result is not None
    expected = np.array(times)
    assert (result.ticks - result.ticks[0]).tolist() == (expected - expected[0]).tolist()
    assert result.stop > result.ticks[-1]


def test_a_gap_as_long_as_the_sound_is_a_still_picture() -> None:
    stamps = np.array([0, 40, 80, FAR, FAR + 40])
    assert not is_sound(stamps, MS)
    assert is_sound(stamps, MS, sound=10 * HOUR)
    result = mended(*stamps.tolist(), sound=10 * HOUR)
    assert result is not None
    assert result.ticks.tolist() == stamps.tolist()


def test_equal_stamps_alone_are_no_clock() -> None:
    assert mended(*[7] * 20) is None
    assert mended(None, None, 3) is None


# ---- stamps that are hours off ---------------------------------------------------------------


def off(hours: float, *places: int) -> Change:
    def change(times: list[float]) -> None:
        for place in places:
            times[place] += hours * HOUR

    return change


@pytest.mark.parametrize("how", [FORMATS[0], FORMATS[1], FORMATS[-1]], ids=named)
@pytest.mark.parametrize("hours", [10, 60])
@pytest.mark.parametrize(
    "places",
    [(42,), (10, 25), (10, 11, 12), (0,), range(20, 43)],
    ids=["last", "two", "three", "first", "jump"],
)
def test_hours_off_are_an_error_and_no_length(how: dict, hours: int, places: range) -> None:
    check_kept(changed(how, off(hours, *places)), "have times that do not follow")


@pytest.mark.parametrize("hours", [10, 60])
def test_a_clock_that_jumps_in_an_flv(hours: int) -> None:
    data = changed({"container": "flv"}, off(hours, *range(20, 43)))
    check_kept(data, "20 of 43 frames have times that do not follow")  # most are right


def test_few_frames_are_chosen_by_the_mended_clock() -> None:
    """As models choose: ten seconds of 25 frames a second, two of them ten hours off."""
    data = clips.clip(250, container="matroska", edit=restamped(off(10, 100, 180)))
    video = load_video(data, fps=1)
    clips.check(video, range(0, 250, 25))
    assert video.duration == pytest.approx(10, abs=0.05)
    assert video.fps == pytest.approx(25, rel=0.01)
    assert len(load_video(data, sampling="videollama3")) == 10
    assert "2 of 250 frames have times" in video.warnings[0]


@pytest.mark.parametrize("minutes", [3, 60])
@pytest.mark.parametrize("how", FORMATS, ids=named)
def test_a_picture_that_stands_still_for_minutes_does_so(how: dict, minutes: int) -> None:
    video = load_video(changed(how, off(minutes / 60, *range(20, 43))))
    clips.check(video, range(43))
    assert video.duration == pytest.approx(63 + 60 * minutes, abs=0.3)
    assert video.warnings == ()


def test_the_limit_counts_what_is_chosen_from() -> None:
    times = [i * 20 * HOUR for i in range(5)]  # slowly, but steadily
    data = clips.clip(5, container="matroska", times=times)
    with pytest.raises(MediaLimitError, match="s long, the limit is 172800 s"):
        load_video(data)
    clips.check(load_video(data, end="30:00:00"), [0, 1])
    clips.check(load_video(data, start=50 * HOUR, end=70 * HOUR), [2, 3])
    with pytest.raises(MediaLimitError, match="the limit is 3600 s"):
        load_video(data, end=2 * HOUR, limits=Limits(duration=HOUR))


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
