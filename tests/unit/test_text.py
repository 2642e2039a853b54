"""text: the tokenizer against real files and the reference, its small files, and placeholders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from vidlm.errors import InvalidArgument, ModelError
from vidlm.text import Tokenizer, expand

TEXTS = [
    "USER: <video>\nWhy is this video funny? ASSISTANT:",
    "<|im_start|>user\n<image>\nWhat's 12.5 % of 'it' ?<|im_end|>\n",
    "",
    "  two  spaces\n\n\ttab ",
    "naïve café — 你好、世界 🙂👩‍👩‍👧 \u0065\u0301",
    "<|endoftext|><|im_end|>",
]


def trained() -> Backend:
    """A byte-level BPE of 270 entries, in Qwen's form."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<|endoftext|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat", "the video is funny"] * 4, trainer)
    return backend


def write(folder: Path, **files: Any) -> Path:
    """A tokenizer folder: tokenizer.json of `trained`, and other JSON files by their stem."""
    folder.mkdir(exist_ok=True)
    trained().save(str(folder / "tokenizer.json"))
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder


def special(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "special": True, "normalized": False} | flags


# ---- real tokenizers -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(shared: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(shared / "data" / "tokenizers" / "llama-spm")
    assert tokenizer.add_special_tokens(["<image>", "<video>", "<pad>"]) == 3
    return tokenizer


def test_llama_puts_a_space_after_every_added_token(llama: Tokenizer) -> None:
    """The ids recorded for Video-LLaVA: 29871 before <video> and a new "▁" after it."""
    ids = llama.encode("USER: <video>Why is this video funny? ASSISTANT:")
    recorded = "1 3148 1001 29901 29871 32001 3750 338 445 4863 2090 1460 29973"
    assert ids == [*map(int, recorded.split()), 319, 1799, 9047, 13566, 29901]
    assert llama.encode("<video>\n", add_special_tokens=False) == [32001, 29871, 13]
    assert llama.convert_tokens_to_ids(["<image>", "<video>", "<pad>"]) == [32000, 32001, 32002]
    assert (llama.vocab_size, len(llama)) == (32000, 32003)


@pytest.mark.parametrize("name", ["tokenizers/qwen1.5", "tokenizers/qwen2.5", "hub_like/vl3"])
def test_qwen_is_the_references(shared: Path, name: str) -> None:
    folder = shared / "data" / name
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_folder(folder)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert (ours.vocab_size, len(ours)) == (theirs.vocab_size, len(theirs))
    assert set(ours.all_special_ids) == set(theirs.all_special_ids)
    assert ours.special_tokens_map == {
        key: value for key, value in theirs.special_tokens_map.items() if isinstance(value, str)
    }
    for side in ("left", "right"):
        batch = ours(TEXTS, padding=True, padding_side=side, return_tensors="np")
        expected = theirs(TEXTS, padding=True, padding_side=side, return_tensors="np")
        np.testing.assert_array_equal(batch["input_ids"], expected["input_ids"])
        np.testing.assert_array_equal(batch["attention_mask"], expected["attention_mask"])


@pytest.mark.parametrize(
    ("name", "ids", "side", "pad"),
    [
        ("interleave", {"<image>": 151646, "<|im_end|>": 151645}, "right", 151643),
        ("next_video", {"<image>": 32001, "<video>": 32000, "<s>": 1}, "left", 0),
        ("video_llava", {"<image>": 32000, "<video>": 32001}, "left", 32002),
        ("vl3", {"<|image_pad|>": 151655, "<|video_pad|>": 151656}, "right", 151643),
    ],
)
def test_folders_of_the_hub(
    shared: Path, name: str, ids: dict[str, int], side: str, pad: int
) -> None:
    tokenizer = Tokenizer.from_folder(shared / "data" / "hub_like" / name)
    for token, id in ids.items():
        assert tokenizer.convert_tokens_to_ids(token) == id
        assert tokenizer.encode(f"a{token}b", add_special_tokens=False).count(id) == 1
        assert id in tokenizer.all_special_ids
    assert (tokenizer.padding_side, tokenizer.pad_token_id) == (side, pad)
    assert not tokenizer.clean_up_tokenization_spaces


