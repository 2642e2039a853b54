"""generation_config.json and GenerationConfig: every key acts, changes nothing, or is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from oracle import transformers
from vidlm import LlavaForConditionalGeneration
from vidlm.errors import InvalidArgument
from vidlm.hf.generation import (
    FIXED,
    INDIFFERENT,
    KEYWORDS,
    ONLY_SAMPLED,
    UNSUPPORTED,
    given_config,
    read_call,
)

IDS = torch.tensor([[30, 31, 30, 31, 30, 31]])
GREEDY = {"max_new_tokens": 12, "eos_token_id": []}

# Values with which transformers answers otherwise than without.
CHANGING: dict[str, Any] = {
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.5,
    "exponential_decay_length_penalty": [3, 1.5],
    "bad_words_ids": [[30]],
    "suppress_tokens": [30],
    "begin_suppress_tokens": [30],
    "forced_bos_token_id": 4,
    "forced_eos_token_id": 2,
    "force_words_ids": [[30]],
    "constraints": ["a constraint"],
    "sequence_bias": [[[30], -10.0]],
    "guidance_scale": 1.5,
    "watermarking_config": {"bias": 2.0},
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "token_healing": True,
    "cache_implementation": "quantized",
    "max_time": 1.0,
    "assistant_ensemble_weight": 0.5,
    "return_dict_in_generate": True,
    "typical_p": 0.5,
    "top_h": 0.5,
    "epsilon_cutoff": 0.001,
    "eta_cutoff": 0.001,
}


def read(kwargs: dict[str, Any], file: dict[str, Any] | None = None, **how: Any) -> Any:
    options = {"prompt_length": 6, "eos": 2, "implied_sampling": False, **how}
    return read_call(kwargs, file or {}, **options).params


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(folder: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(folder)


def test_every_key_is_known() -> None:
    keys = set(transformers.GenerationConfig().to_dict())
    assert keys - {*KEYWORDS, *UNSUPPORTED, *INDIFFERENT} == set()
    assert not set(KEYWORDS) & {*UNSUPPORTED, *INDIFFERENT}
    assert set(CHANGING) == set(UNSUPPORTED)


@pytest.mark.parametrize("name", list(UNSUPPORTED))
def test_what_changes_answers_is_refused(name: str) -> None:
    value = CHANGING[name]
    how = {"do_sample": True} if name in ONLY_SAMPLED else {}
    with pytest.raises(InvalidArgument, match=rf"has {name}=.*generate\({name}=.*pop\('{name}'\)"):
        read(how, {name: value})
    with pytest.raises(InvalidArgument, match=rf"{name}=.* is not supported; only"):
        read({**how, name: value})
    for neutral in (None, *UNSUPPORTED[name]):
        assert read({}, {name: neutral}) == read({name: neutral}) == read({})
        assert read({name: neutral}, {name: value}) == read({})  # the call wins over the file
    if name in ONLY_SAMPLED:
        assert read({}, {name: value}) == read({})


def test_neutral_numbers_of_either_kind() -> None:
    for file in ({"typical_p": 1.0}, {"guidance_scale": 1}, {"diversity_penalty": 0.0}):
        assert read({"do_sample": True}, file) == read({"do_sample": True})
    assert read({}, {"bad_words_ids": [], "suppress_tokens": (), "no_repeat_ngram_size": 0})


def test_what_transformers_itself_writes_is_read() -> None:
    """The defaults of its class, in the old form, in which every key has a value, and the new."""
    config = transformers.GenerationConfig()
    old = {**config.to_dict(), **config._get_default_generation_params(), "max_length": 30}
    read_old = read({"do_sample": None}, old)
    assert (read_old.temperature, read_old.max_new_tokens) == (0.0, 24)
    assert read({}, config.to_dict()) == read({})
    assert read({}, {"my_own_key": 5}) == read({})  # nobody's: transformers keeps it, too


@pytest.mark.parametrize("name", INDIFFERENT)
def test_keys_that_change_no_answer(name: str) -> None:
    assert read({}, {name: 1}) == read({})


@torch.no_grad()
def test_a_file_with_a_changing_key(model: LlavaForConditionalGeneration, tmp_path: Path) -> None:
    plain = model.generate(IDS, **GREEDY)
    model.generation_config["no_repeat_ngram_size"] = 2
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(InvalidArgument, match="no_repeat_ngram_size=2, which changes answers"):
        again.generate(IDS, **GREEDY)
    assert torch.equal(again.generate(IDS, no_repeat_ngram_size=0, **GREEDY), plain)
    config = {"no_repeat_ngram_size": None}
    assert torch.equal(again.generate(IDS, generation_config=config, **GREEDY), plain)
    again.generation_config.pop("no_repeat_ngram_size")
    assert torch.equal(again.generate(IDS, **GREEDY), plain)


# ---- the argument -------------------------------------------------------------------------------


@torch.no_grad()
def test_a_config_of_transformers(model: LlavaForConditionalGeneration) -> None:
    config = transformers.GenerationConfig(max_new_tokens=7, eos_token_id=299, repetition_penalty=2)
    made = model.generate(IDS, generation_config=config)
    how = {"max_new_tokens": 7, "eos_token_id": 299, "repetition_penalty": 2.0}
    assert torch.equal(made, model.generate(IDS, **how))
    assert torch.equal(made, model.generate(IDS, generation_config=how))
    shorter = model.generate(IDS, generation_config=config, max_new_tokens=3)
    assert torch.equal(shorter, made[:, : IDS.shape[1] + 3])
    with pytest.raises(InvalidArgument, match="bad_words_ids"):
        model.generate(IDS, generation_config=transformers.GenerationConfig(bad_words_ids=[[3]]))


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"generation_config.*did you mean 'max_new_tokens'"):
        given_config({"max_new_token": 3})
    with pytest.raises(InvalidArgument, match="generation_config=3; give a dict"):
        given_config(3)
    assert given_config(None) == {}


# ---- sampling has to be asked for ---------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [{"temperature": 0.2}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.1}, {"temperature": 5.0}],
)
@pytest.mark.parametrize("how", [{}, {"do_sample": False}])
@torch.no_grad()
def test_no_sampling_without_do_sample(
    model: LlavaForConditionalGeneration,
    caplog: pytest.LogCaptureFixture,
    given: dict[str, Any],
    how: dict[str, Any],
) -> None:
    greedy = model.generate(IDS, **GREEDY)
    assert not caplog.records
    assert torch.equal(model.generate(IDS, **given, **how, **GREEDY), greedy)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{next(iter(given))}=")


def test_neutral_values_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    neutral = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
    assert read(neutral) == read({"temperature": 0.0}) == read({"temperature": None}) == read({})
    assert read({}, {"temperature": 0.2, "top_p": 0.9}) == read({})  # of a file that is greedy
    assert not caplog.records
    assert read({"temperature": 0.5, "do_sample": True}).temperature == 0.5
    assert read({"temperature": 0.5}, {"do_sample": True}).temperature == 0.5
    assert read({"temperature": 0.5}, implied_sampling=True).temperature == 0.5
    assert not caplog.records


# ---- values of the wrong kind -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("max_new_tokens", "max_length", "min_new_tokens", "min_length", "top_k", "seed"),
        *("num_beams", "num_return_sequences", "pad_token_id", "eos_token_id"),
    ],
)
@pytest.mark.parametrize("value", [2.7, True, "3"])
def test_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"{name}=.*; allowed: a whole number"):
        read({name: value})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"stop": 5}, "stop=5; allowed: a list of texts"),
        ({"stop_strings": ["a", 5]}, "allowed: a list of texts"),
        ({"stop": {"a": 1}}, "allowed: a list of texts"),
        ({"stop": "a", "stop_strings": "b"}, "one keyword"),
        ({"temperature": "0.7", "do_sample": True}, "temperature='0.7'; allowed: a finite number"),
        ({"top_p": [0.5], "do_sample": True}, r"top_p=\[0.5\]; allowed: a finite number"),
        ({"repetition_penalty": True}, "repetition_penalty=True; allowed: a finite number"),
        ({"do_sample": "False"}, "do_sample='False'; allowed: True or False"),
        ({"early_stopping": "now", "num_beams": 2}, "early_stopping='now'; allowed"),
        ({"past_key_values": object()}, "takes no past_key_values: it reads the whole prompt"),
    ],
)
def test_other_values(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        read(given)


def test_numbers_of_other_libraries() -> None:
    made = read({"max_new_tokens": np.int64(3), "temperature": np.float32(0.5), "do_sample": True})
    assert (made.max_new_tokens, made.temperature) == (3, 0.5)
    assert read({"max_new_tokens": torch.tensor(3)}).max_new_tokens == 3
    assert read({"eos_token_id": torch.tensor([4, 5])}).eos_token_ids == (4, 5)
    assert read({"eos_token_id": np.int32(4)}).eos_token_ids == (4,)


def test_min_length_counts_the_prompt() -> None:
    assert read({"min_length": 10}).min_new_tokens == 4
    assert read({"min_length": 3}).min_new_tokens == 0
    assert read({"min_length": 10, "min_new_tokens": 2}).min_new_tokens == 2


def test_errors_come_before_media(model: LlavaForConditionalGeneration) -> None:
    """A prompt whose media lie in the cache of a forward before was told of its placeholders."""
    ids = torch.tensor([[tiny.IMAGE, 30]])
    cache = model(IDS).past_key_values
    with pytest.raises(InvalidArgument, match="past_key_values"):
        model.generate(ids, past_key_values=cache)
    with pytest.raises(TypeError, match="inputs_embeds"):
        model.generate(ids, inputs_embeds=torch.zeros(1, 2, 32))


def test_calls_fix_what_happens_anyway() -> None:
    for name, value in FIXED.items():
        assert read({name: value}) == read({})
