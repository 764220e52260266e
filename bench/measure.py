"""Run cases, each in its own process, in turns, and reduce what they say to figures.

All the processes of a comparison are there at once, and only one of them works at a time:
each is asked for a few runs, in an order drawn anew each round. A machine that gets slower
for a while is slower for all.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from . import environment
from .providers import providers
from .roof import ROOFS, Roof, streams_for
from .worker import Case, Failed, Ready, Setting, serve
from .workloads import Workload, fitted

Record = dict[str, Any]
"""One line of the results: a case, and its figures or why there are none."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: turns of each provider.
        turn: seconds that a turn should take at least, in runs of the same process.
        most: seconds of one provider in one comparison, at least three runs.
        timeout: seconds after which a process that does not answer is ended.
    """

    rounds: int = 9
    turn: float = 0.05
    most: float = 10.0
    timeout: float = 300.0


QUICK = Effort(rounds=7, turn=0.02, most=1.0)
AT_ONCE = max(1, (os.cpu_count() or 1) // 4)
"""Processes that are made and checked together; they are measured one at a time."""


def _context() -> Any:
    """Processes that begin with torch imported and nothing started: half a second each rather
    than several. Where there is no fork, they import it themselves."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.preload"])
    return context


class Worker:
    """A case's process."""

    def __init__(self, case: Case, setting: Setting, timeout: float) -> None:
        self.case, self.timeout = case, timeout
        context = _context()
        self.pipe: Connection
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(case, setting, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.said: Any = None
        self.values: list[float] = []
        self.shares: list[float] = []
        self.spent = 0.0

    def wait(self) -> Any:
        """What it says when it is ready, or why it is not."""
        self.said = self._answer()
        return self.said

    def _answer(self) -> Any:
        try:
            if self.pipe.poll(self.timeout):
                return self.pipe.recv()
            return Failed("error", f"no answer in {self.timeout:.0f} s")
        except (EOFError, OSError):
            self.process.join(5)
            return Failed("error", f"its process ended with exit code {self.process.exitcode}")

    def run(self, n: int) -> None:
        """Ask for ``n`` more values."""
        begin = time.monotonic()
        try:
            self.pipe.send(n)
            answer = self._answer()
        except OSError as error:
            answer = Failed("error", f"its process is gone: {error}")
        self.spent += time.monotonic() - begin
        if isinstance(answer, Failed):
            self.said = answer
            return
        values, shares = answer
        self.values += values
        self.shares += shares or []

    def stop(self) -> None:
        try:
            self.pipe.send(None)
        except OSError:
            pass
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()


def quantile(values: Sequence[float], q: float) -> float:
    """The value below which a share ``q`` lies, between neighbours where it falls between."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def figures(values: Sequence[float]) -> Record:
    """Median, 20th and 80th percentile."""
    return {
        "median": statistics.median(values),
        "p20": quantile(values, 0.2),
        "p80": quantile(values, 0.8),
        "runs": len(values),
    }


UNITS = {"memory": "bytes/parameter", "launches": "launches"}
"""Of a measure's values; of all others, milliseconds."""


def head(case: Case) -> Record:
    """What a record says of its case."""
    provider = {**ROOFS, **providers(case.extra)}[case.provider]
    return {
        "measure": case.measure,
        "workload": case.workload.name,
        "title": case.workload.title,
        "tensors": len(case.workload.shapes),
        "parameters": case.workload.numel,
        "groups": case.workload.groups,
        "dtype": case.dtype,
        "device": case.device,
        "provider": case.provider,
        "rule": provider.rule,
        "backend": provider.backend,
        "format": provider.format,
        "layout": provider.layout,
        "roof": isinstance(provider, Roof),
        "unit": UNITS.get(case.measure, "ms"),
    }


def record_of(worker: Worker, ready: Ready | None) -> Record:
    """A worker's line."""
    line = head(worker.case)
    if isinstance(worker.said, Failed):
        return {**line, "status": worker.said.status, "why": worker.said.why}
    assert ready is not None
    line |= {"status": "measured", "checked": ready.checked, **figures(worker.values)}
    line["bytes_per_parameter"] = ready.bytes_per_param
    line["state_bytes_per_parameter"] = ready.state_bytes_per_param
    if worker.shares:
        line["optimizer_share"] = statistics.median(worker.shares) / line["median"]
        line["optimizer_ms"] = statistics.median(worker.shares)
    if worker.case.measure == "step":
        line["bytes_moved"] = ready.bytes_moved
        line["gb_per_s"] = ready.bytes_moved / line["median"] / 1e6
    return line


def compared(lines: list[Record]) -> list[Record]:
    """The same lines, with the fraction that each reaches of the roof's speed, and how many times
    as fast as the fastest peer each is. The roof is the loop with states of the same size."""
    speeds = {r["provider"]: r["gb_per_s"] for r in lines if r["roof"] and "gb_per_s" in r}
    peers = [r for r in lines if not r["roof"] and not r["rule"] and "median" in r]
    best = min((r["median"] for r in peers), default=None)
    for line in lines:
        if "median" not in line or line["roof"]:
            continue
        if "gb_per_s" in line:
            roof = speeds.get(streams_for(line["state_bytes_per_parameter"]).name)
            if roof is not None:
                line["of_roof"] = line["gb_per_s"] / roof
        if line["rule"] and best is not None and line["unit"] == "ms":
            line["times_fastest_peer"] = best / line["median"]
    return lines


def memory_needed(case: Case) -> int:
    """Bytes of a worker, generously: parameter, gradient, states, and as much again that some
    peers take for a moment."""
    element = 4 if case.dtype == "float32" else 2
    return case.workload.numel * (2 * element + 16) + 300 * 2**20


def waves(cases: Iterable[Case], free: int) -> list[list[Case]]:
    """Cases in lots that fit into memory together."""
    lots: list[list[Case]] = [[]]
    used = 0
    for case in cases:
        need = memory_needed(case)
        if lots[-1] and used + need > free:
            lots.append([])
            used = 0
        lots[-1].append(case)
        used += need
    return lots


def interleave(workers: list[Worker], effort: Effort, say: Say, rng: random.Random) -> None:
    """Let workers run in turns until each has had its rounds or its time."""
    for i in range(effort.rounds):
        running = [w for w in workers if not isinstance(w.said, Failed)]
        rng.shuffle(running)
        for worker in running:
            if worker.spent > effort.most and len(worker.values) >= 3:
                continue
            n = 1
            if worker.values and worker.case.measure not in ("memory", "launches"):
                n = max(1, min(20, int(1e3 * effort.turn / max(statistics.median(worker.values), 1e-3))))
            say(f"{worker.case.workload.name} {worker.case.dtype}: round {i + 1}, {worker.case.provider}")
            worker.run(n)


def compare_cases(
    cases: Sequence[Case], effort: Effort, setting: Setting, say: Say = lambda _: None
) -> list[Record]:
    """Measure cases of one comparison against each other."""
    if not cases:
        return []
    lines: list[Record] = []
    for lot in waves(cases, int(0.7 * environment.memory(cases[0].device))):
        workers: list[Worker] = []
        try:
            ready: dict[str, Ready] = {}
            for i in range(0, len(lot), AT_ONCE):
                started = [Worker(case, setting, effort.timeout) for case in lot[i : i + AT_ONCE]]
                workers += started
                for worker in started:
                    case = worker.case
                    say(f"{case.workload.name} {case.dtype}: checking {case.provider}")
                    said = worker.wait()
                    if isinstance(said, Ready):
                        ready[case.provider] = said
            interleave(workers, effort, say, random.Random(0))
            lines += [record_of(worker, ready.get(worker.case.provider)) for worker in workers]
        finally:
            for worker in workers:
                worker.stop()
    return compared(lines)


def first_steps(case: Case, effort: Effort, setting: Setting, say: Say = lambda _: None) -> Record:
    """The first step of a process, with empty and then with filled compile caches."""
    say(f"{case.workload.name} {case.dtype}: first step of {case.provider}")
    check = Worker(replace(case, measure="step"), setting, effort.timeout)
    check.wait()
    check.stop()
    line = {**head(case), "status": "measured"}
    if isinstance(check.said, Failed):
        return {**line, "status": check.said.status, "why": check.said.why}
    line["checked"] = check.said.checked
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: f"{folder}/{name}" for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        own_caches = replace(setting, environment={**setting.environment, **caches})
        for key in ("median", "cached_ms"):
            worker = Worker(case, own_caches, effort.timeout)
            worker.wait()
            worker.stop()
            if isinstance(worker.said, Failed):
                return {**head(case), "status": worker.said.status, "why": worker.said.why}
            (line[key], line["second_ms"]), _ = worker.said
    return line


def size_for(full: Workload, device: str) -> Workload:
    """A workload that leaves room for a few processes beside it."""
    return fitted(full, int(0.15 * environment.memory(device)) // 24)


def default_threads() -> int:
    return torch.get_num_threads()
