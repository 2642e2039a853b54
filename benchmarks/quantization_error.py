"""What fewer bits a weight change: logits, the likeliest token, the demo's score. One JSON line.

Each scheme swaps linear layers of a loaded bfloat16 model, which is then led along the greedy
answers of the bfloat16 model itself, whatever it would have said: SmolLM2-135M-Instruct (fetched
from PyPI, see tests/smollm.py) through long answers, the demo model through descriptions of clips.

error   root of the mean squared difference of the logits, over that of the reference's logits from
        their mean at each token (a softmax does not see their mean, and SmolLM2's is large)
same    share of tokens at which the likeliest one is the reference's
        both token by token, eight answers together, by the steps of an engine; and, computed as a
        prompt is, with a whole answer in one pass (_at_once)
score   right answers to --n questions of vidlm.demo.evaluate; points: the difference to bfloat16's
        in hundredths, over the same questions

SmolLM2's file has 5 bits a weight, on a grid that a scheme of 4 bits could fall in with: its
channels are shuffled first, which changes nothing but which weights are neighbours. "float32" are
the same bfloat16 weights, computed with in float32: how much of an error is rounding.

With --table FILE the table is also written into that file, between two lines that say
<!-- quantization_error.py --> and <!-- /quantization_error.py -->.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from _drift import Drift, decoded, described, inputs_of
from torch import Tensor, nn

from vidlm.api import load
from vidlm.cli.machine import machine
from vidlm.demo.evaluate import evaluate
from vidlm.engine import Request, generate
from vidlm.models.base import Prompt, VideoModel
from vidlm.nn.step import packed
from vidlm.quant import PRESETS, BitsAndBytesConfig, Packer, preset, quantize
from vidlm.types import SamplingParams

sys.path.pop(0)  # this folder, whose kernels.py bitsandbytes would take for a package of that name
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import smollm

Scheme = Callable[[nn.Module], None]
TOGETHER = 8  # answers under way: a scheme that decodes its weights in each step takes an eighth
KEY = 0x9E4E  # clips are drawn from (KEY, seed): neither those of training nor those of evaluation
MARKS = ("<!-- quantization_error.py -->", "<!-- /quantization_error.py -->")
# At these it does not repeat itself, which would make every next token a sure one.
QUESTIONS = (
    "Write a story about a lighthouse keeper who finds a message in a bottle.",
    "What were the causes of the First World War?",
    "Plan a three-day trip to Rome for a family with two children.",
    "Write a detective story that begins in a railway station.",
    "How does the human heart work?",
    "Write a diary entry of an astronaut on Mars.",
    "Why is the sky blue during the day and red at sunset?",
    "Write an email to a colleague about a delayed project.",
)


# ---- schemes ------------------------------------------------------------------------------------


def bitsandbytes(**words: Any) -> Scheme:
    config = BitsAndBytesConfig(**words, bnb_4bit_compute_dtype=torch.bfloat16)
    return lambda model: quantize(model, config, getattr(model, "unquantized", ()))


def in_float32(model: nn.Module) -> None:
    model.float()


def kept_in(name: str) -> Scheme:
    """As `--quantize` does it: the head in 8 bits, embeddings as they are."""
    return lambda model: Packer(model, preset(name), getattr(model, "unquantized", ())).finish()


# What each makes of a bfloat16 model, in place.
SCHEMES: dict[str, Scheme] = {
    "float32": in_float32,
    **{name: kept_in(name) for name in PRESETS},
    "bitsandbytes int8": bitsandbytes(load_in_8bit=True),
    "bitsandbytes nf4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes fp4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
}


# ---- what is measured ---------------------------------------------------------------------------


@torch.inference_mode()
def at_once(
    model: VideoModel, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]
) -> list[Tensor]:
    """The logits of `decoded`, of each prompt and answer in a single pass."""
    made = []
    for prompt, answer in zip(prompts, answers, strict=True):
        x = inputs_of(model, prompt).rows([*prompt.ids, *answer[:-1]], 0)
        hidden = model.hidden(x, packed([len(x)], model.device))
        made.append(model.logits(hidden[len(prompt.ids) - 1 :]).float())
    return made


WAYS = {"": decoded, "_at_once": at_once}


@dataclass(frozen=True)
class Subject:
    """A model, what it is asked, and how long its answers may be."""

    fresh: Callable[[], VideoModel]  # in bfloat16, to be changed
    prompts: Sequence[Prompt]
    tokens: int

    @cached_property
    def answers(self) -> list[tuple[int, ...]]:
        model = self.fresh()
        params = SamplingParams(
            max_new_tokens=self.tokens, eos_token_ids=(model.config.text_config.eos_token_id,)
        )
        requests = [Request(prompt, params) for prompt in self.prompts]
        return [output.ids for output in generate(model, requests)]

    @cached_property
    def references(self) -> dict[str, list[Tensor]]:
        model = self.fresh()
        found = {way: list(self._logits(model, way)) for way in WAYS}
        chosen = torch.cat(found[""]).argmax(-1)
        same = (chosen == torch.tensor([id for answer in self.answers for id in answer])).sum()
        # But for near ties: the engine had others beside each.
        assert same >= 0.95 * len(chosen), "these are not the steps that answers are decoded by"
        return found

    def about(self) -> dict[str, Any]:
        lengths = [len(answer) for answer in self.answers]
        return {"prompts": len(lengths), "tokens": sum(lengths), "shortest": min(lengths)}

    def drift(self, scheme: Scheme) -> dict[str, float]:
        model = self.fresh()
        scheme(model)
        found = {}
        for way in WAYS:
            seen = Drift()
            for logits, reference in zip(
                self._logits(model, way), self.references[way], strict=True
            ):
                seen.add(logits, reference)
            found |= {f"error{way}": round(seen.error, 5), f"same{way}": round(seen.share, 5)}
        return found

    def _logits(self, model: VideoModel, way: str) -> Iterator[Tensor]:
        for i in range(0, len(self.prompts), TOGETHER):
            some = slice(i, i + TOGETHER)
            yield from WAYS[way](model, self.prompts[some], self.answers[some])


def smollm2(tokens: int) -> Subject:
    smol = smollm.shuffled(smollm.read(smollm.fetched()))
    prompts = [smol.prompt(question) for question in QUESTIONS]
    return Subject(lambda: smol.model(torch.bfloat16), prompts, tokens)


def demo(clips: int, tokens: int, seed: int) -> Subject:
    prompts = described(load("demo"), clips, (KEY, seed))
    return Subject(lambda: load("demo").model, prompts, tokens)


def score(scheme: Scheme | None, n: int, seed: int) -> float:
    """Right answers of the demo, in hundredths."""
    lm = load("demo")
    if scheme is not None:
        scheme(lm.model)
    with tempfile.TemporaryDirectory() as folder:
        *_, last = evaluate(lm, n, seed, Path(folder))
    return 100 * sum(last.right.values()) / sum(last.asked.values())


# ---- what is told -------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    makers = {
        "smollm2": lambda: smollm2(args.tokens),
        "demo": lambda: demo(args.clips, args.tokens, args.seed),
    }
    subjects = {name: makers[name]() for name in args.models}
    scored = score(None, args.n, args.seed) if "demo" in subjects else None
    found: dict[str, Any] = {
        "benchmark": "quantization_error",
        "machine": machine(),
        **{name: subject.about() for name, subject in subjects.items()},
        "schemes": {},
    }
    if scored is not None:
        found["demo"] |= {"n": args.n, "seed": args.seed, "score": round(scored, 2)}
    for name in args.only:
        row: dict[str, Any] = {of: s.drift(SCHEMES[name]) for of, s in subjects.items()}
        if scored is not None:
            points = score(SCHEMES[name], args.n, args.seed) - scored
            row["demo"]["points"] = round(points, 2)
        print(f"{name}: {row}", file=sys.stderr)
        found["schemes"][name] = row
    return found


def table(found: Mapping[str, Any]) -> str:
    """Markdown, without what this run left out."""
    columns = {
        ("smollm2", "error"): "SmolLM2: error",
        ("smollm2", "same"): "same token",
        ("demo", "error"): "demo: error",
        ("demo", "same"): "same token",
        ("demo", "points"): "score, points",
    }
    columns = {key: title for key, title in columns.items() if key[0] in found}
    lines = [
        _row(["against bfloat16", *columns.values()]),
        _row(["---", *["--:" for _ in columns]]),
    ]
    for scheme, seen in found["schemes"].items():
        lines.append(_row([scheme, *[FORMS[kind](seen[of][kind]) for of, kind in columns]]))
    told = [TOLD[of].format(**found[of]) for of in TOLD if of in found]
    return "\n".join([*lines, "", " ".join(told)])


FORMS: Mapping[str, Callable[[float], str]] = {
    "error": "{:.2%}".format,
    "same": "{:.2%}".format,
    "points": "{:+.1f}".format,
}
TOLD = {
    "smollm2": "SmolLM2-135M-Instruct: {tokens} tokens of {prompts} answers.",
    "demo": "Demo: {tokens} tokens of {prompts} answers; in bfloat16 it scores {score} of 100 in "
    "{n} questions.",
}


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def replaced(text: str, content: str) -> str:
    """A page with new content between the two marks."""
    begin, end = MARKS
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise SystemExit(f"the page needs these two lines, each once and in this order: {MARKS}")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=list(SCHEMES), nargs="+", default=list(SCHEMES))
    parser.add_argument(
        "--models", choices=["smollm2", "demo"], nargs="+", default=["smollm2", "demo"]
    )
    parser.add_argument("--tokens", type=int, default=256, help="of an answer, at most")
    parser.add_argument("--clips", type=int, default=24, help="that the demo describes")
    parser.add_argument("--n", type=int, default=300, help="questions that the demo is scored by")
    parser.add_argument("--seed", type=int, default=1, help="of the clips")
    parser.add_argument("--table", type=Path, help="page to write the table into")
    args = parser.parse_args()
    if args.table is not None:
        replaced(args.table.read_text("utf-8"), "")  # fails now, not after minutes
    found = measure(args)
    if args.table is not None:
        page = args.table.read_text("utf-8")
        args.table.write_text(replaced(page, table(found)), "utf-8")
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
