"""The keywords of `generate`, over a generation_config.json -> SamplingParams."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from types import MappingProxyType
from typing import Any

from vidlm.errors import InvalidArgument, unknown_keyword
from vidlm.types import GREEDY_BELOW, SamplingParams, checked

log = logging.getLogger(__name__)
# Keywords with a meaning; all may be left out.
KEYWORDS = (
    *("max_new_tokens", "max_length", "min_new_tokens", "min_length", "do_sample", "temperature"),
    *("top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop_strings", "num_beams"),
    *("num_return_sequences", "length_penalty", "early_stopping", "eos_token_id", "pad_token_id"),
)
ALIASES = MappingProxyType({"stop": "stop_strings"})
NEW_TOKENS = 256  # when nobody says: long enough for an answer, short of a run-away
SAMPLED_TOP_K = 50  # transformers' own default once do_sample is on
STRINGS = tuple[str, ...]
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
# What may stand beside greedy decoding without a word: no sampling, or transformers' defaults.
NEUTRAL = MappingProxyType(
    {"temperature": (0, 1), "top_k": (0, SAMPLED_TOP_K), "top_p": (1,), "min_p": (0,)}
)
# What a call's None means for these, as in transformers: not to use them.
OFF = MappingProxyType(
    {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
)
# Accepted in a call with this value alone: it names what happens anyway.
FIXED = MappingProxyType(
    {
        "use_cache": True,
        "return_dict_in_generate": False,
        "output_scores": False,
        "output_attentions": False,
        "output_hidden_states": False,
        "output_logits": False,
    }
)
# Of transformers' GenerationConfig: what changes answers and is not here. Each with its values,
# beside None, that change nothing; any other value is refused, in a call and in a file.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "no_repeat_ngram_size": (0,),
        "encoder_no_repeat_ngram_size": (0,),
        "encoder_repetition_penalty": (1,),
        "exponential_decay_length_penalty": (),
        "bad_words_ids": ([],),
        "suppress_tokens": ([],),
        "begin_suppress_tokens": ([],),
        "forced_bos_token_id": (),
        "forced_eos_token_id": (),
        "force_words_ids": ([],),
        "constraints": ([],),
        "sequence_bias": ([], {}),
        "guidance_scale": (1,),
        "watermarking_config": (),
        "penalty_alpha": (0,),
        "dola_layers": (),
        "num_beam_groups": (1,),
        "diversity_penalty": (0,),
        "renormalize_logits": (False,),
        "remove_invalid_values": (False,),
        "token_healing": (False,),
        "cache_implementation": ("dynamic", "static", "offloaded", "sliding_window", "hybrid"),
        "max_time": (),
        "assistant_ensemble_weight": (),
        "return_dict_in_generate": (False,),
        "typical_p": (1,),
        "top_h": (),
        "epsilon_cutoff": (0,),
        "eta_cutoff": (0,),
    }
)
ONLY_SAMPLED = ("typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")  # greedy decoding has no use
# Of GenerationConfig, too: what changes how answers are computed elsewhere, and no answer.
INDIFFERENT = (
    *("use_cache", "cache_config", "max_cache_len", "low_memory"),
    *("compile_config", "disable_compile", "prefill_chunk_size", "continuous_batching_config"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "use_mtp"),
    *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind"),
    *("target_lookbehind", "prompt_lookup_num_tokens", "max_matching_ngram_size"),
    *("speculation_type", "bos_token_id", "decoder_start_token_id", "transformers_version"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    "_from_model_config",
)
WHOLE = (
    *("max_new_tokens", "max_length", "min_new_tokens", "min_length", "top_k", "seed"),
    *("num_beams", "num_return_sequences", "pad_token_id"),
)
REAL = ("temperature", "top_p", "min_p", "repetition_penalty", "length_penalty")


@dataclass(frozen=True)
class GenerateCall:
    """One call of generate, understood: how to sample, and the token to fill short rows with."""

    params: SamplingParams
    pad_token_id: int


def generation_keywords(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's keywords under one name each; raises TypeError on an unknown one, InvalidArgument
    on one with a value that is not supported."""
    given: dict[str, Any] = {}
    for alias, value in kwargs.items():
        name = ALIASES.get(alias, alias)
        if name == "past_key_values" and value is not None:
            raise InvalidArgument(
                "generate takes no past_key_values: it reads the whole prompt, media included, and "
                "caches within the call; leave it out, or ask vidlm.load(...), whose engine finds "
                "a prompt's beginning again"
            )
        if name in FIXED and value not in (None, FIXED[name]):
            raise InvalidArgument(f"{name}={value!r} is not supported; only {FIXED[name]!r} is")
        if name in UNSUPPORTED and not _neutral(name, value):
            allowed = " or ".join(map(repr, (*UNSUPPORTED[name], None)))
            raise InvalidArgument(f"{name}={value!r} is not supported; only {allowed} is")
        if name not in (*KEYWORDS, *FIXED, *UNSUPPORTED, *INDIFFERENT, "past_key_values"):
            known = (*KEYWORDS, *ALIASES, *FIXED, "streamer", "tokenizer", "generation_config")
            raise unknown_keyword("generate()", alias, known)
        if name in given:
            raise InvalidArgument(f"{alias} and {name} are one keyword; give one of them")
        given[name] = value
    return given


