"""Several sequences in one row, told apart by position_ids that begin again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import slowfast_forms
import tiny
import video_forms
from oracle import difference, transformers
from vidlm import AutoModelForImageTextToText, AutoProcessor
from vidlm.errors import InvalidArgument

NEAR = 1e-4
LENGTHS = (7, 1, 4, 9)


def sequences(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(20, 250, (1, n), generator=generator) for n in lengths]


def restarted(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.fixture(scope="module", params=["siglip-qwen2", "next-yi", "video-llava", "videollama3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in tiny.FORMS:
        return tiny.write(folder, tiny.FORMS[request.param])
    return video_forms.FORMS[request.param].write(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder)


@pytest.mark.parametrize("use_cache", [None, False, True])
@torch.no_grad()
def test_packed_sequences_are_alone(model: Any, use_cache: bool | None) -> None:
    rows = sequences(*LENGTHS)
    inputs = {"input_ids": torch.cat(rows, 1), "position_ids": restarted(*LENGTHS)}
    output = model(**inputs, use_cache=use_cache, output_attentions=True, output_hidden_states=True)
    alone = [model(ids, output_attentions=True, output_hidden_states=True) for ids in rows]
    assert difference(output.logits, torch.cat([each.logits for each in alone], 1)) < NEAR
    for i, states in enumerate(output.hidden_states):
        assert difference(states, torch.cat([each.hidden_states[i] for each in alone], 1)) < NEAR
    for i, weights in enumerate(output.attentions):
        blocks = [each.attentions[i][0] for each in alone]
        expected = torch.stack([torch.block_diag(*heads) for heads in zip(*blocks, strict=True)])
        assert difference(weights[0], expected) < NEAR
    assert difference(model(**inputs).logits, output.logits) < NEAR  # and without traces
    assert (output.past_key_values is not None) == (use_cache is True)


@torch.no_grad()
def test_as_transformers(folder: Path, model: Any) -> None:
    kind = getattr(transformers, type(model).__name__)
    theirs = kind.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.cat([torch.cat(sequences(*LENGTHS), 1), torch.cat(sequences(11, 10), 1)])
    both = torch.cat((restarted(*LENGTHS), restarted(11, 10)))
    jumps = torch.tensor([[5, 6, 7, 9, 10, 10, 11, *range(3, 17)]])
    for positions in (both, jumps, restarted(12, 9), torch.arange(21)[None] + 4):
        for mask in (None, torch.ones_like(ids)):  # with a mask, all of a row is one sequence
            inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
            expected = theirs(**inputs, use_cache=False).logits
            assert difference(model(**inputs, use_cache=False).logits, expected) < NEAR


@torch.no_grad()
def test_spaced_positions_with_a_cache_are_one_sequence(folder: Path, model: Any) -> None:
    theirs = getattr(transformers, type(model).__name__).from_pretrained(folder).float().eval()
    ids = torch.cat(sequences(*LENGTHS), 1)
    inputs = {"input_ids": ids, "position_ids": torch.arange(21)[None] * 3 + 5}
    for how in ({}, {"use_cache": True}):
        assert difference(model(**inputs, **how).logits, theirs(**inputs, **how).logits) < NEAR
    apart = theirs(**inputs, use_cache=False).logits
    assert difference(model(**inputs, use_cache=False).logits, apart) < NEAR
    assert difference(model(**inputs).logits, apart) > 0.01


def test_gradients_stay_within_a_sequence(folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder).train()
    rows = sequences(*LENGTHS)
    ids, weight = torch.cat(rows, 1), model.get_input_embeddings().weight

    def gradient(lost: Tensor) -> Tensor:
        (made,) = torch.autograd.grad(lost, weight)
        return made

    packed = model(ids, position_ids=restarted(*LENGTHS), labels=ids.clone()).logits
    alone = [model(row).logits for row in rows]
    assert (
        difference(gradient(packed.square().sum()), gradient(torch.cat(alone, 1).square().sum()))
        < NEAR
    )


@torch.no_grad()
def test_media_in_packed_rows(folder: Path, model: Any) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    token = "<|image_pad|>" if "videollama3" in folder.name else "<image>"
    kinds = [
        processor(text=t, images=i, return_tensors="pt")
        for t, i in (
            (f"{token} what?", [tiny.picture(1)]),
            ("the red ball", None),
            (f"left {token}", [tiny.picture(2)]),
        )
    ]
    lengths = [each["input_ids"].shape[1] for each in kinds]
    media = {
        name: torch.cat([each[name] for each in kinds if name in each])
        for name in model.media_inputs
        if name in kinds[0]
    }
    ids = torch.cat([each["input_ids"] for each in kinds], 1)
    packed = model(ids, position_ids=restarted(*lengths), **media).logits
    expected = torch.cat([model(**each).logits for each in kinds], 1)
    assert difference(packed, expected) < NEAR


@torch.no_grad()
def test_a_cache_of_packed_rows_cannot_be_continued(model: Any) -> None:
    ids = torch.cat(sequences(*LENGTHS), 1)
    output = model(ids, position_ids=restarted(*LENGTHS), use_cache=True)
    assert output.past_key_values.get_seq_length() == sum(LENGTHS)
    with pytest.raises(InvalidArgument, match=r"packed rows.*a row of its own"):
        model(ids[:, :1], past_key_values=output.past_key_values)


def test_other_ways_to_say_it_are_refused(model: Any) -> None:
    ids = torch.cat(sequences(*LENGTHS), 1)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "seq_idx"):
        with pytest.raises(TypeError, match=name):
            model(ids, **{name: torch.tensor([0, 7, 8, 12, 21])})
    with pytest.raises(InvalidArgument, match=r"position_ids of shape \(1, 3\)"):
        model(ids, position_ids=torch.arange(3)[None])


@torch.no_grad()
def test_slow_fast_keeps_each_memory_with_its_sequence(tmp_path: Path) -> None:
    folder = slowfast_forms.write(tmp_path, num_hidden_layers=2)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    side = model.config.vision_config.image_size
    videos = [torch.randn(4, 3, side, side) for _ in range(2)]
    placeholders = torch.full((1, model.config.fast_tokens(4)), -200)
    first, second, third = sequences(5, 6, 3)
    rows = [torch.cat((first, placeholders, third), 1), second, torch.cat((placeholders, third), 1)]
    media = [[videos[0]], None, [videos[1]]]
    expected = [model(ids, images=own).logits for ids, own in zip(rows, media, strict=True)]
    positions = restarted(*(row.shape[1] for row in rows))
    packed = model(torch.cat(rows, 1), position_ids=positions, images=videos).logits
    assert difference(packed, torch.cat(expected, 1)) < NEAR
    ids = torch.cat((first, torch.tensor([[-200]]), third), 1)
    with pytest.raises(InvalidArgument, match="placeholders of media expanded"):
        model(ids, position_ids=torch.arange(9)[None], images=videos[:1])
