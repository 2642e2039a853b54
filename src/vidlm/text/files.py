"""What the small JSON files around tokenizer.json add to it: special tokens and a chat template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from vidlm.errors import ModelError
from vidlm.hub import read_json

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
MORE_SPECIAL = ("additional_special_tokens", "extra_special_tokens")


def text_of(token: Any) -> str | None:
    """A token's text, from the text itself or the {"content": ...} that some files hold."""
    content = token["content"] if isinstance(token, Mapping) else token
    return None if content is None else str(content)


def optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def find_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template, from the newest of the places that checkpoints keep it in."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_bytes().decode("utf-8-sig")
    template = (
        optional(folder / "chat_template.json").get("chat_template")
        or optional(folder / "processor_config.json").get("chat_template")
        or config.get("chat_template")
    )
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, Mapping):
        if "default" not in template:
            raise ModelError(
                f"{folder} has the chat templates {sorted(template)} and none named 'default'; "
                "write the one to use into chat_template.jinja"
            )
        template = template["default"]
    return template


def with_legacy(
    config: Mapping[str, Any], legacy: Mapping[str, int], backend: Backend
) -> dict[str, Any]:
    """`config` with what an added_tokens.json, which has ids but no flags, adds to it.

    A token has the flags of tokenizer.json. One that is not in there is special if it is listed as
    such, and not normalised: a normaliser that prepends "▁" would keep it from ever matching.
    """
    known = dict(config.get("added_tokens_decoder") or {})
    present = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    special = set(declared_special(config))
    for content, id in legacy.items():
        flags = {"content": content, "normalized": False, "special": content in special}
        if content in present:
            flags = present[content].__getstate__()
        known.setdefault(str(id), flags)
    return {**config, "added_tokens_decoder": known}


def declared_special(config: Mapping[str, Any]) -> Iterator[str]:
    """Every token that a tokenizer_config.json calls special by name or in a list."""
    for name in (*NAMED, *MORE_SPECIAL):
        value = config.get(name) or []
        if name in NAMED:
            value = [value] if value else []
        elif isinstance(value, Mapping):  # {"image_token": "<image>"}
            value = list(value.values())
        yield from filter(None, map(text_of, value))


def add_declared(backend: Backend, config: Mapping[str, Any]) -> None:
    """Add the tokens that tokenizer_config.json has beyond tokenizer.json, at the ids it says."""
    declared = config.get("added_tokens_decoder") or {}
    for id, flags in sorted(
        ((int(id), flags) for id, flags in declared.items()), key=itemgetter(0)
    ):
        token = AddedToken(**{key: value for key, value in flags.items() if key != "__type"})
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != id:
            raise ModelError(
                f"tokenizer_config.json gives {token.content!r} the id {id}, tokenizer.json makes "
                f"it {backend.token_to_id(token.content)}; the files are of different versions, "
                "download both again"
            )
    add_special(backend, declared_special(config))


def add_special(backend: Backend, tokens: Iterable[str]) -> None:
    """Make tokens special; those that are special already keep their flags."""
    added = backend.get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special}
    new = [token for token in dict.fromkeys(tokens) if token not in special]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in new])
