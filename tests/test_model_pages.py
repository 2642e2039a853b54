"""The code on transformers' pages about three families runs as it is written.

`model_pages` says what changes. Where a page leaves out an import, or means a variable by another
name, its test says so.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

import model_pages
import tiny
import video_forms
import vidlm
from model_pages import PAGES, Page, Ran, Snippet
from oracle import transformers
from vidlm.errors import UnsupportedModel

GREEDY = {"do_sample": False, "max_new_tokens": 24}


@dataclass(frozen=True)
class Case:
    """A page, its snippets, and what they run with."""

    page: Page
    snippets: Mapping[str, Snippet]
    checkpoint: Path
    media: Path

    def run(self, name: str, names: Mapping[str, Any] | None = None, drop: str = "") -> Ran:
        """A snippet by itself, or with the names that are there before it."""
        snippet = model_pages.changed(self.snippets[name], self.checkpoint, self.media)
        snippet = Snippet(snippet.code.replace(drop, ""), snippet.line)
        torch.manual_seed(0)  # one family samples unless told otherwise
        return snippet.run(self.page.file, dict(names or {}))

    def assert_answers(self, inputs: Mapping[str, Any]) -> None:
        """transformers gives the same ones."""
        theirs, _ = video_forms.two_read(self.page.form, self.checkpoint)
        ours = vidlm.AutoModelForImageTextToText.from_pretrained(self.checkpoint, dtype="float32")
        new = ours.generate(**inputs, **GREEDY)
        assert torch.equal(new, theirs.generate(**inputs, **GREEDY, pad_token_id=video_forms.PAD))
        assert new.shape[1] > inputs["input_ids"].shape[1]

    def assert_prompts(self, texts: list[str], inputs: Mapping[str, Any], **media: Any) -> None:
        """transformers' processor makes the same ids of these texts."""
        _, theirs = video_forms.two_read(self.page.form, self.checkpoint)
        made = theirs(text=texts, **media, padding=True, return_tensors="pt")
        assert torch.equal(made["input_ids"], inputs["input_ids"])
        assert torch.equal(made["attention_mask"], inputs["attention_mask"])


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = model_pages.write_media(tmp_path_factory.mktemp("media"))
        model_pages.stub_downloads(patch, folder)
        yield folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return model_pages.write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def cases(shared: Path, media: Path, checkpoints: dict[str, Path]) -> dict[str, Case]:
    return {
        family: Case(page, page.snippets(shared), checkpoints[family], media)
        for family, page in PAGES.items()
    }


@pytest.fixture(scope="module")
def next_video(cases: dict[str, Case]) -> Case:
    return cases["LlavaNextVideo"]


@pytest.fixture(scope="module")
def video_llava(cases: dict[str, Case]) -> Case:
    return cases["VideoLlava"]


@pytest.fixture(scope="module")
def videollama3(cases: dict[str, Case]) -> Case:
    return cases["VideoLlama3"]


def written(case: Case, prompt: str) -> int:
    """Tokens of a prompt in which every image and video is one."""
    return len(vidlm.AutoTokenizer.from_pretrained(case.checkpoint).encode(prompt))


@pytest.mark.parametrize("family", list(PAGES))
def test_no_code_of_a_page_is_left_out(family: str, shared: Path) -> None:
    page = PAGES[family]
    text, found = page.text(shared), page.snippets(shared)
    assert list(found) == list(page.names)
    assert text.count("```python") in (0, len(found))
    imports = re.compile(r"^(?:>>> )?(?:import \w|from [\w.]+ import )", re.M)
    code = "\n".join(snippet.code for snippet in found.values())
    assert len(imports.findall(text)) == len(imports.findall(code)) > 0


# ---- LLaVA-NeXT-Video ----------------------------------------------------------------------------

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
)
FUNNY = "USER: <video>\nWhy is this video funny? ASSISTANT:"
CATS = "USER: <image>\nHow many cats are there in the image? ASSISTANT: There are two cats"


