from collections.abc import Iterable
from typing import Any, final

from torch import Tensor

from .optimizer import FusedOptimizer
from .options import Schedule, WeightDecayMask


@final
class AdaBelief(FusedOptimizer):
    r"""AdaBelief with the semantics of ``optax.adabelief``: large steps where gradients are as predicted.

    With gradient :math:`g_t`, parameter :math:`p_t`, step number :math:`t` from 1:

    .. math::
        m_t &= (1-\beta_1) g_t + \beta_1 m_{t-1} \\
        s_t &= (1-\beta_2) (g_t - m_t)^2 + \beta_2 s_{t-1} + \varepsilon_{root} \\
        u_t &= \frac{m_t / (1-\beta_1^t)}{\sqrt{s_t / (1-\beta_2^t)} + \varepsilon} + \lambda p_{t-1} \\
        p_t &= p_{t-1} - \eta u_t

    ``nesterov``: the numerator is :math:`\beta_1 m_t / (1-\beta_1^{t+1}) + (1-\beta_1) g_t / (1-\beta_1^t)`.

    Args:
        params: see :class:`~fused_optim.optimizer.FusedOptimizer`, as for all that is not named here.
        lr: :math:`\eta`; a float, a tensor of one element, or a callable of the number of earlier steps.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\varepsilon`.
        eps_root: :math:`\varepsilon_{root}`, which goes into the stored :math:`s_t` at every step.
        weight_decay: :math:`\lambda`, decoupled and times ``lr``; a float or a callable as for ``lr``.
        nesterov: look one step ahead in the first moment.

    State: ``step`` (int64), ``exp_avg`` and ``exp_avg_var``.
    Errors: ValueError, TypeError or RuntimeError, which name what is wrong.

    Example:
        >>> import torch
        >>> from fused_optim import AdaBelief
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = AdaBelief(model.parameters(), lr=1e-3, weight_decay=0.1)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: arXiv 2010.07468; ``optax.adabelief``.
    """

    rule = "adabelief"

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor | Schedule = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-16, eps_root: float = 1e-16,
        weight_decay: float | Schedule = 0.0, *, nesterov: bool = False,
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
            eps_root=eps_root, weight_decay=weight_decay, nesterov=nesterov, maximize=maximize,
        )  # fmt: skip
