"""llama.cpp and OpenVINO, each in a process of its own a turn, in a Python that can import it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _shapes import Inputs, Shape
from _sides import Side, relative

SCRIPTS = Path(__file__).resolve().parent / "peers"
PRECISION = {torch.bfloat16: "bf16", torch.float32: "f32"}


class PeerFailed(Exception):
    """It could not be run, or what it says is something else; it is left out, with this reason."""


@dataclass
class Peer:
    """One of peers/*.py: the decoder of a checkpoint and, if it can, the vision tower."""

    name: str
    modules: tuple[str, ...]
    sees: bool
    python: str | None = None
    folder: Path = field(default_factory=Path)
    kind: str | None = None  # of fewer bits, which it has a way of its own to make

    def quantized(self, kind: str) -> Peer:
        """The same of a checkpoint that it has translated, in fewer bits."""
        self._call("quantize", "", kind)
        return replace(self, kind=kind)

    def prepare(self, folder: Path) -> None:
        """Translate a checkpoint."""
        self.folder = folder
        self._call("prepare", "")

    def agree(self, ours: Side, tolerance: float) -> dict[str, Any]:
        """Largest differences, relative to the largest value; raises PeerFailed on larger ones."""
        video, prompt = ours.shape.video(0), ours.shape.text_prompt(0)
        files = {name: str(self.folder / f"{self.name}_{name}.npy") for name in ("logits", "media")}
        seen = self._ask(prompt, 2, video, ours.model.dtype, files)
        mine = ours.logits(prompt)[0]
        theirs = torch.from_numpy(np.load(files["logits"]))
        found = {"version": seen["version"], "logits": round(relative(mine, theirs), 5)}
        if "vision_seconds" in seen:
            with torch.inference_mode():
                features = torch.cat(list(ours.model.get_image_features(**ours.move(video))))
            wanted = torch.from_numpy(np.load(files["media"])).flatten(0, 1).float()
            found["features"] = round(relative(features.float().cpu(), wanted), 5)
        if max(found["logits"], found.get("features", 0)) > tolerance:
            raise PeerFailed(f"disagrees with vidlm, so there is nothing to compare: {found}")
        return found

    def run(self, shape: Shape, tokens: int, dtype: torch.dtype, run: int) -> dict[str, float]:
        """The figures of latency.py that the peer has."""
        prompt, video = shape.text_prompt(3 * run + 1), shape.video(3 * run)
        seen = self._ask(prompt, tokens, video, dtype, {})
        return {name: value for name, value in seen.items() if name not in ("ids", "version")}

    def answer(self, prompt: Inputs, tokens: int, dtype: torch.dtype) -> dict[str, float]:
        """Seconds of a text prompt, and tokens a second after it."""
        return self._ask(prompt, tokens, {}, dtype, {})

    def _ask(
        self, prompt: Inputs, tokens: int, video: Inputs, dtype: torch.dtype, files: dict[str, str]
    ) -> dict[str, Any]:
        asked = {
            "ids": prompt["input_ids"][0].tolist(),
            "tokens": tokens,
            "threads": torch.get_num_threads(),
            "precision": PRECISION[dtype],
            "logits": files.get("logits"),
            "features": files.get("media"),
            "kind": self.kind,
        }
        if self.sees and "pixel_values" in video:
            asked["pixels"] = str(self.folder / "pixels.npy")
            np.save(asked["pixels"], video["pixel_values"].numpy())
        seen: dict[str, Any] = json.loads(self._call("run", json.dumps(asked)).splitlines()[-1])
        return seen

    def _call(self, task: str, request: str, *words: str) -> str:
        assert self.python is not None
        script = str(SCRIPTS / f"with_{self.name}.py")
        command = [self.python, script, task, str(self.folder), *words]
        done = subprocess.run(command, input=request, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PeerFailed(f"{task} ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout


PEERS = (
    Peer("llamacpp", ("llama_cpp", "gguf"), sees=False),
    Peer("openvino", ("openvino", "optimum.intel"), sees=True),
)


def add_peers(parser: argparse.ArgumentParser) -> None:
    for peer in PEERS:
        parser.add_argument(f"--{peer.name}-python", metavar="PATH", help="a Python that has it")


def found_peers(args: argparse.Namespace) -> tuple[list[Peer], dict[str, str]]:
    """Those that a Python was named for or that this one has; and why others are left out."""
    found, absent = [], {}
    for peer in PEERS:
        python = getattr(args, f"{peer.name}_python")
        if python is None and all(map(_importable, peer.modules)):
            python = sys.executable
        if args.device != "cpu":
            absent[peer.name] = f"is measured on CPUs, and this is {args.device}"
        elif python is None:
            absent[peer.name] = f"not importable; name a Python with --{peer.name}-python"
        else:
            found.append(Peer(peer.name, peer.modules, peer.sees, python))
    return found, absent


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it
        return False
