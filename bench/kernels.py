"""What the kernels compile to, for GPUs that need not be there, and what that must not show.

A row is one compiled kernel: registers, spills, the width of each access, instructions, and operations
that are not one IEEE operation. Triton's come from ``triton_report``, nvcc's from ``cuda_report``.
"""

import heapq
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .environment import ROOT
from .formats import STATES, part_bytes

Row = dict[str, Any]
INLINE = re.compile(r"// begin inline asm.*?// end inline asm|\{\s*(?:fma|rcp|rsqrt)\.[^{}]*\}", re.DOTALL)
"""Inline assembly in PTX: Triton's between comments, and that of ``csrc/cuda_kernels.h`` in braces, since
cuobjdump leaves comments out."""
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")


def head(kernel: str, param: str, rule: str = "", grad: str = "", state: str = "") -> Row:
    """What a kernel is."""
    return {"kernel": kernel, "rule": rule, "param": param, "grad": grad, "state": state}


def cuobjdump() -> Path:
    """The one that Triton's wheel carries."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None, "needs Triton"
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def widths(pattern: str, text: str) -> dict[str, int]:
    """How many accesses there are of each width in bytes; the pattern's groups are the number of
    values (or nothing) and the bits of one."""
    found = Counter(int(number or 1) * int(bits) // 8 for number, bits in re.findall(pattern, text))
    return {str(width): found[width] for width in sorted(found, reverse=True)}


def nvidia_counts(ptx: str, usage: str, sass: str = "") -> Row:
    """What one kernel's code holds; with ``sass`` the instructions issued, too. Contraction shows in PTX
    only: division and square root expand to FFMA in SASS; what stands in inline assembly no compiler chose.
    nvcc reads the table with ``.nc``, which is not counted."""
    chosen = INLINE.sub("", ptx)
    used = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", usage)
    assert used is not None, usage
    spilled = int(used[2]) + int(used[3]) + count(r"\b(?:ld|st)\.local", ptx)
    found: Row = {"registers": int(used[1]), "spill_bytes": spilled, "path": ordinary_path(sass)}
    for name, operation in (("loads", "ld"), ("stores", "st")):
        access = rf"\b{operation}\.global(?!\.nc)[.\w]*?"
        found[name] = widths(rf"{access}(?:\.v(\d))?\.[bfsu](\d+)", ptx)
        found[f"wide_{name}"] = count(rf"{access}\.(?:v4\.[bfsu]32|v2\.[bfsu]64)\b", ptx)
        found[f"half_wide_{name}"] = count(rf"{access}\.v2\.[bfsu]32\b", ptx)
        found[f"byte_{name}"] = count(rf"{access}\.[bsu]8\b", ptx)
    quiet_maxima = count(r"\bmax\.f(?:32|64)", ptx) - count(r"\bsetp\.nan\.f(?:32|64)", ptx)
    return found | {
        "contracted": count(r"\b(?:fma|mad)\.[.\w]*f(?:32|64)", chosen),
        "approximate": count(r"\b(?:div|sqrt|rcp|rsqrt)\.(?:approx|full)", chosen),
        "flushed": count(r"\.ftz\b", chosen),
        "nan_keeping_max": count(r"\bmax\.NaN\.f32", ptx),
        "nan_dropping_max": max(0, quiet_maxima),
    }


def ordinary_path(disassembly: str) -> dict[str, int]:
    """Instructions that a warp issues in a full chunk: ``before`` its first wide load, and in ``all`` from
    there to the last wide store.

    It is the shortest way of those with the most wide accesses and no call. The rare cases of divisions and
    square roots lie on longer ones; so do divisions by bias corrections, which are 1 for most of a training.
    """
    line = r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\S+\s+)?([A-Z][\w.]*)([^;]*);"
    found = re.findall(line, disassembly, re.MULTILINE)
    place = {int(at, 16): i for i, (at, *_) in enumerate(found)}
    # Eight single bytes are stored with 64 bits. So is a step number, on another way.
    stored = r"STG\S*\.(?:128|64)" if re.search(r"\bSTG\S*\.[SU]8", disassembly) else r"STG\S*\.128"
    loads = {i for i, (*_, name, _) in enumerate(found) if re.match(r"LDG\S*\.128", name)}
    stores = {i for i, (*_, name, _) in enumerate(found) if re.match(stored, name)}
    following = []
    for i, (_, when, name, operands) in enumerate(found):
        to = re.search(r"0x([0-9a-f]+)\s*$", operands)
        jump = [place[int(to[1], 16)]] if to and name in ("BRA", "BRA.U") else []
        # A branch may have a condition among its operands, too.
        certain = not when and not re.match(r"\s*!?U?P\d", operands)
        ends = name.startswith(("CALL", "RET")) or (certain and name in ("BRA", "BRA.U", "EXIT"))
        following.append(jump if ends else [*jump, i + 1])
    # Where the shortest ways to one access more end: their instructions, and the accesses before.
    ways: dict[int, tuple[int, frozenset[int]]] = {0: (0, frozenset())}
    issued = []
    while ways:
        issued.append(min(n for n, _ in ways.values()))
        queue = [(n, i, i) for i, (n, _) in ways.items()]
        heapq.heapify(queue)
        before, ways, seen = ways, {}, {len(found)}
        accesses = loads | stores if len(issued) > 1 else loads
        while queue:
            n, i, start = heapq.heappop(queue)
            if i in seen:
                continue
            seen.add(i)
            passed = before[start][1] | {start}
            for j in following[i]:
                if j not in accesses:
                    heapq.heappush(queue, (n + 1, j, start))
                elif j not in passed and j not in ways:
                    ways[j] = n + 1, passed
    return {"before": issued[1], "all": issued[-1] - issued[1] + 1} if len(issued) > 1 else {}


# Rows


def triton_rows(targets: Sequence[str], *arguments: object) -> list[Row]:
    """What Triton compiles, in a process of its own: an interpreter that has been chosen for this one
    must not be there."""
    command = [sys.executable, "-m", "bench.triton_report", *(f"--target={t}" for t in targets)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command += ["--issued", *map(str, arguments)]
    ran = subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    return [described({**row, "compiler": f"triton {row['triton']}"}) for row in rows]


GPUS = {
    "cuda:80": [("A100", 108, 2.04e12, 1.41e9)],
    "cuda:90": [("H100", 132, 3.35e12, 1.755e9), ("H200", 132, 4.8e12, 1.755e9)],
    "cuda:100": [("B200", 148, 8.0e12, 1.85e9)],
}
"""Published numbers: multiprocessors, bytes a second, and boost clock in Hz."""


def predicted(row: Row) -> str:
    """On paper: the share of a triad's speed that the kernel can reach on each GPU. It is the least of 1,
    the memory's time over the time to issue, and the bandwidth of the resident blocks if they only waited.

    Assumed: a triad reaches 92% of the published bandwidth; a multiprocessor issues in 70% of its 128
    slots a clock, over dependent chains of divisions; a read from memory under load takes 800 ns, and the
    reads of the table before it as much.
    """
    n, threads, moved = elements_per_thread(row), row["threads"], row["bytes_per_element"]
    passes = 1 if row["compiler"] != "nvcc" else 4096 // (threads * n)  # kChunk of csrc/step_cuda.h
    issued = row["path"]["all"] / n + row["path"]["before"] / (n * passes)
    blocks = min(2048 // threads, 65536 // (-(-row["registers"] // 8) * 8 * threads))
    waiting = blocks * threads * n * passes * moved / ((1 + passes) * 800e-9)
    found = []
    for name, multiprocessors, bandwidth, clock in GPUS[row["target"]]:
        triad = 0.92 * bandwidth / multiprocessors
        issuing = moved * 0.7 * 128 * clock / issued
        found.append(f"{name} {min(1.0, issuing / triad, waiting / triad):.2f}")
    return ", ".join(found)


def described(row: Row) -> Row:
    """With what follows from the counts: bytes and instructions of an element, and problems."""
    if row["kernel"] == "step":
        loaded, stored = operand_bytes(row)
        exponents = 4 / 128 if row["state"] == "8bit" else 0
        row["bytes_per_element"] = round(sum(loaded) + sum(stored) + exponents, 2)
        if row.get("path"):
            row["instructions_per_element"] = round(row["path"]["all"] / elements_per_thread(row), 1)
            row["share_of_triad"] = predicted(row)
    row["problems"] = problems(row)
    return row


def operand_bytes(row: Row) -> tuple[list[int], list[int]]:
    """Bytes of an element that are read and that are written, by tensor."""
    stored = [n for name in (row["param"], *STATES[row["state"]]) for n in part_bytes(name)]
    return [*stored, *part_bytes(row["grad"])], stored


def elements_per_thread(row: Row) -> int:
    """A thread's elements in a pass over a full chunk: 16 bytes of the smallest operand, but no more than 8,
    and 8 where Triton steps float32."""
    names = (row["param"], row["grad"], *STATES[row["state"]])
    smallest = min(part_bytes(name)[0] for name in names)
    return 8 if smallest == 4 and row.get("compiler") != "nvcc" else 16 // max(2, smallest)


def register_limit(row: Row) -> int:
    """64 registers leave room for four blocks of 256 threads in 65,536, 65 to 80 for three. The compilers
    are told how many there are: what does not fit is seen in spills."""
    if row.get("compiler") == "nvcc":
        return 80 if row["param"] == "fp64" else 64
    if (row["param"], row["grad"], row["state"]) == ("fp32", "fp32", "fp32"):
        return 72 if row["target"] == "cuda:100" else 64
    return 80


def problems(row: Row) -> list[str]:
    """What a kernel has that it must not have."""
    found = [name for name in ("contracted", "approximate", "flushed", "nan_dropping_max") if row[name]]
    if row["spill_bytes"]:
        found.append(f"{row['spill_bytes']} bytes spilled")
    if row["kernel"] == "prologue":
        return found
    nvidia = row["target"].startswith("cuda")
    if nvidia and row["registers"] > register_limit(row):
        found.append(f"{row['registers']} registers, at most {register_limit(row)}")
    for kind, parts in zip(("loads", "stores"), operand_bytes(row)):
        # One 128-bit access for each 16 bytes that a thread has of an operand, and one of 64 bits
        # for its 8 single bytes: an operand that is accessed more narrowly is missing in this count.
        needed = sum(elements_per_thread(row) * n // 16 for n in parts if n > 1)
        if row[f"wide_{kind}"] != needed:
            found.append(f"{row[f'wide_{kind}']} 128-bit {kind} where {needed} are needed: not vectorised")
        if not nvidia:
            continue
        halves, half_wide = parts.count(1), row[f"half_wide_{kind}"]
        if half_wide != halves:
            found.append(f"{half_wide} 64-bit {kind} of bytes where {halves} are needed")
        # The tail's elements, and an exponent for each of a thread's blocks.
        needed = halves + (4 if row["state"] == "8bit" else 0)
        if row[f"byte_{kind}"] != needed:
            found.append(f"{row[f'byte_{kind}']} byte {kind} where {needed} are needed")
    keeps = row["nan_keeping_max"] or row["param"] == "fp64" or row["target"] == "cuda:75"  # which have none
    if row["rule"] == "adamaxw" and nvidia and not keeps:
        found.append("no max that keeps NaN")
    return found


HEADS = ["kernel", "operands", "registers", "spilled", "loads", "stores", "B/element", "instr/element",
         "predicted"]  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row of the table."""
    accesses = [" ".join(f"{n}x{width}B" for width, n in row[k].items()) for k in ("loads", "stores")]
    keys = ("bytes_per_element", "instructions_per_element", "share_of_triad")
    numbers = [str(row.get(key, "")) for key in keys]
    name = f"{row['compiler'].split()[0]} {row['rule'] or row['kernel']}"
    operands = " ".join(filter(None, (row["param"], row["grad"], row["state"])))
    return [name, operands, str(row["registers"]), str(row["spill_bytes"]), *accesses, *numbers]
