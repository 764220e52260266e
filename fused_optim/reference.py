"""The mathematics: one short function for each update rule, in plain PyTorch. It is the definition: every
other backend must give the same bits. Every line is one correctly rounded operation after another, in the
order written: no ``lerp``, ``addcmul`` or ``add(alpha=)``, which may round once where this rounds twice.

A rule takes tensors in the working precision (float64 for float64 parameters, else float32) and returns
the new parameter and states; it writes nothing. ``c`` holds :class:`Coefficients` as 0-dim tensors, not
Python numbers: PyTorch multiplies by a rounded reciprocal when a CUDA tensor is divided by a Python number.

Sources: arXiv 2010.07468 (AdaBelief), 1412.6980 section 7.1 (Adamax), 1711.05101 (decoupled weight decay);
Optax ``scale_by_belief``, ``scale_by_adamax``, ``add_decayed_weights``, ``scale_by_learning_rate``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_COUNT = 2**31 - 1  # the step number saturates here, as Optax's int32 count does
NORM_CHUNK, NORM_LANES = 4096, 256  # the order in which squares are added: see tree_sum


class Hyperparameters(NamedTuple):
    """One parameter group's numbers, before any rounding: floats, or float64 tensors of one value for
    each row. The order is the column order of the table that every backend reads."""

    lr: Any
    weight_decay: Any
    beta1: Any
    beta2: Any
    eps: Any
    eps_root: Any
    initial_lr: Any  # 0 for weight decay times lr; else weight decay times ``lr / initial_lr``
    maximize: Any  # 1 to ascend, 0 to descend
    nesterov: Any  # 1 for Nesterov's look-ahead in the first moment, in rules that have it; else 0


class Coefficients(NamedTuple):
    """What a rule multiplies and divides by: :class:`Hyperparameters` at one step number, rounded once to
    the working precision. The order is the column order of the table that the kernels read."""

    beta1: Tensor
    one_minus_beta1: Tensor
    beta2: Tensor
    one_minus_beta2: Tensor
    eps: Tensor
    eps_root: Tensor
    bias_correction1: Tensor
    bias_correction1_next: Tensor  # of the step after this one: Nesterov's look-ahead
    bias_correction2: Tensor
    neg_lr: Tensor
    decay: Tensor  # weight decay, times ``lr / initial_lr`` with ``decoupled_lr``
    decay_kind: Tensor  # 0: no decay; 1: in the update, which is times lr; 2 (decoupled_lr): in the parameter
    grad_divisor: Tensor  # grad_scale, 1 for none
    nesterov: Tensor
    grad_factor: Tensor  # multiplies the quotient: the clip coefficient, 1 for none; negative to ascend


def bias_correction(beta: Tensor, count: Tensor, dtype: torch.dtype) -> Tensor:
    """``1 - beta ** count``: ``beta`` rounded to ``dtype``, the power taken in float64 by repeated squaring,
    lowest bit first. That has the same bits in every backend, which a library's ``pow`` has not."""
    square = beta.to(dtype).to(torch.float64)
    power = torch.ones_like(square)
    for bit in range(MAX_COUNT.bit_length()):
        power = torch.where((count >> bit) & 1 == 1, power * square, power)
        square = square * square
    return 1 - power.to(dtype)


def coefficients(
    hyper: Tensor, count: Tensor, dtype: torch.dtype,
    grad_scale: Tensor | None = None, clip: Tensor | None = None,
) -> Coefficients:  # fmt: skip
    """The coefficients of ``hyper``, float64 ``[n, len(Hyperparameters)]``, at the step numbers ``count``,
    int64 ``[n]`` and 1 at the first step, in the working precision ``dtype``."""
    h = Hyperparameters(*hyper.unbind(1))
    counts = torch.stack([count, (count + 1).clamp(max=MAX_COUNT), count])
    corrections = bias_correction(torch.stack([h.beta1, h.beta1, h.beta2]), counts, dtype)
    decoupled = h.initial_lr != 0
    ones = torch.ones_like(h.lr)
    factor = ones if clip is None else ones * clip[2]
    exact = Coefficients(
        beta1=h.beta1,
        one_minus_beta1=1 - h.beta1,
        beta2=h.beta2,
        one_minus_beta2=1 - h.beta2,
        eps=h.eps,
        eps_root=h.eps_root,
        bias_correction1=corrections[0],
        bias_correction1_next=corrections[1],
        bias_correction2=corrections[2],
        neg_lr=-h.lr,
        decay=torch.where(decoupled, h.weight_decay * (h.lr / h.initial_lr), h.weight_decay),
        decay_kind=torch.where(h.weight_decay != 0, torch.where(decoupled, 2.0, 1.0), 0.0),
        grad_divisor=ones if grad_scale is None else ones * grad_scale.to(torch.float64),
        nesterov=h.nesterov,
        grad_factor=torch.where(h.maximize != 0, -factor, factor),
    )
    return Coefficients(*(value.to(dtype) for value in exact))


