"""Between padded batches, which users pass, and packed sequences, which models run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vidlm.errors import InvalidArgument
from vidlm.models.base import Encoded


def mask_of(ids: Tensor | None, embeds: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """The (B, L) bool mask of real tokens, of ids (B, L) or embeds (B, L, D), one of the two;
    every token is real where no attention_mask was given."""
    rows = ids if ids is not None else embeds
    if rows is None or (ids is not None and embeds is not None):
        raise InvalidArgument("give exactly one of input_ids and inputs_embeds")
    if attention_mask is None:
        return torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
    if attention_mask.shape != rows.shape[:2]:
        raise InvalidArgument(
            f"attention_mask of shape {tuple(attention_mask.shape)} for tokens of shape "
            f"{tuple(rows.shape[:2])}"
        )
    mask = attention_mask.bool()
    if not mask.any(1).all():
        raise InvalidArgument("attention_mask hides a whole row; each needs at least one token")
    return mask


def unpack(packed: Tensor, mask: Tensor) -> Tensor:
    """(T, D) -> (B, L, D) with zeros where the mask is False."""
    out = packed.new_zeros(*mask.shape, packed.shape[-1])
    out[mask] = packed
    return out


def share(placeholders: Sequence[int], items: Sequence[int], kind: str = "image") -> list[int]:
    """How many media of one kind each row takes, in order, when they have these numbers of tokens.

    Raises InvalidArgument where a row's placeholders do not end with an item.
    """
    counts, at = [], 0
    for row, wanted in enumerate(placeholders):
        start, have = at, 0
        while have < wanted and at < len(items):
            have += items[at]
            at += 1
        if have != wanted:
            raise InvalidArgument(
                f"row {row} has {wanted} {kind} placeholder tokens, and the {kind}s in order give "
                f"{have} for it; pass as many {kind}s as the prompt names, uncut"
            )
        counts.append(at - start)
    if at != len(items):
        raise InvalidArgument(f"{len(items)} {kind}s were given, the prompts name {at}")
    return counts


def flatten(encoded: Sequence[Encoded]) -> Tensor | None:
    """Features of all media, one behind the other: (M, D), as transformers' image_hidden_states."""
    return torch.cat([item.tokens for item in encoded]) if encoded else None


def stacked(pixels: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """One tensor of items that agree in shape; a list of those that do not."""
    alike = len({item.shape for item in pixels}) == 1
    return torch.stack(list(pixels)) if alike else list(pixels)


def padded(pixels: Sequence[Tensor]) -> Tensor:
    """Items (T, ...) that differ in T alone -> (N, most T, ...), zeros behind the shorter ones."""
    most = max(len(item) for item in pixels)
    out = pixels[0].new_zeros(len(pixels), most, *pixels[0].shape[1:])
    for row, item in zip(out, pixels, strict=True):
        row[: len(item)] = item
    return out
