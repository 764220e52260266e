"""C++ on the CPU and CUDA C++ on the GPU: the same rule headers, compiled twice. The extensions know no
torch: addresses, sizes and the stream go over as integers.

``FUSED_OPTIM_ISA``, read at import, names the instruction set of the CPU backend, in place of the best."""

import importlib
import os
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..table import Batch, BatchKey
from .base import Backend, Inputs, table_on, tables_on
from .eager import EAGER

CPU_CHUNK = 16384  # elements that a thread takes at once: 256 KiB of float32 operands, a small core's L2
_ISA = os.environ.get("FUSED_OPTIM_ISA")
# Not empty in a forked child. There libgomp would wait for the threads of its pool, which only the parent
# has: ours and torch's are one pool, and nothing says whether it was there.
_forked: list[bool] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=partial(_forked.append, True))


@cache
def extension(name: str) -> tuple[Any, str | None]:
    """A compiled module, or None and the reason why there is none."""
    try:
        return importlib.import_module(f"fused_optim.{name}"), None
    except ModuleNotFoundError:
        return None, (
            f"fused_optim.{name} was not built when the package was installed; "
            f"install with FUSED_OPTIM_BUILD={name[1:]} to build it or see why it fails"
        )
    except ImportError as error:
        return None, f"fused_optim.{name} does not load: {error}"


def _fields(*tables: Tensor) -> tuple[int, ...]:
    """What structs in ``csrc/table.h`` have of tables: the address of each, and the length of the last."""
    return *(t.data_ptr() for t in tables), tables[-1].shape[0]


def _cpu_why_not(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "it steps parameters on the CPU only"
    cpu, reason = extension("_cpu")
    if cpu is not None:
        instruction_set(cpu)
    return reason


@cache
def instruction_set(cpu: Any) -> str:
    """The one that the CPU backend uses; a ValueError if ``FUSED_OPTIM_ISA`` names none of this machine."""
    isas: list[str] = cpu.isas()
    if _ISA is not None and _ISA not in isas:
        raise ValueError(f"FUSED_OPTIM_ISA must be one of {isas}, which this machine has, got {_ISA!r}")
    return _ISA or isas[0]


def _cpu_step(batch: Batch, inputs: Inputs) -> None:
    hyper, grad_scale, found_inf, clip = inputs
    if (found_inf is not None or clip is not None) and any(skip.item() != 0 for skip in inputs.skips):
        return
    step, most_threads = batch.prepared or _prepared(batch)
    step(
        hyper.data_ptr(),
        1.0 if grad_scale is None else grad_scale.item(),
        1.0 if clip is None else clip[2].item(),
        _threads(most_threads),
    )


def _prepared(batch: Batch) -> tuple[Any, ...]:
    """What stays the same while a batch lives: asked for once, since between two steps of a training all of
    it falls out of the caches."""
    cpu = extension("_cpu")[0]
    table = *_fields(batch.rows, batch.grads, batch.chunks(CPU_CHUNK)), *_fields(batch.counters)
    prepared = cpu.prepare(instruction_set(cpu), batch.names, CPU_CHUNK, table)
    batch.prepared = partial(cpu.step, prepared), batch.numel // CPU_CHUNK
    return batch.prepared


def _threads(most: int) -> int:
    return 1 if _forked or most <= 1 else min(torch.get_num_threads(), most)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _cpu_square_sums(batch: Batch, grad_scale: Tensor | None, sums: Tensor) -> None:
    cpu = extension("_cpu")[0]
    tables = _fields(batch.rows, batch.grads, batch.norm_chunks)
    task = *tables, _address(grad_scale), sums.data_ptr()
    cpu.square_sums(instruction_set(cpu), batch.key.grad.name, task, _threads(batch.numel // CPU_CHUNK))


def _current(device: torch.device) -> Any:
    return torch.accelerator.device_index(device.index)


def _cuda_why_not(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it steps parameters on NVIDIA GPUs only"
    if torch.version.hip is not None:
        return "this torch is built for ROCm; the triton backend serves AMD GPUs"
    cuda, reason = extension("_cuda")
    if cuda is None:
        return reason
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    try:  # the driver says whether it knows this CUDA, and the GPU this machine code
        with _current(device):
            cuda.check()
    except RuntimeError as error:
        return f"{error}; FUSED_OPTIM_CUDA_ARCHS names others when the package is built"
    return None


def _cuda_load(key: BatchKey, scaled: bool, skippable: bool, clips: bool) -> None:
    cuda = extension("_cuda")[0]
    with _current(key.device):
        cuda.load(key.names)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _cuda_step(batch: Batch, inputs: Inputs) -> None:
    cuda, device = extension("_cuda")[0], batch.key.device
    *tables, counters, coefficients = table_on(batch, cuda.chunk_size, cuda.coefficients_bytes, torch.uint8)
    hyper, *optional = map(_address, inputs)
    task = *_fields(*tables), *_fields(counters), hyper, coefficients.data_ptr(), *optional
    with _current(device):
        cuda.step(batch.names, task, _stream(device))


def _cuda_square_sums(batch: Batch, grad_scale: Tensor | None, sums: Tensor) -> None:
    cuda, device = extension("_cuda")[0], batch.key.device
    tables = _fields(*tables_on(batch, "rows", "grads", "norm_chunks"))
    task = *tables, _address(grad_scale), sums.data_ptr()
    with _current(device):
        cuda.square_sums(batch.key.grad.name, task, _stream(device))


def _cuda_clip(sums: Tensor, max_grad_norm: Tensor, skipped: Tensor | None) -> Tensor:
    cuda, device = extension("_cuda")[0], sums.device
    clip = torch.empty(4, dtype=torch.float64, device=device)
    task = (sums.data_ptr(), len(sums), *map(_address, (max_grad_norm, clip, skipped)))
    with _current(device):
        cuda.clip(task, _stream(device))
    return clip


CPU = Backend("cpu", _cpu_why_not, _cpu_step, _cpu_square_sums, EAGER.clip)
CUDA = Backend("cuda", _cuda_why_not, _cuda_step, _cuda_square_sums, _cuda_clip, _cuda_load)
