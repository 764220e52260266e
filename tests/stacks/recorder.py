"""What a trainer asked of an optimizer, asked of the eager backend once more."""

from typing import Any

import torch
from helpers import assert_same_bits, copies
from torch import Tensor


def _params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _numbers(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    own = ("params", "param_names", "schedules", "differentiable")
    return [{k: v for k, v in group.items() if k not in own} for group in optimizer.param_groups]


class Recorder:
    """Records the gradients, learning rates and other numbers of each step that ``optimizer`` makes, however
    a trainer wraps it. :meth:`check` steps copies with them."""

    def __init__(self, optimizer: Any, **options: Any) -> None:
        self.optimizer, self.options = optimizer, options
        self.start: tuple[Any, Any] | None = None
        self.steps: list[tuple[Any, Any]] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer: Any, *_: Any) -> None:
        if self.start is None:
            self.start = copies([p.detach() for p in _params(optimizer)]), optimizer.state_dict()

    def _after(self, optimizer: Any, *_: Any) -> None:  # what a closure made is there now
        self.steps.append((copies([p.grad for p in _params(optimizer)]), copies(_numbers(optimizer))))

    def check(self, steps: int) -> None:
        """The optimizer made that many steps, and parameters and states are as eager makes them."""
        assert len(self.steps) == steps
        assert self.start is not None
        values, state_dict = self.start
        params = [torch.nn.Parameter(value.clone()) for value in values]
        remaining = iter(params)
        groups = [{"params": [next(remaining) for _ in g["params"]]} for g in self.optimizer.param_groups]
        judge = type(self.optimizer)(groups, backend="eager", **self.options)
        judge.load_state_dict(state_dict)
        for grads, numbers in self.steps:
            for p, grad in zip(params, grads):
                p.grad = grad
            for group, changed in zip(judge.param_groups, numbers):
                group.update(changed)
            judge.step()
        assert any(not torch.equal(p, value) for p, value in zip(params, values)), "nothing was trained"
        mine = _params(self.optimizer)
        assert_same_bits([p.detach() for p in mine], [p.detach() for p in params], "parameters")
        states = [dict(self.optimizer.state[p]) for p in mine if p.grad is not None]
        assert_same_bits(
            states, [dict(judge.state[p]) for p, m in zip(params, mine) if m.grad is not None], "states"
        )
