"""generate against transformers: the same ids, whatever decides them; and text while it comes."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
import tiny
from oracle import Reference
from vidlm import LlavaForConditionalGeneration, LlavaProcessor, TextIteratorStreamer, TextStreamer

NEW = 32
PROMPTS = {
    "text": "what happens in the video?",
    "one image": "<image>\nwhat happens?",
    "frames of a video": "<image>" * 8 + "\nwhat happens?",
}
BATCH = ("<image> what?", "the red ball moves <image><image> to the left", "what happens?")


@dataclass(frozen=True)
class Case:
    """One checkpoint, read by both."""

    theirs: Reference
    ours: LlavaForConditionalGeneration
    processor: LlavaProcessor

    def inputs(self, *texts: str, **how: Any) -> dict[str, Tensor]:
        images = tiny.pictures(sum(text.count("<image>") for text in texts)) or None
        options = {"padding": len(texts) > 1, "return_tensors": "pt", **how}
        return dict(self.processor(images=images, text=list(texts), **options))

    def both(self, inputs: dict[str, Tensor], **how: Any) -> list[list[int]]:
        """The new ids, on which both agree."""
        ours = self.ours.generate(**inputs, **how)
        if "stop_strings" in how:
            how["tokenizer"] = self.theirs.processor.tokenizer
        theirs = self.theirs.model.generate(**inputs, **how)
        assert ours.tolist() == theirs.tolist()
        length = inputs["input_ids"].shape[1]
        assert torch.equal(ours[:, :length], inputs["input_ids"])
        return ours[:, length:].tolist()


@pytest.fixture(scope="module", params=list(tiny.FORMS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The interleave form, where the form does not matter."""
    return make(tmp_path_factory.mktemp("one"), "siglip-qwen2-tied")


def make(folder: Path, form: str) -> Case:
    theirs = Reference.make(folder, form)
    ours = LlavaForConditionalGeneration.from_pretrained(folder)
    return Case(theirs, ours, LlavaProcessor.from_pretrained(folder))


# ---- greedy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", list(PROMPTS))
def test_greedy(case: Case, prompt: str) -> None:
    (new,) = case.both(case.inputs(PROMPTS[prompt]), max_new_tokens=NEW, do_sample=False)
    assert len(set(new)) > 3  # an answer in which something could go wrong


def test_greedy_in_a_batch(case: Case) -> None:
    rows = case.both(case.inputs(*BATCH, padding_side="left"), max_new_tokens=NEW)
    for text, row in zip(BATCH, rows, strict=True):
        first = sum(earlier.count("<image>") for earlier in BATCH[: BATCH.index(text)])
        images = tiny.pictures(3)[first : first + text.count("<image>")] or None
        alone = case.processor(images, text, return_tensors="pt")
        new = case.ours.generate(**alone, max_new_tokens=NEW)[0, alone.input_ids.shape[1] :]
        assert new.tolist() == row[: len(new)]
        assert set(row[len(new) :]) <= {tiny.PAD}


def test_the_side_of_the_padding_changes_nothing(case: Case) -> None:
    new = []
    for side in ("left", "right"):
        inputs = case.inputs(*BATCH, padding_side=side)
        ids = case.ours.generate(**inputs, max_new_tokens=NEW)
        new.append(ids[:, inputs["input_ids"].shape[1] :])
    assert torch.equal(*new)


def test_rows_that_end_early_are_filled(case: Case) -> None:
    inputs = case.inputs(*BATCH, padding_side="left")
    rows = case.both(inputs, max_new_tokens=NEW)
    end = rows[0][4]
    for pad in ({}, {"pad_token_id": 7}):
        filled = case.both(inputs, max_new_tokens=NEW, eos_token_id=end, **pad)
        at = rows[0].index(end) + 1
        assert len(filled[0]) > at
        assert set(filled[0][at:]) == {pad.get("pad_token_id", tiny.PAD)}


def test_bfloat16(one: Case) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(one.theirs.folder, dtype=torch.bfloat16)
    inputs = one.inputs(PROMPTS["one image"])
    new = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    theirs = oracle.load(one.theirs.folder, dtype=torch.bfloat16)
    assert new[0] == theirs.generate(**inputs, max_new_tokens=1)[0, -1]
    assert len(new) == 5


# ---- what bends the choice ----------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty(case: Case, penalty: float) -> None:
    inputs = case.inputs(PROMPTS["one image"])
    new = case.both(inputs, max_new_tokens=NEW, repetition_penalty=penalty)
    assert new != case.both(inputs, max_new_tokens=NEW)


