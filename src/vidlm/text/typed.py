"""Typed text: what a user wrote is text in a prompt, never a control token or a placeholder.

In a rendered prompt, the `<|im_end|>` of a chat template and one that a user typed are the same
characters. So `mark` replaces one character of each control token in typed text by a private
character, before the template sees it. The template may trim, join, test or change the case of the
text; every whole token in the rendered prompt is then the template's own. `encode` gives those
their ids, restores the marked characters and encodes all else as plain text.

Text without control tokens has no marks, and its prompt is encoded like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from vidlm.errors import InvalidArgument
from vidlm.text.tokenizer import Tokenizer

PRIVATE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))  # Unicode's private planes
NOT_TYPED = ("role", "type")  # entries of messages and parts that no user writes

Marks = Mapping[str, str]  # a private character -> the typed character it stands for
NO_MARKS: Marks = MappingProxyType({})


def mark(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    placeholders: Iterable[str],
    template: str | None = None,
) -> tuple[list[dict[str, Any]], Marks]:
    """The messages with every control token in their texts marked, and the marks.

    `placeholders` act like the tokenizer's added tokens. No mark occurs in a text or `template`.
    """
    taken = set(template or "")
    for text in _texts(messages):
        tokenizer.check(text)
        taken.update(text)
    marker = _Marker(tokenizer, placeholders, _private(taken))
    marked: list[dict[str, Any]] = _replaced(messages, marker.mark)
    return marked, {mark: char for char, mark in marker.marks.items()}


def encode(
    text: str, marks: Marks, tokenizer: Tokenizer, add_special_tokens: bool = True
) -> list[int]:
    """The ids of a rendered prompt: marked text is plain text, every other control token acts."""
    if not marks:
        return tokenizer.encode(text, add_special_tokens)
    backend = tokenizer.backend
    free = _private({*text, *marks, *marks.values()})  # the text may be a part of the marked one
    text, tokens = _stand_ins(text, tokenizer, free)
    for char, typed in marks.items():
        text = text.replace(char, typed)
    added = backend.get_added_tokens_decoder()
    ids = {char: id for id, char in tokens.items()}
    control = {id for id in _control_tokens(backend) if id != tokenizer.unk_token_id}
    plain = Backend(backend.model)  # shares the vocabulary, has none of the added tokens
    plain.normalizer, plain.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    plain.post_processor = backend.post_processor
    plain.add_tokens([token for token in added.values() if not token.content.strip()])
    plain.add_tokens([_stand_in(added[id], char) for id, char in tokens.items()])
    return _encode_plain(plain, text, add_special_tokens, ids, control, next(free))


def _stand_ins(text: str, tokenizer: Tokenizer, free: Iterator[str]) -> tuple[str, dict[int, str]]:
    """`text` with a private character for each token that acts in it, by the token's id."""
    control = _control_tokens(tokenizer.backend)
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    chars: dict[int, str] = {}
    pieces, end = [], 0
    for id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
        span = text[start:stop]
        content = span.strip()  # some tokens take the space around them
        if id not in control or (id == tokenizer.unk_token_id and content != control[id]):
            continue
        if id not in chars:
            chars[id] = next(free)
        before, after = span[: len(span) - len(span.lstrip())], span[len(span.rstrip()) :]
        pieces += [text[end:start], before, chars[id], after]
        end = stop
    return "".join([*pieces, text[end:]]), chars


def _encode_plain(
    plain: Backend,
    text: str,
    add_special_tokens: bool,
    stand_ins: Mapping[str, int],
    control: set[int],
    cut: str,
) -> list[int]:
    """Ids of `text`, in which the keys of `stand_ins` are tokens of these ids.

    Some models have control tokens as words of their own vocabulary and find them in plain text:
    those are cut in two by a token that is left out of the ids.
    """
    plain.add_tokens([AddedToken(cut, normalized=False)])
    known = {*stand_ins, cut}
    while True:
        encoding = plain.encode(text, add_special_tokens=add_special_tokens)
        # A token's text may begin or end with space that it took.
        acting = [next(filter(known.__contains__, token), None) for token in encoding.tokens]
        spans = zip(encoding.ids, acting, encoding.offsets, strict=True)
        words = [
            start
            for id, char, (start, stop) in spans
            if char is None and id in control and stop - start > 1
        ]
        if not words:
            break
        for start in sorted(words, reverse=True):
            text = text[: start + 1] + cut + text[start + 1 :]
    pairs = zip(encoding.ids, acting, strict=True)
    return [id if char is None else stand_ins[char] for id, char in pairs if char != cut]


