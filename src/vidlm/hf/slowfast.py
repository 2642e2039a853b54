"""The Slow-Fast Video MLLM under its authors' class name, with the ways in that users know."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from vidlm.errors import InvalidArgument, WeightsError
from vidlm.hf.features import BatchFeature
from vidlm.hf.forward import AnswerKeywords, answer_output
from vidlm.hf.image_input import as_images
from vidlm.hf.model import ForConditionalGeneration
from vidlm.hf.outputs import CausalLMOutputWithPast
from vidlm.hf.processor import ProcessorMixin
from vidlm.hf.tokens import Piece
from vidlm.hub import read_safetensors_header, weight_files
from vidlm.media import MediaReader
from vidlm.models.base import Kind, Media
from vidlm.models.slowfast import FAMILY, SlowFastConfig, SlowFastNetwork
from vidlm.text import typed
from vidlm.vision.preprocess import Preprocess

EMBEDDING = "model.embed_tokens.weight"
NAMES: Mapping[str, Kind] = {"images": "image", "videos": "video"}


class SlowFastImageProcessor:
    """Frames -> pixel_values (F, 3, S, S), as the authors' CLIPImageProcessor makes them. Its words
    are fixed; `reader` reads paths and URLs."""

    core: Preprocess

    def __init__(self, core: Preprocess) -> None:
        vars(self)["core"] = core
        self.reader = MediaReader()

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "reader":
            raise AttributeError(f"{type(self).__name__} has fixed words, not {name!r} to set")
        super().__setattr__(name, value)

    def preprocess(self, images: Any, return_tensors: str | None = None) -> BatchFeature:
        """Images or the frames (F, H, W, 3) of a video -> a BatchFeature of pixel_values."""
        pixels = self.core(as_images(images, self.reader))
        return BatchFeature(pixel_values=pixels if return_tensors == "pt" else pixels.numpy())

    __call__ = preprocess


class SlowFastProcessor(ProcessorMixin):
    """Texts with <image> and <video> -> input_ids, attention_mask (B, L), and lists `images` of
    (1, 3, S, S) and `videos` of (F, 3, S, S).

    The two words are no tokens of the vocabulary: texts are cut at them, and their places have the
    ids -200 and -201.
    """

    family = FAMILY

    @classmethod
    def of(cls, core: Any) -> Self:
        made = super().of(core)
        made._keep(image_processor=SlowFastImageProcessor(core.image_pixels))
        return made

    def collate(self, media: Sequence[Media]) -> dict[str, Any]:
        batch = {n: [m.pixels for m in media if m.kind == kind] for n, kind in NAMES.items()}
        return {name: pixels for name, pixels in batch.items() if pixels}

    def encode(
        self, text: str, add_special_tokens: bool, marks: typed.Marks = typed.NO_MARKS
    ) -> Piece:
        """Ids of a text, each piece between placeholders by itself."""
        made, at = Piece([], []), 0
        words = (self.core.image_token, self.core.video_token)
        for part in re.split(f"({'|'.join(map(re.escape, words))})", text):
            end = at + len(part)
            if part in words:
                made = made.joined(Piece([self.placeholder(part)], [(at, end)]))
            elif part:
                first = add_special_tokens and not made.ids
                made = made.joined(super().encode(part, first, marks).moved(at))
            at = end
        return made

    def placeholder(self, token: str) -> int:
        kind: Kind = "image" if token == self.core.image_token else "video"
        id: int = self.core.config.placeholders[kind]
        return id

    def decode(self, ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        """As the tokenizer does; placeholders are left out."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        kept = [id for id in ids if id >= 0] if isinstance(ids, list) else ids
        return super().decode(kept, skip_special_tokens, **kwargs)

    def batch_decode(
        self, rows: Any, skip_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        return [self.decode(row, skip_special_tokens, **kwargs) for row in rows]


class LlavaQwenSlowFastForCausalLM(ForConditionalGeneration, SlowFastNetwork):
    """Slow-Fast with its head; made from a config alone it has random weights.

    `slow_in_decode` (from_pretrained's keyword, or of the config): whether generated tokens attend
    to slow tokens as the paper trains them to, or not, as its authors' code generates.
    `generate` returns new tokens alone, as theirs does.
    """

    family = FAMILY
    media_inputs = tuple(NAMES)
    keywords = AnswerKeywords
    returns_prompt = False
    options = ("slow_in_decode",)

    @classmethod
    def adapted(cls, config: SlowFastConfig, folder: Path, options: Mapping[str, Any]) -> Any:
        """The config with the file's vocabulary, which the authors' loader cuts to the tokenizer's
        length."""
        path = weight_files(folder).get(EMBEDDING)
        if path is None:
            raise WeightsError(
                f"the weights in {folder} have no {EMBEDDING}, whose rows are the vocabulary; "
                "check that they are a Slow-Fast model's and completely downloaded"
            )
        rows = read_safetensors_header(path)[EMBEDDING].shape[0]
        text = replace(config.text_config, vocab_size=rows)
        return replace(config, text_config=text, **options)

    def media(self, inputs: Mapping[str, Any]) -> list[Media]:
        made = []
        for name, kind in NAMES.items():
            for pixels in inputs.get(name, ()):
                given = isinstance(pixels, Tensor)
                frames = (
                    pixels if given else torch.as_tensor(pixels, dtype=torch.float32, device="cpu")
                )
                frames = frames[None] if frames.ndim == 3 else frames
                if frames.ndim != 4:
                    raise InvalidArgument(
                        f"{name} with pixels of shape {tuple(frames.shape)}; allowed: (F, 3, S, S) "
                        "of a video, (3, S, S) of an image"
                    )
                count = self.config.fast_tokens(len(frames))
                made.append(Media(frames, count, kind, len(frames)))
        return made

    def expand(self, ids: Tensor, mask: Tensor, media: Sequence[Media]) -> tuple[Tensor, Tensor]:
        """Rows in which a placeholder stands once, as the authors' code takes them, with it as
        often as its media has tokens; rows that have it so already, as they are."""
        rows, ahead = [], {k: [m for m in media if m.kind == k] for k in NAMES.values()}
        places = {id: kind for kind, id in self.config.placeholders.items()}
        once = {kind: int(((ids == id) & mask).sum()) for id, kind in places.items()}
        if any(once[kind] != len(ahead[kind]) for kind in once):
            return ids, mask
        for row, real in zip(ids.tolist(), mask.tolist(), strict=True):
            wide: list[int] = []
            for id in (id for id, shown in zip(row, real, strict=True) if shown):
                wide += [id] * (ahead[places[id]].pop(0).tokens if id in places else 1)
            rows.append(wide)
        left = not bool(mask[:, 0].all()) and bool(mask[:, -1].all())
        most = max(map(len, rows))
        out, shown = ids.new_zeros(len(rows), most), mask.new_zeros(len(rows), most)
        for i, wide in enumerate(rows):
            part = slice(most - len(wide), None) if left else slice(len(wide))
            out[i, part] = torch.tensor(wide, dtype=ids.dtype, device=ids.device)
            shown[i, part] = True
        return out, shown

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        images: Sequence[Tensor] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids (B, L) with -200 where each of `images` goes, once or as often as it has
        tokens; images: a list of pixels (F, 3, S, S), videos among them -> logits and what else is
        asked for.

        Where -200 stands once, outputs are as long as the rows with fast tokens in its place.
        Keywords: videos, for placeholders -201, and see AnswerKeywords.
        """
        given = {
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "images": images,
            **kwargs,
        }
        return answer_output(self, self._call(input_ids, attention_mask, given))
