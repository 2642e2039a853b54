"""Names users know from transformers. HF's words are translated here, once, and go no deeper."""

from __future__ import annotations

from vidlm.hf.auto import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from vidlm.hf.cache import Cache
from vidlm.hf.configs import CLIPVisionConfig, LlamaConfig
from vidlm.hf.features import BatchFeature
from vidlm.hf.frame_options import VIDEO_OPTIONS, FrameOptions
from vidlm.hf.image_processing import (
    LlavaImageProcessor,
    LlavaNextVideoImageProcessor,
    VideoLlama3ImageProcessor,
    VideoLlama3ImageProcessorFast,
    VideoLlavaImageProcessor,
)
from vidlm.hf.llava import LlavaForConditionalGeneration, LlavaProcessor
from vidlm.hf.llava_next_video import (
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoModel,
    LlavaNextVideoProcessor,
)
from vidlm.hf.loading import DEMO, find
from vidlm.hf.model import ForConditionalGeneration
from vidlm.hf.pictures import shown
from vidlm.hf.processor import ProcessorMixin
from vidlm.hf.slowfast import LlavaQwenSlowFastForCausalLM, SlowFastProcessor
from vidlm.hf.streamers import TextIteratorStreamer, TextStreamer
from vidlm.hf.video_llava import (
    VideoLlavaForConditionalGeneration,
    VideoLlavaModel,
    VideoLlavaProcessor,
)
from vidlm.hf.video_processing import (
    LlavaNextVideoVideoProcessor,
    VideoLlama3VideoProcessor,
    VideoLlavaVideoProcessor,
    VideoMetadata,
)
from vidlm.hf.videollama3 import (
    VideoLlama3ForConditionalGeneration,
    VideoLlama3Model,
    VideoLlama3Processor,
    VideoLlama3VisionModel,
)
from vidlm.models.llava import LlavaConfig
from vidlm.models.llava_next_video import LlavaNextVideoConfig
from vidlm.models.slowfast import SlowFastConfig
from vidlm.models.video_llava import VideoLlavaConfig
from vidlm.models.videollama3 import VideoLlama3Config
from vidlm.quant import BitsAndBytesConfig, QuantoConfig, TorchAoConfig
from vidlm.vision.navit import NaViTConfig as VideoLlama3VisionConfig

__all__ = [
    "DEMO",
    "VIDEO_OPTIONS",
    "AutoConfig",
    "AutoModelForImageTextToText",
    "AutoProcessor",
    "AutoTokenizer",
    "BatchFeature",
    "BitsAndBytesConfig",
    "CLIPVisionConfig",
    "Cache",
    "ForConditionalGeneration",
    "FrameOptions",
    "LlamaConfig",
    "LlavaConfig",
    "LlavaForConditionalGeneration",
    "LlavaImageProcessor",
    "LlavaNextVideoConfig",
    "LlavaNextVideoForConditionalGeneration",
    "LlavaNextVideoImageProcessor",
    "LlavaNextVideoModel",
    "LlavaNextVideoProcessor",
    "LlavaNextVideoVideoProcessor",
    "LlavaProcessor",
    "LlavaQwenSlowFastForCausalLM",
    "ProcessorMixin",
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
    "find",
    "shown",
]
