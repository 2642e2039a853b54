"""BatchFeature: what a processor returns and a model takes."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import torch

from vidlm.errors import InvalidArgument


class BatchFeature(UserDict[str, Any]):
    """A dict whose entries are attributes too, and which moves its tensors with `.to`."""

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:
            raise AttributeError(f"no entry {name!r}")
        return self.data[name]

    def to(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """Move to a device, a dtype or both, in either order. Ids keep their dtype."""
        device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
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
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

        for name, value in self.data.items():
            self.data[name] = moved(value)
        return self
