"""What can be asked about: videos, images and lists of them; and what is no such thing."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, Union

from numpy.typing import NDArray
from PIL import Image

from vidlm.errors import InvalidArgument
from vidlm.media import Video

if TYPE_CHECKING:
    from vidlm.api.handle import VideoHandle

Picture: TypeAlias = Image.Image | NDArray[Any] | str | Path
Source: TypeAlias = Union[
    str,
    Path,
    bytes,
    bytearray,
    memoryview,
    BinaryIO,
    NDArray[Any],
    Image.Image,
    Video,
    "VideoHandle",
]
Sources: TypeAlias = Source | Sequence[Source | Sequence[Picture]]

URL = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)
NOTHING: Any = object()  # where no source was given, which None may be by mistake


def listed(media: Any) -> list[Any]:
    """One source or a list of them, as a list. Raises InvalidArgument where there is none."""
    if media is NOTHING:
        return []
    sources = list(media) if isinstance(media, list | tuple) else [media]
    if not sources:
        raise InvalidArgument(
            f"media={media!r} holds nothing; give a video or an image, or ask without one: "
            "lm.chat().ask(question)"
        )
    for number, source in enumerate(sources):
        if source is None or (isinstance(source, str) and not source.strip()):
            name = "media" if source is media else f"media[{number}]"
            raise InvalidArgument(
                f"{name} is {source!r}; give a video or an image, or ask without one: "
                "lm.chat().ask(question)"
            )
    return sources


def check_question(question: Any) -> None:
    """Raise InvalidArgument unless this asks something."""
    if not isinstance(question, str):
        raise InvalidArgument(
            f"question={question!r:.80}; ask something, as text: ask(media, question)"
        )
    if not question.strip():
        raise InvalidArgument(f"question={question!r}; ask something, as text")


def check_order(media: Any, question: Any) -> None:
    """Raise InvalidArgument where the question is a file, and the video is not."""
    if not isinstance(media, str) or not isinstance(question, str) or not os.path.isfile(question):
        return
    if not os.path.exists(media) and not URL.match(media):
        raise InvalidArgument(
            f"the question is a file, {question!r}, and the video is not: {media!r:.80}; the video "
            "comes first: ask(media, question)"
        )
