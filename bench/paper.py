"""What the compiled kernels can reach on paper, without a GPU.

    python -m bench kernels --out bench_output
    python -m bench.paper bench_output/kernels_cuda_*.json > tables.md
    python -m bench.paper bench_output/kernels_cuda_*.json --document docs/performance.md

Everything here is computed from counts of instructions and registers and from the numbers in
GPUS, and nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Gpu:
    """Published numbers."""

    name: str
    target: str
    multiprocessors: int
    bandwidth: float
    """Bytes a second."""
    clock: float
    """Hz, boost."""
    fma_lanes: int
    """float32 multiply-adds of a multiprocessor in a clock."""


GPUS = (
    Gpu("A100 80 GB", "cuda:80", 108, 2.04e12, 1.41e9, 64),
    Gpu("H100 SXM", "cuda:90", 132, 3.35e12, 1.755e9, 128),
    Gpu("H200 SXM", "cuda:90", 132, 4.8e12, 1.755e9, 128),
    Gpu("B200", "cuda:100", 148, 8.0e12, 1.85e9, 128),
)
REACHED = 0.92
"""Assumed: the share of the published bandwidth that a triad reaches."""
ISSUE = 0.7
"""Assumed: the share of its slots that a multiprocessor issues in, over dependent chains of divisions."""
LATENCY = 800e-9
"""Assumed, seconds: of a read from memory under load."""
TABLE = 800e-9
"""Assumed, seconds: from a block's start to its first read of a tensor; four reads after one another,
mostly of L2."""
LANES = {"all": 128, "alu": 64, "imad": 64, "special": 16}
"""Of a multiprocessor in a clock; those of ``fma`` differ."""

PARTS = {
    "fp32": 4, "fp64": 8, "bf16": 2, "fp16": 2, "bf16_master": 6, "fp16_master": 6, "split16": 4, "split8": 3,
    "bf16_stochastic": 2, "fp16_stochastic": 2, "bf16_dither": 2,
    "e4m3": 1 + 1 / 128, "e5m3": 1 + 1 / 128, "8bit": 1 + 1 / 128,
}  # fmt: skip
"""Bytes of an element by format."""
TABLE_BYTES = 80 + 8 + 64
"""A row, a chunk and the coefficients that each program reads: float32."""
NVCC_CHUNK = 4096
"""``kChunk`` of ``csrc/cuda_body.h``."""


def state(row: Row) -> str:
    """Of a report's row: "fp32", "bf16" or "8bit"."""
    first = row["state"].split()[0]
    return {"bf16_dither": "bf16", "e4m3": "8bit"}.get(first, first)


def neighbours(row: Row) -> int:
    """Elements that a thread has at once."""
    sizes = [PARTS[row["param"]], PARTS[row["grad"]], PARTS[state(row)]]
    narrow = row["param"] not in ("fp32", "fp64") or min(sizes) < 4
    return 2 if row["param"] == "fp64" else 8 if narrow else 4


