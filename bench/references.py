"""Each algorithm in plain float64 PyTorch, and the check of a provider against it.

The peers differ in where epsilon goes and what decays; each is held to its own algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Hyper:
    """What every provider is constructed with. ``lr`` and the weight decay are large enough
    for a bfloat16 parameter to move."""

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1


HYPER = Hyper()
CHECK_STEPS = 3


@dataclass
class State:
    """One parameter's two moments, and the number of steps made."""

    m: Tensor
    v: Tensor
    t: int = 0

    @property
    def corrections(self) -> tuple[float, float]:
        return 1 - HYPER.beta1**self.t, 1 - HYPER.beta2**self.t


Algorithm = Callable[[Tensor, Tensor, State], Tensor]
"""The new parameter from the old, its gradient and its state, which is changed."""


def _first_moment(g: Tensor, s: State) -> None:
    s.t += 1
    s.m = HYPER.beta1 * s.m + (1 - HYPER.beta1) * g


def adamw(p: Tensor, g: Tensor, s: State) -> Tensor:
    """``torch.optim.AdamW``."""
    _first_moment(g, s)
    s.v = HYPER.beta2 * s.v + (1 - HYPER.beta2) * g * g
    c1, c2 = s.corrections
    update = (s.m / c1) / ((s.v / c2).sqrt() + HYPER.eps)
    return p - HYPER.lr * (update + HYPER.weight_decay * p)


def adamax(p: Tensor, g: Tensor, s: State) -> Tensor:
    """``torch.optim.Adamax`` without weight decay."""
    _first_moment(g, s)
    s.v = torch.maximum(HYPER.beta2 * s.v, g.abs() + HYPER.eps)
    return p - HYPER.lr * (s.m / s.corrections[0]) / s.v


def adamaxw(p: Tensor, g: Tensor, s: State) -> Tensor:
    """``optax.adamaxw``: Adamax with decoupled weight decay."""
    return adamax(p, g, s) - HYPER.lr * HYPER.weight_decay * p


def adabelief(p: Tensor, g: Tensor, s: State) -> Tensor:
    """``optax.adabelief`` with weight decay; also the paper's, whose released code adds ``eps``
    to the state as ``eps_root`` is here."""
    _first_moment(g, s)
    s.v = HYPER.beta2 * s.v + (1 - HYPER.beta2) * (g - s.m) ** 2 + HYPER.eps
    c1, c2 = s.corrections
    update = (s.m / c1) / ((s.v / c2).sqrt() + HYPER.eps)
    return p - HYPER.lr * (update + HYPER.weight_decay * p)


ALGORITHMS: dict[str, Algorithm] = {f.__name__: f for f in (adamw, adamax, adamaxw, adabelief)}


@dataclass
class Problem:
    """Parameters and the gradients of each step, on the CPU and in the provider's dtype."""

    params: list[Tensor]
    gradients: list[list[Tensor]] = field(default_factory=list)


def problem(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, seed: int) -> Problem:
    """Random parameters, and random gradients for each step of the check."""
    rng = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> list[Tensor]:
        return [(scale * torch.randn(shape, generator=rng)).to(dtype) for shape in shapes]

    return Problem(draw(0.1), [draw(1.0) for _ in range(CHECK_STEPS)])


def small_version(shapes: Sequence[tuple[int, ...]], most: int = 2**20) -> list[tuple[int, ...]]:
    """The first thousand shapes or fewer, each cut to 2^16 elements, that together have at most
    ``most``."""
    small: list[tuple[int, ...]] = []
    left = most
    for shape in shapes[:1000]:
        cut = list(shape)
        while (numel := int(torch.Size(cut).numel())) > 2**16:
            largest = cut.index(max(cut))
            cut[largest] = cut[largest] // 2 + 1
        left -= numel
        if left < 0:
            break
        small.append(tuple(cut))
    return small


def relative_error(algorithm: str, given: Problem, got: Sequence[Tensor]) -> tuple[float, float]:
    """How far a provider is from its algorithm after :data:`CHECK_STEPS`: root mean square and
    worst error, relative to the root mean square of how far parameters went."""
    rule = ALGORITHMS[algorithm]
    errors, moves = [], []
    for i, (start, end) in enumerate(zip(given.params, got, strict=True)):
        p = start.double()
        state = State(torch.zeros_like(p), torch.zeros_like(p))
        for gradients in given.gradients:
            p = rule(p, gradients[i].double(), state)
        errors.append((end.detach().cpu().double() - p).flatten())
        moves.append((p - start.double()).flatten())
    error, move = torch.cat(errors), torch.cat(moves)
    scale = move.square().mean().sqrt()
    return float(error.square().mean().sqrt() / scale), float(error.abs().max() / scale)
