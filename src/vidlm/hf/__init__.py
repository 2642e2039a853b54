"""Names users know from transformers. HF's words are translated here, once, and go no deeper."""

from __future__ import annotations

from vidlm.hf.auto import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from vidlm.hf.conversation import VIDEO_OPTIONS, FrameOptions
from vidlm.hf.features import BatchFeature
from vidlm.hf.loading import DEMO, find
from vidlm.hf.model import ForConditionalGeneration, LlavaForConditionalGeneration
from vidlm.hf.processor import LlavaProcessor, ProcessorMixin
from vidlm.hf.streamers import TextIteratorStreamer, TextStreamer
from vidlm.models.llava import LlavaConfig

__all__ = [
    "DEMO",
    "VIDEO_OPTIONS",
    "AutoConfig",
    "AutoModelForImageTextToText",
    "AutoProcessor",
    "BatchFeature",
    "ForConditionalGeneration",
    "FrameOptions",
    "LlavaConfig",
    "LlavaForConditionalGeneration",
    "LlavaProcessor",
    "ProcessorMixin",
    "TextIteratorStreamer",
    "TextStreamer",
    "find",
]
