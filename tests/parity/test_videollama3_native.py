"""VideoLLaMA3 in its authors' layout against transformers' model holding the same weights.

Their prompts are made here by a template that says what theirs does; their text has one
placeholder, for images and frames alike.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import tiny
import video_forms
import vidlm
from oracle import difference, transformers
from video_native import (
    CONFIG,
    FORM,
    IMAGE,
    PAD,
    SAMPLED,
    SIZES,
    TEMPLATE,
    TEXT,
    VIDEO,
    network,
    write,
)
from vidlm import AutoConfig, AutoModelForImageTextToText, AutoProcessor, VideoLlama3Processor
from vidlm.errors import InvalidArgument, UnsupportedModel
from vidlm.text import render_chat

NEAR = 1e-4  # relative to the largest value, in float32


@dataclass(frozen=True)
class Case:
    folder: Path
    ours: Any
    theirs: Any
    processor: Any
    their_processor: Any

    def media(self, text: str) -> dict[str, Any]:
        images = [tiny.picture(i, 30 + 9 * i, 70 - 11 * i) for i in range(text.count("<image>"))]
        videos = [video_forms.clip(i, 5) for i in range(text.count("<|video_pad|>"))]
        return {"images": images or None, "videos": videos or None}

    def inputs(self, *texts: str, **how: Any) -> dict[str, Any]:
        media = self.media("".join(texts))
        return dict(
            self.processor(text=list(texts), return_tensors="pt", **media, padding=True, **how)
        )


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    theirs = network(request.param)
    folder = write(tmp_path_factory.mktemp("native"), theirs)
    ours = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(ours) is vidlm.VideoLlama3ForConditionalGeneration
    processor = AutoProcessor.from_pretrained(folder)
    return Case(folder, ours, theirs, processor, FORM.processor(folder))


def edited(case: Case, to: Path, change: Mapping[str, Any], file: str = "config.json") -> Path:
    """The small files of a checkpoint, one of them changed."""
    for path in case.folder.glob("*.json"):
        (to / path.name).write_bytes(path.read_bytes())
    tiny.edit_json(to / file, change)
    return to


def test_config(case: Case) -> None:
    config = AutoConfig.from_pretrained(case.folder)
    assert config == case.ours.config
    assert config.placeholders == {"image": IMAGE, "video": VIDEO}
    assert (config.max_context, config.dtype) == (32768, "float32")
    text, theirs = config.text_config, case.theirs.config
    assert (text.model_type, text.qkv_bias, text.head_dim) == ("qwen2", True, 4)
    assert text.tie_word_embeddings == theirs.tie_word_embeddings
    for name in (*TEXT, "hidden_act"):
        assert getattr(text, name) == CONFIG[name]
    for name, value in SIZES.items():
        assert getattr(config.vision_config, name) == value


PROMPTS = {
    "text": "what happens?",
    "image": "<image>\nwhat happens?",
    "video": "<|video_pad|>\nwhat happens?",
    "mixed": "first <image> then <|video_pad|> and <image><|video_pad|> what happens?",
}


@pytest.mark.parametrize("prompt", list(PROMPTS))
@torch.no_grad()
def test_pixels_and_logits(case: Case, prompt: str) -> None:
    text = PROMPTS[prompt]
    inputs = case.inputs(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pre-sampled frames have no clock
        text = text.replace("<image>", "<|image_pad|>")
        media = case.media(PROMPTS[prompt])
        theirs = dict(case.their_processor(text=text, return_tensors="pt", **media))
    ids = theirs["input_ids"].masked_fill(theirs["input_ids"] == PAD, IMAGE)
    assert torch.equal(inputs["input_ids"], ids)
    for name in inputs.keys() - {"input_ids"}:
        assert torch.equal(inputs[name], theirs[name].to(inputs[name].dtype)), name
    agree(case, inputs)


def agree(case: Case, inputs: Mapping[str, Any]) -> None:
    """In every state, and in the last logits: all of them would be half a GB."""
    ours = case.ours(**inputs, output_hidden_states=True, logits_to_keep=8)
    theirs = case.theirs.model(**inputs, output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert difference(mine[real], other[real]) < NEAR
    last = real[:, -8:]
    logits = case.theirs.lm_head(theirs.last_hidden_state[:, -8:])
    assert difference(ours.logits[last], logits[last]) < NEAR


ROWS = ("what happens?", "<|video_pad|> what?", "the <image> moves <|video_pad|> left")
GREEDY = {"max_new_tokens": 32, "do_sample": False, "repetition_penalty": 1.0}


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_batch(case: Case, side: str) -> None:
    agree(case, case.inputs(*ROWS, padding_side=side))


def test_greedy_answers(case: Case) -> None:
    """What generation_config.json says of sampling is left aside where the call says so."""
    batch = case.inputs(*ROWS, padding_side="left")
    theirs = case.theirs.generate(**batch, **GREEDY, pad_token_id=151643)
    ours = case.ours.generate(**batch, **GREEDY)
    assert torch.equal(ours, theirs)
    assert len(set(ours[0, -32:].tolist())) > 5
    assert case.ours.generation_config == SAMPLED


# ---- messages ------------------------------------------------------------------------------------


def native_text(messages: Sequence[Mapping[str, Any]], kept: Sequence[int]) -> str:
    """The authors' way: the template names every frame, then each placeholder is multiplied."""
    how = {"add_generation_prompt": True, "image_token": "<image>"}
    text = render_chat(TEMPLATE, messages, special_tokens={}, **how)
    pieces = text.split("<image>")
    counted = zip((*kept, 0), pieces, strict=True)
    return "".join(f"{piece}{'<image>' * count}" for count, piece in counted)


