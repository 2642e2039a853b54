"""Every family at its published widths, beside transformers: memory, time and logits.

A checkpoint with random bfloat16 weights is written for each; decoders of 7B and more get fewer
layers (--layers), everything else is whole. Each library loads it in a process of its own and
answers one prompt with a video. Peak memory is the largest resident set less that after the
imports; a difference of logits is relative to the largest. One JSON line a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _shapes import NAVIT, QWEN_2B, write_random
from torch import Tensor

VICUNA = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096}
LONG = {"rope_scaling": {"type": "linear", "factor": 2.5}}
MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32064,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "sliding_window": None,
}
YI = {
    "model_type": "llama",
    "vocab_size": 64064,
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rope_theta": 5e6,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
QWEN_7B = {
    **QWEN_2B,
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}


def frames(side: int, per_frame: int, token: int) -> dict[str, Tensor]:
    """Eight frames of `side` x `side` pixels and a prompt around their placeholders."""
    pixels = torch.randn(1, 8, 3, side, side, generator=torch.Generator().manual_seed(1))
    return {"input_ids": _prompt(8 * per_frame, token), "pixel_values_videos": pixels}


def patches(_side: int, _per_frame: int, token: int) -> dict[str, Tensor]:
    """Eight frames of 336 x 588 pixels, as VideoLLaMA3 cuts them."""
    rows = torch.randn(8 * 24 * 42, 588, generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": _prompt(8 * 252, token),
        "pixel_values_videos": rows,
        "video_grid_thw": torch.tensor([[8, 24, 42]]),
        "video_merge_sizes": torch.tensor([2]),
        "video_compression_mask": torch.ones(8 * 252, dtype=torch.bool),
    }


def _prompt(placeholders: int, token: int) -> Tensor:
    ids = [1, *range(3000, 3010), *[token] * placeholders, *range(4000, 4020)]
    return torch.tensor([ids])


@dataclass(frozen=True)
class Shape:
    """A published checkpoint: its family's class names, config.json, and a prompt for it."""

    family: str
    text: dict[str, Any]
    top: dict[str, Any]
    inputs: Callable[[int, int, int], dict[str, Tensor]]
    prompt: tuple[int, int, int]  # pixels of a side, tokens of a frame, placeholder
    whole: bool = False


NEXT = {"vision_config": {**CLIP, "image_size": 336}, "image_token_index": 32001}
VIDEO_LLAVA = {"vision_config": {**CLIP, "image_size": 224}}
SHAPES = {
    "LLaVA-NeXT-Video-7B": Shape(
        "LlavaNextVideo", {**VICUNA, **LONG}, NEXT, frames, (336, 144, 32000)
    ),
    "LLaVA-NeXT-Video-7B-32K": Shape("LlavaNextVideo", MISTRAL, NEXT, frames, (336, 144, 32000)),
    "LLaVA-NeXT-Video-34B": Shape(
        "LlavaNextVideo",
        YI,
        {**NEXT, "image_token_index": 64001, "video_token_index": 64000},
        frames,
        (336, 144, 64000),
    ),
    "Video-LLaVA-7B": Shape("VideoLlava", VICUNA, VIDEO_LLAVA, frames, (224, 257, 32001)),
    "VideoLLaMA3-2B": Shape(
        "VideoLlama3", QWEN_2B, {"vision_config": NAVIT}, patches, (0, 0, 151656), whole=True
    ),
    "VideoLLaMA3-7B": Shape(
        "VideoLlama3", QWEN_7B, {"vision_config": NAVIT}, patches, (0, 0, 151656)
    ),
}

PROBE = """
import json, re, sys, time
import torch
sys.path.insert(0, {tests!r})
if {library!r} == "transformers":
    import torchvision_on_cpu
from {library} import {family}ForConditionalGeneration as Model
inputs = torch.load({folder!r} + "/inputs.pt")
def peak():  # ru_maxrss would begin with the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before, began = peak(), time.perf_counter()
model = Model.from_pretrained({folder!r}, dtype=torch.bfloat16).eval()
seen = {{"load_seconds": time.perf_counter() - began}}
ids = inputs.pop("input_ids")
options = {{"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}}
for name, tokens in (("first_token_seconds", 1), ("seconds_of_8_tokens", 8)):
    began = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(input_ids=ids, **inputs, max_new_tokens=tokens, **options)
    seen[name] = time.perf_counter() - began
seen["peak"] = peak() - before
with torch.inference_mode():
    logits = model(input_ids=ids, **inputs, logits_to_keep=1).logits[0, -1].float()
torch.save(logits, {folder!r} + "/{library}.pt")
print(json.dumps(seen))
"""


def write(folder: Path, shape: Shape, layers: int) -> dict[str, int]:
    """A checkpoint and its prompt; returns its parameters and bytes."""
    text = shape.text if shape.whole else {**shape.text, "num_hidden_layers": layers}
    config = {"text_config": text, **shape.top}
    model = write_random(folder, shape.family, config, torch.bfloat16, lambda name, weight: 0.02)
    torch.save(shape.inputs(*shape.prompt), folder / "inputs.pt")
    weights = list(model.parameters())
    return {
        "parameters": sum(w.numel() for w in weights),
        "bytes": sum(w.nbytes for w in weights),
    }


def once(library: str, family: str, folder: Path) -> dict[str, float]:
    tests = str(Path(__file__).resolve().parents[1] / "tests")
    code = PROBE.format(library=library, family=family, folder=str(folder), tests=tests)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{library} on {folder.name}: {done.stderr[-2000:]}")
    seen: dict[str, float] = json.loads(done.stdout)
    return seen


def measure(name: str, layers: int) -> dict[str, Any]:
    shape = SHAPES[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        size = write(folder, shape, layers)
        found = {}
        for library in ("vidlm", "transformers"):
            seen = once(library, shape.family, folder)
            seen["peak_over_weights"] = seen.pop("peak") / size["bytes"]
            found[library] = {key: round(value, 3) for key, value in seen.items()}
        ours, theirs = (torch.load(folder / f"{library}.pt") for library in found)
        assert float(theirs.std()) > 0, "logits that are all alike show nothing"
        tokens = torch.load(folder / "inputs.pt")["input_ids"].shape[1]
    return {
        "benchmark": "families",
        "checkpoint": name,
        "decoder_layers": shape.text.get("num_hidden_layers", layers) if shape.whole else layers,
        "parameters_billion": round(size["parameters"] / 1e9, 2),
        "prompt_tokens": tokens,
        "logits_difference": round(float((ours - theirs).abs().max() / theirs.abs().max()), 4),
        **found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4, help="of decoders of 7B and more")
    parser.add_argument("--only", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    args = parser.parse_args()
    for name in args.only:
        print(json.dumps(measure(name, args.layers)), flush=True)


if __name__ == "__main__":
    main()
