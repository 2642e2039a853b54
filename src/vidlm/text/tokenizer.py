"""The tokenizer of a checkpoint.

Its tokenizer.json is followed exactly; normaliser and post-processor are never rebuilt from other
files. For the Llama family this matters: the classic file puts a "▁" before every stretch of text
that follows an added token, and the recorded outputs of those models depend on it.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, overload

from tokenizers import Tokenizer as Backend

from vidlm.errors import InvalidArgument, ModelError
from vidlm.files import write_files
from vidlm.text.files import (
    MORE_SPECIAL,
    NAMED,
    add_declared,
    add_special,
    declared_special,
    find_template,
    optional,
    text_of,
    with_legacy,
)
from vidlm.text.stream import clean_up
from vidlm.text.vocabulary import from_vocabulary

ARRAY_LIBRARY = {"np": "numpy", "pt": "torch"}
UNBOUNDED = int(1e30)  # model_max_length of files that do not say it, as transformers has it
SETTABLE = (
    *("bos_token", "eos_token", "unk_token", "pad_token"),
    *("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"),
    *("padding_side", "truncation_side", "model_max_length"),
    *("clean_up_tokenization_spaces", "chat_template"),
)


class _IdOf:
    """The id of a named token; setting the id sets the token."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute

    def __get__(self, owner: Tokenizer | None, kind: type[Tokenizer]) -> int | None:
        token = getattr(owner, self.attribute, None)  # the class itself, asked by help(), has none
        return None if owner is None or token is None else owner.backend.token_to_id(token)

    def __set__(self, owner: Tokenizer, value: int | None) -> None:
        token = None if value is None else owner.convert_ids_to_tokens(value)
        setattr(owner, self.attribute, token)


def _backend(folder: Path) -> Backend:
    path = folder / "tokenizer.json"
    try:
        backend = Backend.from_file(str(path)) if path.is_file() else from_vocabulary(folder)
    except Exception as error:  # the library raises nothing more precise
        raise ModelError(
            f"{path} is not a tokenizer: {error}; download or save the file again"
        ) from error
    if backend is None:
        raise ModelError(
            f"{folder} has no tokenizer.json (tokenizer.model alone is not enough); save one "
            "into it with transformers: AutoTokenizer.from_pretrained(folder, use_fast=True)"
            ".save_pretrained(folder)"
        )
    return backend


