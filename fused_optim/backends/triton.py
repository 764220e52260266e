"""Triton on a GPU: a prologue and one kernel for everything that a batch holds.

With ``TRITON_INTERPRET=1`` Triton's interpreter runs the same kernels on the CPU, which
is how they are tested where there is no GPU.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import torch

from ..table import Batch, BatchKey
from .base import Backend, Inputs, table_on


@cache
def _kernels() -> tuple[ModuleType | None, str]:
    """The kernels, or None and the reason why they cannot be had."""
    try:
        return importlib.import_module("fused_optim.kernels.step"), ""
    except ImportError as error:
        return None, f"triton does not load: {error}"


@cache
def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def _why_not(device: torch.device) -> str | None:
    if device.type not in ("cuda", "cpu"):
        return "it steps parameters on NVIDIA and AMD GPUs only"
    kernels, reason = _kernels()
    if kernels is None:
        return reason
    if device.type == "cpu" and not _interpreted():
        return "it steps parameters on a GPU only (or on the CPU under TRITON_INTERPRET=1)"
    return None


@cache
def _options(device: torch.device, threads: int, registers: int) -> dict[str, Any]:
    kernels = _kernels()[0]
    assert kernels is not None
    if _interpreted():
        return {}
    rocm = torch.version.hip is not None
    warp_size = torch.cuda.get_device_properties(device).warp_size if rocm else 32
    return dict(kernels.launch_options("hip" if rocm else "cuda", warp_size, threads, registers))


def _constants(key: BatchKey) -> dict[str, Any]:
    """The step kernel's."""
    kernels = _kernels()[0]
    assert kernels is not None
    formats = (key.param, key.grad, key.mu, key.nu)
    return dict(kernels.step_constants(key.rule.name, *(f.name for f in formats)))


def _step_options(key: BatchKey) -> dict[str, Any]:
    kernels = _kernels()[0]
    assert kernels is not None
    registers = kernels.registers(key.param.name, key.grad.name, key.mu.name)
    return _options(key.device, kernels.THREADS, registers)


@cache
def _load(key: BatchKey, scaled: bool, skippable: bool) -> None:
    kernels = _kernels()[0]
    assert kernels is not None
    prologue_options = _options(key.device, kernels.PROLOGUE_LANES, kernels.PROLOGUE_REGISTERS)
    with _on(key.device):
        kernels.load(
            key.param.working, scaled, skippable, _constants(key), prologue_options, _step_options(key)
        )


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _step(batch: Batch, inputs: Inputs) -> None:
    kernels = _kernels()[0]
    assert kernels is not None
    key, device = batch.key, batch.key.device
    constants = _constants(key)
    table = table_on(batch, constants["CHUNK"])
    n = len(table.counters)
    coefficients = torch.empty(n * kernels.COEFFICIENT_COLUMNS.value, dtype=key.param.working, device=device)
    with _on(device):
        prologue_options = _options(device, kernels.PROLOGUE_LANES, kernels.PROLOGUE_REGISTERS)
        kernels.launch_prologue(table.counters, *inputs, coefficients, prologue_options)
        kernels.launch_step(*table, coefficients, constants, _step_options(key))


TRITON = Backend("triton", _why_not, _load, _step)
