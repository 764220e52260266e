"""What a GPU takes for a step, in one process that goes on alone: peers, and plain reads and writes in turns.

    python -m bench.gpu_measure cuda results.json

The results are written anew after each provider. Without a file a few kernels make one step each, for a
profiler. On "cpu" everything is rehearsed on next to nothing.
"""

import gc
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from . import environment, report
from .measure import Record, figures, head
from .plan import Comparison
from .providers import LAYOUTS, OURS, TORCH
from .worker import LATE, PROVIDERS, Case, Clock, checked_and_made, failure, make_groups, set_count
from .workloads import fitted, workload

FOREACH, FLASH = "torch AdamW foreach", "flashoptim AdamW"
ADAMW, ADABELIEF = ("adamw",), ("adabelief",)
QUESTIONS = (
    Comparison("2^30", peers=(TORCH,), rules=ADAMW + ADABELIEF),
    Comparison("gpt2", layouts=LAYOUTS, peers=(TORCH, FOREACH), rules=ADAMW),
    Comparison("2^30", "bfloat16", ("bf16", "split16", "split8-8bit"), peers=(TORCH, FLASH), rules=ADABELIEF),
    Comparison("llama-7b", "bfloat16", ("bf16",), peers=(TORCH, FLASH), rules=ADAMW),
    Comparison("10000x64", layouts=LAYOUTS, peers=(TORCH, FOREACH), rules=ADAMW),
    Comparison("2^27:zero-rows", peers=(TORCH,), rules=ADAMW),
)
"""What matters most comes first."""


def replay_of(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def answer(case: Case, clock: Clock, rounds: int) -> Record:
    """Time one provider and the triad in turns, then the host until ``step()`` and a replay return."""
    line = head(case)
    try:
        optimizer, said = checked_and_made(case)
        line |= said
        stored = sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
        a, b, c = (torch.zeros(min(stored, 2**31) // 4, device=case.device) for _ in range(3))
        triad, times = list[float](), list[float]()
        for _ in range(3):
            triad += clock(lambda: torch.add(a, b, out=c), max(1, rounds // 3))[0]
            found, host = clock(optimizer.step, max(1, rounds // 3))
            times += found
        line |= figures(times) | {"host_us": 1e3 * figures(host)["median"]}
        line["gb_per_s"] = line["bytes_moved"] / line["median"] / 1e6
        line["triad_gb_per_s"] = 3 * a.numel() * 4 / figures(triad)["median"] / 1e6
        if stored > 2**27:  # below, caches and the launch are most of it
            line["of_roofline"] = line["gb_per_s"] / line["triad_gb_per_s"]
        if case.device == "cuda" and line["rule"]:
            line["replay_us"] = 1e3 * figures(clock(replay_of(optimizer.step), rounds)[1])["median"]
    except Exception as error:  # noqa: BLE001 (a peer may raise anything; the others are measured)
        line |= failure(error)
    return line


def step_each(device: str) -> None:
    """One step of a large tensor by each kernel that is worth a look."""
    load = fitted(workload("2^26"), 2**26 if device == "cuda" else 2**16)
    for ours in (p for p in OURS if (p.rule, p.layout) == ("adabelief", "list")):
        dtype = {"fp32": "float32", "split8-8bit": "bfloat16"}.get(ours.format, "")
        if ours.why_not(device, dtype, 1) is None:
            made = ours.make(make_groups(Case(load, dtype, device, ours.name)))
            made.init_state()
            set_count(made, LATE)
            made.step()


def main(device: str, path: str) -> int:
    """The exit code is 1 if one of ours failed."""
    about, clock, records = environment.describe(device), Clock(device), list[Record]()
    rounds = 21 if device == "cuda" else 3
    for question in QUESTIONS:
        most = environment.free_memory(device) // 20 if device == "cuda" else 2**16
        cases, absent = question.cases(device, most)
        records += absent
        for case in (case for case in cases if not PROVIDERS[case.provider].loop):
            records.append(line := answer(case, clock, rounds))
            known = (k for k in ("median", "of_roofline", "host_us", "replay_us") if k in line)
            print(line["title"], case.dtype, case.provider, line["status"], line.get("why", ""),
                  *(f"{k} {line[k]:.4g}" for k in known), flush=True)  # fmt: skip
            report.write(Path(path), about, records)
            gc.collect()
            with suppress(RuntimeError):
                torch.cuda.empty_cache()
    return int(any(r["rule"] and r["status"] in ("failed check", "error") for r in records))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if sys.argv[2:] else step_each(sys.argv[1]))
