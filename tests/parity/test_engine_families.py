"""The engine under every family: however a prompt is cut, shared and recomputed, the tokens are
those of a loop that passes the whole of it through the model each time."""

from __future__ import annotations

from typing import Any

import pytest

import slowfast_forms
import tiny
import video_forms
import vidlm
from straight import Stepped, answers, ask, asked, nothing_is_held, run_out, straight, whole_logits
from vidlm.engine import EngineOptions, generate
from vidlm.engine.store import block_bytes
from vidlm.models.base import Prompt

NEW = 10
READING = {
    "slowfast": {},
    "slowfast, slow in decode": {"slow_in_decode": True},
    "slowfast, all read": {"cross_attn_implementation": "vanilla", "slow_in_decode": True},
    "slowfast, text behind": {"cross_attn_implementation": "text-only-vanilla-masksystem"},
}
FAMILIES = ("siglip-qwen2-tied", *video_forms.FORMS, *READING)


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> vidlm.LM:
    folder, name = tmp_path_factory.mktemp("family"), request.param
    if name in READING:
        return vidlm.load(slowfast_forms.write(folder, **READING[name]))
    if name in tiny.FORMS:
        return vidlm.load(tiny.write(folder, tiny.FORMS[name]))
    form = video_forms.FORMS[name]
    made = vidlm.load(form.write(folder))
    made.processor.tokenizer.chat_template = form.template
    return made


def prompt(lm: vidlm.LM, clips: list[Any], question: str, image: bool = False) -> Prompt:
    """A question about videos, and a still between them."""
    sources = [lm.video(clip) for clip in clips]
    if image:
        sources.insert(1, lm.video(tiny.picture(3)))
    parts = [part for source in sources for part in source.parts]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief and look twice."}]},
        {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
    ]
    media = [item for source in sources for item in source.media]
    return lm.processor.prompt(lm.processor.render(messages), media)


@pytest.fixture(scope="module")
def prompts(lm: vidlm.LM) -> list[Prompt]:
    one, two = video_forms.clip(1, 4), video_forms.clip(2, 4)
    return [
        prompt(lm, [one], "what moves?"),
        prompt(lm, [one], "does anything stand still in it, or all of it?"),
        prompt(lm, [two, one], "what differs?", image=True),
        prompt(lm, [one, two], "what differs?"),
        prompt(lm, [], "what is a video?"),
    ]


@pytest.fixture(scope="module")
def wanted(lm: vidlm.LM, prompts: list[Prompt]) -> list[list[int]]:
    return [straight(lm.model, asked(each, NEW)) for each in prompts]


def engine_of(lm: vidlm.LM, blocks: int, **how: Any) -> Stepped:
    return Stepped(lm.model, options=EngineOptions(kv_bytes=blocks * block_bytes(lm.model), **how))


def most_blocks(prompts: list[Prompt]) -> int:
    """Of the longest of them, with its answer."""
    return max(-(-(len(each.ids) + NEW) // 16) for each in prompts)


@pytest.mark.parametrize("chunk", [17, 512])
def test_together_and_again(
    lm: vidlm.LM, prompts: list[Prompt], wanted: list[list[int]], chunk: int
) -> None:
    engine = engine_of(lm, 400, chunk=chunk)
    numbers = [engine.add(asked(each, NEW)) for each in prompts]
    found = answers(run_out(engine))
    assert [found[number, 0] for number in numbers] == wanted
    before = engine.stats
    assert [ask(engine, asked(each, NEW)) for each in prompts] == wanted
    after = engine.stats
    assert after.features.made == before.features.made
    last = [(len(each.ids) - 1) % 16 + 1 for each in prompts]
    assert after.prefilled - before.prefilled == sum(last)
    assert nothing_is_held(engine)


@pytest.mark.parametrize("features", [0, 1 << 20])
def test_where_there_is_little_room(
    lm: vidlm.LM, prompts: list[Prompt], wanted: list[list[int]], features: int
) -> None:
    """Answers give way to each other, and are recomputed with prompts whose features are kept or
    not."""
    engine = engine_of(lm, most_blocks(prompts) + 2, chunk=24, feature_bytes=features)
    numbers = [engine.add(asked(prompts[i], NEW)) for i in (4, 0, 1, 4, 2, 3)]
    found = answers(run_out(engine))
    assert [found[number, 0] for number in numbers] == [wanted[i] for i in (4, 0, 1, 4, 2, 3)]
    assert nothing_is_held(engine)


def test_answers_that_give_way(lm: vidlm.LM, prompts: list[Prompt]) -> None:
    pairs = [asked(prompts[i], 50) for i in (0, 1)]
    said = [straight(lm.model, each) for each in pairs]
    longest = max(-(-(len(each.prompt.ids) + 50) // 16) for each in pairs)
    shared = len(prompts[0].ids) // 16
    engine = engine_of(lm, max(longest, 2 * longest - shared - 2), share=False, chunk=40)
    numbers = [engine.add(each) for each in pairs]
    found = answers(run_out(engine))
    assert [found[number, 0] for number in numbers] == said
    assert nothing_is_held(engine)


def test_a_chat_goes_on(lm: vidlm.LM, prompts: list[Prompt]) -> None:
    """With what was answered as a part of the prompt, whose keys and values are found stored; the
    log-probabilities tell by more than the likeliest token that they are right."""
    engine, turn = engine_of(lm, 400), prompts[2]
    for question in ("and then, at the very end of it all?", "why?", "so?"):
        tokens = list(engine.stream(asked(turn, 40, logprobs=0)))
        said = [token.id for token in tokens]
        chances = whole_logits(lm.model, turn, said).log_softmax(-1)
        for token, row in zip(tokens, chances, strict=False):
            assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-3)
        said = [id for id in said if id not in lm.model.config.placeholders.values()]
        more = lm.processor.tokenizer.encode(question)
        turn = Prompt((*turn.ids, *said, *more), turn.media)


def test_nothing_but_a_video(lm: vidlm.LM, prompts: list[Prompt]) -> None:
    """No token of the prompt attends to a memory, and those of the answer may."""
    (*media,) = prompts[0].media
    placeholders = lm.model.config.placeholders
    ids = [placeholders[item.kind] for item in media for _ in range(item.tokens)]
    request = asked(Prompt(tuple(ids), tuple(media)), NEW)
    assert ask(engine_of(lm, 400), request) == straight(lm.model, request)


def test_choices_and_beams(lm: vidlm.LM, prompts: list[Prompt], wanted: list[list[int]]) -> None:
    engine = engine_of(lm, 400, chunk=24)
    beams = asked(prompts[3], NEW, num_beams=3)
    alone = generate(lm.model, [beams])[0].ids
    several = asked(prompts[2], NEW, n=3)
    numbers = [engine.add(each) for each in (several, beams, asked(prompts[1], NEW))]
    found = answers(run_out(engine))
    assert [found[numbers[0], choice] for choice in range(3)] == [wanted[2]] * 3
    assert tuple(found[numbers[1], 0]) == alone
    assert found[numbers[2], 0] == wanted[1]
    assert nothing_is_held(engine)
    tight = engine_of(lm, most_blocks(prompts) + 1, chunk=24)
    number = tight.add(several)
    found = answers(run_out(tight))
    assert [found[number, choice] for choice in range(3)] == [wanted[2]] * 3