def plain(prompt: str) -> str:
    """A prompt as it decodes."""
    return prompt.replace("<image>", "").replace("<video>", "")


def test_next_video_prints_its_prompt(next_video: Case) -> None:
    ran = next_video.run("chat template")
    turns = "USER: <image>\nWhat\u2019s shown in this image? ASSISTANT: This image shows a red stop"
    assert ran.printed == f"{SYSTEM} {turns} sign. {FUNNY}\n"
    template = {"chat_template": model_pages.VICUNA, "add_generation_prompt": True}
    _, theirs = video_forms.two_read(next_video.page.form, next_video.checkpoint)
    assert ran.text_prompt == theirs.apply_chat_template(ran.conversation, **template)


@pytest.fixture(scope="module")
def next_single(next_video: Case) -> Ran:
    return next_video.run("single")


def frames_of(case: Case, indices: range) -> np.ndarray:
    return vidlm.load_video(case.media / "sample_demo_1.mp4", indices=list(indices)).frames


def test_next_video_is_asked_about_a_video(next_video: Case, next_single: Ran) -> None:
    assert next_single.model.dtype == torch.float16
    assert next_single.inputs["pixel_values_videos"].shape == (1, 8, 3, 28, 28)
    length = next_single.inputs["input_ids"].shape[1]
    assert length < next_single.out.shape[1] <= length + 60
    [[text]] = next_single.values
    assert text.startswith(plain(FUNNY))
    next_video.assert_answers(next_single.inputs)
    frames = frames_of(next_video, range(0, 24, 3))
    next_video.assert_prompts([FUNNY], next_single.inputs, videos=[frames])


def test_next_video_is_asked_about_an_image_and_a_video(next_video: Case, next_single: Ran) -> None:
    """The page adds these lines to those of the snippet before. Its max_length is less than the
    media have tokens: each counts as one."""
    ran = next_video.run("mixed", next_single.names)
    prompt = f"{CATS} {FUNNY}"
    [[text]] = ran.values
    assert text.startswith(plain(prompt))
    new = ran.generate_ids.shape[1] - ran.inputs["input_ids"].shape[1]
    assert 1 <= new <= 50 - written(next_video, prompt)
    next_video.assert_answers(ran.inputs)


# ---- Video-LLaVA ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava_single(video_llava: Case) -> Ran:
    """The page does not import hf_hub_download."""
    return video_llava.run("single", {"hf_hub_download": huggingface_hub.hf_hub_download})


def test_video_llava_is_asked_about_a_video(video_llava: Case, llava_single: Ran) -> None:
    assert llava_single.model.dtype == torch.float16
    assert llava_single.video.shape == (8, 40, 56, 3)
    length = llava_single.inputs["input_ids"].shape[1]
    assert length < llava_single.out.shape[1] <= length + 60
    [[text]] = llava_single.values
    assert text.startswith("USER: \nWhy is this funny? ASSISTANT:")
    video_llava.assert_answers(llava_single.inputs)
    prompt, video = llava_single.prompt, llava_single.video
    video_llava.assert_prompts([prompt], llava_single.inputs, videos=video)


def test_video_llava_is_asked_about_an_image_and_a_video(
    video_llava: Case, llava_single: Ran
) -> None:
    """The page calls the video of the snippet before this one `clip`."""
    ran = video_llava.run("mixed", {**llava_single.names, "clip": llava_single.video})
    assert ran.prompt == f"{CATS}. {FUNNY}"
    [[text]] = ran.values
    assert text.startswith(plain(ran.prompt))
    new = ran.generate_ids.shape[1] - ran.inputs["input_ids"].shape[1]
    assert 1 <= new <= 50 - written(video_llava, ran.prompt)
    video_llava.assert_answers(ran.inputs)
    media = {"images": ran.image, "videos": ran.clip}
    video_llava.assert_prompts([ran.prompt], ran.inputs, **media)


