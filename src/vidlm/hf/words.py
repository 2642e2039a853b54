"""The words of preprocessor_config.json as a processor's attributes, and the files with them."""

from __future__ import annotations

import json
import logging
import operator
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from vidlm.errors import InvalidArgument, ModelError, unknown_keyword
from vidlm.files import write_files
from vidlm.hf.features import BatchFeature
from vidlm.hf.loading import find
from vidlm.hub import read_json
from vidlm.media import MediaReader

log = logging.getLogger(__name__)

FIRST, LAST, NONE = "channels_first", "channels_last", "none"
CHOICES: Mapping[str, tuple[str | None, ...]] = {
    "data_format": (FIRST, LAST, None),
    "input_data_format": (FIRST, LAST, NONE, None),
    "return_tensors": ("pt", "np", None),
}
POSITIVE = (
    *("rescale_factor", "patch_size", "temporal_patch_size", "merge_size"),
    *("min_pixels", "max_pixels", "num_frames", "min_frames", "max_frames", "fps"),
)
# Words of real files that change no pixel: frames of one size need no padding, and how they are
# grouped on the way does not show.
IGNORED = (
    *("image_processor_type", "video_processor_type", "feature_extractor_type", "processor_class"),
    *("_valid_processor_keys", "disable_grouping", "do_pad"),
)
# Words that mean something to other processors only; here they may be null or false.
FOREIGN = ("pad_size", "size_divisor", "image_seq_length", "do_center_crop", "crop_size")

PROCESSOR_FILE = "processor_config.json"
LOCATION = ("revision", "local_files_only", "cache_dir", "token")
ACCEPTED = ("trust_remote_code", "use_fast", "backend")  # name what happens anyway

COMMON: Mapping[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "default_to_square": False,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "data_format": FIRST,
    "input_data_format": None,
    "return_tensors": None,
    "device": None,
}


class PixelProcessor:
    """What image and video processors share.

    Every word is an attribute, checked when it is set; the next call obeys it. `reader` reads paths
    and URLs. Any other attribute is an AttributeError: it would have no effect.
    """

    defaults: ClassVar[Mapping[str, Any]]  # every word, and what it means where it is left out
    ignored: ClassVar[tuple[str, ...]] = IGNORED
    fleeting: ClassVar[tuple[str, ...]] = ("return_tensors", "device")  # never written to a file
    files: ClassVar[tuple[str, ...]]  # the first of them that a folder has is read
    kind: ClassVar[tuple[str, str]]  # the word of a file that names its class, and that name
    model_input_names: ClassVar[tuple[str, ...]]

    reader: MediaReader = MediaReader()

    # The words that the code reads here and in the modules above; the others are for `core`.
    data_format: str | None
    device: Any
    do_convert_rgb: bool
    do_rescale: bool
    input_data_format: str | None
    return_tensors: str | None

    def __init__(self, **words: Any) -> None:
        """Takes the words of the class, None meaning the class's own; TypeError on others."""
        for name, value in words.items():
            if name in self.defaults or name in self.ignored:
                continue
            if name not in FOREIGN:
                raise unknown_keyword(type(self).__name__, name, self.defaults)
            if value is not None and value is not False:
                raise InvalidArgument(
                    f"{name}={value!r} means nothing to {type(self).__name__}; leave it out"
                )
        for name, default in self.defaults.items():  # default_to_square before the sizes
            value = words.get(name)
            setattr(self, name, deepcopy(default) if value is None else value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.defaults:
            value = self._checked(name, value)
        elif name != "reader":
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r} to set; allowed: "
                f"{', '.join((*self.defaults, 'reader'))}"
            )
        super().__setattr__(name, value)

    def _checked(self, name: str, value: Any) -> Any:
        """A word's value in its usual form. None is off for a switch, that of the input for
        data_format, and the class's own for other words."""
        if value is not None:
            square = name == "crop_size" or bool(getattr(self, "default_to_square", False))
            return _word(name, value, square)
        if name.startswith("do_"):
            return False
        return None if name == "data_format" else deepcopy(self.defaults[name])

    @classmethod
    def of(cls, core: Any) -> Self:
        """The processor whose core this is."""
        words = cls.adapted(core.to_dict())
        return cls(**{name: value for name, value in words.items() if name in cls.defaults})

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.to_dict(), indent=2)}"

    @property
    def words(self) -> dict[str, Any]:
        """Every word of the class as it stands now."""
        return {name: getattr(self, name) for name in self.defaults}

    def to_dict(self) -> dict[str, Any]:
        """The content of a file that vidlm and transformers both read."""
        kept = {k: v for k, v in self.words.items() if v is not None and k not in self.fleeting}
        return {**deepcopy(kept), self.kind[0]: self.kind[1]}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write preprocessor_config.json, or video_preprocessor_config.json, into a folder."""
        write_files(folder, {self.files[0]: json.dumps(self.to_dict(), indent=2) + "\n"})

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> Self:
        """Read the file of a folder or hub repository; keywords that are words replace its own.

        Others are revision, local_files_only, cache_dir and token; TypeError on unknown ones.
        """
        location = {key: kwargs.pop(key) for key in LOCATION if key in kwargs}
        words = {key: value for key, value in kwargs.items() if key not in ACCEPTED}
        folder = find(name, **{key: v for key, v in location.items() if v is not None})
        return cls(**{**cls.read(folder), **words})

    @classmethod
    def read(cls, folder: Path) -> dict[str, Any]:
        """The words of a folder's file; where it has others, a warning with them is logged."""
        path = folder / PROCESSOR_FILE
        block = cls.kind[0].removesuffix("_type")  # transformers 5 nests it in there
        words = (read_json(path).get(block) if path.is_file() else None) or {}
        if not words:
            found = [folder / file for file in cls.files if (folder / file).is_file()]
            if not found:
                raise ModelError(
                    f"{folder} has no {' or '.join(cls.files)}; pass the folder or repository of a "
                    f"checkpoint that has, or call {cls.__name__}() with words"
                )
            words = read_json(found[0])
        words = cls.adapted(words)
        strange = {k for k in words if k not in cls.defaults and k not in cls.ignored}
        said = sorted(key for key in strange if words[key] not in (None, False))
        if said:
            log.warning("%s: %s: without meaning to %s", folder, ", ".join(said), cls.__name__)
        # A switch that is null is off: so transformers reads its files.
        off = {k: False for k, v in words.items() if v is None and k.startswith("do_")}
        return {key: value for key, value in {**words, **off}.items() if key not in strange}

    @classmethod
    def adapted(cls, words: Mapping[str, Any]) -> Mapping[str, Any]:
        """The words of a file in those of the class."""
        return words

    def changed(self, overrides: Mapping[str, Any]) -> Self:
        """This processor with the words of one call, None meaning its own."""
        if not overrides:
            return self
        given = {key: value for key, value in overrides.items() if value is not None}
        made = type(self)(**{**self.words, **given})
        made.reader = self.reader
        if "data_format" in overrides and overrides["data_format"] is None:
            made.data_format = None  # that of the input
        return made

    def output(self, **entries: Tensor | Sequence[Tensor]) -> BatchFeature:
        """Tensors, and lists with one for each item, in the form that return_tensors says."""
        features = BatchFeature()
        for name, value in entries.items():
            if isinstance(value, Tensor):
                features[name] = value if self.return_tensors == "pt" else value.numpy()
            elif self.return_tensors is None:
                features[name] = [np.ascontiguousarray(item.numpy()) for item in value]
            else:
                stacked = as_one(name, value)
                features[name] = stacked if self.return_tensors == "pt" else stacked.numpy()
        return features if self.device is None else features.to(self.device)


