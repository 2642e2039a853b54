"""A batch of requests from its first token to its last, by an engine of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from vidlm.engine.ambient import default_cpu
from vidlm.engine.answers import budget_of
from vidlm.engine.engine import Engine
from vidlm.engine.memory import free_for_layers
from vidlm.engine.options import BLOCK, EXACT_GRID, EngineOptions
from vidlm.engine.request import Output, Request, Token
from vidlm.engine.runner import reserve
from vidlm.engine.store import block_bytes, blocks_for
from vidlm.engine.timing import Timings
from vidlm.models.base import Encoded, Media, Prompt, VideoModel
from vidlm.native import Cache
from vidlm.native.memory import ALIGNED
from vidlm.text import Tokenizer
from vidlm.types import FinishReason, SamplingParams


def generate(
    model: VideoModel,
    requests: Sequence[Request],
    *,
    tokenizer: Tokenizer | None = None,
    timings: Timings | None = None,
    options: EngineOptions | None = None,
) -> list[Output]:
    """All new tokens of each request, of each of its `n` answers. `run` gives them one by one."""
    starts = [sum(r.params.n for r in requests[:i]) for i in range(len(requests) + 1)]
    ids: list[list[int]] = [[] for _ in range(starts[-1])]
    finish = [FinishReason.LENGTH] * starts[-1]
    for token in run(model, requests, tokenizer=tokenizer, timings=timings, options=options):
        place = starts[token.request] + token.choice
        ids[place].append(token.id)
        finish[place] = token.finish or finish[place]
    return [Output(tuple(i), f) for i, f in zip(ids, finish, strict=True)]


def run(
    model: VideoModel,
    requests: Sequence[Request],
    *,
    tokenizer: Tokenizer | None = None,
    timings: Timings | None = None,
    options: EngineOptions | None = None,
) -> Iterator[Token]:
    """New tokens as they are decided, of all requests; a token's `request` is its place here.

    Nothing is remembered when it ends; on a CPU the model keeps the memory of keys and values, up
    to 1 GiB, for the next call. No more is taken than the requests need together, if half of what
    is free (or `options.kv_bytes`) allows that. `tokenizer` is needed where a request has stop
    strings. Beam search decides at its end: its tokens come all at once. `timings` takes the time
    of all requests together. Raises ContextOverflow before anything is computed where a prompt
    leaves no room for an answer.
    """
    options = _bounded(model, requests, options or EngineOptions(share=False))
    timings = timings if timings is not None else Timings()
    with _memory(model, options) as empty:
        engine = Engine(model, tokenizer=tokenizer, options=options, empty=empty)
        yield from engine.stream_all(requests, timings)  # numbered as they are submitted


def prefix_kv(
    engine: Engine, prompt: Prompt, encoded: Sequence[Encoded]
) -> list[tuple[Cache, Cache]]:
    """Keys and values (K, S, E) of every layer of all full blocks of a prompt: what the engine's
    cache has of them, or else computed apart, where it keeps nothing or gave up some meanwhile.
    `encoded` are the features of its media.

    An exact engine stores whole cells of 512 tokens. Empty where the prompt has no full block or
    cell.
    """
    unit = EXACT_GRID if engine.options.exact else BLOCK
    count = len(prompt.ids) // unit * unit
    if not count:
        return []
    media = tuple(map(Media.without_pixels, prompt.media, encoded))
    request = Request(Prompt(prompt.ids, media), SamplingParams(max_new_tokens=1))
    options = replace(
        _bounded(engine.model, [request], engine.options), share=True, cuda_graphs=False
    )
    if engine.options.share:
        layers = _prefilled(engine, request)
        if layers and layers[0][0].shape[1] == count:
            return layers
    return _prefilled(Engine(engine.model, options=options), request)


def _prefilled(engine: Engine, request: Request) -> list[tuple[Cache, Cache]]:
    for _ in engine.stream(request):
        pass
    return engine.stored(request.prompt)


@contextmanager
def _memory(model: VideoModel, options: EngineOptions) -> Iterator[Callable[..., Tensor]]:
    """For keys and values: on a CPU, what the call before this one left."""
    if options.kv_bytes is None or any(device.type != "cpu" for device in model.layer_devices):
        yield torch.empty
        return
    buffers = 4 * len(model.layer_devices)  # each may begin at the next line of the cache
    with ExitStack() as stack:
        with default_cpu():
            lent = model.spare.lent(options.kv_bytes + buffers * ALIGNED)
            arena = stack.enter_context(lent)
        yield arena.empty


def _bounded(
    model: VideoModel, requests: Sequence[Request], options: EngineOptions
) -> EngineOptions:
    """The options with room for these requests and no more."""
    size = block_bytes(model, options.kv_dtype)
    needed = [_blocks(model, request) * size for request in requests]
    if not needed:
        return options
    limit = options.kv_bytes
    if limit is None:  # a single request may take what there is: nothing else is kept
        limit = max(free_for_layers(model.layer_devices) // 2, *needed)
    return replace(options, kv_bytes=min(sum(needed), limit))


def _blocks(model: VideoModel, request: Request) -> int:
    """Blocks for a request with all its choices or beams."""
    budget, params = budget_of(model, request), request.params
    own = blocks_for(len(request.prompt.ids) + budget)
    more = (params.n - 1) * (budget // BLOCK + 2)
    return own + more + reserve(params.num_beams, budget)
