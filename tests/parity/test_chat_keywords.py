"""Every keyword of `apply_chat_template` does what it does in transformers, or is refused."""

from __future__ import annotations

import logging
import warnings
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
import torchvision_on_cpu  # noqa: F401  (before transformers, which imports torchvision)
from oracle import Reference
from video_forms import FORMS, clip
from vidlm import AutoProcessor
from vidlm.errors import InvalidArgument

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% elif part['type'] == 'video' %}{{ 'VIDEO' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if mood is defined %}{{ mood }}{% endif %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TENSORS = {"tokenize": True, "return_dict": True, "padding": True, "return_tensors": "pt"}
NAMES = ("clip-llama", "next-vicuna", "video-llava", "videollama3")
VIDEO_FAMILIES = NAMES[1:]


@dataclass(frozen=True)
class Pair:
    """One checkpoint's processor, read by both."""

    name: str
    ours: Any
    theirs: Any

    def part(self, seed: int = 1) -> dict[str, Any]:
        if self.name in FORMS:
            return {"type": "video", "video": clip(seed)}
        return {"type": "image", "image": tiny.picture(seed)}

    def chat(self, seed: int = 1, answer: str = "A red ball, moving. ") -> list[dict[str, Any]]:
        asked = [self.part(seed), {"type": "text", "text": "What happens?"}]
        said = [{"type": "text", "text": answer}]
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]

    def both(self, chat: Any, **how: Any) -> tuple[Any, Any]:
        mine = self.ours.apply_chat_template(deepcopy(chat), **how)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return mine, self.theirs.apply_chat_template(deepcopy(chat), **how)

    def assert_same(self, chat: Any, tolerance: float = 0, **how: Any) -> Any:
        mine, theirs = self.both(chat, **how)
        if isinstance(mine, str):
            assert mine == theirs
            return mine
        assert set(mine) == set(theirs)
        for key in mine:
            ours, expected = np.asarray(mine[key]), np.asarray(theirs[key])
            assert ours.shape == expected.shape, key
            assert np.allclose(ours, expected, atol=tolerance, rtol=0), key
        return mine


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    form = FORMS.get(request.param)
    if form is None:
        theirs = Reference.make(folder, request.param).processor
        template = TEMPLATE.replace("IMAGE", "<image>")
    else:
        theirs = form.processor(form.write(folder))
        template = TEMPLATE.replace("IMAGE", form.image).replace("VIDEO", form.video)
    ours = AutoProcessor.from_pretrained(folder)
    ours.chat_template = theirs.chat_template = template
    theirs.tokenizer.chat_template = template
    return Pair(request.param, ours, theirs)


# ---- the text ----------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["A red", "A red ball. ", " so\n"])
def test_a_final_message_is_continued(pair: Pair, answer: str) -> None:
    chat = pair.chat(answer=answer)
    text = pair.assert_same(chat, continue_final_message=True)
    assert text.endswith(answer)
    pair.assert_same(chat, continue_final_message="content")
    pair.assert_same(chat, continue_final_message=True, **TENSORS)
    batch, expected = pair.both([chat, pair.chat(2)], continue_final_message=True)
    assert batch == expected
    assert len(batch) == 2


def test_a_template_that_trims_is_continued_without_space(pair: Pair) -> None:
    trimming = TEMPLATE.replace("part['text']", "part['text'] | trim")
    text = pair.assert_same(
        pair.chat(answer="Well "), continue_final_message=True, chat_template=trimming
    )
    assert text.endswith("Well")


def test_a_text_alone_is_continued(pair: Pair) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}#{% endfor %}"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    text = pair.assert_same(chat, continue_final_message=True, chat_template=template)
    assert text == "user: a#assistant: b c"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"add_generation_prompt": True}, "exclude each other"),
        ({"return_assistant_tokens_mask": True, **TENSORS}, "exclude each other"),
        ({"continue_final_message": "thoughts"}, "has no 'thoughts'"),
        ({"chat_template": "{{ messages[0].role }} content"}, "is not in the text"),
        ({"chat_template": "{{ messages[0].role }}"}, "does not read that entry"),
    ],
)
def test_what_cannot_be_continued(pair: Pair, how: dict[str, Any], said: str) -> None:
    how = {"continue_final_message": True, **how}
    with pytest.raises(ValueError, match="continue_final_message"):
        pair.theirs.apply_chat_template(pair.chat(), **how)
    with pytest.raises(InvalidArgument, match=said):
        pair.ours.apply_chat_template(pair.chat(), **how)
    with pytest.raises(InvalidArgument, match="no text to continue"):
        pair.ours.apply_chat_template(
            [{"role": "user", "content": [pair.part()]}], continue_final_message=True
        )


