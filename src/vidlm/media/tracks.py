"""What a container says of its video track that PyAV leaves out: crop, encryption, missing parts.

Read from the headers alone: `sample entries` of MP4 and MOV, `TrackEntry` of Matroska and WebM.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import BinaryIO

from vidlm.errors import MediaError
from vidlm.media import boxes, ebml
from vidlm.media.boxes import Box, Cursor

_MOST_ENTRIES = 1 << 20  # bytes of an `stsd` box
_VISUAL_ENTRY = 78  # bytes of a visual sample entry before its boxes
_SCHEMES = {
    b"cenc": "AES-CTR",
    b"cens": "AES-CTR, in a pattern",
    b"cbc1": "AES-CBC",
    b"cbcs": "AES-CBC, in a pattern",
}
# Sample entries of encrypted tracks: Common Encryption, and iTunes' own.
_ENCRYPTED = (b"encv", b"drmi")

# Ids of Matroska's elements (RFC 9559).
_TRACKS, _TRACK_ENTRY, _TRACK_TYPE, _VIDEO = 0x1654AE6B, 0xAE, 0x83, 0xE0
_ENCODINGS, _ENCODING, _ENCODING_TYPE = 0x6D80, 0x6240, 0x5033
_WIDTH, _HEIGHT, _DISPLAY_WIDTH, _DISPLAY_UNIT = 0xB0, 0xBA, 0x54B0, 0x54B2
_CROP = (0x54CC, 0x54BB, 0x54DD, 0x54AA)  # left, top, right, bottom
_IS_VIDEO, _IS_ENCRYPTION, _UNKNOWN_UNIT = 1, 1, 4

_TS_PACKET, _TS_LOOKED_AT = 188, 2000
_MOST_WMV_HEADER = 1 << 20
_WMV_ENCRYPTION = bytes.fromhex("fbb31122 23bdd211 b4b700a0 c955fc6e")


@dataclass(frozen=True)
class Crop:
    """How many pixels of a decoded picture lie outside what is shown, on each side."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    def __bool__(self) -> bool:
        return any((self.left, self.top, self.right, self.bottom))


@dataclass(frozen=True)
class Track:
    """A video track.

    crop: what the container cuts off. has_aspect: whether it gives a pixel aspect of its own, which
    outranks the codec's. encryption: how its frames are encrypted, in words, or "".
    has_alpha_beside: whether its transparency is in another track.
    """

    crop: Crop = Crop()
    has_aspect: bool = False
    encryption: str = ""
    has_alpha_beside: bool = False


@dataclass(frozen=True)
class Presentation:
    """How the pictures of a track are shown, before they are turned.

    aspect: width over height of a pixel, None for square ones. follows_frames: whether a frame that
    has another aspect of its own is shown by that. notes: what had to be assumed, or is not shown.
    """

    aspect: Fraction | None = None
    crop: Crop = Crop()
    follows_frames: bool = False
    notes: tuple[str, ...] = ()


AS_DECODED = Presentation()


def check_complete(file: BinaryIO, head: bytes, name: str) -> None:
    """Raises MediaError for a part of a stream that nothing can be decoded of."""
    if head[:4] == struct.pack(">I", ebml.CLUSTER):
        raise MediaError(_lone_segment(name, "WebM or Matroska", "a header", "init.webm seg*.webm"))
    if not _is_box(head):
        return
    seen: set[bytes] = set()
    for box in boxes.boxes(file, 0, boxes.whole(file).end):
        seen.add(box.kind)
        if box.kind == b"moov":
            movie = box
        if b"moov" in seen and seen & {b"moof", b"mdat"}:
            return
    if b"moof" in seen and b"moov" not in seen:
        raise MediaError(_lone_segment(name, "DASH, HLS or CMAF", "moov", "init.mp4 seg*.m4s"))
    if b"moov" in seen and boxes.find(file, movie, b"mvex"):
        raise MediaError(
            f"{name}: the initialization segment of a DASH, HLS or CMAF stream, which holds no "
            "frames; put its media segments behind it, in order: "
            "cat init.mp4 seg*.m4s > whole.mp4"
        )


