"""What nvcc makes of ``csrc/cuda_kernels.h``, with no GPU: the CUDA half of ``bench kernels``."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from .environment import ROOT
from .formats import STATES, TRIPLES
from .triton_report import body_length, ordinary_path, sass_operations

THREADS = 256
RULES = ("adabelief", "adabelief_nesterov", "adamaxw")


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton's wheel carries."""
    triton = importlib.util.find_spec("triton")
    folders = [str(Path(nvcc() or "nvcc").resolve().parent), "/usr/local/cuda/bin"]
    folders += (
        [f"{p}/backends/nvidia/bin" for p in (triton.submodule_search_locations or ())] if triton else []
    )
    return shutil.which("cuobjdump", path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))


def why_not() -> str | None:
    """Why there can be no report here; None if there can."""
    if nvcc() is None:
        return "needs nvcc on the PATH or under CUDA_HOME"
    if cuobjdump() is None:
        return "needs cuobjdump, from the CUDA toolkit or from Triton's wheel"
    if shutil.which("c++filt") is None:
        return "needs c++filt"
    return None


def _output(*command: object) -> str:
    ran = subprocess.run([str(c) for c in command], check=False, capture_output=True, text=True)
    if ran.returncode != 0:
        raise RuntimeError(f"{command[0]} fails: {(ran.stdout + ran.stderr).strip()[-1000:]}")
    return ran.stdout + ran.stderr


def _demangled(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def _flags() -> list[str]:
    """``NVCC_EXACT`` of setup.py, which cannot be imported."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NVCC_EXACT":
            flags: list[str] = ast.literal_eval(node.value)
            return flags
    raise LookupError("setup.py has no NVCC_EXACT")


def _kernel(name: str) -> tuple[str, tuple[str, ...]]:
    """A kernel's name and its template's arguments."""
    found = re.search(r"(\w+)<(.*)>\(", name)
    assert found is not None, name
    return found[1], tuple(a.split("::")[-1].strip() for a in found[2].split(","))


def _width(operation: str) -> int:
    for suffix, width in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if suffix in operation.split("."):
            return width
    return 4


def _accesses(operations: list[str], name: str) -> dict[str, int]:
    """Of tensors; the table is read with LDG.CONSTANT."""
    found: dict[int, int] = {}
    for operation in operations:
        if operation.startswith(f"{name}.") and "CONSTANT" not in operation:
            found[_width(operation)] = found.get(_width(operation), 0) + 1
    return {str(width): found[width] for width in sorted(found, reverse=True)}


def report(archs: tuple[str, ...], source: Path = ROOT / "csrc") -> list[dict[str, Any]]:
    """One row for each step kernel and architecture, as ``triton_report`` prints them."""
    targets = [f"-gencode=arch=compute_{a},code=[sm_{a},compute_{a}]" for a in archs]
    with tempfile.TemporaryDirectory() as folder:
        kernels, built = Path(folder, "kernels.cu"), Path(folder, "kernels.o")
        kernels.write_text(_instances(source))
        command = [nvcc(), "-c", "-O3", "-std=c++17", *_flags(), *targets, "-Xptxas=-v", f"-I{source}"]
        log = _demangled(_output(*command, kernels, "-o", built))
        sass = _demangled(_output(cuobjdump(), "-sass", built))
        ptx = _demangled(_output(cuobjdump(), "-ptx", built))
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for part in re.split("Compiling entry function ", log)[1:]:
        entry = re.match(r"'(.*)' for 'sm_(\w+)'", part)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        assert entry is not None and frame is not None and used is not None, part
        rows[entry[2], str(_kernel(entry[1]))] = {
            "compiler": "nvcc",
            "target": f"cuda:{entry[2]}",
            "kernel": _kernel(entry[1])[0].removesuffix("_kernel"),
            "arguments": _kernel(entry[1])[1],
            "threads": THREADS,
            "registers": int(used[1]),
            "spill_bytes": sum(map(int, frame.groups())),
        }
    for part in re.split("Fatbin elf code:", sass)[1:]:
        arch = re.search(r"arch = sm_(\w+)", part)
        assert arch is not None
        for function in re.split("Function : ", part)[1:]:
            operations = sass_operations(function)
            rows[arch[1], str(_kernel(function.partition("\n")[0]))] |= {
                "loads": _accesses(operations, "LDG"),
                "stores": _accesses(operations, "STG"),
                "instructions": body_length(operations, r"LDG\S*\.128", r"STG\S*\.128"),
                "path": ordinary_path(function),
            }
    for part in re.split(r"^\.version", ptx, flags=re.MULTILINE)[1:]:
        arch = re.search(r"^\.target sm_(\w+)", part, re.MULTILINE)
        assert arch is not None
        for function in re.split(r"\.entry ", part)[1:]:
            rows[arch[1], str(_kernel(function.partition("\n")[0]))] |= {
                "contracted": len(re.findall(r"\b(?:fma|mad)\.[.\w]*f(?:32|64)", function)),
                "approximate": len(re.findall(r"\b(?:div|sqrt|rcp|rsqrt)\.(?:approx|full)", function)),
                "flushed": len(re.findall(r"\.ftz\b", function)),
                "nan_dropping_max": len(re.findall(r"\bmax\.f(?:32|64)", function)),
            }
    names = {cls: name for name, cls in _classes(source).items()}
    return [_named(row, names) for row in rows.values()]


def _classes(source: Path) -> dict[str, str]:
    """The classes of rules and codecs, by their names."""
    text = "".join(path.read_text() for path in (*(source / "rules").glob("*.h"), source / "codecs.h"))
    found = re.findall(r'struct (\w+)[^{};]*\{\s+static constexpr const char\* name = "(\w+)"', text)
    return {name: cls for cls, name in found}


def _instances(source: Path) -> str:
    """C++ that has a kernel for each rule and each of TRIPLES."""
    classes = _classes(source)
    lines = ['#include "cuda_kernels.h"', "namespace fused_optim {"]
    for working in ("float", "double"):
        lines.append(f"template __global__ void prologue_kernel<{working}>(CudaTask);")
    for rule in RULES:
        for param, grad, state in TRIPLES:
            arguments = ", ".join(classes[name] for name in (rule, param, grad, *STATES[state]))
            lines.append(f"template __global__ void step_kernel<{arguments}>(CudaTask);")
    return "\n".join([*lines, "}", ""])


def _named(row: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """With rule and formats in place of the template's arguments. ``names``: those of classes."""
    first, *others = row.pop("arguments")
    if row["kernel"] != "step":
        working = {"float": "fp32", "double": "fp64"}[first]
        return {**row, "rule": "", "param": working, "grad": "", "state": ""}
    param, grad, *moments = (names[cls] for cls in others)
    (state,) = (name for name, pair in STATES.items() if pair == tuple(moments))
    return {**row, "rule": names[first], "param": param, "grad": grad, "state": state}
