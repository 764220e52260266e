"""The reference: plain PyTorch on any device. The judge of all other backends."""

from __future__ import annotations

import torch

from ..reference import MAX_COUNT, Coefficients, coefficients
from ..table import Batch
from .base import Backend, Inputs, to_device


def step(batch: Batch, inputs: Inputs) -> None:
    """One step of every parameter, one after another."""
    rule, working = batch.key.rule, batch.key.state.working
    if "hyper_row" not in batch.on_device:
        batch.on_device["hyper_row"] = to_device(batch.counters[:, 1].clone(), batch.key.device)
    hyper_row = batch.on_device["hyper_row"]
    old_count = torch.stack([o.step for o in batch.items])
    count = (old_count + 1).clamp(max=MAX_COUNT)
    columns = coefficients(inputs.hyper[hyper_row], count, working, inputs.grad_scale)
    skip = None if inputs.found_inf is None else inputs.found_inf != 0

    def write(target: torch.Tensor, new: torch.Tensor) -> None:
        target.copy_(new if skip is None else torch.where(skip, target, new))

    for o, t, *row in zip(batch.items, count, *columns):
        c = Coefficients(*row)
        g = batch.key.grad.decode(o.grad) / c.grad_divisor
        p = batch.key.param.decode(o.param)
        p, mu, nu = rule.reference(p, g, batch.key.state.decode(o.mu), batch.key.state.decode(o.nu), c)
        write(o.param, batch.key.param.encode(p))
        write(o.mu, batch.key.state.encode(mu))
        write(o.nu, batch.key.state.encode(nu))
        write(o.step, t)


EAGER = Backend("eager", lambda device: None, step)
