"""How values lie in memory: a load and a store for each format of
``fused_optim.storage``, under its name.

A codec is given ``row``, a pointer to the operand's address in the table, and
``offset``, the places of its elements. ``mask`` is None in a full chunk, whose address
is known to be a multiple of 16 bytes: then all accesses are 128 bits wide.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pointer(row, dtype: tl.constexpr, mask):
    pointer = tl.load(row).to(tl.pointer_type(dtype))
    if mask is None:
        # On the pointer, not on the integer: the hint does not survive the cast.
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_fp32(row, offset, mask):
    return tl.load(_pointer(row, tl.float32, mask) + offset, mask)


@triton.jit
def store_fp32(row, offset, mask, x):
    tl.store(_pointer(row, tl.float32, mask) + offset, x, mask)


@triton.jit
def load_fp64(row, offset, mask):
    return tl.load(_pointer(row, tl.float64, mask) + offset, mask)


@triton.jit
def store_fp64(row, offset, mask, x):
    tl.store(_pointer(row, tl.float64, mask) + offset, x, mask)


@triton.jit
def load_fp16(row, offset, mask):
    return tl.load(_pointer(row, tl.float16, mask) + offset, mask).to(tl.float32)


@triton.jit
def store_fp16(row, offset, mask, x):
    tl.store(_pointer(row, tl.float16, mask) + offset, x.to(tl.float16), mask)


@triton.jit
def load_bf16(row, offset, mask):
    bits = tl.load(_pointer(row, tl.uint16, mask) + offset, mask)
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def store_bf16(row, offset, mask, x):
    # Rounded with integers: Triton's interpreter truncates float32 to bfloat16.
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = tl.where(x == x, rounded, 0x7FC0)  # noqa: PLR0124 (false for NaN)
    tl.store(_pointer(row, tl.uint16, mask) + offset, rounded.to(tl.uint16), mask)
