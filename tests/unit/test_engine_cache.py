"""engine/: a video is paid for once: what is encoded and prefilled again, and what never is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from straight import (
    Stepped,
    about,
    ask,
    asked,
    frame,
    nothing_is_held,
    run_out,
    straight,
    text,
    tiny_model,
)
from vidlm.engine import EngineOptions, generate
from vidlm.engine.features import FeatureCache
from vidlm.engine.options import BLOCK
from vidlm.engine.store import block_bytes
from vidlm.models.base import Encoded, Media, Prompt, VideoModel

NEW = 6
SYSTEM = text(21)
FRAMES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return tiny_model()


def small(model: VideoModel, blocks: int = 100, **how: Any) -> Stepped:
    return Stepped(model, options=EngineOptions(kv_bytes=blocks * block_bytes(model), **how))


@dataclass
class Paid:
    """Frames that passed the tower, and tokens that passed the decoder in steps of several."""

    frames: int = 0
    prefilled: int = 0
    steps: list[int] = field(default_factory=list)


@contextmanager
def counted(model: VideoModel) -> Iterator[Paid]:
    paid = Paid()

    def tower(_: object, given: tuple[Tensor, ...]) -> None:
        paid.frames += len(given[0])

    def decoder(_: object, given: tuple[Tensor, ...]) -> None:
        paid.steps.append(len(given[0]))
        paid.prefilled += len(given[0]) if len(given[0]) > 1 else 0

    hooks = (
        model.model.vision_tower.register_forward_pre_hook(tower),
        model.decoder.register_forward_pre_hook(decoder),
    )
    try:
        yield paid
    finally:
        for hook in hooks:
            hook.remove()


def whole_blocks(tokens: int) -> int:
    return tokens // BLOCK * BLOCK


# ---- the second question -------------------------------------------------------------------------


def test_a_second_question_pays_for_its_words(model: VideoModel) -> None:
    engine = small(model)
    first, second = (about(FRAMES, text(12, i), SYSTEM) for i in (1, 2))
    with counted(model) as paid:
        ask(engine, asked(first, NEW))
    assert (paid.frames, paid.prefilled) == (4, len(first.ids))
    with counted(model) as paid:
        said = ask(engine, asked(second, NEW))
    assert said == straight(model, asked(second, NEW))
    same = whole_blocks(len(SYSTEM) + 4 * tiny.FRAME_TOKENS)
    assert (paid.frames, paid.prefilled) == (0, len(second.ids) - same)
    stats = engine.stats
    assert stats.features.hits == 4
    assert stats.scheduler.pool.hits == same
    assert stats.prefilled == len(first.ids) + len(second.ids) - same
    assert stats.decoded == 2 * (NEW - 1)


def test_questions_that_come_together_pay_once(model: VideoModel) -> None:
    engine = small(model)
    requests = [asked(about(FRAMES, text(12, i), SYSTEM), NEW) for i in range(5)]
    with counted(model) as paid:
        for request in requests:
            engine.add(request)
        run_out(engine)
    assert paid.frames == 4
    same = whole_blocks(len(SYSTEM) + 4 * tiny.FRAME_TOKENS)
    ids = requests[0].prompt.ids
    assert engine.stats.prefilled == len(ids) + 4 * (len(ids) - same)


def test_a_chat_prefills_what_is_new(model: VideoModel) -> None:
    """What was answered, too, is stored already."""
    engine = small(model)
    prompt = about(FRAMES, text(12, 1), SYSTEM)
    known = 0  # tokens that were computed before
    for turn in range(4):
        before, ids = engine.stats.prefilled, prompt.ids
        answer = ask(engine, asked(prompt, 20))
        assert answer == straight(model, asked(prompt, 20))
        assert engine.stats.prefilled - before == len(ids) - whole_blocks(known)
        known = len(ids) + len(answer) - 1  # the newest token was not
        prompt = Prompt((*ids, *answer, *text(9, 5 + turn)), prompt.media)
    assert engine.stats.features.made == 4


def test_nothing_is_shared_where_it_is_off(model: VideoModel) -> None:
    engine = small(model, share=False)
    request = asked(about(FRAMES, text(12, 1)), NEW)
    with counted(model) as paid:
        assert ask(engine, request) == ask(engine, request)
    assert (paid.frames, paid.prefilled) == (8, 2 * len(request.prompt.ids))
    assert engine.stats.features.items == engine.stats.scheduler.pool.cached == 0


def test_generate_keeps_nothing_between_calls(model: VideoModel) -> None:
    request = asked(about((1,), text(12, 1)), NEW)
    with counted(model) as paid:
        assert generate(model, [request]) == generate(model, [request])
    assert paid.frames == 2


# ---- what is not the same ------------------------------------------------------------------------


def other_pixel() -> Media:
    pixels = frame(1).pixels.clone()
    pixels[2, 27, 27] += 1e-6
    return Media(pixels, tiny.FRAME_TOKENS)


BASE = about((1, 2, 3), text(12, 1))


@pytest.mark.parametrize(
    ("prompt", "encoded", "shared"),
    [
        (about((1, 2, 3), text(12, 2)), 0, 3),
        (about((2, 1, 3), text(12, 1)), 0, 0),  # in another order
        (about((1, 2), text(12, 1)), 0, 2),  # fewer frames
        (about((1, 2, 3, 4), text(12, 1)), 1, 3),  # more
        (Prompt(BASE.ids, (other_pixel(), *BASE.media[1:])), 1, 0),
        (Prompt(BASE.ids, (*BASE.media[:2], other_pixel())), 1, 2),
        (about((1, 2, 3), text(12, 1), text(16, 9)), 0, 0),  # behind a system prompt
        (Prompt(text(len(BASE.ids), 3)), 0, 0),
    ],
)
def test_what_is_shared_with_what(
    model: VideoModel, prompt: Prompt, encoded: int, shared: int
) -> None:
    engine = small(model)
    ask(engine, asked(BASE, NEW))
    with counted(model) as paid:
        said = ask(engine, asked(prompt, NEW))
    assert said == straight(model, asked(prompt, NEW))
    assert paid.frames == encoded
    assert engine.stats.scheduler.pool.hits == shared * tiny.FRAME_TOKENS


def test_another_models_are_its_own(model: VideoModel) -> None:
    ask(small(model), asked(BASE, NEW))
    other = small(tiny_model(seed=11))
    ask(other, asked(BASE, NEW))
    assert other.stats.scheduler.pool.hits == other.stats.features.hits == 0


# ---- bounds --------------------------------------------------------------------------------------


def test_features_are_bounded_and_the_oldest_go(model: VideoModel) -> None:
    size = tiny.FRAME_TOKENS * 32 * 4
    engine = small(model, feature_bytes=3 * size + 1)
    for i in (1, 2, 3, 1, 4):  # 1 is the youngest but one, 2 the oldest
        ask(engine, asked(about((i,), text(3 + i, i), text(16, i)), 2))
    stats = engine.stats.features
    assert (stats.items, stats.bytes, stats.evicted) == (3, 3 * size, 1)
    with counted(model) as paid:
        for i, made in ((1, 0), (3, 0), (4, 0), (2, 1)):
            ask(engine, asked(about((i,), text(20, 7), text(16, 8)), 2))
            assert paid.frames == made


def test_features_that_are_larger_than_their_room(model: VideoModel) -> None:
    engine = small(model, feature_bytes=100)
    request = asked(BASE, NEW)
    assert ask(engine, request) == straight(model, request)
    assert engine.stats.features.bytes == 0


def test_keys_and_values_are_bounded(model: VideoModel) -> None:
    """The cached blocks of others are given up at need, the longest unused first."""
    engine = small(model, 20)
    sizes = []
    for i in range(6):
        ask(engine, asked(about((i,), text(40, i)), 10))
        sizes.append(engine.stats.scheduler.pool.cached)
        assert nothing_is_held(engine)
    assert sizes[0] == (16 + 40 + 9) // BLOCK
    assert max(sizes) <= 20
    assert engine.stats.scheduler.pool.evicted > 0
    before = engine.stats.prefilled
    ask(engine, asked(about((5,), text(40, 5)), 10))
    assert engine.stats.prefilled - before == 56 - 48
    before = engine.stats.prefilled
    ask(engine, asked(about((0,), text(40, 0)), 10))
    assert engine.stats.prefilled - before == 56


def test_media_whose_keys_and_values_are_known_are_not_encoded(model: VideoModel) -> None:
    """Though their features had no room."""
    engine = small(model, feature_bytes=0)
    ask(engine, asked(about(FRAMES, text(12, 1)), NEW))
    with counted(model) as paid:
        said = ask(engine, asked(about(FRAMES, text(12, 2)), NEW))
    assert paid.frames == 0
    assert said == straight(model, asked(about(FRAMES, text(12, 2)), NEW))


def test_they_are_where_those_were_given_up_meanwhile(model: VideoModel) -> None:
    """Between the moment a request comes and the one it is computed."""
    engine = small(model, 12, feature_bytes=0, max_sequences=1)
    ask(engine, asked(about(FRAMES, text(12, 1)), NEW))
    large = engine.add(asked(about((), text(150, 2)), 20))
    late = engine.add(asked(about(FRAMES, text(12, 3)), NEW))
    found: dict[int, list[int]] = {large: [], late: []}
    for event in run_out(engine):
        found[event.request].append(event.id)  # type: ignore[union-attr]
    assert found[late] == straight(model, asked(about(FRAMES, text(12, 3)), NEW))
    assert nothing_is_held(engine)


def test_the_store_of_features() -> None:
    made = [Encoded(torch.zeros(4, 2)), Encoded(torch.zeros(2, 2), torch.zeros(2, 2))]
    cache = FeatureCache(70)
    for digest, encoded in ((b"a", made[0]), (b"b", made[1])):
        cache.put(digest, encoded)
        cache.put(digest, encoded)
    assert cache.stats.bytes == 64
    assert (cache.get(b"a"), cache.get(b"c")) == (made[0], None)
    cache.put(b"d", Encoded(torch.zeros(1, 2)))
    cache.put(b"e", Encoded(torch.zeros(100, 2)))
    assert (cache.get(b"b"), cache.get(b"a"), cache.get(b"e")) == (None, made[0], None)
    stats = cache.stats
    assert (stats.items, stats.bytes, stats.evicted, stats.hits, stats.made) == (2, 40, 1, 2, 6)
    cache.clear()
    assert (cache.stats.items, cache.stats.bytes) == (0, 0)


def test_choices_that_wait_keep_what_they_will_need(model: VideoModel) -> None:
    engine = small(model, 5, share=False)
    with counted(model) as paid:
        number = engine.add(asked(BASE, 4, n=4))
        events = run_out(engine)
    assert {event.request for event in events} == {number}
    assert paid.prefilled >= 2 * len(BASE.ids)
    assert engine.stats.scheduler.preempted == 0
    assert paid.frames == 3


# ---- what is taken out and put back --------------------------------------------------------------


def test_clear_forgets_everything(model: VideoModel) -> None:
    engine = small(model)
    ask(engine, asked(BASE, NEW))
    engine.clear()
    with counted(model) as paid:
        ask(engine, asked(BASE, NEW))
    assert (paid.frames, paid.prefilled) == (3, len(BASE.ids))


def test_clear_while_answers_are_under_way(model: VideoModel) -> None:
    engine = small(model)
    stream = engine.stream(asked(BASE, 30))
    said = [next(stream).id]
    engine.clear()
    before = engine.stats.prefilled
    with counted(model) as paid:
        ask(engine, asked(BASE, 2))
    assert (paid.frames, engine.stats.prefilled - before) == (3, len(BASE.ids))
    said += [token.id for token in stream]
    assert said == straight(model, asked(BASE, 30))


def test_what_is_stored_can_be_put_elsewhere(model: VideoModel) -> None:
    engine, other = small(model), small(model)
    ask(engine, asked(BASE, NEW))
    layers = engine.stored(BASE)
    assert [k.shape[1] for k, _ in layers] == [whole_blocks(len(BASE.ids))] * 2
    assert other.store(BASE, layers)
    assert other.store(BASE, layers)
    assert nothing_is_held(other)
    assert other.stats.scheduler.pool.cached == len(BASE.ids) // BLOCK
    with counted(model) as paid:
        said = ask(other, asked(BASE, NEW))
    assert (paid.frames, paid.steps[0]) == (0, len(BASE.ids) - whole_blocks(len(BASE.ids) - 1))
    assert said == straight(model, asked(BASE, NEW))
    assert small(model).stored(BASE) == []
    assert not small(model, 2).store(BASE, layers)


def test_features_in_advance(model: VideoModel) -> None:
    engine = small(model)
    with counted(model) as paid:
        made = engine.features(BASE.media)
        again = engine.features((*BASE.media[1:], frame(8)))
        ask(engine, asked(BASE, 1))
    assert paid.frames == 4
    assert again[0] is made[1]
    for one, two in zip(made, model.encode(BASE.media), strict=True):
        torch.testing.assert_close(one.tokens, two.tokens)
