"""Three pages of transformers about models: their code, what they document, and tiny checkpoints.

The larger corpus holds the pages. Of their code only this changes: the import lines, the
checkpoints' names, and the addresses of images and videos.
"""

from __future__ import annotations

import ast
import doctest
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import clips
import tiny
import video_forms
from video_forms import FORMS, Form

# ---- code ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """What a snippet left behind: its names, the values of its expressions, what it printed."""

    names: dict[str, Any]
    values: list[Any]
    printed: str

    def __getattr__(self, name: str) -> Any:
        return self.names[name]


@dataclass(frozen=True)
class Snippet:
    """Code of a page, without prompts; the line on which it begins; what the page shows for it."""

    code: str
    line: int
    shown: tuple[str, ...] = ()

    def run(self, page: str, names: dict[str, Any]) -> Ran:
        tree = ast.parse("\n" * self.line + self.code, page)  # an error names the page's line
        values, printed = [], io.StringIO()
        with redirect_stdout(printed):
            for statement in tree.body:
                if isinstance(statement, ast.Expr):
                    expression = ast.Expression(statement.value)
                    values.append(eval(compile(expression, page, "eval"), names))
                else:
                    exec(compile(ast.Module([statement], []), page, "exec"), names)
        return Ran(names, [value for value in values if value is not None], printed.getvalue())


FENCE = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


def fenced(text: str) -> list[Snippet]:
    """The ```python blocks of a page."""
    found = []
    for block in FENCE.finditer(text):
        line = text.count("\n", 0, block.start(1))
        found += (
            prompted(block[1], line) if block[1].startswith(">>>") else [Snippet(block[1], line)]
        )
    return found


def prompted(text: str, line: int = 0) -> list[Snippet]:
    """The lines behind >>> and ... as one snippet, at the places they have in the text."""
    examples = doctest.DocTestParser().get_examples(text)
    code, first = "", examples[0].lineno
    for example in examples:
        code += "\n" * (example.lineno - first - code.count("\n")) + example.source
    shown = tuple(example.want.strip() for example in examples if example.want)
    return [Snippet(code, line + first, shown)]


# A page that lost its fences: the first line of each snippet, and the first behind it.
UNFENCED = (
    ("import torch", "Batch Mixed Media Inference"),
    ("# Image", "Flash-Attention 2 to speed up generation"),
    ("from transformers import VideoLlama3ForConditionalGeneration", "VideoLlama3Config"),
)


def unfenced(text: str) -> list[Snippet]:
    """The code of a page that is nothing but lines."""
    lines = text.split("\n")
    found = []
    for first, behind in UNFENCED:
        assert (lines.count(first), lines.count(behind)) == (1, 1), (first, behind)
        start, end = lines.index(first), lines.index(behind)
        found.append(Snippet("\n".join(lines[start:end]), start))
    return found + prompted(text)


# Pages are converted from the documentation's sources, and in one of them <image> and <video> were
# taken for tags of HTML and left out. Its outputs on record show that they were there.
RESTORED = {
    r"USER: \nWhy is this funny?": r"USER: <video>\nWhy is this funny?",
    r"USER: \nWhat do you see in this video?": r"USER: <video>\nWhat do you see in this video?",
    r"USER: \nHow many cats are there": r"USER: <image>\nHow many cats are there",
    r"USER: \nWhy is this video funny?": r"USER: <video>\nWhy is this video funny?",
    r"USER: \nHow many cats do you see?": r"USER: <image>\nHow many cats do you see?",
}


def restored(code: str) -> str:
    for lost, whole in RESTORED.items():
        code = code.replace(lost, whole)
    assert r"USER: \n" not in code
    return code


HUB_NAME = re.compile(r'"(?:llava-hf|LanguageBind|lkhl)/[\w.-]+"')
PART = re.compile(r'"(image|video|url)": "https?://[\w./-]+/([\w-]+\.\w+)"')


def changed(snippet: Snippet, checkpoint: Path, media: Path) -> Snippet:
    """The snippet with what has to change."""
    code = snippet.code.replace("from transformers import", "from vidlm import")
    code = HUB_NAME.sub(repr(str(checkpoint)), code)
    code = PART.sub(lambda found: f'"{found[1]}": {str(media / found[2])!r}', restored(code))
    return replace(snippet, code=code)


# ---- the media of the pages ----------------------------------------------------------------------