def test_video_llava_is_asked_again(video_llava: Case, llava_single: Ran, shared: Path) -> None:
    """The page has the prompt of several turns as a string in a block for the shell."""
    line = next(
        line for line in video_llava.page.text(shared).split("\n") if line.startswith('"USER: ')
    )
    prompt = ast.literal_eval(model_pages.restored(line))
    video = llava_single.video
    inputs = llava_single.processor(text=prompt, videos=video, return_tensors="pt")
    video_llava.assert_prompts([prompt], inputs, videos=video)
    video_llava.assert_answers(inputs)


def test_video_llava_from_a_configuration(video_llava: Case) -> None:
    """Of the size of the published model, which is why it is made without memory."""
    with torch.device("meta"):
        ran = video_llava.run("configuration")
    assert ran.configuration is ran.model.config
    text = ran.configuration.text_config
    assert (text.num_hidden_layers, text.hidden_size, text.vocab_size) == (32, 4096, 32000)
    parts = {
        "vision_config": transformers.CLIPVisionConfig(),
        "text_config": transformers.LlamaConfig(),
    }
    config = transformers.VideoLlavaConfig(**parts)
    with torch.device("meta"):
        theirs = transformers.VideoLlavaForConditionalGeneration(config)
    ours = sum(weight.numel() for weight in ran.model.parameters())
    assert ours == sum(weight.numel() for weight in theirs.parameters())


def test_video_llava_documents_its_forward_with_answers(video_llava: Case) -> None:
    """The answers on record are those of the published model; their prompts must be ours."""
    one, batch = (ast.literal_eval(shown) for shown in video_llava.snippets["forward"].shown)
    ran = video_llava.run("forward")
    text, texts = ran.values
    for recorded, ours in zip([one, *batch], [text, *texts], strict=True):
        asked, prompt = (each.partition("ASSISTANT:")[0] for each in (recorded, ours))
        assert prompt.split() == asked.split()  # there was no line break in the prompts on record
    image, video = ran.prompt
    longest = max(written(video_llava, image), written(video_llava, video))
    new = ran.generate_ids.shape[1] - ran.inputs["input_ids"].shape[1]
    assert 1 <= new <= 50 - longest
    video_llava.assert_answers(ran.inputs)
    media = {"images": ran.image, "videos": ran.clip}
    video_llava.assert_prompts(ran.prompt, ran.inputs, **media)


# ---- VideoLLaMA3 ---------------------------------------------------------------------------------

DESCRIBE = (
    "<|im_start|>user\n<|image_pad|>\nDescribe this image.<|im_end|>\n<|im_start|>assistant\n"
)
HAPPENED = DESCRIBE.replace("image", "video").replace(
    "Describe this video.", "What happened in the video?"
)
BANANA = "What color is a banana?"
ROWS = [DESCRIBE, HAPPENED, DESCRIBE.replace("<|image_pad|>\nDescribe this image.", BANANA)]


def clip_at_1_fps(case: Case) -> dict[str, Any]:
    """What a processor needs to know of the clip's frames, one a second."""
    shown = range(0, model_pages.FRAMES, model_pages.RATE)
    frames = vidlm.load_video(case.media / "cat_and_chicken.mp4", indices=list(shown)).frames
    told = {"total_num_frames": model_pages.FRAMES, "fps": model_pages.RATE}
    metadata = {**told, "frames_indices": list(shown), "duration": 6.0}
    return {"videos": [frames], "video_metadata": [metadata], "do_sample_frames": False}


def test_videollama3_is_asked_about_an_image_and_about_a_video(videollama3: Case) -> None:
    ran = videollama3.run("single")
    of_image, of_video, end = ran.printed.split("\n")
    assert len(ast.literal_eval(of_image)) == 1
    assert (of_video, end) == (str(ran.output_text), "")
    assert "Time 0.0s:" in ran.processor.decode(ran.inputs.input_ids[0])
    assert "<|im_end|>" not in ran.output_text[0]
    videollama3.assert_answers(ran.inputs)
    videollama3.assert_prompts([HAPPENED], ran.inputs, **clip_at_1_fps(videollama3))
    assert len(ran.generated_ids[0]) <= 128


