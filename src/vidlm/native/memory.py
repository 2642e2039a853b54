"""Memory of a CPU: weights in large pages where the system has them, and freed memory kept.

Every token reads every weight, and a processor looks up where each page of them is: with pages of
2 MiB instead of 4 KiB, linear layers of one token take about a tenth less time
(benchmarks/large_pages.py).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

PAGE = 2 << 20  # bytes of a large page on x86-64, and of the usual one on arm64
CHUNK = 64 << 20  # bytes asked for at a time; they are given back together
ALIGNED = 64  # bytes: a line of the cache
CPU = torch.device("cpu")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT = 256 << 20  # bytes at the end of the heap that may stay when they are freed
FROM_HEAP = 32 << 20  # bytes of what comes from there; glibc takes no more for an answer


class LargePages:
    """Tensors of a CPU that lie side by side. What was asked for and never written takes no memory;
    tensors keep what they are in alive, a chunk of it as long as any of them is there.

    Where the system has no such pages, or has none left, they are of the usual size.
    """

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
        """A tensor that holds anything; on other devices an ordinary one."""
        size = prod(shape) * dtype.itemsize
        if device.type != "cpu" or size == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        if size > len(self._chunk) - self._used:
            self._chunk, self._used = _mapped(max(size, CHUNK)), 0
        start = self._used
        self._used += -(-size // ALIGNED) * ALIGNED
        return self._chunk[start : start + size].view(dtype).view(tuple(shape))


def _mapped(size: int) -> Tensor:
    """Bytes from the beginning of a large page to the end of one."""
    size = -(-size // PAGE) * PAGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, size + PAGE, flags=flags)  # a mapping begins at any page
    with suppress(OSError):  # a system that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % PAGE
    return whole[first : first + size]


def keep_freed(environment: Mapping[str, str]) -> bool:
    """Let malloc keep what layers free and soon ask for again. Whether it was told to: it is where
    malloc is glibc's and the environment says nothing else about it.

    Left to itself, glibc gives such memory back, and gets it page by page, cleared, for the next
    layer. Kept, a prompt of 5,900 tokens of a 0.5B model takes less than half of the page faults
    and 0.93 of the time (benchmarks/kept_memory.py). It concerns the whole process, until its end.
    """
    own = environment.get("GLIBC_TUNABLES", "").find("glibc.malloc.") >= 0
    if own or any(name.startswith("MALLOC_") for name in environment):
        return False
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, FROM_HEAP) and mallopt(M_TRIM_THRESHOLD, KEPT))
