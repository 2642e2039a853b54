"""GPUs that are not there: numbers on the CPU that know which GPU they are to be on.

Inside `gpus`, what is put on "cuda:1" computes as on the CPU and says that it is on cuda:1; mixed
with what is elsewhere it raises, as on a GPU. Nothing is faster or rounded otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

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


class _Factories(TorchFunctionMode):
    """Takes what has a device for its argument, and no tensor yet."""

    def __torch_function__(
        self, func: Function, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _compute(func, args, kwargs or {})


@contextmanager
def gpus(count: int = 2, free: int = 1 << 40) -> Iterator[None]:
    """So many, each with so many free bytes."""
    with (
        patch("torch.cuda.is_available", lambda: True),
        patch("torch.cuda.device_count", lambda: count),
        patch("torch.cuda.current_device", lambda: 0),
        patch("torch.cuda.mem_get_info", lambda device: (free, free)),
        _Factories(),
    ):
        yield


def _compute(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    with torch._C.DisableTorchFunction():
        for name, answer in LOOKS.items():
            if func == getattr(Tensor, name).__get__:  # made anew at every look
                return answer(_place(args[0]))
        if func in (Tensor.to, Tensor.cpu):
            return _moved(args[0], [CPU] if func is Tensor.cpu else [*args[1:], *kwargs.values()])
        where = _common(func, args)
        if func is Tensor.numpy and where != CPU:
            raise WrongDevice(f"numpy of a tensor on {where}")
        if kwargs.get("device") is not None:
            given = torch.device(kwargs["device"])
            where = given if given.type == "cuda" else CPU
            kwargs = {**kwargs, "device": CPU if given.type == "cuda" else given}
        made = func(*args, **kwargs)
        known = {id(x) for x in tree_flatten((args, kwargs))[0]}  # changed in place
        return tree_map(lambda x: x if id(x) in known else _tagged(x, where), made)


LOOKS: Mapping[str, Callable[[torch.device], Any]] = {
    "device": lambda where: where,
    "is_cpu": lambda where: where.type == "cpu",
    "is_cuda": lambda where: where.type == "cuda",
    "is_meta": lambda where: where.type == "meta",
}


def _place(tensor: Tensor) -> torch.device:
    return tensor.where if isinstance(tensor, OnGPU) else tensor.device


def _common(func: Function, args: Sequence[Any]) -> torch.device:
    """The device of all tensors. Single numbers may be on the CPU, and so may what says which
    elements of another are taken."""
    tensors = [x for x in tree_flatten(list(args))[0] if isinstance(x, Tensor)]
    if func is Tensor.copy_:
        return _place(tensors[0])
    if func is Tensor.__getitem__:
        tensors = [tensors[0], *(index for index in tensors[1:] if _place(index) != CPU)]
    places = {_place(x) for x in tensors if x.ndim or isinstance(x, OnGPU)} or {CPU}
    if len(places) > 1:
        raise WrongDevice(f"{func} of tensors on {', '.join(sorted(map(str, places)))}")
    return places.pop()


def _moved(tensor: Tensor, given: Sequence[Any]) -> Tensor:
    where, dtype = _place(tensor), tensor.dtype
    for each in given:
        if isinstance(each, Tensor):
            where, dtype = _place(each), each.dtype
        elif isinstance(each, torch.dtype):
            dtype = each
        elif isinstance(each, str | torch.device):
            where = torch.device(each)
    if (where, dtype) == (_place(tensor), tensor.dtype):
        return tensor
    plain = tensor.as_subclass(Tensor) if isinstance(tensor, OnGPU) else tensor
    made = plain.to(dtype, copy=True) if where.type == "cuda" else plain.to(where, dtype, copy=True)
    return _tagged(made, where)


def _tagged(made: Any, where: torch.device) -> Any:
    if not isinstance(made, Tensor) or where.type != "cuda":
        return made
    tagged = made.as_subclass(OnGPU)
    tagged.where = torch.device("cuda", where.index or 0)
    return tagged
