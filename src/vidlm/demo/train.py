"""Train the demo model from scratch: `python -m vidlm.demo.train --out RUN`.

Two stages. First the vision tower learns to see, from single frames of many clips: each patch is
to name the colour and shape it shows, and to say where the thing's centre is. Then the whole
model learns to answer, from packs of question-answer turns behind a clip (see dataset.py); half
way up the decoder each patch is also to say how its thing moves, so that answers can read it off,
and single frames go on being looked at, since a few clips a step hold too few shapes to learn from.

Stops at any time and goes on where it was when started again with the same --out. At the end the
checkpoint is in RUN/checkpoint, in bfloat16; `--install` copies it into the package.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, Dataset

from vidlm.demo import recipe
from vidlm.demo.dataset import IGNORE, Batch, Look, batch, look, mix_at
from vidlm.demo.questions import corpus
from vidlm.files import append_line, make_folder, write_bytes, write_files
from vidlm.models.llava import LlavaNetwork
from vidlm.nn.step import Trace, packed
from vidlm.text import Tokenizer
from vidlm.weights import save

SEEING = 0.5  # weight of the first stage's lesson in the second
PATCHES = 0.3  # weight of what patches are to know, beside the answers
WARMUP = 200


@dataclass(frozen=True)
class Stage:
    """One part of the training: `draw(step)` gives a batch, `loss` its loss and a share right."""

    name: str
    steps: int
    lr: float
    draw: Callable[[int], Any]
    loss: Callable[[Any], tuple[Tensor, float]]


class Drawn(Dataset[Any]):
    """The batches of a stage from step `first` on."""

    def __init__(self, stage: Stage, first: int) -> None:
        self.draw, self.first, self.steps = stage.draw, first, stage.steps

    def __len__(self) -> int:
        return self.steps - self.first

    def __getitem__(self, index: int) -> Any:
        return self.draw(self.first + index)


def look_loss(model: LlavaNetwork, locate: nn.Linear, data: Look) -> tuple[Tensor, float]:
    """The vision tower alone: features of patches against colour, shape and place, and the share
    of patches whose likeliest word is true."""
    words, motion = (torch.from_numpy(x).to(model.device) for x in (data.words, data.motion))
    words, motion = words[..., :2], motion[..., :2]
    features = model.features(_frames(model, data))
    logits = model.logits(features).float()
    shown = words[..., 0] != IGNORE
    error = mse_loss(locate(features).float()[shown][:, :2], motion[shown])
    right = (logits.argmax(-1, keepdim=True) == words).any(-1)[shown].float().mean().item()
    return _words_loss(logits[shown], words[shown]) + error, right


def _frames(model: LlavaNetwork, data: Batch | Look) -> Tensor:
    """(N, 3, S, S), as the checkpoint's preprocessing gives them: from -1 to 1."""
    frames = torch.from_numpy(data.frames).to(model.device).permute(0, 3, 1, 2)
    return frames.float() / 127.5 - 1


def answer_loss(model: LlavaNetwork, locate: nn.Linear, data: Batch) -> tuple[Tensor, float]:
    """Cross-entropy of the answers' tokens plus what patches are to know, and the share of the
    answers' tokens predicted right."""
    device = model.device
    ids, labels = (torch.from_numpy(x).to(device) for x in (data.ids, data.labels))
    B, L = ids.shape
    features = model.features(_frames(model, data))  # (N, P, D)
    flat = ids.flatten()
    x = model.embed(flat)
    places = (flat == model.config.placeholders["image"]).nonzero()[:, 0]
    x = x.index_copy(0, places, features.flatten(0, 1).to(x.dtype))
    layers: list[Tensor] = []
    step = replace(packed([L] * B, device), trace=Trace(hidden=layers))
    logits = model.logits(model.hidden(x, step)).float()
    # A token's label is predicted by the token before it; no row begins with a label.
    target = labels.roll(-1, dims=1).flatten()
    wanted = target != IGNORE
    right = (logits.argmax(-1) == target)[wanted].float().mean().item()
    loss = cross_entropy(logits, target, ignore_index=IGNORE)
    decoder = model.decoder
    half_way = decoder.norm(layers[len(decoder.layers) // 2][places])
    return loss + PATCHES * _patch_loss(model, locate, half_way, data), right


def _patch_loss(model: LlavaNetwork, locate: nn.Linear, h: Tensor, data: Batch) -> Tensor:
    """How well hidden states of patches (N * P, D) name their words and tell place and motion."""
    words, motion = (
        torch.from_numpy(x).to(h.device).flatten(0, 1) for x in (data.words, data.motion)
    )
    known = (words != IGNORE)[:, [0, 0, 2, 2]]  # place with the colour, motion with the direction
    error = mse_loss(locate(h).float()[known], motion[known])
    return _words_loss(model.logits(h).float(), words) + error


def _words_loss(logits: Tensor, words: Tensor) -> Tensor:
    """How well logits of patches (N, V) name their words (N, W), all of which are true at once."""
    known = words != IGNORE
    scores = logits.log_softmax(-1).gather(-1, words.clamp(min=0))
    return -scores[known].mean()


def initialise(model: LlavaNetwork) -> None:
    """Normal weights of variance 1 / fan-in; layers that write into a residual stream, less."""
    config = model.config
    depths = {
        ("o_proj.weight", "down_proj.weight"): config.text_config.num_hidden_layers,
        ("out_proj.weight", "fc2.weight"): config.vision_config.num_hidden_layers,
    }
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.05)
        elif "position_embedding" in name:
            nn.init.normal_(parameter, std=0.3)
        elif parameter.ndim >= 2:
            depth = next((d for ends, d in depths.items() if name.endswith(ends)), 0.5)
            fan_in = parameter[0].numel()
            nn.init.normal_(parameter, std=1 / math.sqrt(fan_in * 2 * depth))


def learning_rate(step: int, stage: Stage) -> float:
    """Linear warm-up over 200 steps, then a cosine down to 3 % of the peak."""
    if step < WARMUP:
        return stage.lr * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, stage.steps - WARMUP)
    return stage.lr * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress)))


