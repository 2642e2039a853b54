"""The engine: requests in, tokens out. It knows the seam of `models.base`, never a family."""

from __future__ import annotations

from vidlm.engine.aio import AsyncEngine
from vidlm.engine.engine import Engine, Handle
from vidlm.engine.loop import generate, prefix_kv, run
from vidlm.engine.options import EngineOptions, EngineStats
from vidlm.engine.request import Failure, Output, Request, Token
from vidlm.engine.timing import Timings

__all__ = [
    "AsyncEngine",
    "Engine",
    "EngineOptions",
    "EngineStats",
    "Failure",
    "Handle",
    "Output",
    "Request",
    "Timings",
    "Token",
    "generate",
    "prefix_kv",
    "run",
]
