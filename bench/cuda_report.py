"""What nvcc makes of ``csrc/cuda_kernels.h``, with no GPU: rows like those of ``triton_report``."""

import ast
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from fused_optim.rules import RULES

from .environment import ROOT
from .formats import STATES, TRIPLES
from .kernels import Row, cuobjdump, head, nvidia_counts

CSRC = ROOT / "csrc"
WHY_NOT = None if shutil.which("nvcc") and shutil.which("c++filt") else "needs nvcc and c++filt on the PATH"


def _output(*command: object) -> str:
    """What a command prints, with names as C++ has them."""
    text = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def instances() -> dict[str, Row]:
    """The kernels for each rule and each of TRIPLES, and what a row says of each."""
    text = "".join(path.read_text() for path in (CSRC / "rules.h", CSRC / "codecs.h"))
    pairs = re.findall(r'struct (\w+)[^{};]*\{[^{}]*?static constexpr const char\* name = "(\w+)"', text)
    classes = {name: cls for cls, name in pairs}
    working = {"float": "fp32", "double": "fp64"}
    kernels = {f"prologue_kernel<{c}>": head("prologue", name) for c, name in working.items()}
    for rule in RULES:
        for param, grad, state in TRIPLES:
            arguments = ", ".join(classes[name] for name in (rule, param, grad, *STATES[state]))
            kernels[f"step_kernel<{arguments}>"] = head("step", param, rule, grad, state)
    return kernels


def _by_kernel(text: str, before: str) -> dict[str, str]:
    """Parts of a text by the kernel whose name follows ``before``."""
    parts = re.findall(rf"{before}\S* ?.*?(\w+<[^(]*>)\((.*?)(?={before}|\Z)", text, re.DOTALL)
    return {re.sub(r"\w+::", "", name): part for name, part in parts}


def report(arch: str) -> list[Row]:
    """A row for each kernel, compiled for ``sm_<arch>`` with setup.py's flags."""
    flags = re.search(r"(?ms)^NVCC_EXACT\b.*?= (\[.*?\])", (ROOT / "setup.py").read_text())
    assert flags is not None, "setup.py has no NVCC_EXACT"
    heads = instances()
    lines = [f"template __global__ void {kernel}(CudaTask);" for kernel in heads]
    with tempfile.TemporaryDirectory() as folder:
        source, cubin, ptx = (Path(folder, name) for name in ("kernels.cu", "cubin", "ptx"))
        source.write_text("\n".join(['#include "cuda_kernels.h"', "namespace fused_optim {", *lines, "}\n"]))
        command = ["nvcc", "-O3", "-std=c++17", *ast.literal_eval(flags[1]), f"-I{CSRC}", source]
        _output(*command, f"-arch=compute_{arch}", "-ptx", "-o", ptx)
        _output(*command, f"-arch=sm_{arch}", "-cubin", "-o", cubin)
        used = _by_kernel(_output(cuobjdump(), "-res-usage", cubin), "Function ")
        sass = _by_kernel(_output(cuobjdump(), "-sass", cubin), "Function : ")
        text = _by_kernel(_output("cat", ptx), r"\.entry ")
    same = {"compiler": "nvcc", "target": f"cuda:{arch}", "threads": 256}
    return [same | heads[k] | nvidia_counts(text[k], used[k], sass[k]) for k in heads]
