"""The gradients' norm: a kernel for the sums of squares, and a small one for what becomes of them.

What is added in which order is written out, as ``fused_optim.reference.tree_sum`` says: a reduction of
Triton's own has another order in each layout, and in the interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fused_optim import reference

from . import codecs, rules
from .step import ROW_COLUMNS, Launch, loaded

CHUNK = tl.constexpr(reference.NORM_CHUNK)
LANES = tl.constexpr(reference.NORM_LANES)
LEVELS = tl.constexpr(reference.NORM_LANES.bit_length() - 1)

REGISTERS = 128
CLIP_THREADS = 256


@triton.jit
def _tree_sum(lanes):
    """Of neighbours, until one is left: a tensor of one element."""
    for _ in tl.static_range(LEVELS):
        even, odd = tl.split(tl.reshape(lanes, [lanes.shape[0] // 2, 2]))
        lanes = even + odd
    return lanes


@triton.jit
def _squares(grad, at, divisor, GRAD: tl.constexpr):
    g = GRAD.decode(GRAD.load(grad, at), at)
    if divisor != 1:
        g = rules.divide(g, divisor)
    g = g.to(tl.float64)
    return g * g


# One warp to a program: then all of a sum but its last levels needs no shared memory.
@triton.jit(do_not_specialize_on_alignment=["grad_scale"])
def square_sums_kernel(rows, grads, chunks, grad_scale, sums, GRAD: tl.constexpr, DTYPE: tl.constexpr):
    entry = chunks + 3 * tl.program_id(0).to(tl.int64)
    row = tl.load(entry).to(tl.int64)
    grad = grads + row
    chunk = tl.load(entry + 1).to(tl.int64)
    divisor = tl.full([], 1, DTYPE)
    if grad_scale is not None:
        divisor *= tl.load(grad_scale).to(DTYPE)
    working = sums.to(tl.pointer_type(DTYPE))  # from which codecs know the working precision
    lanes = tl.zeros([LANES], tl.float64)
    start = tl.maximum(chunk, -1 - chunk) * CHUNK
    if chunk >= 0:
        for i in tl.static_range(CHUNK // LANES):
            first = start + i * LANES
            at = codecs.At(first, first + tl.arange(0, LANES), None, None, working, None, None, None)
            lanes += _squares(grad, at, divisor, GRAD)
    else:
        end = tl.minimum(start + CHUNK, tl.load(rows + row * ROW_COLUMNS))
        while start < end:
            offset = start + tl.arange(0, LANES)
            at = codecs.At(start, offset, offset < end, None, working, None, None, None)
            lanes += tl.where(offset < end, _squares(grad, at, divisor, GRAD), 0)
            start += LANES
    tl.store(sums + tl.load(entry + 2) + tl.arange(0, 1), _tree_sum(lanes))


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["skipped"])
def clip_kernel(sums, n, max_grad_norm, clip, skipped):
    """One program. ``skipped``: None where a norm that is not finite skips nothing."""
    one = tl.arange(0, 1)
    if skipped is not None:
        count = tl.load(skipped + one)  # by every thread: before the sum's barriers, since one will write
    lanes = tl.zeros([LANES], tl.float64)
    start = tl.program_id(0)  # 0, in a tensor
    while start < n:
        for i in tl.static_range(CHUNK // LANES):
            offset = start + i * LANES + tl.arange(0, LANES)
            lanes += tl.load(sums + offset, offset < n, other=0)
        start += CHUNK
    total = _tree_sum(lanes)
    norm = tl.sqrt(total)
    coefficient = tl.load(max_grad_norm) / (norm + 1e-6)
    skip = tl.zeros([1], tl.int64)
    if skipped is not None:
        skip = tl.where(norm - norm == 0, skip, 1)
        tl.store(skipped + one, count + skip)
    tl.store(clip + one, total)
    tl.store(clip + 1 + one, norm)
    tl.store(clip + 2 + one, tl.where(coefficient > 1, 1.0, coefficient))
    tl.store(clip + 3 + one, skip.to(tl.float64))


def load_square_sums(grad: str, working: torch.dtype, scaled: bool, options: dict[str, Any]) -> Launch:
    """The kernel for gradients in a format, loaded as :func:`.step.load` does."""
    scale = torch.float32 if scaled else None
    constants = codecs.CODECS[grad], getattr(tl, str(working).removeprefix("torch."))
    like = torch.int64, torch.int64, torch.int32, scale, torch.float64
    return loaded(square_sums_kernel, like, constants, options)


def load_clip(skips: bool, options: dict[str, Any]) -> Launch:
    """The kernel, loaded as :func:`.step.load` does."""
    f64 = torch.float64
    return loaded(clip_kernel, (f64, 2, f64, f64, torch.int64 if skips else None), (), options)


def launch_square_sums(
    launch: Launch, rows: torch.Tensor, grads: torch.Tensor, chunks: torch.Tensor,
    grad_scale: torch.Tensor | None, sums: torch.Tensor,
) -> None:  # fmt: skip
    """Put the sum of squares of each chunk in its place."""
    if chunks.shape[0]:
        launch(chunks.shape[0], rows, grads, chunks, grad_scale, sums)


def launch_clip(
    launch: Launch, sums: torch.Tensor, max_grad_norm: torch.Tensor, clip: torch.Tensor,
    skipped: torch.Tensor | None,
) -> None:  # fmt: skip
    """Make of all sums what ``fused_optim.reference.clip`` gives."""
    launch(1, sums, sums.shape[0], max_grad_norm, clip, skipped)