def _is_box(head: bytes) -> bool:
    return head[4:8] in (b"ftyp", b"styp", b"sidx", b"moof", b"moov", b"emsg", b"prft", b"free")


def _lone_segment(name: str, kind: str, lacks: str, files: str) -> str:
    whole = f"whole.{files.rpartition('.')[2].replace('m4s', 'mp4')}"
    return (
        f"{name}: a media segment of a {kind} stream without its initialization segment ({lacks}), "
        f"which says how to decode it; join them, in order: cat {files} > {whole}"
    )


def track_of(file: BinaryIO, format_name: str, number: int, ordinal: int) -> Track:
    """The video track of an open container.

    number: its id as FFmpeg has it, signed. ordinal: its place among the video tracks.
    The position of the file is left as it was: FFmpeg reads on from there.
    """
    at = file.tell()
    try:
        names = format_name.split(",")
        if "mp4" in names:
            track = _of_mp4(file, number & 0xFFFFFFFF)
            return replace(track, has_alpha_beside=has_alpha_track(file))
        if "matroska" in names:
            return _of_matroska(file, ordinal)
        if "mpegts" in names:
            return Track(encryption="scrambled transport stream" if _scrambled(file) else "")
        if "asf" in names:
            file.seek(16)  # behind the name of the header, its size
            size = int.from_bytes(file.read(8), "little")
            protected = _WMV_ENCRYPTION in file.read(min(size, _MOST_WMV_HEADER))
            return Track(encryption="Windows Media DRM" if protected else "")
        return Track()
    finally:
        file.seek(at)


# ---- MP4 and MOV -----------------------------------------------------------------------------


def _of_mp4(file: BinaryIO, number: int) -> Track:
    movie = boxes.find(file, boxes.whole(file), b"moov")
    if movie is None:
        return Track()
    for box in boxes.boxes(file, movie.start, movie.end):
        if box.kind == b"trak" and _track_id(file, box) == number:
            entries = boxes.find(file, box, b"mdia", b"minf", b"stbl", b"stsd")
            data = boxes.content(file, entries, _MOST_ENTRIES) if entries is not None else b""
            try:
                return _of_entries(data)
            except (ValueError, struct.error, ZeroDivisionError):
                return Track()  # FFmpeg has read it in its own way, and that counts
    return Track()


def has_alpha_track(file: BinaryIO) -> bool:
    """Whether an MP4 keeps transparency in a track of its own, as animated AVIF does."""
    movie = boxes.find(file, boxes.whole(file), b"moov")
    if movie is None:
        return False
    for box in boxes.boxes(file, movie.start, movie.end):
        handler = boxes.find(file, box, b"mdia", b"hdlr") if box.kind == b"trak" else None
        if handler is not None and boxes.content(file, handler, 4096)[8:12] == b"auxv":
            return True
    return False


def _track_id(file: BinaryIO, trak: Box) -> int | None:
    header = boxes.find(file, trak, b"tkhd")
    data = boxes.content(file, header, 4096) if header is not None else b""
    at = 20 if data[:1] == b"\x01" else 12  # behind 64-bit or 32-bit dates
    return int.from_bytes(data[at : at + 4], "big") if len(data) >= at + 4 else None


def _of_entries(data: bytes) -> Track:
    """By the first sample entry, unless another one is encrypted."""
    tracks = []
    for kind, entry in Cursor(data[8:]).boxes():
        inside = dict(_complete(Cursor(entry[_VISUAL_ENTRY:])))
        width, height = struct.unpack_from(">HH", entry, 24)
        crop = aperture(inside[b"clap"], width, height) if b"clap" in inside else Crop()
        encryption = _encryption(kind, inside.get(b"sinf"))
        tracks.append(Track(crop, b"pasp" in inside, encryption))
    if not tracks:
        return Track()
    return next((track for track in tracks if track.encryption), tracks[0])


