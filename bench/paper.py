"""What the compiled kernels can reach on a GPU, on paper: computed from counts of instructions and
registers and from the numbers below; nothing is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .kernels import Row, elements_per_thread, operand_bytes
from .report import markdown


@dataclass(frozen=True)
class Gpu:
    """Published numbers: multiprocessors, bytes a second, and boost clock in Hz."""

    target: str
    multiprocessors: int
    bandwidth: float
    clock: float


GPUS = {
    "A100 80 GB": Gpu("cuda:80", 108, 2.04e12, 1.41e9),
    "H100 SXM": Gpu("cuda:90", 132, 3.35e12, 1.755e9),
    "H200 SXM": Gpu("cuda:90", 132, 4.8e12, 1.755e9),
    "B200": Gpu("cuda:100", 148, 8.0e12, 1.85e9),
}
TRIAD = 0.92
"""Assumed: the share of the published bandwidth that a triad reaches."""
ISSUE = 0.7
"""Assumed: the share of its slots that a multiprocessor issues in, over dependent chains of divisions."""
WAIT = 800e-9
"""Assumed, seconds: a read from memory under load; and as much for the reads of the table before it."""
SLOTS = 128
"""Instructions of all lanes that a multiprocessor issues in a clock, at best."""
NVCC_CHUNK = 4096
"""``kChunk`` of ``csrc/cuda_body.h``."""
SHOWN = (
    ("fp32", "fp32", "fp32"),
    ("bf16", "bf16", "bf16"),
    ("split16", "bf16", "bf16"),
    ("fp32", "fp32", "8bit"),
    ("split8", "bf16", "8bit"),
    ("bf16_stochastic", "bf16", "8bit"),
)


def blocks(row: Row) -> int:
    """That a multiprocessor holds at once, as registers and threads limit them."""
    registers = -(-row["registers"] // 8) * 8
    return int(min(2048 // row["threads"], 65536 // (registers * row["threads"])))


def share_of_triad(row: Row, gpu: Gpu) -> float:
    """The least of 1, the memory's time over the time to issue, and the bandwidth that resident blocks
    reach which only wait."""
    n = elements_per_thread(row)
    chunk = NVCC_CHUNK if row["compiler"] == "nvcc" else row["threads"] * n
    passes = chunk // (row["threads"] * n)
    moved = sum(map(sum, operand_bytes(row)))
    triad = TRIAD * gpu.bandwidth / gpu.multiprocessors
    issued = row["path"]["all"] / n + row["path"]["before"] / (n * passes)
    issue = issued / SLOTS / gpu.clock / ISSUE
    waiting = blocks(row) * chunk * moved / ((1 + passes) * WAIT)
    return min(1.0, moved / triad / issue, waiting / triad)


def table(rows: Sequence[dict[str, Any]], compiler: str) -> str:
    """Predicted shares of the triad's speed, and in brackets how many times as fast as float32."""
    steps = [r for r in rows if r["compiler"].startswith(compiler) and r.get("path")]
    known = {(r["target"], r["rule"], r["param"], r["grad"], r["state"]): r for r in steps}
    lines = []
    for formats in SHOWN:
        for rule in dict.fromkeys(r["rule"] for r in steps):
            cells, moved = [], 0
            for gpu in GPUS.values():
                row, plain = (known.get((gpu.target, rule, *f)) for f in (formats, SHOWN[0]))
                if row is None or plain is None:
                    cells.append("-")
                    continue
                moved, before = (sum(map(sum, operand_bytes(r))) for r in (row, plain))
                share = share_of_triad(row, gpu)
                times = share / moved * before / share_of_triad(plain, gpu)
                cells.append(f"{share:.2f} ({times:.2f}x)")
            lines.append([", ".join(formats), rule, str(moved), *cells])
    return markdown(["parameter, gradient, states", "rule", "B", *GPUS], lines)
