"""Chat templates: the Jinja text of a checkpoint, rendered as transformers renders it.

A template comes with the checkpoint and is not trusted: it runs in Jinja's immutable sandbox, and
of the messages it sees plain JSON values only, never a path, an image or any other object with
methods.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vidlm.errors import InvalidArgument


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks what the assistant says.

    Training code uses it to find the tokens to learn; here the body is simply rendered.
    """

    tags = {"generation"}  # noqa: RUF012  (how Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope of its own, as in the reference: a {% set %} inside does not leak out.
        return nodes.Scope(body, lineno=line)


def render_chat(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    special_tokens: Mapping[str, str],
    **kwargs: Any,
) -> str:
    """The prompt that a chat template makes of messages.

    `special_tokens` are names such as bos_token, and `kwargs` anything else the template knows
    (tools, documents, add_system_prompt); a keyword wins over a special token. A message's entries
    that are None count as absent. Raises InvalidArgument, naming the template's line, if it fails.
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
    try:
        return _compiled(template).render(values)
    except Exception as error:  # a template can raise anything: it is a program
        line = _template_line(error)
        where = f" at line {line}" if line is not None else ""
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        raise InvalidArgument(
            f"the chat template fails{where}: {kind}{error}; give messages in the form it expects, "
            "or set another template"
        ) from error


@lru_cache(maxsize=8)  # compiling takes milliseconds, and a server renders one per request
def _compiled(template: str) -> Template:
    """The template, with the filter, functions and tags that those on the hub rely on."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


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
