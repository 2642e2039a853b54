"""One file per family, found by config.json's architectures or its model_type."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from vidlm.errors import UnsupportedModel
from vidlm.models.base import Family

FAMILIES = {  # model_type -> module with a FAMILY
    "llava": "vidlm.models.llava",
    "llava_next_video": "vidlm.models.llava_next_video",
    "video_llava": "vidlm.models.video_llava",
    "llava_qwen_slow_fast": "vidlm.models.slowfast",
    "video_llama_3": "vidlm.models.videollama3",
    "videollama3_qwen2": "vidlm.models.videollama3",  # the authors' own layout
}
# Old revisions on the hub whose model_type is another model's, or was renamed later.
ARCHITECTURES = {
    "LlavaNextVideoForConditionalGeneration": "llava_next_video",
    "Videollama3ForConditionalGeneration": "video_llama_3",
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that reads this config.json."""
    kind = config.get("model_type")
    for name in config.get("architectures") or ():
        kind = ARCHITECTURES.get(name, kind)
    if kind not in FAMILIES:
        raise UnsupportedModel(
            f"model_type {kind!r} in config.json is not supported; known: {', '.join(FAMILIES)}"
        )
    family: Family = import_module(FAMILIES[kind]).FAMILY
    return family
