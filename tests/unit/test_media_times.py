"""Time stamps that repeat, go back, are missing or are hours off cost no other frame its time."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
import pytest

import clips
from vidlm.errors import MediaLimitError
from vidlm.media import Limits, load_video
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
