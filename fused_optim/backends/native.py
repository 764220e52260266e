"""C++ on the CPU and CUDA C++ on the GPU: the same rule headers, compiled twice."""

from __future__ import annotations

import torch

from ..table import Batch
from .base import Backend, Inputs


def _cpu_why_not(device: torch.device) -> str | None:
    return "not built"


def _cuda_why_not(device: torch.device) -> str | None:
    return "not built"


def _step(batch: Batch, inputs: Inputs) -> None:
    raise NotImplementedError


CPU = Backend("cpu", _cpu_why_not, _step)
CUDA = Backend("cuda", _cuda_why_not, _step)
