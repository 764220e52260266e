"""The stacks that people train with, run for real."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fused_optim import AdamW


def trainer(model: torch.nn.Module, compiled: str, lr: Any, **options: Any) -> tuple[Callable[[], Any], ...]:
    """One step of training: as it is, and with ``compiled`` given to torch.compile. lr changes each time."""
    optimizer = AdamW(model.parameters(), lr=copy.deepcopy(lr), **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    x = torch.linspace(-1, 1, 32).view(4, 8)

    def train(step: Callable[[], None]) -> None:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        step()

    whole, step = train, optimizer.step
    if compiled == "train":
        whole = torch.compile(train, backend="eager")
    else:
        step = torch.compile(optimizer.step, backend="eager")
    return lambda: (train(optimizer.step), schedule.step()), lambda: (whole(step), schedule.step())


@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # of Python 3.13.0
@pytest.mark.parametrize("compiled", ["train", "optimizer.step"])
@pytest.mark.parametrize(
    ("lr", "first", "backend", "flatten"),
    [
        (0.01, "inside", None, True),
        (torch.tensor(0.01), "outside", None, False),
        (0.01, "outside", "eager", False),
        (torch.tensor(0.01), "inside", "eager", True),
    ],
)
def test_torch_compile(compiled: str, lr: Any, first: str, backend: str | None, flatten: bool) -> None:
    """A step in compiled code is a graph break: it has the right bits, and a new lr compiles nothing."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    twin = copy.deepcopy(model)
    outside, inside = trainer(model, compiled, lr, flatten=flatten, backend=backend)
    plain, _ = trainer(twin, compiled, lr, backend="eager")
    for number in range(5):
        with torch.compiler.set_stance("fail_on_recompile" if number >= 2 else "default"):
            (outside if number == 0 and first == "outside" else inside)()
        plain()
        assert all(map(torch.equal, model.parameters(), twin.parameters())), number
