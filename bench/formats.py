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
        Format("fp32-master", {"master_weights": "fp32"}, _BF16),
        Format("split16", {"master_weights": "split16"}, _BF16),
        Format("split16-bf16", {"master_weights": "split16", "state_format": "bf16"}, _BF16),
        Format("split8-8bit", {"master_weights": "split8", "state_format": "8bit"}, _BF16),
        Format("stochastic", {"stochastic_rounding": True}, ("bfloat16", "float16")),
    )
}
"""``fp32``, states in the working precision, is what every optimizer has without arguments."""
