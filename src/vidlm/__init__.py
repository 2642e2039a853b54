"""vidlm: ask videos questions. A video goes in, an answer comes out.

    lm = vidlm.load("demo")
    print(lm.ask("clip.mp4", "What happens?").text)

Names are looked up when they are first used: `import vidlm` loads neither torch nor a model.
Modules with more of them: vidlm.api, vidlm.engine, vidlm.errors, vidlm.media, vidlm.types.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidlm import api as api
    from vidlm import engine as engine
    from vidlm import errors as errors
    from vidlm import media as media
    from vidlm import types as types
    from vidlm.api import LM, Answer, AnswerStream, Chat, Progress, VideoHandle, load
    from vidlm.engine import AsyncEngine, Engine, EngineOptions, Request
    from vidlm.errors import VidlmError
    from vidlm.hf import (
        AutoConfig,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
        BatchFeature,
        BitsAndBytesConfig,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaNextVideoConfig,
        LlavaNextVideoForConditionalGeneration,
        LlavaNextVideoImageProcessor,
        LlavaNextVideoModel,
        LlavaNextVideoProcessor,
        LlavaNextVideoVideoProcessor,
        LlavaProcessor,
        LlavaQwenSlowFastForCausalLM,
        QuantoConfig,
        SlowFastConfig,
        SlowFastProcessor,
        TextIteratorStreamer,
        TextStreamer,
        TorchAoConfig,
        VideoLlama3Config,
        VideoLlama3ForConditionalGeneration,
        VideoLlama3ImageProcessor,
        VideoLlama3ImageProcessorFast,
        VideoLlama3Model,
        VideoLlama3Processor,
        VideoLlama3VideoProcessor,
        VideoLlama3VisionConfig,
        VideoLlama3VisionModel,
        VideoLlavaConfig,
        VideoLlavaForConditionalGeneration,
        VideoLlavaImageProcessor,
        VideoLlavaModel,
        VideoLlavaProcessor,
        VideoLlavaVideoProcessor,
        VideoMetadata,
    )
    from vidlm.media import Video, load_video, replace_video_with_images, sample_frames
    from vidlm.types import SamplingParams

__version__ = "0.1.0"

_PLACES = {
    "vidlm.api": ("LM", "Answer", "AnswerStream", "Chat", "Progress", "VideoHandle", "load"),
    "vidlm.engine": ("AsyncEngine", "Engine", "EngineOptions", "Request"),
    "vidlm.errors": ("VidlmError",),
    "vidlm.hf": (
        "AutoConfig",
        "AutoModelForImageTextToText",
        "AutoProcessor",
        "AutoTokenizer",
        "BatchFeature",
        "BitsAndBytesConfig",
        "CLIPVisionConfig",
        "LlamaConfig",
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        "LlavaNextVideoConfig",
        "LlavaNextVideoForConditionalGeneration",
        "LlavaNextVideoImageProcessor",
        "LlavaNextVideoModel",
        "LlavaNextVideoProcessor",
        "LlavaNextVideoVideoProcessor",
        "LlavaProcessor",
        "LlavaQwenSlowFastForCausalLM",
        "QuantoConfig",
        "SlowFastConfig",
        "SlowFastProcessor",
        "TextIteratorStreamer",
        "TextStreamer",
        "TorchAoConfig",
        "VideoLlama3Config",
        "VideoLlama3ForConditionalGeneration",
        "VideoLlama3ImageProcessor",
        "VideoLlama3ImageProcessorFast",
        "VideoLlama3Model",
        "VideoLlama3Processor",
        "VideoLlama3VideoProcessor",
        "VideoLlama3VisionConfig",
        "VideoLlama3VisionModel",
        "VideoLlavaConfig",
        "VideoLlavaForConditionalGeneration",
        "VideoLlavaImageProcessor",
        "VideoLlavaModel",
        "VideoLlavaProcessor",
        "VideoLlavaVideoProcessor",
        "VideoMetadata",
    ),
    "vidlm.media": ("Video", "load_video", "replace_video_with_images", "sample_frames"),
    "vidlm.types": ("SamplingParams",),
}
_MODULES = ("api", "engine", "errors", "media", "types")
_HOME = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "LM",
    "Answer",
    "AnswerStream",
    "AsyncEngine",
    "AutoConfig",
    "AutoModelForImageTextToText",
    "AutoProcessor",
    "AutoTokenizer",
    "BatchFeature",
    "BitsAndBytesConfig",
    "CLIPVisionConfig",
    "Chat",
    "Engine",
    "EngineOptions",
    "LlamaConfig",
    "LlavaConfig",
    "LlavaForConditionalGeneration",
    "LlavaNextVideoConfig",
    "LlavaNextVideoForConditionalGeneration",
    "LlavaNextVideoImageProcessor",
    "LlavaNextVideoModel",
    "LlavaNextVideoProcessor",
    "LlavaNextVideoVideoProcessor",
    "LlavaProcessor",
    "LlavaQwenSlowFastForCausalLM",
    "Progress",
    "QuantoConfig",
    "Request",
    "SamplingParams",
    "SlowFastConfig",
    "SlowFastProcessor",
    "TextIteratorStreamer",
    "TextStreamer",
    "TorchAoConfig",
    "Video",
    "VideoHandle",
    "VideoLlama3Config",
    "VideoLlama3ForConditionalGeneration",
    "VideoLlama3ImageProcessor",
    "VideoLlama3ImageProcessorFast",
    "VideoLlama3Model",
    "VideoLlama3Processor",
    "VideoLlama3VideoProcessor",
    "VideoLlama3VisionConfig",
    "VideoLlama3VisionModel",
    "VideoLlavaConfig",
    "VideoLlavaForConditionalGeneration",
    "VideoLlavaImageProcessor",
    "VideoLlavaModel",
    "VideoLlavaProcessor",
    "VideoLlavaVideoProcessor",
    "VideoMetadata",
    "VidlmError",
    "load",
    "load_video",
    "replace_video_with_images",
    "sample_frames",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"vidlm.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'vidlm' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted((*__all__, *_MODULES, "__version__"))
