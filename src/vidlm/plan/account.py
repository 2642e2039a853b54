"""The account of what a model needs, as numbers, as JSON and as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vidlm.fit import size
from vidlm.quant import Scheme
from vidlm.types import SamplingParams

ANSWER_TOKENS = SamplingParams().max_new_tokens
PROMPT_TOKENS = 64  # a chat template and a question of a sentence or two, roughly


@dataclass(frozen=True)
class TextShape:
    """The decoder's sizes."""

    kind: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    vocabulary: int


@dataclass(frozen=True)
class VisionShape:
    """The vision tower's sizes; the sides of a frame and of a patch as it sees them, in pixels."""

    kind: str
    layers: int
    width: int
    image_size: int | None  # None: of any size
    patch: int


@dataclass(frozen=True)
class Plan:
    """What `frames` frames, a short question and an answer of `max_tokens` tokens take.

    parameters    those the model uses, a tied head counted once
    stored_bytes  of all tensors in the files, used or not
    dtype         what the weights will be in memory, but for those that are packed
    weight_bytes  of the loaded model's parameters and buffers: numbers, codes and scales
    scheme        how weights are packed; None: they are not
    unpacked_bytes  of the largest packed weight as numbers, but for the head's: prompts have one
                  unpacked at a time, in memory that is kept; 0 where nothing is packed
    kv_dtype      of keys and values; None: the same as dtype
    frame_tokens  of all frames, 1280 x 720 pixels large where their size matters
    most_frames   that leave room in the context for the question and a whole answer
    held_bytes    of the frames until they are answered about: as decoded (as of 1280 x 720
                  pixels), as pixels and as features
    work_bytes    what is worked in, which the number of frames does not change: by the vision
                  tower or by the decoder, whichever takes more, and by what reads the frames
    prompt_tokens a rough allowance for the template and the question
    time_tokens   of the text that says when each frame was, at most; 0 where none does
    free_bytes    of memory, if that was asked for, and most_frames_in_memory: how many fit then
    """

    family: str
    text: TextShape
    vision: VisionShape
    parameters: int
    stored_dtype: str
    stored_bytes: int
    dtype: str
    weight_bytes: int
    kv_bytes_per_token: int
    context: int
    frames: int
    frame_tokens: int
    most_frames: int
    max_tokens: int
    held_bytes: int = 0
    work_bytes: int = 0
    prompt_tokens: int = PROMPT_TOKENS
    time_tokens: int = 0
    scheme: Scheme | None = None
    unpacked_bytes: int = 0
    kv_dtype: str | None = None
    free_bytes: int | None = None
    most_frames_in_memory: int | None = None

    @property
    def tokens_per_frame(self) -> float:
        """Exactly, which need not be whole: 20.25 where four frames have 81."""
        return _exact(self.frame_tokens, max(self.frames, 1))

    @property
    def tokens(self) -> int:
        """Frames and their times, question and a whole answer together."""
        times = self.frames * self.time_tokens
        return self.frame_tokens + times + self.prompt_tokens + self.max_tokens

    @property
    def fits(self) -> bool:
        return self.tokens <= self.context

    @property
    def kv_bytes(self) -> int:
        """Keys and values of these tokens; more than the context there cannot be."""
        return self.kv_bytes_per_token * min(self.tokens, self.context)

    @property
    def memory_bytes(self) -> int:
        weights = self.weight_bytes + self.unpacked_bytes
        return weights + self.kv_bytes + self.held_bytes + self.work_bytes

    @property
    def fixed_bytes(self) -> int:
        """What is taken without any frame."""
        text = self.kv_bytes_per_token * (self.prompt_tokens + self.max_tokens)
        return self.weight_bytes + self.unpacked_bytes + self.work_bytes + text

    @property
    def kv_bytes_per_frame(self) -> int:
        tokens = self.frame_tokens + self.frames * self.time_tokens
        return self.kv_bytes_per_token * tokens // max(self.frames, 1)

    @property
    def bytes_per_frame(self) -> int:
        """What each of these frames adds to that."""
        return self.kv_bytes_per_frame + self.held_bytes // max(self.frames, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, what follows from the fields included."""
        derived = (
            *("tokens_per_frame", "tokens", "fits", "kv_bytes", "memory_bytes"),
            *("fixed_bytes", "kv_bytes_per_frame", "bytes_per_frame"),
        )
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}

    def __str__(self) -> str:
        rows = {**self._shapes(), **self._account()}
        return "\n".join(f"{name.strip():<8} {row}" for name, row in rows.items())

    def _shapes(self) -> dict[str, str]:
        text, vision = self.text, self.vision
        side = vision.image_size
        sides = f"{side} x {side} pixels" if side else "any size"
        return {
            "family": self.family,
            "text": f"{text.kind}: {text.layers} layers, width {text.width:,}, {text.heads} heads "
            f"({text.kv_heads} for keys and values), vocabulary {text.vocabulary:,}",
            "vision": f"{vision.kind}: {vision.layers} layers, width {vision.width:,}, frames of "
            f"{sides} in patches of {vision.patch}",
            "weights": f"{_count(self.parameters)} parameters, stored as {self.stored_dtype} in "
            f"{size(self.stored_bytes)}",
        }

    def _account(self) -> dict[str, str]:
        most = f"at most {self.most_frames:,} frames"
        verdict = f"yes; {most}" if self.fits else f"no, {self.tokens:,} do not; {most}"
        large = "" if self.vision.image_size else " of 1,280 x 720 pixels"
        times = f", {self.time_tokens} each for their times" if self.time_tokens else ""
        each, keys = size(self.bytes_per_frame), size(self.kv_bytes_per_frame)
        rows = {
            "tokens": f"{self.frames:,} frames{large} x {self.tokens_per_frame:,} = "
            f"{self.frame_tokens:,}{times}, the question about {self.prompt_tokens}, the answer up "
            f"to {self.max_tokens:,}",
            "fits": f"{verdict} in a context of {self.context:,} tokens",
            "memory": f"{self._weights()} + {size(self.kv_bytes)} of keys and values"
            f"{f' in {self.kv_dtype}' if self.kv_dtype else ''} + {size(self.held_bytes)} of "
            f"frames, pixels and features + {size(self.work_bytes)} to work in "
            f"= {size(self.memory_bytes)}",
            **({} if self.scheme is None else {"packed": self._packed(self.scheme)}),
            "account": f"{size(self.fixed_bytes)} without a frame and {each} for each of "
            f"{self.frames:,}, of which {keys} are keys and values",
        }
        if self.free_bytes is not None:
            count = f"at most {self.most_frames_in_memory:,} frames fit into it"
            loads = self.weight_bytes + self.unpacked_bytes <= self.free_bytes
            verdict = count if loads else "the weights do not fit"
            rows["free"] = f"{size(self.free_bytes)} of memory, here and now; {verdict}"
        return rows

    def _weights(self) -> str:
        if self.scheme is None:
            return f"{size(self.weight_bytes)} of weights as {self.dtype}"
        packed = f"{size(self.weight_bytes)} of weights in {self.scheme.kind}"
        return f"{packed} + {size(self.unpacked_bytes)} for one layer unpacked"

    def _packed(self, scheme: Scheme) -> str:
        """What is counted as weights where they are packed."""
        heads = {None: "not the head", scheme.kind: "the head too"}
        head = heads.get(scheme.head, f"the head in {scheme.head}")
        return (
            f"linear layers as codes and scales ({scheme.kind}, {head}), all else as {self.dtype}; "
            "prompts unpack one layer at a time"
        )


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _exact(total: int, count: int) -> float:
    return total // count if total % count == 0 else total / count
