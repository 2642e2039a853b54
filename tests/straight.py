"""What an engine must answer, by a loop without a cache; and tiny prompts to ask it with.

The whole of prompt and answer passes the model for every token, so that nothing can be stored,
shared, cut or mixed up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import tiny
from vidlm import LlavaForConditionalGeneration
from vidlm.engine import Engine, Failure, Handle, Request, Timings, Token
from vidlm.hf import LlavaConfig
from vidlm.models.base import Media, Prompt, VideoModel, insert, memory_of
from vidlm.nn.step import packed
from vidlm.types import SamplingParams

TEXT_IDS = range(len(tiny.SPECIALS), tiny.VOCAB)


def tiny_model(form: str = "siglip-qwen2-tied", seed: int = tiny.SEED) -> VideoModel:
    """A LLaVA with random weights."""
    config = LlavaConfig.from_dict(tiny.FORMS[form].config)
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    tiny.randomise(model, seed)
    return model


def frame(seed: int) -> Media:
    """Noise as a frame of a video."""
    generator = torch.Generator().manual_seed(seed)
    return Media(torch.randn(3, 28, 28, generator=generator), tiny.FRAME_TOKENS)


def text(count: int, seed: int = 0) -> tuple[int, ...]:
    """Ids of words that mean nothing."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return tuple(
        torch.randint(TEXT_IDS.start, TEXT_IDS.stop, (count,), generator=generator).tolist()
    )


def about(frames: Sequence[int], question: Sequence[int], system: Sequence[int] = ()) -> Prompt:
    """A system prompt, frames by their seeds, and a question."""
    media = tuple(map(frame, frames))
    return Prompt((*system, *[tiny.IMAGE] * (tiny.FRAME_TOKENS * len(media)), *question), media)


def asked(prompt: Prompt, new: int = 8, **how: object) -> Request:
    return Request(prompt, SamplingParams(max_new_tokens=new, **how))  # type: ignore[arg-type]


def whole_logits(model: VideoModel, prompt: Prompt, answer: Sequence[int] = ()) -> Tensor:
    """Logits (n + 1, V) after the prompt and after each token of the answer, in one pass."""
    ids = torch.tensor(prompt.ids)
    with torch.inference_mode():
        encoded = model.encode(prompt.media)
        x = insert(model.embed(ids), ids, model.config.placeholders, prompt.media, encoded)
        if answer:  # plainly embedded, whatever its ids are
            x = torch.cat((x, model.embed(torch.tensor(answer))))
        step = packed([len(x)], torch.device("cpu"))
        memory = memory_of(encoded) if model.has_memory else None
        if memory is not None:
            late = torch.full((len(answer),), model.memory_in_decode)
            step = replace(step, memory=(memory,), readers=torch.cat((model.readers(ids), late)))
        return model.logits(model.hidden(x, step)[len(ids) - 1 :]).float()


def straight(model: VideoModel, request: Request) -> list[int]:
    """The greedy answer."""
    params, answer = request.params, list[int]()
    while len(answer) < params.max_new_tokens:
        answer.append(int(whole_logits(model, request.prompt, answer)[-1].argmax()))
        if answer[-1] in params.eos_token_ids and len(answer) >= params.min_new_tokens:
            break
    return answer


class Stepped(Engine):
    """An engine whose steps a test makes one by one, with requests by number."""

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self._events: list[Token | Failure] = []
        self._handles: dict[int, Handle] = {}

    def add(self, request: Request, timings: Timings | None = None) -> int:
        handle = self.submit(request, lambda event: self._events.append(event), timings)
        self._handles[handle.id] = handle
        return handle.id

    def events(self) -> list[Token | Failure]:
        """A step, and what came since the last one."""
        self.step()
        events, self._events = self._events, []
        return events

    @property
    def idle(self) -> bool:
        return super().idle and not self._events

    def abort(self, number: int) -> None:
        self._handles[number].cancel()


def answers(events: Iterable[Token | Failure]) -> dict[tuple[int, int], list[int]]:
    """New ids by request and choice."""
    found: dict[tuple[int, int], list[int]] = {}
    for event in events:
        if isinstance(event, Failure):
            raise event.error
        found.setdefault((event.request, event.choice), []).append(event.id)
    return found


def run_out(engine: Stepped) -> list[Token | Failure]:
    """All that comes until nothing is to be done."""
    events: list[Token | Failure] = []
    steps = 0
    while not engine.idle:
        events += engine.events()
        steps += 1
        assert steps < 5000, "the engine makes no headway"
    return events


def ask(engine: Engine, request: Request) -> list[int]:
    return [token.id for token in engine.stream(request)]


def nothing_is_held(engine: Engine) -> bool:
    """Whether no block is anybody's, and none is lost."""
    stats = engine.stats.scheduler
    pool = stats.pool
    nobody = pool.owned == stats.running == stats.waiting == stats.reserved == 0
    return nobody and pool.cached + pool.free == pool.count
