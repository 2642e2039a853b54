"""The simple face of vidlm: `lm = vidlm.load(...)`, `lm.ask("a.mp4", "What happens?")`."""

from __future__ import annotations

from vidlm.api.answer import Answer, AnswerStream, Logprob
from vidlm.api.chat import Chat
from vidlm.api.handle import VideoHandle
from vidlm.api.index_file import is_index
from vidlm.api.keywords import AskKeywords, FrameKeywords, SamplingKeywords
from vidlm.api.lm import LM, load

__all__ = [
    "LM",
    "Answer",
    "AnswerStream",
    "AskKeywords",
    "Chat",
    "FrameKeywords",
    "Logprob",
    "SamplingKeywords",
    "VideoHandle",
    "is_index",
    "load",
]
