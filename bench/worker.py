"""What runs in a case's own process: make a provider, check it, measure it when told to."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .formats import FORMATS
from .providers import Groups, OurProvider, Provider, Stepper, TorchStepper, make_ours, providers
from .references import CHECK_STEPS, Problem, problem, relative_error, small_version
from .roof import ROOFS, Loop, Roof
from .workloads import Workload


@dataclass(frozen=True)
class Case:
    """What one process measures.

    Attributes:
        workload: what is stepped.
        dtype: of parameters and gradients.
        device: ``"cpu"`` or ``"cuda"``.
        provider: a provider's name.
        measure: a function of :data:`MEASURES`.
        cold: caches are filled with something else before each timed step.
        seed: of the data.
        extra: a file with more providers.
    """

    workload: Workload
    dtype: str
    device: str
    provider: str
    measure: str = "step"
    cold: bool = True
    seed: int = 0
    extra: Path | None = None


@dataclass(frozen=True)
class Setting:
    """What a process is given beside its case.

    Attributes:
        threads: of the CPU.
        environment: variables to set before anything compiles.
        quiet: what the process prints goes nowhere.
    """

    threads: int
    environment: dict[str, str] = field(default_factory=dict)
    quiet: bool = True


@dataclass
class Ready:
    """What a worker says when it can be asked to run."""

    checked: str
    bytes_per_param: float = 0.0
    state_bytes_per_param: float = 0.0
    bytes_moved: int = 0


@dataclass
class Failed:
    """Why a worker measures nothing. ``status``: failed check, absent, skipped, error."""

    status: str
    why: str


@dataclass
class Made:
    """A provider with its parameters, ready to step."""

    case: Case
    provider: Provider
    stepper: Stepper
    groups: Groups
    extras: dict[str, Any] = field(default_factory=dict)

    def synchronize(self) -> None:
        if self.case.device == "cuda":
            torch.cuda.synchronize()


def get_provider(case: Case) -> Provider:
    return {**ROOFS, **providers(case.extra)}[case.provider]


def make_groups(case: Case) -> Groups:
    """Random parameters with random gradients, dealt to the workload's groups."""
    rng = torch.Generator(device=case.device).manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)

    def draw(shape: tuple[int, ...], scale: float) -> Tensor:
        return torch.randn(shape, generator=rng, device=case.device, dtype=dtype).mul_(scale)

    params = []
    for shape in case.workload.shapes:
        p = draw(shape, 0.1).requires_grad_()
        p.grad = draw(shape, 1.0)
        params.append(p)
    size = -(-len(params) // case.workload.groups)
    return [params[i : i + size] for i in range(0, len(params), size)]


# The check


def _run_check(
    make: Callable[[Groups], Stepper], given: Problem, device: str, static: bool = False
) -> Stepper:
    """Make the steps of a problem, each with new gradients, in the same tensors where ``static``."""
    params = [p.to(device, copy=True).requires_grad_() for p in given.params]
    for p, g in zip(params, given.gradients[0]):
        p.grad = g.to(device, copy=True)
    half = -(-len(params) // 2)
    stepper = make([group for group in (params[:half], params[half:]) if group])
    for i, gradients in enumerate(given.gradients):
        if i > 0:
            for p, g in zip(params, gradients):
                if static and p.grad is not None:
                    p.grad.copy_(g)
                else:
                    p.grad = g.to(device, copy=True)
            if hasattr(stepper, "new_gradients"):
                stepper.new_gradients()
        stepper.step()
    return stepper


def check(case: Case, provider: Provider) -> str:
    """Compare a few steps on tensors like the workload's with what is right.

    Returns:
        What it was compared with.

    Raises:
        CheckError: it is not what the provider computes.
    """
    if isinstance(provider, Roof):
        return "a loop: nothing to check"
    shapes = small_version(case.workload.shapes)
    given = problem(shapes, getattr(torch, case.dtype), case.seed + 1)
    static = isinstance(provider, OurProvider) and provider.layout == "static"
    got = _run_check(provider.make, given, case.device, static)
    rms, worst = relative_error(provider.algorithm, given, got.params())
    tolerance = provider.tolerance(case.dtype)
    # A format that drops bits on purpose is held to eager's bits below.
    if isinstance(provider, OurProvider) and provider.format != "fp32":
        tolerance = max(tolerance, 0.15)
    # "not <=", so that NaN fails.
    if not (rms <= tolerance and worst <= 40 * tolerance):
        raise CheckError(
            f"differs from {provider.algorithm} in float64 after {CHECK_STEPS} steps: error over update "
            f"{rms:.1e} (root mean square), {worst:.1e} (worst); at most {tolerance:.0e}, {40 * tolerance:.0e}"
        )
    text = f"{provider.algorithm} in float64: error {rms:.0e} of the update"
    if not isinstance(provider, OurProvider) or provider.backend == "eager":
        return text

    def eager(groups: Groups) -> Stepper:
        return make_ours(provider.rule, groups, FORMATS[provider.format], "list", "eager")

    want = _run_check(eager, given, "cpu")
    for i, (p, q) in enumerate(zip(got.params(), want.params(), strict=True)):
        if not torch.equal(p.detach().cpu(), q.detach()):
            raise CheckError(f"parameter {i} of shape {tuple(q.shape)} has not eager's bits")
        for key, value in want.optimizer.state[q].items():  # type: ignore[attr-defined]
            mine = got.optimizer.state[p][key]  # type: ignore[attr-defined]
            if isinstance(value, Tensor) and not torch.equal(mine.cpu(), value):
                raise CheckError(f"{key} of parameter {i} of shape {tuple(q.shape)} has not eager's bits")
    return f"eager's bits; {text}"


class CheckError(Exception):
    """A provider's result is not what it should be."""


# Caches


def last_level_cache(device: str) -> int:
    """Bytes of the largest cache."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1], 1))
    return max(sizes) or 32 * 2**20


def make_flush(case: Case, moved: int) -> Callable[[], None]:
    """Fills the caches with other data; nothing where a step's own traffic does so."""
    cache = last_level_cache(case.device)
    if not case.cold or moved > 8 * cache:
        return lambda: None
    other = torch.randn(2 * cache // 4, device=case.device)
    return lambda: (other.mul_(1.0), None)[1]


# Measures


COUNT = 1000
"""The step number from which steps are timed: early ones are not what training is made of, and
fused_optim divides by the first moment's bias correction there until it is 1 (step 165)."""


def prepare(made: Made) -> Callable[[], None]:
    """What is done before each timed step, and not timed."""
    if isinstance(made.stepper, TorchStepper):
        made.stepper.step()
        made.stepper.set_count(COUNT)
    flush = make_flush(made.case, made.extras["moved"])
    if not made.case.workload.new_gradients:
        return flush
    params = [p for group in made.groups for p in group]
    gradients = [p.grad for p in params]

    def renew() -> None:
        for p, g in zip(params, gradients):
            assert g is not None
            p.grad = g.clone()
        flush()

    return renew


def time_steps(made: Made, n: int) -> list[float]:
    """Milliseconds of ``n`` steps, after one that is not timed."""
    before, step = made.extras.setdefault("before", prepare(made)), made.stepper.step
    if made.case.device == "cuda" and not made.provider.wall_clock:
        pairs = []
        for _ in range(n + 1):
            before()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs[1:]]
    times = []
    for _ in range(n + 1):
        before()
        made.synchronize()
        begin = time.perf_counter()
        step()
        made.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return times[1:]


def time_host(made: Made, n: int) -> list[float]:
    """Milliseconds until ``step()`` returns, with an idle device; caches as they are."""
    step, times = made.stepper.step, []
    for _ in range(n + 1):
        made.synchronize()
        begin = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - begin))
    made.synchronize()
    return times[1:]


