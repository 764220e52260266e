from collections.abc import Iterable
from typing import Any, final

from torch import Tensor

from .optimizer import FusedOptimizer
from .options import Schedule, WeightDecayMask


@final
class AdamaxW(FusedOptimizer):
    r"""AdamaxW with the semantics of ``optax.adamaxw``: Adam with an infinity norm, weight decay decoupled.

    With gradient :math:`g_t`, parameter :math:`p_t`, step number :math:`t` from 1:

    .. math::
        m_t &= (1-\beta_1) g_t + \beta_1 m_{t-1} \\
        v_t &= \max(|g_t| + \varepsilon, \beta_2 v_{t-1}) \\
        u_t &= \frac{m_t / (1-\beta_1^t)}{v_t} + \lambda p_{t-1} \\
        p_t &= p_{t-1} - \eta u_t

    Args:
        params: see :class:`~fused_optim.optimizer.FusedOptimizer`, as for all that is not named here.
        lr: :math:`\eta`; a float, a tensor of one element, or a callable of the number of earlier steps.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\varepsilon`.
        weight_decay: :math:`\lambda`, decoupled and times ``lr``; a float or a callable as for ``lr``.

    State: ``step`` (int64), ``exp_avg`` and ``exp_inf``. Checkpoints of ``torch.optim.Adamax`` load.
    Errors: ValueError, TypeError or RuntimeError, which name what is wrong.

    Example:
        >>> import torch
        >>> from fused_optim import AdamaxW
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = AdamaxW(model.parameters(), lr=2e-3)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: arXiv 1412.6980 section 7.1 (Adamax), 1711.05101 (decoupled weight decay); ``optax.adamaxw``.
    """

    rule = "adamaxw"

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor | Schedule = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float | Schedule = 1e-4, *,
        weight_decay_mask: WeightDecayMask | None = None, decoupled_lr: bool = False, maximize: bool = False,
        max_grad_norm: float | None = None, skip_nonfinite: bool = False,
        state_format: str = "fp32", master_weights: str | None = None, stochastic_rounding: bool = False,
        unscale_in_step: bool = False, flatten: bool = False, backend: str | None = None,
        foreach: bool | None = None, fused: bool | None = None, capturable: bool = False,
        amsgrad: bool = False, differentiable: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            params, (state_format, master_weights, stochastic_rounding), weight_decay_mask, decoupled_lr,
            max_grad_norm, skip_nonfinite, unscale_in_step, flatten, backend,
            (foreach, fused, capturable, amsgrad, differentiable), lr=lr, betas=betas, eps=eps,
            weight_decay=weight_decay, maximize=maximize,
        )  # fmt: skip
