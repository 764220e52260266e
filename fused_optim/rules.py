"""The update rules that there are: one line each. ``docs/design.md`` says what else a new one takes."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from . import reference


@dataclass(frozen=True)
class Rule:
    name: str  # the function's name in every language
    states: tuple[str, str]  # keys of mu and nu in ``optimizer.state[p]``
    reference: Callable[..., tuple[Tensor, Tensor, Tensor]]  # (p, g, mu, nu, coefficients) -> (p, mu, nu)


_ALL = (
    Rule("adabelief", ("exp_avg", "exp_avg_var"), reference.adabelief),
    Rule("adamaxw", ("exp_avg", "exp_inf"), reference.adamaxw),
    Rule("adamw", ("exp_avg", "exp_avg_sq"), reference.adamw),
)
RULES = {rule.name: rule for rule in _ALL}
