"""``python -m fused_optim``: what is installed, which backends are ready, and whether each gives eager's
bits. The exit code is 1 if a backend that says it is ready fails its check."""

import platform
import shutil
import subprocess
import sys
from importlib import metadata

import torch

from . import AdaBelief, AdamaxW, AdamW, __version__
from .backends import BACKENDS, extension
from .backends.native import instruction_set


def compiler(command: str, line: int) -> str:
    """A line of what a compiler says of its version, or that there is none."""
    if shutil.which(command) is None:
        return "not on the PATH"
    said = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    lines = said.stdout.strip().splitlines()
    return lines[line] if lines else f"{command} fails: {said.stderr.strip()}"


def verdict(name: str) -> str:
    """Whether a backend is ready here, and gives eager's bits in one step of each optimizer."""
    reasons = {where: BACKENDS[name].why_not(torch.device(where)) for where in ("cuda", "cpu")}
    if not torch.cuda.is_available():
        reasons["cuda"] = reasons["cuda"] or "torch sees no GPU"
    device = next((where for where, reason in reasons.items() if reason is None), None)
    if device is None:
        return f"not ready: {reasons['cpu' if name == 'cpu' else 'cuda']}"
    for optimizer_class in (AdaBelief, AdamaxW, AdamW):
        results = []
        for backend, where in ((name, device), ("eager", "cpu")):
            rng = torch.Generator().manual_seed(0)
            p = torch.randn(4099, generator=rng).to(where).requires_grad_()
            p.grad = torch.randn(4099, generator=rng).to(where)
            optimizer = optimizer_class([p], weight_decay=0.1, backend=backend)
            try:
                optimizer.step()
            except Exception as error:  # noqa: BLE001 (whatever it is, the backend fails its check)
                return f"FAILS: {type(error).__name__}: {error}"
            results.append([p.detach().cpu(), *(v.cpu() for v in optimizer.state[p].values())])
        if not all(map(torch.equal, *results)):
            return f"FAILS: {optimizer_class.__name__} differs from eager"
    return f"ready on {device}, same bits as eager"


def main() -> int:
    print(f"fused_optim {__version__}")
    print(f"  python     {platform.python_version()} on {platform.platform()}")
    print(f"  torch      {torch.__version__}")
    triton = next((found.version for found in metadata.distributions(name="triton")), "not installed")
    print(f"  triton     {triton}")
    print(f"  c++        {compiler('c++', 0)}")
    print(f"  nvcc       {compiler('nvcc', -1)}")
    if cpu := extension("_cpu")[0]:
        threads = torch.get_num_threads() if cpu.openmp else "1 (built without OpenMP)"
        built = f"built with {cpu.compiler}"
        print(f"  _cpu       instruction set {instruction_set(cpu)}, threads {threads}, {built}")
    if cuda := extension("_cuda")[0]:
        print(f"  _cuda      sm_{cuda.archs.replace(',', ', sm_')} and PTX, built with {cuda.compiler}")
    if torch.cuda.is_available():
        print(f"  gpu        {torch.cuda.get_device_name()}")
    print("backends")
    failed = False
    for name in BACKENDS:
        said = verdict(name)
        failed |= said.startswith("FAILS")
        print(f"  {name:10} {said}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
