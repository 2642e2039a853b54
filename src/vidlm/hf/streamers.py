"""TextStreamer and TextIteratorStreamer: generated text while it is generated."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from queue import Queue
from typing import Any

from vidlm.errors import InvalidArgument, unknown_keyword
from vidlm.text import Detokenizer, Tokenizer

DECODE_KEYWORDS = ("skip_special_tokens", "clean_up_tokenization_spaces")


class TextStreamer:
    """Prints text to stdout as soon as it is certain.

    `tokenizer` may be a processor. `skip_prompt` leaves the prompt out; `skip_special_tokens` is
    the one decode keyword. Pass it as `generate(..., streamer=)` with a single request.
    """

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, **decode_kwargs: Any) -> None:
        for name in decode_kwargs:
            if name not in DECODE_KEYWORDS:
                raise unknown_keyword(type(self).__name__, name, ("skip_prompt", *DECODE_KEYWORDS))
        self.tokenizer: Tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        clean_up = decode_kwargs.get("clean_up_tokenization_spaces")
        if clean_up not in (None, self.tokenizer.clean_up_tokenization_spaces):
            raise InvalidArgument(
                f"clean_up_tokenization_spaces={clean_up!r} differs from the tokenizer's, which "
                "streamed text follows; set it on the tokenizer"
            )
        self.skip_prompt = skip_prompt
        self._skip_special = bool(decode_kwargs.get("skip_special_tokens", False))
        self._begin()

    def _begin(self) -> None:
        """Be ready for a run."""
        self._prompt_is_next = True
        self._detokenizer = Detokenizer(self.tokenizer, skip_special_tokens=self._skip_special)

    def put(self, value: Any) -> None:
        """Take the prompt's ids (the first call of a run) or new token ids: a tensor or list."""
        ids = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(ids, int):
            ids = [ids]
        if ids and isinstance(ids[0], list):
            if len(ids) > 1:
                raise InvalidArgument(f"a streamer takes one request at a time, got {len(ids)}")
            ids = ids[0]
        if self._prompt_is_next:
            self._prompt_is_next = False
            if self.skip_prompt:
                return
        text = "".join(self._detokenizer.push(token) for token in ids)
        if text:
            self.on_finalized_text(text)

    def end(self) -> None:
        """Give out what was held back, and be ready for the next run."""
        self.on_finalized_text(self._detokenizer.flush(), stream_end=True)
        self._begin()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with each piece of text that cannot change any more; override to redirect it."""
        sys.stdout.write(text + ("\n" if stream_end else ""))
        sys.stdout.flush()


class TextIteratorStreamer(TextStreamer):
    """Iterate over the text in one thread while `generate` runs in another.

    `timeout` seconds without new text raise queue.Empty in the iterating thread. An error in
    `generate` is raised there too, after the text that came before it.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_prompt: bool = False,
        timeout: float | None = None,
        **decode_kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self._queue: Queue[str | BaseException | None] = Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._queue.put(text)
        if stream_end:
            self._queue.put(None)

    def fail(self, error: BaseException) -> None:
        """Hand an error of `generate` to the iterating thread, which would wait for ever."""
        self._queue.put(error)
        self._begin()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        item = self._queue.get(timeout=self.timeout)
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item
