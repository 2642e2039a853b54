"""OpenVINO on a checkpoint's decoder and SigLIP tower: seconds of each, and tokens a second.

Runs in any Python that has openvino, optimum-intel, torch and transformers (a version that
optimum-intel takes); latency.py calls it. `prepare FOLDER` exports the decoder with optimum-intel,
as its users do, and the tower with its projector by openvino.convert_model; `run FOLDER` reads a
request from stdin (ids, tokens, threads, precision, and where to read pixels and to save logits and
features) and prints one JSON line.
Settings: keys and values in the same precision as all else (by default OpenVINO would keep them in
8 bits), no dynamic quantization, and logits of the last token alone, as openvino-genai has them.
OpenVINO 2026.4 divides by zero in bfloat16 on a single thread; give it two.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from _checkpoint import Stored, decoder, tensors, text_config

WARM = 64  # tokens before anything is timed
TORCH_NAMES = {"BF16": "bfloat16", "F32": "float32"}


def as_torch(stored: Stored) -> Any:
    import torch

    dtype = getattr(torch, TORCH_NAMES[stored.dtype])
    return torch.frombuffer(bytearray(stored.data.tobytes()), dtype=dtype).view(stored.shape)


def prepare(folder: Path) -> None:
    export_decoder(folder, folder / "openvino")
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    if vision["model_type"] == "siglip_vision_model":
        export_tower(folder, vision, folder / "openvino" / "tower.xml")


def export_decoder(folder: Path, target: Path) -> None:
    import openvino
    from optimum.intel import OVModelForCausalLM
    from safetensors.torch import save_file
    from transformers import Qwen2Config

    plain = target / "torch"
    plain.mkdir(parents=True)
    weights = {stored.name: as_torch(stored) for stored in decoder(folder)}
    config = text_config(folder)
    if config.get("tie_word_embeddings"):
        weights.pop("lm_head.weight", None)
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    kept = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    made = Qwen2Config(**kept, architectures=["Qwen2ForCausalLM"], dtype=dtype)
    made.save_pretrained(plain)
    exported = OVModelForCausalLM.from_pretrained(
        plain, export=True, compile=False, load_in_8bit=False
    )
    last_logits_only(exported.model)
    openvino.save_model(exported.model, target / "decoder.xml", compress_to_fp16=False)
    (plain / "model.safetensors").unlink()


def last_logits_only(model: Any) -> None:
    """The head over the prompt's last token, not over all of them."""
    from openvino import opset13 as ops

    head = model.output("logits").get_node().input_value(0).get_node()
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    last = ops.slice(head.input_value(0), [-1], [np.iinfo(np.int64).max], [1], [1])
    head.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


def export_tower(folder: Path, vision: dict[str, Any], target: Path) -> None:
    """Pixels to what the decoder takes: the encoder's last layer, without its norm, projected."""
    import openvino
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    given = {stored.name: as_torch(stored).float() for stored in tensors(folder)}
    tower = SiglipVisionModel(SiglipVisionConfig(**vision)).eval()
    wanted = tower.state_dict()
    for name in wanted:
        inner = name.removeprefix("vision_model.")
        if not inner.startswith(("post_layernorm", "head")):  # which LLaVA does not use
            wanted[name] = only(given, f"vision_model.{inner}")
    tower.load_state_dict(wanted)
    linears = []
    for part in ("linear_1", "linear_2"):
        weight, bias = (only(given, f"projector.{part}.{kind}") for kind in ("weight", "bias"))
        linears.append(torch.nn.Linear(*reversed(weight.shape)))
        linears[-1].load_state_dict({"weight": weight, "bias": bias})

    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = getattr(tower, "vision_model", tower)
            self.projector = torch.nn.Sequential(linears[0], torch.nn.GELU(), linears[1])

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            embedded = self.tower.embeddings(pixels)
            return self.projector(self.tower.encoder(inputs_embeds=embedded).last_hidden_state)

    pixels = torch.zeros(2, 3, vision["image_size"], vision["image_size"])
    with torch.no_grad():
        made = openvino.convert_model(Features().eval(), example_input=pixels)
    made.reshape([-1, *pixels.shape[1:]])
    openvino.save_model(made, target, compress_to_fp16=True)


def only(given: dict[str, Any], ending: str) -> Any:
    (name,) = (key for key in given if key.endswith(ending))
    return given[name]


def run(folder: Path) -> None:
    import openvino

    asked = json.load(sys.stdin)
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(asked["threads"]),
        "INFERENCE_PRECISION_HINT": asked["precision"],
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    }
    core = openvino.Core()
    seen: dict[str, Any] = {"version": openvino.__version__}
    tower = folder / "openvino" / "tower.xml"
    if tower.is_file() and asked.get("pixels"):
        seen |= see(core.compile_model(tower, "CPU", settings), asked)
    settings["KV_CACHE_PRECISION"] = asked["precision"]
    compiled = core.compile_model(folder / "openvino" / "decoder.xml", "CPU", settings)
    print(json.dumps(seen | say(compiled, asked)))


def see(compiled: Any, asked: dict[str, Any]) -> dict[str, Any]:
    pixels = np.load(asked["pixels"])
    request = compiled.create_infer_request()
    request.infer([pixels])  # shapes are compiled when they are first seen
    began = time.perf_counter()
    request.infer([pixels])
    seconds = time.perf_counter() - began
    if asked.get("features"):
        np.save(asked["features"], request.get_output_tensor(0).data)
    return {"vision_seconds": seconds}


def say(compiled: Any, asked: dict[str, Any]) -> dict[str, Any]:
    ids, tokens = asked["ids"], asked["tokens"]
    request = compiled.create_infer_request()

    def step(new: list[int], past: int) -> np.ndarray:
        request.infer(
            {
                "input_ids": np.array([new], np.int64),
                "attention_mask": np.ones((1, past + len(new)), np.int64),
                "position_ids": np.arange(past, past + len(new), dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        return request.get_tensor("logits").data[0, -1]

    step(ids[:WARM], 0)
    step(ids[:1], min(WARM, len(ids)))
    request.reset_state()
    began = time.perf_counter()
    logits = step(ids, 0)
    said = [int(logits.argmax())]
    prefill = time.perf_counter() - began
    if asked.get("logits"):
        np.save(asked["logits"], logits.astype(np.float32))
    began = time.perf_counter()
    while len(said) < tokens:
        said.append(int(step(said[-1:], len(ids) + len(said) - 1).argmax()))
    decode = time.perf_counter() - began
    seen: dict[str, Any] = {"ids": said, "prefill_seconds": prefill}
    return seen | ({"decode_tokens_per_second": (tokens - 1) / decode} if tokens > 1 else {})


if __name__ == "__main__":
    {"prepare": prepare, "run": run}[sys.argv[1]](Path(sys.argv[2]))
