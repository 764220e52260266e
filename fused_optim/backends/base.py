"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from dataclasses import dataclass

from ..table import Batch


class Inputs(NamedTuple):
    """What a step is given beside the table, all on the batch's device."""

    hyper: Tensor
    """float64 ``[n, len(Hyperparameters)]``."""
    grad_scale: Tensor | None
    """One float32: gradients are divided by it."""
    found_inf: Tensor | None
    """One float32: if it is not 0, nothing changes."""


@dataclass(frozen=True)
class Backend:
    """One way to make a step.

    Attributes:
        name: what the user calls it.
        why_not: why it cannot step parameters on a device; None where it can.
        step: makes one step of a batch in place, step numbers included.
    """

    name: str
    why_not: Callable[[torch.device], str | None]
    step: Callable[[Batch, Inputs], None]
