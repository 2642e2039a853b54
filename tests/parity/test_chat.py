"""The processor against transformers: prompts, ids, padding, chat templates, saved files."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
import torchvision_on_cpu  # noqa: F401  (before transformers, which imports torchvision)
from oracle import Reference, transformers
from vidlm import AutoProcessor, LlavaProcessor
from vidlm.errors import InvalidArgument, ModelError, UnsupportedModel

KEYS = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Case:
    """The processor files of one checkpoint, read by both."""

    folder: Path
    theirs: Any
    ours: LlavaProcessor

    def assert_same(self, text: Any, images: Any, **how: Any) -> None:
        ours = self.ours(images=images, text=text, **how)
        theirs = self.theirs(images=images, text=text, **how)
        assert set(ours) == set(theirs)
        for key in KEYS:
            assert plain(ours[key]) == plain(theirs[key]), key
            assert type(ours[key]) is type(theirs[key]), key
        if images:
            pixels = torch.as_tensor(np.stack(theirs["pixel_values"]))
            assert torch.equal(torch.as_tensor(ours["pixel_values"]), pixels)


def plain(values: Any) -> Any:
    return values.tolist() if hasattr(values, "tolist") else values


@pytest.fixture(scope="module", params=["siglip-qwen2-tied", "clip-llama"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = Reference.make(folder, request.param).processor
    return Case(folder, theirs, LlavaProcessor.from_pretrained(folder))


# ---- ids ---------------------------------------------------------------------------------------

TEXTS = {
    "no image": "what happens?",
    "guide": "<|im_start|>user<image><image>\nThe same?<|im_end|><|im_start|>assistant",
    "spread": "a <image> b<image>c\n\n<image>",
    "unicode": "<image> Café 動画 🎬 naïve\t ",
    "specials": "<|endoftext|><image><|im_end|><|im_end|>",
    "image alone": "<image>",
    "nearly": "<image <image> image>",
}


@pytest.mark.parametrize("tensors", [None, "pt", "np"])
@pytest.mark.parametrize("name", list(TEXTS))
def test_one_text(case: Case, name: str, tensors: str | None) -> None:
    text = TEXTS[name]
    images = tiny.pictures(text.count("<image>")) or None
    case.assert_same(text, images, return_tensors=tensors)
    case.assert_same([text], images, return_tensors=tensors)


@pytest.mark.parametrize("side", ["left", "right", None])
def test_a_padded_batch(case: Case, side: str | None) -> None:
    images = tiny.pictures(sum(text.count("<image>") for text in TEXTS.values()))
    how = {"padding": True, "return_tensors": "pt"}
    case.assert_same(
        list(TEXTS.values()), images, **how, **({"padding_side": side} if side else {})
    )


def test_the_side_may_be_set_on_the_tokenizer(case: Case) -> None:
    before = case.ours.tokenizer.padding_side
    try:
        case.ours.tokenizer.padding_side = case.theirs.tokenizer.padding_side = "left"
        case.assert_same(["a", "a longer one"], None, padding=True, return_tensors="pt")
        assert case.ours(text=["a", "b c d"], padding=True)["attention_mask"][0][0] == 0
    finally:
        case.ours.tokenizer.padding_side = case.theirs.tokenizer.padding_side = before


def test_images_in_a_list_per_text(case: Case) -> None:
    one, two, three = tiny.pictures(3)
    texts = ["<image> a", "<image><image> b"]
    nested = case.ours(images=[[one], [two, three]], text=texts, padding=True, return_tensors="pt")
    flat = case.ours(images=[one, two, three], text=texts, padding=True, return_tensors="pt")
    assert torch.equal(nested["input_ids"], flat["input_ids"])
    assert torch.equal(nested["pixel_values"], flat["pixel_values"])


def test_one_image_outside_a_list_and_positional(case: Case) -> None:
    (image,) = tiny.pictures(1)
    ours = case.ours(image, "<image> a", return_tensors="pt")
    theirs = case.theirs(image, "<image> a", return_tensors="pt")
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert torch.equal(ours.pixel_values, theirs.pixel_values)


@pytest.mark.parametrize(("text", "count"), [("<image>", 0), ("<image>", 2), ("none", 1)])
def test_images_and_placeholders_must_agree(case: Case, text: str, count: int) -> None:
    with pytest.raises(InvalidArgument, match=rf"names {text.count('<image>')} .* {count} were"):
        case.ours(images=tiny.pictures(count), text=text)


def test_moving_leaves_ids_whole(case: Case) -> None:
    batch = case.ours(images=tiny.pictures(1), text="<image>", return_tensors="pt")
    moved = batch.to("cpu", torch.float16)
    assert moved["pixel_values"].dtype == torch.float16
    assert moved["input_ids"].dtype == torch.int64
    assert {**moved}.keys() == {"input_ids", "attention_mask", "pixel_values"}
    with pytest.raises(InvalidArgument, match="a device and a dtype"):
        batch.to(3.5)


@pytest.mark.parametrize("skip", [False, True])
def test_decoding(case: Case, skip: bool) -> None:
    rows = case.ours(text=[t.replace("<image>", "") for t in TEXTS.values()])["input_ids"]
    for row in rows:
        ours = case.ours.decode(torch.tensor(row), skip_special_tokens=skip)
        assert ours == case.theirs.decode(torch.tensor(row), skip_special_tokens=skip)
    assert case.ours.batch_decode(rows, skip) == case.theirs.batch_decode(rows, skip)


# ---- chat templates ----------------------------------------------------------------------------


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


IMAGE = {"type": "image"}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one image": [{"role": "user", "content": [IMAGE, text_part("What?")]}],
    "text first": [{"role": "user", "content": [text_part("What?"), IMAGE, IMAGE]}],
    "text alone": [{"role": "user", "content": [text_part("What?")]}],
    "system": [
        {"role": "system", "content": [text_part("Be brief.")]},
        {"role": "user", "content": [IMAGE, text_part("What?"), text_part("And why?")]},
    ],
    "turns": [
        {"role": "user", "content": [IMAGE, text_part("What?")]},
        {"role": "assistant", "content": [text_part("A ball.")]},
        {"role": "user", "content": [IMAGE, text_part("And here?")]},
    ],
}


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", list(CHATS))
def test_rendered_text(case: Case, name: str, prompt: bool) -> None:
    ours = case.ours.apply_chat_template(CHATS[name], add_generation_prompt=prompt)
    assert ours == case.theirs.apply_chat_template(CHATS[name], add_generation_prompt=prompt)


def test_rendered_batch(case: Case) -> None:
    batch = list(CHATS.values())
    assert case.ours.apply_chat_template(batch) == case.theirs.apply_chat_template(batch)


def test_another_template_and_its_variables(case: Case) -> None:
    template = "{{ greeting }}{{ eos_token }}{% for m in messages %}{{ m.role }}{% endfor %}"
    given: dict[str, Any] = {"chat_template": template, "greeting": "Hello"}
    ours = case.ours.apply_chat_template(CHATS["turns"], **given)
    assert ours == case.theirs.apply_chat_template(CHATS["turns"], **given)


def with_images(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with a picture in each image part."""
    images = iter(tiny.pictures(9))
    return [
        {
            **message,
            "content": [
                {**part, "image": next(images)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in chat
    ]


@pytest.mark.parametrize("name", list(CHATS))
def test_tokenised(case: Case, name: str) -> None:
    chat = with_images(CHATS[name])
    how = {"add_generation_prompt": True, "tokenize": True}
    ours = case.ours.apply_chat_template(chat, **how, return_dict=True, return_tensors="pt")
    theirs = case.theirs.apply_chat_template(chat, **how, return_dict=True, return_tensors="pt")
    assert set(ours) == set(theirs)
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key
    assert case.ours.apply_chat_template(chat, **how) == plain(theirs["input_ids"])


def test_a_tokenised_batch(case: Case) -> None:
    chats = [with_images(chat) for chat in CHATS.values()]
    how = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    ours = case.ours.apply_chat_template(chats, padding=True, padding_side="left", **how)
    keywords = {"padding": True, "padding_side": "left"}
    theirs = case.theirs.apply_chat_template(chats, processor_kwargs=keywords, **how)
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key


def test_a_beginning_of_text_is_not_doubled(case: Case) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content[-1].text }}{% endfor %}"
    chat = CHATS["text alone"]
    how: dict[str, Any] = {"chat_template": template, "tokenize": True}
    bos = {"bos_token": tiny.SPECIALS[tiny.PAD]}
    (ours,) = case.ours.apply_chat_template(chat, **how, **bos)
    assert [ours] == case.theirs.apply_chat_template(chat, **how, **bos)
    assert ours.count(tiny.PAD) == 1


def test_a_video_is_its_frames_as_images(case: Case) -> None:
    frames = np.stack([np.asarray(tiny.picture(i)) for i in range(5)])
    how = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    parts = [{"type": "image", "image": tiny.picture(i)} for i in (0, 1, 3)]
    ours = case.ours.apply_chat_template(
        [{"role": "user", "content": [{"type": "video", "video": frames}, text_part("What?")]}],
        num_frames=3,
        **how,
    )
    chat = [{"role": "user", "content": [*parts, text_part("What?")]}]
    theirs = case.theirs.apply_chat_template(chat, **how)
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key


# ---- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False], ids=["beside a model", "alone"])
def test_what_is_saved_is_read_by_both(case: Case, whole: bool, tmp_path: Path) -> None:
    case.ours.save_pretrained(tmp_path)
    if whole:
        shutil.copy(case.folder / "config.json", tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, LlavaProcessor)
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.LlavaProcessor)
    for one, other in ((again, case.theirs), (case.ours, theirs)):
        pair = Case(tmp_path, other, one)
        pair.assert_same(TEXTS["spread"], tiny.pictures(3), return_tensors="pt")
        pair.assert_same(["a", "b c"], None, padding=True)
        for chat in CHATS.values():
            assert one.apply_chat_template(chat) == other.apply_chat_template(chat)
    assert again.core.image_pixels == case.ours.core.image_pixels
    assert again.core.frame_tokens == case.ours.core.frame_tokens


