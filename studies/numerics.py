"""``python -m studies.numerics``: the error of a step against float64, by stage, as in docs/numerics.md. It
prints the tables and draws docs/numerics.png; two million samples take a minute."""

import sys
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from fused_optim.reference import Hyperparameters, coefficients, corrected_first_moment, first_moment, sqrt
from fused_optim.rules import RULES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SAMPLES, STEPS = 2_000_000, 10
EPS = {"adabelief": (1e-16, 1e-16), "adamaxw": (1e-8, 0.0), "adamw": (1e-8, 0.0)}  # eps and eps_root
PLOT = Path(__file__).parent.parent / "docs" / "numerics.png"


def hyperparameters(rule: str, weight_decay: float = 0.0) -> Tensor:
    eps, eps_root = EPS[rule]
    h = Hyperparameters(1e-3, weight_decay, 0.9, 0.999, eps, eps_root, 0.0, 0.0, 0.0)
    return torch.tensor([h], dtype=torch.float64)


def stages(rule: str, p: Tensor, g: Tensor, mu: Tensor, nu: Tensor, count: int) -> dict[str, Tensor]:
    """The values of a step in the precision of ``p``: moments, denominator, update and new parameter."""
    columns = coefficients(hyperparameters(rule), torch.tensor([count]), p.dtype)
    c = type(columns)(*(value[0] for value in columns))
    new_p, new_mu, new_nu = RULES[rule].reference(p, g, mu, nu, c)
    root = sqrt(new_nu / c.bias_correction2 + (c.eps_root if rule == "adamw" else 0))
    denominator = new_nu if rule == "adamaxw" else root + c.eps
    update = corrected_first_moment(g, first_moment(g, mu, c), c) / denominator
    names = ("first moment", "second moment", "denominator", "update", "parameter")
    return dict(zip(names, (new_mu, new_nu, denominator, update, new_p)))


def in_ulps(got: Tensor, exact: Tensor) -> Tensor:
    """The error in units in the last place of float32 at the exact value."""
    unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent.clamp(min=-125) - 24)
    return (got.double() - exact).abs() / unit


def errors(rule: str, spread: float, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Errors by stage after ``STEPS`` steps of gradients ``mean + spread * noise``, of magnitudes 1e-6 to 1:
    of the last step alone, which begins with the float32 state in both precisions, and of all steps."""
    rng = torch.Generator().manual_seed(seed)
    mean = 10 ** (-6 * torch.rand(SAMPLES, generator=rng, dtype=torch.float64))
    p = torch.randn(SAMPLES, generator=rng)
    short, long = (p, *(torch.zeros_like(p) for _ in range(2))), (p.double(), *(mean * 0 for _ in range(2)))
    for count in range(1, STEPS + 1):
        g = (mean * (1 + spread * torch.randn(SAMPLES, generator=rng, dtype=torch.float64))).float()
        alone = stages(rule, *(short[0].double(), g.double(), *(t.double() for t in short[1:])), count)
        got = stages(rule, short[0], g, *short[1:], count)
        exact = stages(rule, long[0], g.double(), *long[1:], count)
        short = (got["parameter"], got["first moment"], got["second moment"])
        long = (exact["parameter"], exact["first moment"], exact["second moment"])
    return ({k: in_ulps(got[k], alone[k]) for k in got}, {k: in_ulps(got[k], exact[k]) for k in got})


def main() -> int:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, spread in zip(axes, (1.0, 1e-3)):
        print(f"\ngradients {spread:g} times as noisy as they are large")
        for rule in RULES:
            one, many = errors(rule, spread)
            for name in one:
                both = [x[name].float().sort().values for x in (one, many)]
                figures = [float(x[int(q * (SAMPLES - 1))]) for x in both for q in (0.5, 0.999, 1.0)]
                print(f"| {rule} | {name} | " + " | ".join(f"{value:.3g}" for value in figures) + " |")
            levels = torch.linspace(0, 1, 1001)
            sorted_update = many["update"].sort().values
            at = (levels * (SAMPLES - 1)).long()
            axis.semilogy(levels, sorted_update[at].clamp(min=1e-2), label=rule)
        axis.set_title(f"noise / mean of gradients = {spread:g}")
        axis.set_xlabel("share of elements")
        axis.legend()
    axes[0].set_ylabel(f"error of the update after {STEPS} steps, ulp of float32")
    figure.tight_layout()
    figure.savefig(PLOT, dpi=120)
    return 0


if __name__ == "__main__":
    sys.exit(main())
