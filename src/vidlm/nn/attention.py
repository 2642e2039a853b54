"""attend: causal, over packed tokens. attend_all: every patch of a frame to every other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softmax

from vidlm import native
from vidlm.native import Cache, Coded
from vidlm.nn.step import Pages, Room, Step


def attend(q: Tensor, k: Tensor, v: Tensor, step: Step, layer: int) -> Tensor:
    """Causal grouped-query attention.

    q (T, H, E), k and v (T, K, E) of the step's new tokens -> (T, H, E). Each token sees the
    earlier tokens of its own sequence, cached or new, and itself.
    """
    if step.trace.attentions is not None:
        return _shown(q, k, v, step, layer)
    if step.pages is not None:
        return _paged(q, k, v, step, step.pages, layer)
    if step.uniform:
        return _uniform(q, k, v, len(step.lengths))
    rows = []
    for segment in step.segments():
        part = slice(segment.start, segment.stop)
        if segment.kv is None:
            keys, values = k[part].transpose(0, 1), v[part].transpose(0, 1)
        else:
            keys, values = segment.kv.append(layer, k[part], v[part])
        single = segment.stop - segment.start == 1
        rows.append((_decode if single else _prefill)(q[part], keys, values))
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def _paged(q: Tensor, k: Tensor, v: Tensor, step: Step, pages: Pages, layer: int) -> Tensor:
    keys, values = pages.layer(layer, k, v)  # (K, N, E) each, coded or not
    if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.dtype != k.dtype:
        k, v = k.to(keys.dtype), v.to(values.dtype)  # under autocast: the cache serves others, too
    native.store(k, v, keys, values, pages.slots)
    if max(step.lengths) == 1:
        return native.decode_attention(q, keys, values, pages.tables, pages.lengths, pages.block)
    rows = []
    for i, (segment, span) in enumerate(zip(step.segments(), pages.spans, strict=True)):
        part = q[segment.start : segment.stop]
        found = None
        if not isinstance(span, slice):  # its blocks lie here and there
            found = _blocks(part, keys, values, pages, i, len(span))
        if found is None:  # new tokens, too, as they are stored: where a chunk ends changes nothing
            found = _prefill(part, *_numbers(keys, values, span, part, pages.room))
        rows.append(found)
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def _numbers(
    keys: Cache, values: Cache, span: slice | Tensor, like: Tensor, room: Room
) -> tuple[Tensor, Tensor]:
    """Keys and values (K, S, E) of a sequence; of what is coded, until they are asked for again."""
    if not isinstance(keys, Coded):
        return native.numbers(keys, span, like.dtype), native.numbers(values, span, like.dtype)
    K, _, E = keys.shape
    S = span.stop - span.start if isinstance(span, slice) else len(span)
    first, second = room.take((2, K, S, E), like)
    return (
        native.numbers(keys, span, like.dtype, first),
        native.numbers(values, span, like.dtype, second),
    )


def _blocks(
    q: Tensor, keys: Cache, values: Cache, pages: Pages, sequence: int, length: int
) -> Tensor | None:
    """As `_prefill`, of keys and values where they lie; None where that cannot be done."""
    if isinstance(keys, Coded) or isinstance(values, Coded):
        return None
    return native.flash_blocks(q, keys, values, pages.tables[sequence], length, pages.block)


def _shown(q: Tensor, k: Tensor, v: Tensor, step: Step, layer: int) -> Tensor:
    """`attend` by the textbook, whose weights (H, n, S) go to the step's trace."""
    assert step.trace.attentions is not None
    rows, shown = [], []
    for segment in step.segments():
        part = slice(segment.start, segment.stop)
        keys, values = k[part].transpose(0, 1), v[part].transpose(0, 1)
        if segment.kv is not None:
            keys, values = segment.kv.append(layer, k[part], v[part])
        heads = q[part].transpose(0, 1)[None]  # (1, H, n, E)
        weights = _weights(heads, keys[None], causal=True)[0]
        rows.append((weights @ _spread(values[None], q.shape[1]))[0].transpose(0, 1))
        shown.append(weights)
    step.trace.attentions.append(shown)
    return torch.cat(rows)


