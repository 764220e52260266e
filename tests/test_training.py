"""What people build around an optimizer with torch alone: averages of weights, containers of several
optimizers, spawned processes. ZeRO is in test_distributed.py, trainers by others are in tests/stacks."""

from typing import Any

import pytest
import torch
from helpers import Make, assert_same_bits, saved_and_loaded, snapshot
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from fused_optim import AdamW


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def batch(number: int) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(number))


def fit(model: Any, optimizer: Any, numbers: range, after: Any = lambda: None) -> None:
    for number in numbers:
        optimizer.zero_grad()
        model(batch(number)).square().mean().backward()
        optimizer.step()
        after()


@pytest.mark.parametrize("average", [None, "ema", "foreach ema"])
def test_averaged_model(make: Make, average: str | None, flatten: bool) -> None:
    """SWA and EMA read the weights that the step wrote, and training goes on from the average."""

    def run(**options: Any) -> Any:
        model = network()
        optimizer = make(model.parameters(), lr=0.02, **options)
        multi = get_ema_multi_avg_fn(0.9) if average == "foreach ema" else None
        single = (lambda a, p, n: 0.9 * a + 0.1 * p) if average == "ema" else None
        averaged = AveragedModel(model, avg_fn=single, multi_avg_fn=multi, use_buffers=average is None)
        schedule = SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)
        fit(model, optimizer, range(4), lambda: (averaged.update_parameters(model), schedule.step()))
        torch.optim.swa_utils.update_bn([batch(9)], averaged)
        ema = [p.detach().clone() for p in averaged.parameters()]
        model.load_state_dict(averaged.module.state_dict())
        fit(model, optimizer, range(4, 6))
        return ema, snapshot(optimizer)

    assert_same_bits(run(flatten=flatten), run(backend="eager"))


class Container:
    """One optimizer for each part of a model, as torchtitan's OptimizersContainer: a step steps all."""

    def __init__(self, parts: list[nn.Module], make: Any) -> None:
        self.optimizers = [
            make([
                {"params": [(n, p) for n, p in part.named_parameters() if p.dim() > 1]},
                {"params": [(n, p) for n, p in part.named_parameters() if p.dim() <= 1], "weight_decay": 0.0},
            ])
            for part in parts
        ]  # fmt: skip

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def test_containers(make: Make, flatten: bool) -> None:
    """Several optimizers, one LambdaLR for each, saved in the middle."""

    def run(parts: tuple[range, ...], **options: Any) -> Any:
        model, saved = network(), None
        for numbers in parts:
            container = Container(
                [model[:2], model[2:]], lambda groups: make(groups, lr=0.02, weight_decay=0.1, **options)
            )
            schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.9**t) for o in container.optimizers]
            if saved is not None:
                for one, state in zip((*container.optimizers, *schedules), saved):
                    one.load_state_dict(state)
            fit(model, container, numbers, lambda steps=schedules: [one.step() for one in steps])
            saved = [saved_and_loaded(one.state_dict()) for one in (*container.optimizers, *schedules)]
        return [snapshot(optimizer) for optimizer in container.optimizers]

    assert_same_bits(run((range(3), range(3, 6)), flatten=flatten), run((range(6),), backend="eager"))


def other_process(_: int, model: Any) -> None:
    torch.set_num_threads(1)
    fit(model, AdamW(model.parameters(), lr=0.02), range(3))


def test_spawned_processes_step_shared_memory() -> None:
    """Two processes step the same parameters, in turn, each with states of its own."""
    model, twin = network().share_memory(), network()
    torch.multiprocessing.spawn(other_process, (model,), nprocs=1)
    fit(model, AdamW(model.parameters(), lr=0.02), range(3))
    for _ in range(2):
        fit(twin, AdamW(twin.parameters(), lr=0.02, backend="eager"), range(3))
    assert_same_bits(list(model.parameters()), list(twin.parameters()))
