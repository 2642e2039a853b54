"""What may be given as a video, and what each wrong thing is told."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import clips
from vidlm.errors import (
    InvalidArgument,
    MediaError,
    MediaFetchError,
    MediaLimitError,
    MediaNotFound,
    VidlmError,
)
from vidlm.media import (
    Limits,
    Video,
    load_image,
    load_video,
    replace_video_with_images,
    sample_frames,
    source,
)
from vidlm.media.fetch import FetchPolicy

SMALL = Path(__file__).parents[1] / "data" / "nemo_test_video.mp4"


@pytest.fixture(scope="module")
def mp4() -> bytes:
    return clips.clip(20)


@pytest.fixture
def path(mp4: bytes, tmp_path: Path) -> Path:
    file = tmp_path / "walk in the park #1.mp4"
    file.write_bytes(mp4)
    return file


# ---- good sources ----------------------------------------------------------------------------


def test_every_source_gives_the_same_frames(mp4: bytes, path: Path) -> None:
    encoded = base64.b64encode(mp4).decode()
    with path.open("rb") as file:
        sources = {
            path: path.name,
            str(path): path.name,
            path.as_uri(): path.name,
            mp4: "video",
            io.BytesIO(mp4): "video",
            clips.Forward(mp4): "video",
            file: path.name,
            f"data:video/mp4;base64,{encoded}": "data URL",
        }
        for source, name in sources.items():
            got = load_video(source, num_frames=4)
            assert clips.numbers(got.frames) == got.indices.tolist() == [0, 5, 10, 15]
            assert got.name == name
        assert not file.closed
    bare = load_video(bytearray(mp4), num_frames=4)  # type: ignore[arg-type]
    assert bare.total_frames == 20


def test_a_web_address_is_fetched_and_named_by_its_last_part(mp4: bytes, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(source, "fetch", lambda url, policy: asked.append(url) or mp4)
    assert load_video("https://host/a/b.mp4?key=secret", num_frames=1).name == "b.mp4"
    assert load_video("HTTP://host/", num_frames=1).name == "host"
    assert asked == ["https://host/a/b.mp4?key=secret", "HTTP://host/"]


def test_an_unseekable_stream_has_a_ceiling() -> None:
    with pytest.raises(MediaLimitError, match="more than 100 bytes that cannot seek"):
        load_video(clips.Forward(b"x" * 200), access=FetchPolicy(max_bytes=100))


def test_sample_frames_gives_at_most_what_is_asked(path: Path, monkeypatch) -> None:
    monkeypatch.chdir(path.parent)
    before = os.listdir()
    images = sample_frames(path.as_uri(), 6)
    assert clips.numbers(np.stack([np.asarray(i) for i in images])) == [0, 3, 6, 10, 13, 16]
    assert {image.mode for image in images} == {"RGB"}
    assert len(sample_frames(str(path), 500)) == 20
    assert os.listdir() == before


def test_replace_video_with_images() -> None:
    text = "a <video> and <video>?"
    assert replace_video_with_images(text, 2) == "a <image><image> and <image><image>?"
    assert replace_video_with_images("none", 2) == "none"


# ---- lists, arrays, animations ---------------------------------------------------------------


def test_a_list_of_images_has_one_a_second(tmp_path: Path) -> None:
    frames = clips.pictures(6)
    file = tmp_path / "two.png"
    Image.fromarray(frames[2]).save(file)
    items = [frames[0], Image.fromarray(frames[1]), file, str(file), *frames[4:]]
    got = load_video(items)
    assert clips.numbers(got.frames) == [0, 1, 2, 2, 4, 5]
    assert got.pts.tolist() == got.indices.tolist() == [0, 1, 2, 3, 4, 5]
    assert (got.fps, got.duration, got.total_frames, got.name) == (1.0, 6.0, 6, "frames")


def test_policies_reach_lists_and_arrays() -> None:
    frames = clips.pictures(12)
    assert clips.numbers(load_video(frames, num_frames=3).frames) == [0, 4, 8]
    assert clips.numbers(load_video(list(frames), fps=0.5).frames) == [0, 2, 4, 6, 8, 10]
    assert load_video(tuple(frames), start=2.5, end=4).indices.tolist() == [2, 3]
    unread = [frames[0], "no such file.png", frames[2], frames[3]]
    assert load_video(unread, num_frames=2).indices.tolist() == [0, 2]


def test_grey_becomes_three_equal_channels() -> None:
    grey = np.arange(2 * 4 * 5, dtype=np.uint8).reshape(2, 4, 5)
    for got in (load_video(grey), load_video(list(grey))):
        assert got.frames.shape == (2, 4, 5, 3)
        assert (got.frames == grey[..., None]).all()
    modes = ["L", "1", "P", "RGBA", "CMYK", "LA"]
    images = [Image.new("RGB", (8, 6), "white").convert(mode) for mode in modes]
    assert (load_video(images).frames == 255).all()


def test_an_image_file_is_turned_by_its_exif_tag(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert load_video([tmp_path / "a.jpg"]).frames.shape == (1, 30, 20, 3)


def test_animated_webp() -> None:
    images = [Image.fromarray(frame) for frame in clips.pictures(5)]
    target = io.BytesIO()
    times = [100, 200, 0, 50, 150]
    images[0].save(
        target, "WEBP", save_all=True, append_images=images[1:], duration=times, lossless=True
    )
    got = load_video(target)
    assert clips.numbers(got.frames) == [0, 1, 2, 3, 4]
    assert got.pts.tolist() == [0.0, 0.1, 0.3, 0.4, 0.45]
    assert got.duration == 0.6
    assert load_video(target, fps=5).indices.tolist() == [0, 1, 3]
    with pytest.raises(MediaLimitError, match="need 0 MiB"):
        load_video(target, limits=Limits(kept_bytes=96 * 128 * 3))
    with pytest.raises(MediaError, match=r"video: (cannot be read|not an image)"):
        load_video(target.getvalue()[:400])


def test_what_is_transparent_in_a_clip_is_white() -> None:
    """As in a single image, whatever colour lies under the transparency."""
    clear = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    target = io.BytesIO()
    clear.save(target, "WEBP", save_all=True, append_images=[clear], duration=100, lossless=True)
    assert (load_video([clear, clear]).frames == 255).all()
    assert (load_video(target).frames == 255).all()


def test_a_folder_or_a_pattern_is_its_images_in_order(tmp_path: Path) -> None:
    for number in (2, 10, 1, 33):
        Image.fromarray(clips.picture(number)).save(tmp_path / f"frame_{number}.png")
    (tmp_path / "notes.txt").write_text("no image")
    for each in (tmp_path, str(tmp_path), str(tmp_path / "*.png"), tmp_path / "frame_*"):
        assert clips.numbers(load_video(each).frames) == [1, 2, 10, 33]
    assert clips.numbers(load_video(str(tmp_path / "frame_1*")).frames) == [1, 10]
    with pytest.raises(MediaError, match="matches no file; give a video file"):
        load_video(str(tmp_path / "*.gif"))


def test_a_file_whose_name_looks_like_a_pattern(mp4: bytes, tmp_path: Path) -> None:
    (tmp_path / "clip[1].mp4").write_bytes(mp4)
    assert load_video(tmp_path / "clip[1].mp4", num_frames=2).total_frames == 20


def test_only_some_folders_may_be_read(mp4: bytes, tmp_path: Path) -> None:
    path = tmp_path / "open" / "clip.mp4"
    path.parent.mkdir()
    path.write_bytes(mp4)
    access = FetchPolicy(folders=(path.parent,))
    assert load_video(path, num_frames=1, access=access).total_frames == 20
    assert load_video(path.as_uri(), num_frames=1, access=access).total_frames == 20
    image = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(image)
    link = path.parent / "link.png"
    link.symlink_to(image)
    outside = [image, image.as_uri(), tmp_path, tmp_path / "gone", tmp_path / "*.png", [image]]
    for each in (*outside, link, [link], str(path.parent / "l*.png")):
        with pytest.raises(MediaFetchError, match="outside the folders that may be read"):
            load_video(each, access=access)
    with pytest.raises(MediaFetchError, match="outside the folders that may be read"):
        load_image(image, access=access)


def closed() -> io.BytesIO:
    file = io.BytesIO(b"...")
    file.close()
    return file


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ([], "an empty list holds no frames"),
        ([np.zeros((4, 4, 3), np.uint8), 7], "item 1 of the list of frames is a int"),
        ([np.zeros((4, 4, 3))], r"frame 0 is an array of float64 \(4, 4, 3\)"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)], "frame 1 is 5x4 and"),
        ([Image.new("I;16", (4, 4))], "mode 'I;16', more than 8 bits"),
        (np.zeros((2, 4, 5, 3), np.float32), "an array of float32"),
        (np.zeros((2, 3, 4, 5), np.uint8), "channels last"),
        (np.zeros((4, 5, 3), np.uint8), r"one image as image\[None\]"),
        (np.zeros((0, 4, 5, 3), np.uint8), "is no clip"),
        (7, "a int is no video"),
        (None, "a NoneType is no video"),
        ({"url": "x"}, "a dict is no video"),
        (io.StringIO("text"), "open for text"),
        (closed(), "the file is closed"),
        ("rtsp://camera/1", r"rtsp:// is not fetched"),
        ("s3://bucket/a.mp4", r"s3:// is not fetched"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_source(source: object, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        load_video(source)  # type: ignore[arg-type]


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:900])
    with pytest.raises(MediaNotFound, match=r"frame 0, .*none\.png: there is no such image"):
        load_video([tmp_path / "none.png"])
    with pytest.raises(MediaError, match=r"text\.png: not an image"):
        load_video([tmp_path / "text.png"])
    with pytest.raises(MediaError, match=r"cut\.png: cannot be read"):
        load_video([tmp_path / "cut.png"])
    with pytest.raises(MediaError, match="cannot be read"):
        load_video([tmp_path])
    (tmp_path / "whole.png").write_bytes(whole.getvalue())
    with pytest.raises(MediaLimitError, match="64x64 are above the limit of 100 pixels"):
        load_video([tmp_path / "whole.png"], limits=Limits(pixels=100))


def test_lists_and_arrays_keep_to_the_limits() -> None:
    frames = clips.pictures(4)
    limits = Limits(kept_bytes=3 * frames[0].nbytes)
    for each in (frames, list(frames)):
        assert len(load_video(each, num_frames=3, limits=limits)) == 3
        with pytest.raises(MediaLimitError, match="at most 3"):
            load_video(each, limits=limits)


# ---- files that are no video -----------------------------------------------------------------


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(MediaNotFound, match=r"gone\.mp4: there is no such file \(looked in "):
        load_video(tmp_path / "gone.mp4")
    with pytest.raises(FileNotFoundError):
        load_video("gone.mp4")
    with pytest.raises(MediaNotFound, match="no such file"):
        load_video((tmp_path / "gone.mp4").as_uri())
    with pytest.raises(MediaError, match="is a folder without images; give a video file"):
        load_video(tmp_path)
    for name in ("a" * 5000, "nul\0byte"):
        with pytest.raises(MediaError, match="cannot be opened"):
            load_video(name)
    with pytest.raises(MediaError, match="is no regular file"):
        load_video("/dev/zero")
    with pytest.raises(MediaFetchError, match="only this machine's files"):
        load_video("file://elsewhere/a.mp4")


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{}\n#EXT-X-ENDLIST\n"
CONCAT = "ffconcat version 1.0\nfile '{}'\n"
DASH = '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{}</BaseURL></MPD>'


@pytest.mark.parametrize("text", [PLAYLIST, CONCAT, DASH, "hello\n" * 200, "é" * 400, "<html>"])
def test_text_is_refused_and_nothing_in_it_is_opened(text: str, path: Path) -> None:
    data = text.replace("{}", str(path)).encode()
    with pytest.raises(MediaError, match=r"text, not a video .*playlists and web pages are not"):
        load_video(data)
    path.with_name("list.mp4").write_bytes(data)
    with pytest.raises(MediaError, match=r"list\.mp4: text, not a video"):
        load_video(path.with_name("list.mp4"))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty, 0 bytes"),
        (bytes(range(256)) * 8, "not a video that vidlm reads"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), r"a still image.*load_video\(\[path\]\)"),
        (b"\0\0\0\x18ftypisom" + bytes(100), r"an MP4 without its index \(moov\)"),
        (b"RIFF\x10\0\0\0WEBPVP8L" + bytes(20), "not an image that PIL reads|cannot be read"),
    ],
)
def test_other_bytes_are_refused_with_their_reason(data: bytes, said: str) -> None:
    with pytest.raises(MediaError, match=said):
        load_video(data)


def test_sound_alone_is_no_video() -> None:
    with pytest.raises(MediaError, match="no video stream, only audio; give a file with moving"):
        load_video(clips.sound())
    with pytest.raises(MediaError, match="only a cover picture and audio"):
        load_video(clips.sound(with_cover=True))


class Failing(io.BytesIO):
    """A disk with a bad spot."""

    good = 0

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= self.good:
            raise OSError(5, "Input/output error")
        return super().read(min(size or -1, self.good))


def test_a_file_that_fails_to_read_is_a_media_error(mp4: bytes) -> None:
    for good in (0, 16):
        file = Failing(mp4)
        file.good = good
        with pytest.raises(MediaError, match=r"video: (cannot be read|an MP4 without)"):
            load_video(file)


@given(st.lists(st.tuples(st.integers(0, 4302), st.binary(min_size=1, max_size=8)), max_size=12))
def test_no_damage_gets_past_the_error_tree(patches: list[tuple[int, bytes]]) -> None:
    data = bytearray(SMALL.read_bytes())
    for at, patch in patches:
        data[at : at + len(patch)] = patch
    try:
        got = load_video(bytes(data), num_frames=3, limits=Limits(kept_bytes=2**24, pixels=2**20))
    except VidlmError as error:
        got = error
    assert isinstance(got, Video | MediaError)
    assert not isinstance(got, Video) or len(got) > 0


# ---- the package -----------------------------------------------------------------------------


def test_a_video_takes_one_time_and_number_for_each_frame() -> None:
    frames, two = clips.pictures(2), np.arange(2)
    good = Video(frames, two / 25, two, 0.08, 25.0, 2)
    assert (len(good), good.warnings, good.name) == (2, (), "video")
    with pytest.raises(InvalidArgument, match="float64"):
        Video(frames / 255, two / 25, two, 0.08, 25.0, 2)
    with pytest.raises(InvalidArgument, match="2 frames, 1 pts and 2 indices"):
        Video(frames, two[:1] / 25, two, 0.08, 25.0, 2)


def test_the_package_loads_no_torch() -> None:
    code = "import sys, vidlm.media; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
