"""How much memory control groups leave to this process, on Linux.

A process is in a group of each hierarchy, cgroup v1 or v2, whose limit counts together with those
of all groups above it. /proc/self/cgroup says which group, /proc/self/mountinfo where it is to be
seen: in a container often only from some group on, or from its own alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

V1, V2 = "cgroup", "cgroup2"  # types of file systems
UNLIMITED = 1 << 60  # v1 writes no limit as the largest number of pages; nothing real is as large
USUAL = Path("sys/fs/cgroup")


@dataclass(frozen=True)
class _Mount:
    """Where a hierarchy is mounted, and which of its groups is seen there."""

    kind: str
    group: PurePosixPath
    path: Path


def cgroup_free_bytes(root: Path) -> int | None:
    """Bytes until the nearest limit, what files take and would give up not counted; None where
    there is no limit. `root` is the machine's, "/"."""
    groups = _groups(root)
    levels = [
        _level_free(level, mount.kind)
        for mount in _mounts(root)
        for level in _levels(mount, groups.get(mount.kind, PurePosixPath("/")))
    ]
    return min((free for free in levels if free is not None), default=None)


def _groups(root: Path) -> dict[str, PurePosixPath]:
    """This process' group in the hierarchy of each kind that counts memory."""
    found = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if "memory" in controllers.split(","):
            found[V1] = PurePosixPath(group)
        elif number == "0" and not controllers:
            found[V2] = PurePosixPath(group)
    return found


def _mounts(root: Path) -> list[_Mount]:
    found = []
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(), after.split()
        if len(fields) < 5 or len(kinds) < 3:
            continue
        memory = kinds[0] == V1 and "memory" in kinds[2].split(",")
        if memory or kinds[0] == V2:
            path = root / _plain(fields[4]).lstrip("/")
            found.append(_Mount(kinds[0], PurePosixPath(_plain(fields[3])), path))
    top = PurePosixPath("/")
    usual = [_Mount(V2, top, root / USUAL), _Mount(V1, top, root / USUAL / "memory")]
    return found or usual


def _levels(mount: _Mount, group: PurePosixPath) -> Iterator[Path]:
    """The group's folder and those above it, as far as they are seen. Where it is not seen below
    the mount, what is seen there counts for it."""
    try:
        below = group.relative_to(mount.group)
    except ValueError:
        below = PurePosixPath()
    here = mount.path / below
    if ".." in below.parts or not here.is_dir():
        here = mount.path
    while True:
        yield here
        if here == mount.path:
            return
        here = here.parent
        if mount.kind == V1 and _lines(here / "memory.use_hierarchy") == ["0"]:
            return  # limits of groups above do not count then


def _level_free(folder: Path, kind: str) -> int | None:
    """What a group's own limit leaves; None where it has none."""
    stat = dict(_pairs(folder / "memory.stat"))
    if kind == V2:
        limits = [_number(folder / "memory.max"), _number(folder / "memory.high")]
        used, files = _number(folder / "memory.current"), stat.get("inactive_file")
    else:
        limits = [_number(folder / "memory.limit_in_bytes"), stat.get("hierarchical_memory_limit")]
        used = _number(folder / "memory.usage_in_bytes")
        files = stat.get("total_inactive_file", stat.get("inactive_file"))
    limit = min((x for x in limits if x is not None and x < UNLIMITED), default=None)
    if limit is None:
        return None
    return min(max(limit - max((used or 0) - (files or 0), 0), 0), limit)


def _pairs(path: Path) -> Iterator[tuple[str, int]]:
    for line in _lines(path):
        name, _, value = line.partition(" ")
        if _is_number(value):
            yield name, int(value)


def _number(path: Path) -> int | None:
    """None where there is no such file, and for "max"."""
    lines = _lines(path)
    return int(lines[0]) if len(lines) == 1 and _is_number(lines[0]) else None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 20


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "replace").strip().splitlines()
    except OSError:
        return []


def _plain(text: str) -> str:
    """A path of mountinfo, which has spaces and the like as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
