"""text/stream.py: streamed text is the whole text, whatever the ids and however it is cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from vidlm.errors import InvalidArgument
from vidlm.text import Detokenizer, StopStrings, Tokenizer
from vidlm.text.stream import clean_up

EURO_AND_FACE = b"\xe2\x82\xac\xf0\x9f\x99\x82"

# ---- small tokenizers whose every entry is awkward -------------------------------------------


def byte_level(**config: Any) -> Tokenizer:
    """Every single byte, pieces that begin or end inside a character, and two special tokens."""
    cut = [
        b"\xe2\x82",
        b"\x82\xac",
        b"\xacx",
        b"\x9f\x99\x82",
        b"a\xf0\x9f",
        b"\xef\xbf\xbd",
        b"\x82\xf0",
    ]
    words = [b" b", b" .", b" n't", b" '", b" 've", b"\xc3\xa9"]
    pieces = ["".join(map(letter, raw)) for raw in (*map(bytes, zip(range(256))), *cut, *words)]
    backend = Backend(models.BPE({piece: id for id, piece in enumerate(pieces)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>", "<|é|>"])
    backend.add_tokens(["<tool>"])
    return Tokenizer(backend, config)


def letter(byte: int) -> str:
    """The character that byte-level BPE writes for a byte: a printable one is itself."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [other for other in range(256) if other not in kept]
    return chr(byte) if byte in kept else chr(256 + others.index(byte))


def sentencepiece(**config: Any) -> Tokenizer:
    """Llama's decoder: "▁" for a space, byte tokens, and a leading space that is dropped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", "▁a", "b", "▁▁c", "é", "\ufffd", ".", "▁.", "▁'", "s", "▁n't"]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<image>"])
    return Tokenizer(backend, config)


KINDS = {"byte level": byte_level, "sentencepiece": sentencepiece}


def byte_ids(tokenizer: Tokenizer, raw: bytes) -> list[int]:
    """One token a byte."""
    of_letters = tokenizer.convert_tokens_to_ids([letter(byte) for byte in raw])
    of_bytes = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in raw])
    return [id for id in (of_bytes if tokenizer.unk_token_id or of_bytes[0] else of_letters) if id]


@pytest.fixture(scope="module", params=[(k, c) for k in KINDS for c in (False, True)], ids=str)
def small(request: pytest.FixtureRequest) -> Tokenizer:
    kind, cleans = request.param
    return KINDS[kind](clean_up_tokenization_spaces=cleans)


def id_lists(tokenizer: Tokenizer, size: int = 30) -> st.SearchStrategy[list[int]]:
    """Ids of any kind, often of bytes that make whole or broken characters."""
    count = len(tokenizer)
    single = st.integers(0, count + 1)  # the last two mean nothing
    recent = st.integers(max(0, count - 18), count - 1)
    parts = byte_ids(tokenizer, EURO_AND_FACE)
    chunk = st.one_of(single, recent, st.sampled_from(parts)).map(lambda id: [id])
    whole = st.sampled_from([parts, parts[:3], parts[3:], parts[:2], parts[1:5]])
    return st.lists(chunk | whole, max_size=size).map(lambda chunks: [i for c in chunks for i in c])


def streamed(tokenizer: Tokenizer, ids: Sequence[int], skip: bool) -> str:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    return "".join([*map(detokenizer.push, ids), detokenizer.flush()])


# ---- Detokenizer -----------------------------------------------------------------------------


@settings(max_examples=150)
@given(data=st.data(), skip=st.booleans())
def test_pieces_are_the_whole_text(small: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(id_lists(small))
    assert streamed(small, ids, skip) == small.decode(ids, skip_special_tokens=skip)


@pytest.fixture(scope="module", params=["llama-spm", "qwen2.5", "yi"])
def real(shared: Path, request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.from_folder(shared / "data" / "tokenizers" / request.param)


@given(data=st.data(), skip=st.booleans())
def test_pieces_of_real_tokenizers(real: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(id_lists(real))
    assert streamed(real, ids, skip) == real.decode(ids, skip_special_tokens=skip)


@given(text=st.text(max_size=40), skip=st.booleans())
def test_pieces_of_real_text(real: Tokenizer, text: str, skip: bool) -> None:
    ids = real.encode(text)
    assert streamed(real, ids, skip) == real.decode(ids, skip_special_tokens=skip)


def test_text_is_returned_as_soon_as_it_is_certain() -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer)
    ids = byte_ids(tokenizer, "a€b".encode())
    assert [detokenizer.push(id) for id in ids] == ["a", "", "", "€", "b"]
    # An invalid byte is certain once the next one does not continue it.
    assert [detokenizer.push(id) for id in byte_ids(tokenizer, b"\xff\xff\xe2a")] == [
        *("", "\ufffd", "\ufffd", "\ufffda")
    ]
    assert detokenizer.flush() == ""


def test_a_run_of_byte_tokens_waits_for_its_end() -> None:
    """SentencePiece drops a whole run, here the newline, if a later byte makes it invalid."""
    tokenizer = sentencepiece()
    newline, start = byte_ids(tokenizer, b"\n\xf0")
    [b, a] = tokenizer.convert_tokens_to_ids(["b", "▁a"])
    assert b is not None
    assert a is not None
    whole = Detokenizer(tokenizer)
    assert [whole.push(id) for id in (a, newline, newline, b)] == ["a", "", "", "\n\nb"]
    broken = Detokenizer(tokenizer)
    assert [broken.push(id) for id in (a, newline, start)] == ["a", "", ""]
    assert broken.flush() == "\ufffd\ufffd"


def test_special_tokens_are_kept_or_skipped() -> None:
    tokenizer = sentencepiece()
    [s, a] = tokenizer.convert_tokens_to_ids(["<s>", "▁a"])
    assert streamed(tokenizer, [s or 0, a or 0, s or 0, a or 0], True) == "a a"
    assert streamed(tokenizer, [s or 0, a or 0], False) == "<s> a"


@pytest.mark.parametrize("raw", [b"a", b"\xff", b"\x82", EURO_AND_FACE, b"\xf0\x9f\x99", b"\xe2"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_of_a_token_does_not_grow(
    kind: str, raw: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = KINDS[kind]()
    ids = byte_ids(tokenizer, raw * (700 // len(raw)))
    decoded = 0

    decode = Detokenizer._decode

    def counting(self: Detokenizer) -> tuple[str, int]:
        nonlocal decoded
        decoded += len(self._window)
        return decode(self)

    monkeypatch.setattr(Detokenizer, "_decode", counting)
    assert streamed(tokenizer, ids, False) == tokenizer.decode(ids)
    assert 0 < decoded < 13 * len(ids)


def test_tokens_that_cross_characters() -> None:
    """Faces whose last byte shares a token with the next one's first: no boundary is clean."""
    tokenizer = byte_level()
    [f0, x9f, x99, crossing] = tokenizer.convert_tokens_to_ids(
        ["".join(map(letter, raw)) for raw in (b"\xf0", b"\x9f", b"\x99", b"\x82\xf0")]
    )
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(f0 or 0) == ""
    for _ in range(20):
        assert [detokenizer.push(id or 0) for id in (x9f, x99, crossing)] == ["", "", "🙂"]
    assert detokenizer.flush() == "\ufffd"


