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
from .formats import PART_BYTES, STATES

Row = dict[str, Any]
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")


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
        version = row.pop("triton")
        row |= {"compiler": f"triton {version}"}
    return [described(row) for row in rows]


def cuda_rows(targets: Sequence[str], source: Path | None = None) -> list[Row]:
    """What nvcc compiles, for the targets that it is tried for."""
    archs = tuple(t.removeprefix("cuda:") for t in targets if t in ("cuda:80", "cuda:90"))
    if not archs:
        return []
    rows = cuda_report.report(archs, source) if source else cuda_report.report(archs)
    return [described(row) for row in rows]


def described(row: Row) -> Row:
    """With what follows from the counts: occupancy, and for a parameter bytes and instructions."""
    row["occupancy"] = occupancy(row["target"], row["registers"], row["threads"])
    if row["kernel"] == "step":
        loaded, stored = operand_bytes(row)
        bases = 2 / 128 if row["state"] == "8bit" else 0
        row["bytes_per_parameter"] = round(sum(loaded) + sum(stored) + 2 * bases, 2)
        row["instructions_per_parameter"] = round(row["instructions"] / elements_per_thread(row), 1)
    row["problems"] = problems(row)
    return row


def operand_bytes(row: Row) -> tuple[list[int], list[int]]:
    """Bytes of an element that are read and that are written, by part."""
    stored = [n for codec in (row["param"], *STATES[row["state"]]) for n in PART_BYTES[codec]]
    return [*stored, *PART_BYTES[row["grad"]]], stored


def elements_per_thread(row: Row) -> int:
    """A thread's elements in a full chunk: 16 bytes of the narrowest operand, but no more than 8."""
    codecs = (row["param"], row["grad"], *STATES[row["state"]])
    return 16 // max(2, *[min(PART_BYTES[codec][0] for codec in codecs)])


def register_limit(row: Row) -> int:
    """64 registers leave room for four blocks of 256 threads in 65,536, 65 to 80 for three. The compilers
    are told how many there are: what does not fit is seen in spills."""
    if row.get("compiler") == "nvcc":
        return 80 if row["param"] == "fp64" else 64
    if (row["param"], row["grad"]) == ("fp32", "fp32"):
        return 48 if row["state"] == "fp32" else 64
    return 80


def problems(row: Row) -> list[str]:
    """What a kernel has that it must not have."""
    found = [name for name in ("contracted", "approximate", "flushed", "nan_dropping_max") if row[name]]
    if row["spill_bytes"]:
        found.append(f"{row['spill_bytes']} bytes spilled")
    if row["kernel"] == "prologue":
        return found
    if row["target"].startswith("cuda") and row["registers"] > register_limit(row):
        found.append(f"{row['registers']} registers, at most {register_limit(row)}")
    elements = elements_per_thread(row)
    for kind, parts in zip(("loads", "stores"), operand_bytes(row)):
        # One 128-bit access for each 16 bytes that a thread has of an operand, and one of 64 bits
        # for its 8 single bytes: an operand that is accessed more narrowly is missing in this count.
        needed, halves = sum(elements * n // 16 for n in parts if n > 1), parts.count(1)
        wide = row.get(f"wide_{kind}", row[kind].get("16", 0))
        if wide != needed:
            found.append(f"{wide} 128-bit {kind} where {needed} are needed: not vectorised")
        # (One float64 of the tail is 64 bits too, which shows on AMD.)
        if row["param"] != "fp64" and f"half_wide_{kind}" in row and row[f"half_wide_{kind}"] != halves:
            found.append(f"{row[f'half_wide_{kind}']} 64-bit {kind} of bytes where {halves} are needed")
        # The tail's elements, and a base for each of a thread's blocks.
        bases = 4 if row["state"] == "8bit" else 0
        if f"byte_{kind}" in row and row[f"byte_{kind}"] != halves + bases:
            found.append(f"{row[f'byte_{kind}']} byte {kind} where {halves + bases} are needed")
    if row.get("wide_store_instructions", row.get("wide_stores")) != row.get("wide_stores"):
        found.append(f"{row['wide_store_instructions']} dwordx4 stores")
    keeps_nan = row.get("nan_keeping_max", True) or not row["target"].startswith("cuda")
    if row["rule"] == "adamaxw" and row["param"] != "fp64" and not keeps_nan:
        found.append("no max that keeps NaN")
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
