"""Loading peaks at the size of what is kept, whatever that is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from house import ROOT

# Run in a process of its own: the high-water mark of this one would hide it.
MEASURE = """
import re, sys
from pathlib import Path
import torch
from vidlm import LlavaForConditionalGeneration
from vidlm.quant import PRESETS, preset

def status(key):
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\\s+(\\d+) kB", text)[1]) * 1024

folder, wanted = sys.argv[1:]
words = {"dtype": wanted}
if wanted in PRESETS:
    words = {"dtype": "bfloat16", "quantization_config": preset(wanted)}
before = status("VmRSS")
model = LlavaForConditionalGeneration.from_pretrained(folder, **words)
size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
print(size, status("VmHWM") - before)
"""
WIDE = {
    "image_token_index": 3,
    "vision_feature_layer": -1,
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 28,
        "patch_size": 14,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": 40000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
    },
}
CASES = [  # what is loaded, the kernels' switch, the least it takes
    ("bfloat16", "1", 300e6),
    ("float32", "1", 600e6),
    *((kind, switch, 160e6) for kind in ("int8", "int4", "nf4") for switch in "10"),
]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize(("wanted", "switch", "least"), CASES)
def test_loading_peaks_at_the_size_of_the_weights(
    wanted: str, switch: str, least: float, wide: Path
) -> None:
    size, peak = map(int, run(MEASURE, switch, str(wide), wanted).split())
    assert size > least
    assert peak <= size + 0.15 * 300e6


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vidlm import LlavaConfig, LlavaForConditionalGeneration

    folder = tmp_path_factory.mktemp("wide")
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig.from_dict(WIDE))
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", **WIDE}))
    content = {n: torch.zeros(p.shape, dtype=torch.bfloat16) for n, p in model.named_parameters()}
    save_file(content, folder / "model.safetensors")
    return folder


def run(code: str, switch: str, *args: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "VIDLM_NATIVE": switch},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
