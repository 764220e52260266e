"""Every backend against the reference on copies: parameters, states and step numbers, bit for bit.

One table of rules, backends, formats and layouts drives all of it; a new one of each adds a line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import BF16, F16, F32, F64, FORMATS, RULES, Judge, assert_same_bits, snapshot
from torch import Tensor

from fused_optim import AdaBelief, AdamaxW
from fused_optim.backends import BACKENDS, extension
from fused_optim.reference import bias_correction

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*encountered in:RuntimeWarning"
)  # NumPy's, in the interpreter

STORED = ["fp32", "bf16", "fp32+8bit", "split16", "bf16_stochastic", "split8+8bit"]
"""Those that differ in how values are stored."""


def device_of(backend: str) -> str:
    """Where a backend can be tried here."""
    return "cuda" if backend == "cuda" or torch.cuda.is_available() and backend == "triton" else "cpu"


def marked(name: str) -> Any:
    device = torch.device(device_of(name))
    reason = "no NVIDIA GPU here" if device.type == "cuda" and not torch.cuda.is_available() else None
    reason = reason or BACKENDS[name].why_not(device)
    return pytest.param(name, marks=[pytest.mark.skip(reason=f"backend {name}: {reason}")] if reason else [])


backends = pytest.mark.parametrize("backend", [marked(name) for name in ("eager", "cpu", "triton", "cuda")])
fused = pytest.mark.parametrize("backend", [marked(name) for name in ("cpu", "triton", "cuda")])
cpu = pytest.mark.skipif(extension("_cpu")[0] is None, reason=extension("_cpu")[1] or "built")
rules = pytest.mark.parametrize("rule", RULES)
formats = pytest.mark.parametrize("format", FORMATS)
stored = pytest.mark.parametrize("format", STORED)


def values(rng: torch.Generator, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Random signs, magnitudes 1e-4 to 1e3."""

    def real() -> Tensor:
        exponent = 7 * torch.rand(shape, generator=rng, dtype=torch.float64) - 4
        sign = torch.randint(0, 2, tuple(shape), generator=rng) * 2 - 1
        return sign * 10**exponent

    return (torch.complex(real(), real()) if dtype.is_complex else real()).to(dtype)


class Model:
    """Parameters stepped by a backend, and twins stepped by the judge."""

    def __init__(
        self,
        rule: str,
        backend: str,
        shapes: Sequence[Sequence[int]],
        format: str = "fp32",
        place: Callable[[Tensor, int], Tensor] = lambda t, i: t.clone(),
        groups: Callable[[list[Tensor]], Any] = lambda params: params,
        **options: Any,
    ) -> None:
        dtype, self.grad_dtype, chosen = FORMATS[format]
        self.rng, self.device = torch.Generator().manual_seed(7), device_of(backend)
        self.params = [
            place(values(self.rng, shape, dtype).to(self.device), i).requires_grad_()
            for i, shape in enumerate(shapes)
        ]
        for p in self.params:
            p.grad_dtype = self.grad_dtype
        reference_lr = 1e-2 if options.get("decoupled_lr") else 0.0
        self.judge = Judge(RULES[rule], **chosen, reference_lr=reference_lr)
        options = {"weight_decay": 0.1, "lr": 1e-2, **RULES[rule].options, **chosen, **options}
        self.optimizer = RULES[rule].optimizer(groups(self.params), backend=backend, **options)

    def set_gradients(
        self, skip: Sequence[int] = (), first: Tensor | None = None, scale: float | None = None
    ) -> None:
        for i, p in enumerate(self.params):
            g = values(self.rng, p.shape, self.grad_dtype)
            if first is not None and g.numel():
                g.view(-1)[: len(first)] = first.to(g.dtype)[: g.numel()]
            if scale is not None:
                g *= scale
            p.grad = None if i in skip else g.to(self.device)

    def step(self) -> None:
        if self.device == "cpu":
            want = self.judge.expected(self.optimizer)
            self.optimizer.step()
        else:
            want = self._expected_on_the_cpu()
            self.optimizer.step()
        assert_same_bits(snapshot_on_cpu(self.optimizer), want)

    def _expected_on_the_cpu(self) -> Any:
        twins = [p.detach().cpu().requires_grad_() for p in self.params]
        groups, i = [], 0
        for group in self.optimizer.param_groups:
            n = len(group["params"])
            groups.append({**group, "params": twins[i : i + n]})
            i += n
        twin = type("Twin", (), {})()
        twin.param_groups, twin.state, twin.state_dict = groups, {}, self.optimizer.state_dict
        for key in ("found_inf", "grad_scale", "seed"):
            if hasattr(self.optimizer, key):
                setattr(twin, key, getattr(self.optimizer, key))
        for p, t in zip(self.params, twins):
            t.grad_dtype = self.grad_dtype
            t.grad = None if p.grad is None else p.grad.cpu()
            twin.state[t] = {k: v.cpu() for k, v in self.optimizer.state.get(p, {}).items()}
        return self.judge.expected(twin)