@pytest.mark.parametrize("literal", [False, True])
def test_messages_become_the_authors_text(case: Case, literal: bool) -> None:
    """Also by the template in their code, which has the token itself in the place of its name."""
    frames, picture = video_forms.clip(3, 4), tiny.picture(1)
    question = {"type": "text", "text": "what?"}
    parts = [{"type": "image", "image": picture}, {"type": "video", "video": frames}, question]
    template = TEMPLATE.replace("image_token", "'<image>'") if literal else None
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]
    made = case.processor.apply_chat_template(
        messages, **how, return_tensors="pt", chat_template=template
    )
    mask = made["video_compression_mask"].view(4, -1).sum(1).tolist()
    assert mask[1] < mask[0]  # half of it stands still
    image = int(made["image_grid_thw"].prod())
    their_video = {"type": "video", "num_frames": 4, "timestamps": [0.0, 1.0, 2.0, 3.0]}
    messages[1] = {"role": "user", "content": [{"type": "image"}, their_video, question]}
    text = native_text(messages, [image, *mask])
    assert "<image>\nTime 0.0s:<image>" in text
    assert ">,Time 1.0s:<image>" in text
    expected = Tokenizer.from_file(str(case.folder / "tokenizer.json")).encode(text).ids
    ids = made["input_ids"][0]
    assert ids.masked_fill(ids == VIDEO, IMAGE).tolist() == expected


def test_roles_and_the_system_prompt(case: Case) -> None:
    messages = [{"role": "stream", "content": [{"type": "text", "text": "now"}]}]
    text = case.processor.apply_chat_template(messages, add_system_prompt=True)
    assert text == (
        "<|im_start|>system\nYou see.<|im_end|>\n<|stream_start|>stream\nnow<|stream_end|>\n"
    )
    with pytest.raises(InvalidArgument, match="have 0 images and videos, their text 1 <image>"):
        case.processor.apply_chat_template([{"role": "user", "content": "an <image>"}])


def test_ask(case: Case, clips_dir: Path) -> None:
    """Of 3.5 seconds the least number of frames, at one a second they would be three."""
    clip = clips_dir / "nemo_test_video.mp4"
    lm = vidlm.load(case.folder)
    answer = lm.ask(clip, "what happens?", max_tokens=12, temperature=0, repetition_penalty=1.0)
    assert len(answer.frames) == 4
    parts = [{"type": "video", "path": str(clip)}, {"type": "text", "text": "what happens?"}]
    inputs = case.processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        **{"add_generation_prompt": True, "tokenize": True, "return_dict": True},
        return_tensors="pt",
    )
    times = [f"Time {ref.index / 2:.1f}s:" for ref in answer.frames]
    said = case.processor.decode(inputs["input_ids"][0])
    assert re.findall(r"Time [\d.]+s:", said) == times
    ids = case.theirs.generate(**inputs, **{**GREEDY, "max_new_tokens": 12}, pad_token_id=151643)
    new = ids[0, inputs["input_ids"].shape[1] :]
    assert answer.text == case.processor.decode(new, skip_special_tokens=True).strip()
    assert answer.usage.prompt_tokens == inputs["input_ids"].shape[1]


# ---- sizes ---------------------------------------------------------------------------------------


def grids(processor: Any, images: Any = None, videos: Any = None) -> list[list[int]]:
    """Of the images and then of the videos of one call."""
    text = "<image>" * len(images or ()) + "<|video_pad|>" * len(videos or ())
    made = processor(text=text, images=images, videos=videos, return_tensors="pt")
    names = ("image_grid_thw", "video_grid_thw")
    return [grid for name in names if name in made for grid in made[name].tolist()]


def array(height: int, width: int) -> np.ndarray:
    return np.array(tiny.picture(5, height, width))


def test_whose_sizes(case: Case) -> None:
    """60 x 80 pixels are 4,800 of 6,400; two such images share them under the native rule."""
    auto = AutoProcessor.from_pretrained(case.folder, rule="native")
    native = VideoLlama3Processor.from_pretrained(case.folder, rule="native")
    named = VideoLlama3Processor.from_pretrained(case.folder, rule="hf")
    assert type(auto) is VideoLlama3Processor
    pictures, turned = [array(60, 80)] * 2, [tiny.picture(5, 60, 80)] * 2
    for processor in (case.processor, named):
        assert grids(processor, pictures) == grids(processor, turned) == [[1, 15, 20]] * 2
    for processor in (auto, native):
        assert grids(processor, pictures[:1]) == [[1, 15, 20]]
        assert grids(processor, pictures) == [[1, 12, 16]] * 2
        assert grids(processor, turned) == [[1, 16, 12]] * 2  # height for width, of PIL alone
    # Under the least of 1,024 pixels a frame is enlarged, but not beside an image.
    frames = np.stack([array(16, 24)] * 2)
    assert grids(case.processor, pictures[:1], [frames]) == [[1, 15, 20], [2, 8, 10]]
    assert grids(native, None, [frames]) == [[2, 8, 10]]
    assert grids(native, pictures[:1], [frames]) == [[1, 15, 20], [2, 4, 6]]


