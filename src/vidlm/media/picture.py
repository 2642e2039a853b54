"""A decoded frame as a player paints it: RGB, upright, in square pixels."""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction
from typing import cast

import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from PIL import Image

from vidlm.media.clip import Frames
from vidlm.media.pyav import side_data
from vidlm.media.scene import SIDE

Scale = Callable[[int, int], tuple[int, int]]
# (a, b, c, d) of a display matrix: x' = ax + cy, y' = bx + dy, with y downwards.
Matrix = tuple[int, int, int, int]
_QUARTER_TURNS: tuple[Matrix, ...] = (  # counterclockwise
    (1, 0, 0, 1),
    (0, -1, 1, 0),
    (-1, 0, 0, -1),
    (0, 1, -1, 0),
)
_LARGE = 640 * 360  # pixels above which a second thread is worth its start
# Values of a matrix tag (ISO/IEC 23091-2, MatrixCoefficients).
_UNSPECIFIED, _RESERVED = 2, 3


class Painter:
    """Converts the frames of one stream.

    The conversion is FFmpeg's own `scale` and `format` filters, so that chroma siting, interlacing,
    matrix and range come out as `ffmpeg -pix_fmt rgb24` has them. (VideoFrame.reformat differs
    from that by up to 130 levels at the edges of 10-bit and interlaced pictures.)
    """

    def __init__(self, pixel_aspect: Fraction | None, scale: Scale | None = None) -> None:
        """`scale` tells at which (height, width) a picture of a size is kept; None: as it is."""
        self._aspect = pixel_aspect or Fraction(1)
        self._scale = scale
        self._kind: tuple[object, ...] = ()
        self._graph: Graph | None = None

    def size(self, frame: VideoFrame) -> tuple[int, int]:
        """Height and width in square pixels of what `paint` makes of a frame, before rotation."""
        size = frame.height, max(round(frame.width * self._aspect), 1)
        return self._scale(*size) if self._scale is not None else size

    def paint(self, frame: VideoFrame) -> Frames:
        """(H, W, 3) uint8."""
        _unreserve(frame)
        kind = frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range
        if self._graph is None or kind != self._kind:
            self._graph, self._kind = self._converter(frame), kind
        self._graph.push(frame)
        converted = self._graph.pull()
        assert isinstance(converted, VideoFrame)
        return upright(_pixels(converted), _display_matrix(frame))

    def _converter(self, frame: VideoFrame) -> Graph:
        graph = Graph()
        graph.threads = 2 if frame.width * frame.height > _LARGE else 1
        source = graph.add(
            "buffer",
            video_size=f"{frame.width}x{frame.height}",
            pix_fmt=frame.format.name,
            time_base="1/1000",  # required, unused
            colorspace=str(int(frame.colorspace)),
            range=str(int(frame.color_range)),
        )
        height, width = self.size(frame)
        scale = graph.add("scale", f"{width}:{height}:flags=bicubic")
        graph.link_nodes(source, scale, graph.add("format", "rgb24"), graph.add("buffersink"))
        graph.configure()
        return graph


def _pixels(frame: VideoFrame) -> Frames:
    """The memory of an RGB frame, which lives as long as the array does, without a copy."""
    plane = frame.planes[0]
    strides = plane.line_size, 3, 1
    shape = frame.height, frame.width, 3
    return np.ndarray(shape, np.uint8, buffer=memoryview(plane), strides=strides)


def upright(picture: Frames, matrix: Matrix) -> Frames:
    """Turned and mirrored by a display matrix: the quarter turn that is nearest to it."""
    a, b, c, d = matrix
    across, down = a, d
    if abs(b) + abs(c) > abs(a) + abs(d):
        picture = picture.swapaxes(0, 1)
        across, down = c, b
    if across < 0:
        picture = picture[:, ::-1]
    return picture[::-1] if down < 0 else picture


def _display_matrix(frame: VideoFrame) -> Matrix:
    try:
        items = side_data(frame)
    except ValueError:  # PyAV lists none where it does not know one (EXIF); a turn it tells apart
        return _QUARTER_TURNS[round(frame.rotation / 90) % 4]
    for item in items:
        if item.type is Type.DISPLAYMATRIX:
            a, b, _, c, d, *_ = struct.unpack("=9i", bytes(item))
            return a, b, c, d
    return _QUARTER_TURNS[0]


def resized(picture: Frames, height: int, width: int) -> Frames:
    """Scaled to a size, for the odd frame that has another one than its clip."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _unreserve(frame: VideoFrame) -> None:
    """Some encoders write the reserved matrix, and mean nothing by it."""
    if frame.colorspace == _RESERVED:
        frame.colorspace = _UNSPECIFIED


def thumbnail(frame: VideoFrame) -> Frames:
    """(32, 32, 3) of a decoded frame, squashed: enough to tell one shot from the next."""
    _unreserve(frame)
    small = frame.reformat(SIDE, SIDE, "rgb24", interpolation=Interpolation.AREA, threads=1)
    return cast(Frames, small.to_ndarray())