def snapshot_on_cpu(optimizer: Any) -> dict[str, Any]:
    got = snapshot(optimizer)
    got["params"] = [p.cpu() for p in got["params"]]
    got["states"] = [{k: v.cpu() for k, v in state.items()} for state in got["states"]]
    return got


def guarded(make: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor, int], Tensor], Callable[[], None]]:
    """Place tensors with ``make`` in memory full of one value, and a check that nothing but
    their elements was written."""
    memories: list[tuple[Tensor, Tensor]] = []

    def place(t: Tensor, i: int) -> Tensor:
        placed = make(t)
        n = placed.untyped_storage().nbytes() // placed.element_size()
        base = placed.as_strided((n,), (1,), 0)
        untouched = torch.ones_like(base, dtype=torch.bool)
        untouched.as_strided(placed.shape, placed.stride(), placed.storage_offset()).fill_(False)
        memories.append((base, untouched))
        return placed

    def check() -> None:
        for base, untouched in memories:
            assert bool((base[untouched] == 77).all()), "written outside the parameter"

    return place, check


def filled(t: Tensor, n: int) -> Tensor:
    return torch.full((n,), 77, dtype=t.dtype, device=t.device)


def unaligned(t: Tensor) -> Tensor:
    """One element past an aligned address, with elements after it."""
    return filled(t, t.numel() + 3)[1 : 1 + t.numel()].view(t.shape).copy_(t)


def strided(t: Tensor) -> Tensor:
    """Every third element of its memory."""
    strides = [3 * s for s in torch.empty(t.shape, device="meta").stride()]
    return filled(t, 3 * t.numel() + 3).as_strided(t.shape, strides, 1).copy_(t)


def transposed(t: Tensor) -> Tensor:
    strides = torch.empty(t.shape[::-1], device="meta").stride()[::-1]
    return filled(t, t.numel()).as_strided(t.shape, strides).copy_(t)


SIZES = [(n,) for n in (0, 1, 7, 127, 128, 129, 1023, 1025, 2048, 4099)]


@backends
@rules
@formats
def test_sizes_and_formats(backend: str, rule: str, format: str, flatten: bool) -> None:
    maximize = len(format) % 2 == 0
    model = Model(rule, backend, [*SIZES, (), (3, 5)], format, flatten=flatten, maximize=maximize)
    for skip in ((), (5, 7), ()):
        model.set_gradients(skip)
        model.step()


@fused
@stored
@pytest.mark.parametrize("layout", [unaligned, strided, transposed])
def test_layouts(backend: str, format: str, layout: Callable[[Tensor], Tensor], flatten: bool) -> None:
    rule = list(RULES)[STORED.index(format) % len(RULES)]
    place, check = guarded(layout)
    model = Model(rule, backend, [(1025,), (33, 35), (2, 3, 5, 7)], format, place, flatten=flatten)
    for _ in range(2):
        model.set_gradients()
        model.step()
    check()


@fused
@rules
def test_gradients_of_other_layouts(backend: str, rule: str, flatten: bool) -> None:
    shapes = [(31, 37), (1030,), (4, 1024), (1024,), (8, 16, 5, 5)]
    model = Model(rule, backend, shapes, flatten=flatten)
    layouts = (
        lambda g: g.T.contiguous().T, unaligned, strided, lambda g: g,
        lambda g: g.contiguous(memory_format=torch.channels_last),
    )  # fmt: skip
    for _ in range(2):
        model.set_gradients()
        for p, lay_out in zip(model.params, layouts):
            p.grad = lay_out(p.grad)
        model.step()


