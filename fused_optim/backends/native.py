"""C++ on the CPU and CUDA C++ on the GPU: the same rule headers, compiled twice. The extensions know no
torch: addresses, sizes and the stream go over as integers.

``FUSED_OPTIM_ISA``, read at import, names the instruction set that the CPU backend uses, in place of the best."""

import importlib
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..table import Batch
from .base import Backend, Inputs, table_on

CPU_CHUNK = 16384  # elements that a thread takes at once: 256 KiB of float32 operands, a small core's L2
_ISA = os.environ.get("FUSED_OPTIM_ISA")
_most_threads = 2**31 - 1


def _one_thread_from_now_on() -> None:
    """In a forked child libgomp would wait for the threads of its pool, which only the parent has."""
    global _most_threads
    _most_threads = 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_one_thread_from_now_on)


@cache
def extension(name: str) -> tuple[ModuleType | None, str | None]:
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


def _table(rows: Tensor, chunks: Tensor, counters: Tensor, hyper: Tensor) -> tuple[int, ...]:
    """The fields of Table in ``csrc/table.h``."""
    counted = rows.data_ptr(), chunks.data_ptr(), len(chunks), counters.data_ptr(), len(counters)
    return *counted, hyper.data_ptr()


def _cpu_why_not(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "it steps parameters on the CPU only"
    cpu, reason = extension("_cpu")
    if cpu is not None:
        instruction_set(cpu)
    return reason


def instruction_set(cpu: ModuleType) -> str:
    """The one that the CPU backend uses; a ValueError if ``FUSED_OPTIM_ISA`` names none of this machine."""
    isas: list[str] = cpu.isas()
    if _ISA is not None and _ISA not in isas:
        raise ValueError(f"FUSED_OPTIM_ISA must be one of {isas}, which this machine has, got {_ISA!r}")
    return _ISA or isas[0]


def _cpu_step(batch: Batch, inputs: Inputs) -> None:
    cpu = extension("_cpu")[0]
    assert cpu is not None
    if inputs.found_inf is not None and inputs.found_inf.item() != 0:
        return
    cpu.step(
        instruction_set(cpu),
        batch.key.names,
        _table(batch.rows, batch.chunks(CPU_CHUNK), batch.counters, inputs.hyper),
        CPU_CHUNK,
        1.0 if inputs.grad_scale is None else inputs.grad_scale.item(),
        min(torch.get_num_threads(), _most_threads, max(1, batch.numel // CPU_CHUNK)),
    )


def _cuda_why_not(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it steps parameters on NVIDIA GPUs only"
    if torch.version.hip is not None:
        return "this torch is built for ROCm; the triton backend serves AMD GPUs"
    return extension("_cuda")[1]


def _cuda_step(batch: Batch, inputs: Inputs) -> None:
    cuda = extension("_cuda")[0]
    assert cuda is not None
    device = batch.key.device
    size = len(batch.counters) * cuda.coefficients_bytes
    coefficients = torch.empty(size, dtype=torch.uint8, device=device)
    amp = (0 if t is None else t.data_ptr() for t in inputs[1:])
    task = (*_table(*table_on(batch, cuda.chunk_size), inputs.hyper), coefficients.data_ptr(), *amp)
    cuda.step(batch.key.names, task, torch.cuda.current_stream(device).cuda_stream, device.index)


CPU = Backend("cpu", _cpu_why_not, _cpu_step)
CUDA = Backend("cuda", _cuda_why_not, _cuda_step)
