"""What each provider is held to: its own algorithm, run in float64 by torch or by our eager backend."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .providers import BASE, DECAYED, Groups, Make, Provider, as_groups, make_ours

Problem = tuple[list[Tensor], list[list[Tensor]]]
"""Parameters and the gradients of three steps, on the CPU and in the provider's dtype."""


def problem(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Problem:
    """Random ones; the parameters small beside the updates, so that one in bfloat16 moves."""
    rng = torch.Generator().manual_seed(1)
    drawn = [[torch.randn(shape, generator=rng).to(dtype) for shape in shapes] for _ in range(4)]
    return [p * 0.1 for p in drawn[0]], drawn[1:]


def steps_of(make: Make, given: Problem, device: str) -> tuple[list[Tensor], Any]:
    """Make the steps of a problem in two groups, each with new gradients; parameters and optimizer."""
    params = [p.to(device, copy=True).requires_grad_() for p in given[0]]
    half = -(-len(params) // 2)
    optimizer = None
    for gradients in given[1]:
        for p, g in zip(params, gradients):
            p.grad = g.to(device, copy=True)
        optimizer = optimizer or make([group for group in (params[:half], params[half:]) if group])
        optimizer.step()
    return params, optimizer


def reference(algorithm: str, groups: Groups) -> Any:
    """The optimizer that an algorithm is defined by."""
    if algorithm == "adamw":
        return torch.optim.AdamW(as_groups(groups), **DECAYED, foreach=False)
    if algorithm == "adamax":
        return torch.optim.Adamax(as_groups(groups), **BASE, foreach=False)
    return make_ours(groups, algorithm, "eager", "fp32", "list")


def relative_error(algorithm: str, given: Problem, got: Sequence[Tensor]) -> float:
    """How far parameters are from where the algorithm takes them, relative to the root mean square of how
    far they went: the root mean square, or a fortieth of the worst if that is more."""
    exact = [p.double() for p in given[0]], [[g.double() for g in gradients] for gradients in given[1]]
    params, _ = steps_of(partial(reference, algorithm), exact, "cpu")
    error, move = (
        torch.cat([(p - q.cpu()).detach().flatten() for p, q in zip(params, others, strict=True)])
        for others in (got, given[0])
    )
    worst = torch.maximum(error.square().mean().sqrt(), error.abs().max() / 40)
    return float(worst / move.square().mean().sqrt())


def tolerance(provider: Provider, dtype: str) -> float:
    """bfloat16 keeps 8 bits of a parameter, and some peers compute in it too; our formats that drop bits on
    purpose are held to eager's bits besides."""
    lossy = 0.15 if provider.rule and provider.format != "fp32" else 0.0
    return max(provider.error, lossy, {"float32": 0.0, "bfloat16": 0.15, "float16": 0.03}[dtype])
