"""What a GPU takes for a step, in one process that goes on alone: peers, and plain reads and writes in turns.

    python -m bench.gpu_measure cuda results.json

A step is timed behind work that keeps the GPU busy until the host is done with it, so that no host time lies
in the interval. The results are written anew after each provider. On "cpu" everything is rehearsed on next
to nothing.
"""

import gc
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from . import environment, report
from .measure import Record, figures, head
from .plan import Comparison
from .providers import LAYOUTS, TORCH, Provider
from .worker import Case, checked_and_made, failure
from .workloads import fitted, workload

BACKENDS = {"cuda": ("triton", "cuda", ""), "cpu": ("cpu", "")}
"""That are measured on a device; "" is a peer's."""
FOREACH, FLASH = "torch AdamW foreach", "flashoptim AdamW"
LOW = ("bf16", "split16", "split8-8bit")
ADAMW, ADABELIEF = ("adamw",), ("adabelief",)
QUESTIONS = (
    Comparison("2^30", peers=(TORCH,), rules=ADAMW + ADABELIEF),
    Comparison("gpt2", layouts=LAYOUTS, peers=(TORCH, FOREACH), rules=ADAMW),
    Comparison("2^30", "bfloat16", LOW, peers=(TORCH, FLASH), rules=ADABELIEF),
    Comparison("llama-7b", "bfloat16", ("bf16",), peers=(TORCH, FLASH), rules=ADAMW),
    Comparison("10000x64", layouts=LAYOUTS, peers=(TORCH, FOREACH), rules=ADAMW),
    Comparison("2^27:zero-rows", peers=(TORCH,), rules=ADAMW),
)
"""What matters most comes first."""


class Clock:
    """Milliseconds of the device's time for what a call of the host starts."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.filler = torch.zeros(2**27 if self.cuda else 2**20, dtype=torch.uint8, device=device)
        self.fill_us = self._time(lambda: self.filler.add_(1), 20)[0] * 1e3

    def _time(self, start: Callable[[], Any], fills: int) -> tuple[float, float]:
        """The time of the device, and of the host."""
        if not self.cuda:
            begin = time.perf_counter()
            start()
            return (took := 1e3 * (time.perf_counter() - begin)), took
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        for _ in range(fills):
            self.filler.add_(1)
        first.record()
        begin = time.perf_counter()
        start()
        host = 1e3 * (time.perf_counter() - begin)
        last.record()
        last.synchronize()
        return first.elapsed_time(last), host

    def __call__(self, start: Callable[[], Any], n: int) -> tuple[list[float], list[float]]:
        """``n`` times of the device and of the host."""
        host = max(self._time(start, 1)[1] for _ in range(2))
        fills = 2 + int(2e3 * host / self.fill_us)  # also evicts from the caches what a step reads
        pairs = [self._time(start, fills) for _ in range(n)]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def replayed(step: Callable[[], Any]) -> Callable[[], Any] | str:
    """The step as a CUDA graph, or why it cannot be captured."""
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
        return graph.replay
    except Exception as error:  # noqa: BLE001 (a peer may raise anything; the others are measured)
        return f"{type(error).__name__}: {error}"[:200]


def answer(question: Comparison, provider: Provider, device: str, clock: Clock, rounds: int) -> Record:
    """Time one provider and the triad in turns, then the host until ``step()`` and a replay return."""
    most = 2**16 if device == "cpu" else int(environment.free_memory(device) // 24)
    case = Case(fitted(workload(question.workload), most), question.dtype, device, provider.name)
    line = head(case)
    if why_not := provider.why_not(device, question.dtype, len(case.workload.shapes)):
        return {**line, "status": "absent", "why": why_not}
    try:
        optimizer, said = checked_and_made(case)
        line |= said
        stored = sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
        a, b, c = (torch.zeros(min(stored, 2**31) // 4, device=device) for _ in range(3))
        triad, times = list[float](), list[float]()
        for _ in range(3):
            triad += clock(lambda: torch.add(a, b, out=c), max(1, rounds // 3))[0]
            found, host = clock(optimizer.step, max(1, rounds // 3))
            times += found
        line |= figures(times) | {"host_us": 1e3 * figures(host)["median"]}
        line["gb_per_s"] = line["bytes_moved"] / line["median"] / 1e6
        line["triad_gb_per_s"] = 3 * a.numel() * 4 / figures(triad)["median"] / 1e6
        line["of_roofline"] = line["gb_per_s"] / line["triad_gb_per_s"]
        if device == "cuda" and provider.rule:
            replay = replayed(optimizer.step)
            line["replay"] = "captured" if callable(replay) else replay
            if callable(replay):
                line["replay_us"] = 1e3 * figures(clock(replay, rounds)[1])["median"]
    except Exception as error:  # noqa: BLE001
        line |= failure(error)
    return line


def main(device: str, path: str) -> int:
    """The exit code is 1 if one of ours failed."""
    about, clock, records = environment.describe(device), Clock(device), list[Record]()
    for question in QUESTIONS:
        for provider in question.providers():
            if provider.loop or device not in provider.devices or provider.backend not in BACKENDS[device]:
                continue
            records.append(line := answer(question, provider, device, clock, 21 if device == "cuda" else 3))
            known = (k for k in ("median", "of_roofline", "host_us", "replay_us") if k in line)
            print(line["title"], question.dtype, provider.name, line["status"], line.get("why", ""),
                  *(f"{k} {line[k]:.4g}" for k in known), flush=True)  # fmt: skip
            report.write(Path(path), about, records)
            gc.collect()
            with suppress(RuntimeError):
                torch.cuda.empty_cache()
    return int(any(r["rule"] and r["status"] in ("failed check", "error") for r in records))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
