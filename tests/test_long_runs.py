"""Long runs: new gradients and another lr at each step, parameters that come and go, optimizers built and
dropped. No memory grows. ``FUSED_OPTIM_STEPS`` is how many steps: 1,000, or 200,000 in ``make test-long``."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import RULES
from test_backends import cpu

STEPS = int(os.environ.get("FUSED_OPTIM_STEPS", "1000"))
Record = Callable[[str, object], None]

pytestmark = [cpu, pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")]


def resident() -> int:
    """Bytes of memory that this process has, after what can be collected was."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grows(run: Callable[[int], None], times: int) -> tuple[int, int]:
    """Bytes, and objects of Python's, that the last three quarters of ``times`` calls add to the first."""
    for i in range(times // 4):
        run(i)
    memory, objects = resident(), len(gc.get_objects())
    for i in range(times // 4, times):
        run(i)
    return resident() - memory, len(gc.get_objects()) - objects


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("state_format", ["fp32", "8bit"])
def test_steps(flatten: bool, state_format: str, record_property: Record) -> None:
    params = [torch.nn.Parameter(torch.ones(n)) for n in (3, 40, 300, 1)]
    options = {"state_format": state_format, "flatten": flatten, "backend": "cpu"}
    optimizer = RULES["adabelief"].optimizer(params, lr=lambda count: 1e-3 / (1 + count % 7), **options)

    def run(i: int) -> None:
        for k, p in enumerate(params):
            p.grad = None if (i >> k) % 5 == 0 else torch.full_like(p, float(i % 11))
        optimizer.step()

    memory, objects = grows(run, STEPS // 4)
    record_property("steps of a long run", STEPS // 4)
    record_property("bytes that memory grew by", max(memory, 0))
    assert (memory < 2**22, objects < 100) == (True, True), (memory, objects)
    assert all(bool(p.isfinite().all()) for p in params)


def test_optimizers_that_are_dropped(flatten: bool, record_property: Record) -> None:
    """Each would keep 40 KB."""

    def run(i: int) -> None:
        p = torch.nn.Parameter(torch.ones(2500))
        p.grad = torch.ones_like(p)
        optimizer = list(RULES.values())[i % 4].optimizer([p], flatten=flatten, backend="cpu")
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())

    memory, objects = grows(run, STEPS // 20)
    record_property("optimizers built and dropped", STEPS // 20)
    record_property("bytes that memory grew by", max(memory, 0))
    assert (memory < 2**22, objects < 100) == (True, True), (memory, objects)
