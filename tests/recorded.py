"""A CUDA graph that is not there: what was recorded runs again, and must be what was recorded.

A graph launches the same kernels with the same numbers and addresses whatever has changed since, so
that each replay here is held to the calls of the recording: functions, shapes, numbers, and which
tensors from outside. Whatever would wait for a GPU, or whose result has a shape that depends on
what is computed, is refused, as a capture does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from devices import OnGPU, leaves

Run = Callable[[], Tensor]
Call = tuple[str, list[Any]]
WAITS = {
    *("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"),
    *("nonzero", "masked_select", "unique", "bincount", "equal", "allclose"),
    *("tensor", "as_tensor", "from_numpy"),  # of numbers that the host has
}


class Unsafe(RuntimeError):
    """What cannot be recorded."""


class Calls(TorchFunctionMode):
    """The calls of a `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._made: dict[int, Tensor] = {}  # kept, so that no number is given again

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        with torch._C.DisableTorchFunction():
            given = _tensors((args, kwargs))
            if name in WAITS or any(x.dtype == torch.bool for x in _indices(name, args)):
                raise Unsafe(f"{name} in a recording")
            told = [self._told(x) for x in leaves((args, kwargs))]
            self.calls.append((name, told))
        made = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            fresh = _tensors(made)
            if len({_place(x) for x in (*given, *fresh) if x.ndim}) > 1:
                raise Unsafe(f"{name} between devices in a recording")
        known = {id(x) for x in given}
        self._made |= {id(x): x for x in fresh if id(x) not in known}
        return made

    def _told(self, x: Any) -> Any:
        """Of tensors from outside also where they are."""
        if not isinstance(x, Tensor):
            return repr(x)
        where = None if id(x) in self._made else x.data_ptr()
        return (tuple(x.shape), x.dtype, where)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in leaves(tree) if isinstance(x, Tensor)]


def _place(x: Tensor) -> torch.device:
    return x.where if isinstance(x, OnGPU) else x.device


def _indices(name: str, args: Sequence[Any]) -> list[Tensor]:
    if name not in ("__getitem__", "__setitem__"):
        return []
    return _tensors(args[1])


class Recording:
    """One run, and how often it was replayed."""

    def __init__(self, run: Run) -> None:
        self._run, self._calls = run, Calls()
        with self._calls:
            self.made = run()
        self.made.fill_(torch.nan)  # a capture computes nothing
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        calls = Calls()
        with calls:
            made = self._run()
        for mine, recorded in zip(calls.calls, self._calls.calls, strict=True):
            assert mine == recorded, "a replay cannot do what was not recorded"
        self.made.copy_(made)


class Recorder:
    """Stands for vidlm.engine.graphs.CudaCapture."""

    def __init__(self) -> None:
        self.made: list[Recording] = []

    def __call__(self, run: Run) -> tuple[Tensor, Callable[[], None]]:
        run()
        self.made.append(Recording(run))
        return self.made[-1].made, self.made[-1].replay

    @property
    def replays(self) -> int:
        return sum(recording.replays for recording in self.made)
