"""Triton on a GPU: a prologue and one kernel for everything that a batch holds. With ``TRITON_INTERPRET=1``
Triton's interpreter runs them on the CPU, which is how they are tested where there is no GPU."""

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..table import Batch, BatchKey
from .base import Backend, Inputs, table_on, tables_on


@cache
def _kernels(name: str = "step") -> Any:
    return importlib.import_module(f"fused_optim.kernels.{name}")


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
def _target(device: torch.device) -> Any:
    """What Triton compiles for there (``triton.backends.compiler.GPUTarget``); None in its interpreter."""
    triton = _kernels().triton
    if triton.knobs.runtime.interpret:
        return None
    with torch.accelerator.device_index(device.index):  # None for the CPU, which changes nothing
        return triton.runtime.driver.active.get_current_target()


@cache
def _options(device: torch.device, threads: int, registers: int) -> dict[str, Any]:
    """The compiler options of a kernel; of 0 threads one warp."""
    if (target := _target(device)) is None:
        return {}
    warp = target.warp_size
    options: dict[str, Any] = _kernels().launch_options(target.backend, warp, threads or warp, registers)
    return options


@cache
def _load(key: BatchKey, scaled: bool, skippable: bool, clips: bool) -> tuple[Any, ...]:
    """The step kernel's constants, and the prologue and the step kernel, loaded onto the device."""
    kernels, target = _kernels(), _target(key.device)
    constants = kernels.step_constants(*key.names, target)
    prologue_options = _options(key.device, kernels.PROLOGUE_LANES, kernels.PROLOGUE_REGISTERS)
    step_options = _options(key.device, kernels.THREADS, kernels.registers(*key.names[1:4], target))
    given = key.param.working, scaled, skippable, clips, constants, prologue_options, step_options
    with torch.accelerator.device_index(key.device.index):
        return constants, *kernels.load(*given)


def _step(batch: Batch, inputs: Inputs) -> None:
    kernels, key, (_, scale, found_inf, clip) = _kernels(), batch.key, inputs
    given = scale is not None, found_inf is not None, clip is not None
    if batch.prepared[:1] != (given,):  # not looked up each step: a key's hash is of all that its formats say
        batch.prepared = given, *_load(key, *given)
    _, constants, prologue, step = batch.prepared
    table = table_on(batch, constants["CHUNK"], kernels.COEFFICIENT_COLUMNS.value, key.param.working)
    with torch.accelerator.device_index(key.device.index):
        kernels.launch_prologue(prologue, table[3], *inputs, table[4])
        kernels.launch_step(step, *table)


# The norm's kernels are loaded when they are launched: before anything is written.


@cache
def _load_square_sums(key: BatchKey, scaled: bool) -> Any:
    norm = _kernels("norm")
    options = _options(key.device, 0, norm.REGISTERS)
    return norm.load_square_sums(key.grad.name, key.param.working, scaled, options)


def _square_sums(batch: Batch, grad_scale: Tensor | None, sums: Tensor) -> None:
    norm, key = _kernels("norm"), batch.key
    table = tables_on(batch, "rows", "grads", "norm_chunks")
    with torch.accelerator.device_index(key.device.index):
        norm.launch_square_sums(_load_square_sums(key, grad_scale is not None), *table, grad_scale, sums)


@cache
def _load_clip(device: torch.device, skips: bool) -> Any:
    norm = _kernels("norm")
    return norm.load_clip(skips, _options(device, norm.CLIP_THREADS, norm.REGISTERS))


def _clip(sums: Tensor, max_grad_norm: Tensor, skipped: Tensor | None) -> Tensor:
    clip = torch.empty(4, dtype=torch.float64, device=sums.device)
    with torch.accelerator.device_index(sums.device.index):
        launch = _load_clip(sums.device, skipped is not None)
        _kernels("norm").launch_clip(launch, sums, max_grad_norm, clip, skipped)
    return clip


TRITON = Backend("triton", _why_not, _step, _square_sums, _clip, _load)
