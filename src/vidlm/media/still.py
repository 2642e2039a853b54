"""One still image from an open file: which reader it takes, upright, and what is left unread."""

from __future__ import annotations

from typing import BinaryIO

from PIL import Image, ImageOps

from vidlm.media.clip import Limits
from vidlm.media.heif import is_still, read_heif
from vidlm.media.mjpeg import is_sequence
from vidlm.media.pillow import formats, open_image


def read_still(file: BinaryIO, name: str, limits: Limits) -> tuple[Image.Image, list[str]]:
    """The image of a file in its own mode, upright, and notes on what else the file holds.

    Raises MediaError, or MediaLimitError before an image of too many pixels is decoded.
    """
    if is_still(file) and not (_is_avif(file) and "AVIF" in formats()):
        return read_heif(file, name, limits)
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


def _is_avif(file: BinaryIO) -> bool:
    file.seek(8)
    return file.read(4) in (b"avif", b"avis")
