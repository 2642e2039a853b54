"""Texts with placeholders -> rows of ids: expanded, truncated, padded, and which were generated."""

from __future__ import annotations

import logging
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from vidlm.errors import InvalidArgument
from vidlm.text import Tokenizer, expand
from vidlm.text.tokenizer import ARRAY_LIBRARY

log = logging.getLogger(__name__)

LARGE = int(1e20)  # a model_max_length above it says nothing, as in transformers
PADDING = (False, True, "longest", "max_length", "do_not_pad")
TRUNCATION = (False, True, "longest_first", "only_first", "do_not_truncate")

Span = tuple[int, int]


@dataclass(frozen=True)
class TextOptions:
    """Keywords for texts, as transformers' tokenizers take them."""

    add_special_tokens: bool | None = True
    padding: Any = False
    padding_side: str | None = None
    truncation: Any = None
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("padding", PADDING), ("truncation", TRUNCATION)):
            value = getattr(self, name)
            value = getattr(value, "value", value)  # of an enum
            if value is not None and value not in allowed:
                raise InvalidArgument(
                    f"{name}={value!r} is not possible; allowed are {', '.join(map(repr, allowed))}"
                )
            object.__setattr__(self, name, False if value is None and name == "padding" else value)
        for name in ("max_length", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and not (_is_integer(value) and value > 0):
                raise InvalidArgument(f"{name}={value!r}; give a whole number above 0, or None")
        sides = ("left", "right", None)
        if self.padding_side not in sides:
            raise InvalidArgument(f"padding_side={self.padding_side!r}; allowed are {sides}")

    @property
    def truncates(self) -> bool:
        """A max_length alone truncates too, unless rows are padded: so does transformers."""
        if self.truncation is None:
            return self.max_length is not None and self.padding is False
        return self.truncation not in (False, "do_not_truncate")

    def limit(self, tokenizer: Tokenizer) -> int | None:
        """How many tokens a row may have; None for any number."""
        if not self.truncates:
            if self.max_length is not None and self.padding is True:
                log.warning(
                    "max_length=%d has no effect with padding=True and without truncation; pass "
                    "padding='max_length' to pad to it, or truncation=True to cut",
                    self.max_length,
                )
            return None
        most = self._length(tokenizer)
        multiple, padded = self.pad_to_multiple_of, self.padding not in (False, "do_not_pad")
        if most is not None and multiple is not None and padded and most % multiple:
            raise InvalidArgument(
                f"rows are truncated to max_length={most} and padded to a multiple of "
                f"pad_to_multiple_of={multiple}; give a max_length that is one"
            )
        return most

    def batch(self, rows: Sequence[Sequence[int]], tokenizer: Tokenizer) -> dict[str, Any]:
        """{"input_ids", "attention_mask"} of rows that are expanded and truncated."""
        padding, length = self.padding, self.max_length
        if padding == "max_length":
            length = self._length(tokenizer)
            padding = "do_not_pad" if length is None else padding
        return tokenizer.batch(
            rows,
            padding=padding,
            padding_side=self.padding_side,
            return_tensors=self.return_tensors,
            max_length=length,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )

    def masks(self, rows: Sequence[Row], tokenizer: Tokenizer, tensors: str | None) -> Any:
        """Which tokens of the batch are generated, as long as its rows are."""
        made = self.batch([row.generated for row in rows], tokenizer)
        padded, shown = made["input_ids"], made["attention_mask"]
        masks = [
            [int(one) * int(real) for one, real in zip(row, mask, strict=True)]
            for row, mask in zip(padded, shown, strict=True)
        ]
        if tensors is None:
            return masks
        library = import_module(ARRAY_LIBRARY[tensors])
        return library.asarray(masks, dtype=library.int64)

    def _length(self, tokenizer: Tokenizer) -> int | None:
        if self.max_length is not None:
            return self.max_length
        most = tokenizer.model_max_length
        if most <= LARGE:
            return most
        log.warning("the tokenizer names no model_max_length, and max_length is not given; ignored")
        return None


@dataclass(frozen=True)
class Piece:
    """An encoded text: its ids, where in the text each begins and ends, and how many ids in front
    and behind are the tokenizer's own, such as a BOS token."""

    ids: list[int]
    offsets: list[Span]
    before: int = 0
    behind: int = 0

    def moved(self, by: int) -> Piece:
        """The same, of a text that begins so many characters later."""
        offsets = [(begin + by, end + by) for begin, end in self.offsets]
        return Piece(self.ids, offsets, self.before, self.behind)

    def joined(self, other: Piece) -> Piece:
        """This and then the other."""
        ids, offsets = self.ids + other.ids, self.offsets + other.offsets
        return Piece(ids, offsets, self.before if self.ids else other.before, other.behind)


def encoded(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> Piece:
    """A text by the tokenizer alone."""
    made = tokenizer.backend.encode(text, add_special_tokens=add_special_tokens)
    own = made.special_tokens_mask  # 1 for what the post-processor adds, not for tokens of the text
    before = own.index(0) if 0 in own else len(own)
    behind = own[::-1].index(0) if 0 in own else 0
    return Piece(made.ids, made.offsets, before, behind)


@dataclass(frozen=True)
class Row:
    """One text of a batch, its placeholders expanded; `generated` is 1 where a token overlaps a
    stretch that the chat template marks as the assistant's."""

    ids: list[int]
    generated: list[int]
    before: int
    behind: int

    @classmethod
    def of(
        cls, piece: Piece, counts: Mapping[int, Sequence[int]], spans: Sequence[Span] = ()
    ) -> Row:
        """`counts` has, for each placeholder's id, how often each of them is to stand there."""
        ids = piece.ids
        marks = [int(any(a < end and b > begin for begin, end in spans)) for a, b in piece.offsets]
        for placeholder, fills in counts.items():
            # Counted in `expand`, which raises where there are not as many placeholders as fills.
            wide = expand(ids, placeholder, fills)
            if spans:
                ahead = iter(fills)
                marks = [
                    mark
                    for id, mark in zip(ids, marks, strict=True)
                    for _ in range(next(ahead) if id == placeholder else 1)
                ]
            ids = wide
        return cls(ids, marks if spans else [0] * len(ids), piece.before, piece.behind)

    def truncated(self, most: int | None, side: str) -> Row:
        """The row cut to so many tokens on a side, the tokenizer's own tokens kept."""
        excess = len(self.ids) - (len(self.ids) if most is None else most)
        if excess <= 0:
            return self
        if side not in ("left", "right"):
            raise InvalidArgument(f"truncation_side={side!r}; allowed are 'left', 'right'")
        if self.before + self.behind > len(self.ids) - excess:
            raise InvalidArgument(
                f"max_length={most} has no room for the tokenizer's own {self.before + self.behind}"
                " tokens; give more, or add_special_tokens=False"
            )
        end = len(self.ids) - self.behind
        cut = (
            slice(end - excess, end)
            if side == "right"
            else slice(self.before, self.before + excess)
        )
        ids, generated = list(self.ids), list(self.generated)
        del ids[cut], generated[cut]
        return Row(ids, generated, self.before, self.behind)


@dataclass(frozen=True)
class Places:
    """Where one kind of media goes: the token that names it in texts, its id, and for each item in
    order the text that takes the token's place and how often each token in that text stands."""

    token: str
    id: int
    written: Sequence[tuple[str, Sequence[int]]]


def rows_of(
    texts: Sequence[str],
    places: Sequence[Places],
    encode: Callable[[str, bool], Piece],
    options: TextOptions,
    tokenizer: Tokenizer,
    spans: Sequence[Sequence[Span]] = (),
) -> list[Row]:
    """Texts, with as many tokens as there are media -> rows of ids, expanded and truncated; `spans`
    are the stretches of each text that count as generated.

    Raises InvalidArgument where truncation would cut the placeholders of an image or a video.
    """
    ahead = {place.token: iter(place.written) for place in places}
    pattern = re.compile("|".join(map(re.escape, ahead)))
    limit, side = options.limit(tokenizer), tokenizer.truncation_side
    rows = []
    for i, text in enumerate(texts):
        filled = _Filled.of(text, pattern, ahead)
        counts = {place.id: filled.counts.get(place.token, []) for place in places}
        piece = encode(filled.text, bool(options.add_special_tokens))
        row = Row.of(piece, counts, [filled.moved(span) for span in spans[i]] if spans else ())
        cut = row.truncated(limit, side)
        _check_whole(cut, counts, i)
        rows.append(cut)
    return rows


@dataclass(frozen=True)
class _Filled:
    """A text with other words in the place of its placeholders: how often each token of a kind is
    to stand, and where placeholders ended and by how much the text became longer there."""

    text: str
    counts: Mapping[str, Sequence[int]]
    gains: Sequence[tuple[int, int]]

    @classmethod
    def of(cls, text: str, pattern: re.Pattern[str], ahead: Mapping[str, Iterator[Any]]) -> _Filled:
        counts: dict[str, list[int]] = {}
        gains: list[tuple[int, int]] = []

        def place(match: re.Match[str]) -> str:
            inner, fills = next(ahead[match[0]])
            counts.setdefault(match[0], []).extend(fills)
            gains.append((match.end(), len(inner) - len(match[0])))
            return str(inner)

        return cls(pattern.sub(place, text), counts, gains)

    def moved(self, span: Span) -> Span:
        """A stretch of the text as it was -> of this one."""
        begin, end = (at + sum(gain for e, gain in self.gains if e <= at) for at in span)
        return begin, end


def _check_whole(row: Row, counts: Mapping[int, Sequence[int]], number: int) -> None:
    for placeholder, fills in counts.items():
        left, needed = row.ids.count(placeholder), sum(fills)
        if left != needed:
            raise InvalidArgument(
                f"truncation leaves {left} of the {needed} tokens of images or videos in text "
                f"{number}; raise max_length, take fewer frames, or do not truncate"
            )


def _is_integer(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)
