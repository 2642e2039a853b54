"""What the demo model is: its sizes, its tokenizer and the files of its checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from vidlm import files
from vidlm.hf import LlavaConfig

CHECKPOINT = Path(__file__).parent / "checkpoint"  # the trained model, inside the package
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
VOCAB = 576  # more than the demo world needs for every word to be one token
SIZE, PATCH = 64, 16  # pixels of a frame's side and of a patch's: 16 tokens a frame
FRAMES = 8

# Qwen's split: contractions, words with their leading space, single digits, punctuation, newlines.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def config() -> LlavaConfig:
    """LLaVA-interleave in small: SigLIP tower, projector, Qwen2 decoder; 16 tokens a frame."""
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 192,
        "intermediate_size": 576,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": PATCH,
    }
    text = {
        "model_type": "qwen2",
        "vocab_size": VOCAB,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlavaConfig.from_dict(
        {
            "vision_config": vision,
            "text_config": text,
            "image_token_index": SPECIALS.index("<image>"),
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "dtype": "bfloat16",
        }
    )


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE in Qwen's form, so that no text is outside its alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_files(folder: Path, tokenizer: Tokenizer) -> None:
    """Everything of a checkpoint but config.json and the weights, under the hub's file names."""
    half = [0.5, 0.5, 0.5]
    words = {
        "preprocessor_config.json": {
            "image_processor_type": "SiglipImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_resize": True,
            "size": {"height": SIZE, "width": SIZE},
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": half,
            "image_std": half,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "num_additional_image_tokens": 0,
            "patch_size": PATCH,
            "vision_feature_select_strategy": "full",
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        },
        "generation_config.json": {"eos_token_id": 2, "pad_token_id": 0, "max_new_tokens": 96},
    }
    texts: dict[str, str | bytes] = {"tokenizer.json": tokenizer.to_str(pretty=True)}
    texts |= {name: json.dumps(content, indent=2) + "\n" for name, content in words.items()}
    template = CHECKPOINT / "chat_template.jinja"
    files.write_files(folder, {**texts, template.name: template.read_bytes()})
