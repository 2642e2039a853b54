"""The engine: requests in, tokens out. It knows the seam of `models.base`, never a family."""

from __future__ import annotations

from vidlm.engine.loop import Output, Request, Token, generate, run
from vidlm.engine.timing import Timings

__all__ = ["Output", "Request", "Timings", "Token", "generate", "run"]
