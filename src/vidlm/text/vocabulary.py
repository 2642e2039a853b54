"""Qwen2's tokenizer out of vocab.json and merges.txt, for folders without a tokenizer.json.

Research code that loads the slow tokenizer saves no other files. What is in neither, how text is
cut before its bytes are merged, is the same for all tokenizers of this class.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from vidlm.hub import read_json

FILES = ("vocab.json", "merges.txt")
CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def from_vocabulary(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder that has these files and says it is Qwen2's; None of another."""
    config = folder / "tokenizer_config.json"
    if not config.is_file() or not all((folder / name).is_file() for name in FILES):
        return None
    if read_json(config).get("tokenizer_class") not in CLASSES:
        return None
    vocab, merges = (str(folder / name) for name in FILES)
    made = Tokenizer(models.BPE.from_file(vocab, merges))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return made
