"""Which cases make up a command's run: plain data, so that a run without typer has them too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .formats import FORMATS
from .measure import QUICK, Effort, Record, compare_cases, first_steps, head, size_for
from .providers import Provider, providers
from .roof import ROOFS
from .worker import Case, Setting, demo_workload
from .workloads import Workload, workload

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Filter:
    """Which providers: each list empty for all, names by any part of them; ``slow_start`` with
    those that compile for long."""

    providers: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    extra: Path | None = None
    slow_start: bool = True

    def chosen(self, device: str) -> list[Provider]:
        return [p for p in providers(self.extra).values() if self._takes(p, device)]

    def _takes(self, provider: Provider, device: str) -> bool:
        name = provider.name.lower()
        if self.providers and not any(part.lower() in name for part in self.providers):
            return False
        if not provider.ours:
            return True
        # That a backend is for the other device is no news; that a format is missing is.
        if device not in provider.devices:
            return False
        # eager is the judge and slow by purpose: only where it is asked for.
        if provider.backend == "eager" and "eager" not in " ".join((*self.backends, *self.providers)):
            return False
        pairs = (
            (provider.rule, self.rules),
            (provider.backend, self.backends),
            (provider.format, self.formats),
            (provider.layout, self.layouts),
        )
        return all(not wanted or value in wanted for value, wanted in pairs)


@dataclass(frozen=True)
class Run:
    """One measure over workloads, dtypes and providers."""

    measure: str
    workloads: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float32",)
    filter: Filter = field(default_factory=Filter)


@dataclass(frozen=True)
class Options:
    """How to measure, whatever is measured."""

    device: str
    setting: Setting
    effort: Effort
    cold: bool = True


@dataclass(frozen=True)
class Measure:
    """A measuring command.

    Attributes:
        help: of the command line.
        workloads: by default.
        dtypes: by default.
    """

    help: str
    workloads: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float32",)


MEASURES = {
    "step": Measure(
        "Time of one optimizer step, beside the memory's roof and the peers.",
        ("2^24", "gpt2", "10000x64", "500-groups"),
        ("float32", "bfloat16"),
    ),
    "host": Measure(
        "Time until step() returns: what a step costs the host, on tensors of one element.",
        ("1x1", "10x1", "148x1", "1000x1"),
    ),
    "memory": Measure(
        "Bytes that a parameter takes with gradient and states, and the most that a step adds for a moment.",
        ("2^24",),
        ("float32", "bfloat16"),
    ),
    "launches": Measure(
        "Kernels that a step launches on a GPU; on a CPU, PyTorch operators and calls of our backend.",
        ("148x64", "1000x64"),
    ),
    "first-step": Measure(
        "The first step of a process, with what it compiles: caches empty, and filled.", ("148x64",)
    ),
    "train": Measure(
        "Whole training steps of the demo's GPT, and the optimizer's share of them.", ("demo-gpt",)
    ),
}

_OURS_AND_TORCH = ("fused_optim", "torch AdamW fused")


def quick_set(device: str) -> list[Run]:
    """What ``all`` measures: every kind of figure, in minutes; what matters most comes first."""
    return gpu_set() if device == "cuda" else cpu_set()


_FP32 = ("fp32",)
_LIST = ("list",)


def cpu_set() -> list[Run]:
    """For two cores: peers that start fast, and sizes beyond the caches but no larger."""
    both = ("float32", "bfloat16")
    every = Filter(layouts=_LIST, slow_start=False)
    plain = Filter(layouts=_LIST, formats=_FP32, slow_start=False)
    few = Filter(_OURS_AND_TORCH, formats=_FP32, layouts=("list", "flat"))
    return [
        Run("step", ("2^24",), both, every),
        Run("step", ("10000x64",), filter=plain),
        Run("step", ("gpt2", "500-groups"), filter=few),
        Run("step", ("2^16", "2^20"), filter=replace(few, layouts=_LIST)),
        Run("step", ("10x64", "1000x64"), filter=plain),
        Run("host", ("1x1", "148x1", "1000x1"), filter=replace(few, layouts=())),
        Run("memory", ("2^22",), filter=plain),
        Run("launches", ("148x64",), filter=few),
        Run("first-step", ("148x64",), filter=replace(few, layouts=_LIST)),
        Run("train", ("demo-gpt",), filter=few),
    ]


def gpu_set() -> list[Run]:
    """For a GPU and a few minutes, where making a process takes seconds."""
    both = ("float32", "bfloat16")
    few = Filter((*_OURS_AND_TORCH, "torch Adamax foreach"), formats=_FP32, layouts=_LIST)
    triton = replace(few, backends=("triton",))
    layouts = replace(triton, providers=_OURS_AND_TORCH, layouts=())
    formats = tuple(name for name in FORMATS if name != "fp32")
    return [
        Run("step", ("2^28",), both, few),
        Run("step", ("gpt2", "10000x64"), filter=few),
        Run("host", ("1x1", "148x1", "1000x1"), filter=layouts),
        Run("launches", ("148x64",), filter=few),
        Run("step", ("2^16", "2^20", "2^24"), filter=triton),
        Run("step", ("2^28",), ("bfloat16",), Filter(("fused_optim",), (), ("triton",), formats, _LIST)),
        Run("step", ("10x64", "100x64", "1000x64"), filter=triton),
        Run("memory", ("2^24",), filter=few),
        Run("train", ("demo-gpt",), filter=layouts),
        Run("first-step", ("148x64",), filter=few),
        Run("step", ("500-groups", "resnet50", "lora", "llama-7b"), filter=triton),
        Run("step", ("2^26",), both, Filter(layouts=_LIST, formats=_FP32)),
    ]


def rehearsal_set() -> list[Run]:
    """Every measure on next to nothing, with the interpreter where it is chosen."""
    few = Filter(_OURS_AND_TORCH, layouts=("list",), formats=("fp32",))
    both = ("float32", "bfloat16")
    return [
        Run("step", ("2^10", "2^12"), both, few),
        Run("step", ("2x64", "5x64"), filter=few),
        Run("host", ("2x1", "5x1"), filter=few),
        *(Run(measure, ("3x64",), filter=few) for measure in ("memory", "launches", "first-step")),
        Run(
            "train",
            ("demo-gpt",),
            filter=Filter(("fused_optim AdaBelief cpu fp32 list", "torch AdamW fused")),
        ),
    ]


def full_set(device: str) -> list[Run]:
    """What ``all --full`` measures: all workloads, all providers."""
    top = 30 if device == "cuda" else 26
    sizes = tuple(f"2^{k}" for k in range(16, top, 2))
    counts = tuple(f"{n}x64" for n in (1, 10, 100, 1000, 10000))
    models = ("gpt2", "gpt2-new-gradients", "resnet50", "lora", "500-groups", "llama-7b")
    both = ("float32", "bfloat16")
    return [
        Run("step", (f"2^{top}", "gpt2", "10000x64", "500-groups"), both),
        Run("step", sizes, filter=Filter((*_OURS_AND_TORCH, "foreach", "Optax"))),
        Run("step", counts[:-1]),
        Run("step", tuple(m for m in models if m not in ("gpt2", "500-groups")), both),
        Run("host", tuple(name.replace("x64", "x1") for name in counts) + ("148x1",)),
        Run("memory", ("2^24", "gpt2"), both),
        Run("launches", ("148x64", "10000x64")),
        Run("first-step", ("148x64",)),
        Run("train", ("demo-gpt",)),
    ]


def _workload(run: Run, name: str, options: Options) -> Workload:
    return demo_workload() if run.measure == "train" else size_for(workload(name), options.device)


def _why_skipped(provider: Provider, run: Run, load: Workload) -> str | None:
    if provider.most_tensors is not None and len(load.shapes) > provider.most_tensors:
        return f"it compiles each tensor's step: minutes for {len(load.shapes)} tensors"
    if provider.slow_start and not run.filter.slow_start:
        return "it compiles for a good part of a minute: see --full"
    if not provider.follows_gradients and (load.new_gradients or run.measure == "train"):
        return "its gradients are arrays of its own"
    return None


def comparisons(run: Run) -> list[tuple[str, str]]:
    """(workload, dtype) of a run."""
    return [(name, dtype) for name in run.workloads for dtype in run.dtypes]


def execute(
    runs: Sequence[Run],
    options: Options,
    say: Progress = lambda _: None,
    done: Callable[[str, list[Record]], None] = lambda *_: None,
) -> list[Record]:
    """Measure. ``say`` hears what is being done, ``done`` each comparison that is, with all that
    was measured by then."""
    records: list[Record] = []
    for run in runs:
        for name, dtype in comparisons(run):
            records += _comparison(run, name, dtype, options, say)
            done(f"{run.measure} {name} {dtype}", records)
    return records


def _comparison(run: Run, name: str, dtype: str, options: Options, say: Progress) -> list[Record]:
    load = _workload(run, name, options)
    cases, absent = [], []
    for provider in run.filter.chosen(options.device):
        case = Case(
            load, dtype, options.device, provider.name, run.measure, options.cold, extra=run.filter.extra
        )
        why_not = provider.why_not(options.device, dtype)
        skipped = _why_skipped(provider, run, load)
        if why_not or skipped:
            status = "absent" if why_not else "skipped"
            absent.append({**head(case), "status": status, "why": why_not or skipped})
        else:
            cases.append(case)
    if run.measure == "first-step":
        return [first_steps(case, options.effort, options.setting, say) for case in cases] + absent
    if run.measure == "step":
        roofs = [roof for roof in ROOFS.values() if roof.why_not(options.device, dtype) is None]
        cases = [Case(load, dtype, options.device, roof.name, "step", options.cold) for roof in roofs] + cases
    return compare_cases(cases, options.effort, options.setting, say) + absent


__all__ = ["MEASURES", "QUICK", "Filter", "Options", "Run", "comparisons", "execute", "full_set", "quick_set"]
