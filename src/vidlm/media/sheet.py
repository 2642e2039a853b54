"""A contact sheet: the frames of a video in a grid, each with its number and time."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw, ImageFont

from vidlm.errors import InvalidArgument
from vidlm.media.clip import Video, clock

_GAP = 8
_FONT_SIZE = 13
_LINE = 20
_LONGEST_NAME = 48
_MAX_PIXELS = 100_000_000
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (100, 100, 100)


def contact_sheet(video: Video, *, columns: int | None = None, thumb: int = 192) -> Image.Image:
    """The frames in reading order, their longer side `thumb` pixels, under a title.

    columns: frames in a row; by default as many as make the sheet about square.
    Raises InvalidArgument for columns or thumb out of range, or a sheet too large to look at.
    """
    if columns is not None and columns < 1:
        raise InvalidArgument(f"columns={columns!r} is not a number of frames; give 1 or more")
    if thumb < 16:
        raise InvalidArgument(f"thumb={thumb!r} pixels are too few to see; give 16 or more")
    font = ImageFont.load_default(size=_FONT_SIZE)
    labels = [f"#{i}  {clock(t)}" for i, t in zip(video.indices, video.pts, strict=True)]
    count, height, width, _ = video.frames.shape
    w, h = (max(round(side * thumb / max(height, width)), 1) for side in (width, height))
    cell_w = max(w, math.ceil(max(font.getlength(label) for label in labels))) + _GAP
    cell_h = h + _LINE + _GAP
    columns = min(columns or max(round(math.sqrt(count * cell_h / cell_w)), 1), count)
    title = _title(video)
    size = (
        max(columns * cell_w, math.ceil(font.getlength(title)) + _GAP) + _GAP,
        math.ceil(count / columns) * cell_h + _LINE + _GAP,
    )
    if size[0] * size[1] > _MAX_PIXELS:
        raise InvalidArgument(
            f"{count} frames of {w}x{h} make a sheet of {size[0]}x{size[1]}, above "
            f"{_MAX_PIXELS} pixels; load fewer (num_frames=64) or give a smaller thumb"
        )
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP // 2), title, fill=_INK, font=font)
    for place, (frame, label) in enumerate(zip(video.frames, labels, strict=True)):
        row, column = divmod(place, columns)
        x, y = _GAP + column * cell_w, _LINE + _GAP + row * cell_h
        picture = Image.fromarray(frame).resize((w, h), Image.Resampling.LANCZOS)
        sheet.paste(picture, (x, y))
        draw.text((x, y + h + 2), label, fill=_FAINT, font=font)
    return sheet


def _title(video: Video) -> str:
    name = video.name
    if len(name) > _LONGEST_NAME:
        half = _LONGEST_NAME // 2
        name = f"{name[:half]}...{name[-half:]}"
    shown = f"{len(video)} of {video.total_frames} frames"
    return f"{name}    {clock(video.duration)}    {video.fps:.4g} fps    {shown}"
