"""What a saved video says of itself: the JSON beside its tensors, checked field by field.

The file may come from anybody. Nothing of it is used before its type, its range and its names are
known to be right; what is wrong raises ValueError with the field's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from vidlm.engine.options import KV_DTYPES
from vidlm.hf import VIDEO_OPTIONS
from vidlm.types import FrameRef

MAX_ITEMS = 1 << 20  # frames, media, warnings: more than any context has room for
LATEST = 1e9  # seconds, of a frame
LONGEST = 200  # characters of what identifies a model
LARGEST = 1 << 62  # of whole numbers
# C0, C1, ends of lines and of paragraphs, changes of direction, lone surrogates
CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


@dataclass(frozen=True)
class Identity:
    """What made an index, all of which must agree with the model that uses it."""

    model_type: str
    dtype: str
    config: str  # a digest of it: what is not in the weights, rope's base for one
    weights: str  # their fingerprint
    exact: bool  # whether its engine is exact, which needs what an exact one made
    kv_dtype: str | None = None  # of keys and values, as EngineOptions has it
    scheme: str | None = None  # how weights are packed, or their dtype; None: a file says neither


@dataclass(frozen=True)
class Index:
    """What is said in an index of the video and of the prompt up to the question."""

    identity: Identity
    name: str
    frames: tuple[FrameRef, ...]
    warnings: tuple[str, ...]
    parts: tuple[dict[str, Any], ...]
    sampling: Mapping[str, Any]
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Stated:
    """An index, the states of its media, and of how many layers it has keys and values."""

    index: Index
    media: tuple[Mapping[str, Any], ...]
    layers: int


NAMES = (*(f.name for f in fields(Index)), "media", "layers")


def parse_index(text: str) -> Stated:
    """The JSON of an index. Raises ValueError, naming the field, where it is not one."""
    try:
        told = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("its JSON is nested too deep") from None
    _keys("the index", told, NAMES)
    index = Index(
        identity=_identity(told["identity"]),
        name=_text("name", told["name"]),
        frames=tuple(_frame(i, x) for i, x in enumerate(_list("frames", told["frames"]))),
        warnings=tuple(_text("warnings", x) for x in _list("warnings", told["warnings"])),
        parts=tuple(_part(x) for x in _list("parts", told["parts"])),
        sampling=_sampling(told["sampling"]),
        prompt=tuple(_whole("prompt", x, -LARGEST) for x in _list("prompt", told["prompt"])),
    )
    media = tuple(_state(i, x) for i, x in enumerate(_list("media", told["media"])))
    if [part["type"] for part in index.parts] != [x["fields"].get("kind") for x in media]:
        raise ValueError("its parts are not those of its media")
    if not media:
        raise ValueError("it has no media")
    return Stated(index, media, _whole("layers", told["layers"]))


def printable(text: str) -> str:
    """Text that moves no cursor of a terminal: control characters are written as escapes."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def _identity(told: Any) -> Identity:
    optional = ("kv_dtype", "scheme")
    required = [f.name for f in fields(Identity) if f.name not in optional]
    _keys("identity", told, required, optional)
    for name in ("model_type", "dtype", "config", "weights"):
        _text(f"identity.{name}", told[name], LONGEST)
    if not isinstance(told["exact"], bool):
        raise ValueError(f"identity.exact is {_shown(told['exact'])}")
    if told.get("kv_dtype") not in KV_DTYPES:
        raise ValueError(f"identity.kv_dtype is {_shown(told['kv_dtype'])}")
    if told.get("scheme") is not None:
        _text("identity.scheme", told["scheme"], LONGEST)
    return Identity(**told)


def _frame(number: int, told: Any) -> FrameRef:
    name = f"frames[{number}]"
    _keys(name, told, [f.name for f in fields(FrameRef)])
    media, index = (_whole(f"{name}.{key}", told[key]) for key in ("media", "index"))
    return FrameRef(media, index, float(_number(f"{name}.pts", told["pts"])))


def _part(told: Any) -> dict[str, Any]:
    """A part of a message that stands for an item of media, and says nothing else."""
    _keys("parts", told, ("type",))
    if told["type"] not in ("image", "video"):
        raise ValueError(f"parts: type is {_shown(told['type'])}")
    return dict(told)


def _state(number: int, told: Any) -> Mapping[str, Any]:
    _keys(f"media[{number}]", told, ("class", "digest", "fields"))
    _text(f"media[{number}].class", told["class"])
    if not isinstance(told["fields"], dict):
        raise ValueError(f"media[{number}].fields is {_shown(told['fields'])}")
    return dict(told)


def _sampling(told: Any) -> Mapping[str, Any]:
    _keys("sampling", told, (), VIDEO_OPTIONS)
    for name, value in told.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str):
                _text(f"sampling.{name}", each)
            else:
                _number(f"sampling.{name}", each)
    return dict(told)


# ---- values --------------------------------------------------------------------------------------


def _keys(name: str, told: Any, required: Any, optional: Any = ()) -> None:
    if not isinstance(told, dict):
        raise ValueError(f"{name} is {_shown(told)}")
    missing, more = set(required) - told.keys(), told.keys() - {*required, *optional}
    if missing or more:
        listed = ascii(sorted(missing or more)[:5])[:200]
        raise ValueError(f"{name} {'lacks' if missing else 'has the unknown'} {listed}")


def _list(name: str, told: Any) -> list[Any]:
    if not isinstance(told, list):
        raise ValueError(f"{name} is {_shown(told)}")
    if len(told) > MAX_ITEMS:
        raise ValueError(f"{name} has {len(told)} items; allowed are {MAX_ITEMS}")
    return told


def _text(name: str, told: Any, most: int | None = None) -> str:
    if not isinstance(told, str):
        raise ValueError(f"{name} is {_shown(told)}")
    if most is not None and len(told) > most:
        raise ValueError(f"{name} has {len(told)} characters")
    if CONTROL.search(told):
        raise ValueError(f"{name} has control characters: {_shown(told)}")
    return told


def _whole(name: str, told: Any, least: int = 0) -> int:
    if type(told) is not int or not least <= told <= LARGEST:
        raise ValueError(f"{name} is {_shown(told)}")
    return told


def _number(name: str, told: Any) -> float:
    # A comparison, unlike a conversion to float, knows integers of any size; NaN fails it.
    if type(told) not in (int, float) or not -LATEST <= told <= LATEST:
        raise ValueError(f"{name} is {_shown(told)}")
    number: float = told
    return number


def _shown(told: Any) -> str:
    """A value in a message, cut short: it may be as long as the file."""
    if isinstance(told, int) and abs(told) > LARGEST:
        return "a number of too many digits"
    plain = told is None or isinstance(told, str | int | float)
    return ascii(told)[:80] if plain else type(told).__name__


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice in its JSON")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
