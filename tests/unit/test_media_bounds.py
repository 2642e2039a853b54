"""Files that declare more than they hold are refused before memory is taken for it."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import av
import pytest
from PIL import Image

import clips
from vidlm.errors import MediaError, MediaLimitError
from vidlm.media import DecodePool, Limits, load_video
from vidlm.media.clip import Deadline
from vidlm.media.container import opened
from vidlm.media.listing import list_table
from vidlm.media.mp4_bounds import check_tables

MANY = 4_999_999  # frames that the limits allow
MOST = 80_000_000  # index entries that FFmpeg still allocates, 24 bytes each
ALL = 0xFFFFFFFF


def box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def table(kind: bytes, *parts: bytes, flags: int = 0) -> bytes:
    return box(kind, struct.pack(">I", flags), *parts)


def u32(*numbers: int) -> bytes:
    return struct.pack(f">{len(numbers)}I", *numbers)


MATRIX = u32(0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
PICTURES = box(
    b"jpeg",
    bytes(7) + b"\1" + bytes(16) + struct.pack(">HH", 16, 16) + u32(0x480000, 0x480000, 0),
    b"\0\1" + bytes(32) + b"\0\x18\xff\xff",
)
SOUND = box(b"sowt", bytes(7) + b"\1" + bytes(8) + struct.pack(">HHI", 1, 16, 0) + u32(48000 << 16))


def track(
    number: int, *tables: bytes, kind: bytes = b"vide", entry: bytes = PICTURES, edits: bytes = b""
) -> bytes:
    stbl = box(b"stbl", table(b"stsd", u32(1), entry), *tables)
    dinf = box(b"dinf", table(b"dref", u32(1), table(b"url ", flags=1)))
    header = table(b"smhd", u32(0)) if kind == b"soun" else table(b"vmhd", bytes(8), flags=1)
    mdia = box(
        b"mdia",
        table(b"mdhd", u32(0, 0, 1000, 1000), b"\x55\xc4\0\0"),
        table(b"hdlr", u32(0), kind, bytes(13)),
        box(b"minf", header, dinf, stbl),
    )
    size = u32(16 << 16, 16 << 16)
    tkhd = table(b"tkhd", u32(0, 0, number, 0, 1000), bytes(16), MATRIX, size, flags=7)
    return box(b"trak", tkhd, edits, mdia)


def movie(*parts: bytes, tail: bytes = b"") -> bytes:
    mvhd = table(b"mvhd", u32(0, 0, 1000, 1000, 0x10000), bytes(12), MATRIX, bytes(24), u32(9))
    ftyp = box(b"ftyp", b"isom\0\0\2\0isomiso2")
    return ftyp + box(b"moov", mvhd, *parts) + box(b"mdat", bytes(100)) + tail


def runs(kind: bytes, *numbers: int, each: int = 2) -> bytes:
    return table(kind, u32(len(numbers) // each), u32(*numbers))


def alike(count: int, size: int, *more: bytes, **how: bytes) -> bytes:
    """A track of `count` samples that are all alike, in one chunk."""
    sizes = table(b"stsz", u32(size, count))
    chunks = runs(b"stsc", 1, count, 1, each=3)
    return track(
        1, runs(b"stts", count, 40), chunks, sizes, runs(b"stco", 40, each=1), *more, **how
    )


def two(*tables: bytes, without: bytes = b"") -> bytes:
    """A track of two samples, some of whose tables are others."""
    usual = {
        b"stts": runs(b"stts", 2, 40),
        b"stsc": runs(b"stsc", 1, 2, 1, each=3),
        b"stsz": table(b"stsz", u32(0, 2, 10, 10)),
        b"stco": runs(b"stco", 40, each=1),
    }
    usual.pop(without, None)
    return track(1, *(tables + tuple(usual.values())))


def sound(count: int, duration: int, size: int, chunks: int = 1) -> bytes:
    return track(
        2,
        runs(b"stts", count, duration),
        runs(b"stsc", 1, min(count, 1 << 30), 1, each=3),
        table(b"stsz", u32(size, count)),
        runs(b"stco", *[40] * chunks, each=1),
        kind=b"soun",
        entry=SOUND,
    )


def fragments(count: int, flags: int = 0, runs_of_samples: int = 1, moofs: int = 1) -> bytes:
    trun = table(b"trun", u32(count), flags=flags) * runs_of_samples
    tfhd = table(b"tfhd", u32(1), flags=0x20000)
    moof = box(b"moof", table(b"mfhd", u32(1)), box(b"traf", tfhd, trun))
    empty = track(1, *(table(kind, bytes(8)) for kind in (b"stts", b"stsc", b"stsz", b"stco")))
    mvex = box(b"mvex", table(b"trex", u32(1, 1, 40, 1, 0)))
    return movie(empty, mvex, tail=(moof + box(b"mdat", bytes(100))) * moofs)


def edits(count: int) -> bytes:
    return box(b"edts", runs(b"elst", *[2_000_000, 0, 0x10000] * count, each=3))


def compressed(data: bytes) -> bytes:
    at = data.index(b"moov") - 4
    (size,) = struct.unpack_from(">I", data, at)
    moov = data[at : at + size]
    cmvd = box(b"cmvd", u32(len(moov)), zlib.compress(moov))
    packed = box(b"moov", box(b"cmov", box(b"dcom", b"zlib"), cmvd))
    return data[:at] + packed + data[at + size :]


HEIF = box(b"ftyp", b"avif\0\0\0\0avifmif1")


def items(*parts: bytes) -> bytes:
    handler, primary = table(b"hdlr", u32(0), b"pict", bytes(13)), table(b"pitm", b"\0\1")
    return HEIF + table(b"meta", handler, primary, *parts)


LYING: dict[str, Callable[[], bytes]] = {
    "samples": lambda: movie(alike(MANY, 1)),
    "large samples": lambda: movie(alike(MANY, 1000)),
    "with offsets": lambda: movie(alike(MANY, 1, runs(b"ctts", MANY, 10))),
    "another track": lambda: movie(two(), alike(MOST, 1, kind=b"meta")),
    "sound": lambda: movie(two(), sound(MOST, 2, 1)),
    "sound in chunks": lambda: movie(two(), sound(MOST, 1, 1, chunks=40)),
    "a fragment": lambda: fragments(MANY),
    "runs of a fragment": lambda: fragments(1_000_000, runs_of_samples=20),
    "fragments": lambda: fragments(1_000_000, moofs=20),
    "sizes in a fragment": lambda: fragments(MOST, flags=0x200),
    "edits": lambda: movie(alike(50_000, 1, edits=edits(500))),
    "compressed": lambda: compressed(movie(alike(MANY, 1))),
    "sizes": lambda: movie(two(table(b"stsz", u32(0, MOST)), without=b"stsz")),
    "durations": lambda: movie(two(table(b"stts", u32(MOST)), without=b"stts")),
    "offsets": lambda: movie(two(table(b"ctts", u32(MOST)))),
    "chunk runs": lambda: movie(two(table(b"stsc", u32(MOST)), without=b"stsc")),
    "chunks": lambda: movie(two(table(b"co64", u32(MOST)), without=b"stco")),
    "key frames": lambda: movie(two(table(b"stss", u32(MOST)))),
    "groups": lambda: movie(two(table(b"sgpd", b"sync", u32(1, MOST), flags=1 << 24))),
}


@pytest.mark.parametrize("lie", LYING)
def test_an_mp4_that_declares_more_than_it_holds_is_not_opened(lie: str, monkeypatch) -> None:
    data = LYING[lie]()
    assert len(data) < 10_000
    monkeypatch.setattr(av, "open", None)  # would build the tables
    with pytest.raises(MediaError, match=r"declares? \d+ \w+.* (in|of) .*\d+ bytes"):
        load_video(data)


@pytest.mark.parametrize(
    "lie",
    [
        table(b"iinf", u32(MOST), flags=1 << 24),
        table(b"iloc", b"\x44\0", u32(MOST), flags=2 << 24),
    ],
)
def test_a_heif_that_declares_more_than_it_holds_is_not_opened(lie: bytes, monkeypatch) -> None:
    monkeypatch.setattr(av, "open", None)
    with pytest.raises(MediaError, match="a damaged HEIC or AVIF image"):
        load_video(items(lie))


@pytest.mark.parametrize("count", [5_000_001, MOST, ALL])
def test_more_samples_than_the_limit_are_not_counted(count: int, monkeypatch) -> None:
    monkeypatch.setattr(av, "open", None)
    with pytest.raises(MediaLimitError, match="more than the limit of 5000000 frames"):
        load_video(movie(alike(count, 1)))


def test_a_movie_that_expands_too_far_is_not_expanded() -> None:
    cmov = box(b"cmov", box(b"dcom", b"zlib"), box(b"cmvd", u32(1 << 30), zlib.compress(b"")))
    with pytest.raises(MediaError, match="compressed moov box declares 1073741824 bytes"):
        load_video(HEIF + box(b"moov", cmov))


def test_tables_that_a_file_can_hold_pass() -> None:
    """Also those of a file that was cut off, and of plain sound with a sample in four bytes."""
    for data in (
        movie(alike(90_000, 1)),
        movie(alike(50_000, 1, edits=edits(20))),
        movie(two(), sound(500_000, 1, 4)),
        movie(alike(200_000, 4)) + bytes(200_000),
        fragments(2),
        clips.clip(20),
        clips.clip(20, container="matroska"),
        b"",
        b"\0\0\0\1mdat",
    ):
        check_tables(io.BytesIO(data), "clip", Limits(), Deadline("clip", 60))


def test_an_index_takes_no_object_for_each_sample() -> None:
    """FFmpeg's 150,000 entries of 24 bytes as numbers, and what is worked out from them."""
    count = 150_000
    file = io.BytesIO(movie(alike(count, 1)) + bytes(count))
    with opened(file, "clip", Limits(), Deadline("clip", 60)) as reader:
        tracemalloc.start()
        index = list_table(reader, file)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert index is not None
    assert index.stamps is not None
    assert len(index.stamps) == count
    assert peak < count * 150


