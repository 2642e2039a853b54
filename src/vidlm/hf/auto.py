"""Auto classes: the family is found in config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vidlm.errors import UnsupportedModel
from vidlm.hf.llava import LlavaForConditionalGeneration, LlavaProcessor
from vidlm.hf.llava_next_video import (
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
)
from vidlm.hf.loading import find, read_load_options
from vidlm.hf.model import ForConditionalGeneration
from vidlm.hf.processor import ProcessorMixin
from vidlm.hf.slowfast import LlavaQwenSlowFastForCausalLM, SlowFastProcessor
from vidlm.hf.video_llava import VideoLlavaForConditionalGeneration, VideoLlavaProcessor
from vidlm.hf.videollama3 import VideoLlama3ForConditionalGeneration, VideoLlama3Processor
from vidlm.hf.words import LOCATION
from vidlm.hub import read_config, read_json
from vidlm.models import family_of
from vidlm.text import Tokenizer

MODELS: tuple[type[ForConditionalGeneration], ...] = (
    LlavaForConditionalGeneration,
    LlavaNextVideoForConditionalGeneration,
    VideoLlavaForConditionalGeneration,
    VideoLlama3ForConditionalGeneration,
    LlavaQwenSlowFastForCausalLM,
)
PROCESSOR_FILE = "processor_config.json"
PROCESSORS: tuple[type[ProcessorMixin], ...] = (
    LlavaProcessor,
    LlavaNextVideoProcessor,
    VideoLlavaProcessor,
    VideoLlama3Processor,
    SlowFastProcessor,
)


def _folder(name: str | Path, kwargs: dict[str, Any]) -> Path:
    """The folder of a model, found once: a class that is handed it reads files of one commit."""
    return find(name, **{key: kwargs[key] for key in LOCATION if kwargs.get(key) is not None})


class AutoConfig:
    """`AutoConfig.from_pretrained(name)` -> the family's frozen config."""

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> Any:
        config = read_config(read_load_options(kwargs).folder(name))
        return family_of(config).config.from_dict(config)


class AutoProcessor:
    """`AutoProcessor.from_pretrained(name)` -> the family's processor."""

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> ProcessorMixin:
        folder = _folder(name, kwargs)
        if not (folder / "config.json").is_file() and (folder / PROCESSOR_FILE).is_file():
            # A processor saved without its model names its own class.
            wanted = read_json(folder / PROCESSOR_FILE).get("processor_class")
            found = [processor for processor in PROCESSORS if processor.__name__ == wanted]
        else:
            family = family_of(read_config(folder))
            found = [processor for processor in PROCESSORS if processor.family is family]
        if not found:
            raise UnsupportedModel(f"{name} has no processor in vidlm")
        return found[0].from_pretrained(folder, **kwargs)


class AutoModelForImageTextToText:
    """`AutoModelForImageTextToText.from_pretrained(name)` -> the family's model."""

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> ForConditionalGeneration:
        folder = _folder(name, kwargs)
        family = family_of(read_config(folder))
        for model in MODELS:
            if model.family is family:
                return model.from_pretrained(folder, **kwargs)
        raise UnsupportedModel(f"{name} has no model class in vidlm")


class AutoTokenizer:
    """`AutoTokenizer.from_pretrained(name)` -> the checkpoint's tokenizer."""

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> Tokenizer:
        return Tokenizer.from_folder(find(name, **ProcessorMixin.location(kwargs)))
