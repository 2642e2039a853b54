"""`from_pretrained`, `save_pretrained`, `forward` and `generate` on top of a family's model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vidlm.engine import Request, Token, run
from vidlm.errors import InvalidArgument
from vidlm.hf.generation import GenerateCall, read_call
from vidlm.hf.loading import load_model, read_load_options
from vidlm.hf.outputs import LlavaCausalLMOutput
from vidlm.hf.pack import flatten, mask_of, share, unpack
from vidlm.hub import read_config, read_json
from vidlm.models.base import Encoded, Family, Prompt, VideoModel, insert
from vidlm.models.llava import FAMILY as LLAVA
from vidlm.models.llava import LlavaModel
from vidlm.nn.step import Step
from vidlm.text import Tokenizer
from vidlm.weights import save

GENERATION_FILE = "generation_config.json"


class ForConditionalGeneration(VideoModel):
    """The names users know from transformers, for any family with `pixel_values` of single images.

    `generation_config` holds the checkpoint's defaults for `generate`; `folder` is where it was
    loaded from, None for a model made from a config alone (random weights).
    """

    family: ClassVar[Family]
    generation_config: dict[str, Any]
    folder: Path | None = None

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> Self:
        """Load a folder or hub repository.

        dtype          torch dtype, its name, or "auto" (the default): config.json's, or the file's
        device_map     "cpu", "cuda", "cuda:1", a torch.device, or "auto" (a GPU if there is one)
        revision, local_files_only, cache_dir, token   as huggingface_hub takes them

        Raises ModelNotFound, HubUnreachable, UnsupportedModel or WeightsError; TypeError on an
        unknown keyword.
        """
        options = read_load_options(kwargs)
        folder = options.folder(name)
        config = cls.family.config.from_dict(read_config(folder))
        with torch.device("meta"):
            model = cls(config)
        load_model(model, folder, cls.family.renames, options)
        model.folder = folder
        generation = folder / GENERATION_FILE
        if generation.is_file():
            model.generation_config = read_json(generation)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, generation_config.json and safetensors, for transformers too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {**self.config.to_dict(), "dtype": str(self.dtype).removeprefix("torch.")}
        config["torch_dtype"] = config["dtype"]
        files = {"config.json": config, GENERATION_FILE: self.generation_config}
        for name, content in files.items():
            if content:
                (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        save(self, folder)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        logits_to_keep: int = 0,
    ) -> LlavaCausalLMOutput:
        """input_ids (B, L) or inputs_embeds (B, L, D), pixel_values (F, 3, H, W) -> logits.

        logits are (B, L, V), or with logits_to_keep > 0 their last columns. attention_mask (B, L)
        is 1 on real tokens, on whichever side the padding is; logits there are 0. Positions count
        real tokens unless position_ids (B, L) says otherwise. labels (B, L): the loss is their
        mean cross-entropy, each predicted by the token before, -100 ignored.
        """
        mask = mask_of(input_ids, inputs_embeds, attention_mask)
        encoded = self.encode(list(pixel_values)) if pixel_values is not None else []
        if input_ids is not None:
            ids = input_ids[mask]
            x = insert(self.embed(ids), ids, self.config.placeholder_id, encoded)
        else:
            if encoded:
                raise InvalidArgument("pixel_values need input_ids, which say where images go")
            x = inputs_embeds[mask]  # type: ignore[index]  # one of the two is there
        positions = position_ids if position_ids is not None else mask.long().cumsum(1) - 1
        step = Step(positions.expand_as(mask)[mask], tuple(mask.sum(1).tolist()))
        trace: list[Tensor] | None = [] if output_hidden_states else None
        hidden = unpack(self.hidden(x, step, trace), mask)
        logits = self.logits(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        return LlavaCausalLMOutput(
            loss=_loss(logits, labels) if labels is not None else None,
            logits=logits,
            hidden_states=tuple(unpack(h, mask) for h in trace) if trace is not None else None,
            image_hidden_states=flatten(encoded),
        )

    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        streamer: Any = None,
        tokenizer: Any = None,
        generation_config: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Prompt and answer as one (B, L + n) tensor of ids, short rows filled with pad_token_id.

        Keywords, as in transformers: max_new_tokens or max_length, min_new_tokens, do_sample,
        temperature, top_k, top_p, min_p, repetition_penalty, seed, stop_strings (or stop),
        num_beams, length_penalty, early_stopping, eos_token_id, pad_token_id. What the call leaves
        out comes from `generation_config`, then from the checkpoint's generation_config.json.
        Raises TypeError on an unknown keyword, naming the nearest known one.
        """
        defaults = {**self.generation_config, **(generation_config or {})}
        eos = self.config.text_config.eos_token_id
        try:
            call = read_call(kwargs, defaults, prompt_length=input_ids.shape[1], eos=eos)
            mask = mask_of(input_ids, None, attention_mask)
            prompts = self._prompts(input_ids, mask, pixel_values)
            watcher = self._tokenizer(call, tokenizer)
            tokens = run(self, [Request(p, call.params) for p in prompts], tokenizer=watcher)
            if streamer is None:
                answers = _collected(tokens, len(prompts))
            elif len(prompts) > 1 or call.params.num_beams > 1:
                raise InvalidArgument("a streamer takes one request and num_beams=1")
            else:
                answers = [_streamed(tokens, input_ids, streamer)]
        except BaseException as error:
            if hasattr(streamer, "fail"):
                streamer.fail(error)  # or the thread that iterates over it waits for ever
            raise
        return _joined(input_ids, answers, call.pad_token_id)

    def _prompts(self, ids: Tensor, mask: Tensor, pixels: Tensor | None) -> list[Prompt]:
        """Rows without their padding, each with the images its placeholders stand for."""
        media = list(pixels) if pixels is not None else []
        placeholder = self.config.placeholder_id
        wanted = ((ids == placeholder) & mask).sum(1).tolist()
        counts = share(wanted, [self.config.tokens_per_frame] * len(media))
        prompts, at = [], 0
        for row, keep, count in zip(ids, mask, counts, strict=True):
            prompts.append(Prompt(tuple(row[keep].tolist()), tuple(media[at : at + count])))
            at += count
        return prompts

    def _tokenizer(self, call: GenerateCall, given: Any) -> Tokenizer | None:
        """What stop strings are looked for with: the call's, else the checkpoint's own."""
        if not call.params.stop:
            return None
        if given is not None:
            return getattr(given, "tokenizer", given)
        return Tokenizer.from_folder(self.folder) if self.folder is not None else None

    def get_image_features(self, pixel_values: Tensor) -> Sequence[Tensor]:
        """(F, 3, H, W) -> one (M, D) tensor of features an image."""
        encoded: list[Encoded] = self.encode(list(pixel_values))
        return [item.tokens for item in encoded]

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.get_submodule("language_model.model.embed_tokens")