def optimizer_of(model: nn.Module, lr: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def train(args: argparse.Namespace) -> Path:
    """Both stages, or what is left of them; returns the folder of the checkpoint."""
    folder = Path(args.out) / "checkpoint"
    if not (folder / "tokenizer.json").is_file():
        texts = corpus(np.random.default_rng(args.seed), 20000)
        recipe.write_files(folder, recipe.train_tokenizer(texts))
    tokenizer = Tokenizer.from_folder(folder)
    torch.manual_seed(args.seed)
    model = LlavaNetwork(recipe.config())
    initialise(model)
    locate = nn.Linear(model.config.text_config.hidden_size, 4)  # place and motion; not exported
    parts = nn.ModuleList((model, locate)).to(args.device)
    if args.compile:
        compile_layers(model)
    for stage in stages(model, locate, tokenizer, args):
        run(parts, stage, args)
    export(model, folder)
    return folder


def stages(
    model: LlavaNetwork, locate: nn.Linear, tokenizer: Tokenizer, args: argparse.Namespace
) -> tuple[Stage, ...]:
    def draw_look(step: int) -> Look:
        return look(tokenizer, args.seed, step, 12 * args.batch)

    def draw_answers(step: int) -> tuple[Batch, Look]:
        mix = mix_at(step / args.steps)
        seen = look(tokenizer, args.seed + 2, step, 4 * args.batch)
        return batch(tokenizer, args.seed + 1, step, args.batch, mix), seen

    def both(data: tuple[Batch, Look]) -> tuple[Tensor, float]:
        answers, seen = data
        loss, right = answer_loss(model, locate, answers)
        return loss + SEEING * look_loss(model, locate, seen)[0], right

    return (
        Stage("look", args.look_steps, args.lr, draw_look, lambda d: look_loss(model, locate, d)),
        Stage("answer", args.steps, args.lr, draw_answers, both),
    )


def compile_layers(model: LlavaNetwork) -> None:
    """Compile each layer in place: after a minute of compiling, a quarter less time a step."""
    torch._dynamo.config.recompile_limit = 64  # one per layer and batch shape
    tower, decoder = model.body.vision_tower, model.decoder
    for layer in (*tower.encoder.layers, *decoder.layers):
        layer.compile(dynamic=False)


def run(parts: nn.Module, stage: Stage, args: argparse.Namespace) -> None:
    """Train one stage to its end, from where an earlier run left it."""
    optimizer = optimizer_of(parts, stage.lr)
    state = Path(args.out) / f"{stage.name}.pt"
    first = 0
    if state.is_file():
        saved = torch.load(state, map_location=args.device, weights_only=True)
        parts.load_state_dict(saved["parts"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    began, window = time.monotonic(), []
    for step, data in enumerate(batches(stage, first, args.workers), first):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage)
        with torch.autocast(args.device, dtype=torch.bfloat16):
            loss, right = stage.loss(data)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        window.append((loss.item(), right))
        done = step + 1
        if done % args.log_every == 0 or done == stage.steps:
            note(stage, done, window, time.monotonic() - began, Path(args.out))
            window = []
        if done % args.save_every == 0 or done == stage.steps:
            store({"parts": parts, "optimizer": optimizer}, done, state)


def batches(stage: Stage, first: int, workers: int) -> Iterator[Any]:
    drawn = Drawn(stage, first)
    if not len(drawn):
        return iter(())
    return iter(DataLoader(drawn, batch_size=None, num_workers=workers, prefetch_factor=8))


def note(
    stage: Stage, done: int, window: list[tuple[float, float]], seconds: float, out: Path
) -> None:
    """One line of the log: means since the last one."""
    loss, right = np.mean(window, axis=0)
    row = {"stage": stage.name, "step": done, "loss": round(float(loss), 4)}
    row |= {"right": round(float(right), 4), "seconds": round(seconds, 1)}
    append_line(out / "log.jsonl", json.dumps(row))
    print(json.dumps(row), file=sys.stderr, flush=True)


def store(parts: dict[str, Any], step: int, path: Path) -> None:
    """Write the state of a stage, whole or not at all."""
    states = {name: part.state_dict() for name, part in parts.items()}
    buffer = BytesIO()  # torch.save would say no more than "failed writing file"
    torch.save({**states, "step": step}, buffer)
    write_bytes(path, buffer.getvalue())


def export(model: LlavaNetwork, folder: Path) -> None:
    """config.json and bfloat16 weights beside the tokenizer's files."""
    config = json.dumps(model.config.to_dict(), indent=2) + "\n"
    exported = LlavaNetwork(model.config)
    exported.load_state_dict(model.state_dict())
    save(exported.to(torch.bfloat16), folder, beside={"config.json": config})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=6000, help="of answering")
    parser.add_argument("--look-steps", type=int, default=1800, help="of learning to see")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw clips")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler")
    parser.add_argument("--install", action="store_true", help="copy the result into the package")
    args = parser.parse_args()
    make_folder(args.out)
    folder = train(args)
    if args.install:
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        files["training_log.jsonl"] = (Path(args.out) / "log.jsonl").read_bytes()
        write_files(recipe.CHECKPOINT, files)


if __name__ == "__main__":
    main()