def attend_memory(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Without a mask: q (n, H, E) over keys and values (K, S, E) -> (n, H, E)."""
    found = native.flash(q[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None], False)
    if found is not None:
        return found[0]
    out = _full(q.transpose(0, 1)[None], keys[None], values[None], causal=False)
    return out[0].transpose(0, 1)


def attend_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without a mask inside each frame: (F, P, H, E) each -> (F, P, H, E)."""
    found = native.flash(q, k, v, causal=False)
    if found is not None:
        return found
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (F, H, P, E)
    return _full(q, k, v, causal=False).transpose(1, 2)


def weigh_all(q: Tensor, k: Tensor) -> Tensor:
    """The weights of attend_all: (F, P, H, E) each -> (F, H, P, P)."""
    return _weights(q.transpose(1, 2), k.transpose(1, 2), causal=False)


def _uniform(q: Tensor, k: Tensor, v: Tensor, sequences: int) -> Tensor:
    """Sequences of one length and no cache: the batched operator takes them all at once."""
    q, k, v = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in (q, k, v))  # (B, ., n, E)
    return _full(q, k, v, causal=True).transpose(1, 2).flatten(0, 1)


def _full(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """q (B, H, n, E), k and v (B, K, n, E), all rows of all sequences at once -> (B, H, n, E)."""
    if q.requires_grad and q.device.type == "cpu":
        return _matmul(q, k, v, causal)
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


def _matmul(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The textbook form, for training on a CPU, where the backward of torch's fused operator is
    slow: 60 against 4 ms for 256 frames of 16 patches in bfloat16, 43 against 20 ms for 32
    sequences of 330 tokens (benchmarks/attention_backward.py)."""
    weights = _weights(q, k, causal)
    return weights @ _spread(v, q.shape[1])


def _spread(x: Tensor, heads: int) -> Tensor:
    """(B, K, S, E) -> (B, H, S, E), every key/value head as often as query heads share it."""
    groups = heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _weights(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """q (B, H, n, E) at the end of k (B, K, S, E) -> (B, H, n, S) that add up to 1 over S."""
    scores = (q * q.shape[-1] ** -0.5) @ _spread(k, q.shape[1]).transpose(-1, -2)
    if causal:
        n, S = scores.shape[-2:]
        hidden = torch.full((n, S), -torch.inf, dtype=scores.dtype, device=scores.device)
        scores = scores + hidden.triu(1 + S - n)
    return softmax(scores, dim=-1)


def _prefill(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q (n, H, E) at the end of keys and values (K, S, E)."""
    found = native.flash(q[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None], True)
    if found is not None:
        return found[0]
    n, S = q.shape[0], keys.shape[1]
    mask = _at_the_end(n, S, q) if S > n else None
    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.shape[1] != keys.shape[0],
    )
    return out[0].transpose(0, 1)


def _at_the_end(n: int, S: int, like: Tensor) -> Tensor:
    """A mask for later chunks: row i sees the S - n cached tokens and the first i + 1 new ones."""
    if like.is_cuda:
        # Says it without an entry for each, with which flash attention is out of the question.
        # Imported here because torch's compiler comes along: a second, once.
        from torch.nn.attention.bias import causal_lower_right

        mask = causal_lower_right(1, 1)  # given n and S, it would take memory for 2nS numbers
        mask.seq_len_q, mask.seq_len_kv = n, S
        return mask
    return torch.ones(n, S, dtype=torch.bool, device=like.device).tril(S - n)


def _decode(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q (1, H, E) over keys and values (K, S, E): heads of a group become rows, no copies."""
    _, H, E = q.shape
    K = keys.shape[0]
    rows = q.view(K, H // K, E)
    scores = torch.bmm(rows, keys.transpose(1, 2)) * E**-0.5  # (K, H/K, S)
    weights = softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
    return torch.bmm(weights, values).view(1, H, E)
