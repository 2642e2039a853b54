"""What is decoded for a choice of frames, and what bounds it: seeks, shots, sizes, limits."""

from __future__ import annotations

import io
import threading
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import clips
from vidlm.errors import InvalidArgument, MediaError, MediaLimitError
from vidlm.media import Limits, load_video
from vidlm.media.clip import Deadline, Timeline
from vidlm.media.container import Reader, opened
from vidlm.media.listing import Index, list_packets, list_table
from vidlm.media.picture import Painter
from vidlm.media.walk import spans_of, split

B_FRAMES = {"bf": "2", "g": "10"}


@pytest.fixture(scope="module")
def mp4() -> bytes:
    """20 numbered frames at 25 a second, H.264 with B-frames and two key frames."""
    return clips.clip(20, options=B_FRAMES)


# ---- seeking ---------------------------------------------------------------------------------


class Reads:
    """Counts what a reader does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seeks: list[bool] = []
        self.drawn = 0
        seek, pictures = Reader.seek, Reader.pictures

        def counted_seek(reader: Reader, stamp: int) -> bool:
            self.seeks.append(seek(reader, stamp))
            return self.seeks[-1]

        def counted_pictures(reader: Reader, packet: av.Packet) -> list[av.VideoFrame]:
            frames = pictures(reader, packet)
            self.drawn += len(frames)
            return frames

        monkeypatch.setattr(Reader, "seek", counted_seek)
        monkeypatch.setattr(Reader, "pictures", counted_pictures)


LONG = {"bf": "2", "g": "20", "keyint_min": "20", "sc_threshold": "0"}


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska"])
def test_few_frames_of_a_long_clip_are_sought(container: str, monkeypatch) -> None:
    data = clips.clip(200, container=container, options=LONG)
    reads = Reads(monkeypatch)
    clips.check(load_video(data, num_frames=4), [0, 50, 100, 150])
    assert reads.seeks
    assert all(reads.seeks)
    assert reads.drawn < 100
    clips.check(load_video(data, indices=[199, 3, 3, 61]), [199, 3, 3, 61])
    clips.check(load_video(data, times=[7.98, "0:00.04"]), [199, 1])


def test_many_frames_are_decoded_straight_through(monkeypatch) -> None:
    data = clips.clip(100, options=LONG)
    reads = Reads(monkeypatch)
    clips.check(load_video(data, num_frames=20), range(0, 100, 5))
    assert reads.seeks == []


def test_a_seek_that_arrives_elsewhere_changes_nothing(monkeypatch) -> None:
    data = clips.clip(200, options=LONG)
    monkeypatch.setattr(Reader, "seek", lambda reader, stamp: False)
    clips.check(load_video(data, num_frames=4), [0, 50, 100, 150])


def test_a_seek_to_an_earlier_key_frame_is_good_enough(monkeypatch) -> None:
    data = clips.clip(200, options=LONG)
    seek = Reader.seek
    monkeypatch.setattr(Reader, "seek", lambda reader, stamp: seek(reader, stamp - 20 * 512))
    clips.check(load_video(data, num_frames=4), [0, 50, 100, 150])


def test_the_tables_of_an_mp4_say_what_its_packets_say() -> None:
    for options in (LONG, {"bf": "0"}, B_FRAMES):
        data = clips.clip(60, options=options)
        deadline = Deadline("clip", 60)
        with opened(io.BytesIO(data), "clip", Limits(), deadline) as reader:
            quick = list_table(reader, io.BytesIO(data))
            slow = list_packets(reader, io.BytesIO(data))
        assert quick is not None
        assert slow is not None
        assert quick.stamps.tolist() == slow.stamps.tolist()
        assert quick.timeline.pts.tolist() == slow.timeline.pts.tolist()
        assert quick.timeline.keys.tolist() == slow.timeline.keys.tolist()
        assert quick.timeline.stop == slow.timeline.stop


@pytest.mark.parametrize("place", [b"stts", b"ctts", b"tkhd", b"moov"])
def test_tables_that_are_damaged_are_not_believed(place: bytes) -> None:
    data = bytearray(clips.clip(30, options=B_FRAMES))
    at = data.index(place)
    for step in range(4, 24, 4):
        data[at + step] ^= 0x55
    with suppress(MediaError):
        video = load_video(bytes(data), num_frames=5)
        assert clips.numbers(video.frames) == video.indices.tolist()


# ---- shots -----------------------------------------------------------------------------------


def shots(*lengths: int) -> bytes:
    """Shots of these lengths, each of another colour and with its own quiet movement."""
    rng = np.random.default_rng(0)
    pictures = []
    for length in lengths:
        ground = rng.integers(0, 255, (6, 8, 3)).repeat(16, 0).repeat(16, 1)
        pictures += [
            np.clip(np.roll(ground, i // 4, 1), 0, 255).astype(np.uint8) for i in range(length)
        ]
    return clips.encode(pictures, options={"g": "250"})


def test_each_shot_gives_its_middle() -> None:
    data = shots(30, 50, 20)
    assert load_video(data, sampling="scenes").indices.tolist() == [15, 55, 90]
    assert load_video(data, sampling="scenes", num_frames=2).indices.tolist() == [15, 55]
    assert load_video(data, sampling="scenes", start=2).indices.tolist() == [65, 90]


def test_shots_of_arrays_and_images() -> None:
    frames = load_video(shots(30, 50, 20)).frames
    assert load_video(frames, sampling="scenes").indices.tolist() == [15, 55, 90]
    images = [Image.fromarray(frame) for frame in frames]
    assert load_video(images, sampling="scenes").indices.tolist() == [15, 55, 90]


def test_key_frames_are_those_of_the_file() -> None:
    data = clips.clip(100, options=LONG)
    clips.check(load_video(data, sampling="keyframes"), range(0, 100, 20))
    clips.check(load_video(data, sampling="keyframes", num_frames=2), [0, 80])


# ---- errors, sizes, time ---------------------------------------------------------------------


def test_damage_can_be_an_error() -> None:
    data = clips.clip(10, **clips.STILLS, edit=clips.spoiled(4))
    with pytest.raises(MediaError, match=r"could not be decoded and are left out.*on_error='warn'"):
        load_video(data, on_error="raise")
    assert len(load_video(data, end=0.16, on_error="raise")) == 4
    with pytest.raises(InvalidArgument, match="on_error='ignore'; allowed: 'warn', 'raise'"):
        load_video(data, on_error="ignore")


def test_pictures_are_scaled_down_and_never_up(mp4: bytes) -> None:
    small = load_video(mp4, num_frames=2, max_side=64)
    assert small.frames.shape == (2, 48, 64, 3)
    assert clips.numbers(small.frames) == [0, 10]
    assert load_video(mp4, num_frames=2, max_side=999).frames.shape == (2, 96, 128, 3)
    assert load_video(clips.pictures(3), max_side=64).frames.shape == (3, 48, 64, 3)
    assert load_video(list(clips.pictures(3)), max_side=64).frames.shape == (3, 48, 64, 3)
    with pytest.raises(InvalidArgument, match="max_side=0 pixels"):
        load_video(mp4, max_side=0)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"seconds": 0.0}, "not read within the limit of 0 s"),
        ({"frames": 10}, "more than the limit of 10 frames"),
        ({"duration": 0.5}, "1 s long, the limit is 0.5 s"),
        ({"file_bytes": 100}, "the limit is 100; send a smaller file"),
    ],
)
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_clip_beyond_a_limit_is_refused(limits: dict, said: str, container: str) -> None:
    with pytest.raises(MediaLimitError, match=said):
        load_video(clips.clip(20, container=container), limits=Limits(**limits))


# ---- two readers at once ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def large() -> bytes:
    """160 numbered frames, key frames 20 apart, of a size at which two readers are worth it."""
    frames = clips.pictures(160, 512, 384)
    return clips.encode(frames, options=LONG)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The threads that decoded."""
    seen: set[int] = set()
    pictures = Reader.pictures

    def noted(reader: Reader, packet: av.Packet) -> list[av.VideoFrame]:
        seen.add(threading.get_ident())
        return pictures(reader, packet)

    monkeypatch.setattr(Reader, "pictures", noted)
    return seen