def blocks(row: Row) -> int:
    """That a multiprocessor holds at once, as registers and threads limit them."""
    registers = -(-row["registers"] // 8) * 8
    return min(2048 // row["threads"], 65536 // (registers * row["threads"]))


@dataclass(frozen=True)
class Prediction:
    """Of one kernel on one GPU."""

    bytes_per_element: float
    in_flight: float
    """Bytes of a multiprocessor, when every block waits for its operands."""
    needed: float
    """Bytes in flight that hide LATENCY (Little's law)."""
    instructions: float
    """Of an element, those before the first operand included."""
    busiest: str
    memory: float
    """Seconds of an element at the roof."""
    issue: float
    """Seconds of an element in the busiest unit at ISSUE of its rate."""
    table_share: float
    lifetime_share: float
    """The bandwidth that blocks reach which only wait, over the roof."""

    @property
    def share(self) -> float:
        """Of the roof."""
        return min(1.0, self.memory / self.issue, self.lifetime_share)


def predict(row: Row, gpu: Gpu) -> Prediction:
    path, n = row["path"], neighbours(row)
    chunk = row["threads"] * n if row["compiler"].startswith("triton") else NVCC_CHUNK
    passes = chunk // (row["threads"] * n)
    p, g, s = PARTS[row["param"]], PARTS[row["grad"]], PARTS[state(row)]
    loaded, moved = p + g + 2 * s, 2 * p + g + 4 * s
    roof = REACHED * gpu.bandwidth / gpu.multiprocessors  # of one multiprocessor
    lanes = LANES | {"fma": gpu.fma_lanes}
    each = {unit: path[unit] / n for unit in lanes}
    each["all"] += path["before"] / (n * passes)
    cycles = {unit: each[unit] / lanes[unit] for unit in lanes}
    busiest = max(cycles, key=lambda unit: cycles[unit])
    issue = cycles[busiest] / gpu.clock / ISSUE
    held = blocks(row)
    lifetime = TABLE + passes * LATENCY + held * chunk * issue
    return Prediction(
        moved, held * row["threads"] * n * loaded, roof * LATENCY, each["all"], busiest, moved / roof, issue,
        TABLE_BYTES / (chunk * moved), held * chunk * moved / (lifetime - held * chunk * issue) / roof,
    )  # fmt: skip


SHOWN = (
    ("fp32", "fp32", "fp32"),
    ("bf16", "bf16", "fp32"),
    ("split16", "bf16", "fp32"),
    ("bf16_stochastic", "bf16", "fp32"),
    ("fp32", "fp32", "bf16"),
    ("split16", "bf16", "bf16"),
    ("bf16", "bf16", "bf16"),
    ("fp32", "fp32", "8bit"),
    ("split8", "bf16", "8bit"),
    ("bf16_stochastic", "bf16", "8bit"),
)


def chosen(rows: Sequence[Row], compiler: str, target: str) -> list[Row]:
    """Those that are shown, in order."""
    rows = [r for r in rows if r["compiler"].startswith(compiler) and r["target"] == target and r.get("path")]
    by_name = {(r["rule"], r["param"], r["grad"], state(r)): r for r in rows if r["kernel"] == "step"}
    rules = ("adabelief", "adabelief_nesterov", "adamaxw")
    return [by_name[(rule, *f)] for f in SHOWN for rule in rules if (rule, *f) in by_name]


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    found = ["| " + " | ".join(line) + " |" for line in [heads, *lines]]
    return "\n".join([found[0], "|" + "---|" * len(heads), *found[1:]])


def formats(row: Row) -> str:
    return f"{row['param']}, {row['grad']}, {state(row)}"


def shares(rows: Sequence[Row], compiler: str) -> str:
    """Predicted shares of the roof."""
    heads = ["parameter, gradient, states", "rule", "B", *(f"{gpu.name}" for gpu in GPUS)]
    per_gpu = [{(formats(r), r["rule"]): r for r in chosen(rows, compiler, gpu.target)} for gpu in GPUS]
    lines = []
    for key in dict.fromkeys(key for gpu in per_gpu for key in gpu):
        row = next(gpu[key] for gpu in per_gpu if key in gpu)
        cells = []
        for gpu, known in zip(GPUS, per_gpu):
            if key not in known:
                cells.append("-")
                continue
            x, fp32 = predict(known[key], gpu), known.get(("fp32, fp32, fp32", key[1]))
            ratio = ""
            if fp32 is not None and key[0] != "fp32, fp32, fp32":
                y = predict(fp32, gpu)
                ratio = f" ({y.memory / y.share / (x.memory / x.share):.2f}x)"
            cells.append(f"{x.share:.2f}{ratio}")
        lines.append([*key, f"{predict(row, GPUS[1]).bytes_per_element:.1f}", *cells])
    return table(heads, lines)


def counts(rows: Sequence[Row], compiler: str, gpu: Gpu) -> str:
    """What the predictions are made of."""
    heads = (
        "parameter, gradient, states", "rule", "registers", "blocks", "KiB in flight", "over needed",
        "instructions", "alu", "fma", "special", "busiest", "table/data",
    )  # fmt: skip
    lines = []
    for row in chosen(rows, compiler, gpu.target):
        if row["rule"] == "adabelief_nesterov":
            continue
        x, n = predict(row, gpu), neighbours(row)
        units = [f"{row['path'][unit] / n:.0f}" for unit in ("alu", "fma", "special")]
        lines.append(
            [
                formats(row),
                row["rule"],
                str(row["registers"]),
                str(blocks(row)),
                f"{x.in_flight / 1024:.0f}",
                f"{x.in_flight / x.needed:.1f}x",
                f"{x.instructions:.0f}",
                *units,
                {"all": "issue"}.get(x.busiest, x.busiest),
                f"{x.table_share:.1%}",
            ]
        )
    return table(heads, lines)


def roofs() -> str:
    """What a kernel may take."""
    heads = ("GPU", "multiprocessors", "TB/s", "GHz", "roof, B/clock", "KiB in flight needed",
             "instructions a byte at 100%", f"at {ISSUE:.0%}")  # fmt: skip
    lines = []
    for gpu in GPUS:
        roof = REACHED * gpu.bandwidth / gpu.multiprocessors
        slots = 128 * gpu.clock / roof
        lines.append(
            [
                gpu.name,
                str(gpu.multiprocessors),
                f"{gpu.bandwidth / 1e12:.2f}",
                f"{gpu.clock / 1e9:.2f}",
                f"{roof / gpu.clock:.1f}",
                f"{roof * LATENCY / 1024:.0f}",
                f"{slots:.1f}",
                f"{ISSUE * slots:.1f}",
            ]
        )
    return table(heads, lines)


def small(rows: Sequence[Row], tensors: int = 10_000) -> str:
    """Waves of programs of that many small float32 tensors, and what they wait."""
    heads = ("GPU", "backend", "programs at once", "waves", "us")
    lines = []
    for gpu in GPUS:
        for compiler in ("triton", "nvcc"):
            for row in chosen(rows, compiler, gpu.target)[:1]:
                at_once = blocks(row) * gpu.multiprocessors
                waves = -(-tensors // at_once)
                time = waves * (TABLE + LATENCY)
                lines.append([gpu.name, compiler, str(at_once), str(waves), f"{time * 1e6:.0f}"])
    return table(heads, lines)


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """Every table by its name in the document."""
    found = {"roofs": roofs(), "small": small(rows)}
    for compiler in ("triton", "nvcc"):
        found[f"shares-{compiler}"] = shares(rows, compiler)
        for gpu in (GPUS[0], GPUS[2], GPUS[3]):
            found[f"counts-{compiler}-{gpu.target.split(':')[1]}"] = counts(rows, compiler, gpu)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reports", nargs="+", type=Path, help="kernels_cuda_*.json")
    parser.add_argument("--document", type=Path, help="put the tables between its <!-- paper NAME --> marks")
    arguments = parser.parse_args()
    found = tables([row for path in arguments.reports for row in json.loads(path.read_text())["kernels"]])
    if arguments.document is None:
        for name, text in found.items():
            print(f"{name}\n\n{text}\n")
        return
    document = arguments.document.read_text()
    for name, text in found.items():
        marks = rf"(<!-- paper {name} -->\n).*?(<!-- /paper -->)"
        document = re.sub(marks, lambda m, text=text: f"{m[1]}\n{text}\n\n{m[2]}", document, flags=re.DOTALL)
    arguments.document.write_text(document)


if __name__ == "__main__":
    main()
