"""The simple face of vidlm: `lm = vidlm.load(...)`, `lm.ask("a.mp4", "What happens?")`."""

from __future__ import annotations

from vidlm.api.answer import Answer, AnswerStream, Logprob
from vidlm.api.chat import Chat
from vidlm.api.handle import VideoHandle
from vidlm.api.index_file import check_saved, is_index
from vidlm.api.keywords import AskKeywords, FrameKeywords, SamplingKeywords, TurnKeywords
from vidlm.api.lm import LM, load
from vidlm.api.progress import Progress

__all__ = [
    "LM",
    "Answer",
    "AnswerStream",
    "AskKeywords",
    "Chat",
    "FrameKeywords",
    "Logprob",
    "Progress",
    "SamplingKeywords",
    "TurnKeywords",
    "VideoHandle",
    "check_saved",
    "is_index",
    "load",
]
