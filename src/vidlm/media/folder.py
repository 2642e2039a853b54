"""Names of images: what counts as one, which of a folder or a pattern are meant, in which order."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vidlm.errors import MediaError
from vidlm.media.fetch import FetchPolicy, check_local
from vidlm.media.source import is_url

# What the name of a still image ends with. A PNG or an AVIF may be animated, which is rare: it is a
# video where the caller says so.
_STILL = (
    *(".jpg", ".jpeg", ".jfif", ".jpe", ".jif", ".png", ".bmp", ".dib", ".tif", ".tiff"),
    *(".heic", ".heif", ".hif", ".avif", ".ppm", ".pgm", ".pbm", ".pnm"),
)
# In a folder a WebP is a picture; alone it is as often an animation.
SUFFIXES = (*_STILL, ".webp")

# What file managers leave behind. Names with a leading dot, as .DS_Store and the "._" twins that
# macOS writes to other disks, are hidden anyway.
_LEFT_BEHIND = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
_WILD = re.compile(r"[*?[]")

# A number in a name, with a fraction where that is all: 1.5, but not of 1.5.2 or 2024.01.05.
_NUMBER = re.compile(r"(?<![\d.])(\d+)\.(\d+)(?!\.?\d)|(\d+)")


def is_image(source: str | Path) -> bool:
    """Whether a path or URL names a still image, by its ending (or a data URL by its type). A
    folder, and a pattern such as "frames/*.png", name the frames of a video."""
    name = str(source)
    if name[:5].lower() == "data:" and is_url(name):
        return name[5:11].lower() == "image/"
    if "://" in name:
        return urlsplit(name).path.lower().endswith(_STILL)
    return name.lower().endswith(_STILL) and not (os.path.isdir(name) or is_pattern(name))


def is_pattern(path: str) -> bool:
    """Whether a path that names no file is a pattern such as "frames/*.jpg"."""
    return _WILD.search(path) is not None and not os.path.exists(path)


def pictures(source: Any, access: FetchPolicy) -> list[Path] | None:
    """The images of a folder, or that a pattern such as "frames/*.jpg" names, in natural order;
    None where the source is neither. Hidden files are not among them."""
    if not isinstance(source, str | Path):
        return None
    if isinstance(source, str) and (_SCHEME.match(source) or is_url(source)):
        return None
    path, text = Path(source), str(source)
    folder = os.path.isdir(text)
    if not folder and not is_pattern(text):
        return None
    check_local(path, access)
    if folder:
        found = [each for each in path.iterdir() if _is_picture(each)]
    else:
        matches = [Path(each) for each in glob.glob(_pattern(path))]
        found = [each for each in matches if not _is_hidden(each) and not each.is_dir()]
    if not found:
        what = "is a folder without images" if folder else "matches no file"
        if not folder and matches:
            what = "matches only folders and hidden files"
        raise MediaError(f"{source} {what}; give a video file, or images ({', '.join(SUFFIXES)})")
    return in_order(found)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not _is_hidden(path) and not path.is_dir()


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in _LEFT_BEHIND


def _pattern(path: Path) -> str:
    """The pattern, in which folders that exist by their very name, as "[abc]", are taken so."""
    taken = Path(path.anchor)
    parts = path.parts[1:] if path.anchor else path.parts
    for place, part in enumerate(parts):
        if not os.path.lexists(taken / part):
            return os.path.join(glob.escape(str(taken)), *parts[place:])
        taken /= part
    return glob.escape(str(taken))


def in_order(paths: Iterable[Path]) -> list[Path]:
    """As people count: 2 before 10, and 0.25 before 0.5.

    A number after a point is a fraction, unless one of them ends in a zero that a fraction would
    not need (1.10 beside 1.9): then they are counters, and 1.9 comes before 1.10.
    """
    paths = list(paths)
    fractions = {m[2] for path in paths for m in _NUMBER.finditer(path.stem) if m[2]}
    widths = {len(digits) for digits in fractions}
    counters = len(widths) > 1 and any(len(f) > 1 and f.endswith("0") for f in fractions)
    return sorted(paths, key=lambda path: (_key(path, counters), path.name))


_Key = list[tuple[str, int, str]]


def _key(path: Path, counters: bool) -> tuple[_Key, _Key]:
    """Folder by folder, and by name in each."""
    return _natural(str(path.parent), counters), _natural(path.name, counters)


def _natural(name: str, counters: bool) -> _Key:
    """(text, number, fraction) for each number of a name, and the text behind the last."""
    key: _Key = []
    at = 0
    for match in _NUMBER.finditer(name):
        text = name[at : match.start()]
        whole, digits = match[1] or match[3], match[2] or ""
        if counters and digits:
            key += [(text, int(whole), ""), (".", int(digits), "")]
        else:
            key.append((text, int(whole), digits.rstrip("0")))
        at = match.end()
    return [*key, (name[at:], 0, "")]
