"""How a command line has a model loaded: words are looked at first, then a model is sought."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vidlm.cli.options import Loads
from vidlm.cli.progress import Progress

if TYPE_CHECKING:
    from vidlm.api import LM
    from vidlm.plan import Loading


def loading(given: Loads) -> Loading:
    """The options as the library has them. Raises InvalidArgument for one that is not known."""
    from vidlm.plan import Loading  # brings torch, which takes as long as a small model

    return Loading(given.dtype, given.quantize, given.device, given.kv_dtype)


def load_model(name: str, given: Loads, progress: Progress) -> LM:
    began = time.perf_counter()
    progress.now(f"loading {name}")
    told = loading(given)
    from vidlm.api import load
    from vidlm.engine import EngineOptions

    lm = load(
        name,
        dtype=told.dtype,
        device=told.device,
        quantize=told.quantize,
        engine=EngineOptions(kv_dtype=told.engine_kv_dtype),
    )
    progress.done(time.perf_counter() - began, "load", f"{name} {_form(lm)} on {lm.model.device}")
    return lm


def _form(lm: LM) -> str:
    """ "in int4 with keys and values in int8", "in bfloat16"."""
    packed, kv = lm.model.quantization_config, lm.engine.options.kv_dtype
    weights = packed.kind if packed else str(lm.model.dtype).removeprefix("torch.")
    return f"in {weights}" + (f" with keys and values in {kv}" if kv else "")