def peak_of_steps(made: Made, n: int) -> list[float]:
    """Bytes a parameter that a step holds at its peak, beyond what it holds before."""
    made.stepper.step()
    peaks = []
    for _ in range(n):
        made.synchronize()
        before = _held(made.case.device, reset=True)
        made.stepper.step()
        made.synchronize()
        peaks.append(max(0, _held(made.case.device) - before) / made.case.workload.numel)
    return peaks


def _held(device: str, reset: bool = False) -> int:
    """The peak of memory since ``reset``; just after it, what is held now."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        # What malloc keeps of earlier steps would hide what this one takes.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def count_launches(made: Made, n: int) -> list[float]:
    """Kernels a step on a GPU; on a CPU, PyTorch's operators and calls of fused_optim's backend."""
    from torch.profiler import ProfilerActivity, profile

    gpu = made.case.device == "cuda"
    made.stepper.step()
    calls = _count_backend_calls(made)
    counts = []
    for _ in range(n):
        made.synchronize()
        calls.clear()
        with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
            made.stepper.step()
            made.synchronize()
        events = seen.events() or []
        if gpu:
            names = [e.name for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        else:
            names = [e.name for e in events if e.name.startswith("aten::") and _top_level(e)]
        counts.append(float(len(names) + (0 if gpu else len(calls))))
    return counts


def _top_level(event: Any) -> bool:
    """An operator that no other operator called."""
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith("aten::"):
            return False
        parent = parent.cpu_parent
    return True


def _count_backend_calls(made: Made) -> list[str]:
    """A list that grows by one at each call of fused_optim's compiled backend."""
    calls: list[str] = []
    if made.provider.backend == "cpu":
        from fused_optim.backends import extension

        module = extension("_cpu")[0]
        assert module is not None
        real = module.step

        def counted(*arguments: Any) -> Any:
            calls.append("_cpu.step")
            return real(*arguments)

        module.step = counted
    return calls


