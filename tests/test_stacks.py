"""The stacks that people train with, run for real."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fused_optim import AdamW


def trainer(model: torch.nn.Module, compiled: str, **options: Any) -> Callable[[], None]:
    """One step of training, of which ``compiled`` is what torch.compile gets; lr is a tensor and changes."""
    optimizer = AdamW(model.parameters(), lr=torch.tensor(0.01), **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    x = torch.linspace(-1, 1, 32).view(4, 8)
    step = torch.compile(optimizer.step, backend="eager") if compiled == "optimizer.step" else optimizer.step

    def train() -> None:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        step()

    train = torch.compile(train, backend="eager") if compiled == "train" else train

    def train_and_schedule() -> None:
        train()
        schedule.step()

    return train_and_schedule


@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # of Python 3.13.0
@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("compiled", ["train", "optimizer.step"])
def test_torch_compile(compiled: str, flatten: bool, backend: str | None) -> None:
    """A step in compiled code is a graph break: it has the right bits, and a new lr compiles nothing."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    twin = copy.deepcopy(model)
    ours = trainer(model, compiled, flatten=flatten, backend=backend)
    plain = trainer(twin, "nothing", backend="eager")
    for number in range(6):
        with torch.compiler.set_stance("fail_on_recompile" if number >= 3 else "default"):
            ours()
        plain()
        assert all(map(torch.equal, model.parameters(), twin.parameters())), number