def sqrt(x: Tensor) -> Tensor:
    """Correctly rounded. ``torch.sqrt`` on CPU is off by one unit for 15% of float32 and 1% of float64 values
    (torch 2.13.0). The rounded float64 root of a float32 value is right, and so is the complex root."""
    if x.dtype == torch.float32:
        return x.double().sqrt().float()
    if x.device.type != "cpu":
        return x.sqrt()
    return torch.where(x > 0, x.to(torch.complex128).sqrt().real, x.sqrt())


def tree_sum(x: Tensor) -> Tensor:
    """The sum over the last dimension in the order of every backend: lane ``k`` of 256 adds up elements
    ``k``, ``k + 256``, ``k + 512`` and so on; then neighbouring lanes are added until one is left. What is
    missing of the last 256 counts as 0."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % NORM_LANES))
    lanes = x.new_zeros(*x.shape[:-1], NORM_LANES)
    for start in range(0, x.shape[-1], NORM_LANES):
        lanes = lanes + padded[..., start : start + NORM_LANES]
    while lanes.shape[-1] > 1:
        lanes = lanes[..., ::2] + lanes[..., 1::2]
    return lanes[..., 0]


def square_sums(g: Tensor) -> Tensor:
    """Of each 4,096 elements of a vector the sum of their squares, in float64: of float32 they are exact."""
    wide = torch.nn.functional.pad(g.to(torch.float64), (0, -g.numel() % NORM_CHUNK)).view(-1, NORM_CHUNK)
    return tree_sum(wide * wide)


def clip(sums: Tensor, max_grad_norm: Tensor, skips: bool) -> Tensor:
    """From sums of squares, in order, in float64: their total; its root, which is the norm; the coefficient
    ``min(1, max_grad_norm / (norm + 1e-6))`` of ``torch.nn.utils.clip_grad_norm_``; and 1 for a step that
    changes nothing, since the norm is not finite and such a norm ``skips`` it, else 0."""
    total = tree_sum(sums)
    norm = sqrt(total)
    coefficient = max_grad_norm / (norm + 1e-6)
    skip = ~norm.isfinite() & skips
    return torch.stack([total, norm, torch.where(coefficient > 1, 1.0, coefficient), skip.to(torch.float64)])


def first_moment(g: Tensor, m: Tensor, c: Coefficients) -> Tensor:
    return c.one_minus_beta1 * g + c.beta1 * m


def corrected_first_moment(g: Tensor, m: Tensor, c: Coefficients) -> Tensor:
    """The first moment over its bias correction, with Nesterov's look-ahead where ``c.nesterov`` is set."""
    ahead = c.beta1 * (m / c.bias_correction1_next) + c.one_minus_beta1 * (g / c.bias_correction1)
    return torch.where(c.nesterov != 0, ahead, m / c.bias_correction1)


def apply_update(p: Tensor, u: Tensor, c: Coefficients) -> Tensor:
    """Weight decay and the step, shared by every rule. Decay is selected, not "add zero": they differ for
    infinite and NaN parameters and for signed zeros."""
    decay = c.decay * p
    u = torch.where(c.decay_kind == 1, u + decay, u)
    new = p + c.neg_lr * u
    return torch.where(c.decay_kind == 2, new - decay, new)


def adabelief(p: Tensor, g: Tensor, m: Tensor, s: Tensor, c: Coefficients) -> tuple[Tensor, Tensor, Tensor]:
    """AdaBelief: large steps where gradients are as predicted; each step adds ``eps_root`` to the state."""
    m = first_moment(g, m, c)
    e = g - m
    s = (c.one_minus_beta2 * (e * e) + c.beta2 * s) + c.eps_root
    u = corrected_first_moment(g, m, c) / (sqrt(s / c.bias_correction2) + c.eps)
    return apply_update(p, u, c), m, s


def adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, c: Coefficients) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW: ``eps_root`` goes under the root, not into the stored state."""
    m = first_moment(g, m, c)
    v = c.one_minus_beta2 * (g * g) + c.beta2 * v
    u = corrected_first_moment(g, m, c) / (sqrt(v / c.bias_correction2 + c.eps_root) + c.eps)
    return apply_update(p, u, c), m, v


def adamaxw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, c: Coefficients) -> tuple[Tensor, Tensor, Tensor]:
    """AdamaxW: Adam with an exponentially weighted infinity norm, decay decoupled."""
    m = first_moment(g, m, c)
    largest, decayed = g.abs() + c.eps, c.beta2 * v
    # Not torch.maximum: which of +0 and -0 it gives depends on the element's place.
    v = torch.where((decayed > largest) | decayed.isnan(), decayed, largest)
    u = (m / c.bias_correction1) / v
    return apply_update(p, u, c), m, v