class LlavaForConditionalGeneration(ForConditionalGeneration, LlavaModel):
    """LLaVA under transformers' name; made from a config alone it has random weights."""

    family = LLAVA

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.generation_config = _own_tokens(config)


def _own_tokens(config: Any) -> dict[str, Any]:
    """What stands in for a generation_config.json: the ids that the text_config names."""
    text = config.text_config
    eos = list(text.eos_token_id) if isinstance(text.eos_token_id, tuple) else text.eos_token_id
    values = {"eos_token_id": eos, "pad_token_id": text.pad_token_id}
    return {name: value for name, value in values.items() if value is not None}


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[:2] != labels.shape:
        raise InvalidArgument(
            f"labels of shape {tuple(labels.shape)} for logits of {tuple(logits.shape[:2])}; they "
            "must agree, and logits_to_keep must be 0"
        )
    target = labels[:, 1:].to(logits.device)
    return cross_entropy(logits[:, :-1].float().flatten(0, 1), target.flatten(), ignore_index=-100)


def _collected(tokens: Iterator[Token], requests: int) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in range(requests)]
    for token in tokens:
        answers[token.request].append(token.id)
    return answers


def _streamed(tokens: Iterator[Token], prompt: Tensor, streamer: Any) -> list[int]:
    """The ids of one request, each passed on at once in the shape that streamers are used to."""
    answer = []
    streamer.put(prompt.cpu())
    for token in tokens:
        answer.append(token.id)
        streamer.put(torch.tensor([token.id]))
    streamer.end()
    return answer


def _joined(ids: Tensor, answers: Sequence[Sequence[int]], pad: int) -> Tensor:
    longest = max(len(answer) for answer in answers)
    new = ids.new_full((len(answers), longest), pad)
    for row, answer in zip(new, answers, strict=True):
        row[: len(answer)] = torch.tensor(answer)
    return torch.cat((ids, new), dim=1)
