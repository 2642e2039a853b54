"""How a command line has a model loaded: words are looked at first, then a model is sought."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vidlm.cli.machine import prepare_kernels
from vidlm.cli.options import Loads
from vidlm.cli.progress import Progress
from vidlm.errors import InvalidArgument

if TYPE_CHECKING:
    from vidlm.api import LM
    from vidlm.plan import Loading


def loading(given: Loads) -> Loading:
    """The options as the library has them. Raises InvalidArgument for one that is not known."""
    from vidlm.plan import Loading  # brings torch, which takes as long as a small model

    room = read_room(given.max_memory or ())
    return Loading(given.dtype, given.quantize, given.device, given.kv_dtype, room)


def read_room(given: Sequence[str]) -> dict[int | str, str] | None:
    """Of every --max-memory that was given, such as "0=20GiB,cpu=60GiB", the sizes by device as the
    library has them, which looks at both. None: of none. Raises InvalidArgument."""
    told, room = ",".join(given), {}
    for each in told.split(",") if given else ():
        device, size = each.partition("=")[::2]
        if not (device.strip() and size.strip()):
            raise InvalidArgument(
                f"--max-memory {told!r} has {each!r} for a device and its size; give GPUs by "
                "number, and cpu, such as 0=20GiB,cpu=60GiB"
            )
        name = int(device) if device.strip().isdecimal() else device.strip()
        if name in room:
            raise InvalidArgument(
                f"--max-memory {told!r} names {name} twice; give each device one size"
            )
        room[name] = size.strip()
    return room or None


def load_model(name: str, given: Loads, progress: Progress) -> LM:
    progress.now(f"loading {name}")
    told = loading(given)
    if not (told.device or "").startswith("cuda"):
        prepare_kernels(progress)  # also packs weights while they are read
    began = time.perf_counter()
    progress.now(f"loading {name}")
    from vidlm.api import load
    from vidlm.engine import EngineOptions

    lm = load(
        name,
        dtype=told.dtype,
        device=told.device,
        quantize=told.quantize,
        engine=EngineOptions(kv_dtype=told.engine_kv_dtype),
        max_memory=told.max_memory,
    )
    progress.done(time.perf_counter() - began, "load", f"{name} {_form(lm)} on {lm.model.device}")
    return lm


def _form(lm: LM) -> str:
    """ "in int4 with keys and values in int8", "in bfloat16"."""
    packed, kv = lm.model.quantization_config, lm.engine.options.kv_dtype
    weights = packed.kind if packed else str(lm.model.dtype).removeprefix("torch.")
    return f"in {weights}" + (f" with keys and values in {kv}" if kv else "")
