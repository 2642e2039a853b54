"""Slow-Fast as users meet it: its card's script, the Auto classes, vidlm.load, the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import slowfast_forms
import vidlm
from tiny import picture
from video_forms import clip
from vidlm.cli import application
from vidlm.compat.llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from vidlm.compat.llava.conversation import conv_templates
from vidlm.compat.llava.mm_utils import get_model_name_from_path, tokenizer_image_token
from vidlm.compat.llava.model.builder import load_pretrained_model
from vidlm.errors import InvalidArgument, UnsupportedModel, WeightsError
from vidlm.hf.slowfast import LlavaQwenSlowFastForCausalLM
from vidlm.media import load_video
from vidlm.models.slowfast import SlowFastConfig

CARD = Path("seeds") / "003_945740b4dcff422a.txt"
OPTIONS = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return slowfast_forms.write(tmp_path_factory.mktemp("slowfast"))


@pytest.fixture(scope="module")
def path(clips_dir: Path) -> str:
    return str(clips_dir / "imageio_realshort.mp4")


# ---- the card ------------------------------------------------------------------------------------


def card(shared: Path) -> str:
    """The script of the card, its lost indentation and line breaks put back."""
    lines = (shared / CARD).read_text().splitlines()
    code = [line[2:] if line.startswith("+ ") else line for line in lines]
    code = [line for line in code if not line.strip().isdigit() and line.strip() != "+"]
    start = code.index("```python", code.index("Then, use the following Python script:"))
    stop = code.index("```", start)
    # "\n" inside strings became a line's end.
    text = "\n".join(code[start + 1 : stop])
    for broken, whole in (
        ('+ "\n" + question', '+ "\\n" + question'),
        ('print(f"\nUser input: {question}\n")', 'print(f"\\nUser input: {question}\\n")'),
        ('print(f"Model output:\n{outputs}")', 'print(f"Model output:\\n{outputs}")'),
    ):
        assert broken in text
        text = text.replace(broken, whole)
    return text


DEEPER = {  # lines of the card that belong into the block opened before them, by their level
    **dict.fromkeys(
        (
            '"""Helper function to load video frames."""',
            "vr = VideoReader(video_path, num_threads=4)",
            "total_frames = len(vr)",
            "# Ensure sparse sampling doesn't lead to fewer frames than requested",
            "if total_frames >= max_frames_num:",
            "try:",
            "return spare_frames",
            'print(f"Downloading video from {video_url}...")',
            "response = requests.get(video_url, stream=True)",
            "response.raise_for_status() # Raise an exception for bad status codes",
            'with open(video_local_path, "wb") as f:',
            'print("Download complete.")',
            "output_ids = model.generate(",
            'prompt = DEFAULT_IMAGE_TOKEN + "\\n" + question',
            "input_ids = input_ids.unsqueeze(0)",
            "except Exception as e:",
        ),
        1,
    ),
    **dict.fromkeys(
        (
            "# Uniformly sample frames across the video",
            "uniform_sampled_frames = np.linspace(0, total_frames - 1, max_frames_num, dtype=int)",
            "frame_idx = uniform_sampled_frames.tolist()",
            "# If video is shorter than max_frames_num, sample all frames and repeat the last",
            "frame_idx = list(range(total_frames))",
            "frame_idx.extend([total_frames - 1] * (max_frames_num - total_frames))",
            "spare_frames = vr.get_batch(frame_idx).asnumpy()",
            'print(f"Error loading video frames: {e}")',
            "raise e",
            "for chunk in response.iter_content(chunk_size=8192):",
        ),
        2,
    ),
    "f.write(chunk)": 3,
}


def indented(text: str) -> str:
    """The script with its blocks; the `else:` of load_video is one level in, the other is not."""
    out, inside = [], False
    for line in text.splitlines():
        inside = line.startswith("def ") or (inside and line != "return spare_frames")
        level = DEEPER.get(line, 1 if inside and line == "else:" else 0)
        if line.startswith("prompt = DEFAULT_IM_START_TOKEN"):
            level = 1
        out.append("    " * level + line)
    return "\n".join(out)


class FakeReader:
    """decord's VideoReader, as far as the card uses it."""

    def __init__(self, path: str, num_threads: int) -> None:
        self.frames = load_video(path).frames

    def __len__(self) -> int:
        return len(self.frames)

    def get_batch(self, rows: list[int]) -> Any:
        batch = self.frames[rows]
        return type("Batch", (), {"asnumpy": lambda _: batch})()


