"""The reference: plain PyTorch on any device. The judge of all other backends."""

import torch
from torch import Tensor

from ..reference import MAX_COUNT, Coefficients, coefficients
from ..rounding import MU, NU, PARAM, Place
from ..table import Batch, finish, int64_tensor
from .base import Backend, Inputs, uploaded


def step(batch: Batch, inputs: Inputs) -> None:
    """One step of every parameter, one after another."""
    key, items = batch.key, batch.items
    rows = uploaded(batch.on_device, "hyper", key.device, lambda: int64_tensor([o.hyper_row for o in items]))
    count = (torch.stack([o.state["step"] for o in items]) + 1).clamp(max=MAX_COUNT)
    columns = coefficients(inputs.hyper[rows], count, key.param.working, inputs.grad_scale)
    for o, t, *row in zip(items, count, *columns):
        c = Coefficients(*row)
        g = key.grad.decode(o.grad, None) / c.grad_divisor
        p, mu, nu = (f.decode(x, a) for f, x, a in zip(key.formats, o.stored, o.aux))
        writes = [(o.state["step"], t)]
        new = key.rule.reference(p, g, mu, nu, c)
        for f, operand, values, x, a in zip(key.formats, (PARAM, MU, NU), new, o.stored, o.aux):
            encoded, new_aux = f.encode(values, Place(t, o.random_key, operand, o.offset))
            writes += [(x, encoded)] if a is None or new_aux is None else [(x, encoded), (a, new_aux)]
        _write(writes, inputs.found_inf)


def _write(new: list[tuple[Tensor, Tensor]], found_inf: Tensor | None) -> None:
    """All or nothing of one parameter: what interrupts it is raised when all is written."""
    if found_inf is not None:
        new = [(target, torch.where(found_inf != 0, target, value)) for target, value in new]
    finish(lambda: [target.copy_(value) for target, value in new])


EAGER = Backend("eager", lambda device: None, step, steps_all_at_once=False)
