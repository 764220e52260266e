"""What is compared with what."""

import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from .environment import free_memory
from .formats import OPTIONS
from .host import HOST_VARIANTS
from .measure import Effort, Record, Worker, compare, head, record
from .providers import DEEPSPEED, LAYOUTS, OUR_RULES, OURS, PEERS, TORCH, Provider
from .roofline import ROOFLINES
from .worker import Case
from .workloads import BUSY, CONDITIONS, fitted, workload

FAST_PEERS = (TORCH, DEEPSPEED)


@dataclass(frozen=True)
class Comparison:
    """Providers on one workload. ``formats``, ``layouts`` and ``rules`` are those of ours; ``peers`` names, or
    None for all; ``only``: parts of names, one of which a provider must have if there are any; ``starts``: of
    processes, see :func:`.measure.compare`."""

    workload: str
    dtype: str = "float32"
    formats: tuple[str, ...] = ("fp32",)
    layouts: tuple[str, ...] = ("list",)
    peers: tuple[str, ...] | None = None
    measure: str = "step"
    only: tuple[str, ...] = ()
    rules: tuple[str, ...] = tuple(OUR_RULES)
    starts: int = 1

    def providers(self) -> list[Provider]:
        ours = [p for p in OURS if p.format in self.formats and p.layout in self.layouts]
        ours = [p for p in ours if p.rule in self.rules]
        # eager is the judge and slow by purpose: only where it is asked for.
        ours = [p for p in ours if p.backend != "eager" or any("eager" in text for text in self.only)]
        peers = [p for p in PEERS if self.peers is None or p.name in self.peers]
        chosen = [p for p in (*ours, *peers) if not self.only or any(text in p.name for text in self.only)]
        if self.measure == "host":
            return [*HOST_VARIANTS, *chosen]
        of_float32 = self.formats == ("fp32",) and self.peers is not None
        return [*([ROOFLINES[4]] if of_float32 else ROOFLINES.values()), *chosen]

    def run(self, device: str, effort: Effort) -> list[Record]:
        """Measure; a record for what cannot be measured here, too."""
        most = min(2**27 if device == "cpu" else 2**31, free_memory(device) // 40)
        load = fitted(workload(self.workload), most)
        cases, absent = [], []
        for provider in self.providers():
            case = Case(load, self.dtype, device, provider.name, self.measure)
            why_not = provider.why_not(device, self.dtype, len(load.shapes))
            if why_not is None:
                cases.append(case)
            elif self.dtype in provider.dtypes and device in provider.devices:
                absent.append({**head(case), "status": "absent", "why": why_not})
        return compare(cases, effort, self.starts) + absent


_HOST = Comparison("1x1", layouts=LAYOUTS, peers=(TORCH,), measure="host")
HOST = (_HOST, replace(_HOST, workload="148x1"), replace(_HOST, workload="1000x1"))


def everything(device: str) -> list[Comparison]:
    """What ``all`` measures: what matters most comes first."""
    large, formats = "2^28" if device == "cuda" else "2^26", tuple(OPTIONS)
    main = [
        Comparison(large, peers=FAST_PEERS, starts=3),
        Comparison("gpt2", layouts=LAYOUTS, peers=FAST_PEERS, starts=3),
        Comparison("10000x64", layouts=LAYOUTS, peers=FAST_PEERS),
        Comparison("500-groups", peers=FAST_PEERS),
    ]
    return [
        *main,
        *HOST,
        *(Comparison(n, peers=FAST_PEERS) for n in ("2^16", "2^20", "10x64", "100x64", "1000x64")),
        Comparison("lora", layouts=LAYOUTS, peers=FAST_PEERS),
        Comparison("llama-7b", layouts=LAYOUTS, peers=FAST_PEERS, starts=3),
        Comparison("2^24", formats=formats),  # with all peers, of which some take seconds for a large step
        replace(main[0], dtype="bfloat16", formats=formats),
        *(replace(c, dtype="bfloat16", formats=("bf16",)) for c in main[1:]),
    ]


@contextmanager
def spinning(processes: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that use a core each; they go away with the block."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def _signal(processes: list[subprocess.Popen[bytes]], what: int) -> None:
    for process in processes:
        process.send_signal(what)


def beside(processes: int, device: str, effort: Effort) -> list[Record]:
    """Steps of 291 small tensors with quiet cores, and with ``processes`` spinning ones beside it, in turns."""
    backend = "cpu" if device == "cpu" else "triton"
    names = [p.name for p in OURS if (p.backend, p.format) == (backend, "fp32")]
    records = []
    with spinning(processes) as others:
        for name in (*names, TORCH):
            worker = Worker(Case(workload("291x64"), "float32", device, name, "host"), effort)
            quiet, busy = [], []
            for _ in range(8 if worker.well else 0):
                for times, what in ((quiet, signal.SIGSTOP), (busy, signal.SIGCONT)):
                    _signal(others, what)
                    times += worker.run(100)
            worker.stop()
            line = {**head(worker.case), **worker.said, "measure": "busy", "processes": processes}
            if busy:
                line |= {"quiet": statistics.median(quiet), "median": statistics.median(busy)}
                line["p99"] = statistics.quantiles(busy, n=100)[98]
                line |= {f"{name}_of_quiet": line[name] / line["quiet"] for name in ("median", "p99")}
            records.append(line)
    return records


def cliffs(size: str, effort: Effort) -> list[Record]:
    """Each of our CPU steps of one tensor in every condition, in turns; and of one huge and many tiny ones."""
    loads = [workload(f"{size}:{condition}" if condition else size) for condition in CONDITIONS]
    records = []
    for provider in (p for p in OURS if (p.backend, p.format, p.layout) == ("cpu", "fp32", "list")):
        with spinning(os.cpu_count() or 1) as others:
            workers = []
            for load in (*loads, workload("huge-and-tiny")):
                _signal(others, signal.SIGSTOP)
                workers.append(Worker(Case(load, "float32", "cpu", provider.name), effort))
            for _ in range(effort.rounds):
                for worker in filter(lambda w: w.well, workers):
                    _signal(others, signal.SIGCONT if worker.case.workload.condition == BUSY else signal.SIGSTOP)
                    worker.take_turn()
            for worker in workers:
                worker.stop()
        lines = [record(worker) for worker in workers]
        for line in lines:
            line |= {"title": f"{provider.name}, {loads[0].title}", "provider": line["title"], "measure": "cliffs"}
            if "median" in line and "median" in lines[0]:
                line["of_ordinary"] = line["median"] / lines[0]["median"]
        records += lines
    return records