def given_config(generation_config: Any) -> dict[str, Any]:
    """The argument `generation_config`, a mapping or transformers' GenerationConfig; raises
    TypeError on an unknown name."""
    if generation_config is None:
        return {}
    for method in ("to_diff_dict", "to_dict"):
        if hasattr(generation_config, method):
            generation_config = getattr(generation_config, method)()
            break
    if not isinstance(generation_config, Mapping):
        raise InvalidArgument(
            f"generation_config={generation_config!r}; give a dict of generate's keywords, or a "
            "GenerationConfig of transformers"
        )
    for name in generation_config:
        if name not in (*KEYWORDS, *UNSUPPORTED, *INDIFFERENT):
            raise unknown_keyword("generation_config", name, KEYWORDS)
    return dict(generation_config)


def read_call(
    kwargs: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    prompt_length: int,
    written: int | None = None,
    eos: int | tuple[int, ...] | None,
    implied_sampling: bool = True,
) -> GenerateCall:
    """Merge a call's keywords over a checkpoint's generation_config.json.

    Sampling is on with do_sample=True. `implied_sampling`, which `ask` has: also where the call
    gives temperature, top_k, top_p or min_p; without it, as in transformers, the call is greedy
    and a warning is logged.
    A penalty or filter given as None is off, whatever the file says; of other keywords None means
    that nothing was said.
    `written` is the length of a prompt in which every image and video is one token; see
    _new_tokens.
    """
    said = generation_keywords(kwargs)
    given = {name: v for name, v in said.items() if name in KEYWORDS and v is not None}
    off = {name: value for name, value in OFF.items() if said.get(name, name) is None}
    known = {k: v for k, v in defaults.items() if k in KEYWORDS and v is not None}
    base = {k: v for k, v in known.items() if k not in off}
    merged = _checked({**dict.fromkeys(KEYWORDS), **base, **off, **given})
    sample = _samples(given, base, implied_sampling)
    _check_file({k: v for k, v in defaults.items() if k not in said}, sample)
    ends = _ids(merged["eos_token_id"] if merged["eos_token_id"] is not None else eos)
    params = SamplingParams(
        max_new_tokens=_new_tokens(given, base, prompt_length, written),
        min_new_tokens=_least_tokens(given, base, prompt_length),
        repetition_penalty=_or(merged["repetition_penalty"], 1.0),
        seed=merged["seed"],
        stop=_strings(merged["stop_strings"]),
        eos_token_ids=ends,
        num_beams=_or(merged["num_beams"], 1),
        n=_choices(merged, sample),
        length_penalty=_or(merged["length_penalty"], 1.0),
        early_stopping=_or(merged["early_stopping"], False),
        **(_filters(merged) if sample else {}),
    )
    pad = merged["pad_token_id"]
    return GenerateCall(params, pad if pad is not None else (ends[0] if ends else 0))


def _neutral(name: str, value: Any) -> bool:
    """Whether a keyword of UNSUPPORTED has a value that changes nothing."""
    value = list(value) if isinstance(value, tuple) else value
    return value is None or any(type(value) is type(x) and value == x for x in _same(name))


def _same(name: str) -> list[Any]:
    """The neutral values of a keyword, numbers as an int and as a float."""
    values = list(UNSUPPORTED[name])
    return values + [float(x) for x in values if isinstance(x, int) and not isinstance(x, bool)]


def _check_file(defaults: Mapping[str, Any], sample: bool) -> None:
    """Raise InvalidArgument where a checkpoint's defaults ask for what is not supported."""
    for name, value in defaults.items():
        unused = name in ONLY_SAMPLED and not sample
        if name in UNSUPPORTED and not unused and not _neutral(name, value):
            off = next(iter(UNSUPPORTED[name]), None)
            raise InvalidArgument(
                f"generation_config (the checkpoint's file or the argument) has {name}={value!r}, "
                f"which changes answers and is not supported; generate({name}={off!r}) goes "
                f"without, and so does the model after model.generation_config.pop({name!r}), or "
                "with the key deleted from generation_config.json"
            )