@torch.no_grad()
def test_the_native_rule_answers(case: Case) -> None:
    processor = AutoProcessor.from_pretrained(case.folder, rule="native")
    text = "<image> and <|video_pad|> what?"
    inputs = processor(text=text, return_tensors="pt", **case.media(text))
    assert not torch.equal(inputs["image_grid_thw"], case.inputs(text)["image_grid_thw"])
    agree(case, inputs)


@pytest.mark.parametrize("reader", [AutoProcessor, VideoLlama3Processor])
def test_a_misspelt_rule(case: Case, reader: Any) -> None:
    with pytest.raises(InvalidArgument, match="rule='natve'; allowed: 'hf', 'native'"):
        reader.from_pretrained(case.folder, rule="natve")


@pytest.mark.parametrize(("said", "kept"), [(True, 72 + 4), (None, 5 * 72), (False, 5 * 72)])
def test_whether_tokens_are_left_out(case: Case, tmp_path: Path, said: Any, kept: int) -> None:
    frames = np.stack([array(64, 72)] * 5)  # of 8 x 9 tokens
    folder = edited(case, tmp_path, {"use_token_compression": said})
    made = AutoProcessor.from_pretrained(folder)(
        text="<|video_pad|>", videos=[frames], return_tensors="pt"
    )
    assert int((made["input_ids"] == VIDEO).sum()) == kept
    assert int(made["video_compression_mask"].sum()) == kept


def test_tokens_are_left_out_unless_said(case: Case, tmp_path: Path) -> None:
    """The default of the authors' class, of their projector too."""
    folder = edited(case, tmp_path, {})
    tiny.edit_json(folder / "config.json", None, "use_token_compression", "mm_projector_type")
    assert AutoProcessor.from_pretrained(folder).core.video_pixels.compress
    assert AutoConfig.from_pretrained(folder) == case.ours.config


def test_blocks_by_processor_config(case: Case, tmp_path: Path) -> None:
    folder = edited(case, tmp_path, {"image_merge_size": 2}, "processor_config.json")
    processor = AutoProcessor.from_pretrained(folder)
    made = processor(text="<image>", images=[array(64, 80)])
    assert made["input_ids"] == [[IMAGE] * (8 * 10)]
    assert made["image_merge_sizes"].tolist() == [2]


# ---- refused, and written again ------------------------------------------------------------------

REFUSED = {
    "mm_projector_type='mlp3x_gelu' in config.json; supported: 'mlp2x_gelu'": {
        "mm_projector_type": "mlp3x_gelu"
    },
    "mm_projector_type='linear'": {"mm_projector_type": "linear"},
    "vision model_type 'siglip_vision_model'": {
        "vision_encoder_config.model_type": "siglip_vision_model"
    },
    "rope type 'yarn'": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "sliding_window=4096": {"use_sliding_window": True, "sliding_window": 4096},
}


@pytest.mark.parametrize("message", list(REFUSED))
def test_what_is_refused(case: Case, tmp_path: Path, message: str) -> None:
    folder = edited(case, tmp_path, REFUSED[message])
    for reader in (AutoConfig, AutoModelForImageTextToText, AutoProcessor):
        with pytest.raises(UnsupportedModel, match=message):
            reader.from_pretrained(folder)


@torch.no_grad()
def test_written_again_it_is_transformers_own(case: Case, tmp_path: Path) -> None:
    case.ours.save_pretrained(tmp_path)
    case.processor.save_pretrained(tmp_path)
    kind = transformers.VideoLlama3ForConditionalGeneration
    theirs = kind.from_pretrained(tmp_path, dtype=torch.float32).eval()
    text = "<image> and <|video_pad|> what?"
    inputs = case.inputs(text)
    agree(replace(case, theirs=theirs), inputs)
    assert (theirs.config.image_token_id, theirs.config.video_token_id) == (IMAGE, VIDEO)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.config == case.ours.config
    agree(replace(case, ours=again), inputs)
    # The processor's files, too: both make the same of them, with the native placeholder.
    readers = AutoProcessor, transformers.AutoProcessor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pre-sampled frames have no clock
        for reader in readers:
            processor = reader.from_pretrained(tmp_path)
            made = processor(text=text, return_tensors="pt", **case.media(text))
            for name, value in inputs.items():
                assert torch.equal(made[name].to(value.dtype), value), name
    assert not (tmp_path / "model.safetensors.index.json").exists()