def test_the_cards_script(
    shared: Path,
    folder: Path,
    path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = indented(card(shared))
    code = code.replace("from llava.", "from vidlm.compat.llava.")
    code = code.replace(
        '"shi-labs/slowfast-video-mllm-qwen2-7b-convnext-576-frame64-s1t4"', repr(str(folder))
    )
    assert code.count("vidlm.compat.llava") == 5
    (tmp_path / "catinterrupt.mp4").write_bytes(Path(path).read_bytes())  # no need to download
    monkeypatch.chdir(tmp_path)
    decord = ModuleType("decord")
    decord.VideoReader, decord.cpu = FakeReader, None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "decord", decord)
    monkeypatch.setitem(sys.modules, "requests", ModuleType("requests"))
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    exec(
        compile(code.replace("max_new_tokens=1024", "max_new_tokens=24"), "card", "exec"), namespace
    )
    said = capsys.readouterr().out
    assert "Video tensor processed, shape: torch.Size([64, 3, 128, 128])" in said
    assert "User input: Please describe this video in detail." in said
    assert f"Model output:\n{namespace['outputs']}" in said
    assert namespace["output_ids"].shape == (1, 24)


def test_names_of_the_research_code(folder: Path) -> None:
    assert get_model_name_from_path("shi-labs/some-model/") == "some-model"
    assert get_model_name_from_path("runs/some/checkpoint-5") == "some_checkpoint-5"
    tokenizer, model, pixels, context = load_pretrained_model(
        str(folder), None, "slowfast", device_map="cpu", torch_dtype=torch.float32
    )
    assert (context, type(model)) == (2048, LlavaQwenSlowFastForCausalLM)
    conversation = conv_templates["qwen_1_5"].copy()
    conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\nWhy?")
    conversation.append_message(conversation.roles[1], None)
    prompt = conversation.get_prompt()
    assert conv_templates["qwen_1_5"].messages == []
    ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
    assert (ids == IMAGE_TOKEN_INDEX).sum() == 1
    assert tokenizer_image_token(prompt, tokenizer) == ids.tolist()
    frames = pixels.preprocess(clip(1, frames=16), return_tensors="pt")["pixel_values"]
    answer = model.generate(ids[None], images=[frames], **OPTIONS)
    # The same through the names that the docs lead with.
    processor = vidlm.AutoProcessor.from_pretrained(folder)
    parts = [{"type": "video", "video": clip(1, frames=16)}, {"type": "text", "text": "Why?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        sampling="linspace",
        num_frames=16,
    )
    again = vidlm.AutoModelForImageTextToText.from_pretrained(folder).generate(**inputs, **OPTIONS)
    assert torch.equal(again, answer)
    with pytest.raises(UnsupportedModel, match="model_base"):
        load_pretrained_model(str(folder), "base", "x")
    with pytest.raises(InvalidArgument, match="return_tensors"):
        tokenizer_image_token(prompt, tokenizer, return_tensors="np")


# ---- vidlm's own ways ----------------------------------------------------------------------------


def test_load_and_ask(folder: Path, path: str) -> None:
    lm = vidlm.load(folder)
    answer = lm.ask(path, "What happens?", max_tokens=6)
    assert len(answer.frames) == 16  # as many as it was trained with
    assert answer.usage.media_tokens == 4 * 4  # the mean of every four frames, 2 x 2 tokens each
    shown = lm.ask(path, "What happens?", max_tokens=6, frames=8)
    assert len(shown.frames) == 8
    assert lm.ask([path, picture(1)], "Alike?", max_tokens=4).usage.media_tokens == 16 + 16
    assert lm.chat().ask("Who?", max_tokens=4).usage.media_tokens == 0
    chat = lm.chat(path)
    first, second = chat.ask("What?", max_tokens=3), chat.ask("And then?", max_tokens=3)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    assert second.usage.media_tokens == first.usage.media_tokens
    beams = lm.ask(path, "What happens?", max_tokens=6, num_beams=3)
    assert beams.usage.completion_tokens <= 6


def test_slow_tokens_while_decoding_change_the_answer(folder: Path, path: str) -> None:
    processor = vidlm.AutoProcessor.from_pretrained(folder)
    inputs = processor(text="<video>\nwhat happens?", videos=path, return_tensors="pt")
    answers = [
        LlavaQwenSlowFastForCausalLM.from_pretrained(folder, slow_in_decode=on).generate(
            **inputs, **{**OPTIONS, "max_new_tokens": 24}
        )
        for on in (False, True)
    ]
    assert answers[0][0, 0] == answers[1][0, 0]  # the first token is of the prompt alone
    assert not torch.equal(*answers)


def test_a_batch_with_images_videos_and_text(folder: Path) -> None:
    model = vidlm.AutoModelForImageTextToText.from_pretrained(folder)
    processor = vidlm.AutoProcessor.from_pretrained(folder)
    texts = ["<video> a", "<image> b <video>", "c"]
    videos, images = [clip(1, frames=9), clip(2, frames=5)], [picture(1)]
    for side in ("left", "right"):
        batch = processor(
            text=texts,
            videos=videos,
            images=images,
            padding=True,
            padding_side=side,
            return_tensors="pt",
        )
        together = model.generate(**batch, **OPTIONS)
        assert together.shape == (3, 8)
        single = (
            {"videos": videos[:1]},
            {"videos": videos[1:], "images": images},
            {},
        )
        for row, (text, media) in enumerate(zip(texts, single, strict=True)):
            alone = processor(text=text, return_tensors="pt", **media)
            assert torch.equal(model.generate(**alone, **OPTIONS)[0], together[row])


def test_command_line(folder: Path, path: str) -> None:
    asked = CliRunner().invoke(
        application(),
        ["ask", path, "What happens?", "--model", str(folder), "--max-tokens", "5", "--json"],
    )
    assert asked.exit_code == 0, asked.output
    told = json.loads(asked.stdout)
    assert len(told["frames"]) == 16
    info = CliRunner().invoke(application(), ["info", str(folder), "--json"])
    assert info.exit_code == 0, info.output
    assert json.loads(info.stdout)["family"] == "llava_qwen_slow_fast"


def test_a_cut_vocabulary(folder: Path, tmp_path: Path) -> None:
    """The authors' loader cuts the rows that the tokenizer does not use, config.json stays."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 152064}))
    model = vidlm.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert model.config.text_config.vocab_size == config["vocab_size"]


def test_weights_without_embeddings(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.embed_tokens.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"have no model\.embed_tokens\.weight"):
        vidlm.AutoModelForImageTextToText.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cross_attn_gating_type": "channel-wise-dynamic-sigmoid"}, "whole-dynamic"),
        ({"cross_attn_implementation": "perceiver"}, "text-only-vanilla"),
        ({"mm_projector_type": "qformer"}, "mlp2x_gelu"),
        ({"mm_vision_tower": "siglip-384"}, "convnext-576"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        SlowFastConfig.from_dict({**slowfast_forms.CONFIG, **change})


def test_frames_are_as_many_as_placeholders(folder: Path) -> None:
    model = vidlm.AutoModelForImageTextToText.from_pretrained(folder)
    ids = torch.tensor([[5, IMAGE_TOKEN_INDEX, 6]])
    frames = torch.zeros(8, 3, 128, 128)
    with pytest.raises(InvalidArgument, match="image"):
        model.generate(ids, images=[frames, frames], **OPTIONS)
    with pytest.raises(InvalidArgument, match="image"):
        model(torch.tensor([[5, 6]]), images=[frames])
    with pytest.raises(InvalidArgument):
        model.generate(ids, images=[np.zeros(3)], **OPTIONS)
