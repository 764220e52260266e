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
from .kernels import Row, head, nvidia_counts

CSRC = ROOT / "csrc"
THREADS = 256


def _tool(name: str) -> str | None:
    """The toolkit's, or the one that Triton's wheel carries."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    triton = importlib.util.find_spec("triton")
    folders = [f"{home}/bin"] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    folders += [f"{p}/backends/nvidia/bin" for p in (triton and triton.submodule_search_locations) or ()]
    return shutil.which(name, path=os.pathsep.join(folders))


def why_not() -> str | None:
    """Why there can be no report here; None if there can."""
    missing = [name for name in ("nvcc", "cuobjdump") if _tool(name) is None]
    missing += [] if shutil.which("c++filt") else ["c++filt"]
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
    kernels = {
        f"prologue_kernel<{c}>": head("prologue", p) for c, p in (("float", "fp32"), ("double", "fp64"))
    }
    for rule in RULES:
        for param, grad, state in TRIPLES:
            arguments = ", ".join(classes[name] for name in (rule, param, grad, *STATES[state]))
            kernels[f"step_kernel<{arguments}>"] = head("step", param, rule, grad, state)
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
        command = [_tool("nvcc"), "-O3", "-std=c++17", *_flags(), f"-I{CSRC}", kernels]
        _output(*command, f"-arch=compute_{arch}", "-ptx", "-o", ptx)
        _output(*command, f"-arch=sm_{arch}", "-cubin", "-o", cubin)
        used = _by_kernel(_output(_tool("cuobjdump"), "-res-usage", cubin), "Function ")
        sass = _by_kernel(_output(_tool("cuobjdump"), "-sass", cubin), "Function : ")
        text = _by_kernel(_output("cat", ptx), r"\.entry ")
    same = {"compiler": "nvcc", "target": f"cuda:{arch}", "threads": THREADS}
    return [same | heads[k] | nvidia_counts(text[k], sass[k], used[k]) for k in heads]