# ---- other containers ------------------------------------------------------------------------


def element(identity: str, *parts: bytes) -> bytes:
    """Of EBML, with a size of eight bytes."""
    content = b"".join(parts)
    return bytes.fromhex(identity) + (len(content) | 1 << 56).to_bytes(8, "big") + content


def jpeg() -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (16, 16)).save(target, "JPEG")
    return target.getvalue()


def matroska(*blocks: bytes) -> bytes:
    """Blocks of a track whose frames all begin with the same bytes, which are stored once."""
    number = (1).to_bytes(8, "big")
    stripped = element("5034", element("4254", b"\3"), element("4255", jpeg()))
    entry = element(
        "ae",
        *(element("d7", b"\1"), element("73c5", b"\1"), element("83", b"\1")),
        *(element("86", b"V_MJPEG"), element("6d80", element("6240", stripped))),
        element("e0", element("b0", b"\x10"), element("ba", b"\x10")),
    )
    return element("1a45dfa3", element("4282", b"matroska"), element("4285", b"\2")) + element(
        "18538067",
        element("1549a966", element("2ad7b1", (1_000_000).to_bytes(8, "big"))),
        element("1654ae6b", entry),
        element("1f43b675", element("e7", number), *(element("a3", block) for block in blocks)),
    )


def test_laced_frames_of_no_bytes_are_counted_against_the_file() -> None:
    """256 frames in a block of five bytes."""
    laced = [b"\x81" + place.to_bytes(2, "big") + b"\x84\xff" for place in range(600)]
    data = matroska(*laced)
    assert len(data) < 10_000
    with pytest.raises(MediaError, match=r"lists more than 100000 frames in \d+ bytes"):
        load_video(data, num_frames=2)
    few = matroska(b"\x81\0\0\x80", b"\x81\0\x28\x80")
    assert load_video(few).total_frames == 2


