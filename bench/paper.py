"""What the compiled kernels can reach on a GPU, on paper: computed from counts of instructions and
registers and from the numbers below; nothing is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .kernels import Row, elements_per_thread
from .report import markdown


class Gpu(NamedTuple):
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
# Assumed: the share of the published bandwidth that a triad reaches; the share of its 128 slots a clock
# that a multiprocessor issues in, over dependent chains of divisions; and the seconds of a read from memory
# under load, and as much for the reads of the table before it.
TRIAD, ISSUE, WAIT = 0.92, 0.7, 800e-9
NVCC_CHUNK = 4096
"""``kChunk`` of ``csrc/cuda_body.h``."""
SHOWN = (
    ("fp32", "fp32", "fp32"), ("bf16", "bf16", "bf16"), ("split16", "bf16", "bf16"), ("fp32", "fp32", "8bit"),
    ("split8", "bf16", "8bit"), ("bf16_stochastic", "bf16", "8bit"),
)  # fmt: skip


def share_of_triad(row: Row, gpu: Gpu) -> float:
    """The least of 1, the memory's time over the time to issue, and the bandwidth of the resident blocks
    if they only waited."""
    n, threads = elements_per_thread(row), row["threads"]
    chunk = NVCC_CHUNK if row["compiler"] == "nvcc" else threads * n
    passes = chunk // (threads * n)
    moved = row["bytes_per_element"]
    triad = TRIAD * gpu.bandwidth / gpu.multiprocessors
    issued = row["path"]["all"] / n + row["path"]["before"] / (n * passes)
    registers = -(-row["registers"] // 8) * 8
    blocks = min(2048 // threads, 65536 // (registers * threads))
    waiting = blocks * chunk * moved / ((1 + passes) * WAIT)
    return float(min(1.0, moved / triad / (issued / 128 / gpu.clock / ISSUE), waiting / triad))


def table(rows: Sequence[dict[str, Any]], compiler: str) -> str:
    """Predicted shares of the triad's speed, and in brackets how many times as fast as float32."""
    steps = [r for r in rows if r["compiler"].startswith(compiler) and r.get("path")]
    known = {(r["target"], r["rule"], r["param"], r["grad"], r["state"]): r for r in steps}
    lines = []
    for formats in SHOWN:
        for rule in dict.fromkeys(r["rule"] for r in steps):
            cells = []
            for gpu in GPUS.values():
                row, plain = (known.get((gpu.target, rule, *f)) for f in (formats, SHOWN[0]))
                speeds = [share_of_triad(r, gpu) / r["bytes_per_element"] for r in (row, plain) if r]
                if row is None or plain is None:
                    cells.append("-")
                else:
                    cells.append(f"{share_of_triad(row, gpu):.2f} ({speeds[0] / speeds[1]:.2f}x)")
            lines.append([", ".join(formats), rule, *cells])
    return markdown(["parameter, gradient, states", "rule", *GPUS], lines)
