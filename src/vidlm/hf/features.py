"""BatchFeature: what a processor returns and a model takes."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch

from vidlm.errors import InvalidArgument


class BatchFeature(UserDict[str, Any]):
    """A dict whose entries are attributes too, and which moves its tensors with `.to`.

    `tensor_type` "pt" or "np" makes tensors or arrays of the entries of `data`.
    """

    def __init__(
        self,
        data: Mapping[str, Any] | None = None,
        tensor_type: str | None = None,
        **entries: Any,
    ) -> None:
        super().__init__({**(data or {}), **entries})
        if tensor_type is not None:
            self.convert_to_tensors(tensor_type)

    def convert_to_tensors(self, tensor_type: str) -> Self:
        """Entries that are lists or arrays become tensors ("pt") or arrays ("np")."""
        if tensor_type not in ("pt", "np"):
            raise InvalidArgument(f"tensor_type={tensor_type!r}; allowed: 'pt', 'np'")
        for name, value in self.data.items():
            if tensor_type == "np":
                self.data[name] = np.asarray(value)
            elif not isinstance(value, torch.Tensor):
                self.data[name] = torch.from_numpy(np.asarray(value))
        return self

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:
            raise AttributeError(f"no entry {name!r}")
        return self.data[name]

    def to(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """Move to a device, a dtype or both, in either order. Ids keep their dtype.

        `non_blocking`: as torch takes it.
        """
        device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        waits = not kwargs.pop("non_blocking", False)
        if kwargs:
            raise InvalidArgument(f"to() got {sorted(kwargs)}; it takes a device and a dtype")
        for arg in args:
            if isinstance(arg, torch.dtype):
                dtype = arg
            elif isinstance(arg, str | int | torch.device):
                device = arg
            elif arg is not None:
                raise InvalidArgument(f"to() got {arg!r}; it takes a device and a dtype")

        def moved(value: Any) -> Any:
            if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
                return [moved(each) for each in value]
            if not isinstance(value, torch.Tensor):
                return value
            dtype_of = dtype if value.is_floating_point() else None
            return value.to(device=device, dtype=dtype_of, non_blocking=not waits)

        for name, value in self.data.items():
            self.data[name] = moved(value)
        return self
