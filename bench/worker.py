"""What runs in a provider's own process: make it, check it, time it when told to."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._dynamo  # torch's optimizers import it when they are made: seconds in each process
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .host import HOST_VARIANTS
from .providers import OURS, PEERS, Groups, Provider, make_ours, state_bytes
from .references import problem, relative_error, steps_of, tolerance
from .roofline import ROOFLINES
from .workloads import CONDITIONS, Workload, fitted

PROVIDERS = {p.name: p for p in (*ROOFLINES.values(), *OURS, *HOST_VARIANTS, *PEERS)}
LATE = 1000
"""The step number from which steps are timed. Early ones are not what training is made of: our formats
of low precision divide by bias corrections that are 1 later on."""


@dataclass(frozen=True)
class Case:
    """What one process measures. ``measure``: "step", the whole step with cold caches, or "host", the
    time until ``step()`` returns."""

    workload: Workload
    dtype: str
    device: str
    provider: str
    measure: str = "step"


class CheckError(Exception):
    """A provider's result is not what it should be."""


def failure(error: Exception) -> dict[str, Any]:
    """What a record says of what a provider raised."""
    if isinstance(error, CheckError):
        return {"status": "failed check", "why": str(error)}
    return {"status": "error", "why": f"{type(error).__name__}: {error}"[:300]}


def make_groups(case: Case) -> Groups:
    """Random parameters with random gradients, dealt to the workload's groups."""
    torch.manual_seed(0)
    params = []
    for shape in case.workload.shapes:
        p, g = (torch.randn(shape, device=case.device, dtype=getattr(torch, case.dtype)) for _ in range(2))
        params.append(p.mul_(0.1).requires_grad_())
        p.grad = g
        CONDITIONS[case.workload.condition](p)
    size = -(-len(params) // case.workload.groups)
    return [params[i : i + size] for i in range(0, len(params), size)]


def check(case: Case, provider: Provider) -> str:
    """Compare a few steps on tensors like the workload's with what is right; says with what."""
    if provider.loop:
        return "computes no step"
    given = problem(fitted(case.workload, 2**20).shapes[:1000], getattr(torch, case.dtype))
    params, optimizer = steps_of(provider.make, given, case.device)
    error = relative_error(provider.algorithm, given, params)
    most = tolerance(provider, case.dtype)
    if not error <= most:  # so that NaN fails
        raise CheckError(f"differs from {provider.algorithm} in float64: error {error:.1e} > {most:.0e}")
    text = f"{provider.algorithm} in float64: error {error:.0e} of the update"
    if not provider.rule:
        return text
    eager = partial(make_ours, rule=provider.rule, backend="eager", format=provider.format, layout="list")
    wanted, judge = steps_of(eager, given, "cpu")
    for i, (p, q) in enumerate(zip(params, wanted)):
        mine, right = optimizer.state[p] | {"parameter": p}, judge.state[q] | {"parameter": q}
        for key, value in right.items():
            if isinstance(value, Tensor) and not torch.equal(mine[key].cpu(), value):
                raise CheckError(f"{key} of parameter {i} of shape {tuple(q.shape)} has not eager's bits")
    return f"eager's bits; {text}"


def set_count(optimizer: Any, count: int) -> None:
    """Set every parameter's step number, where it is kept in the state."""
    for state in getattr(optimizer, "state", {}).values():
        step = state.get("step")
        if isinstance(step, Tensor):
            step.fill_(count)
        elif step is not None:
            state["step"] = count


class Clock:
    """Milliseconds of the device and of the host for what a call of the host starts. What it is to read lies
    in no cache: other data were written. On a GPU that also keeps the device busy until the host is done, so
    that no host time lies in the device's interval."""

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"
        self.other = torch.zeros(2**27, dtype=torch.uint8, device=device)
        # So many, since a GPU that was idle first raises its clocks.
        self.fill = self.once(lambda: self.other.add_(1), 2000)[0] if self.gpu else 0.0

    def once(self, start: Callable[[], Any], fills: int) -> tuple[float, float]:
        if self.gpu:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
        for _ in range(fills):
            self.other += 1
        if self.gpu:
            first.record()
        begin = time.perf_counter()
        start()
        host = 1e3 * (time.perf_counter() - begin)
        if not self.gpu:
            return host, host
        last.record()
        last.synchronize()
        return first.elapsed_time(last), host

    def __call__(self, start: Callable[[], Any], n: int, cold: bool = True) -> list[list[float]]:
        """The device's and the host's times of ``n`` calls, after one that does not count. With ``cold``
        false nothing is written before, and only the host's say something."""
        fills = 1 if cold else 0
        if cold and self.gpu:
            fills += 1 + int(2 * self.once(start, 1)[1] / self.fill)
        pairs = [self.once(start, fills) for _ in range(n + 1)][1:]
        return [list(times) for times in zip(*pairs)]


def checked_and_made(case: Case) -> tuple[Any, dict[str, Any]]:
    """What makes the case's steps, and what there is to say of it."""
    provider = PROVIDERS[case.provider]
    checked = check(case, provider)
    groups = make_groups(case)
    made = provider.make(groups)
    # As the graph of a loss does that lives until the next one: while C++ owns a tensor too, torch is faster.
    made.graph = [get_gradient_edge(p) for group in groups for p in group]
    for _ in range(2):
        made.step()
    set_count(made, LATE)
    stored = sum(p.nbytes for group in groups for p in group)
    states = state_bytes(made) if hasattr(made, "state") else 0
    # Parameter and states are read and written, the gradient is read.
    moved = getattr(made, "moved", 3 * stored + 2 * states)
    bytes_each = {"state_bytes_each": states / case.workload.numel, "bytes_moved": moved}
    return made, {"status": "measured", "checked": checked, **bytes_each}


STEPPING: list[Callable[[int], list[float]]] = []
"""What times steps of this process's case."""


def prepare(case: Case) -> dict[str, Any]:
    """Check and make the case of this process; what there is to say of it."""
    for stream in (1, 2):  # peers greet, warn and print tables of advice
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    made, said = checked_and_made(case)
    clock, host = Clock(case.device), case.measure == "host"
    STEPPING.append(lambda n: clock(made.step, n, cold=not host)[int(host)])
    return said


def run(n: int) -> list[float]:
    return STEPPING[0](n)
