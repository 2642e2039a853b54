"""Text while it is being generated: a detokenizer and a stop-string matcher that never take back.

Both hold back what a later token could still change, so what they return can be sent at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vidlm.errors import InvalidArgument

if TYPE_CHECKING:
    from vidlm.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
# Ids in a detokenizer's window. Cutting it may cut a character, but that shows only at the window's
# beginning, which was returned already: an incomplete character has at most 3 bytes, so it lies in
# the last 4 tokens, and UTF-8 is in step again at the next character that begins.
SHORTEST, LONGEST = 5, 12
# What clean_up_tokenization_spaces removes the first space of, in the reference's order.
CLEAN_UPS = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
CLEANED = frozenset("".join(CLEAN_UPS))


def clean_up(text: str) -> str:
    """English text without the spaces that a word-level tokenizer leaves before punctuation."""
    for pattern in CLEAN_UPS:
        text = text.replace(pattern, pattern.strip())
    return text


class Detokenizer:
    """Ids to text, one id at a time; all pieces together are `tokenizer.decode` of all ids.

    The text of a token can depend on its neighbours: UTF-8 bytes spread over tokens, a run of byte
    tokens that counts only as a whole, the first token's leading space. So each step decodes a
    short window of the latest ids; its cost does not grow with the length of the output.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skipped = frozenset(tokenizer.all_special_ids if skip_special_tokens else ())
        self._cleans = tokenizer.clean_up_tokenization_spaces
        self._window: list[int] = []
        self._known = 0  # characters of the window's text that were returned already
        self._unclean = ""  # certain text that clean_up could still change

    def push(self, id: int) -> str:
        """Take the next id; return the text that is now certain, often "" or several words."""
        token = self._tokenizer.convert_ids_to_tokens(id)
        if token is None or id in self._skipped:
            return ""
        self._window.append(id)
        # SentencePiece's byte tokens become characters only if their whole run is valid UTF-8.
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return ""
        text, certain = self._decode()
        piece, self._known = text[self._known : certain], certain
        if len(self._window) > LONGEST:
            del self._window[:-SHORTEST]
            _, self._known = self._decode()
        return self._emit(piece)

    def flush(self) -> str:
        """The rest, when no id follows."""
        text, _ = self._decode()
        piece, self._known = text[self._known :], len(text)
        return self._emit(piece, last=True)

    def _decode(self) -> tuple[str, int]:
        """The window's text, and how many of its characters no later id can change.

        A character still incomplete shows as one U+FFFD at the end; everything before is certain.
        """
        text = self._tokenizer.backend.decode(self._window, skip_special_tokens=False)
        return text, len(text) - text.endswith(REPLACEMENT)

    def _emit(self, text: str, *, last: bool = False) -> str:
        if not self._cleans:
            return text
        text = self._unclean + text
        # No pattern reaches over a character that is in none of them.
        certain = max((at + 1 for at, char in enumerate(text) if char not in CLEANED), default=0)
        if last:
            certain = len(text)
        self._unclean = text[certain:]
        return clean_up(text[:certain])


class StopStrings:
    """Finds the first stop string in streamed text, however the text is cut.

    First is the one that is complete first, and of two complete at once the longer. `matched` is
    that string, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(stops):
            raise InvalidArgument(
                f"stop strings {stops!r}: a list of texts of at least one character is needed"
            )
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """Take more text; return (text that may be shown, whether a stop string is complete).

        Neither the stop string nor what follows it is ever returned.
        """
        if self.matched is not None:
            return "", True
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.matched = min(found)
            self._held = ""
            return text[:at], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """What was held back, when no text follows."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` could begin."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
