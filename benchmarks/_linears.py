"""Linear layers in 8 and 4 bits: vidlm's own, and by every library that has them.

A form packs a weight, and says what the packed weight stands for and what it takes. Nothing here
measures; quantized_linear.py does.
"""

from __future__ import annotations

import copy
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from _sides import imported
from torch import Tensor, nn
from torch.nn.functional import linear

from vidlm.nn.packed import product
from vidlm.quant.packing import pack, packings

BASE = "bf16 vidlm"
GROUP = 32  # weights that share a scale, where we choose
ROUNDED, DYNAMIC = 0.01, 0.03  # allowed error where inputs stay as they are, become int8

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Packed:
    """A quantized weight: `again` lays it into memory of its own, `weight` is what it says."""

    again: Callable[[], Call]
    size: int  # bytes
    weight: Tensor  # (out, in) float32
    allowed: float = ROUNDED


@dataclass(frozen=True)
class Form:
    name: str
    pack: Callable[[Tensor], Packed]  # of a bfloat16 weight (out, in)
    needs: str = "torch"  # module


def plainly(
    run: Callable[..., Tensor], tensors: Sequence[Tensor], weight: Tensor, allowed: float = ROUNDED
) -> Packed:
    """Of a function of an input and these tensors."""

    def again() -> Call:
        mine = tuple(t.clone() for t in tensors)
        return lambda x: run(x, *mine)

    return Packed(again, sum(t.nbytes for t in tensors), weight, allowed)


# ---- vidlm, and bfloat16 ---------------------------------------------------------------------


def unquantized(run: Callable[..., Tensor], weight: Tensor) -> Packed:
    return plainly(run, (weight,), weight.float())


def ours(kind: str, weight: Tensor) -> Packed:
    """As a layer of a quantized model takes a product: few rows from the codes, more unpacked."""
    packed = pack(weight, packings()[kind]).packed

    def again() -> Call:
        mine = replace(packed, codes=packed.codes.clone(), scale=packed.scale.clone())
        return lambda x: product(x, mine, None)

    return Packed(again, packed.nbytes, packed.numbers(torch.float32))


# ---- torch's kernels for 8 and 4 bits --------------------------------------------------------


def eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (out, in) and a scale (out) for each row."""
    scale = weight.float().abs().amax(1) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def int8pack(weight: Tensor) -> Packed:
    q, scale = eight_bits(weight)
    scale = scale.bfloat16()
    return plainly(torch._weight_int8pack_mm, (q, scale), q * scale.float()[:, None])


def rows_to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(1, keepdim=True).float() / 127
    return (x / scale).round().to(torch.int8), scale


def onednn(weight: Tensor) -> Packed:
    """Inputs to int8, a scale for each row; oneDNN's own layout of the weights."""
    q, scale = eight_bits(weight)
    zero = torch.zeros(len(q), dtype=torch.int64)

    def run(x: Tensor, packed: Tensor) -> Tensor:
        given, factor = rows_to_int8(x)
        weights, output = (packed, scale, zero, None), (1.0, 0, torch.float32, "none", [], "")
        found = torch.ops.onednn.qlinear_pointwise(given, 1.0, 0, *weights, *output)
        return found.mul_(factor).bfloat16()

    def again() -> Call:
        packed = torch.ops.onednn.qlinear_prepack(q, None)
        return lambda x: run(x, packed)

    return Packed(again, q.nbytes + scale.nbytes, q * scale[:, None], DYNAMIC)


