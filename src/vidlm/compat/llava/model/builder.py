"""load_pretrained_model, which returns what the research code's returns."""

from __future__ import annotations

from typing import Any

from vidlm.errors import UnsupportedModel
from vidlm.hf import ForConditionalGeneration
from vidlm.hf.slowfast import (
    LlavaQwenSlowFastForCausalLM,
    SlowFastImageProcessor,
    SlowFastProcessor,
)
from vidlm.text import Tokenizer


def load_pretrained_model(
    model_path: str,
    model_base: str | None,
    model_name: str,
    device_map: Any = "auto",
    torch_dtype: Any = "float16",
    **kwargs: Any,
) -> tuple[Tokenizer, ForConditionalGeneration, SlowFastImageProcessor, int]:
    """Tokenizer, model, image processor and context length of a Slow-Fast checkpoint.

    float16 unless told, as theirs. use_flash_attn and trust_remote_code are accepted: attention is
    torch's, whose kernel on a GPU is FlashAttention, and no code of a checkpoint ever runs.
    """
    if model_base is not None:
        raise UnsupportedModel(f"model_base={model_base!r}; merge the adapter first, and pass None")
    kwargs.pop("use_flash_attn", None)
    model = LlavaQwenSlowFastForCausalLM.from_pretrained(
        model_path, device_map=device_map, torch_dtype=torch_dtype, **kwargs
    )
    assert model.folder is not None
    processor = SlowFastProcessor.from_pretrained(model.folder)
    return processor.tokenizer, model, processor.image_processor, model.config.max_context
