"""Memory of a CPU: weights in large pages where the system has them, and what was freed kept.

Every token reads every weight, and a processor looks up where each page of them is: with pages of
2 MiB instead of 4 KiB, linear layers of one token take about a tenth less time
(benchmarks/large_pages.py).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import prod

import torch
from torch import Tensor

PAGE = 2 << 20  # bytes of a large page on x86-64, and of the usual one on arm64
CHUNK = 64 << 20  # bytes that the system is asked for at a time
ALIGNED = 64  # bytes: a line of the cache
CPU = torch.device("cpu")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
SPARE = 1 << 30  # bytes that may wait for a next task
KEPT = 256 << 20  # bytes at the end of the heap that may stay when they are freed
FROM_HEAP = 32 << 20  # bytes of what comes from there; glibc takes no more for an answer


class Arena:
    """Tensors of a CPU that lie side by side in memory that was given; when it is full, or on other
    devices, ordinary ones. They keep that memory alive, all of it as long as any of them is there.
    """

    def __init__(self, memory: Tensor) -> None:
        self._memory, self._used = memory, 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
        """A tensor that holds anything. What was never written takes no memory."""
        size = prod(shape) * dtype.itemsize
        if device.type != "cpu" or size == 0 or size > len(self._memory) - self._used:
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        start = self._used
        self._used += -(-size // ALIGNED) * ALIGNED
        return self._memory[start : start + size].view(dtype).view(tuple(shape))


class LargePages:
    """Tensors of a CPU side by side in chunks of large pages, or of pages of the usual size where
    the system has no others left. On other systems and devices they are ordinary tensors.

    Each tensor has a storage of its own, of just its bytes: what is saved, pickled or shared of a
    model is that, and not the chunk. A chunk is freed with the last tensor in it.
    """

    def __init__(self) -> None:
        self._chunk: mmap.mmap | None = None
        self._next = self._stop = 0  # bytes from the chunk's beginning

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
        """A tensor that holds anything. What was never written takes no memory."""
        size = prod(shape) * dtype.itemsize
        if device.type != "cpu" or size == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        if self._chunk is None or size > self._stop - self._next:
            self._chunk, self._next, self._stop = _mapped(max(size, CHUNK))
        start = self._next
        self._next += -(-size // ALIGNED) * ALIGNED
        count = prod(shape)
        return torch.frombuffer(self._chunk, dtype=dtype, count=count, offset=start).view(shape)


class Spare:
    """Memory of a CPU that one task leaves for the next: to get so much from the system, page by
    page and cleared, takes longer than to write it (benchmarks/kept_memory.py). Copies and files of
    what has a Spare have an empty one."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    @contextmanager
    def lent(self, size: int) -> Iterator[Arena]:
        """Room for tensors of so many bytes together, which nobody may look at afterwards. Tasks at
        the same time get memory of their own."""
        try:
            memory = self._kept.pop()
        except IndexError:
            memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        if len(memory) < size:
            del memory  # before there is more
            with torch.inference_mode(False):  # a next task may not be in it
                memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        try:
            yield Arena(memory)
        finally:
            if len(memory) <= SPARE:
                self._kept[:] = [memory]

    def __reduce__(self) -> tuple[type[Spare], tuple[()]]:
        return Spare, ()


def _mapped(size: int) -> tuple[mmap.mmap, int, int]:
    """A chunk, and from where to where it consists of whole large pages."""
    size = -(-size // PAGE) * PAGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    chunk = mmap.mmap(-1, size + PAGE, flags=flags)  # a mapping begins at any page
    with suppress(OSError):  # a system that was built without them
        chunk.madvise(mmap.MADV_HUGEPAGE)
    first = -torch.frombuffer(chunk, dtype=torch.uint8, count=1).data_ptr() % PAGE
    return chunk, first, first + size


def keep_freed(environment: Mapping[str, str]) -> bool:
    """Let malloc keep what layers free and soon ask for again. Whether it was told to: it is where
    malloc is glibc's and the environment says nothing else about it.

    Left to itself, glibc gives such memory back, and gets it page by page, cleared, for the next
    layer (benchmarks/kept_memory.py). It concerns the whole process, until its end.
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
