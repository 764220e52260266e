"""What the tests share: the table of rules, comparisons of bits, small models, "raises and changes
nothing", and a step worked out on copies."""

import contextlib
import copy
import fcntl
import functools
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest
import torch
from torch import Tensor

from fused_optim import AdaBelief, AdamaxW, AdamW, reference
from fused_optim.reference import MAX_COUNT, Coefficients, Hyperparameters, coefficients
from fused_optim.rounding import MU, NU, PARAM, Place, random_key
from fused_optim.rules import RULES as REFERENCES
from fused_optim.storage import formats_of


class Rule(NamedTuple):
    """An optimizer as the tests make it."""

    optimizer: Any
    reference: str
    options: dict[str, Any]

    @property
    def nu(self) -> str:
        return REFERENCES[self.reference].states[1]


RULES = {
    "adabelief": Rule(AdaBelief, "adabelief", {}),
    "adabelief-nesterov": Rule(AdaBelief, "adabelief", {"nesterov": True}),
    "adamaxw": Rule(AdamaxW, "adamaxw", {}),
    "adamw": Rule(AdamW, "adamw", {"nesterov": True}),
}
"""The rules that every contract is tested of; a new one is a line here."""
BACKENDS = ["eager", "cpu"]
"""The backends that the tests of bad input and of the optimizer's contract run over."""
OPTIMIZERS = {rule.optimizer: name for name, rule in RULES.items()}
EACH = [(name, BACKENDS[(i + 1) % 2]) for i, name in enumerate(OPTIMIZERS.values())]
"""Each optimizer by one of its rules, and both backends: for what does not depend on their combination."""
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [F32, F64, BF16, F16, torch.complex64, torch.complex128]
FORMATS: dict[str, tuple[torch.dtype, torch.dtype, dict[str, Any]]] = {
    "fp32": (F32, F32, {}),
    "fp64": (F64, F64, {}),
    "bf16": (BF16, BF16, {}),
    "fp16": (F16, F16, {}),
    "complex64": (torch.complex64, torch.complex64, {}),
    "complex128": (torch.complex128, torch.complex128, {}),
    "fp32_grad_bf16": (F32, BF16, {}),
    "bf16_grad_fp32": (BF16, F32, {}),
    "fp16_grad_fp32": (F16, F32, {}),
    "bf16_grad_fp64": (BF16, F64, {}),
    "fp32+bf16": (F32, F32, {"state_format": "bf16"}),
    "fp32+8bit": (F32, F32, {"state_format": "8bit"}),
    "bf16+bf16": (BF16, BF16, {"state_format": "bf16"}),
    "bf16+8bit": (BF16, BF16, {"state_format": "8bit"}),
    "fp16+8bit": (F16, F16, {"state_format": "8bit"}),
    "split16": (BF16, BF16, {"master_weights": "split16"}),
    "split8": (BF16, BF16, {"master_weights": "split8"}),
    "bf16_stochastic": (BF16, BF16, {"stochastic_rounding": True}),
    "split16_grad_fp32+bf16": (BF16, F32, {"master_weights": "split16", "state_format": "bf16"}),
    "split8+8bit": (BF16, BF16, {"master_weights": "split8", "state_format": "8bit"}),
    "stochastic_grad_fp32+8bit": (BF16, F32, {"stochastic_rounding": True, "state_format": "8bit"}),
}
"""Dtypes of a parameter and its gradient, and what the optimizer is asked for; a new format is a line."""
KEPT = {name: (dtype, options) for name, (dtype, grad, options) in FORMATS.items() if grad == dtype}
"""Those that differ in what is kept from step to step."""
SHAPES: list[tuple[int, ...]] = [(), (5,), (4, 5)]

interpreted = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
"""What NumPy says of overflows and NaN in Triton's interpreter."""
ROOT = Path(__file__).parent.parent
Make = Callable[..., Any]
Parameters = list[torch.nn.Parameter]


