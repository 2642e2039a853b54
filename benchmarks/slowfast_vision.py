"""Slow-Fast's vision tower (ConvNeXt-XXL at 576 pixels) beside timm's on a CPU: one JSON line.

Both hold the same random weights and run alternately in one process, timm with its frames in NCHW
and in channels-last order. Speeds are those of the median run, beside the best of some matrix
products of the tower's shapes in the same minutes. Seconds of CPU are given, too: with
OMP_NUM_THREADS=1 they say on a busy machine what elapsed time cannot. Peak memory is that of a
fresh process above what it held with the weights loaded, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vidlm.vision.convnext import ConvNeXt, ConvNeXtConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import torchvision_on_cpu  # noqa: F401  (before timm, which imports torchvision)

# isort: split
from timm.models.convnext import ConvNeXt as Timm

CONFIG = ConvNeXtConfig()
FRAMES = {"bfloat16": 2, "float32": 1}  # of a call; more are slower in timm, not in vidlm
CLOSE = {"bfloat16": 0.05, "float32": 1e-4}
PRODUCTS = ((1024, 1024, 1024), (1296, 1536, 6144), (1296, 6144, 1536), (2592, 1536, 1536))
Encode = Callable[[Tensor], Tensor]


def fill(tower: nn.Module, dtype: torch.dtype) -> None:
    """Weights that keep features at their size, in place of those on the meta device."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(tower.named_parameters()):
        values = torch.empty(parameter.shape, dtype=dtype).uniform_(-1, 1, generator=generator)
        norm = parameter.ndim == 1 and name.endswith(".weight")
        values.mul_(0.1 if parameter.ndim == 1 else (3 / parameter[0].numel()) ** 0.5).add_(norm)
        put(tower, name, nn.Parameter(values, requires_grad=False))


def put(tower: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(tower.get_submodule(owner), leaf, parameter)


def towers(dtype: torch.dtype) -> tuple[ConvNeXt, Timm]:
    """vidlm's and timm's, with one set of weights between them."""
    with torch.device("meta"):
        ours = ConvNeXt(CONFIG)
        theirs = Timm(num_classes=0, depths=CONFIG.depths, dims=CONFIG.dims, norm_eps=CONFIG.eps)
    theirs.head = nn.Identity()
    fill(theirs, dtype)
    for name, parameter in theirs.named_parameters():
        put(ours, re.sub(r"\.gamma$", ".weight", name), parameter)
    return ours.eval(), theirs.eval()


def features(tower: Timm, pixels: Tensor) -> Tensor:
    return tower.forward_features(pixels).flatten(2).transpose(1, 2)


def pixels(frames: int, dtype: torch.dtype) -> Tensor:
    shape = (frames, 3, CONFIG.image_size, CONFIG.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def work() -> float:
    """TFLOP of a frame."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        ConvNeXt(CONFIG)(torch.empty(1, 3, CONFIG.image_size, CONFIG.image_size))
    return counter.get_total_flops() / 1e12


def seconds(run: Encode, x: Tensor) -> tuple[float, float]:
    """Elapsed, and of CPU."""
    began, used = time.perf_counter(), time.process_time()
    run(x)
    return time.perf_counter() - began, time.process_time() - used


def product_rate(dtype: torch.dtype) -> float:
    """TFLOP/s of the fastest of PRODUCTS."""
    rates = []
    for m, k, n in PRODUCTS:
        a, b = torch.ones(m, k, dtype=dtype), torch.ones(n, k, dtype=dtype).t()
        out = torch.empty(m, n, dtype=dtype)
        for _ in range(5):
            taken, _ = seconds(lambda a, b=b, out=out: torch.mm(a, b, out=out), a)
            rates.append(2e-12 * m * k * n / taken)
    return max(rates)


def race(name: str, runs: int) -> dict[str, object]:
    dtype = getattr(torch, name)
    ours, theirs = towers(dtype)
    last = torch.channels_last
    encoders: dict[str, Encode] = {
        "vidlm": ours,
        "timm": lambda x: features(theirs, x),
        "timm_channels_last": lambda x: features(theirs, x.to(memory_format=last)),
    }
    found = [encode(pixels(1, dtype)).float() for encode in encoders.values()]  # a warm-up, too
    apart = max(float((f - found[0]).abs().max() / found[0].abs().max()) for f in found)
    assert apart < CLOSE[name], f"features differ by {apart:.1e} of the largest in {name}"
    x = pixels(FRAMES[name], dtype)
    taken: dict[str, list[tuple[float, float]]] = {library: [] for library in encoders}
    peak = 0.0
    for _ in range(runs):
        for library, encode in encoders.items():
            taken[library].append(seconds(encode, x))
        peak = max(peak, product_rate(dtype))
    return {"frames": len(x), **summary(taken, len(x), peak)}


def summary(taken: dict[str, list[tuple[float, float]]], frames: int, peak: float) -> dict:
    medians = {
        library: [statistics.median(column) / frames for column in zip(*times, strict=True)]
        for library, times in taken.items()
    }
    mine, cpu = medians.pop("vidlm")
    speeds = {
        library: {
            "frames_per_s": round(1 / elapsed, 3),
            "tflop_per_s": round(work() / elapsed, 3),
            "cpu_s_per_frame": round(used, 2),
        }
        for library, (elapsed, used) in {"vidlm": (mine, cpu), **medians}.items()
    }
    ratios = {
        f"ratio_to_{library}": {"elapsed": round(elapsed / mine, 2), "cpu": round(used / cpu, 2)}
        for library, (elapsed, used) in medians.items()
    }
    peaks = {"product_tflop_per_s": round(peak, 3), "of_product": round(work() / mine / peak, 3)}
    return {**peaks, **speeds, **ratios}


def high_water() -> int:
    """Peak resident bytes of this process; ru_maxrss would begin with the parent's."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def probe(library: str, frames: int) -> None:
    ours, theirs = towers(torch.bfloat16)
    x = pixels(frames, torch.bfloat16)
    before = high_water()
    with torch.inference_mode():
        made = ours(x) if library == "vidlm" else features(theirs, x)
    assert made.shape == (frames, CONFIG.patches, CONFIG.hidden_size)
    print(high_water() - before)


def peak_mb(library: str, frames: int) -> int:
    call = [sys.executable, __file__, "--probe", library, str(frames)]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    return int(done.stdout) >> 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=list(FRAMES), choices=list(FRAMES))
    parser.add_argument("--probe", nargs=2, metavar=("LIBRARY", "FRAMES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        probe(args.probe[0], int(args.probe[1]))
        return
    with torch.inference_mode():
        speed = {name: race(name, args.runs) for name in args.dtypes}
    memory = {
        library: {f"{frames}_frames": peak_mb(library, frames) for frames in (2, 8)}
        for library in ("vidlm", "timm")
    }
    result = {"threads": torch.get_num_threads(), "tflop_per_frame": round(work(), 3), **speed}
    print(json.dumps({"benchmark": "slowfast_vision", **result, "peak_mb": memory}))


if __name__ == "__main__":
    main()
