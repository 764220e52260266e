"""What is compared with what."""

import os
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
    """Providers on one workload. ``formats``, ``layouts`` and ``rules`` are those of ours; ``peers`` names,
    or None for all; ``only``: parts of names, one of which a provider must have if there are any; ``starts``:
    of processes, see :func:`.measure.compare`."""

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
        peers = [p for p in PEERS if self.peers is None or p.name in self.peers]
        chosen = [p for p in (*ours, *peers) if not self.only or any(text in p.name for text in self.only)]
        if self.measure == "host":
            return [*HOST_VARIANTS, *chosen]
        of_float32 = self.formats == ("fp32",) and self.peers is not None
        return [*([ROOFLINES[4]] if of_float32 else ROOFLINES.values()), *chosen]

    def cases(self, device: str, most: int) -> tuple[list[Case], list[Record]]:
        """What can be measured here, with ``most`` elements at most, and a record for each of what cannot."""
        load = fitted(workload(self.workload), most)
        cases, absent = [], []
        for provider in self.providers():
            case = Case(load, self.dtype, device, provider.name, self.measure)
            why_not = provider.why_not(device, self.dtype, len(load.shapes))
            if why_not is None:
                cases.append(case)
            elif self.dtype in provider.dtypes and device in provider.devices:
                absent.append({**head(case), "status": "absent", "why": why_not})
        return cases, absent

    def run(self, device: str, effort: Effort) -> list[Record]:
        most = min(2**27 if device == "cpu" else 2**31, free_memory(device) // 40)
        cases, absent = self.cases(device, most)
        # Steps of some microseconds: of 20 the first ones, whose code is in no cache, are many.
        effort = replace(effort, steps=500) if self.measure == "host" else effort
        return compare(cases, effort, self.starts) + absent


HOST = [Comparison(n, layouts=LAYOUTS, peers=(TORCH,), measure="host") for n in ("1x1", "148x1", "1000x1")]


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
        *(Comparison(n, peers=FAST_PEERS, starts=3) for n in ("2^16", "2^20", "10x64", "100x64", "1000x64")),
        Comparison("lora", layouts=LAYOUTS, peers=FAST_PEERS),
        Comparison("llama-7b", layouts=LAYOUTS, peers=FAST_PEERS, starts=3),
        Comparison("2^24", formats=formats),  # with all peers, of which some take seconds for a large step
        replace(main[0], dtype="bfloat16", formats=formats),
        *(replace(c, dtype="bfloat16", formats=("bf16",)) for c in main[1:]),
    ]


@contextmanager
def spinning(processes: int) -> Iterator[None]:
    """Processes that use a core each, until the block ends."""
    with ExitStack() as stack:
        for _ in range(processes):
            process = stack.enter_context(subprocess.Popen(["sh", "-c", "while :; do :; done"]))
            stack.callback(process.kill)
        yield


def in_turns(cases: Sequence[Case], processes: int, effort: Effort) -> list[Record]:
    """A provider's steps of several workloads, those of BUSY beside spinning ``processes``, compared with the
    first."""
    workers = [Worker(case, effort) for case in cases]
    for _ in range(effort.rounds):
        for worker in (w for w in workers if w.well):
            with spinning(processes if worker.case.workload.condition == BUSY else 0):
                worker.take_turn()
    for worker in workers:
        worker.stop()
    lines, title = [record(w) for w in workers], f"{cases[0].provider}, {cases[0].workload.title}"
    for worker, line in zip(workers, lines):
        line |= {"title": title, "provider": line["title"], "measure": "cliffs"}
        if worker.well and workers[0].well:
            p99 = statistics.quantiles(worker.times, n=100, method="inclusive")[98]
            line["of_ordinary"] = line["median"] / lines[0]["median"]
            line["p99_of_ordinary"] = p99 / lines[0]["median"]
    return lines


def cliffs(device: str, effort: Effort) -> list[Record]:
    """Steps of one tensor in every condition, and of one huge and many tiny ones; and the host's time for a
    step of small ones beside more processes than there are cores."""
    backend = "cpu" if device == "cpu" else "triton"
    large = [*(workload(f"2^24:{condition}") for condition in CONDITIONS), workload("huge-and-tiny")]
    small, records = [workload("291x64"), workload(f"291x64:{BUSY}")], []
    ours = [p.name for p in OURS if (p.backend, p.format, p.layout) == (backend, "fp32", "list")]
    for name in (*ours, TORCH):
        cases = [Case(load, "float32", device, name) for load in large]
        records += in_turns(cases, os.cpu_count() or 1, effort)
        cases = [Case(load, "float32", device, name, "host") for load in small]
        records += in_turns(cases, 8, replace(effort, rounds=40))
    return records
