"""How much memory is free."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch

from vidlm.engine.cgroups import cgroup_free_bytes

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows
    resource = None

ROOT = Path("/")
UNKNOWN = 4 << 30  # bytes, where the system does not tell


def free_bytes(device: torch.device) -> int:
    """Bytes that could be taken on a device now without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host_free_bytes()


def free_for_layers(devices: Sequence[torch.device]) -> int:
    """Bytes that layers on these devices could take together now, each as many as another."""
    counts = Counter(devices)
    return min(free_bytes(device) * len(devices) // own for device, own in counts.items())


def host_free_bytes(root: Path = ROOT) -> int:
    """Of this machine, or of what control groups and limits of the process leave of it."""
    left = (_machine(root), cgroup_free_bytes(root), *_until_limits(root))
    return min(free for free in left if free is not None)


def _machine(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text("utf-8", "replace").splitlines()
    except OSError:  # not Linux
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
        return pages * os.sysconf("SC_PAGE_SIZE") // 2 if pages else UNKNOWN
    found = dict(re.findall(r"^(\w+): +(\d{1,15}) kB$", "\n".join(lines), re.MULTILINE))
    if "MemAvailable" in found:
        return int(found["MemAvailable"]) * 1024
    parts = [int(found[name]) for name in ("MemFree", "Buffers", "Cached") if name in found]
    return sum(parts) * 1024 if parts else UNKNOWN  # a kernel before 3.14


def _until_limits(root: Path) -> Iterator[int]:
    """Bytes until the limits of address space and data (ulimit -v and -d)."""
    if resource is None:  # Windows
        return
    try:
        sizes = (root / "proc/self/statm").read_text("ascii").split()
        page, held = os.sysconf("SC_PAGE_SIZE"), (int(sizes[0]), int(sizes[5]))
    except (OSError, ValueError, IndexError):
        return
    for limit, pages in zip((resource.RLIMIT_AS, resource.RLIMIT_DATA), held, strict=True):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            yield max(most - pages * page, 0)