def choice(name: str, value: Any) -> str | None:
    """A word that has a few values; also as an enum with these values."""
    plain: str | None = getattr(value, "value", value)
    if plain not in CHOICES[name]:
        raise InvalidArgument(f"{name}={value!r}; allowed: {CHOICES[name]}")
    return plain


def _word(name: str, value: Any, square: bool) -> Any:
    """A word's value in its usual form; raises InvalidArgument on one that cannot be meant."""
    if name in CHOICES:
        return choice(name, value)
    if name.startswith("do_") and not isinstance(value, bool | np.bool_):
        raise InvalidArgument(f"{name}={value!r}; give True or False")
    if name in ("size", "crop_size"):
        return _size(name, value, square)
    if name in ("image_mean", "image_std"):
        values = [value] * 3 if isinstance(value, int | float) else list(value)
        if len(values) != 3:
            raise InvalidArgument(f"{name}={value!r}; give a number, or three for R, G and B")
        return [float(each) for each in values]
    if name in POSITIVE and not (isinstance(value, int | float) and value > 0):
        raise InvalidArgument(f"{name}={value!r}; give a number above 0")
    return int(value) if name == "resample" else value


def _size(name: str, value: Any, square: bool) -> dict[str, int]:
    """A size as a mapping; a number is a square or the shortest edge, a pair height and width."""
    if isinstance(value, int):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    elif isinstance(value, list | tuple) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    try:
        sides = {side: operator.index(pixels) for side, pixels in value.items()}
    except (AttributeError, TypeError):
        sides = {}
    if not sides or min(sides.values()) < 1:
        raise InvalidArgument(
            f'{name}={value!r}; give a number above 0, or {{"shortest_edge": 224}}, say, or '
            '{"height": 224, "width": 224}'
        )
    return sides


def as_one(name: str, items: Sequence[Tensor]) -> Tensor:
    """The items along a new first axis."""
    shapes = list(dict.fromkeys(tuple(item.shape) for item in items))
    if len(shapes) > 1:
        raise InvalidArgument(
            f"{name} come out in several shapes, {', '.join(map(str, shapes[:3]))}, which make no "
            "one tensor; pass them one by one, or leave return_tensors out for a list"
        )
    return items[0][None] if len(items) == 1 else torch.stack(list(items))
