"""What becomes of which linear layer: the one form that all configs are turned into."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from vidlm.errors import InvalidArgument, UnsupportedModel
from vidlm.nn.packed import Packing
from vidlm.quant.packing import packings

METHOD = "vidlm"  # the quant_method of a config.json that save_pretrained wrote
HEAD = "lm_head"
KINDS = ("int8", "int4", "nf4", "fp4")
GROUPS = 32  # a group is a multiple of this


@dataclass(frozen=True)
class Scheme:
    """Linear layers in fewer bits.

    kind   of all layers: "int8", a scale for each row; "int4", "nf4", "fp4", a scale for each group
    group  numbers that share a scale; None: 32 of int4, 64 of nf4 and fp4
    head   the kind of the head; None: it stays as it is
    skip   names of layers, or parts of names between dots, that stay as they are
    """

    kind: str
    group: int | None = None
    head: str | None = None
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for kind in (self.kind, *(() if self.head is None else (self.head,))):
            if kind not in KINDS:
                raise InvalidArgument(f"quantization {kind!r}; allowed: {', '.join(KINDS)}")
        if self.group is not None and (self.group < GROUPS or self.group % GROUPS):
            raise InvalidArgument(
                f"a group of {self.group} weights; allowed: multiples of {GROUPS}, such as 32, 64 "
                "or 128 (a shorter group ends a row that is no multiple)"
            )
        if self.group is not None and self.kind == "int8":
            raise InvalidArgument(
                f"a group of {self.group} weights with int8, which has one scale for each row; "
                "leave it out"
            )

    def __str__(self) -> str:
        """As errors name it."""
        known = {"groups of": self.group, "the head in": self.head, "without": ", ".join(self.skip)}
        return "; ".join([self.kind, *(f"{how} {what}" for how, what in known.items() if what)])

    def packing(self, name: str) -> Packing | None:
        """How the layer of this name is packed; None: it stays as it is."""
        if any(within(name, part) for part in self.skip):
            return None
        if not within(name, HEAD):
            return packings(self.group)[self.kind]
        group = self.group if self.head == self.kind else None
        return None if self.head is None else packings(group)[self.head]

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        return {"quant_method": METHOD, **asdict(self), "skip": list(self.skip)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read config.json's; raises UnsupportedModel for what others wrote."""
        method = values.get("quant_method")
        if method != METHOD:
            raise UnsupportedModel(
                f"this checkpoint was quantized by {method or 'another library'}; only what vidlm "
                "saved is read so. Load the original weights with quantization_config="
                "QuantoConfig(weights='int8'), 'int4' or BitsAndBytesConfig(load_in_4bit=True)"
            )
        known = {"kind", "group", "head", "skip"}
        if set(values) != {"quant_method", *known}:
            raise UnsupportedModel(
                f"quantization_config in config.json has {', '.join(sorted(values))}; this version "
                f"reads quant_method, {', '.join(sorted(known))}"
            )
        return cls(values["kind"], values["group"], values["head"], tuple(values["skip"]))


def within(layer: str, part: str) -> bool:
    """Whether a layer's dotted name has this part, "model." in front or not, or the layer's name
    in the hub's files does."""
    part = HEAD if part == f"language_model.{HEAD}" else part.removeprefix("model.")
    return any(f".{part}." in f".{name}." for name in (layer, _on_the_hub(layer)))


def _on_the_hub(layer: str) -> str:
    decoder = re.sub(r"^model\.language_model\.", "language_model.model.", layer)
    return re.sub(r"^model\.(\w+_tower)\.", r"\1.vision_model.", decoder)


def check_skipped(given: Iterable[str], layers: Iterable[str], keyword: str) -> None:
    """Raise InvalidArgument where a name to skip is none of the model's layers."""
    layers = list(layers)
    for name in given:
        if name != HEAD and not any(within(layer, name) for layer in layers):
            raise InvalidArgument(
                f"{keyword} names {name!r}, which is no part of the model; give names of layers or "
                "parts of them, such as 'lm_head' or 'multi_modal_projector'"
            )