def test_ends_and_least_lengths(case: Case) -> None:
    inputs = case.inputs(PROMPTS["one image"])
    (free,) = case.both(inputs, max_new_tokens=NEW)
    ends = [free[9], free[3]]
    (short,) = case.both(inputs, max_new_tokens=NEW, eos_token_id=ends)
    assert len(short) <= 4
    (longer,) = case.both(inputs, max_new_tokens=NEW, eos_token_id=ends, min_new_tokens=12)
    assert len(longer) > 12
    (least,) = case.both(inputs, max_new_tokens=12, eos_token_id=ends, min_new_tokens=12)
    assert len(least) == 12


def test_max_length_counts_the_prompt(case: Case) -> None:
    inputs = case.inputs(PROMPTS["one image"])
    (new,) = case.both(inputs, max_length=inputs["input_ids"].shape[1] + 3)
    assert len(new) == 3


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20},
        {"temperature": 1.5, "top_k": 0, "min_p": 0.05},
        {"top_k": 5, "repetition_penalty": 1.2},
    ],
)
def test_sampling_draws_the_same_tokens(case: Case, how: dict[str, Any]) -> None:
    inputs = case.inputs(PROMPTS["one image"])
    drawn = []
    for model in (case.ours, case.theirs.model):
        torch.manual_seed(5)
        drawn.append(model.generate(**inputs, max_new_tokens=NEW, do_sample=True, **how).tolist())
    assert drawn[0] == drawn[1]
    greedy = case.ours.generate(**inputs, max_new_tokens=NEW).tolist()
    assert drawn[0] != greedy


def test_several_answers_to_each_prompt(case: Case) -> None:
    """The rows of a prompt lie behind each other; each draws with a seed of its own."""
    inputs = case.inputs(*BATCH, padding_side="left")
    how = {"do_sample": True, "num_return_sequences": 3, "pad_token_id": 7}
    torch.manual_seed(5)
    ours = case.ours.generate(**inputs, max_new_tokens=NEW, **how)
    torch.manual_seed(5)
    theirs = case.theirs.model.generate(**inputs, max_new_tokens=NEW, **how)
    length = inputs["input_ids"].shape[1]
    assert len(ours) == len(theirs) == 9
    assert ours[:, :length].tolist() == theirs[:, :length].tolist()
    assert len({tuple(row) for row in ours[:, length:].tolist()}) == 9
    seeded = [
        case.ours.generate(**inputs, max_new_tokens=NEW, seed=3 + i, **{**how, **one}).tolist()
        for i, one in ((0, {}), (1, {"num_return_sequences": 1}))
    ]
    assert seeded[0][1::3] == seeded[1]


