"""What the Triton kernels compile to, for GPUs that need not be there: one JSON object for each kernel,
compiled by whatever Triton comes first on ``PYTHONPATH``."""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_optim.rules import RULES

from .environment import ROOT
from .formats import STATES, TRIPLES
from .kernels import Row, count, cuobjdump, head, nvidia_counts

KERNELS = ROOT / "kernels"


def load_kernels(folder: Path) -> Any:
    """``step.py`` of a folder, which need not be the package's own."""
    package = types.ModuleType("reported_kernels")
    package.__path__ = [str(folder)]
    sys.modules["reported_kernels"] = package
    return importlib.import_module("reported_kernels.step")


def compiled(kernel: Any, working: str, constants: Row, target: GPUTarget, options: Row) -> Any:
    """A kernel compiled for ``target``; arguments are known by their names."""
    types_of = {"rows": "*i64", "grads": "*i64", "chunks": "*i32", "counters": "*i64", "n": "i32"}
    types_of |= {"hyper": "*fp64", "grad_scale": "*fp32", "found_inf": "*fp32", "clip": "*fp64"}
    types_of["coefficients"] = f"*{working}"
    names = kernel.arg_names
    signature = {name: types_of.get(name, "constexpr") for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    aligned = [p.num for p in kernel.params if not p.do_not_specialize_on_alignment]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned if signature[names[i]].startswith("*")}
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target, options=options)


def nvidia_report(kernel: Any, issued: bool) -> Row:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        commands = [[cuobjdump(), option, file.name] for option in ("-res-usage", "-sass")[: 1 + issued]]
        texts = [subprocess.run(c, stdout=subprocess.PIPE, text=True, check=True).stdout for c in commands]
    return nvidia_counts(kernel.asm["ptx"], *texts)


def amd_report(kernel: Any) -> Row:
    llir, assembly = kernel.asm["llir"], kernel.asm["amdgcn"]
    fields = {name: int(value) for name, value in re.findall(r"\.(\w+):\s*(\d+)", assembly)}
    fused = count(r"\bv_(?:fma|fmac|mac|mad)_f(?:32|64)", assembly) + 2 * count(r"\bv_pk_fma_f32", assembly)
    # A correctly rounded division and square root are sequences with fused steps of their own.
    expanded = {r"\bv_div_fixup_f": 5, r"\bv_sqrt_f32": 2, r"\bv_rsq_f32": 5, r"\bv_rsq_f64": 7}
    # LLVM joins some of them to vectors, of 2 in Triton 3.6 and of 4 in 3.7.
    guards = sum(int(n or 1) for n in re.findall(r"fcmp (?:uno|ord) (?:<(\d+) x )?(?:float|double)", llir))
    vector = r"<(?:4 x (?:float|i32)|8 x (?:i16|half)|2 x (?:double|i64))>"
    return {
        "registers": fields["vgpr_count"],
        # Scalar registers spill into lanes of vector registers, not to memory.
        "spill_bytes": fields["vgpr_spill_count"] + fields["private_segment_fixed_size"],
        "loads": {}, "stores": {},
        "wide_loads": count(rf"= load {vector}, ptr addrspace\(1\)", llir),
        "wide_stores": count(rf"store {vector} .*, ptr addrspace\(1\)", llir),
        "contracted": fused - sum(n * count(pattern, assembly) for pattern, n in expanded.items()),
        "approximate": count(r"\bf(?:div|sqrt) (?:\w+ )*(?:afn|arcp|fast)\b|llvm\.amdgcn\.rcp\b", llir),
        "flushed": count(r'"denormal-fp-math-f32"="(?!ieee)', llir),
        "nan_keeping_max": count(r"call [^\n]*@llvm\.maximum\.", llir),
        "nan_dropping_max": max(0, count(r"call [^\n]*@llvm\.maxnum", llir) - guards),
    }  # fmt: skip


def reports(step: Any, name: str, rules: Any, triples: Any, fusion: bool, issued: bool) -> list[Row]:
    """A row for each kernel of ``step``; with ``fusion`` compiled as a launch must not be."""
    kind, arch = name.split(":")
    target = GPUTarget("cuda", int(arch), 32) if kind == "cuda" else GPUTarget("hip", arch, 64)

    def report(kernel: Any, working: str, constants: Row, threads: int, registers: int) -> Row:
        options = step.launch_options(target.backend, target.warp_size, threads, registers)
        options["enable_fp_fusion"] = fusion
        code = compiled(kernel, working, constants, target, options)
        return {"threads": threads, **(nvidia_report(code, issued) if kind == "cuda" else amd_report(code))}

    rows = []
    for rule in rules:
        for param, grad, state in triples:
            names = (param, grad, *STATES[state])
            working = "fp64" if param == "fp64" else "fp32"
            constants = step.step_constants(rule, *names, target)
            limits = step.THREADS, step.registers(*names[:3], target)
            code = report(step.step_kernel, working, constants, *limits)
            rows.append(head("step", param, rule, grad, state) | code)
    for working, dtype in (("fp32", tl.float32), ("fp64", tl.float64)):
        constants = {"DTYPE": dtype, "LANES": step.PROLOGUE_LANES, "OVERLAPS": step.overlaps(target)}
        limits = (step.PROLOGUE_LANES, step.PROLOGUE_REGISTERS)
        rows.append(head("prologue", working) | report(step.prologue_kernel, working, constants, *limits))
    return [{"triton": triton.__version__, "target": name, **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--target", action="append", help="cuda:80, cuda:90, cuda:100, hip:gfx942, ...")
    parser.add_argument("--kernels", type=Path, default=KERNELS, help="folder with step.py")
    parser.add_argument("--rule", action="append", choices=RULES, help="default: all")
    parser.add_argument("--formats", action="append", metavar="PARAM:GRAD:STATES", help="default: the usual")
    parser.add_argument("--fp-fusion", action="store_true", help="compile as a launch must not be")
    parser.add_argument("--issued", action="store_true", help="count the instructions issued (NVIDIA), too")
    given = parser.parse_args()
    step = load_kernels(given.kernels)
    triples = [tuple(f.split(":")) for f in given.formats or map(":".join, TRIPLES)]
    for target in given.target or ["cuda:90"]:
        for row in reports(step, target, given.rule or RULES, triples, given.fp_fusion, given.issued):
            print(json.dumps(row))


if __name__ == "__main__":
    main()
