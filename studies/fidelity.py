"""Do second moments that are stored in fewer bits follow the true ones, fed the same gradients?

With b2 = 0.999 a second moment decays by 0.1% a step. Where rounding cannot express that, the
moment stalls, and short training runs do not show it. So: :data:`BEFORE` steps of stationary
gradients, then the gradients fall, :data:`AFTER` more steps; all the while the moment is compared
with one that is not rounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from fused_optim import AdaBelief, AdamaxW
from fused_optim.reference import Coefficients, Hyperparameters, coefficients
from fused_optim.rounding import MU, NU, Place
from fused_optim.rules import RULES
from fused_optim.storage import BLOCK, formats_of

RESULTS = Path(__file__).parent / "results" / "fidelity.json"

BEFORE, AFTER = 3000, 2000
ROW = 64
"""Elements of a row of an embedding, which get their gradients together."""
ROW_RATE = 0.05
"""How often a sparse row gets a gradient."""
CHECK_EVERY = 100

OPTIMIZERS: dict[str, type[AdaBelief | AdamaxW]] = {"adabelief": AdaBelief, "adamaxw": AdamaxW}
"""By the rule's name."""


class Scenario(NamedTuple):
    """What falls, and by how much."""

    part: str
    factor: int

    @property
    def title(self) -> str:
        return f"{self.part}, {self.factor}x"


BLOCKS, HALF, SPARSE = "whole blocks", "half of a block", "sparse rows"
SCENARIOS = [Scenario(part, factor) for part in (BLOCKS, HALF, SPARSE) for factor in (10, 100)]
"""One row of the parameter each."""


