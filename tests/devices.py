"""GPUs that are not there: numbers on the CPU that know which GPU they are to be on.

Inside `gpus`, what is put on "cuda:1" computes as on the CPU and says that it is on cuda:1; mixed
with what is elsewhere it raises, as on a GPU. Nothing is faster or rounded otherwise. What came
from the host, and whether that waited for it, is written down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

CPU = torch.device("cpu")
Function = Callable[..., Any]


class WrongDevice(RuntimeError):
    """Tensors of different devices, or one that has to come to the CPU first."""


class OnGPU(Tensor):
    """A tensor that says that it is on the GPU `where`."""

    where: torch.device

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _compute(func, args, kwargs or {})


class Pinned(Tensor):
    """A tensor on the CPU that a GPU can fetch by itself."""

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _compute(func, args, kwargs or {})


@dataclass(frozen=True)
class Upload:
    """What a GPU was given by the host: its shape, and whether the host waited meanwhile."""

    shape: tuple[int, ...]
    waited: bool


class _Factories(TorchFunctionMode):
    """Takes what has a device for its argument, and no tensor yet."""

    def __init__(self, uploads: list[Upload]) -> None:
        super().__init__()
        self._uploads = uploads

    def __torch_function__(
        self, func: Function, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        made = _compute(func, args, kwargs or {})
        given = {Tensor.to: 0, Tensor.copy_: 1}.get(func)
        if func is torch.tensor and isinstance(made, OnGPU):
            self._uploads.append(Upload(tuple(made.shape), waited=True))
        elif given is not None and isinstance(made, OnGPU):
            source = args[given]
            if _place(source) == CPU:
                free = isinstance(source, Pinned) and (kwargs or {}).get("non_blocking", False)
                self._uploads.append(Upload(tuple(source.shape), waited=not free))
        return made


@contextmanager
def gpus(count: int = 2, free: int = 1 << 40) -> Iterator[list[Upload]]:
    """So many, each with so many free bytes; what they are given meanwhile."""
    uploads: list[Upload] = []
    with (
        patch("torch.cuda.is_available", lambda: True),
        patch("torch.cuda.device_count", lambda: count),
        patch("torch.cuda.current_device", lambda: 0),
        patch("torch.cuda.mem_get_info", lambda device: (free, free)),
        _Factories(uploads),
    ):
        yield uploads


def _compute(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    with torch._C.DisableTorchFunction():
        for name, answer in LOOKS.items() if func.__name__ == "__get__" else ():
            if func == getattr(Tensor, name).__get__:  # made anew at every look
                return answer(_place(args[0]))
        if func in (Tensor.to, Tensor.cpu):
            given = [CPU] if func is Tensor.cpu else [*args[1:], *kwargs.values()]
            return _moved(args[0], given, kwargs.get("copy", False))
        where = _common(func, args)
        if type(kwargs.get("attn_mask")).__name__ == "CausalBias":  # no numbers: it says which
            kwargs = {**kwargs, "attn_mask": kwargs["attn_mask"]._materialize()}
        pinned, kwargs = _without_pin(kwargs)
        if func is Tensor.numpy and where != CPU:
            raise WrongDevice(f"numpy of a tensor on {where}")
        if kwargs.get("device") is not None:
            given = torch.device(kwargs["device"])
            where = given if given.type == "cuda" else CPU
            kwargs = {**kwargs, "device": CPU if given.type == "cuda" else given}
        made = func(*args, **kwargs)
        if pinned:
            return made.as_subclass(Pinned)
        known = {id(x) for x in leaves((args, kwargs))}  # changed in place
        if isinstance(made, Tensor):
            return made if id(made) in known else _tagged(made, where)
        return tree_map(lambda x: x if id(x) in known else _tagged(x, where), made)


LOOKS: Mapping[str, Callable[[torch.device], Any]] = {
    "device": lambda where: where,
    "is_cpu": lambda where: where.type == "cpu",
    "is_cuda": lambda where: where.type == "cuda",
    "is_meta": lambda where: where.type == "meta",
}


def leaves(tree: Any) -> Iterator[Any]:
    """What tuples, lists and dicts hold, and those in them."""
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        yield tree
        return
    for part in tree:
        yield from leaves(part)


def _without_pin(kwargs: Mapping[str, Any]) -> tuple[bool, Mapping[str, Any]]:
    """Whether pinned memory is asked for, which there is none of without a GPU."""
    rest = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    return bool(kwargs.get("pin_memory")), rest


def _place(tensor: Tensor) -> torch.device:
    return tensor.where if isinstance(tensor, OnGPU) else tensor.device


def _common(func: Function, args: Sequence[Any]) -> torch.device:
    """The device of all tensors. Single numbers may be on the CPU, and so may what says which
    elements of another are taken."""
    tensors = [x for x in leaves(args) if isinstance(x, Tensor)]
    if func is Tensor.copy_:
        return _place(tensors[0])
    if func is Tensor.__getitem__:
        tensors = [tensors[0], *(index for index in tensors[1:] if _place(index) != CPU)]
    places = {_place(x) for x in tensors if x.ndim or isinstance(x, OnGPU)} or {CPU}
    if len(places) > 1:
        raise WrongDevice(f"{func} of tensors on {', '.join(sorted(map(str, places)))}")
    return places.pop()


def _moved(tensor: Tensor, given: Sequence[Any], copy: bool) -> Tensor:
    where, dtype = _place(tensor), tensor.dtype
    for each in given:
        if isinstance(each, Tensor):
            where, dtype = _place(each), each.dtype
        elif isinstance(each, torch.dtype):
            dtype = each
        elif isinstance(each, str | torch.device):
            where = torch.device(each)
    if (where, dtype) == (_place(tensor), tensor.dtype) and not copy:
        return tensor
    plain = tensor.as_subclass(Tensor) if isinstance(tensor, OnGPU | Pinned) else tensor
    made = plain.to(dtype, copy=True) if where.type == "cuda" else plain.to(where, dtype, copy=True)
    return _tagged(made, where)


def _tagged(made: Any, where: torch.device) -> Any:
    if not isinstance(made, Tensor) or where.type != "cuda":
        return made
    tagged = made.as_subclass(OnGPU)
    tagged.where = torch.device("cuda", where.index or 0)
    return tagged