def test_tokens_that_only_the_config_declares(shared: Path, tmp_path: Path) -> None:
    """Video-LLaVA's config beside the bare Llama tokenizer.json gives Video-LLaVA's tokenizer."""
    shutil.copy(shared / "data/tokenizers/llama-spm/tokenizer.json", tmp_path)
    shutil.copy(shared / "data/hub_like/video_llava/tokenizer_config.json", tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.encode("<image> hi") == [1, 32000, 29871, 7251]
    assert (ours.pad_token, ours.pad_token_id, len(ours)) == ("<pad>", 32002, 32003)


def test_yi_makes_a_vocabulary_entry_special(shared: Path) -> None:
    tokenizer = Tokenizer.from_folder(shared / "data" / "tokenizers" / "yi")
    assert len(tokenizer.encode("<|im_end|>")) > 1
    assert tokenizer.add_special_tokens({"eos_token": "<|im_end|>"}) == 0
    assert tokenizer.encode("<|im_end|>") == [7] == [tokenizer.eos_token_id]


# ---- the small files -------------------------------------------------------------------------


def test_without_a_config_there_are_defaults(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write(tmp_path))
    assert (tokenizer.padding_side, tokenizer.special_tokens_map) == ("right", {})
    assert tokenizer.chat_template is None
    assert tokenizer.pad_token_id is None
    assert tokenizer.convert_tokens_to_ids("<image>") is None
    assert tokenizer.all_special_ids == [0, 1]


def test_named_tokens_and_their_ids(tmp_path: Path) -> None:
    config = {"bos_token": special("<s>"), "pad_token": None, "unk_token": "<|endoftext|>"}
    extra = {"bos_token": "other", "pad_token": "<|endoftext|>"}
    tokenizer = Tokenizer.from_folder(
        write(tmp_path, tokenizer_config=config, special_tokens_map=extra)
    )
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<s>", 1)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    assert tokenizer.convert_tokens_to_ids(["<s>", "nowhere"]) == [1, 0]
    tokenizer.pad_token = "<s>"
    assert tokenizer.pad_token_id == 1
    tokenizer.eos_token_id = 0
    assert tokenizer.eos_token == "<|endoftext|>"
    tokenizer.eos_token_id = None
    assert "eos_token" not in tokenizer.special_tokens_map


def test_added_tokens_json_alone(tmp_path: Path) -> None:
    config = {"additional_special_tokens": ["<image>"]}
    added = {"<tool>": 271, "<image>": 270, "<s>": 1}
    tokenizer = Tokenizer.from_folder(write(tmp_path, tokenizer_config=config, added_tokens=added))
    assert tokenizer.convert_tokens_to_ids(["<image>", "<tool>", "<s>"]) == [270, 271, 1]
    assert tokenizer.all_special_ids == [0, 1, 270]
    assert tokenizer.decode([270, 271, 1], skip_special_tokens=True) == "<tool>"


def test_an_added_token_becomes_special(tmp_path: Path) -> None:
    plain = {"270": special("<tool>", special=False)}
    tokenizer = Tokenizer.from_folder(
        write(tmp_path, tokenizer_config={"added_tokens_decoder": plain})
    )
    assert tokenizer.all_special_ids == [0, 1]
    assert tokenizer.add_special_tokens(["<tool>"]) == 0
    assert tokenizer.all_special_ids == [0, 1, 270]


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"added_tokens_decoder": {"400": special("<image>")}}},
        {"added_tokens": {"<s>": 0}},
    ],
)
def test_contradicting_ids(tmp_path: Path, files: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="different versions"):
        Tokenizer.from_folder(write(tmp_path, **files))


def test_missing_and_broken_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ModelError, match=r"no tokenizer\.json.*save_pretrained"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="is not a tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    backend = trained()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_folder(tmp_path).encode("xyzxy")) == 5


