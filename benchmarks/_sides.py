"""vidlm and transformers under one face, timed from outside: both are used through the names that
their users use, so nothing that either does inside can flatter it."""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _shapes import Inputs, Shape
from torch import Tensor

TESTS = Path(__file__).resolve().parents[1] / "tests"
GREEDY = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}  # and never an end
LIBRARIES = ("vidlm", "transformers")


class Clock:
    """A streamer, as both libraries take one, that notes when each token comes."""

    def __init__(self, after_first: Callable[[], None] = lambda: None) -> None:
        self.began = time.perf_counter()
        self.times: list[float] = []
        self._prompt_came = False
        self._after_first = after_first

    def put(self, value: Any) -> None:
        if not self._prompt_came:
            self._prompt_came = True
            return
        self.times.append(time.perf_counter())
        if len(self.times) == 1:
            self._after_first()

    def end(self) -> None:
        """The answer is complete."""


@dataclass(frozen=True)
class Answered:
    """Ids of an answer and, in seconds from the call, when its tokens came."""

    ids: tuple[int, ...]
    times: tuple[float, ...]
    whole: float

    @property
    def first(self) -> float:
        return self.times[0]

    @property
    def rate(self) -> float:
        """Tokens a second after the first."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


@dataclass
class Side:
    """One library's model."""

    library: str
    model: Any
    shape: Shape

    def move(self, inputs: Inputs) -> Inputs:
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    def attention(self, kind: str) -> None:
        """sdpa or eager, which transformers can change while it runs."""
        self.model.set_attn_implementation(kind)

    def features(self, seed: int) -> float:
        """Seconds for the features of a video, as the decoder takes them."""
        video = self.move(self.shape.video(seed))
        video.pop("video_compression_mask", None)
        with torch.inference_mode(), timed(self.model.device) as took:
            if self.shape.packed:
                self.model.get_video_features(**video)
            else:
                self.model.get_image_features(**video)
        return took[0]

    def answer(
        self, inputs: Inputs, tokens: int, after_first: Callable[[], None] = lambda: None
    ) -> Answered:
        inputs = self.move(inputs)
        clock = Clock(after_first)
        out = self.model.generate(**inputs, max_new_tokens=tokens, streamer=clock, **GREEDY)
        whole = time.perf_counter() - clock.began
        ids = out[0, inputs["input_ids"].shape[1] :].tolist() or out[0].tolist()
        assert len(ids) == len(clock.times) == tokens, "an answer ended before its length"
        return Answered(tuple(ids), tuple(t - clock.began for t in clock.times), whole)

    def prefill(self, seed: int) -> float:
        """Seconds from a prompt that is as long, without a video, to its first token."""
        return self.answer(self.shape.text_prompt(seed), 1).first

    @torch.inference_mode()
    def logits(self, inputs: Inputs, keep: int = 1) -> Tensor:
        """(keep, V) float32 logits of the last tokens of a prompt."""
        logits = self.model(**self.move(inputs), logits_to_keep=keep).logits
        return logits[0, -keep:].float().cpu()  # VideoLLaMA3 in transformers keeps them all


def load(library: str, shape: Shape, folder: Path, dtype: torch.dtype, device: str) -> Side:
    name = f"{shape.family}ForConditionalGeneration"
    model = getattr(imported(library), name).from_pretrained(folder, dtype=dtype)
    return Side(library, model.eval().to(device), shape)


def imported(library: str) -> Any:
    if library == "vidlm":
        import vidlm

        return vidlm
    sys.path.insert(0, str(TESTS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchvision_on_cpu  # noqa: F401  (before transformers, which imports torchvision)

        # isort: split
        import transformers
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    return transformers


@contextmanager
def timed(device: torch.device) -> Iterator[list[float]]:
    """Seconds of a `with` block, with what a GPU still had to do."""
    took: list[float] = []
    _wait(device)
    began = time.perf_counter()
    yield took
    _wait(device)
    took.append(time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: str) -> int | None:
    """The most memory this process has held: of the GPU, or resident; None where nobody tells."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # ru_maxrss would begin with the parent's
    if not status.is_file():
        return None
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text())
    assert found is not None
    return int(found[1]) << 10


def free_bytes(device: str) -> int:
    """Memory that may be taken without swapping; 0 where nobody tells."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    found = meminfo.is_file() and re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())
    return int(found[1]) << 10 if found else 0


@dataclass(frozen=True)
class Agreement:
    """How far two libraries agree on one prompt.

    logits  largest difference of the first token's, relative to the largest
    equal   tokens of the two greedy answers that are the same, from the first on
    close   tokens of our answer that the other library, given our answer up to there, ranks
            first or behind its first by no more than the tolerance
    """

    logits: float
    equal: int
    close: int
    tokens: int

    def check(self, tolerance: float) -> None:
        if self.logits > tolerance or self.close < self.tokens:
            raise SystemExit(f"the libraries disagree, so there is nothing to compare: {self}")


def agree(ours: Side, theirs: Side, tokens: int, tolerance: float) -> Agreement:
    """Raises SystemExit where they disagree. Both are warm afterwards."""
    prompt = ours.shape.prompt(0)
    mine, other = ours.logits(prompt)[0], theirs.logits(prompt)[0]
    assert float(other.std()) > 0, "logits that are all alike show nothing"
    a, b = ours.answer(prompt, tokens).ids, theirs.answer(prompt, tokens).ids
    equal = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), tokens)
    said = torch.tensor([a])
    ids = torch.cat((prompt["input_ids"], said[:, :-1]), dim=1)
    ranked = theirs.logits({**prompt, "input_ids": ids}, keep=tokens)  # (tokens, V)
    best, largest = ranked.amax(1), ranked.abs().amax(1)
    behind = (best - ranked.gather(1, said.T)[:, 0]) / largest
    found = Agreement(
        round(relative(mine, other), 5), equal, int((behind <= tolerance).sum()), tokens
    )
    found.check(tolerance)
    return found


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
