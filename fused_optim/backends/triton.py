"""Triton on a GPU: a prologue and one kernel for everything that a batch holds.

With ``TRITON_INTERPRET=1`` Triton's interpreter runs the same kernels on the CPU, which
is how they are tested where there is no GPU.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import torch

from ..table import Batch
from .base import Backend, Inputs, coefficient_bytes, nothing_to_load, table_on


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


def _step(batch: Batch, inputs: Inputs) -> None:
    kernels = _kernels()[0]
    assert kernels is not None
    key, device = batch.key, batch.key.device
    formats = (key.param, key.grad, key.mu, key.nu)
    chunk = kernels.chunk_size(*(format.dtype.itemsize for format in formats))
    table = table_on(batch, chunk)
    n = len(table.counters)
    coefficients = torch.empty(n * kernels.COEFFICIENT_COLUMNS.value, dtype=key.param.working, device=device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernels.launch_prologue(
            table.counters,
            n,
            inputs.hyper,
            inputs.grad_scale,
            inputs.found_inf,
            coefficients,
            _options(device, kernels.PROLOGUE_LANES, kernels.PROLOGUE_REGISTERS),
        )
        if len(table.chunks):
            constants = kernels.step_constants(key.rule.name, *(format.name for format in formats), chunk)
            registers = kernels.registers(key.param.name, key.grad.name, key.mu.name)
            options = _options(device, kernels.THREADS, registers)
            kernels.launch_step(table.rows, table.chunks, coefficients, constants, options)


TRITON = Backend("triton", _why_not, nothing_to_load, _step, coefficient_bytes)
