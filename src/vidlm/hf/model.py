"""`from_pretrained`, `save_pretrained`, `forward` and `generate` on top of a family's model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from vidlm.engine import Request, run
from vidlm.errors import InvalidArgument, UnsupportedModel
from vidlm.hf.answers import collected, joined, streamed, written_length
from vidlm.hf.forward import (
    AnswerKeywords,
    Call,
    ForwardKeywords,
    placeholder_ids,
    read_keywords,
)
from vidlm.hf.generation import GenerateCall, generation_keywords, given_config, read_call
from vidlm.hf.layouts import LayoutReader, WholeModel
from vidlm.hf.loading import load_model, read_load_options, saved_scheme
from vidlm.hf.pack import mask_of, share
from vidlm.hf.placement import Placement
from vidlm.hub import read_config, read_json
from vidlm.models.base import Media, Prompt
from vidlm.nn.packed import PackedLinear
from vidlm.quant import scheme_of
from vidlm.text import Tokenizer
from vidlm.weights import Renames, save

log = logging.getLogger(__name__)
GENERATION_FILE = "generation_config.json"


class PretrainedModel(LayoutReader):
    """What the models of all families share under transformers' names.

    `media_inputs` are the names under which `forward` and `generate` take media; `media` reads
    them. `folder` is where the model was loaded from, None for one made from a config alone, which
    has random weights.
    """

    media_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_values_videos")
    keywords: ClassVar[type] = AnswerKeywords
    returns_prompt: ClassVar[bool] = True  # whether `generate` repeats the prompt's ids
    options: ClassVar[tuple[str, ...]] = ()  # keywords of from_pretrained that the config takes
    folder: Path | None = None
    placement: Placement | None = None  # where its weights were put when it was loaded
    quantization_config: Any = None  # what it was quantized by when it was loaded

    def media(self, inputs: Mapping[str, Any]) -> list[Media]:
        """Media as `forward` takes them, a tensor a name, one by one: images before videos."""
        raise NotImplementedError

    def expand(self, ids: Tensor, mask: Tensor, media: Sequence[Media]) -> tuple[Tensor, Tensor]:
        """Rows (B, L) and their mask with placeholders as often as the media fill them; here they
        have to be so already."""
        return ids, mask

    @classmethod
    def adapted(cls, config: Any, folder: Path, options: Mapping[str, Any]) -> Any:
        """The config with what the folder's files and `options` say otherwise."""
        return config

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> Self:
        """Load a folder or hub repository.

        dtype          torch dtype, its name, or "auto" (the default): config.json's, or the file's
        device_map     "cpu", "cuda", "cuda:1", a torch.device; "auto" (a GPU if there is one with
                       room, else several and the CPU), "balanced", "balanced_low_0", "sequential";
                       or devices by names of parts: see docs/models.md
        max_memory     for the strategies: bytes, or text such as "20GiB", by GPU (0, 1) and "cpu"
        attn_implementation   "sdpa", "eager", "flash_attention_2": all run torch's attention
        revision, local_files_only, cache_dir, token   as huggingface_hub takes them

        Raises ModelNotFound, HubUnreachable, UnsupportedModel or WeightsError; TypeError on an
        unknown keyword.
        """
        own = {key: kwargs.pop(key) for key in cls.options if key in kwargs}
        options = read_load_options(kwargs)
        folder = options.folder(name)
        told = read_config(folder)
        saved = saved_scheme(told, options.quantization_config)
        config = cls.adapted(cls.family.config.from_dict(told), folder, own)
        with torch.device("meta"):
            model = cls(config)
        model.placement = load_model(model, folder, cls.renames(), options, saved)
        model.folder = folder
        model.quantization_config = saved or options.quantization_config
        for weight in model.parameters():
            weight.requires_grad_(weight.is_floating_point())
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, generation_config.json and safetensors, for transformers too; of a
        quantized model what `from_pretrained` reads without the original. An older checkpoint in
        the folder stays as it is until the new one is on the disk.

        Raises UnsupportedModel where bitsandbytes quantized it, on a GPU, and OutputError where
        the folder cannot be written."""
        quantized = self.quantization_config
        if quantized is not None and not any(type(m) is PackedLinear for m in self.modules()):
            raise UnsupportedModel(
                "a model that bitsandbytes quantized cannot be written; load it with "
                "QuantoConfig, or with device_map='cpu', and save that"
            )
        if any(".base_layer." in name for name, _ in self.named_parameters()):
            raise InvalidArgument(
                "this model has an adapter on it: save the adapter alone with PeftModel's "
                "save_pretrained, or the model that merge_and_unload() returns"
            )
        save(self, Path(folder), self.renames(), beside=self._texts())

    def _texts(self) -> dict[str, str]:
        """The files that stand beside the weights."""
        quantized = self.quantization_config
        config = {**self.config.to_dict(), "dtype": str(self.dtype).removeprefix("torch.")}
        config["torch_dtype"] = config["dtype"]
        if quantized is not None:
            config["quantization_config"] = scheme_of(quantized).to_dict()
        return {"config.json": json.dumps(config, indent=2) + "\n"}

    @property
    def hf_device_map(self) -> dict[str, torch.device]:
        """The device of each part's weights, under "" that of all others."""
        if self.placement is None or not self.placement.elsewhere:
            return {"": self.device}  # it may have been moved
        return {"": self.placement.main, **self.placement.elsewhere}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """What `to`, `cuda`, `cpu` and changes of dtype come to. Raises InvalidArgument where a
        model on several devices would be moved."""
        if self.placement is not None and self.placement.elsewhere:
            for device in {self.placement.main, *self.placement.elsewhere.values()}:
                if fn(torch.empty(0, dtype=self.dtype, device=device)).device != device:
                    raise InvalidArgument(
                        "this model lies on several devices and cannot be moved; load it again "
                        "with device_map='cpu' or 'cuda'"
                    )
        return super()._apply(fn, recurse)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.decoder.embed_tokens

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """Images as `forward` takes them -> one (M, D) tensor of features each."""
        return self._features({"pixel_values": pixel_values, **kwargs})

    def get_video_features(self, pixel_values_videos: Tensor, **kwargs: Any) -> Any:
        """Videos as `forward` takes them -> one (M, D) tensor of features each."""
        return self._features({"pixel_values_videos": pixel_values_videos, **kwargs})

    def get_placeholder_mask(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor,
        image_features: Tensor | None = None,
        video_features: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """(B, L, 1) masks of where images and where videos go, by ids (B, L) or, without them, by
        embeddings (B, L, D). Raises InvalidArgument where features given differ in number."""
        ids = placeholder_ids(self, inputs_embeds) if input_ids is None else input_ids
        masks = []
        given = {"image": image_features, "video": video_features}
        for kind, placeholder in self.config.placeholders.items():
            mask, features = ids == placeholder, given[kind]
            rows = 0 if features is None else features.numel() // features.shape[-1]
            if features is not None and rows != int(mask.sum()):
                raise InvalidArgument(
                    f"{rows} {kind} features for {int(mask.sum())} {kind} placeholder tokens; "
                    "pass as many as the prompt has"
                )
            masks.append(mask[..., None])
        return tuple(masks)

    def _features(self, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        call = self._call(None, None, inputs)
        return [item.tokens for item in self.encode(call.media, **call.encode)]

    def _call(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, given: Mapping[str, Any]
    ) -> Call:
        """A call of forward out of its media and its keywords."""
        inputs = {k: v for k, v in given.items() if k in self.media_inputs and v is not None}
        rest = {k: v for k, v in given.items() if k not in self.media_inputs}
        keywords = read_keywords(rest, self.keywords, "forward()")
        layers = keywords.pop("vision_feature_layer", None)
        strategy = keywords.pop("vision_feature_select_strategy", None)
        encode = {"layers": layers, "strategy": strategy}
        encode = {name: value for name, value in encode.items() if value is not None}
        media = self.media(inputs)
        if input_ids is not None and media:
            mask = mask_of(input_ids, None, attention_mask)
            wide, shown = self.expand(input_ids, mask, media)
            if wide is not input_ids:
                input_ids, attention_mask = wide, shown
        return Call(input_ids, attention_mask, media, keywords, encode)


class BaseModel(PretrainedModel):
    """A family's model without its head."""

    keywords = ForwardKeywords

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        body = self.body
        del self.model, self.lm_head
        for name, part in body.named_children():
            self.add_module(name, part)
        for name, parameter in body.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    @classmethod
    def renames(cls) -> Renames:
        """The family's, but for a head that is not there and "model." in front."""
        own = cls.family.renames
        table = tuple((old, new.removeprefix("model.")) for old, new in own.table)
        written = tuple((old.replace(r"^model\.", "^"), new) for old, new in own.written)
        ignored = (*own.ignored, r"(^|\.)lm_head\.")
        return Renames((*table, (r"^model\.", "")), ignored, (*written, ("^", "model.")))

    def tie(self) -> None:
        """There is no head to tie."""


class ForConditionalGeneration(PretrainedModel, WholeModel):
    """A family's model that answers; `generation_config` holds the checkpoint's defaults for
    `generate`."""

    generation_config: dict[str, Any]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.generation_config = _own_tokens(config)

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> Self:
        model = super().from_pretrained(name, **kwargs)
        assert model.folder is not None
        generation = model.folder / GENERATION_FILE
        if generation.is_file():
            model.generation_config = read_json(generation)
        return model

    def _texts(self) -> dict[str, str]:
        texts = super()._texts()
        if self.generation_config:
            texts[GENERATION_FILE] = json.dumps(self.generation_config, indent=2) + "\n"
        return texts

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        streamer: Any = None,
        tokenizer: Any = None,
        generation_config: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Prompt and answer as one (B, L + n) tensor of ids, short rows filled with pad_token_id;
        with num_return_sequences, as many rows behind each other for each prompt.

        Media come under the names that `forward` takes them by. Further keywords, as in
        transformers: max_new_tokens or max_length, min_new_tokens or min_length, do_sample,
        temperature, top_k, top_p, min_p, repetition_penalty, seed, stop_strings (or stop),
        num_beams, num_return_sequences, length_penalty, early_stopping, eos_token_id, pad_token_id.
        temperature, top_k, top_p and min_p count where do_sample is True, and are warned of
        elsewhere. Where media alone exceed max_length, each counts as the one token written for it.
        What the call leaves out comes from `generation_config`, a dict or transformers'
        GenerationConfig, then from the checkpoint's generation_config.json. Raises TypeError on an
        unknown keyword, naming the nearest known one, and InvalidArgument where the call or a file
        has a value that changes answers and is not supported. As in transformers, a prompt or
        answer beyond the model's context is warned of and runs; `vidlm.load(...).ask` refuses it.
        """
        if "prepare_inputs_for_generation" in self.__dict__:  # replaced, as PEFT does
            raise UnsupportedModel(
                "generate has no room for virtual tokens (prompt tuning, prefix tuning, p-tuning); "
                "use an adapter of another kind, such as LoRA"
            )
        eos = self.config.text_config.eos_token_id
        try:
            inputs = {name: kwargs.pop(name, None) for name in self.media_inputs}
            generation_keywords(kwargs)  # a misspelt one is told of before media are read
            defaults = {**self.generation_config, **given_config(generation_config)}
            shown = input_ids if self.returns_prompt else input_ids[:, :0]
            prompts = self._prompts(input_ids, mask_of(input_ids, None, attention_mask), inputs)
            lengths = {"prompt_length": shown.shape[1], "written": written_length(prompts)}
            call = read_call(kwargs, defaults, **lengths, eos=eos, implied_sampling=False)
            watcher = self._tokenizer(call, tokenizer)
            requests = [Request(p, call.params, strict=False) for p in prompts]
            self._warn_of_length(requests)
            tokens = run(self, requests, tokenizer=watcher)
            if streamer is None:
                answers = collected(tokens, len(prompts), call.params.n)
            elif len(prompts) > 1 or call.params.num_beams > 1 or call.params.n > 1:
                raise InvalidArgument(
                    "a streamer takes one request, num_beams=1 and num_return_sequences=1"
                )
            else:
                answers = [streamed(tokens, shown, streamer)]
        except BaseException as error:
            if hasattr(streamer, "fail"):
                streamer.fail(error)  # or the thread that iterates over it waits for ever
            raise
        return joined(shown.repeat_interleave(call.params.n, 0), answers, call.pad_token_id)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `forward` takes in the next step of a loop of one's own: with past_key_values the
        new tokens alone, without their media. `generate` does not call it."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        if past_key_values is not None and past_key_values.get_seq_length():
            inputs["input_ids"] = input_ids[:, past_key_values.get_seq_length() :]
            inputs = {k: v for k, v in inputs.items() if k not in self.media_inputs}
        return {**inputs, "past_key_values": past_key_values}

    def _warn_of_length(self, requests: Sequence[Request]) -> None:
        limit: int = self.config.max_context
        longest = max(len(r.prompt.ids) + r.params.max_new_tokens for r in requests)
        if longest > limit:
            log.warning(
                "prompt and answer may take %d tokens, the model was trained with %d: beyond them "
                "answers are worse; take fewer frames or a smaller max_new_tokens",
                *(longest, limit),
            )

    def _prompts(self, ids: Tensor, mask: Tensor, inputs: Mapping[str, Any]) -> list[Prompt]:
        """Rows without their padding, each with the media its placeholders stand for."""
        media = self.media({k: v for k, v in inputs.items() if v is not None})
        ids, mask = self.expand(ids, mask, media)
        rows: list[list[Media]] = [[] for _ in ids]
        for kind, placeholder in self.config.placeholders.items():
            mine = [item for item in media if item.kind == kind]
            wanted = ((ids == placeholder) & mask).sum(1).tolist()
            counts = share(wanted, [item.tokens for item in mine], kind)
            ahead = iter(mine)
            for row, count in zip(rows, counts, strict=True):
                row += islice(ahead, count)
        return [
            Prompt(tuple(row[keep].tolist()), tuple(items))
            for row, keep, items in zip(ids, mask, rows, strict=True)
        ]

    def _tokenizer(self, call: GenerateCall, given: Any) -> Tokenizer | None:
        """What stop strings are looked for with: the call's, else the checkpoint's own."""
        if not call.params.stop:
            return None
        if given is not None:
            return getattr(given, "tokenizer", given)
        return Tokenizer.from_folder(self.folder) if self.folder is not None else None


def _own_tokens(config: Any) -> dict[str, Any]:
    """What stands in for a generation_config.json: the ids that the text_config names."""
    text = config.text_config
    eos = list(text.eos_token_id) if isinstance(text.eos_token_id, tuple) else text.eos_token_id
    values = {"eos_token_id": eos, "pad_token_id": text.pad_token_id}
    return {name: value for name, value in values.items() if value is not None}
