"""How many frames fit, into the context and into memory, before any of it is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vidlm.engine.kv import bytes_per_token, kv_dtype
from vidlm.engine.options import EngineOptions
from vidlm.errors import ContextOverflow, InvalidArgument

MOST = 1 << 17  # frames that anything is reckoned for: 36 hours at one a second
PICTURE = 1280 * 720 * 3  # bytes of a frame as it was decoded, which is kept beside its pixels
READING = 128 << 20  # bytes to decode and resize such frames in, by benchmarks/long_videos.py
STEP = EngineOptions().idle_chunk  # tokens of a prompt that are computed at a time
KV_PART = 2  # an engine gives one part in so many of the free memory to keys and values


@dataclass(frozen=True)
class Need:
    """What a video of so many frames takes beside the weights, by config.json alone.

    tokens        in the prompt, the times of frames included
    kv_bytes      their keys and values, and those of the rest of the prompt and of the answer
    held_bytes    frames as decoded (as of 1280 x 720), pixels and features
    work_bytes    what is worked in, whatever the number of frames: by the vision tower or by the
                  decoder, whichever takes more, and by what reads the frames
    """

    frames: int
    tokens: int
    kv_bytes: int
    held_bytes: int
    work_bytes: int

    @property
    def bytes(self) -> int:
        return self.kv_bytes + self.held_bytes + self.work_bytes

    def fits(self, memory: int) -> bool:
        """Into so many free bytes."""
        return self.bytes <= memory and self.kv_bytes <= memory // KV_PART


@dataclass(frozen=True)
class Dtypes:
    """Of weights (of those that are not packed) and features, and of keys and values as
    EngineOptions.kv_dtype names it."""

    weights: torch.dtype
    kv: str | None = None

    @classmethod
    def of(cls, dtype: torch.dtype | Dtypes) -> Dtypes:
        return dtype if isinstance(dtype, Dtypes) else cls(dtype)


def video_tokens(config: Any, frames: int) -> int:
    """Tokens of a video, the text that says when each frame was included."""
    tokens: int = config.video_tokens(frames)
    time: int = getattr(config, "time_tokens", 0)
    return tokens + frames * time


@dataclass(frozen=True)
class Several:
    """A config as that of one video which stands for several, of so many frames each."""

    config: Any
    videos: int

    @property
    def text_config(self) -> Any:
        return self.config.text_config

    def video_tokens(self, frames: int) -> int:
        return self.videos * video_tokens(self.config, frames)

    def held_bytes(self, frames: int, itemsize: int) -> int:
        held: int = self.config.held_bytes(frames, itemsize)
        return self.videos * held + (self.videos - 1) * frames * PICTURE

    def tower_bytes(self, itemsize: int) -> int:
        once: int = self.config.tower_bytes(itemsize)
        return once


def need(
    config: Any,
    dtype: torch.dtype | Dtypes,
    frames: int,
    other_tokens: int,
    tokens: int | None = None,
) -> Need:
    """`other_tokens` are those of the rest of the prompt and of the answer; `tokens` the video's
    own, where they are known better than by config.json."""
    text = config.text_config
    sizes = (text.num_hidden_layers, text.num_key_value_heads, text.head_dim)
    own = video_tokens(config, frames) if tokens is None else tokens
    kinds = Dtypes.of(dtype)
    itemsize = kinds.weights.itemsize
    work = text.step_bytes(STEP, itemsize)
    if frames:
        work = max(work, config.tower_bytes(itemsize)) + READING
    return Need(
        frames,
        own,
        bytes_per_token(*sizes, kv_dtype(kinds.kv, kinds.weights)) * (own + other_tokens),
        frames * PICTURE + config.held_bytes(frames, itemsize),
        work,
    )


def fit_frames(
    model_config: Any,
    dtype: torch.dtype | Dtypes,
    prompt_tokens: int,
    max_new_tokens: int,
    asked_frames: int | None,
    context: int,
    memory_bytes: int | None,
    frame_tokens: Callable[[int], int] | None = None,
) -> int:
    """`asked_frames` if they fit; without any, the most frames that do.

    prompt_tokens  those of the prompt without the video
    memory_bytes   free beside the weights; None: only the context counts
    frame_tokens   tokens of a video of so many frames, times included; None: by config.json, of
                   1280 x 720 pixels where their size matters
    Raises ContextOverflow or InvalidArgument where the frames asked for, or not even one, do not
    fit; the message names how many do.
    """
    tokens = frame_tokens or (lambda frames: video_tokens(model_config, frames))
    other = prompt_tokens + max_new_tokens

    def in_context(frames: int) -> bool:
        return tokens(frames) + other <= context

    def in_memory(frames: int) -> bool:
        if memory_bytes is None:
            return True
        return need(model_config, dtype, frames, other, tokens(frames)).fits(memory_bytes)

    def fits(frames: int) -> bool:
        return in_context(frames) and in_memory(frames)

    if asked_frames is not None and fits(asked_frames):
        return asked_frames
    most = largest(fits)
    if asked_frames is None and most:
        return most
    asked = asked_frames or 1
    if not in_context(asked):
        raise ContextOverflow(
            f"{_frames(asked)} {_take(asked)} {tokens(asked):,} tokens, prompt and answer "
            f"{other:,}, and the context is {context:,}; {_way_out(most)}"
        )
    assert memory_bytes is not None
    wanted = need(model_config, dtype, asked, other, tokens(asked))
    raise InvalidArgument(
        f"{_frames(asked)} {_take(asked)} {size(wanted.bytes)} beside the weights, "
        f"{size(wanted.kv_bytes)} of it keys and values, and {size(max(memory_bytes, 0))} are free "
        f"(half of it for keys and values); {_way_out(most)}"
    )


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number of frames that fits, 0 where not even one does. One more frame may make
    all of them smaller, so that a number may fit and a lower one not."""
    stop = 1
    while stop < MOST and (fits(stop) or fits(2 * stop)):
        stop *= 2
    return next((n for n in range(2 * stop, 0, -1) if fits(n)), 0)


def size(bytes_: int) -> str:
    """In decimal units: 1.50 GB, 2.5 MB, 49.2 kB."""
    for unit, digits, name in ((1e9, 2, "GB"), (1e6, 1, "MB")):
        if bytes_ >= unit:
            return f"{bytes_ / unit:.{digits}f} {name}"
    return f"{bytes_ / 1e3:.1f} kB"


def _frames(count: int) -> str:
    return f"{count:,} frames" if count > 1 else "one frame"


def _take(count: int) -> str:
    return "take" if count > 1 else "takes"


def _way_out(most: int) -> str:
    if most:
        return f"at most {_frames(most)} fit{'' if most > 1 else 's'}"
    return "shorten the prompt or the answer, or take a smaller model"
