"""The repository keeps the house rules, and each rule catches what it is there to catch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import house
from house import ROOT, Rule, Source

# ---- over the repository: a test for each rule, reporting every violation at once ------------


def hold(rule: Rule, *folders: str) -> None:
    found = [line for source in house.sources(*folders) for line in rule(source)]
    assert not found, "\n".join(["", *dict.fromkeys(found)])


def test_the_package_is_found() -> None:
    assert "errors" in [source.module for source in house.sources("src/vidlm")]


def test_imports_go_down() -> None:
    hold(house.imports_upward, "src/vidlm")


def test_neighbours_stay_apart() -> None:
    hold(house.imports_sideways, "src/vidlm")


def test_applications_use_public_names() -> None:
    hold(house.imports_past_the_door, "src/vidlm")


def test_oracles_are_not_imported() -> None:
    hold(house.imports_oracles, "src/vidlm")


def test_torch_free_modules_import_no_torch() -> None:
    hold(house.imports_torch, "src/vidlm")


def test_files_are_short() -> None:
    hold(house.too_long, "src/vidlm", "tests", "benchmarks", "examples")


def test_the_architecture_fits_a_screen() -> None:
    page = ROOT / "ARCHITECTURE.md"
    if not page.exists():
        pytest.skip("there is no ARCHITECTURE.md")
    assert not list(house.too_long(Source(page.name, page.read_text("utf-8"))))


def test_functions_are_short() -> None:
    hold(house.long_functions, "src/vidlm")


def test_functions_take_few_parameters() -> None:
    hold(house.many_parameters, "src/vidlm")


def test_exemptions_are_needed() -> None:
    needed = [key for source in house.sources("src/vidlm") for key in house.over_parameters(source)]
    assert sorted(house.EXEMPT.keys() - needed) == []


def test_errors_are_not_swallowed() -> None:
    hold(house.swallows_errors, "src/vidlm")


def test_the_library_does_not_print() -> None:
    hold(house.prints, "src/vidlm")


def test_tensors_are_made_of_a_named_dtype() -> None:
    hold(house.leaves_dtype_to_torch, "src/vidlm")


def test_files_are_written_whole_or_not_at_all() -> None:
    hold(house.writes_in_place, "src/vidlm")


def test_images_are_opened_by_named_formats() -> None:
    hold(house.opens_any_image, "src/vidlm", "benchmarks", "examples")


def test_files_start_with_a_docstring() -> None:
    hold(house.starts_undocumented, "src/vidlm")


@pytest.mark.parametrize("name", ["", *house.LIGHT])
def test_light_modules_load_no_torch(name: str) -> None:
    full = f"vidlm.{name}".rstrip(".")
    below = [m for m in house.package_modules() if name and house.within(m, full)]
    assert not loaded_by({full, *below}, {"torch", *house.NEVER})


def loaded_by(modules: set[str], heavy: set[str]) -> set[str]:
    """Which of the `heavy` modules a fresh interpreter holds after importing `modules`."""
    code = f"import sys, {', '.join(sorted(modules))}; print(*({heavy!r} & set(sys.modules)))"
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_loaded_by_sees_what_is_loaded() -> None:
    assert loaded_by({"json"}, {"json.decoder", "torch"}) == {"json.decoder"}


# ---- over bad sources: every rule must catch its own -----------------------------------------

KNOWN = frozenset({"vidlm.models", "vidlm.models.base", "vidlm.engine", "vidlm.engine.scheduler"})
NINE = "a, b, c, d, e, f, g, h, i"
EIGHT = "a, b, /, c, d, *e, f, g, **h"
SWALLOW = "try:\n    x()\nexcept {}:\n    {}\n"


def found(rule: Rule, place: str, text: str) -> list[str]:
    path = place if "." in place else f"src/vidlm/{place}.py"
    return list(rule(Source(path, text, KNOWN)))


def a_function(lines: int, header: str = "def f():") -> str:
    return "\n".join([header, *["    x = 1"] * (lines - 1), ""])


BAD = [
    (house.imports_upward, "nn/step", "import vidlm.engine"),
    (house.imports_upward, "nn/step", "from vidlm.models.base import Family"),
    (house.imports_upward, "nn/step", "from vidlm import models"),
    (house.imports_upward, "nn/step", "from vidlm import AutoProcessor"),
    (house.imports_upward, "nn/step", "def f():\n    from ..engine import Engine"),
    (house.imports_upward, "nn/__init__", "from ..engine import Engine"),
    (house.imports_upward, "nn/step", "if TYPE_CHECKING:\n    from vidlm.engine import Engine"),
    (house.imports_upward, "errors", "from .hub import fetch"),
    (house.imports_upward, "nn/step", "importlib.import_module('vidlm.engine')"),
    (house.imports_upward, "nn/__init__", "import_module('..engine', __name__)"),
    (house.imports_upward, "nn/step", "import vidlm.unheard_of"),
    (house.imports_upward, "unheard_of", "x = 1"),
    (house.imports_sideways, "nn/step", "from vidlm.vision import vit"),
    (house.imports_sideways, "nn/step", "from vidlm.weights import load"),
    (house.imports_sideways, "media/video", "from ..hub import locate"),
    (house.imports_sideways, "engine/runner", "from vidlm.models.llava import Model"),
    (house.imports_past_the_door, "server/app", "from vidlm.engine.scheduler import Scheduler"),
    (house.imports_past_the_door, "server/app", "from vidlm.engine import scheduler"),
    (house.imports_past_the_door, "server/app", "from vidlm.engine import _Engine"),
    (house.imports_past_the_door, "server/app", "from vidlm.media.video import _decode"),
    (house.imports_past_the_door, "server/app", "from vidlm.nn import attention"),
    (house.imports_past_the_door, "server/app", "from vidlm.batch import run"),
    (house.imports_past_the_door, "demo/show", "from vidlm.models import base"),
    (house.imports_past_the_door, "cli", "from vidlm.weights import load"),
    (house.imports_oracles, "hf/auto", "import transformers"),
    (house.imports_oracles, "hf/auto", "def f():\n    from torchvision.transforms import Resize"),
    (house.imports_oracles, "hf/auto", "import_module('transformers')"),
    (house.imports_torch, "media/video", "import torch.nn as nn"),
    (house.imports_torch, "engine/scheduler", "from torch import Tensor"),
    (house.too_long, "hub", "x = 1\n" * 401),
    (house.too_long, "models/llava", "x = 1\n" * 451),
    (house.too_long, "compat/llava", "x = 1\n" * 151),
    (house.too_long, "tests/unit/test_hub.py", "x = 1\n" * 401),
    (house.too_long, "ARCHITECTURE.md", "words\n" * 61),
    (house.long_functions, "hub", a_function(61)),
    (house.long_functions, "hub", "class A:\n  def f(self):\n" + "    x = 1\n" * 60),
    (house.long_functions, "hub", a_function(61, "async def f():")),
    (house.many_parameters, "hub", f"def f({NINE}): ..."),
    (house.many_parameters, "hub", f"def f({EIGHT[:-5]}, h, **i): ..."),
    (house.many_parameters, "hub", f"class A:\n    def f(self, {NINE}): ..."),
    (house.many_parameters, "hub", f"def f():\n    def g({NINE}): ..."),
    (house.swallows_errors, "hub", SWALLOW.format("Exception", "pass")),
    (house.swallows_errors, "hub", SWALLOW.format("(OSError, Exception)", "pass")),
    (house.swallows_errors, "hub", SWALLOW.format("BaseException as error", "...")),
    (house.swallows_errors, "hub", "for i in x:\n try: f()\n except Exception: continue"),
    (house.swallows_errors, "hub", "try:\n    x()\nexcept:\n    raise"),
    (house.swallows_errors, "hub", "with contextlib.suppress(Exception):\n    x()"),
    (house.prints, "hub", "def f():\n    print('x')"),
    (house.leaves_dtype_to_torch, "native/ops", "scratch = torch.empty(n)"),
    (house.leaves_dtype_to_torch, "native/ops", "scratch = torch.zeros((n, m), device='cpu')"),
    (house.leaves_dtype_to_torch, "native/ops", "x = f(torch.tensor([0.5]).to(device))"),
    (house.leaves_dtype_to_torch, "native/ops", "from torch import full\nx = full((n,), 0.0)"),
    (house.leaves_dtype_to_torch, "native/ops", "x = torch.Tensor(3, 4)"),
    (house.leaves_dtype_to_torch, "native/ops", "x = torch.arange(0, 1, 0.1, **options)"),
    (house.writes_in_place, "hf/model", "(folder / 'config.json').write_text(text)"),
    (house.writes_in_place, "hf/model", "with path.open('wb') as file: pass"),
    (house.writes_in_place, "hf/model", "with open(path, mode='a') as file: pass"),
    (house.writes_in_place, "hf/model", "handle, path = tempfile.mkstemp()"),
    (house.opens_any_image, "hf/llava", "from PIL import Image\nImage.open(path)"),
    (house.opens_any_image, "hf/llava", "import PIL.Image\nPIL.Image.open(path, 'r')"),
    (house.opens_any_image, "hf/llava", "from PIL.Image import open"),
    (house.starts_undocumented, "nn/__init__", ""),
    (house.starts_undocumented, "hub", "# a comment\nimport os"),
]

GOOD = [
    (house.imports_upward, "engine/runner", "from ..nn.step import Step\nfrom . import blocks"),
    (house.imports_upward, "hub", "import os\nfrom vidlm.errors import ModelError"),
    (house.imports_upward, "cli", "from vidlm import __version__, errors"),
    (house.imports_sideways, "engine/runner", "from vidlm.models.base import Family"),
    (house.imports_sideways, "engine/runner", "from vidlm.models import base"),
    (house.imports_sideways, "vision/vit", "from ..nn import linear"),
    (house.imports_past_the_door, "server/app", "from vidlm.engine import Engine\nimport vidlm.hf"),
    (house.imports_past_the_door, "server/app", "from vidlm.media.video import read"),
    (house.imports_past_the_door, "server/app", "from vidlm import __version__"),
    (house.imports_past_the_door, "server/app", "from ._routes import _route"),
    (house.imports_past_the_door, "demo/show", "from vidlm.text import Tokenizer"),
    (house.imports_past_the_door, "demo/train", "from vidlm.models.base import Family"),
    (house.imports_past_the_door, "cli", "from vidlm.server.app import serve"),
    (house.imports_past_the_door, "api", "from vidlm.engine.scheduler import Scheduler"),
    (house.imports_oracles, "hf/auto", "import transformers_like"),
    (house.imports_torch, "engine/runner", "import torch"),
    (house.imports_torch, "text", "import torchlike"),
    (house.too_long, "hub", "x = 1\n" * 400),
    (house.too_long, "models/llava", "x = 1\n" * 450),
    (house.long_functions, "hub", a_function(60)),
    (house.many_parameters, "hub", f"class A:\n    def f(self, {EIGHT}): ..."),
    (house.many_parameters, "hub", f"def f({EIGHT}): ..."),
    (house.swallows_errors, "hub", SWALLOW.format("Exception", "raise")),
    (house.swallows_errors, "hub", SWALLOW.format("OSError", "pass")),
    (house.prints, "demo/show", "print('x')"),
    (house.prints, "cli", "print('x')"),
    (house.leaves_dtype_to_torch, "native/ops", "scratch = torch.empty(n, dtype=torch.float32)"),
    (house.leaves_dtype_to_torch, "native/ops", "x = torch.empty_like(y)\nz = y.new_empty(3)"),
    (house.leaves_dtype_to_torch, "native/ops", "x = arena.empty(3)\ny = np.zeros(3)"),
    (house.leaves_dtype_to_torch, "native/ops", "def f(empty=torch.empty): return empty(3)"),
    (house.writes_in_place, "hf/model", "with path.open('rb') as file: pass\nopen('wax.mp4')"),
    (house.writes_in_place, "files", "with open(path, 'ab') as file: pass"),
    (house.opens_any_image, "hf/llava", "Image.open(path, formats=['PNG'])\nopen(path)"),
    (house.starts_undocumented, "hub", '"""Files of a checkpoint."""'),
]


@pytest.mark.parametrize(("rule", "place", "text"), BAD)
def test_a_rule_catches(rule: Rule, place: str, text: str) -> None:
    assert len(found(rule, place, text)) == 1


@pytest.mark.parametrize(("rule", "place", "text"), GOOD)
def test_a_rule_lets_pass(rule: Rule, place: str, text: str) -> None:
    assert found(rule, place, text) == []


def test_an_exemption_names_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(house, "EXEMPT", {"hf.auto:Model.generate": "as in the reference"})
    text = f"class Model:\n    def generate({NINE}): ...\n    def forward({NINE}): ..."
    assert [line.split()[1] for line in found(house.many_parameters, "hf/auto", text)] == [
        "Model.forward"
    ]
