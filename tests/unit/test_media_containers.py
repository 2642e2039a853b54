"""What containers say beside the pictures: crop, aspect, delays, encryption, missing parts."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import clips
from container_files import (
    SAMPLE_ENTRY,
    SEGMENT,
    TRACK_ENTRY,
    TRACKS,
    VIDEO,
    box,
    boxes,
    element,
    muxed,
    with_box,
    with_element,
)
from vidlm.errors import MediaError
from vidlm.media import load_image, load_video

FRAMES = clips.pictures(6)
ENTRY = (*SAMPLE_ENTRY, b"avc1")


# ---- crop ------------------------------------------------------------------------------------


def clap(width: int, height: int, right: int = 0, down: int = 0) -> bytes:
    return box(b"clap", struct.pack(">8i", width, 1, height, 1, right, 1, down, 1))


def pixel_crop(left: int, top: int, right: int, bottom: int) -> bytes:
    sides = zip((0x54CC, 0x54BB, 0x54DD, 0x54AA), (left, top, right, bottom), strict=True)
    return b"".join(element(id, bytes([value])) for id, value in sides if value)


def framed(count: int = 6) -> clips.Frames:
    """Numbered pictures of 96 x 72 in a white frame: 16 left, 8 above, 16 right, 16 below."""
    inside = clips.pictures(count, 96, 72)
    return np.pad(inside, ((0, 0), (8, 16), (16, 16), (0, 0)), constant_values=255)


def cropped(container: str, aspect: Fraction | None = None) -> bytes:
    data = muxed(framed(), container, "libx264", aspect=aspect)
    if container == "matroska":
        return with_element(data, (SEGMENT, TRACKS, TRACK_ENTRY, VIDEO), pixel_crop(16, 8, 16, 16))
    return with_box(data, ENTRY, clap(96, 72, 0, -4))


@pytest.mark.parametrize("container", ["matroska", "mp4", "mov"])
def test_the_containers_crop_is_applied(container: str) -> None:
    video = load_video(cropped(container))
    assert video.frames.shape == (6, 72, 96, 3)
    clips.check(video, range(6))
    assert load_video(cropped(container), max_side=48).frames.shape == (6, 36, 48, 3)


@pytest.mark.parametrize("container", ["matroska", "mp4"])
def test_crop_comes_before_the_pixel_aspect(container: str) -> None:
    video = load_video(cropped(container, Fraction(4, 3)))
    assert video.frames.shape == (6, 72, 128, 3)
    clips.check(video, range(6))


def test_crop_comes_before_rotation() -> None:
    data = bytearray(cropped("mp4"))
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    video = load_video(bytes(data))
    assert video.frames.shape == (6, 96, 72, 3)
    assert clips.numbers(np.rot90(video.frames, 1, (1, 2))) == list(range(6))


@pytest.mark.parametrize(
    "aperture",
    [clap(0, 0), clap(500, 72), clap(96, -72), clap(96, 72, 400), box(b"clap", bytes(32)), b"\0"],
)
def test_a_crop_without_sense_is_none(aperture: bytes) -> None:
    data = with_box(muxed(framed(), "mp4", "libx264"), ENTRY, aperture)
    assert load_video(data).frames.shape == (6, 96, 128, 3)


# ---- pixel aspect ----------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["mpegts", "h264"])
def test_a_frame_is_shown_by_its_own_pixel_aspect(container: str) -> None:
    parts = [
        muxed(clips.pictures(20), container, "libx264", aspect=aspect, options={"bf": "0"})
        for aspect in (Fraction(1), Fraction(3, 2))
    ]
    data = b"".join(parts)
    assert load_video(data, indices=[5]).frames.shape[2] == 128
    alone = load_video(data, indices=[35])
    assert alone.frames.shape[2] == 192
    assert clips.numbers(alone.frames) == [15]
    video = load_video(data)
    assert video.frames.shape == (40, 96, 128, 3)
    assert "20 of the 40 chosen frames have another size" in " ".join(video.warnings)


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "avi"])
@pytest.mark.parametrize("aspect", [Fraction(4, 3), Fraction(2, 5)])
def test_the_pixel_aspect_is_the_same_in_every_container(container: str, aspect: Fraction) -> None:
    video = load_video(muxed(FRAMES, container, "mpeg4", aspect=aspect))
    assert video.frames.shape == (6, 96, round(128 * aspect), 3)
    assert not [line for line in video.warnings if "aspect" in line or "size" in line]


def in_mp4(width: int, height: int) -> bytes:
    pasp = box(b"pasp", struct.pack(">II", width, height))
    return with_box(muxed(FRAMES, "mp4", "libx264"), ENTRY, pasp)


def in_matroska(width: int) -> bytes:
    data = muxed(FRAMES, "matroska", "libx264")
    unknown, pixels = b"\x54\xb2\x81\x04", b"\x54\xb2\x81\x00"  # DisplayUnit
    assert unknown in data
    shown = element(0x54B0, struct.pack(">H", 128 * width)) + element(0x54BA, b"\x60")
    path = (SEGMENT, TRACKS, TRACK_ENTRY, VIDEO)
    return with_element(data.replace(unknown, pixels), path, shown)


@pytest.mark.parametrize("data", [in_mp4(200, 1), in_mp4(1, 200), in_matroska(40)])
def test_a_pixel_aspect_that_no_camera_has_is_ignored(data: bytes) -> None:
    video = load_video(data)
    assert video.frames.shape == (6, 96, 128, 3)
    assert "they are taken as square" in " ".join(video.warnings)


# ---- GIF -------------------------------------------------------------------------------------


def gif(delays: list[int]) -> bytes:
    """A GIF with these delays in hundredths of a second."""
    images = [Image.fromarray(clips.picture(number)) for number in range(len(delays))]
    target = io.BytesIO()
    images[0].save(target, "GIF", save_all=True, append_images=images[1:], duration=50)
    data = target.getvalue()
    for delay in delays:  # of the graphic control extensions, one after another
        head, found, rest = data.partition(b"\x21\xf9\x04")
        assert found
        data = head + b"\x21\xf9\x04"[:2] + b"\xff" + rest[:1] + struct.pack("<H", delay) + rest[3:]
    return data.replace(b"\x21\xf9\xff", b"\x21\xf9\x04")


@pytest.mark.parametrize(
    ("delays", "starts"),
    [
        ([1] * 5, [0, 10, 20, 30, 40, 50]),
        ([0] * 5, [0, 10, 20, 30, 40, 50]),
        ([2] * 5, [0, 2, 4, 6, 8, 10]),
        ([5, 1, 0, 2, 1], [0, 5, 15, 25, 27, 37]),
        ([1, 100, 3], [0, 10, 110, 113]),
    ],
)
def test_gif_delays_are_those_of_browsers(delays: list[int], starts: list[int]) -> None:
    video = load_video(gif(delays))
    clips.check(video, range(len(delays)))
    assert (video.pts * 100).round().tolist() == starts[:-1]
    assert round(video.duration * 100) == starts[-1]
    assert load_video(gif(delays), times=[video.duration - 0.001]).indices[0] == len(delays) - 1


# ---- MJPEG -----------------------------------------------------------------------------------


def jpegs(count: int = 10, side: int = 128) -> list[bytes]:
    parts = []
    for number in range(count):
        target = io.BytesIO()
        Image.fromarray(clips.picture(number, side, 96)).save(target, "JPEG", quality=90)
        parts.append(target.getvalue())
    return parts


def multipart(parts: list[bytes], end: bytes = b"\r\n", *, length: bool = True) -> bytes:
    data = b""
    for part in parts:
        size = b"Content-Length: %d" % len(part) + end if length else b""
        data += b"--frame" + end + b"Content-Type: image/jpeg" + end + size + end + part + end
    return data + b"--frame--" + end


MULTI = b"HTTP/1.0 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=frame\r\n\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"".join(jpegs()),
        b"\0\0".join(jpegs()),
        multipart(jpegs()),
        multipart(jpegs(), length=False),
        multipart(jpegs(), b"\n"),
        b"\r\n" + multipart(jpegs()),
        MULTI + multipart(jpegs()),
    ],
    ids=["bare", "padded", "parts", "no length", "line feeds", "blank line", "with header"],
)
def test_jpegs_in_a_row_are_a_clip(data: bytes) -> None:
    video = load_video(data)
    clips.check(video, range(10))
    assert video.fps == pytest.approx(25)
    assert video.warnings == ("JPEGs in a row carry no times of their own; 25 a second is assumed",)
    clips.check(load_video(data, indices=[7, 2]), [7, 2])


def test_a_jpeg_with_more_behind_it_is_a_still_image(tmp_path: Path) -> None:
    """A preview of another size, an album of a camera (MPO), anything else."""
    first = Image.fromarray(clips.picture(3))
    album = io.BytesIO()
    first.save(album, "MPO", save_all=True, append_images=[first])
    whole = jpegs(1)[0]
    for data in (album.getvalue(), whole + jpegs(1, 64)[0], whole, whole + bytes(1000)):
        with pytest.raises(MediaError, match=r"a still image; give images in a list"):
            load_video(data)
        load_image(data)
        (tmp_path / "a.jpg").write_bytes(data)
        assert not load_video([tmp_path / "a.jpg"]).warnings


def test_the_first_of_several_pictures_is_named_as_such(tmp_path: Path, caplog) -> None:
    path = tmp_path / "camera.jpg"
    path.write_bytes(b"".join(jpegs()))
    said = "the first of several JPEGs in a row is taken; load_video reads them all"
    assert load_video([path, path]).warnings == (f"of 2 frames, {said}",)
    load_image(path)
    assert said in caplog.text
    path.write_bytes(gif([5, 5, 5]))
    assert "the first of 3 pictures is taken" in load_video([path]).warnings[0]


# ---- encrypted -------------------------------------------------------------------------------

KEY = "00112233445566778899aabbccddeeff"
CENC = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": KEY, "encryption_kid": KEY}


def protected(scheme: bytes) -> bytes:
    """An MP4 whose sample entry says that it is encrypted by a scheme."""
    form = box(b"frma", b"avc1")
    kind = box(b"schm", bytes(4), scheme, b"\0\1\0\0")
    data = muxed(FRAMES, "mp4", "libx264")
    return with_box(data, ENTRY, box(b"sinf", form, kind), rename=b"encv")


def encodings(kind: int) -> bytes:
    """ContentEncodings of Matroska: 0 compressed, 1 encrypted."""
    return element(0x6D80, element(0x6240, element(0x5033, bytes([kind]))))


def scrambled() -> bytes:
    data = bytearray(muxed(clips.pictures(20), "mpegts", "libx264"))
    for at in range(0, len(data), 188):
        if (data[at + 1] & 0x1F) << 8 | data[at + 2] >= 0x100:
            data[at + 3] |= 0x80
    return bytes(data)


def windows_media() -> bytes:
    """A WMV with a Content Encryption Object (ASF specification, 3.14) in its header."""
    data = muxed(FRAMES, "asf", "wmv2")
    guid = bytes.fromhex("fbb3112223bdd211b4b700a0c955fc6e")
    added = guid + struct.pack("<Q", 24 + 16) + bytes(16)
    size, count = struct.unpack_from("<QI", data, 16)
    head = data[:16] + struct.pack("<QI", size + len(added), count + 1) + data[28:size]
    return head + added + data[size:]


@pytest.mark.parametrize(
    ("data", "how"),
    [
        (muxed(FRAMES, "mp4", "libx264", muxer=CENC), "Common Encryption, cenc: AES-CTR"),
        (muxed(FRAMES, "mp4", "mpeg4", muxer=CENC), "Common Encryption, cenc: AES-CTR"),
        (protected(b"cbcs"), "Common Encryption, cbcs: AES-CBC, in a pattern"),
        (protected(b"cens"), "Common Encryption, cens: AES-CTR, in a pattern"),
        (protected(b"cbc1"), "Common Encryption, cbc1: AES-CBC"),
        (protected(b"piff"), "Common Encryption"),
        (
            with_element(
                muxed(FRAMES, "matroska", "libx264"), (SEGMENT, TRACKS, TRACK_ENTRY), encodings(1)
            ),
            "Matroska encryption",
        ),
        (
            with_element(
                muxed(FRAMES, "webm", "libvpx-vp9"), (SEGMENT, TRACKS, TRACK_ENTRY), encodings(1)
            ),
            "Matroska encryption",
        ),
        (scrambled(), "scrambled transport stream"),
        (muxed(FRAMES, "mp4", "libx264").replace(b"avc1\0\0", b"drmi\0\0"), "FairPlay"),
        (windows_media(), "Windows Media DRM"),
    ],
    ids=[
        "h264",
        "mpeg4",
        "cbcs",
        "cens",
        "cbc1",
        "other",
        "matroska",
        "webm",
        "mpegts",
        "itunes",
        "wmv",
    ],
)
@pytest.mark.parametrize("choice", [{}, {"num_frames": 2}, {"on_error": "raise"}])
def test_encrypted_files_are_named_as_such(data: bytes, how: str, choice: dict) -> None:
    with pytest.raises(MediaError, match="is encrypted") as caught:
        load_video(data, **choice)
    assert f"({how})" in str(caught.value)
    assert "decrypt it with the tool and the key of whoever owns it" in str(caught.value)


# ---- parts -----------------------------------------------------------------------------------

FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof+dash"}


def parts() -> tuple[bytes, bytes]:
    """The initialization segment of a stream, and its media segment."""
    data = muxed(FRAMES, "mp4", "libx264", muxer=FRAGMENTS)
    texts = boxes(data)
    first = next(place for place, (kind, _) in enumerate(texts) if kind in (b"moof", b"sidx"))
    return tuple(b"".join(text for _, text in part) for part in (texts[:first], texts[first:]))


@pytest.mark.parametrize("before", [b"", box(b"styp", b"msdh", bytes(4), b"msdh")])
def test_a_media_segment_alone_is_named_as_such(before: bytes) -> None:
    start, segment = parts()
    with pytest.raises(MediaError, match=r"a media segment .* without its init") as caught:
        load_video(before + segment)
    assert "cat init.mp4 seg*.m4s > whole.mp4" in str(caught.value)
    clips.check(load_video(start + before + segment), range(6))


def test_an_initialization_segment_alone_is_named_as_such() -> None:
    with pytest.raises(MediaError, match=r"initialization segment .* holds no frames") as caught:
        load_video(parts()[0])
    assert "cat init.mp4 seg*.m4s > whole.mp4" in str(caught.value)


def test_a_webm_segment_alone_is_named_as_such() -> None:
    data = muxed(FRAMES, "webm", "libvpx", muxer={"live": "1"})
    cluster = data.index(b"\x1f\x43\xb6\x75")
    with pytest.raises(MediaError, match=r"a media segment of a WebM .*cat init\.webm seg\*\.webm"):
        load_video(data[cluster:])
    clips.check(load_video(data[:cluster] + data[cluster:]), range(6))


# ---- the larger corpus -----------------------------------------------------------------------


@pytest.fixture
def faults(shared: Path) -> Path:
    folder = shared / "data" / "faults" / "media"
    if not folder.is_dir():
        pytest.skip(f"needs the files of public reports ({folder})")
    return folder


def test_files_of_public_reports(faults: Path) -> None:
    grid = load_video(faults / "grid2x2.avif")
    assert grid.frames.shape == (1, 288, 512, 3)
    assert clips.numbers(grid.frames) == [5]
    assert load_image(faults / "grid2x2.avif").size == (512, 288)
    clips.check(load_video(faults / "raw.mjpeg"), range(10))
    assert load_video(faults / "delay_1cs.gif").duration == pytest.approx(2.0)
    assert load_video(faults / "crop.mkv").frames.shape[1:3] == (120, 192)
    assert load_video(faults / "c1.mkv").frames.shape[1:3] == (144, 192)
    assert load_video(faults / "sar_change.ts", indices=[75]).frames.shape[2] == 256
    clear = load_video(faults / "blk_vp9.webm").frames[0].astype(int)
    assert np.abs(clear - load_video(faults / "blk_webp.webp").frames[0]).mean() < 1
    with pytest.raises(MediaError, match="Common Encryption"):
        load_video(faults / "cenc.mp4")
    with pytest.raises(MediaError, match="cat init"):
        load_video(faults / "dash_media_segment_alone.m4s")
