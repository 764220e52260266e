"""Each algorithm in plain float64 PyTorch. The peers differ in where epsilon goes and what decays:
each is held to its own algorithm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LR, BETA1, BETA2, EPS, WEIGHT_DECAY = 0.01, 0.9, 0.999, 1e-8, 0.1
"""What every provider is constructed with: large enough for a bfloat16 parameter to move."""
CHECK_STEPS = 3


class State:
    """One parameter's two moments, and the number of steps made."""

    def __init__(self, like: Tensor) -> None:
        self.m, self.v, self.t = torch.zeros_like(like), torch.zeros_like(like), 0

    def first_moment(self, g: Tensor) -> Tensor:
        """The next first moment, corrected."""
        self.t += 1
        self.m = BETA1 * self.m + (1 - BETA1) * g
        return self.m / (1 - BETA1**self.t)

    def root(self, squares: Tensor, eps: float = 0.0) -> Tensor:
        """The denominator after the next second moment, which is that of ``squares``."""
        self.v = BETA2 * self.v + (1 - BETA2) * squares + eps
        return (self.v / (1 - BETA2**self.t)).sqrt() + EPS


def adamw(p: Tensor, g: Tensor, s: State) -> Tensor:
    """``torch.optim.AdamW``, and Optax's."""
    update = s.first_moment(g) / s.root(g * g)
    return p - LR * (update + WEIGHT_DECAY * p)


def adamax(p: Tensor, g: Tensor, s: State) -> Tensor:
    """``torch.optim.Adamax`` without weight decay."""
    m = s.first_moment(g)
    s.v = torch.maximum(BETA2 * s.v, g.abs() + EPS)
    return p - LR * m / s.v


def adamaxw(p: Tensor, g: Tensor, s: State) -> Tensor:
    """``optax.adamaxw``: Adamax with decoupled weight decay."""
    return adamax(p, g, s) - LR * WEIGHT_DECAY * p


def adabelief(p: Tensor, g: Tensor, s: State) -> Tensor:
    """``optax.adabelief`` with weight decay; also the paper's, whose released code adds ``eps``
    to the state as ``eps_root`` is here."""
    m = s.first_moment(g)
    update = m / s.root((g - s.m) ** 2, EPS)
    return p - LR * (update + WEIGHT_DECAY * p)


ALGORITHMS = {f.__name__: f for f in (adamw, adamax, adamaxw, adabelief)}
"""The new parameter from the old, its gradient and its state, which is changed."""

Problem = tuple[list[Tensor], list[list[Tensor]]]
"""Parameters and the gradients of each step, on the CPU and in the provider's dtype."""


def problem(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, seed: int) -> Problem:
    rng = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> list[Tensor]:
        return [(scale * torch.randn(shape, generator=rng)).to(dtype) for shape in shapes]

    return draw(0.1), [draw(1.0) for _ in range(CHECK_STEPS)]


def small_version(shapes: Sequence[tuple[int, ...]], most: int = 2**20) -> list[tuple[int, ...]]:
    """The first thousand shapes or fewer, each cut to 2^16 elements, of at most ``most`` together."""
    small: list[tuple[int, ...]] = []
    for shape in shapes[:1000]:
        cut = list(shape)
        while (numel := int(torch.Size(cut).numel())) > 2**16:
            largest = cut.index(max(cut))
            cut[largest] = cut[largest] // 2 + 1
        most -= numel
        if most < 0:
            break
        small.append(tuple(cut))
    return small


def relative_error(algorithm: str, given: Problem, got: Sequence[Tensor]) -> float:
    """How far a provider is from its algorithm after :data:`CHECK_STEPS`, relative to the root mean
    square of how far parameters went: the root mean square, or a fortieth of the worst if that is more."""
    errors, moves = [], []
    for i, (start, end) in enumerate(zip(given[0], got, strict=True)):
        p = start.double()
        state = State(p)
        for gradients in given[1]:
            p = ALGORITHMS[algorithm](p, gradients[i].double(), state)
        errors.append((end.detach().cpu().double() - p).flatten())
        moves.append((p - start.double()).flatten())
    error, move = torch.cat(errors), torch.cat(moves)
    worst = torch.maximum(error.square().mean().sqrt(), error.abs().max() / 40)
    return float(worst / move.square().mean().sqrt())