@dataclass(frozen=True)
class Gradients:
    """Gradients of the shape [scenario, element], the same whenever they are asked for.

    Attributes:
        elements: of each scenario, a multiple of :data:`BLOCK`.
        mean: of an element's gradients, over its noise's standard deviation.
        decades: scales of neighbouring elements are spread evenly over so many powers of ten.
    """

    elements: int
    mean: float = 0.0
    decades: float = 2.0
    seed: int = 0

    def __iter__(self) -> Iterator[Tensor]:
        rng = torch.Generator().manual_seed(self.seed)
        shape = (len(SCENARIOS), self.elements)
        scale = 10 ** (-2 - self.decades * torch.rand(shape, generator=rng))
        dense = torch.tensor([s.part != SPARSE for s in SCENARIOS])[:, None]
        factors = torch.tensor([[float(s.factor)] for s in SCENARIOS])
        after = scale / torch.where(falling(self.elements), factors, 1.0)
        for step in range(BEFORE + AFTER):
            row_on = torch.rand(len(SCENARIOS), self.elements // ROW, generator=rng) < ROW_RATE
            on = row_on.repeat_interleave(ROW, 1) | dense
            noisy = self.mean + torch.randn(shape, generator=rng)
            yield noisy * (scale if step < BEFORE else after) * on


def falling(elements: int) -> Tensor:
    """Which elements' gradients fall, [scenario, element]."""
    half = torch.arange(elements) % BLOCK < BLOCK // 2
    return torch.stack([half if s.part == HALF else torch.ones_like(half) for s in SCENARIOS])


class Subject(Protocol):
    """Something with a second moment."""

    def step(self, grad: Tensor) -> None: ...

    def second_moment(self) -> Tensor: ...


Subjects = dict[str, tuple[Subject, Subject]]
"""By name, what to measure and the truth."""


class Ours:
    """One of our optimizers. The parameter stays at zero: the learning rate is 0."""

    def __init__(self, rule: str, state_format: str, elements: int) -> None:
        self.param = torch.nn.Parameter(torch.zeros(len(SCENARIOS), elements))
        self.optimizer = OPTIMIZERS[rule]([self.param], lr=0.0, state_format=state_format, backend="cpu")
        self.key = RULES[rule].states[1]
        self.format = formats_of(torch.float32, state_format, None, False).nu

    def step(self, grad: Tensor) -> None:
        self.param.grad = grad
        self.optimizer.step()

    def second_moment(self) -> Tensor:
        state = self.optimizer.state[self.param]
        aux = self.format.aux_of(self.key)
        return self.format.decode(state[self.key], None if aux is None else state[aux.key])


class Recursion:
    """The same arithmetic, written out from the definitions, with or without the dither."""

    def __init__(self, rule: str, state_format: str, elements: int, nearest: bool) -> None:
        _, self.mu_format, self.nu_format = formats_of(torch.float32, state_format, None, False)
        self.param = torch.zeros(len(SCENARIOS), elements)
        self.mu, self.nu = self.mu_format.encode(self.param, None), self.nu_format.encode(self.param, None)
        self.reference = RULES[rule].reference
        defaults = OPTIMIZERS[rule]([torch.nn.Parameter(self.param)]).defaults
        eps = (defaults["eps"], defaults.get("eps_root", 0))
        hyper = Hyperparameters(0, 0, *defaults["betas"], *eps, 0, 0, 0)
        columns = coefficients(torch.tensor([hyper], dtype=torch.float64), torch.tensor([1]), torch.float32)
        # What changes from step to step concerns the parameter alone.
        self.coefficients = Coefficients(*(column[0] for column in columns))
        self.count, self.nearest = torch.tensor(0), nearest

    def step(self, grad: Tensor) -> None:
        mu, nu = self.mu_format.decode(*self.mu), self.nu_format.decode(*self.nu)
        _, mu, nu = self.reference(self.param, grad, mu, nu, self.coefficients)
        self.count = self.count + 1
        self.mu = self.mu_format.encode(mu, None if self.nearest else Place(self.count, 0, MU))
        self.nu = self.nu_format.encode(nu, None if self.nearest else Place(self.count, 0, NU))

    def second_moment(self) -> Tensor:
        return self.nu_format.decode(*self.nu)


class TrueAdam:
    """Adam's second moment in float64."""

    def __init__(self, elements: int, dtype: torch.dtype = torch.float32, beta2: float = 0.999) -> None:
        self.v = torch.zeros(len(SCENARIOS), elements, dtype=torch.float64)
        self.dtype, self.beta2 = dtype, beta2

    def step(self, grad: Tensor) -> None:
        g = grad.to(self.dtype).double()
        self.v = self.beta2 * self.v + (1 - self.beta2) * g * g

    def second_moment(self) -> Tensor:
        return self.v


class Peer:
    """Another library's Adam; its parameter stays as it is, too."""

    def __init__(self, elements: int, dtype: torch.dtype = torch.float32) -> None:
        self.param = torch.nn.Parameter(torch.zeros(len(SCENARIOS), elements, dtype=dtype))
        self.optimizer = self.make()

    def make(self) -> torch.optim.Optimizer:
        raise NotImplementedError

    def step(self, grad: Tensor) -> None:
        self.param.grad = grad.to(self.param.dtype)
        self.optimizer.step()

    @property
    def state(self) -> dict[str, Any]:
        return self.optimizer.state[self.param]


class TorchBf16(Peer):
    """``torch.optim.Adam``, whose states have the parameter's dtype."""

    def __init__(self, elements: int) -> None:
        super().__init__(elements, torch.bfloat16)

    def make(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.param], lr=0.0)

    def second_moment(self) -> Tensor:
        return self.state["exp_avg_sq"]


class Bitsandbytes(Peer):
    """``bitsandbytes.optim.Adam8bit``."""

    def make(self) -> torch.optim.Optimizer:
        import bitsandbytes

        return bitsandbytes.optim.Adam8bit([self.param], lr=0.0)

    def second_moment(self) -> Tensor:
        from bitsandbytes.functional import dequantize_blockwise

        s = self.state
        block = s["state2"].numel() // s["absmax2"].numel()
        return dequantize_blockwise(s["state2"], absmax=s["absmax2"], code=s["qmap2"], blocksize=block)


class Torchao(Peer):
    """``torchao.optim.Adam8bit``."""

    def make(self) -> torch.optim.Optimizer:
        from torchao.optim import Adam8bit

        return Adam8bit([self.param], lr=0.0)

    def second_moment(self) -> Tensor:
        return self.state["exp_avg_sq"].dequantize()


class Ratio(NamedTuple):
    """Decoded over true, over the elements that ought to have fallen."""

    geometric_mean: float
    """Of those that do not decode to zero."""
    spread: float
    """Standard deviation of the logarithms."""
    zeros: float
    """The share of those that decode to zero, though the truth is not zero."""