def bits(t: Tensor) -> Tensor:
    """The bytes of a tensor's elements in logical order, every NaN written the same way."""
    t = plain(t).reshape(-1)
    if t.is_floating_point():
        t[t.isnan()] = torch.nan
    return t.view(torch.uint8)


def plain(t: Tensor) -> Tensor:
    """A copy in logical order on the CPU; of complex numbers, their parts."""
    t = t.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).cpu()
    return torch.view_as_real(t) if t.is_complex() else t


def assert_same_bits(got: Any, want: Any, what: str = "value") -> None:
    """Compare nested lists, tuples and dicts of tensors and plain values, tensors bit for bit."""
    if isinstance(want, Tensor):
        assert isinstance(got, Tensor), f"{what}: {got!r} is no tensor"
        assert (got.dtype, got.shape) == (want.dtype, want.shape), f"{what}: {got.dtype}, {got.shape}"
        if not torch.equal(bits(got), bits(want)):
            differ = plain(got) != plain(want)
            pairs = f"{plain(got)[differ][:4].tolist()} for {plain(want)[differ][:4].tolist()}"
            pytest.fail(f"{what}: {int(differ.sum())} of {differ.numel()} values differ, {pairs} ...")
    elif isinstance(want, dict):
        assert got.keys() == want.keys(), f"{what}: {got.keys()} is not {want.keys()}"
        for key in want:
            assert_same_bits(got[key], want[key], f"{what}[{key!r}]")
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want), f"{what}: {len(got)} is not {len(want)} long"
        for i, (a, b) in enumerate(zip(got, want)):
            assert_same_bits(a, b, f"{what}[{i}]")
    else:
        assert got == want, f"{what}: {got!r} is not {want!r}"