def test_what_transformers_saves_is_read(case: Case, tmp_path: Path) -> None:
    case.theirs.save_pretrained(tmp_path)
    shutil.copy(case.folder / "config.json", tmp_path)
    again = Case(tmp_path, case.theirs, LlavaProcessor.from_pretrained(tmp_path))
    again.assert_same(TEXTS["spread"], tiny.pictures(3), return_tensors="pt")
    assert again.ours.chat_template == case.theirs.chat_template


def test_the_number_of_placeholders_follows_the_model(case: Case, tmp_path: Path) -> None:
    folder = shutil.copytree(case.folder, tmp_path / "copy")
    tiny.edit_json(folder / "processor_config.json", {"vision_feature_select_strategy": "default"})
    ours = LlavaProcessor.from_pretrained(folder)
    (ids,) = ours(images=tiny.pictures(1), text="<image>")["input_ids"]
    assert ids.count(tiny.IMAGE) == tiny.FRAME_TOKENS
    (folder / "processor_config.json").unlink()
    (ids,) = LlavaProcessor.from_pretrained(folder)(tiny.pictures(1), "<image>")["input_ids"]
    assert ids.count(tiny.IMAGE) == tiny.FRAME_TOKENS


def test_files_that_are_missing_are_named(case: Case, tmp_path: Path) -> None:
    folder = shutil.copytree(case.folder, tmp_path / "copy")
    (folder / "config.json").unlink()
    tiny.edit_json(folder / "processor_config.json", None, "patch_size")
    with pytest.raises(ModelError, match=r"no config.json.*does not say patch_size"):
        AutoProcessor.from_pretrained(folder)
    tiny.edit_json(folder / "processor_config.json", {"processor_class": "OtherProcessor"})
    with pytest.raises(UnsupportedModel, match="no processor"):
        AutoProcessor.from_pretrained(folder)
    folder = shutil.copytree(case.folder, tmp_path / "other")
    tiny.edit_json(folder / "processor_config.json", {"image_token": "<picture>"})
    with pytest.raises(ModelError, match="no token '<picture>'"):
        AutoProcessor.from_pretrained(folder)


