"""What fits into the context and into memory: with `fit=True` no more frames than that; and what
is too long where a prompt does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vidlm.api.handle import VideoHandle, is_still
from vidlm.api.keywords import sampling_params
from vidlm.engine.memory import free_bytes
from vidlm.errors import ContextOverflow, InvalidArgument
from vidlm.fit import Dtypes, Several, fit_frames
from vidlm.hf import FrameOptions
from vidlm.media.policy import FramePolicy
from vidlm.models.base import Prompt
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
    FramePolicy(**frames.over(lm.processor.sampling))  # checks them
    handles = [source for source in sources if isinstance(source, VideoHandle)]
    videos = [source for source in sources if not isinstance(source, VideoHandle)]
    if not videos:
        return frames
    if any(map(is_still, videos)):
        raise InvalidArgument("fit=True is for videos, and an image was given; use frames instead")
    whole = lm.processor.chat_prompt(messages, ())
    check_room(lm, messages, whole)
    text = len(whole.ids)
    known = sum(item.tokens for handle in handles for item in handle.media)
    prompt = text + known + NAMED * len(sources)
    config = lm.model.config if len(videos) == 1 else Several(lm.model.config, len(videos))
    named = frames.times if frames.indices is None else frames.indices
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


def check_room(lm: LM, messages: Sequence[Mapping[str, Any]], prompt: Prompt) -> None:
    """Raise ContextOverflow where a conversation leaves no room for an answer, naming what is too
    long: frames where fewer would fit, texts where theirs is the room."""
    limit, needed = lm.model.config.max_context, len(prompt.ids)
    over = needed - limit + 1
    if over < 1:
        return
    frames = sum(item.frames for item in prompt.media)
    tokens = sum(item.tokens for item in prompt.media)
    most = frames - -(-over * frames // tokens) if tokens else 0
    texts = _texts(lm, messages)
    longest = max(texts, key=lambda name: texts[name])
    left = texts[longest] - over
    advice = []
    if most >= 1:
        advice.append(f"use at most {most} frames or images (now {frames})")
    if left >= 1:
        advice.append(f"shorten {longest}, which has {texts[longest]:,} tokens, to {left:,}")
    if not advice:
        parts = [f"{name} has {count:,} tokens" for name, count in texts.items() if count]
        if frames:
            parts.append(f"{frames} frames or images have {tokens:,}")
        advice.append(f"{', '.join(parts)}; shorten them")
    raise ContextOverflow(
        f"the prompt needs {needed:,} tokens, the model takes {limit:,}; {', or '.join(advice)}"
    )


def _texts(lm: LM, messages: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Tokens of what was written, without what the chat template puts around it."""
    texts = {"the question": 0, "the system prompt": 0, "the conversation so far": 0}
    for number, message in enumerate(messages):
        name = "the conversation so far"
        if number == len(messages) - 1:
            name = "the question"
        elif message["role"] == "system":
            name = "the system prompt"
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part["type"] == "text":
                ids = lm.processor.tokenizer.encode(part["text"], add_special_tokens=False)
                texts[name] += len(ids)
    return texts


def _free(lm: LM) -> int:
    """Beside the weights, and beside what prompts unpack one of them into. That is counted even
    where a prompt has taken it already and it is kept: each thread has its own."""
    return free_bytes(lm.model.device) - unpacked_bytes(lm.model, lm.model.dtype)
