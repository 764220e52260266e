"""``python -m fused_optim``: what is installed, which backends are ready, and whether each
gives eager's bits.

The exit code is 1 if a backend that says it is ready fails its check.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib import metadata

import torch

from . import AdaBelief, AdamaxW, AdamW, __version__
from .backends import BACKENDS, extension


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def compiler(command: str, *arguments: str) -> str:
    """The last line of what a compiler says of its version, or that there is none."""
    if shutil.which(command) is None:
        return "not on the PATH"
    said = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
    lines = said.stdout.strip().splitlines()
    return lines[-1 if command == "nvcc" else 0] if lines else f"{command} fails: {said.stderr.strip()}"


def device_for(backend: str) -> tuple[torch.device, str | None]:
    """Where a backend would run here, and why it cannot."""
    cpu = torch.device("cpu")
    gpu = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    reason = None
    for device in (gpu, cpu) if backend != "cpu" else (cpu,):
        if device is not None:
            why_not = BACKENDS[backend].why_not(device)
            if why_not is None:
                return device, None
            reason = reason or why_not
    if gpu is None and backend in ("triton", "cuda"):
        module = BACKENDS[backend].why_not(torch.device("cuda"))
        reason = module or "torch sees no GPU"
    return gpu or cpu, reason


def self_check(backend: str, device: torch.device) -> str | None:
    """Make one step of each optimizer and compare it with eager; None if all bits are equal."""
    for optimizer_class in (AdaBelief, AdamaxW, AdamW):
        results = []
        for name, where in ((backend, device), ("eager", torch.device("cpu"))):
            rng = torch.Generator().manual_seed(0)
            p = torch.randn(4099, generator=rng).to(where).requires_grad_()
            p.grad = torch.randn(4099, generator=rng).to(where)
            optimizer = optimizer_class([p], weight_decay=0.1, backend=name)
            optimizer.step()
            results.append([p.detach().cpu(), *(v.cpu() for v in optimizer.state[p].values())])
        if not all(map(torch.equal, *results)):
            return f"{optimizer_class.__name__} differs from eager"
    return None


def main() -> int:
    print(f"fused_optim {__version__}")
    print(f"  python     {platform.python_version()} on {platform.platform()}")
    print(f"  torch      {torch.__version__}")
    print(f"  triton     {version_of('triton')}")
    print(f"  c++        {compiler('c++', '--version')}")
    print(f"  nvcc       {compiler('nvcc', '--version')}")
    cpu, _ = extension("_cpu")
    if cpu is not None:
        threads = torch.get_num_threads() if cpu.openmp else "1 (built without OpenMP)"
        print(f"  _cpu       instruction set {cpu.isas()[0]}, threads {threads}, built with {cpu.compiler}")
    cuda, _ = extension("_cuda")
    if cuda is not None:
        print(f"  _cuda      sm_{cuda.archs.replace(',', ', sm_')} and PTX, built with {cuda.compiler}")
    if torch.cuda.is_available():
        print(f"  gpu        {torch.cuda.get_device_name()}")

    failed = False
    print("backends")
    for name in BACKENDS:
        device, reason = device_for(name)
        if reason is not None:
            print(f"  {name:10} not ready: {reason}")
            continue
        try:
            problem = self_check(name, device)
        except Exception as error:  # noqa: BLE001 (whatever it is, the backend fails its check)
            problem = f"{type(error).__name__}: {error}"
        failed |= problem is not None
        verdict = f"ready on {device}, same bits as eager" if problem is None else f"FAILS: {problem}"
        print(f"  {name:10} {verdict}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