def script(count: int, where: int, data: bytes) -> bytes:
    """An FLV with a list of that many key frames in its metadata."""

    def text(words: bytes) -> bytes:
        return struct.pack(">H", len(words)) + words

    listed = text(b"keyframes") + b"\3" + text(b"filepositions") + b"\x0a" + u32(count)
    content = b"\2" + text(b"onMetaData") + b"\x08" + u32(1) + listed + bytes(90)
    tag = b"\x12" + u32(len(content))[1:] + bytes(7) + content
    return data[:where] + tag + u32(len(tag)) + data[where:]


def test_the_key_frames_of_an_flv_are_counted_against_the_file(monkeypatch) -> None:
    data = clips.clip(3, container="flv")
    clips.check(load_video(script(10, 13, data)), range(3))
    monkeypatch.setattr(av, "open", None)
    with pytest.raises(MediaError, match="declares 268435455 key frames in a file of"):
        load_video(script(0x0FFFFFFF, 13, data))
    with pytest.raises(MediaError, match="declares 268435455 key frames in a file of"):
        load_video(script(0x0FFFFFFF, len(data), data + bytes(5 << 20)))


def canvas(data: bytes, side: int) -> bytes:
    return data[:6] + struct.pack("<HH", side, side) + data[10:]


@pytest.mark.parametrize("side", [16_000, 65_535])
def test_a_canvas_beyond_the_limit_is_not_painted_to_probe_it(side: int) -> None:
    gif = canvas(clips.clip(3, container="gif", codec="gif", pix_fmt="rgb8"), side)
    refused = pytest.raises(MediaLimitError, match=f"{side}x{side} are above the limit")
    with DecodePool(1, seconds=100, memory_bytes=200 << 20) as pool, refused:
        pool.load(gif)


@pytest.mark.parametrize(
    ("place", "offset"), [(b"avih", 24), (b"strh", 40), (b"idx1", 4), (b"strf", 4)]
)
def test_counts_of_an_avi_take_no_memory(place: bytes, offset: int) -> None:
    data = clips.clip(3, container="avi", codec="mjpeg", pix_fmt="yuvj420p")
    at = data.index(place) + offset
    lying = data[:at] + b"\xff\xff\xff\x3f" + data[at + 4 :]
    with DecodePool(1, seconds=100, memory_bytes=200 << 20) as pool:
        assert clips.numbers(pool.load(lying).frames)[:3] == [0, 1, 2]
