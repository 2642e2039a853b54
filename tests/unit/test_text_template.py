"""text/template.py: chat templates render as the reference renders them, and stay in their box."""

from __future__ import annotations

import re
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from vidlm.errors import InvalidArgument
from vidlm.text import Tokenizer, render_chat

# The form of llava-interleave's prompts: all images of a message, then a line for each text.
INTERLEAVE = """\
{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- for part in message['content'] if part['type'] == 'image' %}
        {{- '<image>' }}
    {%- endfor %}
    {%- for part in message['content'] if part['type'] == 'text' %}
        {%- if message['role'] == 'assistant' %}
            {%- generation %}
                {{- '\\n' + part['text'] }}
            {%- endgeneration %}
        {%- else %}
            {{- '\\n' + part['text'] }}
        {%- endif %}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def said(role: str, *parts: str) -> dict[str, Any]:
    """A message; a part is a text, or an image where it is "@"."""
    content = [
        {"type": "image"} if part == "@" else {"type": "text", "text": part} for part in parts
    ]
    return {"role": role, "content": content}


def render(template: str, *messages: dict[str, Any], **kwargs: Any) -> str:
    return render_chat(
        template, messages or ({"role": "user"},), **{"special_tokens": {}, **kwargs}
    )


def test_interleave_form() -> None:
    chat = [
        said("user", "What is new?", "@", "@", "And old?"),
        said("assistant", "A <hat> & 'coat'."),
        said("user", "Thanks"),
    ]
    assert render(INTERLEAVE, *chat, add_generation_prompt=True) == (
        "<|im_start|>user\n<image><image>\nWhat is new?\nAnd old?<|im_end|>\n"
        "<|im_start|>assistant\n\nA <hat> & 'coat'.<|im_end|>\n"
        "<|im_start|>user\n\nThanks<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render(INTERLEAVE, chat[2]) == "<|im_start|>user\n\nThanks<|im_end|>\n"


SAME_AS_REFERENCE = [
    INTERLEAVE,
    "{{ bos_token }}{{ messages[0].role }}{{ pad_token }}",
    "{% for m in messages %}\n  {% if loop.last %}\n{% break %}\n {% endif %}\nx\n{% endfor %}\n",
    "{{ messages | tojson }} {{ {'b': '<é>', 'a': 1} | tojson(indent=2, sort_keys=true) }}",
    "{% set n = 1 %}{% generation %}{% set n = 2 %}{{ n }}{% endgeneration %}{{ n }}",
    "{% for m in messages %}{% generation %}{{ loop.index }}{% endgeneration %}{% endfor %}",
    "{{ tools is none }}{{ documents is none }}{{ extra }}{{ absent is defined }}",
    "{{ messages[0].content is defined }} {{ 'x' in messages[0] }}",
    "  {% if true %}  \n  a\n  {% endif %}  \n\nb\n",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}",
]


@pytest.mark.parametrize("template", SAME_AS_REFERENCE)
@pytest.mark.parametrize("prompt", [True, False])
def test_as_the_reference_renders(template: str, prompt: bool) -> None:
    reference = pytest.importorskip("transformers.utils.chat_template_utils")
    chat = [said("user", "@", "hé"), said("assistant", "ok"), said("system", "a", "b")]
    values = {"bos_token": "<s>", "extra": {"k": [1, None]}}
    [theirs], _ = reference.render_jinja_template(
        [chat], chat_template=template, add_generation_prompt=prompt, **values
    )
    ours = render_chat(
        template,
        chat,
        add_generation_prompt=prompt,
        special_tokens={"bos_token": "<s>"},
        extra=values["extra"],
    )
    assert ours == theirs


@pytest.mark.parametrize("name", ["qwen1.5", "qwen2.5"])
def test_real_templates(shared: Path, name: str) -> None:
    reference = pytest.importorskip("transformers.utils.chat_template_utils")
    tokenizer = Tokenizer.from_folder(shared / "data" / "tokenizers" / name)
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So <that>."}]
    tools = [{"type": "function", "function": {"name": "f", "description": "é & <b>"}}]
    for given in (None, tools):
        [theirs], _ = reference.render_jinja_template(
            [chat], chat_template=tokenizer.chat_template, tools=given, add_generation_prompt=True
        )
        ours = render_chat(
            tokenizer.chat_template,
            chat,
            add_generation_prompt=True,
            special_tokens=tokenizer.special_tokens_map,
            tools=given,
        )
        assert ours == theirs
        assert "So <that>.<|im_end|>\n<|im_start|>assistant\n" in ours


def test_a_keyword_wins_over_a_special_token() -> None:
    assert render("{{ bos_token }}", special_tokens={"bos_token": "a"}, bos_token="b") == "b"


def test_none_in_a_message_is_absent() -> None:
    template = "{{ 'content' in messages[0] }} {{ messages[0].tool_calls is defined }}"
    message: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": []}
    assert render(template, message) == "False True"
    assert message["content"] is None


def test_strftime_now() -> None:
    year = render("{{ strftime_now('%Y') }}")
    assert year in (str(datetime.now().year), str(datetime.now().year - 1))


def test_no_template_and_no_messages() -> None:
    with pytest.raises(InvalidArgument, match=r"no chat template; set tokenizer\.chat_template"):
        render_chat(None, [{"role": "user"}], special_tokens={})
    with pytest.raises(InvalidArgument, match="at least one"):
        render_chat("x", [], special_tokens={})


@pytest.mark.parametrize(
    ("template", "line", "message"),
    [
        ("a\n{% if %}", 2, "Expected an expression"),
        ("a\nb\n{% generation %}x", 3, "Unexpected end of template"),
        ("a\n{{ raise_exception('only user roles') }}", 2, "only user roles"),
        ("\n\n{{ 'a' + 1 }}", 3, "TypeError: "),
        ("\n{{ messages[0].x.y }}", 2, "has no attribute 'x'"),
        ("{% macro f() %}\n{{ 1 / 0 }}\n{% endmacro %}\n{{ f() }}", 2, "ZeroDivisionError"),
        ("\n{{ ''.__class__.__mro__ }}", 2, "is unsafe"),
        ("\n{{ messages.append(1) }}", 2, "is unsafe"),
        ("\n{{ range(10 ** 9) | list }}", 2, "Range too big"),
    ],
)
def test_an_error_names_the_line(template: str, line: int, message: str) -> None:
    with pytest.raises(InvalidArgument, match=f"at line {line}: .*{re.escape(message)}"):
        render(template)


class Dangerous:
    def __init__(self) -> None:
        self.called = False

    def write(self) -> str:
        self.called = True
        return "written"


class Colour(StrEnum):
    RED = "red"

    def shout(self) -> str:
        return "RED!"


def test_a_template_sees_plain_values_only() -> None:
    """The sandbox allows any method without a leading underscore, such as a path's write_text."""
    bomb = Dangerous()
    message = {"role": "user", "content": [{"type": "image", "image": bomb, "path": Path("x")}]}
    [part] = render(
        "{% for p in messages[0].content %}{{ p.image }} {{ p.path }}{% endfor %}", message
    ).splitlines()
    assert re.fullmatch("<Dangerous> <.*Path>", part)
    for template in ("{{ messages[0].content[0].image.write() }}", "{{ extra.write() }}"):
        with pytest.raises(InvalidArgument, match="no attribute 'write'"):
            render(template, message, extra=bomb)
    assert not bomb.called


def test_subclasses_of_plain_values_keep_the_value() -> None:
    message = {"role": Colour.RED, "n": True, "f": 0.5, "t": ("a",)}
    assert render("{{ messages[0] | tojson }}", message) == (
        '{"role": "red", "n": true, "f": 0.5, "t": ["a"]}'
    )
    with pytest.raises(InvalidArgument, match="no attribute 'shout'"):
        render("{{ messages[0].role.shout() }}", message)
