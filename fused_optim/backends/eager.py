"""The reference: plain PyTorch on any device. The judge of all other backends."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import MAX_COUNT, Coefficients, coefficients
from ..rounding import MU, NU, PARAM, Place
from ..table import Batch
from .base import Backend, Inputs, to_device


def step(batch: Batch, inputs: Inputs) -> None:
    """One step of every parameter, one after another."""
    key = batch.key
    rule, working = key.rule, key.param.working
    if "hyper_row" not in batch.on_device:
        batch.on_device["hyper_row"] = to_device(batch.counters[:, 1].clone(), key.device)
    hyper_row = batch.on_device["hyper_row"]
    old_count = torch.stack([o.step for o in batch.items])
    count = (old_count + 1).clamp(max=MAX_COUNT)
    columns = coefficients(inputs.hyper[hyper_row], count, working, inputs.grad_scale)
    skip = None if inputs.found_inf is None else inputs.found_inf != 0

    def write(target: Tensor | None, new: Tensor | None) -> None:
        if target is not None and new is not None:
            target.copy_(new if skip is None else torch.where(skip, target, new))

    for o, t, *row in zip(batch.items, count, *columns):
        c = Coefficients(*row)
        g = key.grad.decode(o.grad, None) / c.grad_divisor
        old = zip((key.param, key.mu, key.nu), (o.param, o.mu, o.nu), o.extras)
        p, mu, nu = (format.decode(stored, extra) for format, stored, extra in old)
        p, mu, nu = rule.reference(p, g, mu, nu, c)
        for format, operand, values, stored, extra in (
            (key.param, PARAM, p, o.param, o.extras[0]),
            (key.mu, MU, mu, o.mu, o.extras[1]),
            (key.nu, NU, nu, o.nu, o.extras[2]),
        ):
            new, new_extra = format.encode(values, Place(t, o.random_key, operand))
            write(stored, new)
            write(extra, new_extra)
        # As other backends do, behind the back of its version: who else writes to it is seen by that.
        write(o.step.data, t)


EAGER = Backend("eager", lambda device: None, step, lambda batch: None)