def test_spaces_are_cleaned_up_across_tokens() -> None:
    tokenizer = byte_level(clean_up_tokenization_spaces=True)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(id) for id in byte_ids(tokenizer, b"he . is n't I 'm")]
    assert "".join(pieces) + detokenizer.flush() == "he. isn't I'm"
    assert pieces[0] == "h"


def test_an_id_that_cannot_be() -> None:
    with pytest.raises(InvalidArgument, match="-200 is not a token id"):
        Detokenizer(byte_level()).push(-200)


@given(st.text(" .?!,'ntmsvrea"))
def test_clean_up_is_the_references(text: str) -> None:
    base = pytest.importorskip("transformers.tokenization_utils_base")
    assert clean_up(text) == base.PreTrainedTokenizerBase.clean_up_tokenization(None, text)


# ---- StopStrings -----------------------------------------------------------------------------


def stopped(stops: Sequence[str], pieces: Sequence[str]) -> tuple[str, str | None]:
    """What is shown of the pieces, and the stop string that ended it."""
    matcher = StopStrings(stops)
    shown = ""
    for piece in pieces:
        text, done = matcher.push(piece)
        shown += text
        assert done == (matcher.matched is not None)
    return shown + matcher.flush(), matcher.matched


def first_stop(stops: Sequence[str], text: str) -> tuple[str, str | None]:
    """The specification, by trying every end."""
    for end in range(len(text) + 1):
        if complete := [stop for stop in stops if text[:end].endswith(stop)]:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=300)
@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(st.text("abc")))
def test_stop_strings(stops: list[str], pieces: list[str]) -> None:
    assert stopped(stops, pieces) == first_stop(stops, "".join(pieces))


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["</s>", "\nUser:"])
    assert matcher.push("Hi <") == ("Hi ", False)
    assert matcher.push("b") == ("<b", False)
    assert matcher.push("\nUs") == ("", False)
    assert matcher.push("er: next") == ("", True)
    assert matcher.push("more") == ("", True)
    assert (matcher.matched, matcher.flush()) == ("\nUser:", "")


def test_flush_returns_what_was_held_back() -> None:
    matcher = StopStrings(["END"])
    assert matcher.push("The EN") == ("The ", False)
    assert (matcher.flush(), matcher.flush(), matcher.matched) == ("EN", "", None)


@pytest.mark.parametrize("stops", [[""], ["a", ""], "abc"])
def test_stop_strings_must_have_characters(stops: Any) -> None:
    with pytest.raises(InvalidArgument, match="at least one character"):
        StopStrings(stops)
