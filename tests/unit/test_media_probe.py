"""media/probe.py: what load_video would refuse, without reading the video."""

from __future__ import annotations

import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import clips
from vidlm.errors import InvalidArgument, MediaError, MediaLimitError, MediaNotFound, VidlmError
from vidlm.media import FetchPolicy, FramePolicy, Limits, container, is_image, load_video, probe

FRAMES = 30  # of the clip, 25 a second


@pytest.fixture(scope="module")
def clip() -> bytes:
    return clips.clip(FRAMES)


def sound(form: str) -> bytes:
    """Files without pictures, as far as a reader looks at them."""
    if form == "wav":
        file = io.BytesIO()
        with wave.open(file, "wb") as writer:
            writer.setparams((1, 2, 8000, 0, "NONE", ""))
            writer.writeframes(bytes(16000))
        return file.getvalue()
    heads = {"mp3": b"ID3\x04\0\0\0\0\0\0", "mpeg": b"\xff\xfb\x90\x64", "flac": b"fLaC\0\0\0\x22"}
    return heads[form] + bytes(4000)


def broken(kind: str, clip: bytes) -> bytes:
    return {
        "empty": b"",
        "text": b"<html>not a video</html>",
        "cut": clip[: len(clip) // 2],
        "noise": bytes(range(256)) * 40,
        **{form: sound(form) for form in ("wav", "mp3", "mpeg", "flac")},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("empty", "empty, 0 bytes"),
        ("text", "text, not a video"),
        ("cut", "without its index"),
        ("noise", "not a video that vidlm reads"),
        ("wav", "sound alone"),
        ("mp3", "sound alone"),
        ("mpeg", "sound alone"),
        ("flac", "sound alone"),
    ],
)
def test_what_is_no_video(tmp_path: Path, clip: bytes, kind: str, says: str) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(broken(kind, clip))
    for source in (str(path), path, path.read_bytes(), io.BytesIO(path.read_bytes())):
        with pytest.raises(MediaError, match=says):
            probe(source)


@pytest.mark.parametrize(
    "source", ["", "gone.mp4", "ftp://x/y.mp4", "htp://x/y.mp4", "http://127.0.0.1/x.mp4", "data:x"]
)
def test_what_cannot_be_opened(source: str) -> None:
    with pytest.raises((MediaNotFound, MediaError, InvalidArgument)):
        probe(source)


CHOICES: list[dict[str, Any]] = [
    {},
    *({"start": s} for s in (0.0, 1.15, 1.2, 5.0, "12:30")),
    *({"end": e} for e in (0.5, 100.0)),
    *({"times": [t]} for t in (0.0, 1.19, 1.2, 1e9)),
    *({"indices": [i]} for i in (0, FRAMES - 1, FRAMES, 10**30)),
    {"start": 0.5, "end": 0.6},
    {"sampling": "keyframes", "start": 0.5, "end": 0.6},
    {"sampling": "scenes", "start": 3.0},
    {"sampling": "slowfast", "num_frames": 4, "start": 3.0},
]


@pytest.mark.parametrize("form", ["mp4", "matroska", "mpegts", "avi"])
@pytest.mark.parametrize("given", CHOICES, ids=str)
def test_frames_are_refused_as_reading_refuses_them(form: str, given: dict[str, Any]) -> None:
    data = clips.clip(FRAMES, container=form, codec="mpeg4" if form == "avi" else "libx264")
    told = []
    for read in (lambda: load_video(data, **given), lambda: probe(data, FramePolicy(**given))):
        try:
            read()
            told.append("")
        except VidlmError as error:
            told.append(str(error))
    assert told[0] == told[1]


def test_no_index_is_made_of_a_file_that_is_long_enough(
    clip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packets that a whole index would take."""
    data = clips.clip(400, container="matroska")
    read = []
    packets = container.Reader.packets

    def counted(reader: container.Reader) -> Any:
        for packet in packets(reader):
            read.append(packet)
            yield packet

    monkeypatch.setattr(container.Reader, "packets", counted)
    probe(data, FramePolicy(start=3.0))
    assert 0 < len(read) < 64
    with pytest.raises(InvalidArgument, match="beyond the end"):
        probe(data, FramePolicy(start=100.0))
    assert len(read) > 400


def test_pictures_that_cannot_be_decoded() -> None:
    """The container is sound, and no frame of it is."""
    data = bytearray(clips.clip(10, container="matroska"))
    at = data.index(b"\x1fC\xb6u")  # the first cluster
    for place in range(at + 40, len(data) - 1):
        data[place] = 0x55
    with pytest.raises(MediaError):
        load_video(bytes(data))
    with pytest.raises(MediaError):
        probe(bytes(data))


def test_stills(tmp_path: Path) -> None:
    folder = tmp_path / "imgs.png"  # a folder, whatever its name
    folder.mkdir()
    with pytest.raises(MediaError, match="a folder without images"):
        probe(folder)
    for i in range(4):
        Image.new("RGB", (8, 8)).save(folder / f"f{i}.png")
    for source in (folder, str(folder / "*.png"), folder / "f0.png"):
        probe(source)
    for source in (folder, str(folder / "*.png")):
        with pytest.raises(InvalidArgument, match="4 frames, 0 to 3"):
            probe(source, FramePolicy(indices=[4]))
        assert not is_image(source)
    (folder / "f0.png").write_bytes(b"no image")
    for source in (folder, folder / "f0.png"):
        with pytest.raises(MediaError, match="not an image"):
            probe(source)


def test_animated_webp() -> None:
    file = io.BytesIO()
    pictures = [Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)) for i in range(3)]
    pictures[0].save(file, "WEBP", save_all=True, append_images=pictures[1:])
    probe(file.getvalue(), FramePolicy(indices=[2]))
    with pytest.raises(InvalidArgument, match="3 frames"):
        probe(file.getvalue(), FramePolicy(indices=[3]))


def test_limits_and_access_count(tmp_path: Path, clip: bytes) -> None:
    with pytest.raises(MediaLimitError, match="the limit is 10"):
        probe(clip, limits=Limits(file_bytes=10))
    with pytest.raises(MediaLimitError, match="pixels"):
        probe(clip, limits=Limits(pixels=100))
    (tmp_path / "x.mp4").write_bytes(clip)
    with pytest.raises(MediaError, match="local files are not read"):
        probe(tmp_path / "x.mp4", access=FetchPolicy(folders=()))
