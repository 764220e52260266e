"""fused_optim's memory formats, as constructor arguments: one line each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Format:
    """How parameters and states lie in memory.

    Attributes:
        name: what the command line and the tables call it.
        arguments: what the optimizers' constructors are given for it.
        dtypes: parameter dtypes that it is for.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")

    def why_not(self, optimizer_class: Callable[..., Any], dtype: str) -> str | None:
        """Why an optimizer cannot have it; None if it can."""
        unknown = set(self.arguments) - set(inspect.signature(optimizer_class).parameters)
        if unknown:
            return f"this fused_optim takes no {', '.join(sorted(unknown))}"
        if dtype not in self.dtypes:
            return f"it is for {', '.join(self.dtypes)} parameters"
        return None


_BF16 = ("bfloat16",)
FORMATS = {
    f.name: f
    for f in (
        Format("fp32"),
        Format("bf16", {"state_format": "bf16"}),
        Format("8bit", {"state_format": "8bit"}),
        Format("split16", {"master_weights": "split16"}, _BF16),
        Format("split16-bf16", {"master_weights": "split16", "state_format": "bf16"}, _BF16),
        Format("split8-8bit", {"master_weights": "split8", "state_format": "8bit"}, _BF16),
        Format("stochastic", {"stochastic_rounding": True}, _BF16),
    )
}
"""``fp32``, states in the working precision, is what every optimizer has without arguments."""

TRIPLES = (
    ("fp32", "fp32", "fp32"),
    ("bf16", "bf16", "fp32"),
    ("fp16", "fp16", "fp32"),
    ("bf16", "fp32", "fp32"),
    ("fp64", "fp64", "fp64"),
    ("split16", "bf16", "fp32"),
    ("split8", "bf16", "fp32"),
    ("bf16_stochastic", "bf16", "fp32"),
    ("fp32", "fp32", "bf16"),
    ("fp32", "fp32", "8bit"),
    ("bf16", "bf16", "bf16"),
    ("bf16", "bf16", "8bit"),
    ("split16", "bf16", "bf16"),
    ("split8", "bf16", "8bit"),
    ("bf16_stochastic", "bf16", "8bit"),
)
"""What the compiled kernels' reports look at: codecs of (parameter, gradient), and STATES."""
STATES = {
    "fp32": ("fp32", "fp32"),
    "fp64": ("fp64", "fp64"),
    "bf16": ("bf16_dither", "bf16_dither"),
    "8bit": ("e4m3", "e5m3"),
}
"""The moments' codecs."""
PART_BYTES = {
    "fp32": (4,),
    "fp64": (8,),
    "bf16": (2,),
    "fp16": (2,),
    "split16": (2, 2),
    "split8": (2, 1),
    "bf16_stochastic": (2,),
    "bf16_dither": (2,),
    "e4m3": (1,),
    "e5m3": (1,),
}
"""Bytes of an element by parts, by its codec; without the bases of the 8-bit ones."""