def test_order_of_the_template_sources(tmp_path: Path) -> None:
    named = [{"name": "other", "template": "x"}, {"name": "default", "template": "config"}]
    write(
        tmp_path,
        tokenizer_config={"chat_template": named},
        processor_config={"chat_template": "processor"},
        chat_template={"chat_template": "json"},
    )
    (tmp_path / "chat_template.jinja").write_bytes(b"\xef\xbb\xbfjinja\r\n")
    files = ["chat_template.jinja", "chat_template.json", "processor_config.json"]
    for file, expected in zip(files, ["jinja\r\n", "json", "processor"], strict=True):
        assert Tokenizer.from_folder(tmp_path).chat_template == expected
        (tmp_path / file).unlink()
    assert Tokenizer.from_folder(tmp_path).chat_template == "config"
    write(tmp_path, tokenizer_config={"chat_template": named[:1]})
    with pytest.raises(ModelError, match=r"\['other'\] and none named 'default'"):
        Tokenizer.from_folder(tmp_path)


def test_save_and_read_again(tmp_path: Path) -> None:
    config = {"eos_token": "<|endoftext|>", "model_max_length": 77, "chat_template": "old"}
    first = Tokenizer.from_folder(write(tmp_path / "a", tokenizer_config=config))
    first.add_special_tokens({"pad_token": "<pad>", "extra_special_tokens": ["<image>"]})
    first.padding_side = "left"
    first.chat_template = "{{ messages[0].content }}\r\n"
    first.save(tmp_path / "b")
    again = Tokenizer.from_folder(tmp_path / "b")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    text = "the <image>cat<|endoftext|>"
    assert again.encode(text) == first.encode(text) == theirs.encode(text)
    for other in (again, theirs):
        assert (other.pad_token_id, other.eos_token_id, other.bos_token) == (270, 0, None)
        assert other.padding_side == "left"
        assert other.decode([0, 270, 271, 1], skip_special_tokens=True) == ""
    assert again.chat_template == first.chat_template
    assert theirs.model_max_length == 77
    assert theirs.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


# ---- calls -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    backend = trained()
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(backend, {"pad_token": "<|endoftext|>"})


def test_one_text_and_many(small: Tokenizer) -> None:
    a, the_cat = small.encode("a"), small.encode("the cat")
    assert a[0] == 1
    assert small.encode("a", add_special_tokens=False) == a[1:]
    assert small("a") == {"input_ids": a, "attention_mask": [1, 1]}
    assert small(["a"])["input_ids"] == [a]
    assert small([]) == {"input_ids": [], "attention_mask": []}
    gap = len(the_cat) - len(a)
    assert gap > 0
    right, left = small(["a", "the cat"], padding=True), None
    assert right["input_ids"] == [a + [0] * gap, the_cat]
    assert right["attention_mask"] == [[1] * len(a) + [0] * gap, [1] * len(the_cat)]
    left = small(["a", "the cat"], padding="longest", padding_side="left")
    assert left["input_ids"] == [[0] * gap + a, the_cat]
    assert left["attention_mask"][0] == [0] * gap + [1] * len(a)


def test_rows_of_ids_are_batched_like_texts(small: Tokenizer) -> None:
    texts = ["a", "the cat"]
    rows = [small.encode(text) for text in texts]
    copy = [list(row) for row in rows]
    assert small.batch(rows, padding=True) == small(texts, padding=True)
    assert rows == copy  # padding is not written into the caller's rows