class Tokenizer:
    """A checkpoint's tokenizer, with the attribute and method names that users know.

    SETTABLE names the attributes that may be set; any other is an AttributeError, as it would have
    no effect. `backend` is the tokenizers.Tokenizer underneath. The tokenizer itself never
    truncates: model_max_length and truncation_side are for processors that are told to.
    """

    bos_token_id = _IdOf("bos_token")
    eos_token_id = _IdOf("eos_token")
    unk_token_id = _IdOf("unk_token")
    pad_token_id = _IdOf("pad_token")

    def __init__(
        self,
        backend: Backend,
        config: Mapping[str, Any] | None = None,
        *,
        chat_template: str | None = None,
    ) -> None:
        """`config` is what a tokenizer_config.json holds; what it lacks has the usual default."""
        self._config = dict(config or {})
        self.backend = backend
        # A tokenizer.json may carry the padding and truncation of some training run.
        backend.no_padding()
        backend.no_truncation()
        self.bos_token, self.eos_token, self.unk_token, self.pad_token = (
            text_of(self._config.get(name)) for name in NAMED
        )
        self.padding_side: str = self._config.get("padding_side") or "right"
        self.clean_up_tokenization_spaces = bool(
            self._config.get("clean_up_tokenization_spaces", False)
        )
        self.truncation_side: str = self._config.get("truncation_side") or "right"
        self.model_max_length = int(self._config.get("model_max_length") or UNBOUNDED)
        self.chat_template = chat_template
        add_declared(backend, self._config)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in (*SETTABLE, "backend", "_config"):
            raise AttributeError(
                f"a tokenizer has no attribute {name!r} to set; allowed: {', '.join(SETTABLE)}"
            )
        super().__setattr__(name, value)

    @classmethod
    def from_folder(cls, folder: str | PathLike[str]) -> Tokenizer:
        """Read tokenizer.json, or vocab.json and merges.txt of a Qwen2 tokenizer, and the small
        files around it.

        Raises ModelError if tokenizer.json is missing or broken, or the files disagree.
        """
        folder = Path(folder)
        backend = _backend(folder)
        config = optional(folder / "tokenizer_config.json")
        template = find_template(folder, config)
        for key, value in optional(folder / "special_tokens_map.json").items():
            if config.get(key) is None:
                config[key] = value
        legacy = optional(folder / "added_tokens.json")
        return cls(backend, with_legacy(config, legacy, backend), chat_template=template)

    def save(self, folder: str | PathLike[str]) -> None:
        """Write tokenizer.json, tokenizer_config.json and, if there is one, chat_template.jinja.

        transformers' AutoTokenizer reads the folder too.
        """
        write_files(folder, self.files())

    def files(self) -> dict[str, str | bytes]:
        """What `save` writes, by the files' names."""
        added = self.backend.get_added_tokens_decoder()
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self._config,
            **{name: getattr(self, name) for name in NAMED},
            "padding_side": self.padding_side,
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "added_tokens_decoder": {str(id): added[id].__getstate__() for id in sorted(added)},
        }
        config.pop("chat_template", None)  # it goes to the file that wins over all other places
        text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        made: dict[str, str | bytes] = {"tokenizer.json": self.backend.to_str(pretty=True)}
        made["tokenizer_config.json"] = text
        if self.chat_template is not None:
            made["chat_template.jinja"] = self.chat_template
        return made

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary without added tokens; `len()` counts those too."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def all_special_ids(self) -> list[int]:
        """Ids that `skip_special_tokens` removes, ascending."""
        added = self.backend.get_added_tokens_decoder()
        return sorted(id for id, token in added.items() if token.special)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named tokens that are set, as chat templates get them: {"bos_token": "<s>", ...}."""
        return {name: token for name in NAMED if (token := getattr(self, name)) is not None}

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str] | tuple[str, ...]) -> list[int | None]: ...
    def convert_tokens_to_ids(
        self, tokens: str | list[str] | tuple[str, ...]
    ) -> int | list[int | None] | None:
        """Ids of tokens; a token not in the vocabulary has unk's id, or None without one."""
        if isinstance(tokens, str):
            id = self.backend.token_to_id(tokens)
            return self.unk_token_id if id is None else id
        if not isinstance(tokens, Sequence):
            self.check(tokens)
        return [self.convert_tokens_to_ids(token) for token in tokens]

    @overload
    def convert_ids_to_tokens(self, ids: int) -> str | None: ...
    @overload
    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]: ...
    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | list[str | None] | None:
        """Tokens of ids; None for an id beyond the vocabulary (padded embedding rows have such)."""
        tokens = [self.backend.id_to_token(id) for id in _token_ids(ids)]
        return tokens[0] if isinstance(ids, int) else tokens

    def add_special_tokens(self, tokens: Sequence[str] | Mapping[str, Any]) -> int:
        """Add special tokens that are cut out of the text before it is normalised.

        `tokens` is a list, or a map such as {"pad_token": "<pad>", "additional_special_tokens":
        [...]} that also sets the named ones. Returns how many entered the vocabulary.
        """
        if isinstance(tokens, Mapping):
            allowed = (*NAMED, *MORE_SPECIAL)
            if unknown := sorted(set(tokens) - set(allowed)):
                raise InvalidArgument(
                    f"add_special_tokens got {unknown[0]!r}; allowed are {', '.join(allowed)}"
                )
            for name in NAMED:
                if name in tokens:
                    setattr(self, name, text_of(tokens[name]))
        elif isinstance(tokens, str) or not isinstance(tokens, Sequence):
            raise InvalidArgument(
                f"add_special_tokens takes a list of texts or a map, got {tokens!r:.80}"
            )
        else:
            tokens = {"additional_special_tokens": list(tokens)}
        before = len(self)
        add_special(self.backend, declared_special(tokens))
        return len(self) - before

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; `add_special_tokens` lets tokenizer.json add BOS and the like."""
        self.check(text)
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    @staticmethod
    def check(text: str) -> None:
        """Raise InvalidArgument unless this is text that can be encoded."""
        if not isinstance(text, str):
            raise InvalidArgument(
                f"a text is needed, got {type(text).__name__}; pass a str, or the tokenizer itself "
                "a list of them"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument(
                f"the text has half a character ({text[error.start]!r}, a lone surrogate) at "
                f"{error.start}: it was decoded wrongly; read it as UTF-8, or remove it with "
                "text.encode(errors='replace').decode()"
            ) from None

    def decode(
        self,
        ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """The text of one id, a sequence of ids, or a 1-D array or tensor of them.

        Ids beyond the vocabulary have no text. `clean_up_tokenization_spaces` is the file's choice
        unless given.
        """
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        text = self.backend.decode(_token_ids(ids), skip_special_tokens=skip_special_tokens)
        return clean_up(text) if clean_up_tokenization_spaces else text

    def batch_decode(
        self,
        sequences: Iterable[Any],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """The text of each row."""
        options = (skip_special_tokens, clean_up_tokenization_spaces)
        if isinstance(sequences, str) or not hasattr(sequences, "__iter__"):
            raise InvalidArgument(
                f"batch_decode takes rows of token ids, got {type(sequences).__name__}; use decode "
                "for one row"
            )
        return [self.decode(row, *options) for row in sequences]

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
    ) -> dict[str, Any]:
        """{"input_ids", "attention_mask"} of a text or a batch of texts.

        Lists; with return_tensors "np" or "pt" arrays (B, T) of int64, also for a single text.
        Raises InvalidArgument for a choice there is not, or rows of unequal length as an array.
        """
        if not isinstance(text, str | Sequence):
            self.check(text)
        texts = [text] if isinstance(text, str) else list(text)
        # One by one: encode_batch starts threads, and a process that has them may not fork.
        rows = [self.encode(item, add_special_tokens) for item in texts]
        batch = self.batch(
            rows, padding=padding, padding_side=padding_side, return_tensors=return_tensors
        )
        if isinstance(text, str) and return_tensors is None:
            return {name: value[0] for name, value in batch.items()}
        return batch

    def batch(
        self,
        rows: Sequence[Sequence[int]],
        *,
        padding: bool | str = False,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> dict[str, Any]:
        """{"input_ids", "attention_mask"} of rows of ids, as `__call__` gives them for texts.

        padding="max_length" brings rows to `max_length` tokens, longer ones staying as they are;
        `pad_to_multiple_of` rounds the length of padded rows up.
        """
        _require("padding", padding, (False, True, "longest", "max_length", "do_not_pad"))
        _require("padding_side", padding_side, (None, "left", "right"))
        _require("return_tensors", return_tensors, (None, *ARRAY_LIBRARY))
        ids = [list(row) for row in rows]
        masks = [[1] * len(row) for row in ids]
        if padding and padding != "do_not_pad":
            length = max(map(len, ids), default=0)
            if padding == "max_length":
                if max_length is None:
                    raise InvalidArgument("padding='max_length' needs max_length, as batch has it")
                length = max_length
            if pad_to_multiple_of:
                length += -length % pad_to_multiple_of
            self._pad(ids, masks, padding_side or self.padding_side, length)
        if return_tensors is None:
            return {"input_ids": ids, "attention_mask": masks}
        return {
            "input_ids": _array(ids, return_tensors),
            "attention_mask": _array(masks, return_tensors),
        }

    def _pad(self, rows: list[list[int]], masks: list[list[int]], side: str, length: int) -> None:
        """Bring all rows to at least this length, in place."""
        _require("tokenizer.padding_side", side, ("left", "right"))
        pad = self.pad_token_id
        if pad is None:
            raise InvalidArgument(
                f"padding needs a pad token of the vocabulary, tokenizer.pad_token is "
                f"{self.pad_token!r}; set it, for example to tokenizer.eos_token"
            )
        for row, mask in zip(rows, masks, strict=True):
            missing = max(length - len(row), 0)
            at = 0 if side == "left" else len(row)
            row[at:at] = [pad] * missing
            mask[at:at] = [0] * missing


def _require(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise InvalidArgument(
            f"{name}={value!r} is not possible; allowed are {', '.join(map(repr, allowed))}"
        )


def _array(rows: list[list[int]], kind: str) -> Any:
    """Rows as a (B, T) array of int64; its library is imported only here, when asked for."""
    if len({len(row) for row in rows}) > 1:
        raise InvalidArgument(
            f"texts of {sorted({len(row) for row in rows})} tokens do not fit into one array; "
            "pass padding=True"
        )
    library = import_module(ARRAY_LIBRARY[kind])
    return library.asarray(rows, dtype=library.int64)


def _token_ids(ids: Any) -> list[int]:
    """One id, or a flat sequence, array or tensor of ids, as a list."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    try:
        row = [operator.index(id) for id in ([ids] if isinstance(ids, int) else ids)]
    except TypeError as error:
        raise InvalidArgument(
            f"token ids must be one integer or a flat row of integers ({error}); "
            "use batch_decode for several rows"
        ) from error
    if wrong := [id for id in row if not 0 <= id < 2**32]:
        raise InvalidArgument(
            f"{wrong[0]} is not a token id; ids are >= 0, so remove label masks (-100) and "
            "media placeholders before decoding"
        )
    return row