def test_variables_of_the_template(pair: Pair) -> None:
    assert pair.assert_same(pair.chat(), mood="happy").endswith("\nhappy")
    pair.assert_same(pair.chat(), mood="happy", **TENSORS)
    pair.assert_same(pair.chat(), tools=None, documents=None)
    with pytest.raises(InvalidArgument, match="reads no tools"):
        pair.ours.apply_chat_template(pair.chat(), tools=[{"name": "f"}])
    template = "{{ tools[0].name }}{{ documents[0].title }}"
    data = {"tools": [{"name": "f"}], "documents": [{"title": "t"}]}
    assert pair.assert_same(pair.chat(), chat_template=template, **data) == "ft"
    with pytest.raises(InvalidArgument, match="tools are dicts"):
        pair.ours.apply_chat_template(pair.chat(), chat_template=template, tools=[print])


def test_media_that_only_their_number_counts_of_are_not_read(pair: Pair, tmp_path: Path) -> None:
    part = pair.part()
    there = {"type": part["type"], "url": str(tmp_path / "missing")}
    text = pair.ours.apply_chat_template([{"role": "user", "content": [there]}])
    assert text == pair.theirs.apply_chat_template([{"role": "user", "content": [there]}])
    with pytest.raises(FileNotFoundError):
        pair.ours.apply_chat_template([{"role": "user", "content": [there]}], tokenize=True)


# ---- the assistant's tokens --------------------------------------------------------------------


def test_which_tokens_are_the_assistants(pair: Pair) -> None:
    how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    one = pair.assert_same(pair.chat(), **how, return_tensors="pt")
    picked = one["input_ids"][0][one["assistant_masks"][0].bool()]
    assert pair.ours.decode(picked) == "A red ball, moving. <|im_end|>"
    two = [*pair.chat(), *pair.chat(2, "No: a dog 動画. ")]
    pair.assert_same(two, **how, return_tensors="pt")
    batch = [pair.chat(), two]
    for side in ("left", "right"):
        pair.assert_same(batch, **how, padding=True, padding_side=side, return_tensors="pt")
    as_list = pair.ours.apply_chat_template(batch, **how)
    assert [len(row) for row in as_list["assistant_masks"]] == [
        len(row) for row in as_list["input_ids"]
    ]
    most = len(one["input_ids"][0]) - 4
    pair.assert_same(pair.chat(), **how, truncation=True, max_length=most, return_tensors="pt")


