"""One `forward` for every family: a padded batch is packed, run, and unpacked again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypedDict, get_type_hints

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vidlm.errors import InvalidArgument, unknown_keyword
from vidlm.hf.cache import Cache
from vidlm.hf.outputs import CausalLMOutputWithPast, ModelOutputWithPast
from vidlm.hf.pack import flatten, mask_of, share, unpack
from vidlm.models.base import Encoded, Kind, Media, VideoModel, insert, memory_of
from vidlm.nn.step import Step, Trace

IGNORED = -100


class ForwardKeywords(TypedDict, total=False):
    """What every family's `forward` takes beside ids, mask and media; all may be left out.

    position_ids     (B, L) or (1, L); real tokens are counted unless given. Without attention_mask
                     and past_key_values, a position that does not go up begins a sequence of its
                     own: packed rows, which do not attend to each other. Without use_cache, too, a
                     position that goes up by more than 1
    past_key_values  the Cache of the forward before; input_ids then holds the new tokens alone and
                     attention_mask all columns so far
    inputs_embeds    (B, L, D) instead of input_ids; media go where it equals the embedding of their
                     placeholder
    use_cache        return past_key_values; None: where the model is not in training mode
    output_attentions, output_hidden_states   return these of every layer
    return_dict      False: a tuple without the absent fields
    cache_position   (L,) columns of the new tokens; must be those that follow past_key_values
    """

    position_ids: Tensor | None
    past_key_values: Cache | None
    inputs_embeds: Tensor | None
    use_cache: bool | None
    output_attentions: bool | None
    output_hidden_states: bool | None
    return_dict: bool | None
    cache_position: Tensor | None


class AnswerKeywords(ForwardKeywords, total=False):
    """As ForwardKeywords, and for models with a head:

    labels          (B, L): the loss is their mean cross-entropy, each predicted by the token
                    before; -100 is ignored, and so is a label behind nothing or padding alone
    logits_to_keep  the last so many columns of logits (0: all), or a (n,) tensor of columns
    """

    labels: Tensor | None
    logits_to_keep: int | Tensor


class FeatureKeywords(ForwardKeywords, total=False):
    """As ForwardKeywords, and for the families with a tower of CLIP's kind:

    vision_feature_layer             instead of the config's: an int, or as many as it has
    vision_feature_select_strategy   instead of the config's: "default" or "full"
    """

    vision_feature_layer: int | list[int] | None
    vision_feature_select_strategy: str | None


class TowerKeywords(AnswerKeywords, FeatureKeywords, total=False):
    """FeatureKeywords and AnswerKeywords."""


@dataclass(frozen=True)
class Call:
    """A call of forward, checked: ids, mask and media, and the keywords that were given."""

    input_ids: Tensor | None
    attention_mask: Tensor | None
    media: Sequence[Media]
    keywords: Mapping[str, Any]
    encode: Mapping[str, Any]  # keywords for the model's `encode`

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.keywords.get(name)


@dataclass(frozen=True)
class States:
    """What a call made: hidden (B, L, D) after the last norm, and what was asked to be seen."""

    hidden: Tensor
    mask: Tensor  # (B, L) bool: real tokens
    seen: dict[str, Any]  # fields that both outputs have


def read_keywords(kwargs: Mapping[str, Any], known: type, where: str) -> dict[str, Any]:
    """The keywords that are not None; raises TypeError on an unknown one."""
    names = get_type_hints(known)
    for name in kwargs:
        if name not in names:
            raise unknown_keyword(where, name, tuple(names))
    return {name: value for name, value in kwargs.items() if value is not None}


def states(model: VideoModel, call: Call) -> States:
    """Run a call through the decoder."""
    cache = call.past_key_values
    shown = _shown_mask(call, cache)
    mask = shown if cache is None else cache.new_columns(call.attention_mask, tuple(shown.shape))
    mask = mask.to(model.device)
    encoded = model.encode(call.media, **call.encode)
    x = _embedded(model, call, mask, encoded)
    use_cache = call.use_cache if call.use_cache is not None else not model.training
    positions = _positions(call, mask, cache)
    lengths = _lengths(call, mask, positions, gaps=not use_cache)
    packed_rows = len(lengths) > len(mask)
    if cache is None and use_cache and not (packed_rows and call.use_cache is None):
        cache = Cache(len(mask), packed=packed_rows)
    step = _step(call, positions[mask], lengths, None if packed_rows else cache)
    step = _with_memory(model, call, mask, encoded, step)
    packed = model.hidden(x, step)
    past = torch.zeros(len(mask), 0, dtype=torch.bool, device=mask.device)
    if cache is not None:
        past = past if cache.mask is None else cache.mask
        cache.advance(mask)
    attentions, hidden = step.trace.attentions, step.trace.hidden
    seen = {
        "past_key_values": cache if use_cache else None,
        "hidden_states": None
        if hidden is None
        else tuple(unpack(h.to(mask.device), mask) for h in hidden),
        "attentions": None
        if attentions is None
        else tuple(
            _on_the_diagonal(layer, mask) if packed_rows else _spread(layer, mask, past)
            for layer in attentions
        ),
    }
    for kind in ("image", "video"):
        mine = [e for m, e in zip(call.media, encoded, strict=True) if m.kind == kind]
        seen[f"{kind}_hidden_states"] = flatten(mine)
    return States(unpack(packed, mask), mask, seen)


def body_output(model: VideoModel, call: Call) -> Any:
    """forward of a model without its head."""
    made = states(model, call)
    output = ModelOutputWithPast(last_hidden_state=made.hidden, **made.seen)
    return output.to_tuple() if call.return_dict is False else output


def answer_output(model: VideoModel, call: Call) -> Any:
    """forward of a model with its head."""
    made = states(model, call)
    keep = call.keywords.get("logits_to_keep", 0)
    hidden = made.hidden
    if isinstance(keep, Tensor):
        hidden = hidden[:, keep.to(hidden.device)]
    elif keep:
        hidden = hidden[:, -keep:]
    logits = model.logits(hidden)
    loss = None if call.labels is None else _loss(logits, call.labels, made.mask)
    output = CausalLMOutputWithPast(loss=loss, logits=logits, **made.seen)
    return output.to_tuple() if call.return_dict is False else output


def placeholder_ids(model: VideoModel, embeds: Tensor) -> Tensor:
    """Embedded tokens (..., D) -> (...) the placeholder's id where one stands, -1 elsewhere."""
    ids = torch.full(embeds.shape[:-1], -1, dtype=torch.int64, device=embeds.device)
    for id in model.config.placeholders.values():
        row = model.embed(torch.tensor([id], dtype=torch.int64, device=embeds.device))[0].to(embeds)
        ids[(embeds == row).all(-1)] = id
    return ids


