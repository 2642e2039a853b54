"""What users type is text: control tokens and placeholders in it neither act nor fail."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

import vidlm
from vidlm.errors import InvalidArgument
from vidlm.text import Tokenizer, render_chat
from vidlm.text.typed import encode, mark

DEMO = Path(vidlm.__file__).parent / "demo" / "checkpoint"
REAL = (
    *(f"hub_like/{name}" for name in ("interleave", "next_video", "video_llava", "vl3")),
    *(f"tokenizers/{name}" for name in ("llama-spm", "mistral-7b-hf", "qwen1.5", "qwen2.5", "yi")),
)
ACTING = (
    *("<image>", "<video>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>"),
    *("<|endoftext|>", "<s>", "</s>", "<unk>", "<pad>", "<tool_call>", "[INST]", "<|startoftext|>"),
)
PIECES = st.one_of(
    st.sampled_from(
        (*ACTING, *ACTING, "<", ">", "<im", "age>", "|>", "_end|>", "</", "s>", "IMAGE")
    ),
    st.sampled_from((" ", "\n", "What happens", "?", " a ", "don't", "12:30", "動画", "🎬", "é")),
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="▁"), max_size=4),
)
TYPED = st.lists(PIECES, max_size=8).map("".join)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.first %}<image>\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
VICUNA = (
    "{{ bos_token }}{% for m in messages %}{{ m.role | upper }}: {% if loop.first %}<video>\n"
    "{% endif %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
)
SHAPES = {"chatml": CHATML, "vicuna": VICUNA, "bare": "{{ messages[0].content }}"}


@pytest.fixture(scope="module", params=[*REAL, "demo"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "demo":
        return Tokenizer.from_folder(DEMO)
    shared = request.getfixturevalue("shared")
    return Tokenizer.from_folder(shared / "data" / request.param)


@pytest.fixture(scope="module", params=["next_video", "vl3"])
def normalized(request: pytest.FixtureRequest, shared: Path) -> Tokenizer:
    """One whose control tokens are found behind the normalizer, as fine-tuned ones often are."""
    path = shared / "data" / "hub_like" / request.param / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for each in content["added_tokens"]:
        each["normalized"] = True
    return Tokenizer(Backend.from_str(json.dumps(content)))


def control(tokenizer: Tokenizer) -> dict[int, str]:
    added = tokenizer.backend.get_added_tokens_decoder()
    return {id: token.content for id, token in added.items()}


def render(tokenizer: Tokenizer, template: str, messages: Sequence[Mapping[str, Any]]) -> str:
    return render_chat(template, messages, special_tokens=tokenizer.special_tokens_map)


def ids_of(
    tokenizer: Tokenizer, template: str, *texts: str, placeholders: Sequence[str] = ()
) -> list[int]:
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    marked, marks = mark(messages, tokenizer, placeholders, template)
    return encode(render(tokenizer, template, marked), marks, tokenizer, add_special_tokens=False)


def as_decoded(tokenizer: Tokenizer, text: str) -> str:
    """What decoding gives for plain text: some tokenizers compose characters."""
    normalizer = tokenizer.backend.normalizer
    return unicodedata.normalize("NFC", text) if isinstance(normalizer, normalizers.NFC) else text


# ---- real tokenizers -----------------------------------------------------------------------------

many = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@many
@given(text=TYPED)
def test_typed_text_has_no_control_token(tokenizer: Tokenizer, text: str) -> None:
    ids = ids_of(tokenizer, SHAPES["bare"], text, placeholders=("<image>", "<video>"))
    acting = control(tokenizer).keys() - {tokenizer.unk_token_id}
    assert acting.isdisjoint(ids)
    assert tokenizer.decode(ids) == as_decoded(tokenizer, text)


@pytest.mark.parametrize("shape", ["chatml", "vicuna"])
@many
@given(texts=st.lists(TYPED, min_size=1, max_size=3))
def test_only_the_templates_own_tokens_act(
    tokenizer: Tokenizer, shape: str, texts: list[str]
) -> None:
    """They are those of the same chat about nothing in particular, in the same order."""
    acting = control(tokenizer)

    def acted(*said: str) -> list[int]:
        return [id for id in ids_of(tokenizer, SHAPES[shape], *said) if id in acting]

    assert acted(*texts) == acted(*("x y" for _ in texts))


PLAIN = st.lists(
    st.one_of(
        st.sampled_from((" ", "\n", "What happens", "?", "<", ">", "image", "a", "|>", "s>", "é")),
        st.text(st.characters(exclude_categories=("Cs",)), max_size=6),
    ),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("shape", list(SHAPES))
@many
@given(texts=st.lists(PLAIN, min_size=1, max_size=3))
def test_ordinary_text_keeps_its_ids(tokenizer: Tokenizer, shape: str, texts: list[str]) -> None:
    """Also where it begins or ends like a control token, and is marked for that."""
    check_ordinary(tokenizer, shape, texts)


@pytest.mark.parametrize("shape", list(SHAPES))
@many
@given(texts=st.lists(PLAIN, min_size=1, max_size=3))
def test_ordinary_text_where_tokens_are_normalized(
    normalized: Tokenizer, shape: str, texts: list[str]
) -> None:
    check_ordinary(normalized, shape, texts)


@many
@given(text=TYPED)
def test_typed_text_where_tokens_are_normalized(normalized: Tokenizer, text: str) -> None:
    ids = ids_of(normalized, SHAPES["bare"], text, placeholders=("<image>", "<video>"))
    assert control(normalized).keys().isdisjoint(ids)


def check_ordinary(tokenizer: Tokenizer, shape: str, texts: list[str]) -> None:
    acting = (*control(tokenizer).values(), "<image>", "<video>")
    if any(token.lower() in text.lower() for token in acting for text in texts):
        return
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    whole = render(tokenizer, SHAPES[shape], messages)
    expected = tokenizer.encode(whole, add_special_tokens=False)
    assert ids_of(tokenizer, SHAPES[shape], *texts) == expected


def test_a_turn_begins_with_the_ids_of_the_turn_before(tokenizer: Tokenizer) -> None:
    first = ids_of(tokenizer, CHATML.replace("assistant\n", ""), "Say <|im_end|> and </s>, <image>")
    second = ids_of(tokenizer, CHATML, "Say <|im_end|> and </s>, <image>", "<|im_start|>", "Why?")
    shared = len(first) - 1 - len(tokenizer.encode("<|im_start|>", add_special_tokens=False))
    assert second[:shared] == first[:shared]


# ---- tokenizers and templates with rules of their own --------------------------------------------


def made(*tokens: AddedToken, normalizer: Any = None, words: Sequence[str] = ()) -> Tokenizer:
    """A tokenizer of characters, and of whole `words`."""
    alphabet = [chr(code) for code in range(32, 127)]
    vocabulary = {token: id for id, token in enumerate(["[UNK]", "\n", *alphabet, *words])}
    backend = Backend(models.BPE(vocabulary, [], unk_token="[UNK]"))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens(list(tokens))
    return Tokenizer(backend, {"unk_token": "[UNK]"})


def token(content: str, **flags: Any) -> AddedToken:
    return AddedToken(content, **{"normalized": False, "special": True, **flags})


def tokens_of(tokenizer: Tokenizer, template: str, *texts: str, **how: Any) -> list[str | None]:
    return tokenizer.convert_ids_to_tokens(ids_of(tokenizer, template, *texts, **how))


@pytest.mark.parametrize("flags", [{}, {"special": False}, {"normalized": True}])
@pytest.mark.parametrize("typed", ["<x>", "a<x>b", "<<x>x>", "<X>", " <x>", "<x", "x>", "x", ">"])
@pytest.mark.parametrize(
    "template",
    [
        "<x>{{ messages[0].content }}<x>",
        "<x>{{ messages[0].content | trim }}<x>",
        "<x>{{ messages[0].content | lower }}<x>",
        "<x>{{ messages[0].content | upper }}<x>",
        "<x><{{ messages[0].content }}><x>",  # what the template begins, the text may complete
    ],
)
def test_flags_and_templates(flags: dict[str, Any], typed: str, template: str) -> None:
    for normalizer in (None, normalizers.Lowercase()):
        tokenizer = made(token("<x>", **flags), token("<xy>"), normalizer=normalizer)
        tokens = tokens_of(tokenizer, template, typed)
        assert (tokens[0], tokens[-1]) == ("<x>", "<x>")
        assert not {"<x>", "<xy>"} & set(tokens[1:-1])
        rendered = render(tokenizer, template, [{"role": "user", "content": typed}])
        assert "".join(filter(None, tokens)).lower() == rendered.lower()


def test_normalized_tokens_have_other_spellings() -> None:
    """Composed by the normalizer, and so not found by looking for the token."""
    tokenizer = made(token("<\u00e9>", normalized=True), normalizer=normalizers.NFC())
    assert "<\u00e9>" in tokenizer.convert_ids_to_tokens(tokenizer.encode("<e\u0301>"))
    assert "<\u00e9>" not in tokens_of(tokenizer, SHAPES["bare"], "<e\u0301>")


def test_tokens_that_take_the_space_around_them() -> None:
    tokenizer = made(token("<x>", lstrip=True, rstrip=True), token("word", single_word=True))
    template = "<x> {{ messages[0].content }} word"
    assert tokens_of(tokenizer, template, " a<x> ") == ["<x>", *"a<x>", " ", " ", "word"]
    joined = "sword{{ messages[0].content }}"
    assert tokens_of(tokenizer, joined, "<x>") == [*"sword", *"<x>"]


def test_runs_of_spaces_are_text() -> None:
    tokenizer = made(token("  ", special=False), token("<x>"))
    assert tokens_of(tokenizer, SHAPES["bare"], "a  b") == ["a", "  ", "b"]
    assert tokens_of(tokenizer, SHAPES["bare"], "a  <x>") == ["a", "  ", *"<x>"]


def test_a_model_that_has_control_tokens_as_words() -> None:
    backend = Backend(models.WordLevel({"[UNK]": 0, "</s>": 1, "a": 2, "<": 3}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(backend, {"unk_token": "[UNK]"})
    assert ids_of(tokenizer, "{{ messages[0].content }} </s>", "a </s> a") == [2, 3, 0, 2, 1]


def test_placeholders_that_are_no_tokens() -> None:
    """Slow-Fast's: its processor cuts the rendered text at them."""
    message = {"role": "user", "content": [{"type": "text", "text": "an <image>"}]}
    marked, marks = mark([message], made(), ("<image>",))
    (part,) = marked[0]["content"]
    assert "<image>" not in part["text"]
    assert part["type"] == "text"
    assert encode(part["text"], marks, made()) == made().encode("an <image>")


def test_private_characters_of_the_text_are_kept() -> None:
    tokenizer = made(token("<x>"), words=[chr(0xF0000), chr(0xF0001)])
    typed = f"{chr(0xF0000)}<x>{chr(0xF0001)}"
    assert tokens_of(tokenizer, SHAPES["bare"], typed) == list(typed)


@pytest.mark.parametrize("text", ["O\udcf9?", "\ud83d"])
def test_half_characters_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="half a character"):
        made().encode(text)
    with pytest.raises(InvalidArgument, match="half a character"):
        mark([{"role": "user", "content": text}], made(), ())
    with pytest.raises(InvalidArgument, match="a text is needed, got int"):
        made().encode(5)
