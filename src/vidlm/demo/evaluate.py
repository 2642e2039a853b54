"""Score a demo model: `python -m vidlm.demo.evaluate --n 300 --seed 1 --json`.

Fresh clips are drawn, written as real mp4 files, decoded and asked about through `lm.ask`, or
`lm.chat` for follow-up turns, one kind of question after the other. Evaluation and training draw
from different keys, so their clips never meet. Each left or right that was told is asked again of
the clip played backwards, where it must flip. With --json the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from vidlm.api import LM, load
from vidlm.demo.questions import CLIP_KINDS, QA, ask_one, follow_up, kinds, pair_questions, right
from vidlm.demo.world import Clip, draw_clip, draw_pair, write_mp4

KEY = 0xE7A1  # evaluation draws from (KEY, seed), training from (seed, step)
TURNED = {"left": "right", "right": "left"}


@dataclass
class Score:
    """Right and asked, by kind; and the wrong answers."""

    asked: dict[str, int] = field(default_factory=dict)
    right: dict[str, int] = field(default_factory=dict)
    flips: list[bool] = field(default_factory=list)
    wrong: list[dict[str, str]] = field(default_factory=list)

    def add(self, qa: QA, said: str) -> None:
        good = right(qa, said)
        self.asked[qa.kind] = self.asked.get(qa.kind, 0) + 1
        self.right[qa.kind] = self.right.get(qa.kind, 0) + good
        if not good:
            self.wrong.append({"question": qa.question, "truth": qa.answer, "said": said})

    def to_dict(self) -> dict[str, Any]:
        n = sum(self.asked.values())
        return {
            "accuracy": round(sum(self.right.values()) / n, 4),
            "by_kind": {k: round(self.right[k] / self.asked[k], 4) for k in self.asked},
            "n": n,
            "backwards": {
                "asked": len(self.flips),
                "flipped": round(float(np.mean(self.flips)), 4) if self.flips else None,
            },
        }


def evaluate(lm: LM, n: int, seed: int, folder: Path) -> Iterator[Score]:
    """Ask n questions, the kinds in turn; yields the running score after each."""
    rng = np.random.default_rng((KEY, seed))
    score = Score()
    for i in range(n):
        kind = kinds()[i % len(kinds())]
        if kind in CLIP_KINDS:
            _ask_clip(lm, kind, score, folder / f"{i}.mp4", rng)
        else:
            _ask_pair(lm, kind, score, (folder / f"{i}a.mp4", folder / f"{i}b.mp4"), rng)
        yield score


def _ask_clip(lm: LM, kind: str, score: Score, path: Path, rng: Generator) -> None:
    if kind == "follow_up":
        clip = draw_clip(rng)
        write_mp4(clip, path)
        chat = lm.chat(path)
        first, second = follow_up(clip, rng)
        chat.ask(first.question)
        score.add(second, chat.ask(second.question).text)
        return
    clip, qa = _askable(kind, rng)
    write_mp4(clip, path)
    said = lm.ask(path, qa.question).text
    score.add(qa, said)
    ways = [word for word in TURNED if qa.answer == f"It moves {word}."]
    if kind == "direction" and ways and right(qa, said):
        back = path.with_suffix(".back.mp4")
        write_mp4(clip, back, backwards=True)
        turned = QA(kind, qa.question, f"It moves {TURNED[ways[0]]}.")
        score.flips.append(right(turned, lm.ask(back, qa.question).text))


def _ask_pair(lm: LM, kind: str, score: Score, paths: tuple[Path, Path], rng: Generator) -> None:
    first, second, _ = draw_pair(rng)
    for clip, path in zip((first, second), paths, strict=True):
        write_mp4(clip, path)
    (qa,) = [qa for qa in pair_questions(first, second, rng) if qa.kind == kind]
    score.add(qa, lm.ask(list(paths), qa.question).text)


def _askable(kind: str, rng: Generator) -> tuple[Clip, QA]:
    while True:
        clip = draw_clip(rng)
        qa = ask_one(clip, kind, rng)
        if qa is not None:
            return clip, qa


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=300, help="questions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="demo", help="folder of a checkpoint")
    parser.add_argument("--quantize", help="int8, int4 or nf4")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--wrong", action="store_true", help="list the wrong answers")
    args = parser.parse_args()
    began = time.monotonic()
    lm = load(args.model, quantize=args.quantize)
    with tempfile.TemporaryDirectory() as folder:
        for score in evaluate(lm, args.n, args.seed, Path(folder)):
            asked = sum(score.asked.values())
            if asked % 50 == 0:
                print(f"{asked} asked, {sum(score.right.values())} right", file=sys.stderr)
    result = {**score.to_dict(), "seed": args.seed, "seconds": round(time.monotonic() - began, 1)}
    if args.wrong:
        for each in score.wrong:
            print(f"{each['question']}  truth: {each['truth']}  said: {each['said']}")
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['accuracy']:.1%} of {result['n']} right in {result['seconds']} s")
    for kind, share in result["by_kind"].items():
        print(f"  {kind:<10} {share:.0%}")
    print(f"  left and right flip backwards: {result['backwards']['flipped']}")


if __name__ == "__main__":
    main()