@fused
@rules
def test_large_and_many(backend: str, rule: str) -> None:
    """A large prime, and many tiny tensors in both layouts; an interpreted program takes 25 ms."""
    many = 200 if backend == "triton" else 2000
    for shapes, format, flatten in (
        ([(200003,)], "fp32", False),
        ([(200003,)], "bf16", False),
        ([(1 + i % 9,) for i in range(many)], "fp32", rule == "adamaxw"),
    ):
        model = Model(rule, backend, shapes, format, flatten=flatten)
        model.set_gradients()
        model.step()


@fused
@rules
def test_decoupled_lr_and_masked_decay(backend: str, rule: str, flatten: bool) -> None:
    model = Model(
        rule, backend, [(5,), (1025,), (7, 7)], flatten=flatten, decoupled_lr=True,
        weight_decay_mask=[True, False, True],
    )  # fmt: skip
    for i in range(3):
        model.optimizer.param_groups[0]["lr"] = 1e-2 / (i + 1)
        model.set_gradients()
        model.step()


def special_values(dtype: torch.dtype) -> Tensor:
    """NaN, infinities, zeros, subnormals and the largest values of ``dtype``, in float64."""
    nan, inf, tiny, huge = torch.nan, torch.inf, torch.finfo(dtype).tiny, torch.finfo(dtype).max
    special = [nan, inf, -inf, 0.0, -0.0, tiny, -tiny, tiny / 8, -tiny / 64, huge, -huge]
    return torch.tensor(special, dtype=F64)


@fused
@rules
@pytest.mark.parametrize("format", [*STORED, "fp64", "fp16"])
def test_special_values(backend: str, rule: str, format: str) -> None:
    """In a full chunk and in a tail: nothing is flushed to zero, every NaN is where the reference has
    one; then tiny gradients."""
    first = special_values(FORMATS[format][1])
    model = Model(rule, backend, [(2048,), (100,)], format, eps=0.0)
    for _ in range(2):
        model.set_gradients(first=first)
        model.step()
    model = Model(rule, backend, [(2048,), (100,)], format)
    for scale in (1e-30, 1e-20):
        model.set_gradients(scale=scale)
        model.step()


@fused
@stored
def test_one_unusual_value_in_a_full_chunk(backend: str, format: str) -> None:
    """Each alone, in a gradient; then in memory, where gradients are ordinary again; and a zero that is
    written to a parameter."""
    unusual = special_values(FORMATS[format][1])
    rule = list(RULES)[STORED.index(format) % len(RULES)]
    model = Model(rule, backend, [(2048,)] * (len(unusual) + 1), format)
    for step in range(2):
        model.set_gradients()
        for p, x in zip(model.params, unusual if step == 0 else ()):
            p.grad[1000] = x.to(p.grad.dtype)
        with torch.no_grad():
            model.params[-1][:1000:3] = 0
        model.step()


@fused
@rules
@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_grad_scale_and_found_inf(backend: str, rule: str, found_inf: float | None) -> None:
    model = Model(rule, backend, [(5,), (1025,)], "split8+8bit", maximize=True)
    model.set_gradients()
    model.step()
    model.optimizer.grad_scale = torch.tensor(3.0, device=model.device)
    if found_inf is not None:
        model.optimizer.found_inf = torch.tensor(found_inf, device=model.device)
    model.set_gradients()
    model.step()
    assert {int(s["step"]) for s in model.optimizer.state.values()} == {1 if found_inf == 1.0 else 2}


def set_steps(model: Model, step: int) -> None:
    for state in model.optimizer.state.values():
        state["step"].fill_(step)


@fused
@pytest.mark.parametrize("format", ["fp32", "fp64"])
def test_every_step_number(backend: str, format: str) -> None:
    """Bias corrections from the first step to where the count saturates."""
    model = Model("adabelief-nesterov", backend, [(65,)], format, betas=(0.9, 0.999999))
    model.set_gradients()
    model.step()
    for step in (0, 1, 158, 159, 160, 999, 12345678, 2**31 - 3, 2**31 - 2, 2**31 - 1, -5):
        set_steps(model, step)
        for _ in range(2):
            model.set_gradients()
            if step >= 0:
                model.step()
        assert step < 0 or int(model.optimizer.state[model.params[0]]["step"]) == min(step + 2, 2**31 - 1)
    model.optimizer.step()
    assert int(model.optimizer.state[model.params[0]]["step"]) == -4