# ---- beams -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
        {"num_beams": 2, "length_penalty": -1.0, "repetition_penalty": 1.2, "min_new_tokens": 6},
    ],
)
def test_beams(case: Case, how: dict[str, Any]) -> None:
    inputs = case.inputs(PROMPTS["one image"])
    (free,) = case.both(inputs, max_new_tokens=NEW, num_beams=how["num_beams"])
    ends = [free[len(free) // 4], free[len(free) // 2]]
    case.both(inputs, max_new_tokens=NEW, eos_token_id=ends, **how)
    case.both(inputs, max_new_tokens=NEW, **how)


def test_beams_in_a_batch(case: Case) -> None:
    inputs = case.inputs(*BATCH, padding_side="left")
    # The reference takes a pad_token_id of 0 for none, and fills with an end; 7 it takes as said.
    how = {"max_new_tokens": 16, "num_beams": 3, "pad_token_id": 7}
    rows = case.both(inputs, **how)
    filled = case.both(inputs, **how, eos_token_id=[rows[0][3], rows[1][6]])
    assert any(row[-1] == 7 for row in filled)


# ---- generation_config.json ----------------------------------------------------------------------


def test_the_checkpoints_defaults(case: Case, tmp_path: Path) -> None:
    inputs = case.inputs(PROMPTS["one image"])
    free = case.both(inputs, max_new_tokens=NEW)[0]
    folder = shutil.copytree(case.theirs.folder, tmp_path / "copy")
    defaults = {
        "max_new_tokens": 9,
        "repetition_penalty": 1.2,
        "eos_token_id": [free[20], 299],
        "pad_token_id": 5,
        "use_cache": True,
        "transformers_version": "5.23.0",
    }
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    ours = LlavaForConditionalGeneration.from_pretrained(folder)
    theirs = oracle.load(folder)
    for how in ({}, {"max_new_tokens": 20}, {"repetition_penalty": 1.0}, {"num_beams": 2}):
        assert ours.generate(**inputs, **how).tolist() == theirs.generate(**inputs, **how).tolist()
    length = inputs["input_ids"].shape[1]
    assert ours.generate(**inputs, generation_config={"max_new_tokens": 2}).shape[1] == length + 2
    assert ours.generate(**inputs).shape[1] <= length + 9


def test_without_the_file_the_config_says_where_to_end(case: Case, tmp_path: Path) -> None:
    inputs = case.inputs(*BATCH, padding_side="left")
    rows = case.both(inputs, max_new_tokens=NEW)
    folder = shutil.copytree(case.theirs.folder, tmp_path / "copy")
    (folder / "generation_config.json").unlink()
    change = {"text_config.eos_token_id": rows[0][4], "text_config.pad_token_id": 6}
    tiny.edit_json(folder / "config.json", change)
    ours = LlavaForConditionalGeneration.from_pretrained(folder)
    ids = ours.generate(**inputs, max_new_tokens=NEW).tolist()
    assert ids == oracle.load(folder).generate(**inputs, max_new_tokens=NEW).tolist()
    assert ids[0][-1] == 6


# ---- stop strings --------------------------------------------------------------------------------


def readable(case: Case, new: list[int], first: int) -> str:
    """The text of a later token of an answer that is plain ASCII."""
    texts = [case.processor.decode([token]) for token in new[first:]]
    return next(text for text in texts if text.isascii() and text.isprintable() and text)


def test_stop_strings(case: Case) -> None:
    inputs = case.inputs(PROMPTS["one image"])
    (free,) = case.both(inputs, max_new_tokens=NEW)
    stop = readable(case, free, 3)
    for stops in (stop, [stop, "never said"]):
        (short,) = case.both(inputs, max_new_tokens=NEW, stop_strings=stops)
        assert short == free[: len(short)]
        assert len(short) < len(free)
        assert stop in case.processor.decode(short)
    given = case.ours.generate(**inputs, max_new_tokens=NEW, stop=stop, tokenizer=case.processor)
    assert given[0, inputs["input_ids"].shape[1] :].tolist() == short


# ---- streamers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("skip_prompt", [False, True])
@pytest.mark.parametrize("skip_special", [False, True])
def test_streamed_text_is_the_decoded_text(
    case: Case, skip_prompt: bool, skip_special: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = case.inputs(PROMPTS["one image"])
    how = {"skip_prompt": skip_prompt, "skip_special_tokens": skip_special}
    for seed in range(3):
        torch.manual_seed(seed)
        printer = TextStreamer(case.processor, **how)
        ids = case.ours.generate(**inputs, streamer=printer, max_new_tokens=NEW, do_sample=True)[0]
        shown = ids[inputs["input_ids"].shape[1] :] if skip_prompt else ids
        text = case.processor.decode(shown, skip_special_tokens=skip_special)
        assert capsys.readouterr().out == text + "\n"


def test_text_from_another_thread(case: Case) -> None:
    inputs = case.inputs(PROMPTS["one image"])
    streamer = TextIteratorStreamer(case.processor.tokenizer, skip_prompt=True, timeout=60)
    kwargs = {**inputs, "streamer": streamer, "max_new_tokens": NEW}
    thread = Thread(target=case.ours.generate, kwargs=kwargs)
    thread.start()
    pieces = list(streamer)
    thread.join()
    (new,) = case.both(inputs, max_new_tokens=NEW)
    assert "".join(pieces) == case.processor.decode(new)
    assert len(pieces) > 3
    assert all(pieces)


def test_streamers_written_for_transformers_work(one: Case) -> None:
    inputs = one.inputs(PROMPTS["one image"])
    heard: dict[str, list[Any]] = {"ours": [], "theirs": []}

    class Listener(oracle.transformers.generation.BaseStreamer):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self.heard = heard[name]

        def put(self, value: Tensor) -> None:
            self.heard.append((tuple(value.shape), value.tolist()))

        def end(self) -> None:
            self.heard.append("end")

    one.ours.generate(**inputs, max_new_tokens=4, streamer=Listener("ours"))
    one.theirs.model.generate(**inputs, max_new_tokens=4, streamer=Listener("theirs"))
    assert heard["ours"] == heard["theirs"]
    theirs = oracle.transformers.TextIteratorStreamer(one.theirs.processor.tokenizer)
    one.ours.generate(**inputs, max_new_tokens=NEW, streamer=theirs)
    mine = TextIteratorStreamer(one.processor)
    one.ours.generate(**inputs, max_new_tokens=NEW, streamer=mine)
    assert "".join(mine) == "".join(theirs)