STILLS = ("sora.png", "000000039769.jpg", "pipeline-cat-chonk.jpeg")
VIDEOS = ("cat_and_chicken.mp4", "sample_demo_1.mp4")
FRAMES, RATE = 24, 4  # of every video: six seconds


def write_media(folder: Path) -> Path:
    for seed, name in enumerate(STILLS):
        tiny.picture(seed, 48 + 4 * seed, 72).save(folder / name)
    for seed, name in enumerate(VIDEOS):
        frames = video_forms.clip(seed, FRAMES)
        (folder / name).write_bytes(clips.encode(frames, rate=RATE))
    return folder


def stub_downloads(patch: pytest.MonkeyPatch, media: Path) -> None:
    """huggingface_hub and requests find the pages' media; requests need not be installed."""

    def hf_hub_download(repo_id: str, filename: str, repo_type: str) -> str:
        assert (repo_id, repo_type) == ("raushan-testing-hf/videos-test", "dataset")
        return str(media / filename)

    def get(url: str, stream: bool) -> SimpleNamespace:
        assert (url.startswith("http://images.cocodataset.org/"), stream) == (True, True)
        return SimpleNamespace(raw=io.BytesIO((media / url.rpartition("/")[2]).read_bytes()))

    patch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    patch.setitem(sys.modules, "requests", SimpleNamespace(get=get))


# ---- tiny checkpoints ----------------------------------------------------------------------------

# Every word of the pages' prompts is a token, so that these are about as long as they really are.
WORDS = 640
PROMPTS = (
    "USER: Why is this video funny? ASSISTANT: Why is this funny? USER: What do you see in this",
    " How many cats are there in the image? ASSISTANT: There are two cats. There are two cats",
    " How many cats do you see? What do you see in this video? A baby reading a book. the it",
    " system user assistant\nDescribe this image. What happened in the video? Where is the cat",
    " standing? What color is a banana? Time 0.0s: 1.0s: 2.0s: 3.0s: 4.0s: 5.0s:,",
)
# As the published template has it: all images, all videos, then the texts, each with a space.
VICUNA = """\
{%- for message in messages -%}
{%- if message.role != 'system' -%}
{{ message.role | upper + ': ' }}
{%- for part in message.content if part.type == 'image' -%}{{ '<image>\n' }}{%- endfor -%}
{%- for part in message.content if part.type == 'video' -%}{{ '<video>\n' }}{%- endfor -%}
{%- endif -%}
{%- for part in message.content if part.type == 'text' -%}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{ part.text + ' ' }}{%- endgeneration -%}
{%- else -%}{{ part.text + ' ' }}{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""
# As the recorded prompts have it; parts in their order, and a content that is a text alone.
QWEN = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{{ part.text }}
{%- else -%}{{ '<|' + part.type + '_pad|>\n' }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""
# Of VideoLLaMA3, as published but for the ids: it samples unless told otherwise.
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
GENERATION = {
    **SAMPLED,
    "repetition_penalty": 1.1,
    "eos_token_id": [video_forms.EOS, video_forms.PAD],
    "pad_token_id": video_forms.PAD,
}


def wide(form: Form) -> Form:
    """The form with room for WORDS in its vocabulary."""
    text = {**form.config["text_config"], "vocab_size": WORDS}
    return replace(form, config={**form.config, "text_config": text})


def write_checkpoint(folder: Path, form: Form) -> Path:
    form.write(folder)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        special_tokens=list(video_forms.SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(PROMPTS, trainer)
    made.save(str(folder / "tokenizer.json"))
    if form.family == "LlavaNextVideo":
        (folder / "chat_template.jinja").write_text(VICUNA)
    if form.family == "VideoLlama3":
        (folder / "chat_template.jinja").write_text(QWEN)
        (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


# ---- what the pages document ---------------------------------------------------------------------


@dataclass
class Documented:
    """A class, or a method as Class.method: its arguments, with the text of their default or None,
    and the fields of what it returns."""

    arguments: dict[str, str | None] = field(default_factory=dict)
    fields: tuple[str, ...] = ()


Documentation = dict[str, Documented]

AUTODOC = re.compile(r"^\[\[autodoc\]\] (\w+)((?:\n    - \w+)*)$", re.M)


def by_name(text: str) -> Documentation:
    """A page's source, which names classes and methods and leaves the rest to their code."""
    found = {}
    for entry in AUTODOC.finditer(text):
        found[entry[1]] = Documented()
        for method in re.findall(r"- (\w+)", entry[2]):
            found[f"{entry[1]}.{method}"] = Documented()
    return found