def ratio(decoded: Tensor, true: Tensor) -> Ratio:
    decoded, true = decoded.double()[true > 0], true.double()[true > 0]
    logs = (decoded / true)[decoded > 0].log()
    zeros = (decoded <= 0).double().mean().item()
    return Ratio(logs.mean().exp().item(), logs.std().item(), zeros)


NEAREST = "to nearest"
STATIONARY = {"stationary": False, f"stationary, {SPARSE}": True}
COLUMNS = [*STATIONARY, *(s.title for s in SCENARIOS)]


def measure(subjects: Subjects, gradients: Gradients, title: str = "") -> dict[str, dict[str, list[Ratio]]]:
    """Feed everything the same gradients.

    Returns:
        By name and column, the ratio every :data:`CHECK_EVERY` steps: of the stationary part for
        the stationary columns, of what follows for the others.
    """
    found: dict[str, dict[str, list[Ratio]]] = {name: {c: [] for c in COLUMNS} for name in subjects}
    everything = {id(s): s for pair in subjects.values() for s in pair}.values()
    fallen = falling(gradients.elements)
    sparse = torch.tensor([s.part == SPARSE for s in SCENARIOS])
    bar = tqdm(gradients, total=BEFORE + AFTER, desc=title, disable=None if title else True)
    for step, grad in enumerate(bar, 1):
        for subject in everything:
            subject.step(grad)
        if step % CHECK_EVERY:
            continue
        for name, (subject, truth) in subjects.items():
            decoded, true = subject.second_moment(), truth.second_moment()
            if step <= BEFORE:
                for column, rows in STATIONARY.items():
                    found[name][column].append(ratio(decoded[sparse == rows], true[sparse == rows]))
            else:
                for i, s in enumerate(SCENARIOS):
                    found[name][s.title].append(ratio(decoded[i][fallen[i]], true[i][fallen[i]]))
    return found


def bounds(state_format: str, column: str) -> tuple[float, float]:
    """Between what a geometric mean must lie."""
    if state_format == "bf16":
        return 0.98, 1.02
    return (0.95, 1.05) if column in STATIONARY else (0.7, 1.3)


def our_subjects(elements: int, rules: Sequence[str] = tuple(OPTIMIZERS), nearest: bool = True) -> Subjects:
    """Each rule in each format, with dither and, if asked for, rounded to nearest."""
    subjects: Subjects = {}
    for rule in rules:
        truth = Ours(rule, "fp32", elements)
        for state_format in ("bf16", "8bit"):
            name = f"{OPTIMIZERS[rule].__name__} {state_format}"
            subjects[name] = (Ours(rule, state_format, elements), truth)
            if nearest:
                subjects[f"{name}, {NEAREST}"] = (
                    Recursion(rule, state_format, elements, nearest=True),
                    truth,
                )
    return subjects


def peer_subjects(elements: int) -> Subjects:
    true, true_bf16 = TrueAdam(elements), TrueAdam(elements, torch.bfloat16)
    return {
        "torch Adam, bf16 states": (TorchBf16(elements), true_bf16),
        "bitsandbytes 8-bit Adam": (Bitsandbytes(elements), true),
        "torchao 8-bit Adam": (Torchao(elements), true),
    }


STEADINESS = (0, 1, 10, 100)
"""Means of an element's gradients over the standard deviation of their noise."""


def study(elements: int, path: Path = RESULTS) -> None:
    """Measure everything that runs here and write it to ``path``."""
    gradients = Gradients(elements)
    found = {"ours": measure(our_subjects(elements), gradients, "ours")}
    for mean in STEADINESS[1:]:
        subjects = our_subjects(elements, nearest=False)
        found[f"mean {mean}"] = measure(subjects, replace(gradients, mean=mean), f"ours, mean {mean}")
    found["mean 0"] = {name: found["ours"][name] for name in found["mean 1"]}
    # The peers come last: one of them compiles first.
    found["peers"] = measure(peer_subjects(elements), gradients, "peers")
    results = {
        "date": f"{date.today()}",
        "elements": elements * len(SCENARIOS),
        "versions": {name: version(name) for name in ("torch", "bitsandbytes", "torchao")},
        "found": found,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results))
