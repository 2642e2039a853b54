"""Kernels in C for CPUs: compiled on the user's machine at first use, plain torch elsewhere.

`status()` says which it is; VIDLM_NATIVE=0 in the environment switches them off. Shapes are written
with the legend of vidlm.nn.
"""

from vidlm.native.coded import SCALE_BYTES, Cache, Coded, tensors_of
from vidlm.native.flash import flash, flash_blocks
from vidlm.native.library import SWITCH, Kernel, Status, library, prepare, status
from vidlm.native.memory import FROM_HEAP, Arena, LargePages, Spare, keep_freed
from vidlm.native.ops import decode_attention, numbers, rotate, rotate_store, store
from vidlm.native.packed import PackedWeight
from vidlm.native.packing import pack_rows
from vidlm.native.products import MOST_ROWS, Weight, affine, linear, linears
from vidlm.native.rows import add_rms_norm, gelu_tanh, quick_gelu, rms_norm, silu_mul
from vidlm.native.stack import Places, StackLayer, StackShape, StackTable, stack, takes_rows

__all__ = [
    "FROM_HEAP",
    "MOST_ROWS",
    "SCALE_BYTES",
    "SWITCH",
    "Arena",
    "Cache",
    "Coded",
    "Kernel",
    "LargePages",
    "PackedWeight",
    "Places",
    "Spare",
    "StackLayer",
    "StackShape",
    "StackTable",
    "Status",
    "Weight",
    "add_rms_norm",
    "affine",
    "decode_attention",
    "flash",
    "flash_blocks",
    "gelu_tanh",
    "keep_freed",
    "library",
    "linear",
    "linears",
    "numbers",
    "pack_rows",
    "prepare",
    "quick_gelu",
    "rms_norm",
    "rotate",
    "rotate_store",
    "silu_mul",
    "stack",
    "status",
    "store",
    "takes_rows",
    "tensors_of",
]
