"""Chat templates: the Jinja text of a checkpoint, rendered as transformers renders it.

A template comes with the checkpoint and is not trusted: it runs in Jinja's immutable sandbox, and
of the messages it sees plain JSON values only, never a path, an image or any other object with
methods.
"""

from __future__ import annotations

import json
import re
import secrets
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vidlm.errors import InvalidArgument

_BEGIN, _END = "__generation_begin__", "__generation_end__"


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks what the assistant says.

    Training code uses it to find the tokens to learn. The body is rendered between two variables,
    which are empty unless `render_chat` is given `Marks`.
    """

    tags = {"generation"}  # noqa: RUF012  (how Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.Name(name, "load")]) for name in (_BEGIN, _END))
        # A scope of its own, as in the reference: a {% set %} inside does not leak out.
        return nodes.Scope([begin, *body, end], lineno=line)


@dataclass(frozen=True)
class Marks:
    """Strings that show, in a rendered text, where generated stretches begin and end and where the
    final message's last text stops. They are random, so that no message can contain them."""

    begin: str
    end: str
    stop: str

    @classmethod
    def fresh(cls) -> Marks:
        nonce = secrets.token_hex(12)
        return cls(f"<{nonce}-begin>", f"<{nonce}-end>", f"<{nonce}-stop>")

    def spans(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        """`text` without the marks, and the (start, end) of each generated stretch in it."""
        pieces, length = [], 0
        spans: list[tuple[int, int]] = []
        begun: list[int] = []
        for piece in re.split(f"({re.escape(self.begin)}|{re.escape(self.end)})", text):
            if piece == self.begin:
                begun.append(length)
            elif piece == self.end and begun:
                spans.append((begun.pop(), length))
            elif piece != self.end:
                pieces.append(piece)
                length += len(piece)
        return "".join(pieces), spans


def template_variables(template: str) -> frozenset[str]:
    """The names that a template reads from outside. Raises InvalidArgument if it is no template."""
    try:
        names = _variables(template)
    except TemplateError as error:
        raise _failed(error) from error
    return names - {_BEGIN, _END}


def marks_generation(template: str) -> bool:
    """Whether a template says, by `{% generation %}`, what the assistant generates."""
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None


def render_chat(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    special_tokens: Mapping[str, str],
    marks: Marks | None = None,
    **kwargs: Any,
) -> str:
    """The prompt that a chat template makes of messages.

    `special_tokens` are names such as bos_token, and `kwargs` anything else the template knows
    (tools, documents, add_system_prompt); a keyword wins over a special token. A message's entries
    that are None count as absent. `marks` stand around what is generated. Raises InvalidArgument,
    naming the template's line, if it fails.
    """
    if template is None:
        raise InvalidArgument(
            "the checkpoint has no chat template; set tokenizer.chat_template to a Jinja template, "
            "or write the prompt as one text"
        )
    if not messages:
        raise InvalidArgument("there are no messages; a chat needs at least one")
    values = {
        "tools": None,  # defined, since templates ask `tools is not none`
        "documents": None,
        **special_tokens,
        **{name: _plain(value) for name, value in kwargs.items()},
        "messages": [
            _plain({key: value for key, value in message.items() if value is not None})
            for message in messages
        ],
        "add_generation_prompt": add_generation_prompt,
    }
    if marks is not None:
        values |= {_BEGIN: marks.begin, _END: marks.end}
    try:
        return _compiled(template).render(values)
    except Exception as error:  # a template can raise anything: it is a program
        raise _failed(error) from error


def _failed(error: Exception) -> InvalidArgument:
    line = _template_line(error)
    where = f" at line {line}" if line is not None else ""
    kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
    return InvalidArgument(
        f"the chat template fails{where}: {kind}{error}; give messages in the form it expects, "
        "or set another template"
    )


@lru_cache(maxsize=8)  # compiling takes milliseconds, and a server renders one per request
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


@lru_cache(maxsize=8)
def _variables(template: str) -> frozenset[str]:
    return frozenset(meta.find_undeclared_variables(_environment().parse(template)))


def _environment() -> Environment:
    """With the filter, functions and tags that templates on the hub rely on."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter escapes <, > and & for web pages."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _plain(value: Any) -> Any:
    """`value` in JSON types, anything else by its type's name: <Image>.

    Templates only ask whether a part has media, and the sandbox would let them call any method
    whose name has no leading underscore, for example a path's write_text.
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or type(value) in (str, int, float, bool):
        return value
    # A subclass, an enum say: keep the value, lose the methods.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    return f"<{type(value).__name__}>"


def _template_line(error: Exception) -> int | None:
    """The line of the template in which `error` arose, innermost first."""
    if isinstance(error, TemplateSyntaxError):
        return error.lineno
    frames = list(traceback.walk_tb(error.__traceback__))
    return next(
        (line for frame, line in reversed(frames) if frame.f_code.co_filename == "<template>"),
        None,
    )
