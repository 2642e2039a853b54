"""Why training attention on a CPU is the textbook form: forward and backward, beside torch's own.

Shapes are those of training the demo model: frames of 16 patches, and packed question rows. Both
forms run alternately in one process, after their gradients were found equal. One JSON line.
"""

from __future__ import annotations

import json
import statistics
import time

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vidlm.nn.attention import _matmul

SHAPES = {"vit 160 frames of 16": (160, 4, 16, 48), "decoder 16 rows of 328": (16, 4, 328, 48)}


def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return _matmul(q, k, v, causal)


def peer(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=causal)


def once(attend, shape: tuple[int, ...], causal: bool) -> tuple[float, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(shape, generator=generator).bfloat16().requires_grad_() for _ in range(3)
    )
    began = time.perf_counter()
    attend(q, k, v, causal).float().square().sum().backward()
    return time.perf_counter() - began, q.grad


def main() -> None:
    result = {}
    for name, shape in SHAPES.items():
        causal = name.startswith("decoder")
        grads = [once(form, shape, causal)[1].float() for form in (ours, peer)]
        error = (grads[0] - grads[1]).abs().max() / grads[1].abs().max()
        assert error < 0.05, f"{name}: gradients differ by {error:.3f} of the largest"
        times = [[once(form, shape, causal)[0] for form in (ours, peer)] for _ in range(15)]
        mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        result[name] = {
            "textbook_ms": round(mine * 1e3, 2),
            "sdpa_ms": round(theirs * 1e3, 2),
            "ratio": round(mine / theirs, 3),
        }
    print(json.dumps({"benchmark": "attention_backward", **result}))


if __name__ == "__main__":
    main()
