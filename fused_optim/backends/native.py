"""C++ on the CPU and CUDA C++ on the GPU: the same rule headers, compiled twice. The extensions know no
torch: addresses, sizes and the stream go over as integers."""

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..table import Batch
from .base import Backend, Inputs, table_on

CPU_CHUNK = 16384  # elements that a thread takes at once: 256 KiB of float32 operands, a small core's L2


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


def _cpu_why_not(device: torch.device) -> str | None:
    return extension("_cpu")[1] if device.type == "cpu" else "it steps parameters on the CPU only"


def _cpu_step(batch: Batch, inputs: Inputs) -> None:
    cpu = extension("_cpu")[0]
    assert cpu is not None
    if inputs.found_inf is not None and inputs.found_inf.item() != 0:
        return
    key, chunks = batch.key, batch.chunks(CPU_CHUNK)
    cpu.step(
        isa=cpu.isas()[0],
        rule=key.rule.name,
        param=key.param.name,
        grad=key.grad.name,
        mu=key.mu.name,
        nu=key.nu.name,
        rows=batch.rows.data_ptr(),
        chunks=chunks.data_ptr(),
        n_chunks=len(chunks),
        chunk_size=CPU_CHUNK,
        counters=batch.counters.data_ptr(),
        n_counters=len(batch.counters),
        hyper=inputs.hyper.data_ptr(),
        grad_scale=1.0 if inputs.grad_scale is None else inputs.grad_scale.item(),
        threads=min(torch.get_num_threads(), 1 + batch.numel // CPU_CHUNK),
    )


def _cuda_why_not(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it steps parameters on NVIDIA GPUs only"
    if torch.version.hip is not None:
        return "this torch is built for ROCm; the triton backend serves AMD GPUs"
    return extension("_cuda")[1]


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _cuda_step(batch: Batch, inputs: Inputs) -> None:
    cuda = extension("_cuda")[0]
    assert cuda is not None
    key, device = batch.key, batch.key.device
    rows, chunks, counters = table_on(batch, cuda.chunk_size())
    size = len(counters) * cuda.coefficients_bytes(key.param.name)
    coefficients = torch.empty(size, dtype=torch.uint8, device=device)
    cuda.step(
        rule=key.rule.name,
        param=key.param.name,
        grad=key.grad.name,
        mu=key.mu.name,
        nu=key.nu.name,
        rows=rows.data_ptr(),
        chunks=chunks.data_ptr(),
        n_chunks=len(chunks),
        counters=counters.data_ptr(),
        n_counters=len(counters),
        hyper=inputs.hyper.data_ptr(),
        coefficients=coefficients.data_ptr(),
        grad_scale=_address(inputs.grad_scale),
        found_inf=_address(inputs.found_inf),
        stream=torch.cuda.current_stream(device).cuda_stream,
        device=device.index,
    )


CPU = Backend("cpu", _cpu_why_not, _cpu_step)
CUDA = Backend("cuda", _cuda_why_not, _cuda_step)
