"""engine/: what a request may ask of its answers: draws, ends, choices, log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from straight import (
    TEXT_IDS,
    Stepped,
    about,
    answers,
    ask,
    asked,
    nothing_is_held,
    run_out,
    straight,
    text,
    tiny_model,
    whole_logits,
)
from vidlm.engine import EngineOptions, Output, Request, Token, generate, run
from vidlm.engine.store import block_bytes
from vidlm.errors import ContextOverflow, InvalidArgument
from vidlm.models.base import Prompt, VideoModel
from vidlm.text import Tokenizer
from vidlm.types import FinishReason

NEW = 12
PROMPT = about((1, 2), text(9, 1), text(5))
OTHERS = (about((3,), text(30, 2)), about((), text(12, 3)), about((1, 2), text(7, 4), text(5)))


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny.tokenizer(tiny.INTERLEAVE))


@pytest.fixture
def engine(model: VideoModel) -> Stepped:
    return small(model, 150)


def small(model: VideoModel, blocks: int, **how: Any) -> Stepped:
    return Stepped(model, options=EngineOptions(kv_bytes=blocks * block_bytes(model), **how))


def in_company(engine: Stepped, request: Request) -> dict[int, list[int]]:
    """The answers of a request that comes between others, by choice."""
    for prompt in OTHERS[:2]:
        engine.add(asked(prompt, NEW, temperature=1.0, seed=77))
    engine.events()
    number = engine.add(request)
    engine.add(asked(OTHERS[2], NEW, repetition_penalty=1.3))
    found = answers(run_out(engine))
    return {choice: ids for (request, choice), ids in found.items() if request == number}


# ---- draws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.5, "min_p": 0.05, "repetition_penalty": 1.2},
    ],
)
def test_a_seeded_answer_is_the_same_in_company(
    model: VideoModel, engine: Stepped, how: dict[str, Any]
) -> None:
    request = asked(PROMPT, NEW, seed=3, **how)
    alone = ask(engine, request)
    assert ask(engine, request) == alone
    assert in_company(small(model, 150), request) == {0: alone}
    assert ask(engine, asked(PROMPT, NEW, seed=4, **how)) != alone
    assert alone != straight(model, request)


def test_choices_draw_with_seeds_of_their_own(model: VideoModel, engine: Stepped) -> None:
    """Each choice is the answer that its seed gives alone."""
    how = {"temperature": 1.0}
    alone = [ask(engine, asked(PROMPT, NEW, seed=5 + i, **how)) for i in range(3)]
    assert len({tuple(ids) for ids in alone}) == 3
    together = in_company(engine, asked(PROMPT, NEW, seed=5, n=3, **how))
    assert together == dict(enumerate(alone))
    outputs = generate(model, [asked(PROMPT, NEW, seed=5, n=3, **how), asked(PROMPT, 2)])
    assert [list(output.ids) for output in outputs[:3]] == alone
    assert len(outputs) == 4


def test_a_prompt_of_several_choices_is_prefilled_once(engine: Stepped) -> None:
    ask(engine, asked(PROMPT, NEW, seed=5, temperature=1.0, n=4))
    assert engine.stats.prefilled == len(PROMPT.ids)
    assert engine.stats.scheduler.preempted == 0


@pytest.mark.parametrize("blocks", [4, 5, 6, 8, 12])
def test_choices_that_find_no_room_wait_for_it(model: VideoModel, blocks: int) -> None:
    request = asked(PROMPT, 14, seed=5, temperature=1.0, n=4)
    alone = {
        i: ask(small(model, 50), asked(PROMPT, 14, seed=5 + i, temperature=1.0)) for i in range(4)
    }
    engine = small(model, blocks)
    number = engine.add(request)
    found = answers(run_out(engine))
    assert found == {(number, choice): ids for choice, ids in alone.items()}
    assert nothing_is_held(engine)


def test_unseeded_draws_are_torchs(engine: Stepped) -> None:
    request = asked(PROMPT, NEW, temperature=1.0)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(ask(engine, request))
    assert drawn[0] == drawn[1] != drawn[2]


# ---- ends ----------------------------------------------------------------------------------------


def test_ends_and_least_lengths(model: VideoModel, engine: Stepped) -> None:
    free = straight(model, asked(PROMPT, NEW))
    end = free[3]
    for least in (0, 1, 3, 4, 5, NEW):
        request = asked(PROMPT, NEW, eos_token_ids=(end,), min_new_tokens=least)
        (output,) = generate(model, [request])
        assert list(output.ids) == in_company(engine, request)[0]
        assert len(output.ids) >= least
        ended = end in output.ids
        assert output.finish is (FinishReason.STOP if ended else FinishReason.LENGTH)
        if least <= free.index(end):
            assert list(output.ids) == free[: free.index(end) + 1]
        else:
            assert end not in output.ids[:least]


def test_a_penalty_counts_prompt_and_answer(model: VideoModel, engine: Stepped) -> None:
    request = asked(PROMPT, NEW, repetition_penalty=1.4)
    said: list[int] = []
    while len(said) < NEW:
        logits = whole_logits(model, PROMPT, said)[-1].clone()
        seen = torch.tensor(sorted({*PROMPT.ids, *said}))
        scores = logits[seen]
        logits[seen] = torch.where(scores < 0, scores * 1.4, scores / 1.4)
        said.append(int(logits.argmax()))
    assert in_company(engine, request) == {0: said}
    assert said != straight(model, asked(PROMPT, NEW))


def test_stop_strings(model: VideoModel, tokenizer: Tokenizer) -> None:
    free = straight(model, asked(PROMPT, NEW))
    stop = tokenizer.decode(free[4:6])
    engine = Stepped(model, tokenizer=tokenizer)
    request = asked(PROMPT, NEW, stop=(stop,))
    tokens = list(engine.stream(request))
    assert tokenizer.decode([token.id for token in tokens]).endswith(stop)
    assert [token.id for token in tokens] == free[: len(tokens)] != free
    assert [token.finish for token in tokens if token.finish] == [FinishReason.STOP]
    late = list(engine.stream(asked(PROMPT, NEW, stop=(stop,), min_new_tokens=9)))
    assert len(late) >= 9
    several = answers(engine.stream(asked(PROMPT, NEW, stop=(stop,), n=2)))
    assert [*several.values()] == [[token.id for token in tokens]] * 2


def test_stop_strings_without_a_tokenizer(engine: Stepped) -> None:
    with pytest.raises(InvalidArgument, match=r"pass tokenizer=processor\.tokenizer"):
        engine.add(asked(PROMPT, NEW, stop=("x",)))
    assert engine.idle
    assert nothing_is_held(engine)


def test_the_end_of_the_context(model: VideoModel, engine: Stepped) -> None:
    limit = model.config.max_context
    for room in (1, 3):
        (output,) = generate(model, [asked(about((), text(limit - room)), NEW)])
        assert (len(output.ids), output.finish) == (room, FinishReason.LENGTH)
    with pytest.raises(ContextOverflow, match=r"needs 512 tokens, the model takes 512; shorten"):
        engine.add(asked(about((), text(limit)), NEW))
    (beyond,) = generate(
        model, [Request(about((), text(limit + 1)), asked(PROMPT, 3).params, False)]
    )
    assert len(beyond.ids) == 3
    assert engine.idle


# ---- prompts -------------------------------------------------------------------------------------


def test_an_empty_prompt_is_refused(engine: Stepped) -> None:
    with pytest.raises(InvalidArgument, match="prompt is empty"):
        engine.add(asked(Prompt(()), NEW))
    assert engine.idle


def test_placeholders_and_media_must_agree(engine: Stepped) -> None:
    short = Prompt(PROMPT.ids, PROMPT.media[:1])
    with pytest.raises(InvalidArgument, match=r"32 image placeholder tokens .* make 16"):
        engine.add(asked(short, NEW))
    with pytest.raises(InvalidArgument, match=r"0 image placeholder tokens .* make 32"):
        engine.add(asked(Prompt(text(4), PROMPT.media), NEW))
    assert engine.idle


def test_a_generated_placeholder_is_a_token_like_others(model: VideoModel) -> None:
    """It stands for no media, neither where it is decoded nor where it is computed again."""
    made = tiny_model("siglip-qwen2")
    rows = made.head.weight.data
    rows[tiny.IMAGE] = 1.05 * rows[straight(made, asked(PROMPT, 3))[2]]
    request = asked(PROMPT, 30)
    said = straight(made, request)
    assert said[2] == tiny.IMAGE
    engine = small(made, 8)
    number = engine.add(asked(OTHERS[0], 30))
    late = engine.add(request)
    found = answers(run_out(engine))
    assert found[late, 0] == said
    assert found[number, 0] == straight(made, asked(OTHERS[0], 30))
    assert engine.stats.scheduler.preempted > 0


def test_more_than_the_cache_could_ever_hold(model: VideoModel) -> None:
    engine = small(model, 5)
    said = r"may take 96 tokens of KV cache, which has room for 80 \(0\.00 GB\); take fewer frames"
    with pytest.raises(InvalidArgument, match=said):
        engine.add(asked(about((1, 2, 3), text(16)), 30))
    assert engine.idle
    assert len(ask(engine, asked(about((1, 2, 3), text(16)), 16))) == 16
    with pytest.raises(InvalidArgument, match="KV cache"):
        engine.add(asked(PROMPT, 8, num_beams=3))


def test_options_that_make_no_sense() -> None:
    for how in ({"kv_bytes": 0}, {"max_sequences": 0}, {"chunk": -1}, {"feature_bytes": -1}):
        with pytest.raises(InvalidArgument, match=next(iter(how))):
            EngineOptions(**how)


# ---- log-probabilities ---------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [0, 1, 5])
def test_logprobs(model: VideoModel, engine: Stepped, wanted: int) -> None:
    """Of what the model says, before any penalty or temperature."""
    how = {"temperature": 0.8, "top_k": 7, "repetition_penalty": 1.1, "seed": 2}
    tokens = list(engine.stream(asked(PROMPT, NEW, logprobs=wanted, **how)))
    assert [token.id for token in tokens] == ask(engine, asked(PROMPT, NEW, **how))
    chances = whole_logits(model, PROMPT, [token.id for token in tokens]).log_softmax(-1)
    for token, row in zip(tokens, chances, strict=False):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        values, ids = row.topk(wanted)
        assert [id for id, _ in token.top] == ids.tolist()
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert [value for _, value in token.top] == sorted((v for _, v in token.top), reverse=True)
    assert all(token.logprob is None for token in engine.stream(asked(PROMPT, 2)))


def test_more_logprobs_than_tokens_there_are_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="logprobs=21; allowed: None, or from 0 to 20"):
        asked(PROMPT, NEW, logprobs=21)
    with pytest.raises(InvalidArgument, match="use num_beams=1"):
        asked(PROMPT, NEW, logprobs=1, num_beams=2)


# ---- the loop ------------------------------------------------------------------------------------


def test_run_names_requests_by_their_place(model: VideoModel) -> None:
    tokens = list(run(model, [asked(PROMPT, 3), asked(OTHERS[0], 2, n=2)]))
    count = dict.fromkeys(((0, 0), (1, 0), (1, 1)), 0)
    for token in tokens:
        assert isinstance(token, Token)
        count[token.request, token.choice] += 1
    assert count == {(0, 0): 3, (1, 0): 2, (1, 1): 2}
    assert generate(model, []) == []
    first = straight(model, asked(PROMPT, 3))
    assert generate(model, [asked(PROMPT, 3)]) == [Output(tuple(first), FinishReason.LENGTH)]
    assert set(first) <= {*TEXT_IDS, *range(len(tiny.SPECIALS))}
