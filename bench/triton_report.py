"""What the Triton kernels compile to, for GPUs that need not be there.

    python -m bench.triton_report --target cuda:90 --target hip:gfx942

prints one JSON object for each kernel: registers, spills, how wide its accesses are,
contracted or approximate operations. It imports Triton and the kernels alone, not torch,
so that any Triton release on ``PYTHONPATH`` can be asked.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .formats import STATES, TRIPLES

RULES = ("adabelief", "adamaxw")
DEFAULT_KERNELS = Path(__file__).parents[1] / "kernels"


def load_kernels(folder: Path) -> types.ModuleType:
    """``kernels/step.py`` of a folder, without the package that it is installed in."""
    package = types.ModuleType("reported_kernels")
    package.__path__ = [str(folder)]
    sys.modules["reported_kernels"] = package
    return importlib.import_module("reported_kernels.step")


def parse_target(text: str) -> GPUTarget:
    backend, arch = text.split(":")
    return GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)


def compile_kernel(
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    scalars: dict[str, str],
    target: GPUTarget,
    options: Any,
) -> Any:
    names = kernel.arg_names
    signature = {n: pointers.get(n) or scalars.get(n) or "constexpr" for n in names}
    constexprs = {(names.index(n),): value for n, value in constants.items()}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in pointers}
    return triton.compile(
        ASTSource(kernel, signature, constexprs, attributes), target=target, options=options
    )


def step_kernel(
    step: Any, rule: str, formats: tuple[str, str, str], target: GPUTarget, fp_fusion: bool
) -> Any:
    param, grad, state = formats
    operands = (param, grad, *STATES[state])
    constants = step.step_constants(rule, *operands)
    registers = step.registers(param, grad, STATES[state][0])
    options = step.launch_options(target.backend, target.warp_size, step.THREADS, registers)
    options["enable_fp_fusion"] = fp_fusion
    working = "fp64" if param == "fp64" else "fp32"
    pointers = {"rows": "*i64", "chunks": "*i32", "counters": "*i64", "coefficients": f"*{working}"}
    return compile_kernel(step.step_kernel, pointers, constants, {"n": "i32"}, target, options)


def prologue_kernel(step: Any, working: str, target: GPUTarget, fp_fusion: bool) -> Any:
    import triton.language as tl

    constants = {"DTYPE": {"fp32": tl.float32, "fp64": tl.float64}[working], "LANES": step.PROLOGUE_LANES}
    options = step.launch_options(
        target.backend, target.warp_size, step.PROLOGUE_LANES, step.PROLOGUE_REGISTERS
    )
    options["enable_fp_fusion"] = fp_fusion
    pointers = {
        "counters": "*i64",
        "hyper": "*fp64",
        "grad_scale": "*fp32",
        "found_inf": "*fp32",
        "coefficients": f"*{working}",
    }
    return compile_kernel(step.prologue_kernel, pointers, constants, {"n": "i32"}, target, options)


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def widths(pattern: str, text: str) -> dict[str, int]:
    """How many accesses there are of each width in bytes; the pattern's groups are the number of
    values (or nothing) and the bits of one."""
    found: dict[int, int] = {}
    for number, bits in re.findall(pattern, text):
        width = int(number or 1) * int(bits) // 8
        found[width] = found.get(width, 0) + 1
    return {str(width): found[width] for width in sorted(found, reverse=True)}


def body_length(operations: list[str], load: str, store: str) -> int:
    """Instructions of a full chunk: from its first wide load to its last wide store."""
    loads = [i for i, operation in enumerate(operations) if re.match(load, operation)]
    stores = [i for i, operation in enumerate(operations) if re.match(store, operation)]
    return stores[-1] - loads[0] + 1 if loads and stores else 0


PIPES = {
    "alu": r"LOP|IADD|VIADD|VIMNMX|IMNMX|SHF|ISETP|FSETP|SEL|FSEL|FMNMX|PRMT|LEA|SGXT|BMSK|IABS|F2FP|PLOP",
    "imad": r"IMAD",
    "fma": r"FFMA|FMUL|FADD|HFMA|HADD|HMUL",
    "special": r"MUFU|FCHK|I2F|F2I|F2F|POPC|FLO|I2I",
}
"""Execution units of a multiprocessor that may be busier than its issue slots, by what runs there."""


def ordinary_path(disassembly: str) -> dict[str, int]:
    """Instructions that a warp issues in a full chunk: ``before`` its first wide load, and from there to
    the last wide store ``all`` of them and those of each of PIPES.

    What the listing holds beside them is passed over: a branch is taken if it skips a call, and no
    wide access. Calls are the rare cases of divisions and square roots, and every division by a
    number that is 1 is skipped whole. Of two loops with calls, one in place of the other, the shorter
    is taken: it has no divisions by bias corrections, which are 1 for most of a training.
    """
    found = re.findall(
        r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\S+\s+)?([A-Z][\w.]*)([^;]*);", disassembly, re.MULTILINE
    )
    operations = [(int(at, 16), bool(when), name, rest) for at, when, name, rest in found]
    index = {at: i for i, (at, *_) in enumerate(operations)}
    wide = [i for i, (*_, name, _) in enumerate(operations) if re.match(r"(?:LDG|STG)\S*\.128", name)]
    if not wide:
        return {}
    # Eight single bytes are stored with 64 bits; so is one float64, but of the tail.
    bytes_too = any(re.match(r"STG\S*\.[SU]8", name) for *_, name, _ in operations)
    last = r"STG\S*\.(?:128|64)" if bytes_too else r"STG\S*\.128"
    stores = [i for i, (*_, name, _) in enumerate(operations) if re.match(last, name)]

    def calls_in(span: range) -> bool:
        return any(operations[j][2].startswith("CALL") for j in span)

    counts = dict.fromkeys(("before", "all", *PIPES), 0)
    counts["before"] = i = wide[0]
    while i <= stores[-1]:
        _, conditional, name, rest = operations[i]
        conditional = conditional or bool(re.match(r"\s*!?UP\d", rest))  # BRA.U of sm_100
        counts["all"] += 1
        for pipe, pattern in PIPES.items():
            counts[pipe] += bool(re.match(pattern, name))
        target = re.search(r"0x([0-9a-f]+)\s*$", rest)
        i += 1
        if name in ("BRA", "BRA.U") and target and (to := index.get(int(target[1], 16), 0)) > i:
            skipped = range(i, to)
            accessed = any(j in skipped for j in [*wide, *stores])
            if not conditional or (calls_in(skipped) and not accessed):
                # Where what is skipped ends in a jump, another loop may lie on the way to its target.
                _, also_conditional, last, jump = operations[to - 1]
                end = re.search(r"0x([0-9a-f]+)\s*$", jump)
                if not conditional or also_conditional or last != "BRA" or end is None:
                    i = to
                    continue
                other = range(to, index.get(int(end[1], 16), 0))
                if not calls_in(other) or len(other) <= len(skipped):
                    i = to
    return counts


def sass_operations(disassembly: str) -> list[str]:
    """The instructions of a disassembly, without addresses, predicates and operands."""
    return re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", disassembly, re.MULTILINE)


def nvidia_report(compiled: Any) -> dict[str, Any]:
    ptx = compiled.asm["ptx"]
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(compiled.asm["cubin"])
    try:
        usage = subprocess.run(
            [cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run(
            [cuobjdump, "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    finally:
        os.unlink(file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", usage)
    assert found is not None, usage
    return {
        "threads": 32 * compiled.metadata.num_warps,
        "shared_bytes": compiled.metadata.shared,
        "loads": widths(r"ld\.global[.\w]*?(?:\.v(\d))?\.[bfsu](\d+)", ptx),
        "stores": widths(r"st\.global[.\w]*?(?:\.v(\d))?\.[bfsu](\d+)", ptx),
        "instructions": body_length(sass_operations(sass), r"LDG\S*\.128", r"STG\S*\.128"),
        "path": ordinary_path(sass),
        "registers": int(found[1]),
        "spill_bytes": int(found[2]) + int(found[3]) + count(r"\b(?:ld|st)\.local", ptx),
        "wide_loads": count(r"ld\.global[.\w]*\.(?:v4\.b32|v2\.b64)", ptx),
        "wide_stores": count(r"st\.global[.\w]*\.(?:v4\.b32|v2\.b64)", ptx),
        "half_wide_loads": count(r"ld\.global[.\w]*\.v2\.b32", ptx),
        "half_wide_stores": count(r"st\.global[.\w]*\.v2\.b32", ptx),
        "byte_loads": count(r"ld\.global[.\w]*\.b8", ptx),
        "byte_stores": count(r"st\.global[.\w]*\.b8", ptx),
        "contracted": count(r"\b(?:fma|mad)\.[.\w]*f(?:32|64)", ptx),
        "approximate": count(r"\b(?:div|sqrt|rcp|rsqrt)\.(?:approx|full)", ptx),
        "flushed": count(r"\.ftz\b", ptx),
        "nan_keeping_max": count(r"\bmax\.NaN\.f32", ptx),
        "nan_dropping_max": max(0, count(r"\bmax\.f(?:32|64)", ptx) - count(r"\bsetp\.nan\.f(?:32|64)", ptx)),
    }


def amd_report(compiled: Any) -> dict[str, Any]:
    llir, assembly = compiled.asm["llir"], compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        assert found is not None, name
        return int(found[1])

    fused = count(r"\bv_(?:fma|fmac|mac|mad)_f(?:32|64)", assembly) + 2 * count(r"\bv_pk_fma_f32", assembly)
    # A correctly rounded division and square root are sequences with fused steps of their own.
    expanded = (
        5 * count(r"\bv_div_fixup_f", assembly)
        + 2 * count(r"\bv_sqrt_f32", assembly)
        + 5 * count(r"\bv_rsq_f32", assembly)
        + 7 * count(r"\bv_rsq_f64", assembly)
    )
    # LLVM joins some of them to vectors, of 2 in Triton 3.6 and of 4 in 3.7.
    guarded = re.findall(r"fcmp (?:uno|ord) (?:<(\d+) x )?(?:float|double)", llir)
    guards = sum(int(n or 1) for n in guarded)
    operations = re.findall(r"^\t([a-z]\w+)", assembly, re.MULTILINE)
    dwords = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2}

    def accesses(kind: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for name in re.findall(rf"\bglobal_{kind}_(\w+)", assembly):
            width = str(next((n for key, n in dwords.items() if name.startswith(key)), 1))
            found[width] = found.get(width, 0) + 1
        return dict(sorted(found.items(), key=lambda item: -int(item[0])))

    vector = r"<(?:4 x (?:float|i32)|8 x (?:i16|half)|2 x (?:double|i64))>"
    return {
        "threads": 64 * compiled.metadata.num_warps,
        "shared_bytes": compiled.metadata.shared,
        "loads": accesses("load"),
        "stores": accesses("store"),
        "instructions": body_length(operations, "global_load_dwordx4", "global_store_dwordx4"),
        "registers": field("vgpr_count"),
        "spill_bytes": field("vgpr_spill_count")
        + field("sgpr_spill_count")
        + field("private_segment_fixed_size"),
        "wide_loads": count(rf"= load {vector}, ptr addrspace\(1\)", llir),
        "wide_stores": count(rf"store {vector} .*, ptr addrspace\(1\)", llir),
        # Triton 3.6's LLVM cuts these up and joins them again in the assembly, where the table's
        # addresses are in scalar registers.
        "half_wide_loads": count(r"\bglobal_load_dwordx2 v\[\S+, v\[\S+, off", assembly),
        "half_wide_stores": count(r"\bglobal_store_dwordx2 v\[\S+, v\[\S+, off", assembly),
        "byte_loads": count(r"\bglobal_load_[us]byte(?:_d16(?:_hi)?)?\b", assembly),
        "byte_stores": count(r"\bglobal_store_byte(?:_d16_hi)?\b", assembly),
        "wide_store_instructions": count(r"\bglobal_store_dwordx4\b", assembly),
        "contracted": fused - expanded,
        "approximate": count(r"\bf(?:div|sqrt) (?:\w+ )*(?:afn|arcp|fast)\b|llvm\.amdgcn\.rcp\b", llir),
        "flushed": count(r'"denormal-fp-math-f32"="(?!ieee)', llir),
        "nan_keeping_max": count(r"call [^\n]*@llvm\.maximum\.", llir),
        "nan_dropping_max": max(0, count(r"call [^\n]*@llvm\.maxnum", llir) - guards),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--target", action="append", help="cuda:80, cuda:90, cuda:100, hip:gfx942, ...; may be repeated"
    )
    parser.add_argument("--kernels", type=Path, default=DEFAULT_KERNELS, help="folder with step.py")
    parser.add_argument("--rule", action="append", choices=RULES, help="default: all")
    parser.add_argument(
        "--formats",
        action="append",
        metavar="PARAM:GRAD:STATES",
        help="may be repeated; default: the usual ones",
    )
    parser.add_argument("--fp-fusion", action="store_true", help="compile as a launch must not be")
    arguments = parser.parse_args()
    step = load_kernels(arguments.kernels)
    chosen = [tuple(f.split(":")) for f in arguments.formats] if arguments.formats else TRIPLES
    for text in arguments.target or ["cuda:90"]:
        target = parse_target(text)
        report = nvidia_report if target.backend == "cuda" else amd_report
        for rule in arguments.rule or RULES:
            for formats in chosen:
                compiled = step_kernel(step, rule, formats, target, arguments.fp_fusion)
                head = {"kernel": "step", "rule": rule, **dict(zip(("param", "grad", "state"), formats))}
                print(json.dumps({"triton": triton.__version__, "target": text, **head, **report(compiled)}))
        for working in ("fp32", "fp64"):
            compiled = prologue_kernel(step, working, target, arguments.fp_fusion)
            head = {"kernel": "prologue", "rule": "", "param": working, "grad": "", "state": ""}
            print(json.dumps({"triton": triton.__version__, "target": text, **head, **report(compiled)}))


if __name__ == "__main__":
    main()
