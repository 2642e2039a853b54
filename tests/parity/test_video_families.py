"""LLaVA-NeXT-Video, Video-LLaVA and VideoLLaMA3 against transformers, from pixels to answers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
import video_forms
from oracle import difference
from video_forms import FORMS, Form, clip
from vidlm import AutoModelForImageTextToText, AutoProcessor

NEAR = 1e-4  # relative to the largest value, in float32


@dataclass(frozen=True)
class Case:
    """One checkpoint, read by both."""

    form: Form
    folder: Path
    ours: Any
    theirs: Any
    our_processor: Any
    their_processor: Any

    def text(self, text: str) -> str:
        """A prompt with this family's tokens in it."""
        return text.replace("[I]", self.form.image).replace("[V]", self.form.video)

    def media(self, *texts: str) -> dict[str, Any]:
        images = [tiny.picture(i, 30 + 9 * i, 70 - 11 * i) for i in range(_count(texts, "[I]"))]
        videos = [clip(i) for i in range(_count(texts, "[V]"))]
        return {"images": images or None, "videos": videos or None}

    def both(self, *texts: str, **how: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """A batch by our processor and by theirs."""
        prompts = [self.text(text) for text in texts]
        options = {"padding": len(texts) > 1, "return_tensors": "pt", **self.media(*texts), **how}
        mine = dict(self.our_processor(text=prompts, **options))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pre-sampled frames have no clock
            theirs = dict(self.their_processor(text=prompts, **options))
        for name in ("token_type_ids", "mm_token_type_ids", "video_metadata"):
            theirs.pop(name, None)
        return mine, theirs

    def inputs(self, *texts: str, **how: Any) -> dict[str, Any]:
        return self.both(*texts, **how)[0]


def _count(texts: tuple[str, ...], mark: str) -> int:
    return sum(text.count(mark) for text in texts)


@pytest.fixture(scope="module", params=list(FORMS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    form = FORMS[request.param]
    folder = form.write(tmp_path_factory.mktemp(request.param))
    theirs, their_processor = video_forms.two_read(form, folder)
    ours = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(ours).__name__ == type(theirs).__name__
    return Case(form, folder, ours, theirs, AutoProcessor.from_pretrained(folder), their_processor)


PROMPTS = {
    "text": "what happens?",
    "image": "[I]\nwhat happens?",
    "video": "[V]\nwhat happens?",
    "mixed": "first [I] then [V] and [I][V] what happens?",
}


@pytest.mark.parametrize("prompt", list(PROMPTS))
def test_pixels_and_ids(case: Case, prompt: str) -> None:
    ours, theirs = case.both(PROMPTS[prompt])
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].shape == value.shape
        assert torch.equal(ours[name], value.to(ours[name].dtype)), name


@pytest.mark.parametrize("prompt", list(PROMPTS))
@torch.no_grad()
def test_states_features_and_logits(case: Case, prompt: str) -> None:
    inputs = case.inputs(PROMPTS[prompt])
    ours = case.ours(**inputs, output_hidden_states=True)
    theirs = case.theirs(**inputs, output_hidden_states=True)
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert difference(mine, other) < NEAR
    for name in ("image_hidden_states", "video_hidden_states"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert (mine is None) == (other is None)
        if mine is not None:
            assert difference(mine, other.reshape(mine.shape)) < NEAR
    assert difference(ours.logits, theirs.logits) < NEAR


# Every kind of media within a row and across the rows, and a row without any.
ROWS = ("[V] what?", "the red ball [I] moves [V] left", "what happens?", "[I]right[I]")


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_equals_its_rows(case: Case, side: str) -> None:
    batch = case.inputs(*ROWS, padding_side=side)
    real = batch["attention_mask"].bool()
    logits = case.ours(**batch).logits
    assert difference(logits[real], case.theirs(**batch).logits[real]) < NEAR
    media = case.media(*ROWS)
    images, videos = list(media["images"]), list(media["videos"])
    for row, text in enumerate(ROWS):
        own = {
            "images": [images.pop(0) for _ in range(text.count("[I]"))] or None,
            "videos": [videos.pop(0) for _ in range(text.count("[V]"))] or None,
        }
        alone = case.our_processor(text=case.text(text), return_tensors="pt", **own)
        assert torch.equal(alone["input_ids"][0], batch["input_ids"][row, real[row]])
        assert difference(logits[row, real[row]], case.ours(**alone).logits[0]) < NEAR


def test_greedy_answers(case: Case) -> None:
    batch = case.inputs(*ROWS)
    options = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": video_forms.EOS}
    theirs = case.theirs.generate(**batch, **options, pad_token_id=video_forms.PAD)
    ours = case.ours.generate(**batch, **options)
    assert torch.equal(ours, theirs)
    assert len(set(ours[0, -32:].tolist())) > 5
    right = case.ours.generate(**case.inputs(*ROWS, padding_side="right"), **options)
    assert torch.equal(right[:, -32:], ours[:, -32:])


@torch.no_grad()
def test_attentions_and_the_cache(case: Case) -> None:
    batch = case.inputs(*ROWS[:3])
    real = batch["attention_mask"].bool()
    theirs = eager(case).forward(**batch, output_attentions=True, use_cache=True)
    ours = case.ours(**batch, output_attentions=True)
    for mine, other in zip(ours.attentions, theirs.attentions, strict=True):
        for row, columns in enumerate(real):
            seen = mine[row][:, columns][:, :, columns]
            assert difference(seen, other[row][:, columns][:, :, columns]) < NEAR
            assert not mine[row][:, ~columns].any()
    token = ours.logits[:, -1:].argmax(-1)
    mask = torch.cat((batch["attention_mask"], torch.ones(3, 1, dtype=torch.int64)), dim=1)
    assert ours.past_key_values.get_seq_length() == real.shape[1]
    after = case.ours(
        input_ids=token, attention_mask=mask, past_key_values=ours.past_key_values
    ).logits
    whole = {**batch, "input_ids": torch.cat((batch["input_ids"], token), 1)}
    expected = case.theirs(**{**whole, "attention_mask": mask}).logits[:, -1:]
    assert difference(after, expected) < NEAR
    assert ours.past_key_values.get_seq_length() == real.shape[1] + 1


def eager(case: Case) -> Any:
    """Their model with the attention that shows its weights."""
    model = case.form.named("ForConditionalGeneration")
    return model.from_pretrained(
        case.folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def test_other_ways_in_and_out(case: Case) -> None:
    inputs = case.inputs("[I] and [V] what?")
    logits = case.ours(**inputs).logits
    ids = inputs.pop("input_ids")
    embeds = case.ours.get_input_embeddings()(ids)
    assert difference(case.ours(inputs_embeds=embeds, **inputs).logits, logits) < 1e-6
    columns = torch.tensor([3, 5])
    kept = case.ours(input_ids=ids, **inputs, logits_to_keep=columns).logits
    assert difference(kept, logits[:, columns]) < 1e-5
    kept = case.ours(input_ids=ids, **inputs, logits_to_keep=2).logits
    assert difference(kept, logits[:, -2:]) < 1e-5
    flat = case.ours(input_ids=ids, **inputs, return_dict=False, use_cache=False, labels=ids)
    assert isinstance(flat, tuple)
    assert flat[0].ndim == 0
    assert torch.equal(flat[1], logits)
    with pytest.raises(TypeError, match="output_attentions"):
        case.ours(input_ids=ids, **inputs, output_attention=True)


def test_training_follows_theirs(case: Case) -> None:
    batch = case.inputs("[I] what?", "the red [V] ball", padding_side="right")
    labels = labelled(case, batch)
    curves = []
    for model in (
        AutoModelForImageTextToText.from_pretrained(case.folder).train(),
        video_forms.two_read(case.form, case.folder)[0].train(),
    ):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.02)
        losses = []
        for _ in range(4):
            loss = model(**batch, labels=labels).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0][-1] < curves[0][0]


def labelled(case: Case, batch: dict[str, Any]) -> torch.Tensor:
    """Every token of text is to be learnt."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for id in case.ours.config.placeholders.values():
        labels[labels == id] = -100
    return labels


@torch.no_grad()
def test_the_loss_is_the_same_with_padding_on_either_side(case: Case) -> None:
    texts = "[I] what?", "the red [V] ball"
    sides = [case.inputs(*texts, padding_side=side) for side in ("left", "right")]
    left, right = (case.ours(**side, labels=labelled(case, side)).loss for side in sides)
    assert float(left) == pytest.approx(float(right), rel=1e-5)


@torch.no_grad()
def test_the_model_without_its_head(case: Case) -> None:
    import vidlm

    body = getattr(vidlm, f"{case.form.family}Model").from_pretrained(case.folder)
    inputs = case.inputs("[I] and [V] what?")
    ours, theirs = body(**inputs), case.theirs.model(**inputs)
    assert difference(ours.last_hidden_state, theirs.last_hidden_state) < NEAR
    assert not [name for name, _ in body.named_parameters() if "lm_head" in name]
    for kind in ("image", "video"):
        mine = ours[f"{kind}_hidden_states"]
        assert difference(mine, theirs[f"{kind}_hidden_states"].reshape(mine.shape)) < NEAR
    masks = body.get_placeholder_mask(inputs["input_ids"], body.embed(inputs["input_ids"][0])[None])
    for mask, kind in zip(masks, ("image", "video"), strict=True):
        assert int(mask.sum()) == len(ours[f"{kind}_hidden_states"])


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_placeholders_of_any_size(case: Case, data: st.DataObject) -> None:
    height, width = data.draw(st.integers(8, 90)), data.draw(st.integers(8, 90))
    frames = data.draw(st.integers(1, 3))
    rng = np.random.default_rng(height * 100 + width)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    video = np.stack([image] * frames)
    video[1:, : height // 2] //= 2
    media = {"images": [image], "videos": [video], "return_tensors": "pt"}
    text = case.text("a [I] b [V] c")
    ours = case.our_processor(text=text, **media)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = case.their_processor(text=text, **media)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    features = case.ours.media({k: ours[k] for k in case.ours.media_inputs if k in ours})
    placed = sum(
        int((ours["input_ids"] == id).sum()) for id in case.ours.config.placeholders.values()
    )
    assert sum(item.tokens for item in features) == placed


@torch.no_grad()
def test_written_again_both_read_it(case: Case, tmp_path: Path) -> None:
    case.ours.save_pretrained(tmp_path)
    case.our_processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert again.config == case.ours.config
    text, media = case.text("[I] and [V]"), case.media("[I] and [V]")
    inputs = processor(text=text, return_tensors="pt", **media)
    logits = case.ours(**case.inputs("[I] and [V]")).logits
    assert torch.equal(again(**inputs).logits, logits)
    theirs, _ = video_forms.two_read(case.form, tmp_path)
    assert difference(theirs(**inputs).logits, logits) < NEAR
