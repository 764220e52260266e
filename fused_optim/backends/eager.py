"""The reference: plain PyTorch on any device. The judge of all other backends."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import MAX_COUNT, Coefficients, coefficients
from ..rounding import MU, NU, PARAM, Place
from ..table import Batch, finish, int64_tensor
from .base import Backend, Inputs, nothing_to_load, to_device


def step(batch: Batch, inputs: Inputs) -> None:
    """One step of every parameter, one after another."""
    key = batch.key
    rule, working = key.rule, key.param.working
    if "hyper_row" not in batch.on_device:
        rows = int64_tensor([o.hyper_row for o in batch.items])
        batch.on_device["hyper_row"] = to_device(rows, key.device)
    hyper_row = batch.on_device["hyper_row"]
    count = (torch.stack([o.step for o in batch.items]) + 1).clamp(max=MAX_COUNT)
    columns = coefficients(inputs.hyper[hyper_row], count, working, inputs.grad_scale)
    for o, t, *row in zip(batch.items, count, *columns):
        c = Coefficients(*row)
        g = key.grad.decode(o.grad, None) / c.grad_divisor
        stored, aux = o.stored, o.aux
        p, mu, nu = (f.decode(x, a) for f, x, a in zip(o.formats, stored, aux))
        writes = [(o.step, t)]
        for f, operand, values, x, a in zip(
            o.formats, (PARAM, MU, NU), rule.reference(p, g, mu, nu, c), stored, aux
        ):
            new, new_aux = f.encode(values, Place(t, o.random_key, operand))
            writes += [(x, new)] if a is None or new_aux is None else [(x, new), (a, new_aux)]
        _write(writes, None if inputs.found_inf is None else inputs.found_inf != 0)


def _write(writes: list[tuple[Tensor, Tensor]], skip: Tensor | None) -> None:
    """All or nothing of one parameter: what interrupts it is raised when all is written."""
    new = [value if skip is None else torch.where(skip, target, value) for target, value in writes]
    finish(lambda: [target.copy_(value) for (target, _), value in zip(writes, new)])


EAGER = Backend("eager", lambda device: None, nothing_to_load, step, steps_all_at_once=False)