# ---- the published tokenizer -------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(shared: Path) -> Case:
    folder = shared / "data" / "hub_like" / "interleave"
    theirs = transformers.AutoProcessor.from_pretrained(folder)
    return Case(folder, theirs, LlavaProcessor.from_pretrained(folder))


def test_the_published_tokenizer(published: Case) -> None:
    for text in TEXTS.values():
        images = tiny.pictures(text.count("<image>")) or None
        published.assert_same(text, images, return_tensors="pt")
    batch = [TEXTS["guide"], TEXTS["no image"]]
    for side in ("left", "right"):
        how = {"padding": True, "padding_side": side, "return_tensors": "pt"}
        published.assert_same(batch, tiny.pictures(2), **how)
    ids = published.ours(tiny.pictures(2), TEXTS["guide"], return_tensors="pt")["input_ids"]
    assert int((ids == 151646).sum()) == 2 * 729


def test_the_published_template(published: Case) -> None:
    for chat in CHATS.values():
        given: dict[str, Any] = {"chat_template": tiny.TEMPLATE, "add_generation_prompt": True}
        ours = published.ours.apply_chat_template(with_images(chat), **given, tokenize=True)
        theirs = published.theirs.apply_chat_template(with_images(chat), **given, tokenize=True)
        assert ours == theirs
