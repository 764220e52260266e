"""Time providers, each in its own process, in turns, and reduce their times to figures.

All processes of a comparison are there at once, and only one works at a time: each is asked for a few
steps, in an order drawn anew each round. A machine that gets slower for a while is slower for all.
"""

import multiprocessing
import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .environment import free_memory
from .providers import TORCH
from .roofline import roofline_for
from .worker import PROVIDERS, Case, failure, prepare, run

Record = dict[str, Any]
"""One line of the results: a case, and its figures or why there are none."""


@dataclass(frozen=True)
class Effort:
    """How long to measure: turns of each provider, seconds and steps that a turn has at most, seconds of one
    provider in one comparison (after three steps), and seconds that an answer may take."""

    rounds: int = 9
    turn: float = 0.05
    steps: int = 20
    most: float = 1.5
    timeout: float = 300.0


def _context() -> Any:
    """Processes forked from one that has imported torch, which takes seconds, and started nothing. It has not
    imported fused_optim: the CPU backend of a forked child steps with one thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo"])
    return context


class Worker:
    """A case's process, checked and ready or with a reason why not."""

    def __init__(self, case: Case, effort: Effort, times: list[float] | None = None) -> None:
        """``times``: of this case's processes before, to which this one's are added."""
        self.case, self.effort = case, effort
        self.pool = ProcessPoolExecutor(1, mp_context=_context())
        self.pid = self.pool.submit(os.getpid).result()
        self.times = [] if times is None else times
        self.spent = 0.0
        self.said: Record = {"status": "measured"}
        self.said = self._ask(prepare, case) or self.said

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function says there; None if it fails."""
        try:
            return self.pool.submit(function, *arguments).result(self.effort.timeout)
        except Exception as error:  # noqa: BLE001 (a peer may raise anything; the others are measured)
            self.said = failure(error)

    @property
    def well(self) -> bool:
        return bool(self.said["status"] == "measured")

    def take_turn(self) -> None:
        if self.well and (self.spent < self.effort.most or len(self.times) < 3):
            typical = statistics.median(self.times) if self.times else 1e9
            n = max(1, min(self.effort.steps, int(1e3 * self.effort.turn / max(typical, 1e-3))))
            begin = time.monotonic()
            self.times += self._ask(run, n) or []  # none if it fails
            self.spent += time.monotonic() - begin

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.pool.shutdown()


def figures(times: Sequence[float]) -> Record:
    """Median, 20th and 80th percentile."""
    cuts = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else [*times] * 4
    return {"median": statistics.median(times), "p20": cuts[0], "p80": cuts[3], "runs": len(times)}


def head(case: Case) -> Record:
    """What a record says of its case."""
    provider, load = PROVIDERS[case.provider], case.workload
    return {
        "measure": case.measure, "workload": load.name, "title": load.title, "tensors": len(load.shapes),
        "parameters": load.numel, "dtype": case.dtype, "device": case.device, "provider": case.provider,
        "loop": provider.loop, **{k: getattr(provider, k) for k in ("rule", "backend", "format", "layout")},
    }  # fmt: skip


def lots(cases: Sequence[Case]) -> list[list[Case]]:
    """Cases in lots whose parameters, gradients and states fit into memory together, those of one algorithm
    one after another, AdamW's first. Each lot has the loops."""
    loops = [case for case in cases if PROVIDERS[case.provider].loop]
    others = [case for case in cases if not PROVIDERS[case.provider].loop]
    others.sort(key=lambda case: PROVIDERS[case.provider].algorithm, reverse=True)
    element = 4 if cases[0].dtype == "float32" else 2
    each = cases[0].workload.numel * (2 * element + 8) + 300 * 2**20
    # What some peers take for a moment is taken by one at a time.
    at_once = max(1, int(0.7 * free_memory(cases[0].device) / each) - len(loops))
    return [[*loops, *others[i : i + at_once]] for i in range(0, max(1, len(others)), at_once)]


def compare(cases: Sequence[Case], effort: Effort, starts: int = 1) -> list[Record]:
    """Measure cases of one comparison against each other. With several ``starts`` each case has as many
    processes, one after another: the pages of memory that one gets make 10% of a large step, and once 40%."""
    lines: dict[str, Record] = {}
    rng = random.Random(0)
    for lot in lots(cases) if cases else []:
        times: dict[str, list[float]] = {case.provider: [] for case in lot}
        for _ in range(starts):
            workers: list[Worker] = []
            try:
                for case in rng.sample(lot, len(lot)):  # else the same would always get the better pages
                    workers.append(Worker(case, effort, times[case.provider]))
                for _ in range(effort.rounds):
                    rng.shuffle(workers)
                    for worker in workers:
                        worker.take_turn()
            finally:
                for worker in workers:
                    worker.stop()
        found = {w.case.provider: record(w) for w in workers}
        for line in found.values():
            loop = found.get(roofline_for(line.get("state_bytes_each", 0)), {})
            if not line["loop"] and "gb_per_s" in line and "gb_per_s" in loop:
                line["of_roofline"] = line["gb_per_s"] / loop["gb_per_s"]
        lines = {**found, **lines}
    torch = lines.get(TORCH, {}).get("median")
    for line in lines.values():
        if line["rule"] and "median" in line and torch:
            line["times_torch"] = torch / line["median"]
    return list(lines.values())


def record(worker: Worker) -> Record:
    line = {**head(worker.case), **worker.said}
    if worker.well:
        line |= figures(worker.times)
        if worker.case.measure == "step":
            line["gb_per_s"] = line["bytes_moved"] / line["median"] / 1e6
    return line