def _complete(entry: Cursor) -> Iterator[tuple[bytes, memoryview]]:
    """The boxes up to a broken one; QuickTime ends some lists with four zero bytes."""
    try:
        yield from entry.boxes()
    except ValueError:
        return


def _encryption(kind: bytes, protection: memoryview | None) -> str:
    if kind not in _ENCRYPTED:
        return ""
    if kind == b"drmi":
        return "FairPlay"
    scheme = dict(_complete(Cursor(protection or b""))).get(b"schm", memoryview(b""))
    code = bytes(scheme[4:8])
    words = _SCHEMES.get(code)
    return f"Common Encryption, {code.decode()}: {words}" if words else "Common Encryption"


def aperture(data: memoryview, width: int, height: int) -> Crop:
    """A `clap` box as pixels to cut off; none where it makes no sense for such a picture."""
    n = struct.unpack_from(">8i", data)
    wide, tall, right, down = (Fraction(n[i], n[i + 1]) for i in range(0, 8, 2))
    left = (width - wide) / 2 + right  # the offsets are from the picture's centre
    top = (height - tall) / 2 + down
    crop = Crop(int(left), int(top), int(width - wide - left), int(height - tall - top))
    sane = min(crop.left, crop.top, crop.right, crop.bottom) >= 0 and wide >= 1 and tall >= 1
    return crop if sane and left >= 0 and top >= 0 else Crop()


# ---- Matroska --------------------------------------------------------------------------------


def _of_matroska(file: BinaryIO, ordinal: int) -> Track:
    tracks = ebml.find(file, ebml.whole(file), ebml.SEGMENT, _TRACKS)
    if tracks is None:
        return Track()
    entries = [
        entry
        for entry in ebml.elements(file, tracks.start, tracks.end)
        if entry.id == _TRACK_ENTRY and ebml.unsigned(file, entry, _TRACK_TYPE) == _IS_VIDEO
    ]
    if ordinal >= len(entries):
        return Track()
    entry = entries[ordinal]
    encoding = ebml.find(file, entry, _ENCODINGS, _ENCODING)
    encrypted = encoding and ebml.unsigned(file, encoding, _ENCODING_TYPE) == _IS_ENCRYPTION
    video = ebml.find(file, entry, _VIDEO)
    if video is None:
        return Track(encryption="Matroska encryption" if encrypted else "")
    crop = Crop(*(ebml.unsigned(file, video, side) for side in _CROP))
    width, height = ebml.unsigned(file, video, _WIDTH), ebml.unsigned(file, video, _HEIGHT)
    if crop.left + crop.right >= width or crop.top + crop.bottom >= height:
        crop = Crop()
    has_aspect = (
        ebml.find(file, video, _DISPLAY_WIDTH) is not None
        and ebml.unsigned(file, video, _DISPLAY_UNIT) != _UNKNOWN_UNIT
    )
    return Track(crop, has_aspect, "Matroska encryption" if encrypted else "")


# ---- MPEG-TS ---------------------------------------------------------------------------------


def _scrambled(file: BinaryIO) -> bool:
    """Whether most packets with a payload say that it is scrambled (DVB)."""
    file.seek(0)
    data = file.read(_TS_PACKET * _TS_LOOKED_AT)
    places = range(max(data.find(b"\x47"), 0), len(data) - 4, _TS_PACKET)
    packets = [data[at : at + 4] for at in places if data[at] == 0x47]
    if len(packets) * 10 < len(places) * 9:  # packets of another length
        return False
    marks = [packet[3] >> 6 for packet in packets if packet[3] & 0x10]
    return sum(mark > 1 for mark in marks) * 2 > len(marks)
