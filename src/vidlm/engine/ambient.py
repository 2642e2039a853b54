"""What a thread has switched on in torch, and how a request keeps what its own thread had.

Any thread may compute any request's next step, so a step must not depend on who computes it. Each
request takes along the autocast of the thread that submitted it; of gradients, inference mode and
the default device a step has its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from vidlm.models.base import VideoModel

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Autocast:
    """The autocast dtype of each of a model's device types; None where it is off."""

    dtypes: tuple[tuple[str, torch.dtype | None], ...]

    @classmethod
    def of_thread(cls, model: VideoModel) -> Autocast:
        """That of the calling thread, now."""
        return cls(tuple((kind, _current(kind)) for kind in _kinds(model)))

    @classmethod
    def off(cls, model: VideoModel) -> Autocast:
        return cls(tuple((kind, None) for kind in _kinds(model)))

    @property
    def tag(self) -> bytes:
        """Part of every key of what was computed under it; empty where all of it is off."""
        on = [f"{kind}:{dtype}" for kind, dtype in self.dtypes if dtype is not None]
        return ",".join(on).encode()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread under this autocast."""
        with ExitStack() as stack:
            for kind, dtype in self.dtypes:
                if dtype != _current(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled=dtype is not None))
            yield


@contextmanager
def step_state() -> Iterator[None]:
    """Inference mode, and the CPU as the default device, whatever the calling thread has set."""
    with default_cpu(), torch.inference_mode():
        yield


@contextmanager
def default_cpu() -> Iterator[None]:
    """The CPU as the default device. Nothing is entered where it is: that would cost every call."""
    with ExitStack() as stack:
        if torch.get_default_device() != CPU:
            stack.enter_context(CPU)
        yield


def _kinds(model: VideoModel) -> list[str]:
    return list(dict.fromkeys(("cpu", *(device.type for device in model.layer_devices))))


def _current(kind: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