def parameters(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Parameters:
    """Contiguous parameters of normal values."""
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.complex64 if dtype.is_complex else torch.float32
    return [torch.nn.Parameter(torch.randn(shape, generator=rng, dtype=drawn).to(dtype)) for shape in shapes]


def gradient(p: Tensor, seed: int) -> Tensor:
    """A contiguous gradient for ``p``: random sign, magnitudes 1e-4 to 1e2."""
    rng = torch.Generator().manual_seed(seed)

    def real() -> Tensor:
        size = 10 ** (6 * torch.rand(p.shape, generator=rng, dtype=torch.float64) - 4)
        return torch.where(torch.rand(p.shape, generator=rng) < 0.5, size, -size)

    return (torch.complex(real(), real()) if p.is_complex() else real()).to(p.dtype)


def set_gradients(params: Sequence[Tensor], seed: int, skip: Sequence[int] = ()) -> None:
    """Give every parameter a new gradient, but for those numbered in ``skip``."""
    for i, p in enumerate(params):
        p.grad = None if i in skip else gradient(p, 1000 * seed + i)


def train(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: int, first: int = 0) -> None:
    """Make ``steps`` steps with :func:`set_gradients` of the seeds from ``first`` on."""
    for seed in range(first, first + steps):
        set_gradients(params, seed)
        optimizer.step()


def like(params: Parameters) -> Parameters:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def trained(
    make: Make, steps: int = 3, params: Parameters | None = None, **options: Any
) -> tuple[Parameters, Any]:
    """Parameters and an optimizer that has stepped them."""
    params = parameters() if params is None else params
    optimizer = make(params, **options)
    train(optimizer, params, steps)
    return params, optimizer


def copies(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.detach().clone()
    if isinstance(values, dict):
        return {key: copies(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [copies(value) for value in values]
    return copy.deepcopy(values)


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies of the parameters, their states and the count of steps."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "params": copies([p.data for p in params]),
        "states": [copies(dict(optimizer.state.get(p, {}))) for p in params],
        "count": optimizer.param_groups[0]["count"],
    }


def results(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """:func:`snapshot` and the groups' options: all that training may depend on."""
    groups = [
        {k: v for k, v in group.items() if k not in ("params", "schedules")}
        for group in optimizer.param_groups
    ]
    return {**snapshot(optimizer), "groups": copies(groups)}


def saved_and_loaded(value: Any) -> Any:
    """Through ``torch.save`` and ``torch.load(weights_only=True)``."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@contextlib.contextmanager
def raises_with(kind: type[BaseException] | tuple[type[BaseException], ...], *texts: str) -> Iterator[None]:
    """The block raises ``kind`` with all ``texts`` in its message."""
    with pytest.raises(kind) as caught:
        yield
    for text in texts:
        assert text in str(caught.value), f"{text!r} is not in {str(caught.value)!r}"


@contextlib.contextmanager
def raises_unchanged(
    optimizer: torch.optim.Optimizer, kind: type[Exception] | tuple[type[Exception], ...], *texts: str
) -> Iterator[None]:
    """:func:`raises_with`, and no bit of parameters, states and count changes."""
    before = snapshot(optimizer)
    with raises_with(kind, *texts):
        yield
    assert_same_bits(snapshot(optimizer), before, "snapshot")


@functools.cache
def coefficients_of(
    hyper: Hyperparameters, count: int, dtype: torch.dtype, scale: float | None, factor: float
) -> Coefficients:
    table, divisor = torch.tensor([hyper], dtype=F64), None if scale is None else torch.tensor(scale)
    clip = torch.tensor([0, 0, factor], dtype=F64)
    return Coefficients(*(c[0] for c in coefficients(table, torch.tensor([count]), dtype, divisor, clip)))


class Judge:
    """Works out on copies what the next step of an optimizer must give. It keeps nothing between steps
    and knows no address: parameter by parameter, the reference on what the optimizer's groups and states
    and the gradients are now.

    Args:
        rule: the optimizer's.
        options: its formats, the lr that ``decoupled_lr`` refers to, and how it clips.

    Attributes:
        norm: of the gradients of the last step that was worked out.
    """

    def __init__(
        self, rule: Rule, state_format: str = "fp32", master_weights: str | None = None,
        stochastic_rounding: bool = False, reference_lr: float = 0.0, max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
    ) -> None:  # fmt: skip
        self.reference, self.reference_lr = REFERENCES[rule.reference], reference_lr
        self.formats = (state_format, master_weights, stochastic_rounding)
        self.max_grad_norm, self.skip_nonfinite = max_grad_norm, skip_nonfinite
        self.norm = torch.zeros((), dtype=F64)

    def step(self, optimizer: Any, what: str = "step", **numbers: float) -> None:
        want = self.expected(optimizer, **numbers)
        optimizer.step()
        assert_same_bits(snapshot(optimizer), want, what)

    def train(self, optimizer: Any, steps: int = 3, first: int = 0, **numbers: float) -> None:
        """:func:`train` with steps that must be as expected."""
        for seed in range(first, first + steps):
            set_gradients([p for group in optimizer.param_groups for p in group["params"]], seed)
            self.step(optimizer, f"step {seed}", **numbers)

    def expected(self, optimizer: Any, **numbers: float) -> dict[str, Any]:
        """What :func:`snapshot` must be after the next step; ``numbers`` stand for all groups' own."""
        found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        skip = found_inf is not None and float(found_inf) != 0
        factor = self._clip(optimizer, scale)
        skip |= self.skip_nonfinite and not self.norm.isfinite()
        want: dict[str, Any] = {"params": [], "states": [], "count": optimizer.param_groups[0]["count"] + 1}
        for group in optimizer.param_groups:
            decays = group["weight_decay_mask"] or [True] * len(group["params"])
            for p, decay in zip(group["params"], decays):
                values, state = p.detach().clone(), copies(dict(optimizer.state.get(p, {})))
                if p.grad is not None:
                    hyper = self._hyper({**group, **numbers}, decay)
                    key = random_key(getattr(optimizer, "seed", 0), len(want["params"]))
                    values, state = self._step(p, state, hyper, (scale, factor), skip, key)
                want["params"].append(values)
                want["states"].append(state)
        return want

    def _clip(self, optimizer: Any, scale: Tensor | None) -> float:
        sums = [torch.zeros(0, dtype=F64)]
        for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            g = plain(p.grad).to(formats_of(p.dtype, *self.formats).param.working).flatten()
            sums.append(reference.square_sums(g if scale is None else g / scale.to(g).reshape(())))
        limit = torch.inf if self.max_grad_norm is None else self.max_grad_norm
        limit_tensor = torch.tensor(limit, dtype=F64)
        _, self.norm, factor, _ = reference.clip(torch.cat(sums), limit_tensor, self.skip_nonfinite)
        return 1.0 if self.max_grad_norm is None else float(factor)

    def _hyper(self, group: dict[str, Any], decay: bool) -> Hyperparameters:
        return Hyperparameters(
            lr=float(group["lr"]), weight_decay=group["weight_decay"] if decay else 0.0,
            beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
            eps_root=group.get("eps_root", 0.0), initial_lr=self.reference_lr,
            maximize=float(group["maximize"]), nesterov=float(group.get("nesterov", False)),
        )  # fmt: skip

    def _step(
        self, p: Tensor, state: dict[str, Any], hyper: Hyperparameters,
        scaling: tuple[Tensor | None, float], skip: bool, key: int,
    ) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
        formats, count = formats_of(p.dtype, *self.formats), int(state.get("step", 0))
        new_count = torch.tensor(min(count + 1, MAX_COUNT))
        scale, factor = scaling
        given = None if scale is None else float(scale)
        c = coefficients_of(hyper, int(new_count), formats.param.working, given, factor)
        names = ("", *self.reference.states)
        stored, aux = [], []
        for format, name, t in zip(formats, names, (p, *map(state.get, names[1:]))):
            part = format.aux_of(name)
            shape = plain(p).shape if part is None or part.block == 1 else (part.numel(p.numel()),)
            extra = None if part is None else torch.zeros(shape, dtype=part.dtype)
            if part is not None and part.key in state:
                extra = plain(state[part.key])
            stored.append(torch.zeros(plain(p).shape, dtype=format.dtype) if t is None else plain(t))
            aux.append(extra)
        if not skip:
            old = (f.decode(t, extra) for f, t, extra in zip(formats, stored, aux))
            g = plain(p.grad).to(formats.param.working) / c.grad_divisor * c.grad_factor
            values, mu, nu = old
            new = self.reference.reference(values, g, mu, nu, c)
            for i, operand in enumerate((PARAM, MU, NU)):
                stored[i], aux[i] = formats[i].encode(new[i], Place(new_count, key, operand))
        if p.is_complex():
            stored = [torch.view_as_complex(t) for t in stored]
        parts = (f.aux_of(name) for f, name in zip(formats, names))
        state.update(zip(names[1:], stored[1:]))
        state.update({part.key: t for part, t in zip(parts, aux) if part is not None})
        return stored[0], {**state, "step": torch.tensor(count) if skip else new_count}


def built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """A folder that ``build`` filled, shared by the workers of one pytest-xdist run."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, done = base / name, base / f"{name}.done"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            build(folder)
            done.touch()
    return folder


def in_a_process(code: str, **environment: str) -> str:
    """What a new Python prints; it must end by itself, and well."""
    path = {"PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT), str(ROOT / "tests")])}
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **path, **environment}, capture_output=True,
        text=True, timeout=900, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def generated(check: Callable[..., None], count: int, seed: int, *strategies: Any) -> int:
    """Call ``check`` with ``count`` examples of Hypothesis's ``strategies``, the same in every run of one
    ``seed``, and shrink what fails. How many were checked."""
    checked = 0

    def counted(drawn: tuple[Any, ...]) -> None:
        nonlocal checked
        check(*drawn)
        checked += 1

    phases = (hypothesis.Phase.generate, hypothesis.Phase.shrink)
    quiet = list(hypothesis.HealthCheck)
    limits = hypothesis.settings(
        max_examples=count, deadline=None, database=None, phases=phases, suppress_health_check=quiet
    )
    hypothesis.seed(seed)(limits(hypothesis.given(hypothesis.strategies.tuples(*strategies))(counted)))()
    return checked
