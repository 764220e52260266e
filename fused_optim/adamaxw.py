"""AdamaxW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, final

from torch import Tensor

from .optimizer import FusedOptimizer
from .options import Schedule, WeightDecayMask

__all__ = ["AdamaxW"]


@final
class AdamaxW(FusedOptimizer):
    r"""AdamaxW: Adam with an exponentially weighted infinity norm and decoupled weight
    decay, with the semantics of ``optax.adamaxw``, in one fused pass.

    With gradient :math:`g_t`, parameter :math:`p_t`, step number :math:`t` from 1:

    .. math::
        m_t &= (1-\beta_1) g_t + \beta_1 m_{t-1} \\
        v_t &= \max(|g_t| + \varepsilon, \beta_2 v_{t-1}) \\
        u_t &= \frac{m_t / (1-\beta_1^t)}{v_t} + \lambda p_{t-1} \\
        p_t &= p_{t-1} - \eta u_t

    Args:
        params: parameters, named parameters, or dicts of groups, of any mix of float32,
            float64, bfloat16, float16, complex64 and complex128, of any shape and layout.
        lr: :math:`\eta`; a float, a tensor of one element on the CPU or the parameters'
            device, or a callable of the number of earlier ``step()`` calls.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\varepsilon`.
        weight_decay: :math:`\lambda`, decoupled and times ``lr``; a float, or a callable as for
            ``lr``.
        weight_decay_mask: which parameters decay: a callable of (name, parameter), a
            mapping from name to bool, or a list of bools in parameter order. Unnamed
            parameters are named by their number in their group.
        decoupled_lr: scale weight decay by ``lr / initial_lr`` in place of ``lr``
            (Loshchilov and Hutter).
        maximize: ascend.
        state_format: how moments are stored: ``"fp32"``, ``"bf16"`` (2 bytes each) or ``"8bit"``
            (1 byte each, and one for every 128 elements), rounded so that their mean is right.
        master_weights: what keeps the bits of a bfloat16 parameter that its 16 cannot hold: None,
            ``"split16"`` (16 bits beside the parameter, together the exact float32) or ``"split8"`` (8 bits, a float32 of 24 bits).
            float32 and float64 parameters need none and have none.
        stochastic_rounding: round bfloat16 parameters up or down at the odds of what is cut off,
            instead of to nearest, where small updates are lost; see :attr:`seed`.
        flatten: move parameters, gradients and states into one contiguous buffer each; the tensors
            become views of them. Results are the same; see :meth:`unflatten`.
        backend: None for the best that the device has, or ``"triton"``, ``"cuda"``,
            ``"cpu"``, ``"eager"``.

    State: ``step`` (int64), ``exp_avg`` and ``exp_inf``, in float32 for 16-bit parameters
    and in the parameter's dtype otherwise. Checkpoints of ``torch.optim.Adamax`` load.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type; named.
        RuntimeError: the backend that was named is not available; says why.

    Example:
        >>> import torch
        >>> from fused_optim import AdamaxW
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = AdamaxW(model.parameters(), lr=2e-3)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: arXiv 1412.6980 section 7.1 (Adamax), 1711.05101 (decoupled weight decay);
    ``optax.adamaxw``.
    """

    rule = "adamaxw"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor | Schedule = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Schedule = 1e-4,
        *,
        weight_decay_mask: WeightDecayMask | None = None,
        decoupled_lr: bool = False,
        maximize: bool = False,
        state_format: str = "fp32",
        master_weights: str | None = None,
        stochastic_rounding: bool = False,
        flatten: bool = False,
        backend: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(
            params,
            defaults,
            weight_decay_mask=weight_decay_mask,
            decoupled_lr=decoupled_lr,
            state_format=state_format,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            flatten=flatten,
            backend=backend,
        )
