"""A decoded frame as a player paints it: RGB, upright, in square pixels."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import cast

import av
import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from PIL import Image

from vidlm.errors import MediaError
from vidlm.media.clip import Frames
from vidlm.media.pillow import to_rgb
from vidlm.media.pyav import side_data
from vidlm.media.scene import SIDE
from vidlm.media.tracks import AS_DECODED, Crop, Presentation

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
_MOST_ASPECT = 16  # of a pixel: no camera and no disc has more than 4; a wild header has 200
# Values of a matrix tag (ISO/IEC 23091-2, MatrixCoefficients).
_UNSPECIFIED, _RESERVED = 2, 3
# Those that swscale refuses: the names people know them by, and zscale's.
_RARE_MATRICES = {
    8: ("YCgCo", "ycgco"),
    10: ("BT.2020 constant luminance", "2020_cl"),
    11: ("SMPTE ST 2085 (Y'D'zD'x)", "smpte2085"),
    12: ("chromaticity-derived non-constant luminance", "chroma-derived-nc"),
    13: ("chromaticity-derived constant luminance", "chroma-derived-c"),
    14: ("ICtCp", "ictcp"),
    15: ("IPT-C2", "ipt-c2"),
    16: ("YCgCo-Re", "ycgco-re"),
    17: ("YCgCo-Ro", "ycgco-ro"),
}


class Painter:
    """Converts the frames of one stream.

    The conversion is FFmpeg's own `scale` and `format` filters, so that chroma siting, interlacing,
    matrix and range come out as `ffmpeg -pix_fmt rgb24` has them. (VideoFrame.reformat differs
    from that by up to 130 levels at the edges of 10-bit and interlaced pictures.) What is
    transparent lies before white, as in still images.
    """

    def __init__(self, presentation: Presentation = AS_DECODED, scale: Scale | None = None) -> None:
        """`scale` tells at which (height, width) a picture of a size is kept; None: as it is."""
        self._presentation, self._scale = presentation, scale
        self._kind: tuple[object, ...] = ()
        self._graph: Graph | None = None
        self._probe = AspectProbe() if presentation.follows_frames else None
        self.ignored_aspect: str | None = None

    def size(self, frame: VideoFrame) -> tuple[int, int]:
        """Height and width in square pixels of a painted frame, before rotation."""
        crop = self._crop(frame)
        height = frame.height - crop.top - crop.bottom
        width = frame.width - crop.left - crop.right
        size = height, self._square(frame, width)
        return self._scale(*size) if self._scale is not None else size

    def paint(self, frame: VideoFrame) -> Frames:
        """(H, W, 3) uint8."""
        _unreserve(frame)
        size = self.size(frame)
        kind = *_kind(frame), size
        if self._graph is None or kind != self._kind:
            self._graph, self._kind = self._converter(frame, *size), kind
        picture = _pixels(_filtered(self._graph, frame))
        if picture.shape[2] == 4:
            picture = _on_white(picture, frame.format.name == "pal8")
            if picture.shape[:2] != size:
                picture = resized(picture, *size)
        return upright(picture, _display_matrix(frame))

    def _converter(self, frame: VideoFrame, height: int, width: int) -> Graph:
        crop = self._crop(frame)
        filters = []
        if crop:
            kept = f"iw-{crop.left + crop.right}:ih-{crop.top + crop.bottom}"
            filters.append(("crop", f"{kept}:{crop.left}:{crop.top}:exact=1"))
        if has_alpha(frame):  # scaled behind the white: colours of clear pixels must not bleed
            filters += [("scale", "iw:ih:flags=bicubic"), ("format", "rgba")]
        else:
            filters += [("scale", f"{width}:{height}:flags=bicubic"), ("format", "rgb24")]
        return _graph(frame, filters)

    def _crop(self, frame: VideoFrame) -> Crop:
        crop = self._presentation.crop
        fits = crop.left + crop.right < frame.width and crop.top + crop.bottom < frame.height
        return crop if fits else Crop()

    def _square(self, frame: VideoFrame, width: int) -> int:
        """How wide a picture is in square pixels."""
        aspect = self._presentation.aspect or Fraction(1)
        if self._probe is not None:
            own = self._probe.width(frame, width)
            if own is not None and abs(own - width * aspect) > 1:
                aspect = Fraction(own, width)
        if not 1 / _MOST_ASPECT <= aspect <= _MOST_ASPECT:
            self.ignored_aspect = f"{float(aspect):g}"
            return width
        return max(round(width * aspect), 1)


class AspectProbe:
    """Finds the pixel aspect of single frames, which PyAV keeps to itself and filters see."""

    def __init__(self) -> None:
        self._kind: tuple[object, ...] = ()
        self._graph: Graph | None = None

    def width(self, frame: VideoFrame, width: int) -> int | None:
        """How wide `width` pixels of a frame are in square ones; None where that is unknown."""
        kind = *_kind(frame), width
        try:
            if self._graph is None or kind != self._kind:
                most = (_MOST_ASPECT + 1) * width
                wide = f"w='clip(round({width}*sar),1,{most})':h=1:eval=frame"
                filters = [("crop", "min(iw\\,2):min(ih\\,2):0:0"), ("scale", wide)]
                self._graph, self._kind = _graph(frame, filters), kind
            return _filtered(self._graph, frame).width
        except (av.FFmpegError, ValueError):  # a format that no filter takes: painting says so
            self._graph = None
            return None


def _kind(frame: VideoFrame) -> tuple[object, ...]:
    """What a filter graph is made for."""
    return frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range


def _graph(frame: VideoFrame, filters: Sequence[tuple[str, str]]) -> Graph:
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
    graph.link_nodes(source, *(graph.add(*each) for each in filters), graph.add("buffersink"))
    graph.configure()
    return graph


def _filtered(graph: Graph, frame: VideoFrame) -> VideoFrame:
    graph.push(frame)
    result = graph.pull()
    assert isinstance(result, VideoFrame)
    return result


def has_alpha(frame: VideoFrame) -> bool:
    """Whether a pixel may be transparent; of a palette, any colour may."""
    return frame.format.name == "pal8" or any(c.is_alpha for c in frame.format.components)


def _on_white(picture: Frames, has_palette: bool) -> Frames:
    """(H, W, 3) of (H, W, 4). Palettes of old codecs leave alpha at 0 and mean nothing by it."""
    alpha = picture[..., 3]
    if alpha.min() == 255 or (has_palette and not alpha.any()):
        return picture[..., :3]
    return np.asarray(to_rgb(Image.fromarray(np.ascontiguousarray(picture))))


def _pixels(frame: VideoFrame) -> Frames:
    """The memory of an RGB or RGBA frame, which lives as long as the array does, without a copy."""
    plane = frame.planes[0]
    channels = 4 if frame.format.name == "rgba" else 3
    strides = plane.line_size, channels, 1
    shape = frame.height, frame.width, channels
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
    form = "rgba" if has_alpha(frame) else "rgb24"
    small = frame.reformat(SIDE, SIDE, form, interpolation=Interpolation.AREA, threads=1)
    pixels = cast(Frames, small.to_ndarray())
    return _on_white(pixels, frame.format.name == "pal8") if form == "rgba" else pixels


def unconvertible(name: str, frame: VideoFrame, error: Exception) -> MediaError:
    """The error for a frame that FFmpeg's scaler refuses: mostly for its matrix."""
    matrix = _RARE_MATRICES.get(int(frame.colorspace))
    size = f"{frame.width}x{frame.height}"
    what = f"{name}: a {size} picture in {frame.format.name} cannot be turned into RGB"
    if matrix is None:
        convert = "ffmpeg -i INPUT -pix_fmt yuv420p output.mp4"
        return MediaError(f"{what} ({error}); convert it: {convert}")
    word, option = matrix
    return MediaError(
        f"{what}: its colour matrix is {word}, which FFmpeg's scaler does not know; convert it: "
        f"ffmpeg -i INPUT -vf zscale=matrixin={option}:matrix=709,format=yuv420p output.mp4"
    )
