"""HEIC and AVIF files of one picture in tiles, made of what FFmpeg encodes: boxes by hand."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field

import av
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

CODECS = {
    b"hvc1": ("libx265", b"hvcC", {"x265-params": "log-level=none:pools=none:crf=4"}),
    b"av01": ("libsvtav1", b"av1C", {"crf": "4", "preset": "10"}),
}
ALPHA = b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\0"


def box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I4s", len(content) + 8, kind) + content


def full(kind: bytes, version: int, flags: int, *parts: bytes) -> bytes:
    return box(kind, struct.pack(">I", version << 24 | flags), *parts)


@dataclass
class Item:
    """One item: its type, bytes, properties, and the items that it is made of or belongs to."""

    kind: bytes
    data: bytes
    properties: list[bytes] = field(default_factory=list)
    references: dict[bytes, list[int]] = field(default_factory=dict)
    hidden: bool = False


def encoded(picture: Pixels, kind: bytes) -> Item:
    """A coded item of a picture (H, W, 3)."""
    codec, wanted, options = CODECS[kind]
    height, width = picture.shape[:2]
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as output:
        stream = output.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts = 0
        for packet in stream.encode(frame) + stream.encode(None):
            packet.dts = packet.pts  # x265 makes one up for a clip of one frame
            output.mux(packet)
    data = target.getvalue()
    at = data.index(wanted) - 4
    configuration = data[at : at + struct.unpack_from(">I", data, at)[0]]
    with av.open(io.BytesIO(data)) as source:
        sample = b"".join(bytes(packet) for packet in source.demux(video=0) if packet.size)
    return Item(kind, sample, [configuration, extent(width, height)])


def extent(width: int, height: int) -> bytes:
    return full(b"ispe", 0, 0, struct.pack(">II", width, height))


def tiled(picture: Pixels, rows: int, columns: int, kind: bytes, side: int = 64) -> list[Item]:
    """A grid and its tiles of side x side, which may reach over the edge; the grid comes first."""
    height, width = picture.shape[:2]
    room = ((0, rows * side - height), (0, columns * side - width), (0, 0))
    padded = np.pad(picture, room, mode="edge")
    layout = struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, width, height)
    count = rows * columns
    grid = Item(b"grid", layout, [extent(width, height)], {b"dimg": list(range(2, count + 2))})
    tiles = []
    for place in range(count):
        top, left = place // columns * side, place % columns * side
        tiles.append(encoded(padded[top : top + side, left : left + side], kind))
        tiles[-1].hidden = True
    return [grid, *tiles]


def with_alpha(items: list[Item], alpha: list[Item]) -> list[Item]:
    """Items whose first is transparent where the first of `alpha`, grey, is black."""
    shift = len(items)
    for item in alpha:
        for kind, ids in item.references.items():
            item.references[kind] = [id + shift for id in ids]
    alpha[0].properties.append(full(b"auxC", 0, 0, ALPHA))
    alpha[0].references[b"auxl"] = [1]
    return [*items, *alpha]


def heif(items: list[Item], brand: bytes = b"heic", primary: int = 1) -> bytes:
    """A file of these items, numbered from 1; what lies in `grid` items goes into `idat`."""
    head = box(b"ftyp", brand, bytes(4), brand, b"mif1")
    size = len(_meta(items, 0, primary))
    data = b"".join(item.data for item in items if item.kind != b"grid")
    return head + _meta(items, len(head) + size + 8, primary) + box(b"mdat", data)


def _meta(items: list[Item], at: int, primary: int) -> bytes:
    names, places, references, shared = b"", b"", b"", b""
    properties: list[bytes] = []
    table = b""
    for id, item in enumerate(items, 1):
        entry = struct.pack(">HH4s", id, 0, item.kind) + b"\0"
        names += full(b"infe", 2, int(item.hidden), entry)
        inside = item.kind == b"grid"
        place = len(shared) if inside else at
        places += struct.pack(">HHHHII", id, int(inside), 0, 1, place, len(item.data))
        if inside:
            shared += item.data
        else:
            at += len(item.data)
        for kind, ids in item.references.items():
            references += box(kind, struct.pack(f">HH{len(ids)}H", id, len(ids), *ids))
        table += struct.pack(">HB", id, len(item.properties))
        for each in item.properties:
            properties.append(each)
            essential = 0x80 if each[4:8] in (b"clap", b"irot", b"imir") else 0
            table += bytes([len(properties) | essential])
    return full(
        b"meta",
        0,
        0,
        full(b"hdlr", 0, 0, bytes(4), b"pict", bytes(13)),
        full(b"pitm", 0, 0, struct.pack(">H", primary)),
        full(b"iinf", 0, 0, struct.pack(">H", len(items)), names),
        full(b"iloc", 1, 0, struct.pack(">HH", 0x4400, len(items)), places),
        full(b"iref", 0, 0, references) if references else b"",
        box(
            b"iprp",
            box(b"ipco", *properties),
            full(b"ipma", 0, 0, struct.pack(">I", len(items)), table),
        ),
        box(b"idat", shared) if shared else b"",
    )