@fused
@rules
@stored
def test_where_bias_corrections_become_1(backend: str, rule: str, format: str) -> None:
    """The first moment's at step 165, the second's at 17,321: no sooner may a backend leave out the
    divisions, in full chunks and in tails."""
    model = Model(rule, backend, [(2048,), (100,)], format)
    model.set_gradients()
    model.step()
    for beta, last in ((0.9, 164), (0.999, 17320)):
        counts = torch.tensor([last, last + 1])
        corrections = bias_correction(torch.tensor([beta] * 2, dtype=F64), counts, F32)
        assert (corrections == 1).tolist() == [False, True]
        set_steps(model, last - 1)
        for _ in range(2):
            model.set_gradients()
            model.step()


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cpu
@stored
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_cpu_with_any_number_of_threads(format: str, n: int, flatten: bool) -> None:
    with threads(n):
        rule = list(RULES)[n % len(RULES)]
        model = Model(rule, "cpu", [(50003,), *[(i,) for i in range(40)]], format, flatten=flatten)
        model.set_gradients()
        model.step()


@cpu
@rules
@pytest.mark.parametrize("isa", extension("_cpu")[0].isas() if extension("_cpu")[0] else ["none"])
@pytest.mark.parametrize("format", [*STORED, "fp64", "fp16_grad_fp32"])
def test_cpu_with_every_instruction_set(
    rule: str, isa: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension("_cpu")[0], "isas", lambda: [isa])
    model = Model(rule, "cpu", [(1027,), (33,), (20000,)], format)
    for _ in range(2):
        model.set_gradients()
        model.step()


@cpu
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_cpu_codecs(dtype: torch.dtype) -> None:
    """All 65,536 values of a 16-bit dtype decoded and encoded, and 2^20 random float32 bit
    patterns encoded: with betas (0, 0), eps 1 and lr 1 the new parameter is ``p - g``."""
    rng = torch.Generator().manual_seed(0)
    some = torch.randint(-(2**31), 2**31, (2**20,), generator=rng).int().view(F32)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    for start, grad in ((every, torch.zeros(2**16)), (torch.zeros(2**20, dtype=dtype), some)):
        p = start.clone().requires_grad_()
        p.grad_dtype = F32
        p.grad = grad
        AdaBelief([p], lr=1.0, betas=(0.0, 0.0), eps=1.0, eps_root=0.0, backend="cpu").step()
        assert_same_bits(p.detach(), (start.float() - grad).to(dtype))


GPT2 = [(50257, 768), (1024, 768)] + 12 * [
    (768,), (768,), (2304, 768), (2304,), (768, 768), (768,), (768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)
] + [(768,), (768,)]  # fmt: skip


@pytest.mark.parametrize("model", ["gpt2", "ten_thousand"])
def test_launches_of_triton(model: str, flatten: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launches a step, whatever the number of tensors; counted, not run. GPT-2's dimensions are
    divided by 16: the number of launches cannot depend on them."""
    kernels = pytest.importorskip("fused_optim.kernels.step")
    launches: list[str] = []
    monkeypatch.setattr(kernels, "launch_prologue", lambda *a: launches.append("prologue"))
    monkeypatch.setattr(kernels, "launch_step", lambda *a: launches.append("step"))
    shapes = [tuple(-(-n // 16) for n in s) for s in GPT2] if model == "gpt2" else [(64,)] * 10000
    params = [torch.ones(s, device=device_of("triton")).requires_grad_() for s in shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "weight_decay": 0.0}]
    optimizer = AdaBelief(groups, weight_decay=0.1, flatten=flatten, backend="triton")
    for _ in range(3):
        launches.clear()
        optimizer.step()
        assert launches == ["prologue", "step"]


@pytest.mark.parametrize("n", [8, 16])
def test_the_largest_of_two_zeros_is_the_gradients(backend: str, n: int) -> None:
    """Wherever the element lies: a vectorised maximum and a scalar one may take either."""
    p = torch.nn.Parameter(torch.ones(n))
    p.grad = torch.zeros(n)
    optimizer = AdamaxW([p], eps=0.0, backend=backend)
    optimizer.step()
    optimizer.state[p]["exp_inf"].fill_(-0.0)
    optimizer.step()
    assert not optimizer.state[p]["exp_inf"].signbit().any()
