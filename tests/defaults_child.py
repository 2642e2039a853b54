"""Answers of models while torch's defaults are what a user, or another thread, has set.

    python defaults_child.py HOW FOLDER...

HOW is the name of a dtype, "device" (the default device is "meta"), or "thread" (another thread
changes the default dtype all the time). Prints one JSON object: for each folder and way of loading
it the wrong answers, which is none. A crash of the process is told by its exit status.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

import vidlm
from vidlm import native

DTYPES = (torch.bfloat16, torch.float16, torch.float64, torch.float32)
WAYS: tuple[dict[str, Any], ...] = (
    {"dtype": "bfloat16"},
    {"dtype": "float32", "quantize": "int4"},
    {"dtype": "bfloat16", "quantize": "int8"},
)
QUESTIONS = ("what moves?", "does anything stand still in it, or all of it? say where it is, too.")


def clip(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (4, 40, 56, 3), dtype=np.uint8)


def answers(lm: vidlm.LM) -> list[Any]:
    """Of a chat, of a question whose tokens are picked by chance, and of beams."""
    lm.engine.clear()
    options: dict[str, Any] = {"max_tokens": 8, "logprobs": 2}
    chat = lm.chat([clip(0), clip(1)], **options)
    found = [chat.ask(question) for question in QUESTIONS]
    found.append(lm.ask(clip(2), QUESTIONS[0], temperature=1.0, seed=3, top_p=0.9, **options))
    found.append(lm.ask(clip(2), QUESTIONS[0], num_beams=2, max_tokens=3))
    return [(answer.text, [each.logprob for each in answer.logprobs]) for answer in found]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@contextmanager
def changed_by_a_thread() -> Iterator[None]:
    ended = threading.Event()

    def change() -> None:
        while not ended.wait(0.0002):
            for dtype in DTYPES:
                torch.set_default_dtype(dtype)

    thread = threading.Thread(target=change)
    thread.start()
    yield
    ended.set()
    thread.join()
    torch.set_default_dtype(torch.float32)


def wrong(folder: str, way: dict[str, Any], changed: Callable[[], Any]) -> list[str]:
    lm = vidlm.load(folder, **way)
    right = answers(lm)
    with changed():
        after = answers(lm)
        before = answers(vidlm.load(folder, **way))
    found = {"set after load": after, "set before load": before}
    return [f"{when}: {was} for {right}" for when, was in found.items() if was != right]


def main(how: str, folders: list[str]) -> None:
    torch.set_num_threads(1)
    changes = {"device": default_device, "thread": changed_by_a_thread}
    changed = changes.get(how) or (lambda: default_dtype(getattr(torch, how)))
    found = {
        f"{folder} {way}": wrong(folder, way, changed)
        for i, folder in enumerate(folders)
        for way in (WAYS[i % 3], *(WAYS[1:] if folder == "demo" else ()))
    }
    print(json.dumps({"kernels": native.status().used, "wrong": found}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
