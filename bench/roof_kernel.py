"""The memory's roof on a GPU: a step's traffic and next to no arithmetic."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

BLOCK = 2048


@triton.jit
def _same_streams(p, g, m, v, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    gradient = tl.load(g + at, live)
    new_m = tl.load(m + at, live) + gradient.to(m.dtype.element_ty)
    new_v = tl.load(v + at, live) + gradient.to(v.dtype.element_ty)
    new_p = tl.load(p + at, live) + gradient
    tl.store(m + at, new_m, live)
    tl.store(v + at, new_v, live)
    tl.store(p + at, new_p, live)


def same_streams(p: Any, g: Any, m: Any, v: Any) -> None:
    """Read ``g``; read and write the others. One-dimensional, of equal length."""
    _same_streams[(triton.cdiv(len(p), BLOCK),)](p, g, m, v, len(p), BLOCK=BLOCK, num_warps=8)
