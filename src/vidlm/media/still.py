"""One still image from an open file: which reader it takes, upright, and what is left unread."""

from __future__ import annotations

from typing import BinaryIO

from PIL import Image, ImageOps

from vidlm.errors import MediaError, MediaLimitError
from vidlm.media.clip import Limits
from vidlm.media.heif import has_still, is_cropped, read_heif
from vidlm.media.mjpeg import is_sequence
from vidlm.media.pillow import formats, open_image


def read_still(file: BinaryIO, name: str, limits: Limits) -> tuple[Image.Image, list[str]]:
    """The image of a file in its own mode, upright, and notes on what else the file holds.

    AVIF is Pillow's, as in the references, but for what Pillow does not do: crop it, or take some
    files that others take. Raises MediaError, or MediaLimitError before an image of too many pixels
    is decoded.
    """
    if not has_still(file):
        return _by_pillow(file, name, limits)
    file.seek(8)
    if file.read(4) not in (b"avif", b"avis") or "AVIF" not in formats() or is_cropped(file):
        return read_heif(file, name, limits)
    try:
        return _by_pillow(file, name, limits)
    except MediaLimitError:
        raise
    except MediaError:
        return read_heif(file, name, limits)


def _by_pillow(file: BinaryIO, name: str, limits: Limits) -> tuple[Image.Image, list[str]]:
    notes = []
    file.seek(0)
    if file.read(3) == b"\xff\xd8\xff" and is_sequence(file):
        notes.append("the first of several JPEGs in a row is taken; load_video reads them all")
    file.seek(0)
    with open_image(file, name, limits) as image:
        if image.format != "MPO" and (count := getattr(image, "n_frames", 1)) > 1:
            notes.append(f"the first of {count} pictures is taken; load_video reads animations")
            image.seek(0)
        return ImageOps.exif_transpose(image), notes
