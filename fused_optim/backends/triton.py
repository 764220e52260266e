"""Triton on a GPU: a prologue and one kernel for everything that a batch holds. With ``TRITON_INTERPRET=1``
Triton's interpreter runs them on the CPU, which is how they are tested where there is no GPU."""

import importlib
from functools import cache, partial
from typing import Any

import torch

from ..table import Batch, BatchKey
from .base import Backend, Inputs, table_on


@cache
def _kernels() -> Any:
    return importlib.import_module("fused_optim.kernels.step")


@cache
def _why_not(device: torch.device) -> str | None:
    if device.type not in ("cuda", "cpu"):
        return "it steps parameters on NVIDIA and AMD GPUs only"
    try:
        interpreted = _kernels().triton.knobs.runtime.interpret
    except ImportError as error:
        return f"triton does not load: {error}"
    if device.type == "cpu" and not interpreted:
        return "it steps parameters on a GPU only (or on the CPU under TRITON_INTERPRET=1)"
    return None


@cache
def _arguments(key: BatchKey) -> tuple[dict[str, Any], ...]:
    """The step kernel's constants, and the compiler options of the prologue and of the step kernel."""
    kernels = _kernels()
    constants = kernels.step_constants(*key.names)
    if kernels.triton.knobs.runtime.interpret:
        return constants, {}, {}
    rocm = torch.version.hip is not None
    warp_size = torch.cuda.get_device_properties(key.device).warp_size if rocm else 32
    options = partial(kernels.launch_options, "hip" if rocm else "cuda", warp_size)
    step_options = options(kernels.THREADS, kernels.registers(*key.names[1:4]))
    return constants, options(kernels.PROLOGUE_LANES, kernels.PROLOGUE_REGISTERS), step_options


@cache
def _load(key: BatchKey, scaled: bool, skippable: bool) -> Any:
    """The prologue and the step kernel, loaded onto the device."""
    with torch.accelerator.device_index(key.device.index):  # None for the CPU, which changes nothing
        return _kernels().load(key.param.working, scaled, skippable, *_arguments(key))


def _step(batch: Batch, inputs: Inputs) -> None:
    kernels, key, device = _kernels(), batch.key, batch.key.device
    constants = _arguments(key)[0]
    prologue, step = _load(key, inputs.grad_scale is not None, inputs.found_inf is not None)
    rows, chunks, counters = table_on(batch, constants["CHUNK"])
    size = len(counters) * kernels.COEFFICIENT_COLUMNS.value
    coefficients = torch.empty(size, dtype=key.param.working, device=device)
    with torch.accelerator.device_index(device.index):
        kernels.launch_prologue(prologue, counters, *inputs, coefficients)
        kernels.launch_step(step, rows, chunks, counters, coefficients, constants)


TRITON = Backend("triton", _why_not, _step, _load)