def _with_memory(
    model: VideoModel, call: Call, mask: Tensor, encoded: Sequence[Encoded], step: Step
) -> Step:
    """The step with what each row's media leave its layers to attend to, if they do."""
    if all(item.memory is None for item in encoded):
        kept = tuple(store.memory for store in step.kv or ())
        return replace(step, memory=kept) if any(kept) else step
    if call.input_ids is None:
        raise InvalidArgument("media with a memory need input_ids, which say whose they are")
    sequences = call.input_ids.to(mask.device)[mask].split(step.lengths)
    rows: list[list[Encoded]] = [[] for _ in sequences]
    for kind, placeholder in model.config.placeholders.items():
        mine = [e for m, e in zip(call.media, encoded, strict=True) if m.kind == kind]
        wanted = [int((ids == placeholder).sum()) for ids in sequences]
        ahead = iter(mine)
        for row, count in zip(
            rows, share(wanted, [len(e.tokens) for e in mine], kind), strict=True
        ):
            row += islice(ahead, count)
    made = tuple(memory_of(row) for row in rows)
    if step.kv is not None and model.memory_in_decode:
        for store, memory in zip(step.kv, made, strict=True):
            store.memory = memory
    readers = torch.cat([model.readers(ids) for ids in sequences])
    return replace(step, memory=made, readers=readers)


def _shown_mask(call: Call, cache: Cache | None) -> Tensor:
    """The mask of the call's own tokens as far as the call alone tells."""
    mask = call.attention_mask if cache is None else None
    return mask_of(call.input_ids, call.inputs_embeds, mask)


def _embedded(model: VideoModel, call: Call, mask: Tensor, encoded: Sequence[Encoded]) -> Tensor:
    """The call's real tokens (T, D), media in their places."""
    if call.input_ids is not None:
        ids = call.input_ids.to(mask.device)[mask]
        x = model.embed(ids)
    else:
        x = call.inputs_embeds.to(mask.device)[mask]
        ids = placeholder_ids(model, x) if encoded else x.new_full(x.shape[:1], -1)
    wanted: Mapping[Kind, int] = model.config.placeholders
    if call.past_key_values is not None and not encoded:
        return x  # generated tokens, among them perhaps a placeholder that the model made up
    return insert(x, ids, wanted, call.media, encoded)