def int_mm(weight: Tensor) -> Packed:
    """Inputs to int8, weights in their plain layout."""
    q, scale = eight_bits(weight)

    def run(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        given, factor = rows_to_int8(x)
        return (torch._int_mm(given, q.t()) * factor).mul_(scale).bfloat16()

    return plainly(run, (q, scale), q * scale[:, None], DYNAMIC)


def dynamic(weight: Tensor) -> Packed:
    """torch.ao's dynamic quantization, which takes and gives float32; a scale for all inputs."""
    q, scale = eight_bits(weight)
    zero = torch.zeros(len(q), dtype=torch.int64)

    def again() -> Call:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch: it is to leave
            given = torch._make_per_channel_quantized_tensor(q, scale.double(), zero, 0)
            packed = torch.ops.quantized.linear_prepack(given, None)
        return lambda x: torch.ops.quantized.linear_dynamic(x.float(), packed).bfloat16()

    return Packed(again, q.nbytes + scale.nbytes, q * scale[:, None], DYNAMIC)


def four_bits(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """0 to 15 (out, in); scales and middles (out, in / group), in bfloat16."""
    parts = weight.float().unflatten(1, (-1, group))
    low, high = parts.amin(2), parts.amax(2)
    scale = ((high - low) / 15).bfloat16()
    middle = (low + 8 * scale).bfloat16()
    q = ((parts - middle[..., None]) / scale[..., None] + 8).round().clamp(0, 15)
    return q.flatten(1), scale, middle


def int4pack(group: int, weight: Tensor) -> Packed:
    q, scale, middle = four_bits(weight, group)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
    both = torch.stack((scale, middle), 2).transpose(0, 1).contiguous()

    def run(x: Tensor, packed: Tensor, both: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, both)

    parts = (q - 8).unflatten(1, (-1, group)) * scale[..., None] + middle[..., None]
    return plainly(run, (packed, both), parts.flatten(1))


def dynamic_four(weight: Tensor) -> Packed:
    """Inputs to int8 and symmetric int4; made for arm64, a plain loop elsewhere."""
    out, D = weight.shape
    parts = weight.float().unflatten(1, (-1, GROUP))
    scale = (parts.abs().amax(2) / 7).bfloat16()
    q = (parts / scale.float()[..., None]).round().clamp(-8, 7)
    nibble = (q.flatten(1) + 8).to(torch.uint8)
    pairs = nibble[:, ::2] | nibble[:, 1::2] << 4
    packed = torch.ops.aten._dyn_quant_pack_4bit_weight(pairs, scale, None, GROUP, D, out)

    def run(x: Tensor, packed: Tensor) -> Tensor:
        return torch.ops.aten._dyn_quant_matmul_4bit(x.float(), packed, GROUP, D, out).bfloat16()

    return plainly(run, (packed,), (q * scale.float()[..., None]).flatten(1), DYNAMIC)


# ---- modules of other libraries --------------------------------------------------------------


def plain_layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer.eval()


def modular(
    module: nn.Module, kept: list[Tensor], weight: Tensor, allowed: float = ROUNDED
) -> Packed:
    size = sum(t.nbytes for t in kept)
    return Packed(lambda: copy.deepcopy(module), size, weight.float(), allowed)


def ao(config: Callable[[Any], Any], allowed: float, weight: Tensor) -> Packed:
    """torchao's quantize_, without torch.compile."""
    library = importlib.import_module("torchao.quantization")
    layer = plain_layer(weight)
    library.quantize_(layer, config(library))
    if type(layer.weight.data) is Tensor:
        raise ValueError("torchao left the weight as it was")
    return modular(layer, inner(layer.weight), layer.weight.dequantize(), allowed)


def inner(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor of another class is made of."""
    if type(tensor) in (Tensor, nn.Parameter):
        return [tensor]
    if not hasattr(tensor, "__tensor_flatten__"):
        return [value for value in vars(tensor).values() if isinstance(value, Tensor)]
    names = tensor.__tensor_flatten__()[0]
    return [part for name in names for part in inner(getattr(tensor, name))]


def ao_nf4(weight: Tensor) -> Packed:
    library = importlib.import_module("torchao.quantization")
    layer = plain_layer(weight)
    layer.weight = nn.Parameter(library.to_nf4(weight, 64, 256), requires_grad=False)
    return modular(layer, inner(layer.weight), layer.weight.get_original_weight())


def bnb_eight(threshold: float, weight: Tensor) -> Packed:
    """Inputs above the threshold, if it is not 0, are multiplied in 16 bits."""
    library = importlib.import_module("bitsandbytes")
    sizes = (*weight.shape[::-1], False, False, threshold)
    made = library.nn.Linear8bitLt(*sizes, device="meta")
    made.weight = library.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    made.to("cpu").eval()(weight[:1])  # the state comes with the first call
    kept = [made.state.CB, made.state.SCB]
    return modular(made, kept, kept[0] * kept[1][:, None] / 127, DYNAMIC)


def bnb_weights(packed: Tensor, state: Any) -> Tensor:
    """Blocks run on from row to row; bitsandbytes' own function is part of what is checked."""
    nibbles = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), 1).flatten()
    parts = state.code[nibbles.long()].unflatten(0, (-1, state.blocksize))
    return (parts * state.absmax[:, None]).view(state.shape)


def bnb_four(kind: str, packs: bool, weight: Tensor) -> Packed:
    """`packs`: in the form it has for CPUs with AVX512-BF16."""
    library = importlib.import_module("bitsandbytes")
    sizes = (*weight.shape[::-1], False, torch.bfloat16)
    made = library.nn.Linear4bit(*sizes, quant_type=kind, device="meta")
    made.weight = library.nn.Params4bit(weight, False, quant_type=kind, compress_statistics=False)
    made.to("cpu").eval()
    weights = bnb_weights(made.weight.data, made.weight.quant_state)
    made.support_avx512bf16_for_cpu = packs
    made(weight[:1])  # which packs
    state = made.weight.quant_state
    if packs and not getattr(state, "packing_format_for_cpu", False):
        raise ValueError("bitsandbytes did not pack")
    return modular(made, [made.weight.data, state.absmax], weights)


def quanto(kind: str, weight: Tensor) -> Packed:
    library = importlib.import_module("optimum.quanto")

    def again() -> nn.Module:  # its tensors know no deepcopy
        made = library.QLinear.from_module(plain_layer(weight), weights=getattr(library, kind))
        made.eval().freeze()
        return made

    kept = again().weight
    return Packed(again, sum(t.nbytes for t in inner(kept)), kept.dequantize().float())


def forms() -> Iterator[Form]:
    """BASE comes first."""
    yield Form(BASE, partial(unquantized, partial(product, bias=None)))
    for kind in packings():
        yield Form(f"{kind} vidlm", partial(ours, kind))
    yield Form("bf16 torch", partial(unquantized, linear))
    yield Form("int8 torch _weight_int8pack_mm", int8pack)
    yield Form("int8 torch onednn.qlinear", onednn)
    yield Form("int8 torch _int_mm", int_mm)
    yield Form("int8 torch linear_dynamic", dynamic)
    yield Form("int4 torch _weight_int4pack_mm 32", partial(int4pack, 32))
    yield Form("int4 torch _weight_int4pack_mm 128", partial(int4pack, 128))
    yield Form("int4 torch _dyn_quant_matmul_4bit", dynamic_four)
    for name, config in (
        ("int8 torchao Int8WeightOnly", lambda q: q.Int8WeightOnlyConfig()),
        ("int8 torchao Int8Dynamic", lambda q: q.Int8DynamicActivationInt8WeightConfig()),
        ("int4 torchao Int4WeightOnly", lambda q: q.Int4WeightOnlyConfig(GROUP)),
        ("int4 torchao Intx", lambda q: q.IntxWeightOnlyConfig(torch.int4, q.PerGroup(GROUP))),
    ):
        allowed = DYNAMIC if "Dynamic" in name else ROUNDED
        yield Form(name, partial(ao, config, allowed), "torchao.quantization")
    yield Form("nf4 torchao", ao_nf4, "torchao.quantization")
    for limit in (0.0, 6.0):
        yield Form(f"int8 bitsandbytes {limit}", partial(bnb_eight, limit), "bitsandbytes")
    for kind in ("nf4", "fp4"):
        yield Form(f"{kind} bitsandbytes", partial(bnb_four, kind, False), "bitsandbytes")
        yield Form(f"{kind} bitsandbytes packed", partial(bnb_four, kind, True), "bitsandbytes")
    for kind in ("qint8", "qint4"):
        yield Form(f"{kind[1:]} quanto", partial(quanto, kind), "optimum.quanto")


def importable(form: Form) -> bool:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at each call what it casts
    try:
        if form.needs == "optimum.quanto":
            imported("transformers")  # which it imports too, where it is there
        importlib.import_module(form.needs)
    except ImportError:
        return False
    return True
