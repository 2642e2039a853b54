"""HEIC and AVIF: the whole picture, whatever it is made of, as an image and as a clip."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import clips
import heif_files
from heif_files import Item, Pixels, box, encoded, heif, tiled, with_alpha
from vidlm.errors import MediaError, MediaLimitError, VidlmError
from vidlm.media import Limits, load_image, load_video
from vidlm.media.heif import read_heif

KINDS = ((b"hvc1", b"heic"), (b"av01", b"avif"))


def decoded(data: bytes) -> Pixels:
    """By the library's own reader, which AVIF takes where Pillow has none."""
    image, notes = read_heif(io.BytesIO(data), "image", Limits())
    assert not notes
    return np.asarray(image)


def near(a: Pixels, b: Pixels) -> bool:
    """But for what 4:2:0 takes away at edges of colour; these pictures are grey."""
    return a.shape == b.shape and bool(np.abs(a.astype(int) - b).mean() < 3)


@pytest.mark.parametrize(("kind", "brand"), KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (2, 1), (1, 2), (1, 3)])
def test_tiles_become_one_picture(rows: int, columns: int, kind: bytes, brand: bytes) -> None:
    height, width = rows * 64 - 10, columns * 64 - 20  # the last tiles reach over the edge
    picture = clips.picture(0xA5C3, width, height)
    data = heif(tiled(picture, rows, columns, kind), brand)
    video = load_video(data)
    assert near(video.frames[0], picture)
    assert (len(video), video.total_frames, video.duration, video.warnings) == (1, 1, 1.0, ())
    assert near(np.asarray(load_image(data)), picture)
    assert near(decoded(data), picture)


IROT = [box(b"irot", bytes([turns])) for turns in range(4)]
IMIR = [box(b"imir", bytes([axis])) for axis in range(2)]
# 64 x 48 of 118 x 118, a little off the centre.
CLAP = box(b"clap", struct.pack(">8i", 64, 1, 48, 1, 3, 1, -5, 1))


@pytest.mark.parametrize("brand", [b"heic", b"avif"])
@pytest.mark.parametrize(
    ("properties", "change"),
    [
        ([IROT[1]], lambda p: np.rot90(p, 1)),
        ([IROT[2]], lambda p: np.rot90(p, 2)),
        ([IROT[3]], lambda p: np.rot90(p, 3)),
        ([IMIR[0]], lambda p: p[::-1]),
        ([IMIR[1]], lambda p: p[:, ::-1]),
        ([IROT[1], IMIR[0]], lambda p: np.rot90(p, 1)[::-1]),
        ([CLAP], lambda p: p[30:78, 30:94]),
        ([CLAP, IROT[3], IMIR[1]], lambda p: np.rot90(p[30:78, 30:94], 3)[:, ::-1]),
    ],
    ids=["turn", "half", "back", "flip", "mirror", "both", "crop", "all"],
)
def test_a_grid_is_turned_mirrored_and_cropped(properties, change, brand: bytes) -> None:
    picture = clips.picture(0x8E31, 118, 118)
    items = tiled(picture, 2, 2, b"hvc1" if brand == b"heic" else b"av01")
    items[0].properties += properties
    data = heif(items, brand)
    assert near(load_video(data).frames[0], change(picture))
    assert near(np.asarray(load_image(data)), change(picture))
    assert near(decoded(data), change(picture))


@pytest.mark.parametrize(("kind", "brand"), KINDS)
@pytest.mark.parametrize("whole", [False, True], ids=["tiles", "whole"])
def test_what_is_transparent_is_white(whole: bool, kind: bytes, brand: bytes) -> None:
    picture = np.full((128, 128, 3), 60, np.uint8)
    alpha = np.zeros((128, 128, 3), np.uint8)
    alpha[:, 64:] = 255
    items = [encoded(picture, kind)] if whole else tiled(picture, 2, 2, kind)
    plane = [encoded(alpha, kind)] if whole else tiled(alpha, 2, 2, kind)
    data = heif(with_alpha(items, plane), brand)
    expected = np.full((128, 128, 3), 255, np.uint8)
    expected[:, 64:] = 60
    for got in (load_video(data).frames[0], np.asarray(load_image(data)), decoded(data)):
        assert near(got, expected)


