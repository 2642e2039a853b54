"""The keywords of `generate`, over a generation_config.json -> SamplingParams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vidlm.errors import InvalidArgument, unknown_keyword
from vidlm.text import Tokenizer
from vidlm.types import SamplingParams, checked

# Keywords with a meaning, and what each is when neither the caller nor the checkpoint says.
DEFAULTS: Mapping[str, Any] = {
    "max_new_tokens": None,
    "max_length": None,
    "min_new_tokens": None,
    "do_sample": None,
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "min_p": None,
    "repetition_penalty": None,
    "seed": None,
    "stop_strings": None,
    "num_beams": None,
    "num_return_sequences": None,
    "length_penalty": None,
    "early_stopping": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ALIASES = {"stop": "stop_strings"}
NEW_TOKENS = 256  # when nobody says: long enough for an answer, short of a run-away
SAMPLED_TOP_K = 50  # transformers' own default once do_sample is on
STRINGS = tuple[str, ...]
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
# What may stand beside do_sample=False: values that mean no sampling, or sampling unfiltered.
NEUTRAL = {"temperature": (0, 1), "top_k": (0,), "top_p": (1,), "min_p": (0,)}
# What a call's None means for these, as in transformers: not to use them.
OFF = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
# Accepted with this value alone: it names what happens anyway.
FIXED: Mapping[str, Any] = {
    "use_cache": True,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_attentions": False,
    "output_hidden_states": False,
}


@dataclass(frozen=True)
class GenerateCall:
    """One call of generate, understood: how to sample, and the token to fill short rows with."""

    params: SamplingParams
    pad_token_id: int


def read_call(
    kwargs: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    prompt_length: int,
    written: int | None = None,
    eos: int | tuple[int, ...] | None,
) -> GenerateCall:
    """Merge a call's keywords over a checkpoint's generation_config.json.

    Sampling is on with do_sample=True, and also where the call gives temperature, top_k, top_p or
    min_p without a do_sample: asking for a temperature and getting greedy answers helps nobody.
    A penalty or filter given as None is off, whatever the file says; of other keywords None means
    that nothing was said.
    `written` is the length of a prompt in which every image and video is one token; see
    _new_tokens.
    """
    given = {ALIASES.get(name, name): value for name, value in kwargs.items() if value is not None}
    for name, value in list(given.items()):
        if name in FIXED:
            if value != FIXED[name]:
                raise InvalidArgument(f"{name}={value!r} is not supported; only {FIXED[name]!r} is")
            del given[name]
        elif name not in DEFAULTS:
            raise unknown_keyword("generate()", name, (*DEFAULTS, *ALIASES, *FIXED, "streamer"))
    off = {name: kwargs[name] for name in OFF if kwargs.get(name, name) is None}
    known = {k: v for k, v in defaults.items() if k in DEFAULTS and v is not None}
    base = {k: v for k, v in known.items() if k not in off}
    sample = _samples(given, base)
    merged = {**DEFAULTS, **base, **{name: OFF[name] for name in off}, **given}
    ends = _ids(merged["eos_token_id"] if merged["eos_token_id"] is not None else eos)
    params = SamplingParams(
        max_new_tokens=_new_tokens(given, base, prompt_length, written),
        min_new_tokens=merged["min_new_tokens"] or 0,
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


def stop_tokenizer(
    params: SamplingParams, given: Tokenizer | None, own: Tokenizer | None
) -> Tokenizer | None:
    """The tokenizer to watch stop strings with: the call's, else the checkpoint's own."""
    return (given or own) if params.stop else None


def _samples(given: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    if "do_sample" in given:
        chosen = sorted(
            name for name in SAMPLING if name in given and given[name] not in NEUTRAL[name]
        )
        if not given["do_sample"] and chosen:
            raise InvalidArgument(
                f"do_sample=False with {', '.join(chosen)}, which only sampling uses; leave one out"
            )
        return bool(given["do_sample"])
    if given.get("temperature") == 0:
        return False
    return bool(base.get("do_sample")) or any(name in given for name in SAMPLING)


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
    temperature = checked("temperature", _or(merged["temperature"], 1.0), float)
    if temperature <= 0:
        raise InvalidArgument(
            f"temperature={temperature} with do_sample=True; allowed: above 0, or do_sample=False"
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
            count: int = checked("max_new_tokens", source["max_new_tokens"], int)
            return count
        if "max_length" in source:
            longest: int = checked("max_length", source["max_length"], int)
            room = longest - prompt_length
            if room < 1 and written is not None:
                room = longest - written
            if room < 1:
                raise InvalidArgument(
                    f"max_length={source['max_length']} leaves nothing after a prompt of "
                    f"{prompt_length} tokens; use max_new_tokens, which does not count the prompt"
                )
            return room
    return NEW_TOKENS


def _ids(eos: Any) -> tuple[int, ...]:
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)


def _strings(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings: tuple[str, ...] = checked("stop", (stop,) if isinstance(stop, str) else stop, STRINGS)
    return strings


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
