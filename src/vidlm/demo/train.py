"""Train the demo model from scratch: `python -m vidlm.demo.train --out RUN`.

Stops at any time and goes on where it was when started again with the same --out. At the end the
checkpoint is in RUN/checkpoint, in bfloat16; `--install` copies it into the package. Two CPU
cores take one to two hours, a GPU minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from vidlm.demo import recipe
from vidlm.demo.dataset import IGNORE, Batch, batch, mix_at
from vidlm.demo.questions import corpus
from vidlm.models.llava import LlavaModel
from vidlm.nn.step import packed
from vidlm.text import Tokenizer
from vidlm.weights import save

WORDS_WEIGHT = 0.3


class Batches(Dataset[Batch]):
    """Batches `first` to `steps` of a run, each drawn from (seed, step)."""

    def __init__(self, tokenizer: Tokenizer, args: argparse.Namespace, first: int) -> None:
        self.tokenizer, self.args, self.first = tokenizer, args, first

    def __len__(self) -> int:
        return int(self.args.steps) - self.first

    def __getitem__(self, index: int) -> Batch:
        step = self.first + index
        mix = mix_at(step / self.args.steps)
        return batch(self.tokenizer, self.args.seed, step, self.args.batch, mix)


def loss_of(model: LlavaModel, data: Batch) -> tuple[Tensor, float]:
    """Cross-entropy of the answers' tokens plus that of the patches' words, and the share of the
    former predicted right."""
    device = model.device
    frames = torch.from_numpy(data.frames).to(device).permute(0, 3, 1, 2)
    ids, labels = (torch.from_numpy(x).to(device) for x in (data.ids, data.labels))
    B, L = ids.shape
    features = model.features(frames.float() / 127.5 - 1)  # (N, M, D)
    flat = ids.flatten()
    x = model.embed(flat)
    places = (flat == model.config.image_token_id).nonzero()[:, 0]
    x = x.index_copy(0, places, features.flatten(0, 1).to(x.dtype))
    hidden = model.hidden(x, packed([L] * B, device))
    # A token's label is predicted by the token before it; no row begins with a label.
    target = labels.roll(-1, dims=1).flatten()
    logits = model.logits(hidden).float()
    wanted = target != IGNORE
    right = (logits.argmax(-1) == target)[wanted].float().mean().item()
    loss = cross_entropy(logits, target, ignore_index=IGNORE)
    words = torch.from_numpy(data.words).to(device).flatten(0, 1)
    return loss + WORDS_WEIGHT * _words_loss(logits[places], words), right


def _words_loss(logits: Tensor, words: Tensor) -> Tensor:
    """How well the outputs at the patches (N, V) name their words (N, WORDS); a word is not next to
    be said but one of several that are true."""
    known = words != IGNORE
    scores = logits.log_softmax(-1).gather(-1, words.clamp(min=0))
    return -scores[known].mean()


def initialise(model: LlavaModel) -> None:
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


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine down to 3 % of the peak."""
    if step < args.warmup:
        return float(args.lr) * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return float(args.lr) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress)))


def optimizer_of(model: nn.Module, lr: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def train(args: argparse.Namespace) -> Path:
    out = Path(args.out)
    folder = out / "checkpoint"
    if not (folder / "tokenizer.json").is_file():
        texts = list(corpus(np.random.default_rng(args.seed), 20000))
        recipe.write_files(folder, recipe.train_tokenizer(texts))
    tokenizer = Tokenizer.from_folder(folder)
    torch.manual_seed(args.seed)
    model = LlavaModel(recipe.config())
    initialise(model)
    model.to(args.device)
    optimizer = optimizer_of(model, args.lr)
    state = out / "state.pt"
    first = 0
    if state.is_file():
        saved = torch.load(state, map_location=args.device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    if args.compile:
        compile_layers(model)
    run(model, optimizer, batches(tokenizer, args, first), args, first)
    export(model, folder)
    return folder


def compile_layers(model: LlavaModel) -> None:
    """Compile each layer in place: after a minute of compiling, a quarter less time a step."""
    torch._dynamo.config.recompile_limit = 64  # one per layer and batch shape
    tower, decoder = model.vision_tower.vision_model, model.language_model.model
    for layer in (*tower.encoder.layers, *decoder.layers):
        layer.compile(dynamic=False)


def batches(tokenizer: Tokenizer, args: argparse.Namespace, first: int) -> Iterator[Batch]:
    data = Batches(tokenizer, args, first)
    return iter(DataLoader(data, batch_size=None, num_workers=args.workers, prefetch_factor=8))


def run(
    model: LlavaModel,
    optimizer: torch.optim.Optimizer,
    data: Iterator[Batch],
    args: argparse.Namespace,
    first: int,
) -> None:
    began = time.monotonic()
    log = Path(args.out) / "log.jsonl"
    window: list[tuple[float, float]] = []
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        with torch.autocast(args.device, dtype=torch.bfloat16):
            loss, right = loss_of(model, next(data))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        window.append((loss.item(), right))
        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            row = {
                "step": done,
                "loss": round(float(np.mean([x for x, _ in window])), 4),
                "token_accuracy": round(float(np.mean([x for _, x in window])), 4),
                "lr": round(optimizer.param_groups[0]["lr"], 6),
                "seconds": round(time.monotonic() - began, 1),
            }
            window.clear()
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), file=sys.stderr, flush=True)
        if done % args.save_every == 0 or done == args.steps:
            store(model, optimizer, done, Path(args.out))


def store(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, out: Path) -> None:
    """Write the state of the run, whole or not at all."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, out / "state.new")
    (out / "state.new").replace(out / "state.pt")


def export(model: LlavaModel, folder: Path) -> None:
    """config.json and bfloat16 weights beside the tokenizer's files."""
    config = json.dumps(model.config.to_dict(), indent=2) + "\n"
    (folder / "config.json").write_text(config)
    exported = LlavaModel(model.config)
    exported.load_state_dict(model.state_dict())
    save(exported.to(torch.bfloat16), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw clips")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler")
    parser.add_argument("--install", action="store_true", help="copy the result into the package")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    folder = train(args)
    if args.install:
        shutil.copytree(folder, recipe.CHECKPOINT, dirs_exist_ok=True)
        shutil.copy(Path(args.out) / "log.jsonl", recipe.CHECKPOINT / "training_log.jsonl")


if __name__ == "__main__":
    main()
