"""A short name for a model's weights, which changes with any of them."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from itertools import chain

import torch
from torch import Tensor, nn

from vidlm.weights import Renames

RUN = 128  # 64-bit words whose sum goes into a fingerprint: fewer would cost more than they tell


def fingerprint(model: nn.Module, renames: Renames | None = None) -> str:
    """32 hexadecimal digits that stand for a model's numbers, and take about as long as reading
    them once. Names as published files have them, shapes and dtypes count; config.json does not.

    The bits are taken as 64-bit words, of which each run of 128 is added up, past 64 bits from 0
    again, and the sums are hashed in order. No single number can differ without its run's sum, and
    no two change places but within a run; as nothing is rounded, no order of adding matters.
    """
    hashed = blake2b(digest_size=16)
    published = (renames or Renames()).published
    pairs = chain(model.named_parameters(), model.named_buffers())
    named = [(published(name), tensor) for name, tensor in pairs]
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        hashed.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        for sums in _sums(tensor.detach()):
            hashed.update(memoryview(sums.cpu().numpy()))  # type: ignore[arg-type]
    return hashed.hexdigest()


def _sums(tensor: Tensor) -> Iterator[Tensor]:
    """Of runs of words, and what is left behind them as it is."""
    bits = tensor.contiguous().view(-1).view(torch.uint8)
    if bits.storage_offset() % 8:
        bits = bits.clone()
    whole = len(bits) // (8 * RUN) * (8 * RUN)
    yield bits[:whole].view(torch.int64).view(-1, RUN).sum(1)
    yield bits[whole:]