@pytest.mark.parametrize(("kind", "array"), [("np", np.ndarray), ("pt", torch.Tensor)])
def test_arrays(small: Tokenizer, kind: str, array: Any) -> None:
    one, two = small("a", return_tensors=kind), small(["a", "b"], return_tensors=kind)
    assert isinstance(one["input_ids"], array)
    assert tuple(one["input_ids"].shape) == (1, 2)
    assert tuple(two["attention_mask"].shape) == (2, 2)
    assert str(one["input_ids"].dtype).endswith("int64")
    with pytest.raises(InvalidArgument, match="pass padding=True"):
        small(["a", "the cat sat"], return_tensors=kind)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "max_length"}, "needs max_length"),
        ({"padding": "most"}, "allowed are False, True, 'longest'"),
        ({"padding_side": "up"}, "allowed are None, 'left', 'right'"),
        ({"return_tensors": "tf"}, "allowed are None, 'np', 'pt'"),
    ],
)
def test_choices(small: Tokenizer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        small("a", **options)


def test_padding_needs_a_pad_token_and_a_side() -> None:
    tokenizer = Tokenizer(trained())
    with pytest.raises(InvalidArgument, match=r"set it, for example to tokenizer\.eos_token"):
        tokenizer(["a", "b"], padding=True)
    tokenizer.pad_token, tokenizer.padding_side = "<s>", "middle"
    with pytest.raises(InvalidArgument, match=r"tokenizer\.padding_side='middle'"):
        tokenizer(["a", "b"], padding=True)


def test_unknown_special_token_name(small: Tokenizer) -> None:
    with pytest.raises(InvalidArgument, match="'pad'; allowed are bos_token"):
        small.add_special_tokens({"pad": "<pad>"})


@pytest.mark.parametrize("wrap", [list, tuple, np.array, torch.tensor, iter])
def test_decode_takes_any_row(small: Tokenizer, wrap: Callable[[list[int]], Any]) -> None:
    ids = small.encode("the cat")
    assert small.decode(wrap(ids)) == "<s>the cat"
    assert small.decode(wrap(ids), skip_special_tokens=True) == "the cat"
    assert small.batch_decode([wrap(ids), ids[-1:]], True) == ["the cat", small.decode(ids[-1])]
    assert small.decode(wrap([*ids, 5000])) == "<s>the cat"


@pytest.mark.parametrize("ids", [[[1, 2]], "12", [1.5], [3, -200], np.ones((2, 2), int), [2**32]])
def test_not_a_row_of_ids(small: Tokenizer, ids: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"batch_decode|is not a token id"):
        small.decode(ids)


def test_clean_up_follows_the_file_and_the_call() -> None:
    text = "I 'm here , and it 's n't ' so ' ? Y ! We 've ."
    for flag in (False, True):
        tokenizer = Tokenizer(trained(), {"clean_up_tokenization_spaces": flag})
        ids = tokenizer.encode(text)
        cleaned = "I'm here, and it'sn't'so '? Y! We've."
        assert tokenizer.decode(ids) == (cleaned if flag else text)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=True) == cleaned
        assert tokenizer.batch_decode([ids], clean_up_tokenization_spaces=False) == [text]


def test_the_class_can_be_inspected() -> None:
    assert Tokenizer.pad_token_id is None


# ---- placeholders ----------------------------------------------------------------------------


def test_expand() -> None:
    assert expand([1, 9, 2, 9], 9, [3, 1]) == [1, 9, 9, 9, 2, 9]


@given(st.lists(st.integers(0, 3)), st.data())
def test_expand_keeps_the_rest(ids: list[int], data: st.DataObject) -> None:
    found = ids.count(0)
    counts = data.draw(st.lists(st.integers(1, 5), min_size=found, max_size=found))
    expanded = expand(ids, 0, counts)
    assert [id for id in expanded if id] == [id for id in ids if id]
    assert len(expanded) == len(ids) - found + sum(counts)
    runs = "".join(map(str, expanded)).replace("0", "x")
    shortened = iter(counts)
    for id in ids:  # the i-th placeholder's copies stand where it stood
        width = next(shortened) if id == 0 else 1
        assert runs[:width] == ("x" if id == 0 else str(id)) * width
        runs = runs[width:]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([3], "2 placeholders.*for 1 media given"),
        ([1, 1, 1], "2 placeholders.*for 3 media given"),
        ([1, 0], "at least one token"),
    ],
)
def test_expand_refuses(counts: list[int], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        expand([9, 9], 9, counts)