def _positions(call: Call, mask: Tensor, cache: Cache | None) -> Tensor:
    """The position (B, L) of each of the call's columns."""
    B, L = mask.shape
    columns = cache.get_seq_length() if cache is not None else 0
    if call.cache_position is not None:
        expected = list(range(columns, columns + L))
        if call.cache_position.tolist() != expected:
            raise InvalidArgument(
                f"cache_position={call.cache_position.tolist()}; these tokens are columns "
                f"{columns} to {columns + L - 1}: leave it out"
            )
    if call.position_ids is not None:
        positions: Tensor = call.position_ids.to(mask.device)
        if positions.shape not in ((B, L), (1, L), (L,)):
            raise InvalidArgument(
                f"position_ids of shape {tuple(positions.shape)} for tokens of shape {(B, L)}; "
                "give one position for each token, placeholders of media expanded"
            )
        return positions.expand_as(mask)
    before = [0] * B if cache is None else [row.length for row in cache.rows]
    past = torch.tensor(before, dtype=torch.int64, device=mask.device)
    return mask.long().cumsum(1) - 1 + past[:, None]


def _lengths(call: Call, mask: Tensor, positions: Tensor, gaps: bool) -> tuple[int, ...]:
    """Tokens of each sequence: of each row, or of each run of positions in packed rows.

    Without a cache, a gap begins a sequence, too: transformers' find_packed_sequence_indices
    (parity: tests/parity/test_packed_rows.py). With one, transformers attends across all of them;
    here a position that does not go up still begins one, and a gap is the caller's spacing.
    """
    given = call.attention_mask, call.past_key_values
    if call.position_ids is None or any(each is not None for each in given):
        return tuple(mask.sum(1).tolist())
    begins = torch.ones_like(mask)
    ahead = positions.diff(dim=1)
    begins[:, 1:] = ahead != 1 if gaps else ahead < 1
    starts = begins.flatten().nonzero()[:, 0]
    return tuple(starts.diff(append=starts.new_tensor([mask.numel()])).tolist())


def _step(call: Call, positions: Tensor, lengths: tuple[int, ...], cache: Cache | None) -> Step:
    trace = Trace(
        hidden=[] if call.output_hidden_states else None,
        attentions=[] if call.output_attentions else None,
    )
    kv = cache.rows if cache is not None else None
    return Step(positions, lengths, kv, trace=trace)


def _spread(rows: Sequence[Tensor], mask: Tensor, past: Tensor) -> Tensor:
    """Weights (H, n, S) of each row's real tokens -> (B, H, L, columns), 0 for hidden ones."""
    seen = torch.cat((past, mask), dim=1)
    rows = [weights.to(mask.device) for weights in rows]  # from where the layer is
    out = rows[0].new_zeros(len(rows), rows[0].shape[0], mask.shape[1], seen.shape[1])
    for i, (weights, new, columns) in enumerate(zip(rows, mask, seen, strict=True)):
        wide = weights.new_zeros(*weights.shape[:2], seen.shape[1])
        wide[:, :, columns] = weights
        out[i][:, new] = wide  # a view of one row: written to with gradients, too
    return out


def _on_the_diagonal(sequences: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Weights (H, n, n) of the sequences in packed rows -> (B, H, L, L), 0 between sequences."""
    (B, L), H = mask.shape, sequences[0].shape[0]
    out, at = sequences[0].new_zeros(B, H, L, L, device=mask.device), 0
    for weights in sequences:
        row, start = divmod(at, L)
        own = slice(start, start + weights.shape[1])
        out[row, :, own, own] = weights.to(mask.device)
        at += weights.shape[1]
    return out


def _loss(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    if logits.shape[:2] != labels.shape:
        raise InvalidArgument(
            f"labels of shape {tuple(labels.shape)} for logits of {tuple(logits.shape[:2])}; they "
            "must agree, and logits_to_keep must be 0"
        )
    # Left of a row's first token there may be padding, which predicts nothing.
    target = labels[:, 1:].to(logits.device).masked_fill(~mask[:, :-1], IGNORED)
    flat = logits[:, :-1].float().flatten(0, 1)
    return cross_entropy(flat, target.flatten(), ignore_index=IGNORED)
