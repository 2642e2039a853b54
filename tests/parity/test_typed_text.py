"""Questions, system prompts and answers with control tokens in them, to a model of every family."""

from __future__ import annotations

from typing import Any

import pytest

import slowfast_forms
import tiny
import video_forms
import vidlm
from vidlm.models.base import Prompt

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] | trim }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ '<video>' }}{% endif %}"
    "{% endfor %}{{ '\n' }}{% endfor %}{{ 'assistant: ' }}"
)
ACTING = (
    *("<image>", "<video>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>"),
    *("<|endoftext|>", "<s>", "</s>"),
)


@pytest.fixture(scope="module", params=["demo", "clip-llama", *video_forms.FORMS, "slowfast"])
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> vidlm.LM:
    name, folder = request.param, tmp_path_factory.mktemp("family")
    if name == "demo":
        return vidlm.load("demo")
    if name == "slowfast":
        return vidlm.load(slowfast_forms.write(folder))
    if name in tiny.FORMS:
        return vidlm.load(tiny.write(folder, tiny.FORMS[name]))
    form = video_forms.FORMS[name]
    loaded = vidlm.load(form.write(folder))
    template = TEMPLATE.replace("'<image>'", repr(form.image))
    loaded.processor.tokenizer.chat_template = template.replace("'<video>'", repr(form.video))
    return loaded


@pytest.fixture(scope="module")
def video(lm: vidlm.LM) -> vidlm.VideoHandle:
    return lm.video(video_forms.clip(1, 4))


def acting(lm: vidlm.LM) -> set[int]:
    processor = lm.processor
    added = processor.tokenizer.backend.get_added_tokens_decoder()
    words = filter(None, (processor.image_token, processor.video_token))
    return {*added, *map(processor.placeholder, words)}


def acted(lm: vidlm.LM, prompt: Prompt) -> list[int]:
    return [id for id in prompt.ids if id in acting(lm)]


@pytest.mark.parametrize("token", ACTING)
def test_questions_and_system_prompts(lm: vidlm.LM, video: vidlm.VideoHandle, token: str) -> None:
    typed = f"What does the {token} tag do?"
    plain, prompt = video.prompt("What else?", "Be brief."), video.prompt(typed, typed)
    assert acted(lm, prompt) == acted(lm, plain)
    decoded = lm.processor.decode([id for id in prompt.ids if id >= 0])
    assert decoded.count(typed) == 2
    answer = lm.ask(video, typed, system=typed, max_tokens=2)
    assert answer.usage.prompt_tokens == len(prompt.ids)
    assert answer.usage.media_tokens == sum(item.tokens for item in video.media)


@pytest.mark.parametrize("question", ["A", "im", "<", "| end", "vid eo", "s>"])
def test_parts_of_control_tokens(lm: vidlm.LM, video: vidlm.VideoHandle, question: str) -> None:
    """A template could complete them, so they are marked; their ids are those of any text."""
    parts = [*video.parts, {"type": "text", "text": question}]
    text = lm.processor.render([{"role": "user", "content": parts}])
    assert video.prompt(question).ids == lm.processor.prompt(text, video.media).ids


def test_turns_of_a_chat(lm: vidlm.LM, video: vidlm.VideoHandle) -> None:
    """Answers that have such words in them, too: what was said before is text, and is shared."""
    chat = lm.chat(video, max_tokens=3)
    chat.ask("Say <|im_end|> and </s>, <image>")
    first = chat.messages[1]["content"][0]
    first["text"] = f"{''.join(ACTING)} {first['text']}"
    before = lm.engine.stats.prefilled
    answer = chat.ask("And <video>?")
    prefilled = lm.engine.stats.prefilled - before
    assert prefilled < answer.usage.prompt_tokens - answer.usage.media_tokens + 16
    prompt = lm.processor.chat_prompt(chat.messages[:3], video.media)
    plain = [dict(message) for message in chat.messages[:3]]
    for message in plain:
        parts = message["content"]
        message["content"] = [
            {**part, "text": "x"} if part["type"] == "text" else part for part in parts
        ]
    assert acted(lm, prompt) == acted(lm, lm.processor.chat_prompt(plain, video.media))
    assert answer.usage.prompt_tokens == len(prompt.ids)


def test_whole_prompts_are_as_they_were(lm: vidlm.LM) -> None:
    """Who writes the prompt writes its control tokens."""
    for token, id in lm.processor.tokenizer.backend.get_vocab(with_added_tokens=True).items():
        if token in ACTING and token not in (lm.processor.image_token, lm.processor.video_token):
            assert id in lm.processor(text=f"a{token}b")["input_ids"][0]


@pytest.mark.parametrize("options", [{}, {"system": "\udcf9"}])
def test_half_characters(lm: vidlm.LM, options: dict[str, Any]) -> None:
    with pytest.raises(vidlm.VidlmError, match="half a character"):
        lm.chat(**options).ask("O\udcf9?" if not options else "?")
