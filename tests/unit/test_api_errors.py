"""Texts that are too long are named as such, and whatever is wrong is an error of ours."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
import vidlm
from clips import clip
from vidlm.errors import ContextOverflow, InvalidArgument
from vidlm.types import SamplingParams

QUESTION = "what happens?"
VIDEO = clip(20)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> vidlm.LM:
    return vidlm.load(tiny.write(tmp_path_factory.mktemp("tiny")))


# ---- what is too long ----------------------------------------------------------------------------


def overflow(ask: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(ContextOverflow) as raised:
        ask(*arguments, **options)
    return str(raised.value)


def test_a_question_that_is_too_long(lm: vidlm.LM) -> None:
    """Of 512 tokens; what is told is enough: a question of the length that is told is answered."""
    long = "z7 " * 500
    video = lm.video(VIDEO, frames=2)
    for ask in (lm.chat().ask, video.ask, lambda text: lm.ask(VIDEO, text, frames=2)):
        said = overflow(ask, long)
        assert "use at most" not in said
        has, left = re.findall(r"shorten the question, which has ([\d,]+) tokens, to (\d+)", said)[
            0
        ]
        each = int(has.replace(",", "")) // 500
        assert ask("z7 " * (int(left) // each)).usage.completion_tokens >= 1
        assert overflow(ask, "z7 " * (int(left) // each + 1))
    assert "shorten the question" in overflow(lm.ask, VIDEO, long, fit=True)


def test_a_system_prompt_that_is_too_long(lm: vidlm.LM) -> None:
    said = overflow(lm.ask, VIDEO, "Why?", frames=2, system="z7 " * 500)
    assert re.search(r"shorten the system prompt, which has [\d,]+ tokens, to \d+", said)
    said = overflow(lm.ask, VIDEO, "z7 " * 900, frames=2, system="z7 " * 901)
    assert re.search(
        r"the question has .*, the system prompt has .*, 2 frames .* shorten them", said
    )


def test_a_question_and_frames_that_are_too_many(lm: vidlm.LM) -> None:
    said = overflow(lm.ask, VIDEO, "z7 " * 60, frames=20)
    assert re.search(r"use at most 1?\d frames or images \(now 20\), or shorten the question", said)
    most = int(re.findall(r"at most (\d+)", said)[0])
    assert lm.ask(VIDEO, "z7 " * 60, frames=most, max_tokens=1)
    assert "shorten" not in overflow(lm.ask, clip(40), "Why?", frames=40)


def test_a_chat_that_is_too_long(lm: vidlm.LM) -> None:
    chat = lm.chat(VIDEO, frames=2, max_tokens=1)
    chat.ask("z7 " * 100)
    said = overflow(lambda: [chat.ask("z7 " * 30) for _ in range(9)])
    assert "shorten the conversation so far" in said


def test_prompts_of_an_engine_that_are_too_long(lm: vidlm.LM) -> None:
    video = lm.video(VIDEO, frames=2)
    parts = [*video.parts, {"type": "text", "text": "z7 " * 500}]
    prompt = lm.processor.chat_prompt([{"role": "user", "content": parts}], video.media)
    request = vidlm.engine.Request(prompt, SamplingParams())
    said = overflow(lambda: list(lm.engine.stream(request)))
    assert re.search(r"\d+ of them are text, which leaves no room for a frame or image", said)


# ---- whatever is wrong, it is an error of ours ---------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        *({"frames": value} for value in ("x", 0, -3, 2.5)),
        *({"max_frames": value} for value in ("x", 0)),
        *({"indices": value} for value in (5, [], "abc", [1.5], [2**70])),
        *({"times": value} for value in (5, [], [None], [[1]])),
        {"frames": 2, "fps": 1},
    ],
)
def test_frames_to_fit_are_checked_first(lm: vidlm.LM, options: dict[str, Any]) -> None:
    for fit in (True, False):
        with pytest.raises(InvalidArgument):
            lm.ask(VIDEO, QUESTION, fit=fit, max_tokens=1, **options)


def test_arrays_of_times_are_times_for_load_video_too() -> None:
    assert vidlm.load_video(VIDEO, times=np.array([0.0, 0.3])).indices.tolist() == [0, 7]


def test_arrays_that_name_frames_fit(lm: vidlm.LM) -> None:
    for name in ("indices", "times"):
        options = {name: np.array([0, 1])}
        if name == "times":
            options = {name: np.array([0.0, 0.3])}
        assert len(lm.ask(VIDEO, QUESTION, fit=True, max_tokens=1, **options).frames) == 2


def test_other_ways_in(lm: vidlm.LM, tmp_path: Path) -> None:
    tokenizer = lm.processor.tokenizer
    video = lm.video(VIDEO, frames=2)
    ways: list[Callable[[], Any]] = [
        *(lambda v=v: tokenizer(v) for v in (5, None, [5], ["a", None])),
        *(lambda v=v: tokenizer.batch_decode(v) for v in (5, "abc", None)),
        *(lambda v=v: tokenizer.decode(v) for v in ("x", 1.5, [[1]], None)),
        *(lambda v=v: tokenizer.convert_tokens_to_ids(v) for v in (5, None)),
        *(lambda v=v: tokenizer.add_special_tokens(v) for v in (5, "x", None)),
        *(lambda v=v: video.prompt(v) for v in (5, None, "", "\ud83d")),
        *(lambda v=v: video.prompt("x", system=v) for v in (5, "\ud83d")),
        lambda: video.save(tmp_path / "a.safetensors", system=5),
        *(lambda v=v: lm.model.generate(torch.ones(1, 2).long(), **v) for v in BAD),
    ]
    for way in ways:
        with pytest.raises(InvalidArgument):
            way()


BAD: tuple[dict[str, Any], ...] = (
    {"max_new_tokens": 2.5},
    {"max_new_tokens": "x"},
    {"max_length": "x"},
    {"temperature": "x"},
    {"stop_strings": 5},
    {"num_beams": "x"},
    {"num_return_sequences": "x"},
    {"eos_token_id": "x"},
    {"top_p": "x"},
    {"early_stopping": "never"},
)
