"""Every backend against eager on the CPU: parameters, states and step numbers, bit for bit.

One table of rules, dtypes and layouts drives all of it; a new rule or backend adds a line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor

from fused_optim import AdaBelief, AdamaxW
from fused_optim.backends import BACKENDS, Backend, extension, native
from fused_optim.reference import bias_correction

RULES: dict[str, tuple[type, dict[str, Any]]] = {
    "adabelief": (AdaBelief, {}),
    "adabelief_nesterov": (AdaBelief, {"nesterov": True}),
    "adamaxw": (AdamaxW, {}),
}
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp64": (torch.float64, torch.float64),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "complex64": (torch.complex64, torch.complex64),
    "complex128": (torch.complex128, torch.complex128),
    "fp32_bf16": (torch.float32, torch.bfloat16),
    "bf16_fp32": (torch.bfloat16, torch.float32),
    "fp16_fp32": (torch.float16, torch.float32),
    "fp32_fp64": (torch.float32, torch.float64),
    "bf16_fp64": (torch.bfloat16, torch.float64),
}
"""(parameter, gradient)."""
MEMORY: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32+bf16": ("fp32", {"state_format": "bf16"}),
    "fp32+8bit": ("fp32", {"state_format": "8bit"}),
    "bf16+bf16": ("bf16", {"state_format": "bf16"}),
    "bf16+8bit": ("bf16", {"state_format": "8bit"}),
    "fp16+8bit": ("fp16", {"state_format": "8bit"}),
    "bf16_master": ("bf16", {"master_weights": "fp32"}),
    "fp16_master": ("fp16", {"master_weights": "fp32"}),
    "split16": ("bf16", {"master_weights": "split16"}),
    "split8": ("bf16", {"master_weights": "split8"}),
    "bf16_stochastic": ("bf16", {"stochastic_rounding": True}),
    "fp16_stochastic": ("fp16", {"stochastic_rounding": True}),
    "split16+bf16": ("bf16_fp32", {"master_weights": "split16", "state_format": "bf16"}),
    "split8+8bit": ("bf16", {"master_weights": "split8", "state_format": "8bit"}),
    "stochastic+8bit": ("bf16_fp32", {"stochastic_rounding": True, "state_format": "8bit"}),
}
"""Storage formats: (of DTYPES, the optimizer's options)."""


def _device_of(backend: str) -> str | None:
    """Where a backend can be tried here; None with no such place."""
    for device in ("cuda", "cpu"):
        if (device == "cpu" or torch.cuda.is_available()) and not BACKENDS[backend].why_not(
            torch.device(device)
        ):
            return device
    return None


def _backend(name: str) -> Any:
    device = torch.device(
        "cuda" if name == "cuda" or torch.cuda.is_available() and name == "triton" else "cpu"
    )
    reason = "no NVIDIA GPU here" if device.type == "cuda" and not torch.cuda.is_available() else None
    reason = reason or BACKENDS[name].why_not(device)
    marks = [pytest.mark.skip(reason=f"backend {name}: {reason}")] if reason else []
    return pytest.param(name, marks=marks)


backends = pytest.mark.parametrize("backend", [_backend(name) for name in ("cpu", "triton", "cuda")])
rules = pytest.mark.parametrize("rule", RULES)
memory_formats = pytest.mark.parametrize("memory", MEMORY)
layouts = pytest.mark.parametrize("flatten", [False, True], ids=["list", "flat"])


def values(rng: torch.Generator, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Random signs, magnitudes 1e-4 to 1e3."""

    def real() -> Tensor:
        exponent = 7 * torch.rand(shape, generator=rng, dtype=torch.float64) - 4
        sign = torch.randint(0, 2, tuple(shape), generator=rng) * 2 - 1
        return sign * 10**exponent

    return (torch.complex(real(), real()) if dtype.is_complex else real()).to(dtype)


class Pair:
    """The same model twice: stepped by eager on the CPU, and by a backend."""

    def __init__(
        self,
        rule: str,
        backend: str,
        shapes: Sequence[Sequence[int]],
        dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
        place: Callable[[Tensor, int], Tensor] = lambda t, i: t.clone(),
        groups: Callable[[list[Tensor]], Any] = lambda params: params,
        flatten: bool = False,
        **options: Any,
    ) -> None:
        cls, extra = RULES[rule]
        self.rng = torch.Generator().manual_seed(7)
        self.param_dtype, self.grad_dtype = dtypes
        start = [values(self.rng, shape, self.param_dtype) for shape in shapes]
        device = _device_of(backend)
        self.want = [self._parameter(t.clone()) for t in start]
        self.got = [self._parameter(place(t.to(device), i)) for i, t in enumerate(start)]
        options = {"weight_decay": 0.1, "lr": 1e-2, **extra, **options}
        self.eager = cls(groups(self.want), backend="eager", **options)
        self.optimizer = cls(groups(self.got), backend=backend, flatten=flatten, **options)

    def _parameter(self, t: Tensor) -> Tensor:
        p = t.detach().requires_grad_()
        if self.grad_dtype != self.param_dtype:
            p.grad_dtype = self.grad_dtype
        return p

    def step(
        self,
        skip: Sequence[int] = (),
        lay_out: Callable[[Tensor, int], Tensor] = lambda g, i: g,
        first: Tensor | None = None,
    ) -> None:
        for i, (p, q) in enumerate(zip(self.want, self.got)):
            g = values(self.rng, p.shape, self.grad_dtype)
            if first is not None and g.numel():
                g.view(-1)[: len(first)] = first.to(g.dtype)[: g.numel()]
            p.grad = None if i in skip else g
            q.grad = None if i in skip else lay_out(g.to(q.device), i)
        self.eager.step()
        self.optimizer.step()

    def check(self) -> None:
        for i, (p, q) in enumerate(zip(self.want, self.got)):
            assert_same_bits(q.cpu(), p, f"parameter {i} of shape {tuple(p.shape)}")
            state = {k: v.cpu() for k, v in self.optimizer.state[q].items()}
            assert_same_bits(state, self.eager.state[p], f"state of parameter {i}")


def guarded(make: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor, int], Tensor], Callable[[], None]]:
    """Place tensors with ``make`` in memory full of one value, and a check that nothing but
    their elements was written."""
    memories: list[tuple[Tensor, Tensor]] = []

    def place(t: Tensor, i: int) -> Tensor:
        placed = make(t)
        base = placed._base if placed._base is not None else placed
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
    return (
        filled(t, t.numel())
        .as_strided(t.shape, torch.empty(t.shape[::-1], device="meta").stride()[::-1])
        .copy_(t)
    )


SIZES = [(n,) for n in (0, 1, 7, 1023, 1024, 1025, 2047, 2048, 2049)]


@backends
@rules
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@layouts
def test_sizes_and_dtypes(
    backend: str, rule: str, dtypes: tuple[torch.dtype, torch.dtype], flatten: bool
) -> None:
    pair = Pair(rule, backend, [*SIZES, (), (3, 5)], dtypes, flatten=flatten, maximize=True)
    for _ in range(3):
        pair.step()
    pair.check()


def pair_in(memory: str, rule: str, backend: str, shapes: Sequence[Sequence[int]], **options: Any) -> Pair:
    """A pair of models in one of the storage formats."""
    dtypes, chosen = MEMORY[memory]
    return Pair(rule, backend, shapes, DTYPES[dtypes], **chosen, **options)


@backends
@rules
@layouts
@memory_formats
def test_memory_formats(backend: str, rule: str, flatten: bool, memory: str) -> None:
    sizes = [(n,) for n in (0, 1, 7, 127, 128, 129, 1023, 1025, 2048, 4099)]
    pair = pair_in(memory, rule, backend, [*sizes, (), (3, 5)], flatten=flatten)
    for skip in ((), (5, 7), ()):
        pair.step(skip)
    pair.check()


@backends
@layouts
@memory_formats
@pytest.mark.parametrize("layout", [unaligned, strided, transposed])
def test_layouts_in_memory_formats(
    backend: str, flatten: bool, memory: str, layout: Callable[[Tensor], Tensor]
) -> None:
    place, check = guarded(layout)
    pair = pair_in(
        memory, "adamaxw", backend, [(1025,), (33, 35), (2, 3, 5, 7)], place=place, flatten=flatten
    )
    for _ in range(2):
        pair.step()
    pair.check()
    check()


@backends
@rules
@pytest.mark.parametrize("size", [1000003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_prime(backend: str, rule: str, size: int, dtype: torch.dtype) -> None:
    pair = Pair(rule, backend, [(size,)], (dtype, dtype))
    pair.step()
    pair.check()


@backends
@layouts
def test_two_thousand_tiny_tensors(backend: str, flatten: bool) -> None:
    pair = Pair("adabelief", backend, [(1 + i % 9,) for i in range(2000)], flatten=flatten)
    pair.step()
    pair.check()


@backends
@rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [unaligned, strided, transposed])
@layouts
def test_layouts(
    backend: str, rule: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], flatten: bool
) -> None:
    place, check = guarded(layout)
    pair = Pair(rule, backend, [(1025,), (33, 35), (2, 3, 5, 7)], (dtype, dtype), place, flatten=flatten)
    for _ in range(3):
        pair.step()
    pair.check()
    check()


@backends
@rules
def test_channels_last(backend: str, rule: str) -> None:
    pair = Pair(
        rule, backend, [(8, 16, 5, 5)], place=lambda t, i: t.contiguous(memory_format=torch.channels_last)
    )
    pair.step()
    pair.step(lay_out=lambda g, i: g.contiguous(memory_format=torch.channels_last))
    pair.check()


@backends
@rules
@layouts
def test_gradients_of_other_layouts(backend: str, rule: str, flatten: bool) -> None:
    def lay_out(g: Tensor, i: int) -> Tensor:
        return [lambda: g.T.contiguous().T, lambda: unaligned(g), lambda: strided(g), lambda: g][i]()

    pair = Pair(rule, backend, [(31, 37), (1030,), (4, 1024), (1024,)], flatten=flatten)
    for _ in range(3):
        pair.step(lay_out=lay_out)
    pair.check()


@backends
@layouts
def test_groups_of_different_hyperparameters_step_in_one_launch(backend: str, flatten: bool) -> None:
    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        return [
            {"params": params[:2], "lr": 1e-3, "betas": (0.5, 0.9)},
            {"params": params[2:4], "lr": torch.tensor(1e-2), "eps": 1e-3, "weight_decay": 0.0},
            {
                "params": params[4:],
                "lr": lambda count: 1e-4 * (count + 1),
                "maximize": True,
                "eps_root": 1e-3,
            },
        ]

    shapes = [(5,), (1025,), (), (40, 40), (3,), (2050,)]
    pair = Pair("adabelief", backend, shapes, groups=groups, flatten=flatten)
    for _ in range(4):
        pair.step()
    pair.check()
    assert len(pair.optimizer._plan.batches) == 1


@backends
@rules
@layouts
def test_decoupled_lr_and_masked_decay(backend: str, rule: str, flatten: bool) -> None:
    pair = Pair(
        rule,
        backend,
        [(5,), (1025,), (7, 7)],
        flatten=flatten,
        decoupled_lr=True,
        weight_decay_mask=[True, False, True],
    )
    for i in range(3):
        for optimizer in (pair.eager, pair.optimizer):
            optimizer.param_groups[0]["lr"] = 1e-2 / (i + 1)
        pair.step()
    pair.check()


@backends
@rules
def test_gradients_that_come_and_go(backend: str, rule: str) -> None:
    pair = Pair(rule, backend, [(5,), (1025,), (7, 7), (0,)])
    for skip in ((), (1,), (0, 2), (), (0, 1, 2, 3), (3,)):
        pair.step(skip)
    pair.check()


@backends
def test_gradients_that_come_and_go_when_flat(backend: str) -> None:
    pair = Pair("adabelief", backend, [(5,), (1025,), (7, 7), (0,)], flatten=True)
    for skip in ((), (1,), (0, 2), (), (0, 1, 2, 3), (3,)):
        pair.step(skip)
    pair.check()


def special_values(dtype: torch.dtype) -> Tensor:
    """NaN, infinities, zeros, subnormals and the largest values of ``dtype``, in float64."""
    tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    return torch.tensor(
        [
            float("nan"),
            float("inf"),
            -float("inf"),
            0.0,
            -0.0,
            tiny,
            -tiny,
            tiny / 8,
            -tiny / 64,
            huge,
            -huge,
        ],
        dtype=torch.float64,
    )


@backends
@rules
@memory_formats
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, from Triton's interpreter
def test_special_values_in_memory_formats(backend: str, rule: str, memory: str) -> None:
    first = special_values(DTYPES[MEMORY[memory][0]][1])
    pair = pair_in(memory, rule, backend, [(2048,), (100,)], eps=0.0)
    for _ in range(2):
        pair.step(first=first)
    pair.check()


@backends
@rules
@memory_formats
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, from Triton's interpreter
def test_one_rare_value_in_a_full_chunk(backend: str, rule: str, memory: str) -> None:
    """Each alone, in a gradient; then in memory, where gradients are ordinary again; and a zero that is
    written to a parameter."""
    rare = special_values(DTYPES[MEMORY[memory][0]][1])
    pair = pair_in(memory, rule, backend, [(2048,)] * (len(rare) + 1))
    for step in range(3):
        for i, (p, q) in enumerate(zip(pair.want, pair.got)):
            g = values(pair.rng, p.shape, pair.grad_dtype)
            if step == 0 and i < len(rare):
                g[1000] = rare[i].to(g.dtype)
            p.grad, q.grad = g, g.to(q.device)
        with torch.no_grad():
            pair.want[-1][:1000:3] = 0
            pair.got[-1][:1000:3] = 0
        pair.eager.step()
        pair.optimizer.step()
    pair.check()


@backends
@rules
@pytest.mark.parametrize("dtypes", [DTYPES["fp32"], DTYPES["fp64"], DTYPES["bf16"], DTYPES["fp16"]], ids=str)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, from Triton's interpreter
def test_special_values(backend: str, rule: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """NaN, infinities, zeros of both signs, subnormals and the largest values, in a full
    chunk and in a tail; nothing flushed to zero, every NaN where eager has one."""
    first = special_values(dtypes[1])
    pair = Pair(rule, backend, [(2048,), (100,)], dtypes, eps=0.0)
    for _ in range(2):
        pair.step(first=first)
    pair.check()
    pair = Pair(rule, backend, [(2048,), (100,)], dtypes)
    for scale in (1e-30, 1e-20):
        pair.step(lay_out=lambda g, i: g)
        for p, q in zip(pair.want, pair.got):
            p.grad.mul_(scale)
            q.grad.copy_(p.grad)
        pair.eager.step()
        pair.optimizer.step()
    pair.check()


@backends
@rules
@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_grad_scale_and_found_inf(backend: str, rule: str, found_inf: float | None) -> None:
    pair = Pair(rule, backend, [(5,), (1025,)], maximize=True)
    pair.step()
    for optimizer, params in ((pair.eager, pair.want), (pair.optimizer, pair.got)):
        optimizer.grad_scale = torch.tensor(3.0, device=params[0].device)
        if found_inf is not None:
            optimizer.found_inf = torch.tensor(found_inf, device=params[0].device)
    before = [p.detach().cpu().clone() for p in pair.got]
    pair.step()
    pair.check()
    assert all(torch.equal(b, p.cpu()) for b, p in zip(before, pair.got)) == (found_inf == 1.0)
    assert {int(s["step"]) for s in pair.optimizer.state.values()} == {1 if found_inf == 1.0 else 2}


@backends
@pytest.mark.parametrize("step", [0, 1, 158, 159, 160, 999, 12345678, 2**31 - 3, 2**31 - 2, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_step_number(backend: str, step: int, dtype: torch.dtype) -> None:
    """Bias corrections from the first step to where the count saturates."""
    pair = Pair("adabelief_nesterov", backend, [(65,)], (dtype, dtype), betas=(0.9, 0.999999))
    pair.step()
    for optimizer in (pair.eager, pair.optimizer):
        for state in optimizer.state.values():
            state["step"].fill_(step)
    pair.step()
    pair.step()
    pair.check()
    assert int(pair.eager.state[pair.want[0]]["step"]) == min(step + 2, 2**31 - 1)


@backends
@rules
@pytest.mark.parametrize("memory", ["fp32", *MEMORY])
def test_where_bias_corrections_become_1(backend: str, rule: str, memory: str) -> None:
    """The first moment's at step 165, the second's at 17,321: no sooner may a backend leave out the
    divisions, in full chunks and in tails."""
    shapes = [(2048,), (100,)]
    pair = Pair(rule, backend, shapes) if memory == "fp32" else pair_in(memory, rule, backend, shapes)
    pair.step()
    for beta, last in ((0.9, 164), (0.999, 17320)):
        counts = torch.tensor([last, last + 1])
        corrections = bias_correction(torch.tensor([beta] * 2, dtype=torch.float64), counts, torch.float32)
        assert (corrections == 1).tolist() == [False, True]
        for optimizer in (pair.eager, pair.optimizer):
            for state in optimizer.state.values():
                state["step"].fill_(last - 1)
        pair.step()
        pair.step()
        pair.check()


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


cpu = pytest.mark.skipif(extension("_cpu")[0] is None, reason=extension("_cpu")[1] or "built")


@cpu
@rules
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_cpu_with_any_number_of_threads(rule: str, n: int) -> None:
    with threads(n):
        pair = Pair(rule, "cpu", [(100003,), *[(i,) for i in range(300)]])
        for _ in range(2):
            pair.step()
        pair.check()


@cpu
@rules
@pytest.mark.parametrize("isa", extension("_cpu")[0].isas() if extension("_cpu")[0] else ["none"])
@pytest.mark.parametrize(
    "dtypes", [DTYPES[k] for k in ("fp32", "fp64", "bf16", "fp16_fp32", "fp32_bf16")], ids=str
)
def test_cpu_with_every_instruction_set(
    rule: str, isa: str, dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension("_cpu")[0], "isas", lambda: [isa])
    pair = Pair(rule, "cpu", [(1027,), (33,), (40000,)], dtypes)
    for _ in range(3):
        pair.step()
    pair.check()


@cpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cpu_codecs(dtype: torch.dtype) -> None:
    """All 65,536 values of a 16-bit dtype decoded and encoded, and 2^20 random float32 bit
    patterns encoded: with betas (0, 0), eps 1 and lr 1 the new parameter is ``p - g``."""
    rng = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (2**20,), generator=rng).int().view(torch.float32)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    for start, grad in ((every, torch.zeros(2**16)), (torch.zeros(2**20, dtype=dtype), random)):
        p = start.clone().requires_grad_()
        p.grad_dtype = torch.float32
        p.grad = grad
        AdaBelief([p], lr=1.0, betas=(0.0, 0.0), eps=1.0, eps_root=0.0, backend="cpu").step()
        assert_same_bits(p.detach(), (start.float() - grad).to(dtype))


GPT2 = [(50257, 768), (1024, 768)] + 12 * [
    (768,), (768,), (2304, 768), (2304,), (768, 768), (768,), (768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)
] + [(768,), (768,)]  # fmt: skip


def model_like(model: str, device: str) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Parameters with gradients, in two groups. GPT-2's dimensions are divided by 16: the number
    of launches cannot depend on them."""
    shapes = [tuple(-(-n // 16) for n in s) for s in GPT2] if model == "gpt2" else [(64,)] * 10000
    assert len(shapes) in (148, 10000)
    params = [torch.ones(s, device=device).requires_grad_() for s in shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    first = [p for p in params if p.dim() > 1] or params[:5000]
    second = [p for p in params if p.dim() <= 1] if model == "gpt2" else params[5000:]
    return params, [{"params": first}, {"params": second, "weight_decay": 0.0}]


@layouts
@pytest.mark.parametrize("model", ["gpt2", "ten_thousand"])
def test_launches_of_triton(model: str, flatten: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most two launches a step, whatever the number of tensors; counted, not run."""
    kernels = pytest.importorskip("fused_optim.kernels.step")
    launches: list[str] = []
    monkeypatch.setattr(kernels, "launch_prologue", lambda *a: launches.append("prologue"))
    monkeypatch.setattr(kernels, "launch_step", lambda *a: launches.append("step"))
    params, groups = model_like(model, _device_of("triton"))
    optimizer = AdaBelief(groups, weight_decay=0.1, flatten=flatten, backend="triton")
    for _ in range(3):
        launches.clear()
        optimizer.step()
        assert launches == ["prologue", "step"]
    rows = len(optimizer._plan.batches[0][1].rows)
    assert rows == (2 if flatten else len(params))


@layouts
@pytest.mark.parametrize("model", ["gpt2", "ten_thousand"])
def test_launches_of_cuda(model: str, flatten: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of the CUDA launcher a step, which makes two launches, as
    ``test_cuda_compiled.py`` shows of the real one on the host. Its Python side runs here with
    a stand-in for the extension."""
    calls: list[tuple[Any, ...]] = []

    class Extension:
        chunk_size = staticmethod(lambda: 4096)
        coefficients_bytes = staticmethod(lambda state: 52)
        step = staticmethod(lambda *arguments: calls.append(arguments))

    monkeypatch.setattr(native, "extension", lambda name: (Extension, ""))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setitem(
        BACKENDS, "cuda", Backend("cuda", lambda device: None, native.CUDA.step, native.CUDA.step_bytes)
    )
    params, groups = model_like(model, "cpu")
    optimizer = AdaBelief(groups, weight_decay=0.1, flatten=flatten, backend="cuda")
    for step in range(3):
        optimizer.step()
        assert len(calls) == step + 1
    batch = optimizer._plan.batches[0][1]
    assert calls[-1][:6] == ("adabelief", "fp32", "fp32", "fp32", "fp32", batch.rows.data_ptr())
    assert calls[-1][7] == len(batch.chunks(4096)) and calls[-1][9] == len(params)
    assert calls[-1][-2] == 7


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("n", [8, 16])
def test_the_largest_of_two_zeros_is_the_gradients(backend: str, n: int) -> None:
    """Wherever the element lies: a vectorised maximum and a scalar one may take either."""
    if backend == "cpu" and (reason := BACKENDS["cpu"].why_not(torch.device("cpu"))):
        pytest.skip(f"backend cpu: {reason}")
    p = torch.nn.Parameter(torch.ones(n))
    p.grad = torch.zeros(n)
    optimizer = AdamaxW([p], eps=0.0, backend=backend)
    optimizer.step()
    optimizer.state[p]["exp_inf"].fill_(-0.0)
    optimizer.step()
    assert not optimizer.state[p]["exp_inf"].signbit().any()