def _stand_in(token: AddedToken, char: str) -> AddedToken:
    """A character in the place of `token`, which is found as that is."""
    flags = {"normalized": token.normalized, "lstrip": token.lstrip, "rstrip": token.rstrip}
    return AddedToken(char, **flags)


class _Marker:
    """Chooses a private character for each character that it replaces."""

    def __init__(
        self, tokenizer: Tokenizer, placeholders: Iterable[str], free: Iterator[str]
    ) -> None:
        control = _control_tokens(tokenizer.backend)
        self._controls = _controls(frozenset((*control.values(), *placeholders)))
        self._free = free
        self.marks: dict[str, str] = {}
        added = tokenizer.backend.get_added_tokens_decoder()
        # A normalized token stands for more spellings than its own: only the library knows them.
        self._finds_more = any(added[id].normalized for id in control)
        self._backend = tokenizer.backend
        self._control = set(control) - {tokenizer.unk_token_id}

    def mark(self, text: str) -> str:
        text = self._replaced(text, self._controls.positions(text))
        while self._finds_more and (more := self._found(text)):
            text = self._replaced(text, more)
        return text

    def _found(self, text: str) -> set[int]:
        encoding = self._backend.encode(text, add_special_tokens=False)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        firsts = {_first(text, *span) for id, span in spans if id in self._control}
        return {at for at in firsts if text[at] not in self.marks.values()}

    def _replaced(self, text: str, positions: set[int]) -> str:
        if not positions:
            return text
        chars = list(text)
        for at in positions:
            if chars[at] not in self.marks:
                self.marks[chars[at]] = next(self._free)
            chars[at] = self.marks[chars[at]]
        return "".join(chars)


@dataclass(frozen=True)
class _Controls:
    """What acts in a prompt, in lower case (a template may change it): whole tokens, and what they
    begin and end with, which a template could complete."""

    tokens: frozenset[str]
    heads: frozenset[str]
    tails: frozenset[str]
    longest: int

    def positions(self, text: str) -> set[int]:
        """Where `text` must be marked, so that each part of it that could act has a mark."""
        lower = _lower(text)
        found = set()
        for token in self.tokens:
            at = lower.find(token)
            while at >= 0:
                found.add(_first(text, at, at + len(token)))
                at = lower.find(token, at + 1)
        begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
        for start, stop in {(0, len(text)), (begin, max(end, begin))}:  # a template may trim
            part = lower[start:stop]
            for size in range(1, min(len(part), self.longest) + 1):
                if part[:size] in self.tails:
                    found.add(_first(text, start, start + size))
                if part[-size:] in self.heads:
                    found.add(_first(text, stop - size, stop))
            if part and len(part) < self.longest and any(part in token for token in self.tokens):
                found.add(_first(text, start, stop))
        return found


@lru_cache(maxsize=8)
def _controls(tokens: frozenset[str]) -> _Controls:
    lower = frozenset(map(_lower, tokens))
    return _Controls(
        lower,
        frozenset(token[:size] for token in lower for size in range(1, len(token))),
        frozenset(token[-size:] for token in lower for size in range(1, len(token))),
        max(map(len, lower), default=0),
    )


def _control_tokens(backend: Backend) -> dict[int, str]:
    """Added tokens by id. Runs of spaces, which some tokenizers add, are text like any other."""
    added = backend.get_added_tokens_decoder()
    return {id: token.content for id, token in added.items() if token.content.strip()}


def _lower(text: str) -> str:
    """`text` in lower case, character by character."""
    lower = text.lower()
    if len(lower) == len(text):
        return lower
    return "".join(small if len(small := char.lower()) == 1 else char for char in text)


def _first(text: str, start: int, stop: int) -> int:
    """The first character of text[start:stop] that trimming leaves."""
    return next((at for at in range(start, stop) if not text[at].isspace()), start)


def _private(taken: set[str]) -> Iterator[str]:
    """Private characters that are not in `taken`."""
    for codes in PRIVATE:
        for code in codes:
            if chr(code) not in taken:
                yield chr(code)
    raise InvalidArgument("the text has every private character of Unicode; remove some of them")


def _texts(value: Any, key: str = "") -> Iterator[str]:
    """Every typed text in messages or a part of them."""
    if isinstance(value, str):
        if key not in NOT_TYPED:
            yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(item, name)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _replaced(value: Any, replace: Any, key: str = "") -> Any:
    if isinstance(value, str):
        return value if key in NOT_TYPED else replace(value)
    if isinstance(value, Mapping):
        return {name: _replaced(item, replace, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, replace) for item in value]
    return value
