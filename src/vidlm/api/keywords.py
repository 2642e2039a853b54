"""The keywords of `ask`, `stream`, `chat` and `video`: those that choose frames, and the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vidlm.errors import unknown_keyword
from vidlm.hf import VIDEO_OPTIONS, ForConditionalGeneration, FrameOptions
from vidlm.hf.generation import read_call
from vidlm.types import SamplingParams

FRAME_KEYWORDS = {
    "frames": "num_frames",
    **{name: name for name in VIDEO_OPTIONS if name != "num_frames"},
}
SAMPLING_KEYWORDS = {
    "max_tokens": "max_new_tokens",
    "stop": "stop_strings",
    **{
        name: name
        for name in (
            *("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed"),
            *("repetition_penalty", "num_beams", "length_penalty", "early_stopping", "logprobs"),
        )
    },
}


def read_options(options: Mapping[str, Any]) -> tuple[FrameOptions, dict[str, Any]]:
    """Split keywords into frame options and those of `sampling_params`; raises TypeError on
    others."""
    frames, sampling = {}, {}
    for name, value in options.items():
        if name in FRAME_KEYWORDS:
            frames[FRAME_KEYWORDS[name]] = value
        elif name in SAMPLING_KEYWORDS:
            sampling[SAMPLING_KEYWORDS[name]] = value
        else:
            known = (*FRAME_KEYWORDS, *SAMPLING_KEYWORDS, "system", "fit")
            raise unknown_keyword("ask()", name, known)
    return FrameOptions(**frames), sampling


def plain(frames: FrameOptions) -> dict[str, Any]:
    """What was given, in values that JSON gives back as they are."""
    return {name: _plain(value) for name, value in frames.given().items()}


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if hasattr(value, "tolist"):  # an array, or a number of numpy's
        return value.tolist()
    return [_plain(each) for each in value] if isinstance(value, Sequence) else value


def sampling_params(
    model: ForConditionalGeneration, sampling: Mapping[str, Any], prompt_tokens: int
) -> SamplingParams:
    """The keywords over the checkpoint's generation defaults."""
    said = {name: value for name, value in sampling.items() if name != "logprobs"}
    eos = model.config.text_config.eos_token_id
    call = read_call(said, model.generation_config, prompt_length=prompt_tokens, eos=eos)
    return replace(call.params, n=1, logprobs=sampling.get("logprobs"))