class Training:
    """Steps of the demo's GPT on the text that it trains on."""

    def __init__(self, case: Case) -> None:
        gpt = demo_gpt()
        torch.manual_seed(case.seed)
        self.gpt, self.config, self.device = gpt, gpt.Config(device=case.device), case.device
        self.data = gpt.load_data()[0].to(case.device)
        self.model = gpt.GPT(self.config).to(case.device, getattr(torch, case.dtype))
        self.params = list(self.model.parameters())
        self.made = 0
        self._backward()

    def _backward(self) -> None:
        batch = self.gpt.get_batch(self.data, self.config, self.config.seed, self.made)
        self.made += 1
        self.gpt.get_loss(self.model, *batch).backward()

    def step(self, stepper: Stepper) -> tuple[float, float]:
        """Milliseconds of a whole step, and of the optimizer's part: dropping gradients and stepping."""
        times = []
        for part in (stepper.zero_grad, self._backward, stepper.step):
            if self.device == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            part()
            if self.device == "cuda":
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
        return sum(times), times[0] + times[2]


def demo_gpt() -> Any:
    """``examples/train_gpt.py``."""
    path = Path(__file__).parents[1] / "examples" / "train_gpt.py"
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = module
    spec.loader.exec_module(module)
    return module


def demo_workload() -> Workload:
    """The shapes of the demo's GPT."""
    gpt = demo_gpt()
    with torch.device("meta"):
        shapes = tuple(tuple(p.shape) for p in gpt.GPT(gpt.Config()).parameters())
    return Workload("demo-gpt", "training the demo's GPT", shapes)


def time_training(made: Made, n: int) -> list[float]:
    """Milliseconds of whole training steps of the demo's GPT; ``extras["share"]`` has the
    optimizer's part of each."""
    train_step = made.extras["train_step"]
    whole, share = [], []
    for _ in range(n + 1):
        total, part = train_step()
        whole.append(total)
        share.append(part)
    made.extras["share"] = share[1:]
    return whole[1:]


MEASURES: dict[str, Callable[[Made, int], list[float]]] = {
    "step": time_steps,
    "host": time_host,
    "memory": peak_of_steps,
    "launches": count_launches,
    "train": time_training,
}


# The process


def make(case: Case) -> tuple[Made, Ready]:
    """Check a provider and make it for a case."""
    provider = get_provider(case)
    checked = check(case, provider)
    training = Training(case) if case.measure == "train" else None
    groups = [training.params] if training else make_groups(case)
    stepper = provider.make(groups)
    made = Made(case, provider, stepper, groups)
    if training:
        made.extras["train_step"] = lambda: training.step(stepper)
    params = [p for group in groups for p in group]
    stored = sum(p.numel() * p.element_size() for p in params)
    stepper.step()
    states = stepper.state_bytes()
    # Read and written: parameter and states; read: gradient.
    moved = stepper.moved if isinstance(stepper, Loop) else 3 * stored + 2 * states
    made.extras["moved"] = moved
    numel = case.workload.numel
    ready = Ready(checked, (2 * stored + states) / numel, states / numel, moved)
    if isinstance(stepper, Loop):
        made.groups = []
    stepper.step()
    made.synchronize()
    return made, ready


def first_steps(case: Case) -> list[float]:
    """Milliseconds of construction with the first step, and of the second."""
    provider = get_provider(case)
    groups = make_groups(case)

    def wait() -> None:
        if case.device == "cuda":
            torch.cuda.synchronize()

    wait()
    times = []
    begin = time.perf_counter()
    stepper = provider.make(groups)
    for _ in range(2):
        stepper.step()
        wait()
        times.append(1e3 * (time.perf_counter() - begin))
        begin = time.perf_counter()
    return times


def serve(case: Case, setting: Setting, pipe: Connection) -> None:
    """The process of a case: say :class:`Ready` or :class:`Failed`, then answer each number of
    runs that is asked for with their values, until None."""
    os.environ["OMP_NUM_THREADS"] = str(setting.threads)
    os.environ.update(setting.environment)
    torch.set_num_threads(setting.threads)
    if setting.quiet:
        # Peers greet, warn and print tables of advice.
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    try:
        provider = get_provider(case)
        why_not = provider.why_not(case.device, case.dtype)
        if why_not is not None:
            pipe.send(Failed("absent", why_not))
            return
        if case.measure == "first-step":
            pipe.send((first_steps(case), None))
            return
        made, ready = make(case)
        pipe.send(ready)
        while (n := pipe.recv()) is not None:
            values = MEASURES[case.measure](made, n)
            pipe.send((values, made.extras.get("share")))
    except CheckError as error:
        pipe.send(Failed("failed check", str(error)))
    except Exception as error:  # noqa: BLE001 (a peer may raise anything; the rest is measured)
        pipe.send(Failed("error", f"{type(error).__name__}: {error}"[:500]))
