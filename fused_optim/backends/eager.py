"""The reference: plain PyTorch on any device. The judge of all other backends."""

import torch
from torch import Tensor

from .. import reference
from ..reference import MAX_COUNT, Coefficients, coefficients
from ..rounding import MU, NU, PARAM, Place
from ..table import Batch, finish, int64_tensor
from .base import Backend, Inputs, uploaded


@torch.no_grad()
def step(batch: Batch, inputs: Inputs) -> None:
    """One step of every parameter, one after another."""
    key, items = batch.key, [o for o in batch.items if o.grad is not None]
    hyper_rows = [o.hyper_row for o in items]
    [rows] = uploaded(batch.on_device, key.device, ["hyper"], lambda _: int64_tensor(hyper_rows))
    count = (torch.stack([o.state["step"] for o in items]) + 1).clamp(max=MAX_COUNT)
    columns = coefficients(inputs.hyper[rows], count, key.param.working, inputs.grad_scale, inputs.clip)
    for o, t, *row in zip(items, count, *columns):
        c = Coefficients(*row)
        assert o.grad is not None
        g = key.grad.decode(o.grad, None) / c.grad_divisor * c.grad_factor
        p, mu, nu = (f.decode(x, a) for f, x, a in zip(key.formats, o.stored, o.aux))
        writes = [(o.state["step"], t)]
        new = key.rule.reference(p, g, mu, nu, c)
        for f, operand, values, x, a in zip(key.formats, (PARAM, MU, NU), new, o.stored, o.aux):
            encoded, new_aux = f.encode(values, Place(t, o.random_key, operand, o.offset))
            writes += [(x, encoded)] if a is None or new_aux is None else [(x, encoded), (a, new_aux)]
        _write(writes, inputs.skips)


def _write(new: list[tuple[Tensor, Tensor]], skips: list[Tensor]) -> None:
    """All or nothing of one parameter: what interrupts it is raised when all is written."""
    for skip in skips:
        new = [(target, torch.where(skip != 0, target, value)) for target, value in new]
    finish(lambda: [target.copy_(value) for target, value in new])


@torch.no_grad()
def square_sums(batch: Batch, grad_scale: Tensor | None, sums: Tensor) -> None:
    [place] = uploaded(batch.on_device, sums.device, ["places"], lambda _: batch.norm_chunks[:, 2].long())
    new = []
    for o in batch.items:
        assert o.grad is not None  # a plan that clips has none that is missing
        g = batch.key.grad.decode(o.grad.as_strided((o.grad.numel(),), (1,)), None)
        new.append(reference.square_sums(g if grad_scale is None else g / grad_scale.to(g.dtype)))
    sums[place] = torch.cat(new)


def clip(sums: Tensor, max_grad_norm: Tensor, skipped: Tensor | None) -> Tensor:
    result = reference.clip(sums, max_grad_norm, skipped is not None)
    if skipped is not None:
        skipped += result[3].to(skipped.dtype)
    return result


EAGER = Backend("eager", lambda device: None, step, square_sums, clip, steps_all_at_once=False)
