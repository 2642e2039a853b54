"""llama.cpp on a checkpoint's decoder: seconds of a prefill, tokens a second after it.

Runs in any Python that has llama-cpp-python, gguf and numpy; latency.py calls it. `prepare FOLDER`
writes the decoder as FOLDER/llamacpp.gguf, weights unchanged; `run FOLDER` reads a request from
stdin (ids, tokens, threads, precision, where to save the first token's logits) and prints one JSON
line. `quantize FOLDER KIND` writes what was prepared in q8_0 or q4_0 beside it, `"kind"` in a
request runs that, without llama.cpp's buffers for special layouts: with those it ended with a
segmentation fault on a machine with AMX (llama-cpp-python 0.3.36).
Settings: flash attention on, batches of 2,048 tokens in parts of 512, keys and values in float16,
its default; for a float32 checkpoint float32 throughout. Build it for the machine:
CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python gguf
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
from _checkpoint import decoder, text_config

FILE = "llamacpp.gguf"
WARM = 64  # tokens before anything is timed
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def prepare(folder: Path) -> None:
    import gguf

    config = text_config(folder)
    writer = gguf.GGUFWriter(folder / FILE, "qwen2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for stored in decoder(folder):
        if config.get("tie_word_embeddings") and stored.name == "lm_head.weight":
            continue
        name = gguf_name(stored.name)
        if len(stored.shape) == 1 or stored.dtype == "F32":  # norms and biases are always float32
            writer.add_tensor(name, stored.float32())
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, stored.data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantized(folder: Path, kind: str | None) -> Path:
    return folder / (FILE if kind is None else f"llamacpp-{kind}.gguf")


def quantize(folder: Path, kind: str) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    files = (str(quantized(folder, k)).encode() for k in (None, kind))
    failed = llama_cpp.llama_model_quantize(*files, params)
    assert not failed, f"llama.cpp could not write {kind}"


def run(folder: Path) -> None:
    import llama_cpp

    asked = json.load(sys.stdin)
    ids, tokens, threads = asked["ids"], asked["tokens"], asked["threads"]
    if asked.get("kind"):
        plain = llama_cpp.llama_model_default_params()
        plain.use_extra_bufts = False
        llama_cpp.llama_cpp.llama_model_default_params = lambda: plain  # which Llama asks
    room = -(-(len(ids) + tokens) // 256) * 256
    single = asked["precision"] == "f32"
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    model = llama_cpp.Llama(
        str(quantized(folder, asked.get("kind"))),
        n_ctx=room,
        n_batch=2048,
        n_ubatch=512,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=not single,  # which rounds to float16 whatever it is given
        verbose=False,
        **(exact if single else {}),
    )

    def step(new: list[int]) -> np.ndarray:
        model.eval(new)
        pointer = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return np.ctypeslib.as_array(pointer, (model.n_vocab(),))

    step(ids[:WARM])
    step(ids[:1])
    model.reset()
    began = time.perf_counter()
    logits = step(ids)
    said = [int(logits.argmax())]
    prefill = time.perf_counter() - began
    if asked.get("logits"):
        np.save(asked["logits"], logits)
    began = time.perf_counter()
    while len(said) < tokens:
        said.append(int(step(said[-1:]).argmax()))
    decode = time.perf_counter() - began
    seen = {"version": llama_cpp.__version__, "ids": said, "prefill_seconds": prefill}
    if tokens > 1:
        seen["decode_tokens_per_second"] = (tokens - 1) / decode
    print(json.dumps(seen))


if __name__ == "__main__":
    tasks = {"prepare": prepare, "quantize": quantize, "run": run}
    tasks[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
