"""Video files: every frame is the one its index says, whatever the container does to it."""

from __future__ import annotations

import io
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

import clips
from vidlm.errors import InvalidArgument, MediaError, MediaLimitError
from vidlm.media import Limits, load_video
from vidlm.media.container import Reader
from vidlm.media.picture import Painter, resized, upright
from vidlm.media.tracks import Presentation

B_FRAMES = {"bf": "2", "g": "10"}


@pytest.fixture(scope="module")
def mp4() -> bytes:
    """20 numbered frames at 25 a second, H.264 with B-frames and two key frames."""
    return clips.clip(20, options=B_FRAMES)


# ---- the frame that the index says -----------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"options": B_FRAMES},
        {"container": "mov", "codec": "mpeg4", "options": {"bf": "2"}},
        {"container": "matroska", "codec": "libx265", "options": {"x265-params": "log-level=0"}},
        {"container": "webm", "codec": "libvpx", "options": {"deadline": "realtime"}},
        {"container": "webm", "codec": "libvpx-vp9", "options": {"deadline": "realtime"}},
        {"container": "avi", "codec": "mpeg4", "options": {"bf": "2"}},
        {"container": "avi", "codec": "mjpeg", "pix_fmt": "yuvj420p"},
        {"container": "mpegts", "codec": "mpeg2video"},
        {"container": "flv"},
        {"container": "gif", "codec": "gif", "pix_fmt": "rgb8"},
        {"container": "apng", "codec": "apng", "pix_fmt": "rgb24"},
    ],
    ids=lambda how: f"{how.get('container', 'mp4')}-{how.get('codec', 'libx264')}",
)
def test_each_format_gives_the_frames_asked_for(how: dict) -> None:
    video = load_video(clips.clip(20, **how), num_frames=6)
    clips.check(video, [0, 3, 6, 10, 13, 16])
    assert video.total_frames == 20
    assert video.fps == pytest.approx(25, rel=0.01)
    assert np.diff(video.pts) == pytest.approx(np.diff(video.indices) / 25, abs=2e-3)
    assert video.warnings == ()


def test_without_a_policy_every_frame(mp4: bytes) -> None:
    video = load_video(mp4)
    clips.check(video, range(20))
    assert len(video) == 20
    assert video.pts.tolist() == [i / 25 for i in range(20)]
    assert (video.duration, video.fps, video.start_time) == (0.8, 25.0, 0.0)
    assert [image.size for image in video.images()] == [(128, 96)] * 20


def test_policies_reach_the_file(mp4: bytes) -> None:
    clips.check(load_video(mp4, fps=5), [0, 5, 10, 15])
    clips.check(load_video(mp4, max_frames=3), [0, 9, 19])
    clips.check(load_video(mp4, start=0.2, end="0:00.32"), [5, 6, 7])
    clips.check(load_video(mp4, num_frames=99), range(20))
    with pytest.raises(InvalidArgument, match=r"beyond the end of the clip at 0\.8 s"):
        load_video(mp4, start=9)


def test_a_variable_rate_goes_by_time() -> None:
    times = [0.0, 0.04, 0.08, 1.0, 1.04, 3.0, 3.04, 3.08]
    data = clips.encode(clips.pictures(8), times=times, options=B_FRAMES)
    clips.check(load_video(data, fps=1), [0, 3, 4, 5])
    video = load_video(data)
    assert video.pts.tolist() == times
    assert video.fps == pytest.approx(8 / 3.12, rel=0.01)


def test_the_clock_begins_with_the_container() -> None:
    video = load_video(clips.clip(10, container="mpegts", edit=shifted(7)), num_frames=2)
    assert video.pts.tolist() == [0.0, 0.2]
    assert video.start_time == 7.0
    clips.check(
        load_video(clips.clip(10, container="mpegts", edit=shifted(7)), start=0.28), [7, 8, 9]
    )


def shifted(seconds: float) -> clips.Edit:
    def edit(packets: list[av.Packet]) -> list[av.Packet]:
        for packet in packets:
            steps = round(seconds / packet.time_base)
            packet.pts, packet.dts = packet.pts + steps, packet.dts + steps
        return packets

    return edit


def test_an_edit_list_hides_what_it_cuts() -> None:
    """As `ffmpeg -ss 0.32 -c copy` writes it: packets from the key frame on, shown from frame 8."""
    data = clips.clip(20, options=B_FRAMES, edit=shifted(-8 / 25))
    video = load_video(data)
    assert video.total_frames == 12
    assert video.indices.tolist() == list(range(12))
    assert clips.numbers(video.frames) == list(range(8, 20))
    assert (video.pts[0], video.fps) == (0.0, 25.0)


def test_stamps_in_decoding_order_are_not_believed() -> None:
    """AVI stores no presentation times: H.264 with B-frames comes out of step with its packets."""
    data = clips.clip(20, container="avi", options=B_FRAMES)
    for one in (1, 2, 3):
        clips.check(load_video(data, start=one / 25 + 0.041, end=one / 25 + 0.05), [one])
    clips.check(load_video(data, num_frames=7), [0, 2, 5, 8, 11, 14, 17])


def test_a_stream_without_times_is_counted() -> None:
    video = load_video(clips.clip(20, container="h264", options=B_FRAMES), fps=5)
    clips.check(video, [0, 5, 10, 15])
    assert "no times of their own; 25 a second is assumed" in " ".join(video.warnings)


def test_nothing_is_shown_before_the_first_key_frame() -> None:
    """A broadcast is cut into anywhere."""

    def late(packets: list[av.Packet]) -> list[av.Packet]:
        return packets[4:]

    options = {"bf": "0", "g": "10", "keyint_min": "10", "sc_threshold": "0"}
    data = clips.clip(20, container="matroska", options=options, edit=late)
    video = load_video(data)
    assert video.total_frames == 10
    assert clips.numbers(video.frames) == list(range(10, 20))


def test_vp8_pictures_for_reference_only_are_not_frames() -> None:
    def with_hidden(packets: list[av.Packet]) -> list[av.Packet]:
        first = bytes(packets[5])
        hidden = av.Packet(bytes([first[0] & ~0x10]) + first[1:])
        hidden.stream, hidden.time_base = packets[5].stream, packets[5].time_base
        hidden.pts = hidden.dts = packets[5].pts
        return [*packets[:5], hidden, *packets[5:]]

    realtime = {"deadline": "realtime"}
    data = clips.clip(10, container="webm", codec="libvpx", options=realtime, edit=with_hidden)
    video = load_video(data)
    assert (video.total_frames, video.warnings) == (10, ())


# ---- damage ----------------------------------------------------------------------------------


def test_a_frame_that_does_not_decode_is_left_out_and_named(caplog) -> None:
    data = clips.clip(10, **clips.STILLS, edit=clips.spoiled(4, 7))
    video = load_video(data, num_frames=5)
    clips.check(video, [0, 2, 6, 8])
    assert video.total_frames == 10
    assert "1 of the 5 chosen frames could not be decoded" in video.warnings[0]
    assert "at 00:00.16" in video.warnings[0]
    assert "the decoder refused 2 packets" in video.warnings[1]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    clips.check(load_video(data, end=0.16), [0, 1, 2, 3])


def test_if_nothing_decodes_it_is_an_error() -> None:
    data = clips.clip(4, **clips.STILLS, edit=clips.spoiled(0, 1, 2, 3))
    with pytest.raises(MediaError, match="none of the 4 chosen frames could be decoded"):
        load_video(data)


def test_a_lost_packet_shifts_no_other_frame(clips_dir: Path, caplog) -> None:
    video = load_video(clips_dir / "decord_corrupted.mp4", fps=2)
    assert video.indices.tolist() == [0, 5, 10, 15, 20, 25, 35, 40, 45]
    assert "1 of the 10 chosen frames" in video.warnings[0]
    assert "at 00:03.00" in video.warnings[0]
    assert len(caplog.records) == len(video.warnings)