@pytest.mark.parametrize("how", [bytes, io.BytesIO, Path])
def test_halves_are_decoded_at_once(how, large: bytes, threads: set[int], tmp_path: Path) -> None:
    path = tmp_path / "large.mp4"
    path.write_bytes(large)
    source = path if how is Path else how(large)
    clips.check(load_video(source, num_frames=16), range(0, 160, 10))
    assert len(threads) == 2
    if how is Path:
        with path.open("rb") as file:
            file.seek(1234)
            clips.check(load_video(file, indices=[159, 0, 80]), [159, 0, 80])


def test_what_reads_in_no_known_way_has_one_reader(large: bytes, threads: set[int]) -> None:
    class Own(io.RawIOBase):
        def __init__(self) -> None:
            self.inner = io.BytesIO(large)

        def readable(self) -> bool:
            return True

        def seekable(self) -> bool:
            return True

        def readinto(self, target: bytearray) -> int:
            return self.inner.readinto(target)

        def seek(self, offset: int, whence: int = 0) -> int:
            return self.inner.seek(offset, whence)

        def tell(self) -> int:
            return self.inner.tell()

    clips.check(load_video(Own(), num_frames=16), range(0, 160, 10))
    assert len(threads) == 1


def test_shots_are_looked_for_in_order(large: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load_video(large, sampling="scenes")
    monkeypatch.setattr("vidlm.media.walk._WORTH_TWO", 10**12)
    assert load_video(large, sampling="scenes").indices.tolist() == found.indices.tolist()
    assert len(found) > 2


def test_an_error_in_either_half_is_raised(large: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    paint = Painter.paint
    for place in (0, 150):

        def bad(painter: Painter, frame: av.VideoFrame, place: int = place) -> object:
            if frame.pts == place * 512:
                raise ValueError("no such colour")
            return paint(painter, frame)

        monkeypatch.setattr(Painter, "paint", bad)
        with pytest.raises(MediaError, match="cannot be turned into RGB"):
            load_video(large, num_frames=16)


@given(st.sets(st.integers(0, 299), min_size=1), st.sets(st.integers(1, 299)), st.booleans())
def test_halves_hold_every_row(rows: set[int], keys: set[int], fresh: bool) -> None:
    wanted = np.array(sorted(rows))
    timeline = Timeline(np.arange(300.0), 300.0, keys=np.array([0, *sorted(keys)]))
    index = Index(timeline, np.arange(300), None)
    whole = spans_of(index, wanted, fresh=fresh)
    first, second = split(index, wanted, fresh=fresh)
    assert first
    for spans in (whole, [*first, *second]):
        covered = {row for span in spans for row in range(span.key or 0, span.last + 1)}
        assert rows <= covered
        assert all(span.key is None or span.key in (0, *keys) for span in spans)
        lasts = [span.last for span in spans]
        assert lasts == sorted(lasts)
