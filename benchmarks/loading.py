"""Peak memory and time of loading a checkpoint, beside transformers: one JSON line.

A random LLaVA checkpoint (bfloat16, some 600 MB unless --layers says otherwise) is written by
vidlm; each library loads it in processes of their own, alternately. Peak memory is the process's
largest resident set less the one after the imports, over the size of the weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from vidlm import LlavaConfig, LlavaForConditionalGeneration

PROBE = """
import re, sys, time
import torch
sys.path.insert(0, {tests!r})
if {library!r} == "transformers":
    import torchvision_on_cpu
from {library} import LlavaForConditionalGeneration
def peak():  # ru_maxrss would begin with the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before, began = peak(), time.perf_counter()
model = LlavaForConditionalGeneration.from_pretrained({folder!r}, dtype=torch.bfloat16)
seconds = time.perf_counter() - began
parts = (part for p in model.parameters() for part in p.flatten().split(1 << 20))
total = sum(part.float().sum().item() for part in parts)  # which reads all of a memory map
print((peak() - before), seconds, total)
"""


def write(folder: Path, layers: int) -> int:
    """A checkpoint of a 0.5B model's width; returns the bytes of its weights."""
    config = LlavaConfig.from_dict(
        {
            "image_token_index": 151646,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 2,
                "num_attention_heads": 16,
                "image_size": 384,
                "patch_size": 14,
            },
            "text_config": {
                "model_type": "qwen2",
                "vocab_size": 152000,
                "hidden_size": 1024,
                "intermediate_size": 2816,
                "num_hidden_layers": layers,
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
                "tie_word_embeddings": True,
            },
        }
    )
    model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(p.nbytes for p in model.parameters())


def once(library: str, folder: Path) -> tuple[float, float, float]:
    tests = str(Path(__file__).resolve().parents[1] / "tests")
    code = PROBE.format(library=library, folder=str(folder), tests=tests)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, seconds, total = map(float, done.stdout.split())
    return peak, seconds, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8, help="decoder layers")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        size = write(Path(name), args.layers)
        found: dict[str, list[tuple[float, float, float]]] = {"vidlm": [], "transformers": []}
        for _ in range(args.runs):
            for library, runs in found.items():
                runs.append(once(library, Path(name)))
    sums = {round(total, 2) for runs in found.values() for _, _, total in runs}
    assert len(sums) == 1, f"the libraries loaded different weights: {sums}"
    result = {
        library: {
            "peak_over_weights": round(statistics.median(r[0] for r in runs) / size, 3),
            "seconds": round(statistics.median(r[1] for r in runs), 2),
        }
        for library, runs in found.items()
    }
    print(json.dumps({"benchmark": "loading", "weights_mb": size >> 20, **result}))


if __name__ == "__main__":
    main()
