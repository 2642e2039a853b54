"""PyAV 17.1 to 19: the calls that changed between its releases, in one place."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Any, BinaryIO, Protocol, cast

import av
from av.container import InputContainer
from av.sidedata.sidedata import SideData
from av.video.frame import VideoFrame

# Until PyAV 18 text in a file that is not UTF-8 raises, unless told otherwise; 19 has no such
# keyword and replaces what it cannot decode.
_TEXT: dict[str, Any] = (
    {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
)


class _Rational(Protocol):
    @property
    def numerator(self) -> int: ...
    @property
    def denominator(self) -> int: ...


def open_input(
    file: BinaryIO, options: dict[str, str], format_name: str | None = None
) -> InputContainer:
    """An open container; `format_name` skips FFmpeg's guess at the format."""
    container = av.open(_Unnamed(file), "r", format=format_name, options=options, **_TEXT)
    assert isinstance(container, InputContainer)
    return container


class _Unnamed:
    """A file of which FFmpeg sees the bytes alone.

    PyAV hands a file's `name` on, by which FFmpeg guesses the format too: it takes whatever is
    called frame_%03d.jpg for a series of images.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def fraction(value: _Rational | None) -> Fraction | None:
    """A rate, ratio or time base; None for one that is unset, zero or undefined.

    PyAV until 18 gives None or a Fraction, 19 gives an AVRational, which may be 0/1 or 1/0.
    """
    if value is None or not value.numerator or not value.denominator:
        return None
    return Fraction(value.numerator, value.denominator)


def side_data(frame: VideoFrame) -> list[SideData]:
    """The side data of a frame. Raises ValueError where PyAV (until 18) does not know its type."""
    # Iterating gives the data until PyAV 18, and their types from 19 on.
    container = cast(Any, frame.side_data)
    items = cast(Iterable[Any], container)
    return [item if isinstance(item, SideData) else container[item] for item in items]