def test_pictures_that_never_come_out_are_counted_away() -> None:
    """Leading pictures of an open group have nothing to refer to; the decoder skips them."""

    def late(packets: list[av.Packet]) -> list[av.Packet]:
        first = next(i for i, p in enumerate(packets) if i and p.is_keyframe)
        return packets[first:]

    options = {"bf": "2", "g": "8"}
    data = clips.clip(24, container="mpegts", codec="mpeg2video", options=options, edit=late)
    video = load_video(data)
    assert clips.numbers(video.frames) == list(range(9, 24))
    assert video.indices.tolist() == list(range(15))
    assert "the file lists 17 pictures and the decoder shows 15" in video.warnings[0]


def test_a_file_that_was_cut_off_says_so() -> None:
    data = clips.clip(100, container="matroska", codec="mpeg4")
    video = load_video(data[: len(data) * 6 // 10], num_frames=4)
    assert video.duration < 3.5
    assert "the header announces 00:04.00" in video.warnings[0]
    clips.check(video, video.indices)


# ---- how it looks ----------------------------------------------------------------------------


def solid(red: int, green: int, blue: int) -> clips.Frames:
    return np.full((32, 32, 3), (red, green, blue), np.uint8)


@pytest.mark.parametrize("matrix", ["bt709", "smpte170m"])
@pytest.mark.parametrize("full", [False, True])
def test_colours_follow_matrix_and_range(matrix: str, full: bool) -> None:
    """One colour, turned into Y'CbCr by the standards' own formula, comes back within 2 levels."""
    rgb = np.array([200, 60, 30]) / 255
    kr, kb = {"bt709": (0.2126, 0.0722), "smpte170m": (0.299, 0.114)}[matrix]
    y = kr * rgb[0] + (1 - kr - kb) * rgb[1] + kb * rgb[2]
    cb, cr = (rgb[2] - y) / (2 - 2 * kb), (rgb[0] - y) / (2 - 2 * kr)
    planes = [y * 255, 128 + cb * 255, 128 + cr * 255]
    if not full:
        planes = [16 + y * 219, 128 + cb * 224, 128 + cr * 224]
    array = np.stack([np.full((32, 32), round(value), np.uint8) for value in planes])
    frame = av.VideoFrame.from_ndarray(array, format="yuv444p")
    frame.colorspace = {"bt709": 1, "smpte170m": 6}[matrix]
    frame.color_range = 2 if full else 1
    painted = Painter().paint(frame).astype(int)
    assert np.abs(painted - (200, 60, 30)).max() <= 2


def test_a_reserved_matrix_counts_as_none() -> None:
    frames = []
    for tag in (2, 3):
        frame = av.VideoFrame.from_ndarray(solid(200, 60, 30), format="rgb24")
        frame = frame.reformat(format="yuv420p")
        frame.colorspace = tag
        frames.append(Painter().paint(frame))
    assert (frames[0] == frames[1]).all()


def test_a_matrix_without_a_conversion_is_a_media_error(mp4: bytes, monkeypatch) -> None:
    paint = Painter.paint

    def tagged(painter: Painter, frame: av.VideoFrame) -> clips.Frames:
        frame.colorspace = 8  # YCgCo
        return paint(painter, frame)

    monkeypatch.setattr(Painter, "paint", tagged)
    with pytest.raises(MediaError, match=r"128x96 picture in yuv420p cannot.* matrix is YCgCo"):
        load_video(mp4)


def test_pixels_that_are_not_square_are_widened(mp4: bytes) -> None:
    painter = Painter(Presentation(Fraction(4, 3)))
    frame = av.VideoFrame.from_ndarray(clips.picture(5), format="rgb24")
    painted = painter.paint(frame)
    assert painted.shape == (96, 171, 3)
    assert clips.numbers(painted[None]) == [5]
    thin = av.VideoFrame.from_ndarray(np.zeros((96, 1, 3), np.uint8), format="rgb24")
    assert Painter(Presentation(Fraction(1, 3))).size(thin) == (96, 1)


def test_a_picture_is_turned_upright(clips_dir: Path) -> None:
    video = load_video(clips_dir / "decord_video_rot90.mov", num_frames=1)
    assert video.frames.shape == (1, 568, 320, 3)  # stored 568 wide
    with av.open(str(clips_dir / "decord_video_rot90.mov")) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
    turned = np.rot90(stored, -1)
    assert np.abs(video.frames[0].astype(int) - turned).mean() < 1


@pytest.mark.parametrize(
    ("matrix", "rows"),
    [
        ((1, 0, 0, 1), [[1, 2, 3], [4, 5, 6]]),
        ((-1, 0, 0, 1), [[3, 2, 1], [6, 5, 4]]),
        ((1, 0, 0, -1), [[4, 5, 6], [1, 2, 3]]),
        ((-1, 0, 0, -1), [[6, 5, 4], [3, 2, 1]]),
        ((0, 1, -1, 0), [[4, 1], [5, 2], [6, 3]]),  # a quarter turn clockwise
        ((0, -1, 1, 0), [[3, 6], [2, 5], [1, 4]]),
        ((0, 1, 1, 0), [[1, 4], [2, 5], [3, 6]]),
        ((7, 65536, -65536, -7), [[4, 1], [5, 2], [6, 3]]),
    ],
)
def test_upright_follows_the_display_matrix(matrix: tuple, rows: list) -> None:
    picture = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)[..., None].repeat(3, -1)
    assert upright(picture, matrix)[..., 0].tolist() == rows


def test_a_size_that_changes_is_brought_to_the_first_ones() -> None:
    big = clips.encode(clips.pictures(4), container="h264")
    small = clips.encode(clips.pictures(4, 64, 48), container="h264")
    video = load_video(big + small)
    assert video.frames.shape == (8, 96, 128, 3)
    assert clips.numbers(video.frames) == [0, 1, 2, 3, 0, 1, 2, 3]
    assert "4 of the 8 chosen frames have another size" in " ".join(video.warnings)
    assert resized(solid(9, 8, 7), 10, 20).shape == (10, 20, 3)


# ---- memory ----------------------------------------------------------------------------------


def test_only_the_chosen_frames_are_painted_and_held(monkeypatch) -> None:
    data = clips.clip(300, codec="mpeg4", options={"g": "20"})
    painted, drawn = [], []
    paint, pictures = Painter.paint, Reader.pictures
    monkeypatch.setattr(Painter, "paint", lambda *a: painted.append(1) or paint(*a))

    def counted(reader, packet):
        frames = pictures(reader, packet)
        drawn.extend(frame.pts for frame in frames)
        return frames

    monkeypatch.setattr(Reader, "pictures", counted)
    tracemalloc.start()
    video = load_video(data, num_frames=3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    clips.check(video, [0, 100, 200])
    assert len(painted) == 3
    assert len(drawn) < 70  # begins at the key frame before each, and stops behind it
    assert peak < 20 * video.frames[0].nbytes  # all 300 would be 300


def test_memory_is_refused_before_it_is_taken(mp4: bytes, monkeypatch) -> None:
    monkeypatch.setattr(Painter, "paint", None)  # would be called if anything were decoded
    with pytest.raises(MediaLimitError, match=r"20 frames of 128x96 need 1 MiB.*at most 2"):
        load_video(mp4, limits=Limits(kept_bytes=2 * 128 * 96 * 3))
    with pytest.raises(MediaLimitError, match=r"frames of 128x96 are above the limit of 100 pix"):
        load_video(mp4, limits=Limits(pixels=100))


def test_limits_allow_what_fits(mp4: bytes) -> None:
    limits = Limits(kept_bytes=2 * 128 * 96 * 3, pixels=128 * 96)
    clips.check(load_video(mp4, num_frames=2, limits=limits), [0, 10])


def test_a_header_that_lies_about_the_size_is_seen_through(mp4: bytes) -> None:
    entry = mp4.index(b"avc1", mp4.index(b"moov"))
    assert mp4[entry + 28 : entry + 32] == bytes([0, 128, 0, 96])
    lying = mp4[: entry + 28] + bytes([0, 16, 0, 16]) + mp4[entry + 32 :]
    clips.check(load_video(lying, num_frames=2), [0, 10])
    with pytest.raises(MediaLimitError, match="frames of 128x96 are above the limit of 1000"):
        load_video(lying, limits=Limits(pixels=1000))


def test_a_file_is_read_from_its_beginning_and_left_open(mp4: bytes) -> None:
    file = io.BytesIO(mp4)
    file.seek(0, io.SEEK_END)
    clips.check(load_video(file, num_frames=2), [0, 10])
    assert not file.closed
