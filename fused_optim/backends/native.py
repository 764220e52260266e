"""C++ on the CPU and CUDA C++ on the GPU: the same rule headers, compiled twice.

The extensions know no torch: addresses, sizes and the stream go over as integers.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..table import Batch
from .base import Backend, Inputs, coefficient_bytes, nothing_to_load, table_on

CPU_CHUNK = 16384
"""Elements that a thread takes at once: 256 KiB of float32 operands, the L2 of a small core."""


@cache
def extension(name: str) -> tuple[ModuleType | None, str]:
    """A compiled module, or None and the reason why there is none."""
    try:
        return importlib.import_module(f"fused_optim.{name}"), ""
    except ModuleNotFoundError:
        kind = name.removeprefix("_")
        return None, (
            f"fused_optim.{name} was not built when the package was installed; "
            f"install with FUSED_OPTIM_BUILD={kind} to build it or see why it fails"
        )
    except ImportError as error:
        return None, f"fused_optim.{name} does not load: {error}"


def _cpu_why_not(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "it steps parameters on the CPU only"
    return extension("_cpu")[1] or None


def _cpu_step(batch: Batch, inputs: Inputs) -> None:
    cpu = extension("_cpu")[0]
    assert cpu is not None
    if inputs.found_inf is not None and inputs.found_inf.item() != 0:
        return
    key, chunks = batch.key, batch.chunks(CPU_CHUNK)
    cpu.step(
        cpu.isas()[0],
        key.rule.name,
        key.param.name,
        key.grad.name,
        key.mu.name,
        key.nu.name,
        batch.rows.data_ptr(),
        chunks.data_ptr(),
        len(chunks),
        CPU_CHUNK,
        batch.counters.data_ptr(),
        len(batch.counters),
        inputs.hyper.data_ptr(),
        1.0 if inputs.grad_scale is None else inputs.grad_scale.item(),
        min(torch.get_num_threads(), 1 + batch.numel // CPU_CHUNK),
    )


def _cuda_why_not(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it steps parameters on NVIDIA GPUs only"
    if torch.version.hip is not None:
        return "this torch is built for ROCm; the triton backend serves AMD GPUs"
    return extension("_cuda")[1] or None


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _cuda_step(batch: Batch, inputs: Inputs) -> None:
    cuda = extension("_cuda")[0]
    assert cuda is not None
    key, device = batch.key, batch.key.device
    table = table_on(batch, cuda.chunk_size())
    coefficients = torch.empty(
        len(batch.counters) * cuda.coefficients_bytes(key.param.name), dtype=torch.uint8, device=device
    )
    cuda.step(
        key.rule.name,
        key.param.name,
        key.grad.name,
        key.mu.name,
        key.nu.name,
        table.rows.data_ptr(),
        table.chunks.data_ptr(),
        len(table.chunks),
        table.counters.data_ptr(),
        len(table.counters),
        inputs.hyper.data_ptr(),
        coefficients.data_ptr(),
        _address(inputs.grad_scale),
        _address(inputs.found_inf),
        torch.cuda.current_stream(device).cuda_stream,
        device.index,
    )


CPU = Backend("cpu", _cpu_why_not, nothing_to_load, _cpu_step, coefficient_bytes)
CUDA = Backend("cuda", _cuda_why_not, nothing_to_load, _cuda_step, coefficient_bytes)
