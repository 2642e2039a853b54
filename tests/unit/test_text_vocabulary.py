"""A tokenizer of vocab.json and merges.txt is the one of tokenizer.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vidlm.errors import ModelError
from vidlm.text import Tokenizer


def test_a_qwen_tokenizer_of_vocabulary_and_merges(shared: Path, tmp_path: Path) -> None:
    """Research code saves these files alone."""
    source = shared / "data/tokenizers/qwen2.5"
    content = json.loads((source / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in content["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    shutil.copy(source / "tokenizer_config.json", tmp_path)
    made, known = Tokenizer.from_folder(tmp_path), Tokenizer.from_folder(source)
    texts = (
        "<|im_start|>user\nWhat's THIS, 1234 cafe\u0301?\n\n<|im_end|>",
        "  def f(x):\n\treturn x**2  # \u00fcber",
        "\u732b\u304c\u9ce9\u3092 \U0001f600\r\n",
    )
    for text in texts:
        assert made.encode(text) == known.encode(text)
        assert made.decode(made.encode(text)) == known.decode(known.encode(text))
