"""A tiny checkpoint of VideoLLaMA3 in its authors' layout, with random weights.

Their code does not run with the transformers of today, whose model holds the same weights here.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import video_forms
from oracle import store

SPECIALS = {  # of Qwen2.5's tokenizer, and the authors' own
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
    "<image>": 151665,
    "<|stream_start|>": 151666,
    "<|stream_end|>": 151667,
}
IMAGE, VIDEO, PAD = SPECIALS["<image>"], SPECIALS["<|video_pad|>"], SPECIALS["<|image_pad|>"]
TEXT = {
    "vocab_size": 151936,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
SIZES = {key: value for key, value in video_forms.NAVIT.items() if key != "model_type"}
CONFIG = {
    "architectures": ["Videollama3Qwen2ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_videollama3.Videollama3Qwen2ForCausalLM"},
    "model_type": "videollama3_qwen2",
    **TEXT,
    "hidden_act": "silu",
    "image_token_index": IMAGE,
    "mm_projector_type": "mlp2x_gelu",
    "rope_scaling": None,
    "sliding_window": None,
    "torch_dtype": "float32",
    "use_cache": False,
    "use_sliding_window": False,
    "use_token_compression": True,
    "vision_encoder": None,
    "vision_encoder_config": {"model_type": "videollama3_vision_encoder", **SIZES},
}
# In tokens: of an image 16 to 400 of 4 x 4 pixels, of a frame of 8 x 8.
PIXELS = {
    "image_processor_type": "Videollama3ImageProcessor",
    "do_convert_rgb": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "min_tokens": 16,
    "max_tokens": 400,
    "patch_size": 4,
    "resample": 3,
}
PROCESSOR = {
    "processor_class": "Videollama3Qwen2Processor",
    "image_merge_size": 1,
    "video_merge_size": 2,
    "fps": 1,
    "max_frames": 128,
}
SAMPLED = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "repetition_penalty": 1.1,
    "bos_token_id": 151643,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
}
TEMPLATE = (
    "{%- if add_system_prompt and messages[0].role != 'system' -%}"
    "{{ '<|im_start|>system\nYou see.<|im_end|>\n' }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- set kind = 'stream' if message.role == 'stream' else 'im' -%}"
    "{{ '<|' ~ kind ~ '_start|>' ~ message.role ~ '\n' }}"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{ image_token ~ '\n' }}"
    "{%- elif part.type == 'video' -%}{%- for i in range(part.num_frames) -%}"
    "{%- if 'timestamps' in part -%}{{ 'Time ' ~ part.timestamps[i] | round(1) ~ 's:' }}"
    "{%- endif -%}{{ image_token ~ ('\n' if loop.last else ',') }}{%- endfor -%}"
    "{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<|' ~ kind ~ '_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
FORM = video_forms.Form(  # how transformers says the same
    "VideoLlama3",
    {},
    {**video_forms.HALF, "size": {"shortest_edge": 256, "longest_edge": 6400}, "patch_size": 4},
    {
        **{**video_forms.HALF, "patch_size": 4, "merge_size": 2},
        "size": {"shortest_edge": 1024, "longest_edge": 25600},
    },
)


def write_tokenizer(folder: Path) -> None:
    """The tiny one of the other tests, its special tokens with Qwen's ids."""
    video_forms.write_tokenizer(folder)
    made = json.loads((folder / "tokenizer.json").read_text())
    made["added_tokens"] = [
        {**made["added_tokens"][0], "content": token, "id": id} for token, id in SPECIALS.items()
    ]
    for token in video_forms.SPECIALS:
        made["model"]["vocab"].pop(token)
    made["model"]["vocab"].update(SPECIALS)
    (folder / "tokenizer.json").write_text(json.dumps(made))
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "added_tokens.json").write_text(json.dumps(SPECIALS))


def network(tied: bool) -> Any:
    """transformers' model with random weights."""
    text = {"model_type": "qwen2", **TEXT, "tie_word_embeddings": tied}
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO, "tie_word_embeddings": tied}
    config = {"text_config": text, "vision_config": video_forms.NAVIT, **tokens}
    return replace(FORM, config=config).network()


def write(folder: Path, model: Any) -> Path:
    """A whole native checkpoint; an untied one in several files."""
    tied = model.config.tie_word_embeddings
    tensors = {}
    for name, tensor in model.state_dict().items():
        native = re.sub(r"^model\.language_model\.", "model.", name)
        native = re.sub(r"^model\.vision_model\.", "model.vision_encoder.", native)
        native = re.sub(r"^model\.projector\.", "model.mm_projector.", native)
        if not (tied and name == "lm_head.weight"):
            tensors[native] = tensor.clone()
    store(folder, tensors, shards=1 if tied else 3)
    write_tokenizer(folder)
    files = {
        "config.json": {**CONFIG, "tie_word_embeddings": tied},
        "preprocessor_config.json": PIXELS,
        "processor_config.json": PROCESSOR,
        "generation_config.json": SAMPLED,
        "chat_template.json": {"chat_template": TEMPLATE},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder
