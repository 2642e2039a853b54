"""The Slow-Fast model against tensors of its authors' code, stage by stage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from oracle import difference
from vidlm import AutoModelForImageTextToText
from vidlm.media.policy import FramePolicy, choose
from vidlm.models.slowfast import TEMPLATE, SlowFastConfig
from vidlm.text import render_chat
from vidlm.vision.preprocess import CLIP_MEAN, CLIP_STD, PillowPreprocess

NEAR = 1e-4  # relative to the largest value
PLACEHOLDER = -200
ALONE = ("case1", "case2", "case3", "case4", "case5", "case6")
CASES = (*ALONE, "case7")


@dataclass(frozen=True)
class Case:
    """One fixture: the model we read of it, its inputs, and what their code made of them."""

    model: Any
    folder: Path
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]

    @property
    def images(self) -> list[Tensor]:
        rows = len(self.inputs["input_ids"])
        return [self.inputs[f"pixel_values.{row}"] for row in range(rows)]

    @property
    def call(self) -> dict[str, Any]:
        names = "input_ids", "attention_mask"
        return {**{name: self.inputs[name] for name in names}, "images": self.images}


def read(folder: Path, **kwargs: Any) -> Case:
    model = AutoModelForImageTextToText.from_pretrained(folder, **kwargs)
    inputs, outputs = (load_file(folder / f"{name}.safetensors") for name in ("inputs", "outputs"))
    return Case(model, folder, inputs, outputs)


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "golden" / "slowfast"


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, golden: Path) -> Case:
    return read(golden / request.param)


@pytest.fixture(scope="module", params=ALONE)
def alone(request: pytest.FixtureRequest, golden: Path) -> Case:
    return read(golden / request.param)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_vision_and_projector(case: Case) -> None:
    tower, project = case.model.model.vision_tower.vision_tower, case.model.model.mm_projector
    features = torch.cat([tower(pixels) for pixels in case.images])
    assert difference(features, case.expected["vision_features"]) < NEAR
    assert difference(project(features), case.expected["projected"]) < NEAR


def test_slow_and_fast_tokens(case: Case) -> None:
    media = case.model.media({"images": case.images})
    for row, (item, encoded) in enumerate(zip(media, case.model.encode(media), strict=True)):
        assert difference(encoded.memory, case.expected[f"slow_tokens.{row}"]) < NEAR
        assert difference(encoded.tokens, case.expected[f"fast_tokens.{row}"]) < NEAR
        assert item.tokens == len(encoded.tokens)


def test_every_stage_of_the_decoder(case: Case) -> None:
    model, expected = case.model, case.expected
    seen: dict[str, Tensor] = {}
    hooks = []
    layers = model.config.hybrid_layers
    for layer in layers:
        attention = model.model.layers[layer].self_attn
        for name, module in (("gate", attention.cross_attn_gate_proj), ("ctx", attention.cross)):
            key = f"{name}.{layer}"
            hooks.append(module.register_forward_hook(_keeper(seen, key)))
    hooks.append(model.model.layers[-1].register_forward_hook(_keeper(seen, "last")))
    out = model(**case.call, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    real = expected["token_types"] != 4
    states = expected["hidden_states"]
    assert difference(out.hidden_states[0][real], expected["inputs_embeds"][real]) < NEAR
    for mine, other in zip(out.hidden_states[:-1], states[:-1], strict=True):
        assert difference(mine[real], other[real]) < NEAR
    assert difference(seen["last"], states[-1][real]) < NEAR
    assert difference(out.logits[real], expected["logits"][real]) < NEAR
    if len(case.images) == 1:
        for layer in layers:
            gate, context = expected[f"gate_proj_out.{layer}"], expected[f"cross_ctx.{layer}"]
            assert difference(seen[f"gate.{layer}"].flatten(), gate.flatten()) < NEAR
            assert difference(seen[f"ctx.{layer}"], context[0].flatten(1)) < NEAR
    info = json.loads((case.folder / "info.json").read_text())
    assert list(layers) == info["hybrid_layers"]


def _keeper(seen: dict[str, Tensor], key: str) -> Any:
    def keep(module: Any, args: Any, output: Tensor) -> None:
        seen[key] = output

    return keep


def test_greedy_answers_as_theirs(alone: Case) -> None:
    """Slow tokens act on the prompt alone, as in their code."""
    wanted, model = alone.expected["greedy_ids"], alone.model
    options = {"do_sample": False, "max_new_tokens": len(wanted), "eos_token_id": []}
    assert model.generate(**alone.call, **options)[0].tolist() == wanted.tolist()
    out = model(**alone.call)
    for step, id in enumerate(wanted):
        assert difference(out.logits[0, -1], alone.expected["greedy_step_logits"][step]) < NEAR
        out = model(input_ids=id.view(1, 1), past_key_values=out.past_key_values)


def test_slow_tokens_in_decoding_too(alone: Case, golden: Path) -> None:
    """With slow_in_decode every generated token reads slow tokens, as in training."""
    model = read(golden / alone.folder.name, slow_in_decode=True).model
    out = model(**alone.call)
    for step, id in enumerate(alone.expected["greedy_ids"]):
        expected = alone.expected["recompute_step_logits"][step]
        assert difference(out.logits[0, -1], expected) < NEAR
        out = model(input_ids=id.view(1, 1), past_key_values=out.past_key_values)
    answer = model.generate(**alone.call, do_sample=False, max_new_tokens=12, eos_token_id=[])
    follow = list(answer[0].tolist())
    ids = torch.cat((alone.inputs["input_ids"], answer[:, :-1]), dim=1)
    mask = torch.ones_like(ids)
    whole = model(input_ids=ids, attention_mask=mask, images=alone.images).logits
    assert whole[0, -12:].argmax(-1).tolist() == follow


def test_a_batch_of_different_videos(golden: Path) -> None:
    case = read(golden / "case7")
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": []}
    together = case.model.generate(**case.call, **options)
    for row, image in enumerate(case.images):
        real = case.inputs["attention_mask"][row].bool()
        ids = case.inputs["input_ids"][row, real][None]
        assert torch.equal(case.model.generate(ids, images=[image], **options)[0], together[row])


def test_what_crashes_upstream(golden: Path) -> None:
    case = read(golden / "case1")
    model, ids = case.model, case.inputs["input_ids"]
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": []}
    text = ids[ids != PLACEHOLDER][None]
    assert model.generate(text, **options).shape == (1, 6)
    beams = model.generate(**case.call, num_beams=3, max_new_tokens=6, eos_token_id=[])
    assert beams.shape == (1, 6)
    # Two videos: text reads the slow tokens of both, one behind the other.
    twice = torch.cat((ids, ids), dim=1)
    two = model(input_ids=twice, images=[*case.images, *case.images[:1]])
    assert two.image_hidden_states.shape[0] == 2 * len(case.expected["fast_tokens.0"])
    one = model(input_ids=twice, images=[*case.images, case.images[0] * 0])
    assert difference(two.logits[0, -1], one.logits[0, -1]) > 1e-3


def test_slow_tokens_are_freed(golden: Path) -> None:
    from paging import Paged
    from vidlm.engine.forward import Part, prefill
    from vidlm.engine.inputs import PromptInputs
    from vidlm.models.base import Prompt

    for kept in (False, True):
        case = read(golden / "case1", slow_in_decode=kept)
        media = case.model.media({"images": case.images})
        ids, _ = case.model.expand(
            case.inputs["input_ids"], case.inputs["attention_mask"].bool(), media
        )
        prompt = Prompt(tuple(ids[0].tolist()), tuple(media))
        inputs, stores = PromptInputs(case.model, prompt), Paged([len(prompt.ids)])
        with torch.inference_mode():
            part = Part.of(inputs, prompt.ids, 0, stores.tables[0])
            prefill(case.model, stores.kv, [part])
        assert inputs.memory is not None
        inputs.prefilled()
        assert (inputs.answer_memory is not None) == kept
        assert inputs.answer_memory is None or inputs.answer_memory.tokens is None
        assert not inputs.encoded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(golden: Path, dtype: torch.dtype) -> None:
    case = read(golden / "case1", dtype=dtype)
    logits = case.model(**case.call).logits[0, -1].float()
    assert difference(logits, case.expected["logits"][0, -1]) < 0.2


def test_gradients_reach_every_part(golden: Path) -> None:
    case = read(golden / "case1")
    with torch.enable_grad():
        labels = torch.full(case.expected["token_types"].shape, -100)
        labels[:, -3:] = torch.tensor([5, 6, 7])
        case.model.train()(**case.call, labels=labels).loss.backward()
    unreached = [n for n, p in case.model.named_parameters() if p.grad is None]
    assert unreached == []


# ---- configuration, sampling, prompts, pixels ----------------------------------------------------


def test_written_again(golden: Path, tmp_path: Path) -> None:
    case = read(golden / "case4")
    case.model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.config == case.model.config
    assert torch.equal(again(**case.call).logits, case.model(**case.call).logits)


def test_fast_frames_of_the_table(golden: Path) -> None:
    table = json.loads((golden / "preprocess" / "frame_indices.json").read_text())
    for row in table["sample_fast_frames"]:
        sampler = _config(
            fast_token_temporal_sampling_stride=row["stride"], min_fast_frames=row["min_frames"]
        )
        assert sampler.fast_sample(row["total"]) == row["idx"]
    published = {"min_fast_frames": 16, "mm_video_pooling_stride": 2}
    for frames, stride, sampling, fast in ((64, 4, 1, 16), (96, 6, 1, 16), (128, 4, 2, 16)):
        config = _config(
            fast_token_temporal_stride=stride,
            fast_token_temporal_sampling_stride=sampling,
            **published,
        )
        assert config.fast_frames(frames) == fast
        assert config.fast_tokens(frames) == 1296
        assert config.slow_side(frames) == 9
    four = _config(fast_token_temporal_stride=4, **published)
    assert [four.fast_frames(n) for n in (1, 10, 40, 64, 65)] == [1, 10, 16, 16, 16]


def _config(**changes: Any) -> SlowFastConfig:
    words = {"mm_vision_tower": "convnext-576", "cross_attn_every_n_layers": 8, **changes}
    return SlowFastConfig.from_dict({"model_type": "llava_qwen_slow_fast", **words})


def test_published_hybrid_layers() -> None:
    text = {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    assert list(_config(**text).hybrid_layers) == [0, 8, 16, 24]
    assert list(_config(cross_attn_every_n_layers=None, **text).hybrid_layers) == []


def test_pixels(golden: Path) -> None:
    folder = golden / "preprocess"
    stored = load_file(folder / "preprocess.safetensors")
    about = json.loads((folder / "meta.json").read_text())["frames"]
    pixels = PillowPreprocess(576, (576, 576), CLIP_MEAN, CLIP_STD)
    names = [key.removesuffix(".frame_u8") for key in stored if key.endswith(".frame_u8")]
    assert len(names) == 2
    for name in names:
        made = pixels([stored[f"{name}.frame_u8"].numpy()])[0]
        assert torch.equal(made[:, ::16, ::16], stored[f"{name}.grid_every_16"])
        digest = hashlib.sha256(np.ascontiguousarray(made.numpy()).tobytes()).hexdigest()
        assert digest == about[name]["sha256_f32"]


def test_the_prompt(golden: Path) -> None:
    prompts = json.loads((golden / "preprocess" / "prompts.json").read_text())
    asked = "Please describe this video in detail."
    first = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]}
    assert _rendered([first]) == prompts["single"]
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q1"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A1"}]},
        {"role": "user", "content": "Q2"},
    ]
    assert _rendered(turns) == prompts["two_turn"]


def _rendered(messages: list[dict[str, Any]]) -> str:
    return render_chat(TEMPLATE, messages, add_generation_prompt=True, special_tokens={})


def test_linspace_is_the_usual_choice() -> None:
    pts = np.arange(10) / 10
    rows = choose(pts, FramePolicy(num_frames=64, sampling="linspace"), stop=1.0)
    assert rows.tolist() == np.linspace(0, 9, 64, dtype=int).tolist()
