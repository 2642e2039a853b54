"""What the guide and our own pages show runs as it is written.

The guide is Hugging Face's page on video-text-to-text models, which the larger corpus holds. Of its
code only this changes: the import line, the checkpoint's name, "cuda" to "cpu", the addresses of
its two videos, and its two helper functions, which vidlm brings.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tiny
from house import ROOT
from vidlm import TextIteratorStreamer
from vidlm.demo.world import draw_pair, write_mp4
from vidlm.hf import DEMO, find

GUIDE = Path("seeds") / "000_9de32104b0c12442.txt"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S)
VIDEO = re.compile(r"(?:https?://[\w./-]+/|vidlm-demo/)?([\w-]+)\.(?:mp4|mov|mkv|webm)")
STILL = re.compile(r"(?:https?://[\w./-]+/)?([\w-]+)\.(?:png|jpg|jpeg)")
HUB_NAME = re.compile(r'"llava-hf/[\w.-]+"')


@dataclass(frozen=True)
class Block:
    """The code of one ```python block, and the line of the page on which it begins."""

    code: str
    line: int

    def run(self, page: str, namespace: dict[str, Any], code: str | None = None) -> None:
        padding = "\n" * self.line  # so that an error names the page's own line
        exec(compile(padding + (code or self.code), page, "exec"), namespace)


def blocks(text: str) -> list[Block]:
    return [
        Block(textwrap.dedent(found["code"]), text.count("\n", 0, found.start("code")))
        for found in BLOCK.finditer(text)
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo model, or a tiny one with random weights where the package has none yet."""
    if (find(DEMO) / "model.safetensors").is_file():
        return DEMO
    return str(tiny.write(tmp_path_factory.mktemp("tiny")))


def write_clips(*paths: Path) -> None:
    """Clips of a pair, in turn: two things that do nearly the same."""
    one, two, _ = draw_pair(np.random.default_rng(0))
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        write_mp4((one, two)[number % 2], path)


# ---- the guide -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guide(shared: Path) -> list[Block]:
    page = shared / GUIDE
    if not page.is_file():
        pytest.skip(f"needs {GUIDE} of the larger corpus")
    found = blocks(page.read_text(encoding="utf-8"))
    assert [block.code.split(maxsplit=1)[0] for block in found] == [
        *("from", "def", "video_1", "user_prompt", "output", "from")
    ]
    return found


HELPERS = "from vidlm import replace_video_with_images, sample_frames\n"


def changed(code: str, checkpoint: str, folder: Path) -> str:
    """The guide's code with what has to change."""
    code = code.replace("from transformers import", "from vidlm import")
    code = HUB_NAME.sub(lambda _: repr(checkpoint), code).replace('"cuda"', '"cpu"')
    return VIDEO.sub(lambda found: str(folder / f"{found[1]}.mp4"), code)


@pytest.fixture
def told(
    guide: list[Block], checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> SimpleNamespace:
    """What the guide's names stand for after it compared two videos, and what it said."""
    write_clips(tmp_path / "cats_1.mp4", tmp_path / "cats_2.mp4")
    namespace: dict[str, Any] = {}
    for block in guide[:5]:
        helpers = block.code.startswith("def replace_video_with_images")
        code = HELPERS if helpers else changed(block.code, checkpoint, tmp_path)
        block.run("guide", namespace, code)
    return SimpleNamespace(**namespace, printed=capsys.readouterr().out)


def test_the_guides_comparison_of_two_videos(told: SimpleNamespace) -> None:
    assert len(told.videos) == 12
    assert len(told.inputs["pixel_values"]) == 12
    assert told.inputs["pixel_values"].dtype == told.model.dtype
    length = told.inputs["input_ids"].shape[1]
    assert told.output.shape[1] > length
    new = told.processor.decode(told.output[0, length:], skip_special_tokens=True)
    assert told.printed.endswith(new + "\n")
    assert "<image>" not in told.printed


def test_the_guides_helpers(told: SimpleNamespace) -> None:
    shown = told.replace_video_with_images("<video> and <video>", 2)
    assert shown == "<image><image> and <image><image>"
    assert len(told.video_1) == len(told.video_2) == 6


def test_streaming_in_a_thread(told: SimpleNamespace) -> None:
    streamer = TextIteratorStreamer(
        told.processor, skip_prompt=True, skip_special_tokens=True, timeout=120
    )
    kwargs = dict(told.inputs, streamer=streamer, max_new_tokens=100, do_sample=False)
    thread = Thread(target=told.model.generate, kwargs=kwargs)
    thread.start()
    pieces = list(streamer)
    thread.join()
    new = told.output[0, told.inputs["input_ids"].shape[1] :]
    assert "".join(pieces) == told.processor.decode(new, skip_special_tokens=True)


def test_quantisation(guide: list[Block], checkpoint: str) -> None:
    """The guide's QuantoConfig; on the CPU, as there may be no GPU."""
    code = changed(guide[5].code, checkpoint, Path()).replace('"cuda"', '"cpu"')
    namespace = {"model_id": checkpoint}
    guide[5].run("guide", namespace, code)
    model = namespace["quantized_model"]
    assert any(type(module).__name__ == "PackedLinear" for module in model.modules())


# ---- our own pages -------------------------------------------------------------------------------


def pages() -> Iterator[Any]:
    for path in PAGES:
        if path.is_file() and blocks(path.read_text(encoding="utf-8")):
            yield pytest.param(path, id=path.relative_to(ROOT).as_posix())


@pytest.mark.parametrize("page", list(pages()))
def test_our_pages(
    page: Path, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of a page share their names, and run where each file exists that they mention."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for block in blocks(page.read_text(encoding="utf-8")):
        code = HUB_NAME.sub(lambda _: repr(checkpoint), block.code)
        code = code.replace(f'"{DEMO}"', repr(checkpoint))
        code = re.sub(r"https?://[\w./-]+/([\w-]+\.\w+)", r"\1", code)
        write_clips(*(Path(found[0]) for found in VIDEO.finditer(code)))
        for found in STILL.finditer(code):
            tiny.picture(0).save(found[0])
        block.run(str(page), namespace, code)


# ---- the reading of pages ------------------------------------------------------------------------

PAGE = """# Title

```bash
vidlm ask clip.mp4
```

1. A step:

   ```python
   value = 1
   if value:
       value += 1
   ```

```python
raise ValueError(value)
```
"""


def test_blocks_are_found_where_they_are() -> None:
    found = blocks(PAGE)
    assert [block.code for block in found] == [
        "value = 1\nif value:\n    value += 1\n",
        "raise ValueError(value)\n",
    ]
    namespace: dict[str, Any] = {}
    found[0].run("page.md", namespace)
    with pytest.raises(ValueError, match="2") as raised:
        found[1].run("page.md", namespace)
    last = raised.traceback[-1]
    assert (str(last.path).endswith("page.md"), last.lineno + 1) == (True, 16)
