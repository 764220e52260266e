"""What nvcc makes of ``csrc/cuda_kernels.h``, with no GPU: rows like those of ``triton_report``."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from fused_optim.rules import RULES

from .environment import ROOT
from .formats import STATES, TRIPLES
from .kernels import Row, nvidia_counts

CSRC = ROOT / "csrc"
THREADS = 256


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton's wheel carries."""
    triton = importlib.util.find_spec("triton")
    folders = [str(Path(nvcc() or "nvcc").resolve().parent), "/usr/local/cuda/bin"]
    folders += [f"{p}/backends/nvidia/bin" for p in (triton and triton.submodule_search_locations) or ()]
    return shutil.which("cuobjdump", path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))


def why_not() -> str | None:
    """Why there can be no report here; None if there can."""
    found = {"nvcc": nvcc(), "cuobjdump": cuobjdump(), "c++filt": shutil.which("c++filt")}
    missing = [name for name, path in found.items() if path is None]
    return f"needs {', '.join(missing)}" if missing else None


def _output(*command: object) -> str:
    """What a command prints, with names as C++ has them."""
    ran = subprocess.run([str(c) for c in command], check=False, capture_output=True, text=True)
    if ran.returncode != 0:
        raise RuntimeError(f"{command[0]} fails: {(ran.stdout + ran.stderr).strip()[-1000:]}")
    return subprocess.run(["c++filt"], input=ran.stdout, capture_output=True, text=True, check=True).stdout


def _flags() -> list[str]:
    """``NVCC_EXACT`` of setup.py, which cannot be imported."""
    text = re.search(
        r"^NVCC_EXACT\b.*?= (\[.*?\])", (ROOT / "setup.py").read_text(), re.MULTILINE | re.DOTALL
    )
    assert text is not None, "setup.py has no NVCC_EXACT"
    flags: list[str] = ast.literal_eval(text[1])
    return flags


def _instances() -> tuple[str, dict[str, Row]]:
    """C++ that has a kernel for each rule and each of TRIPLES, and by kernel what a row says of it."""
    text = "".join(path.read_text() for path in (*(CSRC / "rules").glob("*.h"), CSRC / "codecs.h"))
    pairs = re.findall(r'struct (\w+)[^{};]*\{\s+static constexpr const char\* name = "(\w+)"', text)
    classes = {name: cls for cls, name in pairs}
    kernels: dict[str, Row] = {}
    for working, param in (("float", "fp32"), ("double", "fp64")):
        head = {"kernel": "prologue", "rule": "", "param": param, "grad": "", "state": ""}
        kernels[f"prologue_kernel<{working}>"] = head
    for rule in RULES:
        for param, grad, state in TRIPLES:
            arguments = ", ".join(classes[name] for name in (rule, param, grad, *STATES[state]))
            head = {"kernel": "step", "rule": rule, "param": param, "grad": grad, "state": state}
            kernels[f"step_kernel<{arguments}>"] = head
    lines = [f"template __global__ void {kernel}(CudaTask);" for kernel in kernels]
    return "\n".join(['#include "cuda_kernels.h"', "namespace fused_optim {", *lines, "}", ""]), kernels


def _by_kernel(text: str, before: str) -> dict[str, str]:
    """Parts of a text by the kernel whose name follows ``before``."""
    parts = re.findall(rf"{before}\S* ?.*?(\w+<[^(]*>)\((.*?)(?={before}|\Z)", text, re.DOTALL)
    return {re.sub(r"\w+::", "", name): part for name, part in parts}


def report(arch: str) -> list[Row]:
    """A row for each kernel, compiled for ``sm_<arch>``."""
    source, heads = _instances()
    with tempfile.TemporaryDirectory() as folder:
        kernels, cubin, ptx = (Path(folder, name) for name in ("kernels.cu", "cubin", "ptx"))
        kernels.write_text(source)
        command = [nvcc(), "-O3", "-std=c++17", *_flags(), f"-I{CSRC}", kernels]
        _output(*command, f"-arch=compute_{arch}", "-ptx", "-o", ptx)
        _output(*command, f"-arch=sm_{arch}", "-cubin", "-o", cubin)
        used = _by_kernel(_output(cuobjdump(), "-res-usage", cubin), "Function ")
        sass = _by_kernel(_output(cuobjdump(), "-sass", cubin), "Function : ")
        text = _by_kernel(_output("cat", ptx), r"\.entry ")
    head = {"compiler": "nvcc", "target": f"cuda:{arch}", "threads": THREADS}
    return [head | heads[k] | nvidia_counts(text[k], sass[k], used[k]) for k in heads]
