"""The compiled kernels' report, which needs no GPU, and what it must not show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cuda_report
from .environment import ROOT

Row = dict[str, Any]
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
BYTES = {"fp32": 4, "fp64": 8, "bf16": 2, "fp16": 2}
"""Of an element, by its codec's name. Formats that are not here are reported; their accesses,
registers and spills are judged in the tests of the compiled kernels alone."""


@dataclass(frozen=True)
class Unit:
    """What bounds the warps that a multiprocessor (AMD: SIMD) holds."""

    warp: int
    warps: int
    registers: int
    """A lane's registers, of all warps together."""
    granularity: int


_NVIDIA = Unit(32, 64, 65536 // 32, 8)
UNITS = {"cuda:80": _NVIDIA, "cuda:90": _NVIDIA, "cuda:100": _NVIDIA, "hip:gfx942": Unit(64, 8, 512, 8)}


def occupancy(target: str, registers: int, threads: int) -> float:
    """Share of the warps that can be resident, as registers limit them."""
    unit = UNITS[target]
    rounded = -(-max(registers, 1) // unit.granularity) * unit.granularity
    warps = min(unit.warps, unit.registers // rounded)
    if target.startswith("cuda"):
        block = threads // unit.warp
        warps = warps // block * block
    return warps / unit.warps


def triton_rows(
    targets: Sequence[str], kernels: Path | None = None, rules: Sequence[str] = (), fp_fusion: bool = False
) -> list[Row]:
    """What Triton compiles, in a process of its own: an interpreter that has been chosen for this one
    must not be there."""
    command = [sys.executable, "-m", "bench.triton_report"]
    for target in targets:
        command += ["--target", target]
    for rule in rules:
        command += ["--rule", rule]
    command += ["--kernels", str(kernels)] if kernels else []
    command += ["--fp-fusion"] if fp_fusion else []
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    if ran.returncode != 0:
        raise RuntimeError(f"the Triton kernels do not compile: {ran.stderr.strip()[-1500:]}")
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    for row in rows:
        row["compiler"] = f"triton {row.pop('triton')}"
    return [described(row) for row in rows]


def cuda_rows(targets: Sequence[str], source: Path | None = None) -> list[Row]:
    """What nvcc compiles, for the targets that it is tried for."""
    known = cuda_report.architectures()
    archs = tuple(t.removeprefix("cuda:") for t in targets if t in known)
    if not archs:
        return []
    rows = cuda_report.report(archs, source) if source else cuda_report.report(archs)
    return [described(row) for row in rows]


def described(row: Row) -> Row:
    """With what follows from the counts: occupancy, and for a parameter bytes and instructions."""
    row["occupancy"] = occupancy(row["target"], row["registers"], row["threads"])
    elements = elements_per_thread(row)
    if row["kernel"] == "step" and elements:
        p, g, s = (BYTES[row[key]] for key in ("param", "grad", "state"))
        row["bytes_per_parameter"] = 2 * p + g + 4 * s
        row["instructions_per_parameter"] = round(row["instructions"] / elements, 1)
    row["problems"] = problems(row)
    return row


def elements_per_thread(row: Row) -> int:
    """A thread's elements in a full chunk; 0 for formats that this table does not know."""
    if not {row["param"], row["grad"], row["state"]} <= set(BYTES):
        return 0
    return 16 // min(BYTES[row[key]] for key in ("param", "grad", "state"))


def register_limit(row: Row) -> int:
    """64 leaves room for four blocks of 256 threads in 65,536 registers, 80 for three. The
    gradient of another dtype and float16 need up to 80 on sm_100."""
    if row["state"] == "bf16":
        return 112
    return {("fp32", "fp32"): 64, ("bf16", "bf16"): 72}.get((row["param"], row["grad"]), 80)


def problems(row: Row) -> list[str]:
    """What a kernel has that it must not have."""
    found = [name for name in ("contracted", "approximate", "flushed", "nan_dropping_max") if row[name]]
    elements = elements_per_thread(row)
    if row["kernel"] == "prologue" or not elements:
        return found
    if row["spill_bytes"]:
        found.append(f"{row['spill_bytes']} bytes spilled")
    if row["target"].startswith("cuda") and row["registers"] > register_limit(row):
        found.append(f"{row['registers']} registers, at most {register_limit(row)}")
    p, g, s = (BYTES[row[key]] for key in ("param", "grad", "state"))
    # One 128-bit access for each 16 bytes that a thread has of an operand: an operand that is
    # read or written more narrowly is missing in this count.
    for kind, per_element in (("loads", p + g + 2 * s), ("stores", p + 2 * s)):
        wide, needed = row[kind].get("16", 0), elements * per_element // 16
        if wide != needed:
            found.append(f"{wide} 128-bit {kind} where {needed} are needed: not vectorised")
    return found


HEADS = ("kernel", "param, grad, state", "regs", "spill", "loads", "stores", "B/par.", "instr/par.", "occ.")


def cells(row: Row) -> list[str]:
    """A row of the table."""

    def accesses(counts: dict[str, int]) -> str:
        return " ".join(f"{n}x{width}B" for width, n in counts.items())

    return [
        f"{row['compiler'].split()[0]} {row['rule'] or row['kernel']}",
        " ".join(filter(None, (row["param"], row["grad"], row["state"]))),
        str(row["registers"]),
        str(row["spill_bytes"]),
        accesses(row["loads"]),
        accesses(row["stores"]),
        str(row.get("bytes_per_parameter", "")),
        str(row.get("instructions_per_parameter", "")),
        f"{row['occupancy']:.0%}",
    ]
