"""`fit=True`: no more frames than fit into the context and into memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vidlm.api.handle import VideoHandle, is_still
from vidlm.api.keywords import sampling_params
from vidlm.engine.memory import free_bytes
from vidlm.errors import InvalidArgument
from vidlm.fit import Dtypes, Several, fit_frames
from vidlm.hf import FrameOptions
from vidlm.plan import unpacked_bytes

if TYPE_CHECKING:
    from vidlm.api.lm import LM

NAMED = 16  # tokens of text that name a video in a prompt, at most


def fitted(
    lm: LM,
    sources: Sequence[Any],
    frames: FrameOptions,
    messages: Sequence[Mapping[str, Any]],
    sampling: Mapping[str, Any],
) -> FrameOptions:
    """`frames` with no more of each video than fit; those of handles are chosen already and count.

    Raises ContextOverflow or InvalidArgument where the frames asked for, or not even one, do not
    fit; the message names how many do.
    """
    handles = [source for source in sources if isinstance(source, VideoHandle)]
    videos = [source for source in sources if not isinstance(source, VideoHandle)]
    if not videos:
        return frames
    if any(map(is_still, videos)):
        raise InvalidArgument("fit=True is for videos, and an image was given; use frames instead")
    text = len(lm.processor.chat_prompt(messages, ()).ids)
    known = sum(item.tokens for handle in handles for item in handle.media)
    prompt = text + known + NAMED * len(sources)
    config = lm.model.config if len(videos) == 1 else Several(lm.model.config, len(videos))
    named = frames.indices or frames.times
    most = fit_frames(
        config,
        Dtypes(lm.model.dtype, lm.engine.options.kv_dtype),
        prompt,
        sampling_params(lm.model, sampling, prompt).max_new_tokens,
        frames.num_frames if named is None else len(named),
        min(lm.model.config.max_context, lm.engine.room),
        _free(lm),
    )
    if named is not None:
        return frames
    rule = frames.over(lm.processor.sampling).get("max_frames")  # the family's own ceiling holds
    return replace(frames, max_frames=min(most, rule or most))


def _free(lm: LM) -> int:
    """Beside the weights, and beside what prompts unpack one of them into. That is counted even
    where a prompt has taken it already and it is kept: each thread has its own."""
    return free_bytes(lm.model.device) - unpacked_bytes(lm.model, lm.model.dtype)