@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_our_reader_and_pillow_agree_on_avif(turn: int) -> None:
    if "AVIF" not in Image.registered_extensions().values():
        pytest.skip("this Pillow writes no AVIF (11.3 does)")
    exif = Image.Exif()
    exif[0x0112] = turn
    target = io.BytesIO()
    picture = clips.picture(0x1234, 96, 64)
    rgba = np.dstack([picture, picture[..., 0] // 2 + 100])
    Image.fromarray(rgba).save(target, "AVIF", quality=100, exif=exif)
    assert near(decoded(target.getvalue()), np.asarray(load_image(target)))


def test_the_primary_picture_is_shown_and_others_are_named(caplog) -> None:
    first, second = (encoded(clips.picture(n, 64, 64), b"hvc1") for n in (1, 2))
    thumbnail = encoded(clips.picture(3, 64, 64), b"hvc1")
    thumbnail.references[b"thmb"] = [2]
    data = heif([first, second, thumbnail], primary=2)
    video = load_video(data)
    assert clips.numbers(video.frames) == [2]
    assert video.warnings == ("one of its 2 pictures is shown, the primary one",)
    load_image(data)
    assert "one of its 2 pictures" in caplog.text


def test_a_folder_of_heic_is_a_clip(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        item = encoded(clips.picture(number, 64, 64), b"hvc1")
        (tmp_path / f"IMG_{number}.HEIC").write_bytes(heif([item]))
    assert clips.numbers(load_video(tmp_path).frames) == [1, 2, 10]


# ---- what is refused -------------------------------------------------------------------------


def test_forms_that_are_not_read_are_named() -> None:
    tiles = tiled(clips.picture(1), 2, 2, b"hvc1")
    tiles[0].kind = b"iovl"
    with pytest.raises(MediaError, match=r"HEIF items of type 'iovl'.*save it as JPEG or PNG"):
        load_video(heif(tiles))
    with pytest.raises(MediaError, match="HEIF items of type 'unci'"):
        load_image(heif([Item(b"unci", b"x")]))


def test_limits_come_before_pixels() -> None:
    data = heif(tiled(clips.picture(1), 2, 2, b"hvc1"))
    for load in (load_video, load_image):
        with pytest.raises(MediaLimitError, match="128x96 are above the limit of 10000 pixels"):
            load(data, limits=Limits(pixels=10_000))
    grid = Item(b"grid", struct.pack(">BBBBHH", 0, 0, 0, 0, 65535, 65535), [], {b"dimg": [1]})
    with pytest.raises(MediaLimitError, match="65535x65535"):
        load_video(heif([grid]))


LAYOUT = struct.pack(">BBBBHH", 0, 0, 0, 0, 64, 64)


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([Item(b"grid", LAYOUT, [], {b"dimg": [1]})], "refer to one another without end"),
        ([Item(b"grid", LAYOUT, [], {b"dimg": [9]})], "or to none"),
        ([Item(b"grid", LAYOUT, [], {b"dimg": [1, 1]})], "a grid of 1 x 1 with 2 tiles"),
        ([Item(b"grid", LAYOUT[:5])], "too short"),
        ([Item(b"hvc1", b"")], "is not there"),
        ([Item(b"hvc1", b"\0\0\0\x04abcd")], "damaged HEIC or AVIF"),
    ],
)
def test_damage_is_a_media_error(items: list[Item], said: str) -> None:
    with pytest.raises(MediaError, match=said):
        load_video(heif(items))


def test_tiles_that_do_not_fit_are_refused() -> None:
    items = tiled(clips.picture(1, 64, 64), 1, 1, b"hvc1")
    items[0].data = struct.pack(">BBBBHH", 0, 0, 0, 0, 300, 64)
    with pytest.raises(MediaError, match="1 x 1 tiles of 64x64 for 300x64"):
        load_video(heif(items))


WHOLE = heif(tiled(clips.picture(7), 2, 2, b"hvc1"))
META = WHOLE.index(b"mdat") - 4


@given(
    st.integers(0, len(WHOLE)),
    st.lists(st.tuples(st.integers(0, META), st.binary(min_size=1, max_size=4)), max_size=6),
)
def test_no_damage_gets_past_the_error_tree(cut: int, patches: list[tuple[int, bytes]]) -> None:
    data = bytearray(WHOLE)
    for at, patch in patches:
        data[at : at + len(patch)] = patch
    data = data[:cut] if not patches else data
    limits = Limits(pixels=1 << 16, kept_bytes=1 << 22)
    for load in (load_video, load_image):
        try:
            load(bytes(data), limits=limits)
        except VidlmError as error:
            assert isinstance(error, MediaError)  # noqa: PT017


def test_boxes_are_built_as_ffmpeg_reads_them() -> None:
    """The files of these tests are no dialect of their own."""
    import av

    with av.open(io.BytesIO(WHOLE)) as container:
        assert len(container.streams.video) == 4
    assert heif_files.box(b"free", b"x") == b"\0\0\0\tfreex"
