"""What each provider is held to: its own algorithm, run in float64 by torch or by our eager backend."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .providers import BASE, DECAYED, OUR_RULES, Provider

Problem = tuple[list[Tensor], list[list[Tensor]]]
"""Parameters and the gradients of three steps, on the CPU and in the provider's dtype."""


def problem(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Problem:
    """Random ones; the parameters small beside the updates, so that one in bfloat16 moves."""
    rng = torch.Generator().manual_seed(1)
    drawn = [[torch.randn(shape, generator=rng).to(dtype) for shape in shapes] for _ in range(4)]
    return [p * 0.1 for p in drawn[0]], drawn[1:]


def reference(algorithm: str, params: list[Tensor]) -> Any:
    """The optimizer that an algorithm is defined by."""
    if algorithm == "adamw":
        return torch.optim.AdamW(params, **DECAYED, foreach=False)
    if algorithm == "adamax":
        return torch.optim.Adamax(params, **BASE, foreach=False)
    import fused_optim

    title, options = OUR_RULES[algorithm]
    return getattr(fused_optim, title)(params, **DECAYED, **options, backend="eager")


def relative_error(algorithm: str, given: Problem, got: Sequence[Tensor]) -> float:
    """How far parameters are from where the algorithm takes them, relative to the root mean square of how
    far they went: the root mean square, or a fortieth of the worst if that is more."""
    params = [p.double().requires_grad_() for p in given[0]]
    optimizer = reference(algorithm, params)
    for gradients in given[1]:
        for p, g in zip(params, gradients):
            p.grad = g.double()
        optimizer.step()
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