HEADING = re.compile(r"^#### .*\[\[transformers\.([\w.]+)\]\]$", re.M)
RUN_IN = re.compile(r"^\w+?transformers\.([A-Z]\w+\.\w+?)https://\S+?#L\d+(?=\[)", re.M)
ITEM = re.compile(r"^(\w+) \((?:.*?defaults to `?([^`)]+?)`?\))?", re.M)
FIELD = re.compile(r"^- \*\*(\w+)\*\*", re.M)


def in_markdown(text: str) -> Documentation:
    """A page converted to Markdown: headings, "**Parameters:**", and signatures as JSON within the
    line of a method that has no heading."""
    found: Documentation = {}
    for name, section in cut(HEADING, text):
        entry = found[name] = Documented()
        entry.fields = tuple(FIELD.findall(section.partition("**Returns:**")[2]))
        listed = section.rpartition("**Parameters:**")[2].partition("**Returns:**")[0]
        if "**Parameters:**" in section:
            entry.arguments = {item[1]: item[2] for item in ITEM.finditer(listed)}
        for method in RUN_IN.finditer(section):
            signature, _ = json.JSONDecoder().raw_decode(section, method.end())
            names = [part["name"] for part in signature if part["name"] != "**kwargs"]
            found[method[1]] = Documented(dict.fromkeys(names), entry.fields)
    return found


ENTRY = re.compile(r"^(?:class transformers\.)?(\w+)\n\n< >\n\n(?=\()", re.M)
ARGUMENT = re.compile(r"(\w+)(?:: .+?)??(?: = (.+?))?(?= \w+: | \w+ = |$)", re.M)
BULLET = re.compile(r"^  • (\w+) \(", re.M)


def in_lines(text: str) -> Documentation:
    """A page that is nothing but lines: signatures in brackets, "Parameters", "Returns"."""
    found: Documentation = {}
    owner = ""
    for name, section in cut(ENTRY, text):
        owner = name if name[0].isupper() else owner
        signature, _, rest = section.partition("\n")
        listed, _, returned = rest.partition("\nReturns\n")
        inner = signature.split("**kwargs")[0].partition(" ) ")[0].strip("() ")
        arguments = {item[1]: item[2] for item in ARGUMENT.finditer(inner)}
        if "\nParameters\n" in listed:
            arguments = dict.fromkeys(BULLET.findall(listed)) | arguments
        key = name if name == owner else f"{owner}.{name}"
        found[key] = Documented(arguments, tuple(BULLET.findall(returned)))
    return found


def cut(heading: re.Pattern[str], text: str) -> Iterator[tuple[str, str]]:
    """The name in each heading, and the text up to the next one."""
    found = list(heading.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    for match, end in zip(found, ends, strict=True):
        yield match[1], text[match.end() : end]


# ---- the pages -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Page:
    """A page of the corpus: the names of its snippets in their order, how these are read and how
    what it documents is, and the tiny checkpoint its code runs with."""

    file: str
    names: tuple[str, ...]
    read: Callable[[str], list[Snippet]]
    documents: Callable[[str], Documentation]
    form: Form

    def text(self, shared: Path) -> str:
        path = shared / "seeds" / self.file
        if not path.is_file():
            pytest.skip(f"needs seeds/{self.file} of the larger corpus")
        return path.read_text(encoding="utf-8")

    def snippets(self, shared: Path) -> Mapping[str, Snippet]:
        found = sorted(self.read(self.text(shared)), key=lambda snippet: snippet.line)
        return dict(zip(self.names, found, strict=True))


PAGES = {
    "LlavaNextVideo": Page(
        "001_4aa5957ccd5145bd.txt",
        ("chat template", "single", "mixed", "quantised", "flash attention"),
        fenced,
        by_name,
        wide(FORMS["next-vicuna"]),
    ),
    "VideoLlava": Page(
        "002_a24e58390f82252d.txt",
        ("single", "mixed", "quantised", "flash attention", "configuration", "forward"),
        fenced,
        in_markdown,
        wide(FORMS["video-llava"]),
    ),
    "VideoLlama3": Page(
        "004_c8c22ea9426fc254.txt",
        ("single", "batch", "flash attention", "forward"),
        unfenced,
        in_lines,
        wide(FORMS["videollama3-tied"]),
    ),
}


def write_checkpoints(folder: Path) -> dict[str, Path]:
    """A tiny one for each page."""
    return {family: write_checkpoint(folder / family, page.form) for family, page in PAGES.items()}
