"""HEIC and AVIF stills: one picture of coded items, tiled, turned and transparent as the file says.

FFmpeg gives each tile of a grid as a stream and leaves putting them together to its callers;
Pillow reads no HEIC, and AVIF from 11.3 on. ISO/IEC 23008-12: a `meta` box lists items, where
their bytes lie (`iloc`), what refers to what (`iref`) and their properties (`iprp`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import BinaryIO, cast

import av
import numpy as np
from av.codec.context import CodecContext
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from PIL import Image

from vidlm.errors import MediaError
from vidlm.media import boxes
from vidlm.media.boxes import Cursor
from vidlm.media.clip import Deadline, Frames, Limits
from vidlm.media.picture import Painter, resized, unconvertible
from vidlm.media.pillow import to_rgb
from vidlm.media.tracks import aperture

_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"mif2", b"avif", b"miaf")
_MOST_META = 16 << 20  # bytes of a `meta` box
_MOST_DEPTH = 4  # of pictures made of pictures
# Types of coded items: the property that a decoder begins with, and FFmpeg's names of decoders.
_CODED = {
    b"av01": (b"av1C", ("libdav1d", "av1")),
    b"hvc1": (b"hvcC", ("hevc",)),
    b"avc1": (b"avcC", ("h264",)),
    b"vvc1": (b"vvcC", ("vvc",)),
    b"jpeg": (b"", ("mjpeg",)),
}
_ALPHA = (b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha", b"urn:mpeg:hevc:2015:auxid:1")
_TRANSFORMS = (b"clap", b"irot", b"imir")
_FULL_RANGE, _LIMITED_RANGE = 2, 1  # AVColorRange


@dataclass
class _Item:
    """One item: its type, where its bytes lie, what it refers to, its properties in their order."""

    kind: bytes = b""
    hidden: bool = False
    in_meta: bool = False  # in the `idat` box, not anywhere in the file
    extents: list[tuple[int, int]] = field(default_factory=list)
    references: dict[bytes, list[int]] = field(default_factory=dict)
    properties: list[tuple[bytes, memoryview]] = field(default_factory=list)

    def find(self, kind: bytes) -> memoryview | None:
        return next((data for name, data in self.properties if name == kind), None)


def is_still(file: BinaryIO) -> bool:
    """Whether a file is a HEIF image and no sequence of them."""
    return has_still(file) and boxes.find(file, boxes.whole(file), b"moov") is None


def has_still(file: BinaryIO) -> bool:
    """Whether a file is a HEIF image, or a sequence with one beside it."""
    file.seek(0)
    head = file.read(512)
    if head[4:8] != b"ftyp":
        return False
    brands = head[8 : min(int.from_bytes(head[:4], "big"), len(head))]
    if not any(brands[at : at + 4] in _BRANDS for at in range(0, len(brands), 4)):
        return False
    return boxes.find(file, boxes.whole(file), b"meta") is not None


def is_cropped(file: BinaryIO) -> bool:
    """Whether one of its pictures may have to be cropped."""
    found = boxes.find(file, boxes.whole(file), b"meta")
    return found is not None and b"clap" in boxes.content(file, found, _MOST_META)


def read_heif(file: BinaryIO, name: str, limits: Limits) -> tuple[Image.Image, list[str]]:
    """The picture of a HEIF still, RGB on white and upright, and what is not shown of the file.

    Raises MediaError for a form that is not read, MediaLimitError for too many pixels.
    """
    try:
        picture = _Still(file, name, limits)
        pixels = picture.paint(picture.primary, 0)
    except MediaError:  # a ValueError too, but ours already
        raise
    except (ValueError, av.FFmpegError) as error:
        raise MediaError(
            f"{name}: a damaged HEIC or AVIF image ({error}); give an intact one"
        ) from error
    return to_rgb(Image.fromarray(np.ascontiguousarray(pixels))), picture.notes()


class _Still:
    """The items of a file, and how each becomes pixels."""

    def __init__(self, file: BinaryIO, name: str, limits: Limits) -> None:
        self._file, self._name, self._limits = file, name, limits
        self._end = boxes.whole(file).end
        self._deadline = Deadline(name, limits.seconds)
        found = boxes.find(file, boxes.whole(file), b"meta")
        data = boxes.content(file, found, _MOST_META) if found is not None else b""
        if not data:
            raise ValueError("its list of items is too long")
        self._items: dict[int, _Item] = {}
        self._data = memoryview(b"")
        self.primary = -1
        parts = dict(Cursor(data[4:]).boxes())
        self._list(parts)
        if self.primary not in self._items:
            raise ValueError("it does not say which picture to show")

    def notes(self) -> list[str]:
        """Pictures beside the shown one, which are no part, thumbnail or plane of another."""
        used = {id for item in self._items.values() for id in item.references.get(b"dimg", ())}
        shown = [
            id
            for id, item in self._items.items()
            if item.kind in (*_CODED, b"grid", b"iovl", b"iden")
            and id not in used
            and not item.hidden
            and not item.references.keys() & {b"thmb", b"auxl"}
        ]
        others = len(shown) - (self.primary in shown)
        return [f"one of its {others + 1} pictures is shown, the primary one"] if others else []

    # ---- pixels ----------------------------------------------------------------------------

    def paint(self, id: int, depth: int) -> Frames:
        """(H, W, 3) or with transparency (H, W, 4)."""
        self._deadline.check()
        item = self._items.get(id)
        if item is None or depth > _MOST_DEPTH:
            raise ValueError("its pictures refer to one another without end, or to none")
        if item.kind in _CODED:
            pixels = self._decoded(item)
        elif item.kind == b"grid":
            pixels = self._grid(id, item, depth)
        elif item.kind in (b"iden", b"tmap"):  # tmap: brighter for some screens, else the same
            pixels = self.paint(item.references.get(b"dimg", [-1])[0], depth + 1)
        else:
            raise MediaError(
                f"{self._name}: an image of HEIF items of type {item.kind.decode('latin-1')!r}, "
                "which vidlm does not put together; save it as JPEG or PNG"
            )
        return self._with_alpha(id, _transformed(pixels, item.properties), depth)

    def _grid(self, id: int, item: _Item, depth: int) -> Frames:
        layout = Cursor(self._bytes(item))
        version, flags = layout.number(1), layout.number(1)
        rows, columns = layout.number(1) + 1, layout.number(1) + 1
        bytes_each = 4 if flags & 1 else 2
        width, height = layout.number(bytes_each), layout.number(bytes_each)
        tiles = item.references.get(b"dimg", [])
        if version or len(tiles) != rows * columns or not width or not height:
            raise ValueError(f"a grid of {rows} x {columns} with {len(tiles)} tiles")
        self._limits.check(self._name, 1, height, width)
        canvas: Frames | None = None
        for place, tile in enumerate(tiles):
            pixels = self.paint(tile, depth + 1)
            if canvas is None:
                tall, wide, channels = pixels.shape
                # Tiles cover the picture and none lies outside it: so they are not much larger.
                if not (tall * rows >= height > tall * (rows - 1)) or not (
                    wide * columns >= width > wide * (columns - 1)
                ):
                    raise ValueError(
                        f"{rows} x {columns} tiles of {wide}x{tall} for {width}x{height}"
                    )
                canvas = np.empty((height, width, channels), np.uint8)
            if pixels.shape != (tall, wide, channels):
                raise ValueError("tiles of several sizes")
            top, left = place // columns * tall, place % columns * wide
            target = canvas[top : top + tall, left : left + wide]
            target[:] = pixels[: target.shape[0], : target.shape[1]]
        assert canvas is not None
        return canvas

    def _decoded(self, item: _Item) -> Frames:
        configuration, decoders = _CODED[item.kind]
        extent = item.find(b"ispe")
        if extent is not None:
            size = Cursor(extent[4:])
            width, height = size.number(4), size.number(4)
            self._limits.check(self._name, 1, height, width)
        name = next((each for each in decoders if each in av.codecs_available), decoders[-1])
        codec = cast(VideoCodecContext, CodecContext.create(name, "r"))
        codec.thread_count = 1
        codec.options = {"max_pixels": str(self._limits.pixels)}
        extra = item.find(configuration)
        if extra is not None:
            codec.extradata = bytes(extra)
        packet = av.Packet(self._bytes(item))
        frames = [*codec.decode(packet), *codec.decode(None)]
        if not frames:
            raise ValueError("a part of it cannot be decoded")
        frame = frames[0]
        _set_colour(frame, item)
        try:
            return Painter().paint(frame)
        except (av.FFmpegError, ValueError) as error:
            raise unconvertible(self._name, frame, error) from error

    def _with_alpha(self, id: int, pixels: Frames, depth: int) -> Frames:
        alphas = [
            (other, item)
            for other, item in self._items.items()
            if id in item.references.get(b"auxl", ()) and _is_alpha(item)
        ]
        if not alphas or pixels.shape[2] == 4:
            return pixels
        other, plane = alphas[0]
        alpha = self.paint(other, depth + 1)[..., :1]
        if not any(name in _TRANSFORMS for name, _ in plane.properties):  # of its own
            alpha = _transformed(alpha, self._items[id].properties)
        if alpha.shape[:2] != pixels.shape[:2]:
            alpha = resized(np.repeat(alpha, 3, 2), *pixels.shape[:2])[..., :1]
        if other in self._items[id].references.get(b"prem", ()):  # colours times alpha already
            return (pixels + np.minimum(255 - alpha, 255 - pixels)).astype(np.uint8)
        return np.concatenate([pixels, alpha], axis=2)

    def _bytes(self, item: _Item) -> bytes:
        data = b""
        for offset, length in item.extents:
            end = len(self._data) if item.in_meta else self._end
            length = length or end - offset
            if length < 0 or offset + length > end or len(data) + length > self._end:
                raise ValueError("a part of it lies behind its end: was it cut off?")
            if item.in_meta:
                data += self._data[offset : offset + length]
                continue
            self._file.seek(offset)
            data += self._file.read(length)
        if not data:
            raise ValueError("a part of it is not there")
        return data

    # ---- lists -----------------------------------------------------------------------------

    def _list(self, parts: dict[bytes, memoryview]) -> None:
        missing = [name for name in (b"pitm", b"iinf", b"iloc", b"iprp") if name not in parts]
        if missing:
            raise ValueError(f"it has no {missing[0].decode()} box")
        primary = Cursor(parts[b"pitm"])
        self.primary = primary.number(2 if _version(primary) == 0 else 4)
        self._data = parts.get(b"idat", self._data)
        self._list_types(Cursor(parts[b"iinf"]))
        self._list_places(Cursor(parts[b"iloc"]))
        if b"iref" in parts:
            self._list_references(Cursor(parts[b"iref"]))
        self._list_properties(Cursor(parts[b"iprp"]))

    def _list_types(self, box: Cursor) -> None:
        _count(box, _version(box), 1)
        for kind, data in box.boxes():
            if kind != b"infe":
                continue
            entry = Cursor(data)
            version = entry.number(1)
            flags = entry.number(3)
            if version < 2:
                raise ValueError("a list of items of the first edition")
            item = self._items.setdefault(entry.number(2 if version == 2 else 4), _Item())
            entry.take(2)
            item.kind, item.hidden = entry.take(4), bool(flags & 1)

    def _list_places(self, box: Cursor) -> None:
        version = _version(box)
        sizes = box.number(2)
        for_offset, for_length = sizes >> 12, sizes >> 8 & 15
        for_base, for_index = sizes >> 4 & 15, sizes & 15 if version else 0
        for _ in range(_count(box, version, 2)):
            item = self._items.setdefault(box.number(2 if version < 2 else 4), _Item())
            method = box.number(2) & 15 if version else 0
            reference = box.number(2)
            base = box.number(for_base)
            extents = []
            for _ in range(box.number(2)):
                box.take(for_index)
                extents.append((base + box.number(for_offset), box.number(for_length)))
            if method < 2 and not reference:  # else in other items, or in other files
                item.in_meta, item.extents = method == 1, extents

    def _list_references(self, box: Cursor) -> None:
        bytes_each = 2 if _version(box) == 0 else 4
        for kind, data in box.boxes():
            entry = Cursor(data)
            item = self._items.setdefault(entry.number(bytes_each), _Item())
            others = [entry.number(bytes_each) for _ in range(entry.number(2))]
            item.references.setdefault(kind, []).extend(others)

    def _list_properties(self, box: Cursor) -> None:
        properties: list[tuple[bytes, memoryview]] = []
        tables = []
        for kind, data in box.boxes():
            if kind == b"ipco":
                properties = list(Cursor(data).boxes())
            elif kind == b"ipma":
                tables.append(Cursor(data))
        for table in tables:
            version, flags = table.number(1), table.number(3)
            for _ in range(table.number(4)):
                item = self._items.setdefault(table.number(2 if version == 0 else 4), _Item())
                for _ in range(table.number(1)):
                    index = table.number(2) & 0x7FFF if flags & 1 else table.number(1) & 0x7F
                    if index > len(properties):
                        raise ValueError("a property that is not there")
                    if index:
                        item.properties.append(properties[index - 1])


def _version(box: Cursor) -> int:
    """The version of a box that has one, and flags."""
    version = box.number(1)
    box.take(3)
    return version


def _count(box: Cursor, version: int, last_short: int) -> int:
    """A number of entries: 16 bits until a version of the box, 32 after it."""
    return box.number(2 if version < last_short else 4)


def _is_alpha(item: _Item) -> bool:
    kind = item.find(b"auxC")
    return kind is not None and Cursor(kind[4:]).text() in _ALPHA


def _set_colour(frame: VideoFrame, item: _Item) -> None:
    """The matrix and range of a `colr` box, which outranks those in the coded picture."""
    colours = [bytes(data) for name, data in item.properties if name == b"colr"]
    data = next((each for each in colours if each.startswith(b"nclx")), b"")
    if len(data) < 11:
        return
    matrix = int.from_bytes(data[8:10], "big")
    if matrix:  # 0 is RGB, of which the frame's format tells
        frame.colorspace = matrix
    frame.color_range = _FULL_RANGE if data[10] & 0x80 else _LIMITED_RANGE


def _transformed(pixels: Frames, properties: list[tuple[bytes, memoryview]]) -> Frames:
    """Cropped, turned and mirrored, in the order of the properties."""
    for kind, data in properties:
        if kind == b"clap":
            height, width = pixels.shape[:2]
            crop = aperture(data, width, height)
            pixels = pixels[crop.top : height - crop.bottom, crop.left : width - crop.right]
        elif kind == b"irot":
            pixels = np.rot90(pixels, data[0] & 3)  # counterclockwise
        elif kind == b"imir":
            pixels = pixels[:, ::-1] if data[0] & 1 else pixels[::-1]
    return pixels