def test_a_template_without_generation(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    template = pair.ours.chat_template.replace("{% generation %}", "")
    template = template.replace("{% endgeneration %}", "")
    how = {**TENSORS, "chat_template": template, "return_assistant_tokens_mask": True}
    with caplog.at_level(logging.WARNING, "vidlm"):
        masks = pair.assert_same(pair.chat(), **how)["assistant_masks"]
    assert not masks.any()
    assert "has no {% generation %}" in caplog.text
    with pytest.raises(InvalidArgument, match="needs return_dict=True"):
        pair.ours.apply_chat_template(pair.chat(), **{**how, "return_dict": False})


# ---- the processor's keywords ------------------------------------------------------------------

TEXT_KEYWORDS: list[dict[str, Any]] = [
    {"padding": "max_length", "max_length": 400},
    {"padding": "max_length", "max_length": 390, "pad_to_multiple_of": 64},
    {"padding": True, "pad_to_multiple_of": 64, "padding_side": "left"},
    {"pad_to_multiple_of": 64},
    {"truncation": True, "max_length": 400},
    {"truncation": "longest_first", "max_length": 400, "padding": "longest"},
    {"truncation": False, "padding": False},
    {"add_special_tokens": False},
    {"text_kwargs": {"padding": "max_length", "max_length": 400}},
    {"common_kwargs": {"return_tensors": "pt"}},
]


@pytest.mark.parametrize("how", TEXT_KEYWORDS, ids=lambda how: " ".join(how))
@pytest.mark.parametrize("inner", [False, True])
def test_words_of_texts(pair: Pair, how: dict[str, Any], inner: bool) -> None:
    call = {"tokenize": True, "return_dict": True}
    if "common_kwargs" not in how:
        how = {"return_tensors": "pt", **how}
    pair.assert_same(pair.chat(), **call, **({"processor_kwargs": how} if inner else how))


def test_truncation_that_keeps_media(pair: Pair) -> None:
    whole = pair.ours.apply_chat_template(pair.chat(), **TENSORS)["input_ids"].shape[1]
    for how in ({"truncation": True}, {}):
        keywords = {**TENSORS, "padding": False, "max_length": whole - 5, **how}
        assert pair.assert_same(pair.chat(), **keywords)["input_ids"].shape[1] == whole - 5
    cut = {"tokenize": True, "return_dict": True, "truncation": True, "max_length": 9}
    with pytest.raises(ValueError, match="Mismatch in"):
        pair.theirs.apply_chat_template(pair.chat(), **cut)
    with pytest.raises(InvalidArgument, match="truncation leaves"):
        pair.ours.apply_chat_template(pair.chat(), **cut)


def test_words_of_images_and_videos(pair: Pair) -> None:
    group = "videos_kwargs" if pair.name in FORMS else "images_kwargs"
    usual = pair.assert_same(pair.chat(), **TENSORS)
    key = next(name for name in usual if name.startswith("pixel_values"))
    for words in ({"do_normalize": False}, {"do_rescale": False}, {"do_resize": True}):
        for how in (words, {group: words}, {"processor_kwargs": words}):
            # x * (1 / 255) here and x / 255 there, where nothing else is done
            tolerance = 1e-6 if "do_normalize" in words else 0
            changed = pair.assert_same(pair.chat(), tolerance, **TENSORS, **how)
            assert torch.equal(changed[key], usual[key]) == ("do_resize" in words)
    if pair.name != "videollama3":
        small = {"size": {"shortest_edge": 14}, "crop_size": {"height": 14, "width": 14}}
        smaller = pair.assert_same(pair.chat(), **TENSORS, **small)
        assert smaller["input_ids"].shape < usual["input_ids"].shape


def test_a_budget_of_pixels(pair: Pair) -> None:
    if pair.name != "videollama3":
        pytest.skip("its words are VideoLLaMA3's")
    chat = [{"role": "user", "content": [{"type": "image", "image": tiny.picture(1)}]}]
    usual = pair.assert_same(chat, **TENSORS)["input_ids"].shape[1]
    for how in ({"max_pixels": 256}, {"size": {"shortest_edge": 64, "longest_edge": 256}}):
        assert pair.assert_same(chat, **TENSORS, **how)["input_ids"].shape[1] < usual


FRAMES: list[tuple[dict[str, Any], int]] = [
    ({}, 8),
    ({"num_frames": 4}, 4),
    ({"processor_kwargs": {"num_frames": 2}}, 2),
    ({"videos_kwargs": {"num_frames": 4, "do_sample_frames": True}}, 4),
    ({"do_sample_frames": False}, 8),
]


@pytest.mark.parametrize(("how", "frames"), FRAMES)
def test_frames_given_as_such(pair: Pair, how: dict[str, Any], frames: int) -> None:
    if pair.name not in FORMS:
        pytest.skip("transformers' LLaVA takes no videos")
    made = pair.assert_same(pair.chat(), **TENSORS, **how)
    if pair.name == "videollama3":
        assert int(made["video_grid_thw"][0][0]) == frames
    else:
        assert made["pixel_values_videos"].shape[1] == frames


def test_a_rate_for_frames_without_one(pair: Pair) -> None:
    if pair.name not in FORMS:
        pytest.skip("transformers' LLaVA takes no videos")
    with pytest.raises(ValueError, match="fps"):
        pair.theirs.apply_chat_template(pair.chat(), **TENSORS, fps=2)
    with pytest.raises(InvalidArgument, match="rate is not known"):
        pair.ours.apply_chat_template(pair.chat(), **TENSORS, fps=2)
    told = [{"fps": 4.0, "total_num_frames": 40, "frames_indices": [0, 6, 9, 12, 20, 21, 30, 39]}]
    made = pair.assert_same(pair.chat(), **TENSORS, video_metadata=told, do_sample_frames=False)
    assert made["input_ids"].shape[1] > 8


def test_what_is_known_of_videos(pair: Pair, clips_dir: Path) -> None:
    path = str(clips_dir / "imageio_realshort.mp4")
    chat = [{"role": "user", "content": [{"type": "video", "path": path}]}]
    made = pair.ours.apply_chat_template(chat, **TENSORS, return_metadata=True, num_frames=3)
    (known,) = made["video_metadata"]
    assert len(known.frames_indices) == 3
    assert known.total_num_frames > 3
    assert known.fps > 1
    if pair.name not in FORMS:  # to transformers a keyword without effect
        return
    theirs = pair.theirs.apply_chat_template(
        pair.chat(), **TENSORS, processor_kwargs={"return_metadata": True}
    )
    ours = pair.ours.apply_chat_template(
        pair.chat(), **TENSORS, processor_kwargs={"return_metadata": True}
    )
    assert set(ours) == set(theirs)
    assert ours["video_metadata"][0].total_num_frames == 8


def test_a_file_as_often_as_it_is_told(pair: Pair, clips_dir: Path) -> None:
    path = str(clips_dir / "imageio_realshort.mp4")
    chat = [{"role": "user", "content": [{"type": "video", "path": path}]}]

    def rows(**how: Any) -> int:
        made = pair.ours.apply_chat_template(chat, **TENSORS, **how)
        return len(made["input_ids"][0])

    usual, all_frames = rows(), rows(do_sample_frames=False)
    assert all_frames > usual
    assert rows(num_frames=3) < usual
    assert rows(num_frames=3) == rows(processor_kwargs={"num_frames": 3})
    assert rows(num_frames=3) == rows(videos_kwargs={"num_frames": 3})
    assert rows(num_frames=3) == rows(processor_kwargs={"videos_kwargs": {"num_frames": 3}})
    with pytest.raises(InvalidArgument, match="do_sample_frames=False"):
        rows(do_sample_frames=False, num_frames=3)


# ---- what nobody knows -------------------------------------------------------------------------

TYPOS = [
    ("nmu_frames", "num_frames"),
    ("paddign", "padding"),
    ("trunctation", "truncation"),
    ("continue_final_mesage", None),
    ("return_tensor", "return_tensors"),
    ("videos_kwarg", "videos_kwargs"),
    ("frames", None),
]


@pytest.mark.parametrize("tokenize", [False, True])
@pytest.mark.parametrize(("typo", "meant"), TYPOS)
def test_typos(pair: Pair, typo: str, meant: str | None, tokenize: bool) -> None:
    said = typo if meant is None else f"'{typo}'; did you mean '{meant}'"
    for how in ({typo: 3}, {"processor_kwargs": {typo: 3}}):
        for chat in (pair.chat(), [pair.chat()]):
            with pytest.raises(TypeError, match=said):
                pair.ours.apply_chat_template(chat, tokenize=tokenize, **how)
    for group in ("text_kwargs", "images_kwargs", "videos_kwargs", "common_kwargs"):
        with pytest.raises(TypeError, match=typo):
            pair.ours.apply_chat_template(pair.chat(), tokenize=tokenize, **{group: {typo: 3}})


@pytest.mark.parametrize(
    "how",
    [
        {"sanitize_control_tokens": True},
        {"load_audio_from_video": True},
        {"return_mm_token_type_ids": True},
        {"return_offsets_mapping": True},
        {"return_attention_mask": False},
        {"audio_kwargs": {"sampling_rate": 16000}},
        {"stride": 3},
    ],
    ids=lambda how: " ".join(how),
)
def test_keywords_that_are_not_there(pair: Pair, how: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(how))):
        pair.ours.apply_chat_template(pair.chat(), **TENSORS, **how)
    ((name, value),) = how.items()
    idle = not value if isinstance(value, bool) else {} if isinstance(value, dict) else None
    pair.assert_same(pair.chat(), **TENSORS, **{name: idle})


def test_keywords_that_need_tokens(pair: Pair) -> None:
    switched = {"images_kwargs": {"do_resize": True}}
    for how in ({"max_length": 9}, {"do_normalize": False}, switched, {"return_dict": True}):
        with pytest.raises(InvalidArgument, match="need tokenize=True"):
            pair.ours.apply_chat_template(pair.chat(), **how)
    pair.ours.apply_chat_template(pair.chat(), num_frames=3, padding=False, truncation=None)
    with pytest.raises(InvalidArgument, match="give a dict"):
        pair.ours.apply_chat_template(pair.chat(), processor_kwargs=[3])
    with pytest.raises(InvalidArgument, match="both by itself and in text_kwargs"):
        pair.ours.apply_chat_template(
            pair.chat(), **TENSORS, processor_kwargs={"text_kwargs": {"padding": False}}
        )