@pytest.fixture(scope="module")
def videollama3_names(videollama3: Case) -> dict[str, Any]:
    """What the page's first snippet leaves to the second."""
    return videollama3.run("single").names


def test_videollama3_is_asked_about_a_batch(
    videollama3: Case, videollama3_names: dict[str, Any]
) -> None:
    ran = videollama3.run("batch", videollama3_names)
    assert len(ran.output_text) == 3
    assert ran.inputs["attention_mask"][2, 0] == 0  # the text alone, padded on the left
    assert ran.printed == f"{ran.output_text}\n"
    videollama3.assert_answers(ran.inputs)
    image = Image.open(videollama3.media / "sora.png")
    made = {"images": [image], **clip_at_1_fps(videollama3), "padding_side": "left"}
    videollama3.assert_prompts(ROWS, ran.inputs, **made)


def test_videollama3_documents_its_forward_with_an_answer(videollama3: Case) -> None:
    ran = videollama3.run("forward")
    [text] = ran.values
    assert text.startswith("user\n\nWhere is the cat standing?\nassistant\n")
    assert ran.generate_ids.shape[1] > ran.inputs.input_ids.shape[1]
    videollama3.assert_answers(ran.inputs)


# ---- what two pages advise -----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["LlavaNextVideo", "VideoLlava"])
def test_padding_on_the_left(cases: dict[str, Case], family: str) -> None:
    processor = vidlm.AutoProcessor.from_pretrained(cases[family].checkpoint)
    for side, column in (("left", 0), ("right", -1)):
        processor.tokenizer.padding_side = side
        batch = processor(text=["what?", "what happens?"], padding=True, return_tensors="pt")
        assert batch["attention_mask"][:, column].tolist() == [0, 1]


@pytest.mark.parametrize("family", ["LlavaNextVideo", "VideoLlava"])
def test_words_that_a_processor_may_lack(cases: dict[str, Case], family: str) -> None:
    """They come from the model's config; setting them, as the pages say, changes nothing."""
    case = cases[family]
    config = vidlm.AutoConfig.from_pretrained(case.checkpoint)
    processor = vidlm.AutoProcessor.from_pretrained(case.checkpoint)
    media = {"images": tiny.picture(1), "videos": video_forms.clip(1)}
    before = processor(text="<image> and <video> what?", **media)
    processor.patch_size = config.vision_config.patch_size
    processor.num_additional_image_tokens = 1
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    after = processor(text="<image> and <video> what?", **media)
    assert after["input_ids"] == before["input_ids"]


# ---- what cannot run here ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["LlavaNextVideo", "VideoLlava"])
def test_quantised(cases: dict[str, Case], family: str) -> None:
    """The pages import neither torch nor, one of them, BitsAndBytesConfig."""
    names = {"torch": torch, "BitsAndBytesConfig": vidlm.BitsAndBytesConfig}
    model = cases[family].run("quantised", names).model
    kinds = {n: type(m).__name__ for n, m in model.named_modules() if "Linear" in type(m).__name__}
    assert kinds.pop("lm_head") == "Linear"
    assert set(kinds.values()) == {"Linear4bit" if torch.cuda.is_available() else "PackedLinear"}
    ids = torch.arange(20, 40, device=model.device)[None]
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (1, 23)


@pytest.mark.parametrize("family", list(PAGES))
def test_flash_attention_says_that_it_needs_a_gpu(
    cases: dict[str, Case], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages do not import torch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedModel, match=r"'flash_attention_2' needs a GPU.*leave it out"):
        cases[family].run("flash attention", {"torch": torch})


@pytest.mark.gpu
@pytest.mark.parametrize("family", list(PAGES))
def test_flash_attention(cases: dict[str, Case], family: str) -> None:
    model = cases[family].run("flash attention", {"torch": torch}).model
    half = torch.bfloat16 if family == "VideoLlama3" else torch.float16
    assert model.dtype == half
    ids = torch.arange(20, 40, device=model.device)[None]
    new = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert new.shape == (1, 23)
