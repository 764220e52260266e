"""How values lie in memory. A rule sees the working precision only; a format says how
to get there (``decode``) and back (``encode``), one rounding each.

A new format is a line here, a load/store pair in ``kernels/codecs.py`` and one in
``csrc/codecs.h`` under the same name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """Values stored as they are in one floating dtype.

    Attributes:
        name: the codec's name in every language.
        dtype: what lies in memory.
        working: the precision that the arithmetic is done in.
    """

    name: str
    dtype: torch.dtype
    working: torch.dtype

    def decode(self, stored: Tensor) -> Tensor:
        return stored.to(self.working)

    def encode(self, values: Tensor) -> Tensor:
        return values.to(self.dtype)


FORMATS = {
    f.dtype: f
    for f in (
        Format("fp32", torch.float32, torch.float32),
        Format("fp64", torch.float64, torch.float64),
        Format("bf16", torch.bfloat16, torch.float32),
        Format("fp16", torch.float16, torch.float32),
    )
}

REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}
"""A complex number is two independent real ones."""


def parameter_format(dtype: torch.dtype) -> Format | None:
    """The format of a parameter of this dtype, None if there is none."""
    return FORMATS.get(REAL.get(dtype, dtype))


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the moments of a parameter of this dtype: the working precision,
    complex for complex parameters."""
    return dtype if dtype in REAL else FORMATS[dtype].working
