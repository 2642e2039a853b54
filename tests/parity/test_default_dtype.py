"""Answers do not depend on torch's defaults: not on the dtype, which belongs to the whole process
and which any thread may change (transformers does so while it loads a model), nor on the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import slowfast_forms
import tiny
import video_forms
import vidlm
from defaults_child import clip

TESTS = Path(__file__).resolve().parents[1]
FAMILIES = ("siglip-qwen2-tied", "clip-llama", "next-mistral", "video-llava", "videollama3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    base = tmp_path_factory.mktemp("families")
    made = [slowfast_forms.write(base / "slowfast")]
    for name in FAMILIES:
        if name in tiny.FORMS:
            made.append(tiny.write(base / name, tiny.FORMS[name]))
            continue
        form = video_forms.FORMS[name]
        (base / name).mkdir()
        made.append(form.write(base / name))
        (made[-1] / "chat_template.jinja").write_text(form.template)
    return ["demo", *map(str, made)]


@pytest.mark.parametrize("how", ["bfloat16", "float64", "thread", "device"])
def test_answers_do_not_depend_on_defaults(folders: list[str], how: str) -> None:
    """Neither set before the model is loaded nor after. In a process of its own: a buffer that is
    too small ends it."""
    path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(TESTS / "defaults_child.py"), how, *folders],
        env={**os.environ, "PYTHONPATH": path, "MALLOC_PERTURB_": "165"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {k: v for k, v in json.loads(done.stdout)["wrong"].items() if v} == {}


class _NothingWide(TorchDispatchMode):
    """Notes operators that make float64 of tensors that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = _dtypes((args, kwargs))
        asked = (kwargs or {}).get("dtype") == torch.float64
        if torch.float64 in _dtypes(out) and torch.float64 not in given and not asked:
            self.found.add(str(func))
        return out


def _dtypes(values: Any) -> set[torch.dtype]:
    leaves = torch.utils._pytree.tree_leaves(values)
    return {leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor)}


def test_no_operator_takes_the_default_dtype(
    folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those either that make floating numbers of integers."""
    monkeypatch.setenv("VIDLM_NATIVE", "0")
    found = {}
    for folder in folders:
        torch.set_default_dtype(torch.float64)
        try:
            lm = vidlm.load(folder, dtype="float32")
            with _NothingWide() as mode:
                lm.ask(clip(0), "what?", max_tokens=2, repetition_penalty=1.1, logprobs=1)
                lm.ask(clip(1)[0], "what?", max_tokens=2, temperature=0.5, top_p=0.9, min_p=0.1)
                ids = torch.tensor([[40, 41, 42, 43]])
                lm.model.generate(input_ids=ids, max_new_tokens=2)
                lm.model(input_ids=ids, labels=ids, output_hidden_states=True)
        finally:
            torch.set_default_dtype(torch.float32)
        found[folder] = mode.found
    assert {folder: ops for folder, ops in found.items() if ops} == {}