def _checked(merged: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keywords with Python's own numbers; raises InvalidArgument on other types."""
    values = dict(merged)
    kinds = {**dict.fromkeys(WHOLE, int | None), **dict.fromkeys(REAL, float | None)}
    for name, kind in {**kinds, "do_sample": bool | None}.items():
        values[name] = checked(name, merged[name], kind)
    if merged["early_stopping"] not in (None, True, False, "never"):
        raise InvalidArgument(
            f"early_stopping={merged['early_stopping']!r}; allowed: True, False, 'never'"
        )
    return values


def _whole(name: str, value: Any) -> int:
    return int(checked(name, value, int))


def _samples(given: Mapping[str, Any], base: Mapping[str, Any], implied: bool) -> bool:
    if given.get("do_sample") is None and _no_temperature(given.get("temperature")):
        return False
    asked = [name for name in SAMPLING if name in given]
    sample = bool(given.get("do_sample", base.get("do_sample")))
    if implied and "do_sample" not in given:
        return sample or bool(asked)
    chosen = [name for name in asked if given[name] not in NEUTRAL[name]]
    if chosen and not sample:
        log.warning(
            "%s without do_sample=True: only sampling uses what is named here; the answer is the "
            "likeliest, as in transformers",
            ", ".join(f"{name}={given[name]!r}" for name in chosen),
        )
    return sample


def _no_temperature(value: Any) -> bool:
    """Whether a temperature means greedy."""
    return isinstance(value, int | float) and 0 <= value < GREEDY_BELOW


def _choices(merged: Mapping[str, Any], sample: bool) -> int:
    """Answers to one prompt. Without a draw all of them would be the same."""
    n = checked("num_return_sequences", _or(merged["num_return_sequences"], 1), int)
    beams = checked("num_beams", _or(merged["num_beams"], 1), int)
    if n > 1 and beams > 1:
        raise InvalidArgument(
            f"num_return_sequences={n} with num_beams={beams}: beams give their best answer alone; "
            "use num_beams=1 with do_sample=True"
        )
    if n > 1 and not sample:
        raise InvalidArgument(
            f"num_return_sequences={n} without sampling, which would give the same answer each "
            "time; add do_sample=True"
        )
    if n < 1:
        raise InvalidArgument(f"num_return_sequences={n}; allowed: at least 1")
    return n


def _filters(merged: Mapping[str, Any]) -> dict[str, Any]:
    temperature = _or(merged["temperature"], 1.0)
    if not 0 < temperature < inf:
        raise InvalidArgument(
            f"temperature={temperature} with do_sample=True; allowed: a finite number above 0, "
            "or do_sample=False"
        )
    return {
        "temperature": float(temperature),
        "top_k": _or(merged["top_k"], SAMPLED_TOP_K),
        "top_p": _or(merged["top_p"], 1.0),
        "min_p": _or(merged["min_p"], 0.0),
    }


def _new_tokens(
    given: Mapping[str, Any], base: Mapping[str, Any], prompt_length: int, written: int | None
) -> int:
    """max_new_tokens wins over max_length, which counts the prompt; the call wins over the file.

    Where media alone exceed max_length, each image and video counts as the one token that was
    written for it: so transformers counted when it put media in place inside the model, and the
    models' pages say max_length=50 to that day's answers.
    """
    for source in (given, base):
        if "max_new_tokens" in source:
            return _whole("max_new_tokens", source["max_new_tokens"])
        if "max_length" in source:
            length = _whole("max_length", source["max_length"])
            room = length - prompt_length
            if room < 1 and written is not None:
                room = length - written
            if room < 1:
                raise InvalidArgument(
                    f"max_length={source['max_length']} leaves nothing after a prompt of "
                    f"{prompt_length} tokens; use max_new_tokens, which does not count the prompt"
                )
            return room
    return NEW_TOKENS


def _least_tokens(given: Mapping[str, Any], base: Mapping[str, Any], prompt_length: int) -> int:
    """min_new_tokens wins over min_length, which counts the prompt; the call wins over the file."""
    for source in (given, base):
        if "min_new_tokens" in source:
            return _whole("min_new_tokens", source["min_new_tokens"])
        if "min_length" in source:
            return max(_whole("min_length", source["min_length"]) - prompt_length, 0)
    return 0


def _ids(eos: Any) -> tuple[int, ...]:
    if eos is None:
        return ()
    if hasattr(eos, "tolist"):
        eos = eos.tolist()
    each = eos if isinstance(eos, Sequence) and not isinstance(eos, str) else [eos]
    return tuple(_whole("eos_token_id", id) for id in each)


def _strings(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings: tuple[str, ...] = checked("stop", (stop,) if isinstance(stop, str) else stop, STRINGS)
    return strings


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
