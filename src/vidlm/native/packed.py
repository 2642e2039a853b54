"""Weights in 8 and 4 bits, as the kernels read them; see packed.h."""

from __future__ import annotations

from dataclasses import dataclass
from threading import local

import torch
from torch import Tensor

from vidlm.errors import InvalidArgument
from vidlm.native.calls import OWN, TYPES, pack, threads
from vidlm.native.library import library

DENSE, EIGHT, FOUR = range(3)  # as in packed.h
BLOCK = 64  # numbers whose 4 bits lie together


class _Room(local):
    """Memory for one weight, kept for each thread: new memory of that size comes from the system
    page by page, which takes several times as long as to write it."""

    memory: Tensor | None = None

    def of(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        size = shape[0] * shape[1]
        if self.memory is None or self.memory.dtype != dtype or len(self.memory) < size:
            self.memory = torch.empty(size, dtype=dtype, device="cpu")
        return self.memory[:size].view(shape)


_ROOM = _Room()


def _empty(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


@dataclass(frozen=True)
class PackedWeight:
    """A weight (O, D) in fewer bits.

    width  D
    codes  8 bits: int8 (O, D). 4 bits: uint8 (O, ceil(D / 64) * 32); byte i of 32 has the place in
           the table of number i of 64 in its lower half, of number i + 32 in its upper
    scale  8 bits: float32 (O), of a row. 4 bits: float32 or bfloat16 (O, ceil(D / group)), of
           `group` numbers
    table  float32 (16): what a place stands for; None with 8 bits. Products of a few rows in
           bfloat16 take it rounded to that
    group  a multiple of 32

    Raises InvalidArgument where shapes or dtypes are others: the kernels read what these promise.
    """

    width: int
    codes: Tensor
    scale: Tensor
    table: Tensor | None = None
    group: int = 0

    def __post_init__(self) -> None:
        O = len(self.codes)  # noqa: E741
        if self.table is None:
            fits = (self.codes.shape, self.scale.shape) == ((O, self.width), (O,))
            fits &= (self.codes.dtype, self.scale.dtype) == (torch.int8, torch.float32)
        else:
            fits = self.group > 0 and self.group % 32 == 0
            fits = fits and self.codes.shape == (O, -(-self.width // BLOCK) * (BLOCK // 2))
            fits = fits and self.scale.shape == (O, -(-self.width // self.group))
            fits &= self.codes.dtype == torch.uint8 and self.scale.dtype in TYPES
            fits &= self.table.shape == (16,) and self.table.dtype == torch.float32
        if not fits:
            raise InvalidArgument(f"not a packed weight: {self!r:.300}; see PackedWeight")

    def __repr__(self) -> str:
        parts = {"codes": self.codes, "scale": self.scale, "table": self.table}
        said = [f"{k}={x.dtype} {tuple(x.shape)}" for k, x in parts.items() if x is not None]
        return f"PackedWeight(width={self.width}, group={self.group}, {', '.join(said)})"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.width

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    @property
    def fields(self) -> tuple[int, ...]:
        """In the order of Weight in jobs.h."""
        form = EIGHT if self.table is None else FOUR
        table = 0 if self.table is None else self.table.data_ptr()
        kind = TYPES[self.scale.dtype]
        return self.codes.data_ptr(), form, self.scale.data_ptr(), table, self.group, kind

    def readable(self) -> bool:
        """Whether the kernels can read it where it is."""
        parts = [x for x in (self.codes, self.scale, self.table) if x is not None]
        return all(type(x) in OWN and x.is_cpu and x.is_contiguous() for x in parts)

    def numbers(self, dtype: torch.dtype, passing: bool = False) -> Tensor:
        """(O, D): what the weights stand for, rounded once to `dtype`. `passing`: the next that are
        asked for in this thread may take the same memory."""
        lib = library() if self.readable() and dtype in TYPES else None
        if lib is None:
            return self._numbers(dtype)
        empty = _ROOM.of if passing else _empty
        out = empty(self.shape, dtype)
        job = pack(*self.fields, 0, out.data_ptr(), self.shape[0])
        lib.vidlm_unpack(job, self.width, TYPES[dtype], threads(out.nbytes))
        return out

    def _numbers(self, dtype: torch.dtype) -> Tensor:
        """In plain torch, on any device."""
        O, D = self.shape  # noqa: E741
        if self.table is None:
            return (self.codes.float() * self.scale[:, None]).to(dtype)
        bytes_ = self.codes.view(O, -1, 1, BLOCK // 2)
        places = torch.cat((bytes_ & 15, bytes_ >> 4), dim=2).view(O, -1)[:, :D]
        scale = self.scale.float().repeat_interleave(self.group, dim=1)[:, :D]
        return (self.table.to(scale)[places.long()] * scale).to(dtype)
