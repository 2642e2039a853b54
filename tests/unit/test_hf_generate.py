"""What `generate` takes and refuses; streamers."""

from __future__ import annotations

from queue import Empty
from threading import Thread
from typing import Any

import pytest
import torch

import tiny
from vidlm import LlavaForConditionalGeneration, LlavaProcessor, TextIteratorStreamer, TextStreamer
from vidlm.errors import InvalidArgument
from vidlm.hf.generation import read_call

# ---- the keywords of generate -------------------------------------------------------------------


def params(kwargs: dict[str, Any], defaults: dict[str, Any] | None = None, **how: Any) -> Any:
    return read_call(kwargs, defaults or {}, **{"prompt_length": 10, "eos": 2, **how}).params


def test_greedy_unless_asked() -> None:
    read = params({})
    assert (read.temperature, read.num_beams, read.eos_token_ids) == (0.0, 1, (2,))
    assert params({"do_sample": False}) == read
    assert params({"temperature": 0}) == read
    assert params({"temperature": 0.0, "do_sample": False}) == read
    assert params({"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 0}) == read
    assert params({"do_sample": None, "temperature": None}) == read


def test_sampling_has_transformers_defaults() -> None:
    read = params({"do_sample": True})
    assert (read.temperature, read.top_k, read.top_p, read.min_p) == (1.0, 50, 1.0, 0.0)
    assert params({"temperature": 0.5}).temperature == 0.5
    assert params({"top_p": 0.5}).temperature == 1.0


def test_the_call_wins_over_the_file() -> None:
    file = {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1}
    assert params({}, file).temperature == 0.7
    assert params({"do_sample": False}, file).temperature == 0.0
    assert params({"do_sample": False}, file).repetition_penalty == 1.1
    assert params({"repetition_penalty": 1.0, "top_k": 0}, file).top_k == 0
    assert params({"eos_token_id": [5, 6]}, {"eos_token_id": 4}).eos_token_ids == (5, 6)
    assert params({}, {"eos_token_id": [4, 3]}).eos_token_ids == (4, 3)
    assert params({}, {"unknown": 1, "use_cache": False}) == params({})


def test_lengths() -> None:
    assert params({"max_new_tokens": 3, "max_length": 11}).max_new_tokens == 3
    assert params({"max_length": 15}, {"max_new_tokens": 3}).max_new_tokens == 5
    assert params({}, {"max_new_tokens": 3}).max_new_tokens == 3
    with pytest.raises(InvalidArgument, match=r"max_length=10 leaves nothing.*max_new_tokens"):
        params({"max_length": 10})


def test_the_filling() -> None:
    def pad(kwargs: dict[str, Any], defaults: dict[str, Any], eos: int | None) -> int:
        return read_call(kwargs, defaults, prompt_length=1, eos=eos).pad_token_id

    assert pad({"pad_token_id": 0}, {"pad_token_id": 9}, 2) == 0
    assert pad({}, {"pad_token_id": 9}, 2) == 9
    assert pad({}, {}, 2) == 2
    assert pad({}, {}, None) == 0


@pytest.mark.parametrize(
    ("kwargs", "kind", "said"),
    [
        ({"max_tokens": 5}, TypeError, "did you mean 'max_new_tokens'"),
        ({"temprature": 1}, TypeError, "did you mean 'temperature'"),
        ({"num_return_sequences": 2}, InvalidArgument, "add do_sample=True"),
        ({"num_return_sequences": 2, "num_beams": 2}, InvalidArgument, "their best answer alone"),
        ({"num_return_sequences": 0}, InvalidArgument, "allowed: at least 1"),
        ({"use_cache": False}, InvalidArgument, "only True is"),
        ({"return_dict_in_generate": True}, InvalidArgument, "only False is"),
        ({"do_sample": True, "temperature": 0}, InvalidArgument, "or do_sample=False"),
        ({"num_beams": 2, "do_sample": True}, InvalidArgument, "num_beams=1 to sample"),
        ({"max_new_tokens": 0}, InvalidArgument, "at least 1"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, InvalidArgument, r"max_new_tokens \(8\)"),
        ({"top_p": 1.5}, InvalidArgument, "at most 1"),
        ({"stop_strings": ["a", ""]}, InvalidArgument, "non-empty"),
    ],
)
def test_bad_generate_keywords(kwargs: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        params(kwargs)


def test_unknown_keywords_of_generate_itself(model: LlavaForConditionalGeneration) -> None:
    with pytest.raises(TypeError, match=r"'max_new_token'; did you mean 'max_new_tokens'"):
        model.generate(torch.tensor([[5]]), max_new_token=3)


# ---- streamers ----------------------------------------------------------------------------------


def test_an_error_reaches_the_thread_that_listens(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    streamer = TextIteratorStreamer(processor, skip_prompt=True, timeout=30)
    failed: list[BaseException] = []

    def work(ids: torch.Tensor, kwargs: dict[str, Any]) -> None:
        try:
            model.generate(ids, streamer=streamer, **kwargs)
        except (InvalidArgument, TypeError) as error:
            failed.append(error)

    fine = torch.full((1, 6), 5)
    for ids, kwargs, kind in (
        (fine, {"max_new_token": 5}, TypeError),
        (fine, {"attention_mask": fine * 0}, InvalidArgument),
        (fine.repeat(2, 1), {}, InvalidArgument),
    ):
        thread = Thread(target=work, args=(ids, kwargs))
        thread.start()
        with pytest.raises(kind):
            list(streamer)
        thread.join()
        assert isinstance(failed.pop(), kind)
    model.generate(fine, streamer=streamer, max_new_tokens=5)  # and goes on as if nothing was
    alone = TextIteratorStreamer(processor, skip_prompt=True)
    model.generate(fine, streamer=alone, max_new_tokens=5)
    assert list(streamer) == list(alone) != []


def test_waiting_ends(processor: LlavaProcessor) -> None:
    streamer = TextIteratorStreamer(processor, timeout=0.01)
    with pytest.raises(Empty):
        next(streamer)


def test_a_streamer_serves_again(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    streamer = TextIteratorStreamer(processor, skip_prompt=True)
    heard = []
    for _ in range(2):
        model.generate(torch.tensor([[60, 61]]), streamer=streamer, max_new_tokens=5)
        heard.append("".join(streamer))
    assert heard[0] == heard[1] != ""


def test_what_streamers_refuse(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    streamer = TextStreamer(processor)
    with pytest.raises(InvalidArgument, match="one request at a time, got 2"):
        streamer.put(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(InvalidArgument, match="one request, num_beams=1"):
        model.generate(torch.ones(2, 3, dtype=torch.int64), streamer=streamer)
    with pytest.raises(InvalidArgument, match="num_beams=1"):
        model.generate(torch.ones(1, 3, dtype=torch.int64), streamer=streamer, num_beams=2)
    with pytest.raises(TypeError, match="did you mean 'skip_special_tokens'"):
        TextStreamer(processor, skip_specials_tokens=True)
    TextStreamer(processor, clean_up_tokenization_spaces=False)
    with pytest.raises(InvalidArgument, match="set it on the tokenizer"):
        TextStreamer(processor, clean_up_tokenization_spaces=True)


def test_max_length_counts_media_once_where_they_alone_exceed_it(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    inputs = processor(tiny.pictures(2), "<image><image>why?", return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    text = length - 2 * tiny.FRAME_TOKENS
    options = {"eos_token_id": [], "do_sample": False}
    assert model.generate(**inputs, max_length=length + 3, **options).shape[1] == length + 3
    assert model.generate(**inputs, max_length=text + 2 + 4, **options).shape[1] == length + 4
    with pytest.raises(InvalidArgument, match="leaves nothing"):
        model.generate(**inputs, max_length=text + 2, **options)


def test_none_switches_off_what_the_file_says() -> None:
    file = {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1}
    options = {"prompt_length": 3, "eos": None}
    kept = read_call({"max_new_tokens": 5}, file, **options).params
    assert (kept.temperature, kept.top_k, kept.repetition_penalty) == (0.7, 20, 1.1)
    call = {"max_new_tokens": None, "top_k": None, "repetition_penalty": None}
    off = read_call(call, file, **options).params
    assert (off.temperature, off.top_k, off.repetition_penalty) == (0.7, 0, 1.0)
    greedy = {"do_sample": False, "temperature": None, "repetition_penalty": None}
    assert read_call(greedy, file, **options).params.temperature == 0
