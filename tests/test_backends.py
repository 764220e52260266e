"""Every backend against the reference on copies: parameters, states and step numbers, bit for bit.

One table of rules, backends, formats and layouts drives all of it; a new one of each adds a line. One step
takes tensors of all sizes and layouts: kernels that run in Triton's interpreter take 20 ms a block.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import F32, F64, FORMATS, RULES, Judge, assert_same_bits, gradient, in_a_process, interpreted
from torch import Tensor
from worlds import COVERING, Row, World, steps_until_one

from fused_optim import AdaBelief, AdamaxW
from fused_optim.backends import BACKENDS, extension, native, uploaded, valid_now
from fused_optim.rules import RULES as REFERENCES
from fused_optim.storage import Formats

pytestmark = interpreted

STORED = ["fp32", "bf16", "fp32+8bit", "split16", "bf16_stochastic", "split8+8bit"]
"""Those that differ in how values are stored."""


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """What a step allocates is filled with NaN, or the largest integers, before it is given out."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def device_of(backend: str) -> str:
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


def turn(of: Sequence[Any], *numbers: int) -> Any:
    """One of several for an axis that need not be crossed with the others."""
    return of[sum(numbers) % len(of)]


class Model:
    """Parameters, an optimizer that steps them with a backend, and its judge."""

    def __init__(
        self, rule: str, backend: str, shapes: Sequence[tuple[int, ...]], format: str = "fp32",
        layouts: Sequence[str] = (), groups: Callable[[list[Tensor]], Any] = list, **options: Any,
    ) -> None:  # fmt: skip
        dtype, self.grad_dtype, chosen = FORMATS[format]
        self.device, self.seed = device_of(backend), 0
        self.params = [gradient(torch.empty(s, dtype=dtype), i).to(self.device) for i, s in enumerate(shapes)]
        self.params = [LAYOUTS[name](p) for name, p in zip(layouts or [""] * len(shapes), self.params)]
        self.outside, self.strides = [outside(p) for p in self.params], [p.stride() for p in self.params]
        for p in self.params:
            p.requires_grad_().grad_dtype = self.grad_dtype
        given = {k: options[k] for k in ("max_grad_norm", "skip_nonfinite") if k in options}
        reference_lr = 1e-2 if options.get("decoupled_lr") else 0.0
        self.judge = Judge(RULES[rule], **chosen, **given, reference_lr=reference_lr)
        options = {"weight_decay": 0.1, "lr": 1e-2, **RULES[rule].options, **chosen, **options}
        self.optimizer = RULES[rule].optimizer(groups(self.params), backend=backend, **options)

    def set_gradients(self, skip: Sequence[int] = (), layouts: Sequence[str] = ()) -> None:
        self.seed += 1
        for i, p in enumerate(self.params):
            g = gradient(torch.empty(p.shape, dtype=self.grad_dtype), 1000 * self.seed + i).to(self.device)
            p.grad = None if i in skip else LAYOUTS[layouts[i] if layouts else ""](g)

    def step(self) -> None:
        self.judge.step(self.optimizer)
        if self.optimizer.grad_norm is not None:
            assert_same_bits(self.optimizer.grad_norm.cpu(), self.judge.norm, "grad_norm")
        assert all(bool((memory[mask] == 77).all()) for memory, mask in self.outside), "written outside"
        assert [p.stride() for p in self.params] == self.strides

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.set_gradients()
            self.step()


# Layouts of a tensor, in memory that is full of one value otherwise.


def placed(t: Tensor, strides: Sequence[int], start: int = 0, after: int = 0) -> Tensor:
    n = start + (1 + sum((n - 1) * s for n, s in zip(t.shape, strides)) if t.numel() else 0) + after
    memory = torch.full((n,), 77, dtype=t.dtype, device=t.device)
    return memory.as_strided(t.shape, strides, start).copy_(t)


def outside(t: Tensor) -> tuple[Tensor, Tensor]:
    """The memory that a tensor lies in, and where in it no element is."""
    memory = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
    mask = torch.ones_like(memory, dtype=torch.bool)
    mask.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(False)
    return memory, mask


def strides_of(shape: Sequence[int], **options: Any) -> tuple[int, ...]:
    return torch.empty(tuple(shape), device="meta", **options).stride()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda t: t,
    "guarded": lambda t: placed(t, t.stride(), 64, after=64),
    "unaligned": lambda t: placed(t, t.stride(), 1, after=2),
    "every third": lambda t: placed(t, [3 * s for s in t.stride()], 1, after=2),
    "columns": lambda t: placed(t, [s + 4 * s // t.shape[-1] for s in t.stride()[:-1]] + [1], 2),
    "transposed": lambda t: placed(t, strides_of(t.shape[::-1])[::-1]),
    "last outermost": lambda t: placed(t, [*strides_of(t.shape[:-1]), t.numel() // t.shape[-1]], 1),
    "channels_last": lambda t: placed(t, strides_of(t.shape, memory_format=torch.channels_last)),
    "expanded": lambda t: t[:1].expand(t.shape),
}


def program(format: str) -> int:
    """Elements of a full program of Triton's."""
    dtype, grad_dtype, options = FORMATS[format]
    smallest = min(t.to_real().itemsize for t in (dtype, grad_dtype))
    return 4096 // (2 if options else smallest)


def tensors(n: int) -> list[tuple[tuple[int, ...], str, str]]:
    """Shapes, and layouts of the parameter and the gradient; ``n`` is a program's size."""
    return [
        *(((k,), "guarded", "") for k in (0, 1, 7, 127, 128, 129, 255, 257, n, n + 1, 2 * n + 3)),
        *((shape, "", "") for shape in ((), (3, 5), (0, 3), (3, 0), (1, 1, 1))),
        ((300,), "unaligned", ""), ((200,), "", "unaligned"),
        ((7, 31), "every third", ""), ((8, 31), "", "every third"),
        ((5, 13), "columns", "columns"), ((8, 31), "", "transposed"),
        ((8, 31), "transposed", ""), ((2, 3, 5, 7), "channels_last", ""),
        ((2, 3, 5, 7), "", "channels_last"), ((2, 3, 4, 5), "last outermost", "columns"),
        ((6, 10), "", "expanded"),
    ]  # fmt: skip


def check_layouts(rule: str, backend: str, format: str, chosen: Sequence[Any], **options: Any) -> None:
    """Of :func:`tensors` those that are chosen; two of them start late."""
    shapes, layouts, of_gradients = zip(*chosen)
    model = Model(rule, backend, shapes, format, layouts, **options)
    model.set_gradients(skip=(2, 4))
    model.step()
    model.set_gradients(layouts=of_gradients)
    model.step()


@pytest.mark.parametrize(("sees_gpu", "said", "reason"), [
    (True, None, None), (False, None, "torch sees no GPU"),
    (True, "no kernel image", "no kernel image; FUSED_OPTIM"),
])  # fmt: skip
def test_cuda_is_for_what_its_driver_takes(
    sees_gpu: bool, said: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check() -> None:
        if said is not None:
            raise RuntimeError(said)

    monkeypatch.setattr(native, "extension", lambda name: (SimpleNamespace(check=check), None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sees_gpu)
    found = BACKENDS["cuda"].why_not(torch.device("cuda"))
    assert found is None if reason is None else found is not None and found.startswith(reason)


def test_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are recorded on streams other than that of their upload, and not while a graph is captured; what a
    capture uploads is for no other step."""
    now: dict[str, Any] = {"stream": 1, "capturing": False}
    recorded: list[int] = []
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=now["stream"])
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now["capturing"])
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    monkeypatch.setattr(Tensor, "to", lambda t, *where, **how: t.clone())
    monkeypatch.setattr(Tensor, "record_stream", lambda t, stream: recorded.append(stream.cuda_stream))
    held: dict[str, Tensor] = {}

    def upload(key: str) -> Tensor:
        return uploaded(held, torch.device("cuda:0"), [key], lambda _: torch.ones(2))[0]

    first = upload("before")
    for now["stream"] in (1, 2, 1):
        assert upload("before") is first
    assert recorded == [2]
    now.update(stream=3, capturing=True)
    assert upload("before") is first and upload("captured") is not first
    assert recorded == [2] and list(valid_now(held)) == ["before"]


@backends
@rules
@formats
def test_every_rule_in_every_format(backend: str, rule: str, format: str) -> None:
    """Tensors of all sizes and layouts in one step. Half of the rules are flat.
    Eager, and Triton in its interpreter, take no vectors: there a format's rules share the tensors out."""
    i, j = list(RULES).index(rule), list(FORMATS).index(format)
    chosen = tensors(program(format))
    if backend == "eager" or backend == "triton" and device_of(backend) == "cpu":
        chosen = chosen[(i + j) % len(RULES) :: len(RULES)]
    options = {"flatten": (i // 2 + j) % 2 == 1, "maximize": j % 2 == 0}
    check_layouts(rule, backend, format, chosen, **options)


@fused
@pytest.mark.parametrize(
    ("rule", "format", "flatten"), [("adabelief", "fp32", False), ("adamaxw", "split8+8bit", True)]
)
def test_large_and_many(backend: str, rule: str, format: str, flatten: bool) -> None:
    """Large primes, the CPU's chunks, many tiny tensors, and more step numbers than one program takes."""
    sizes, many = (200003, 16383, 16385, 32768), 200
    if backend == "triton":
        sizes, many = (5003, program(format) - 1), 5
    shapes = [*((n,) for n in (program(format) + 2, *sizes, *(1 + i % 9 for i in range(many)), *[0] * 300))]
    layouts = ["unaligned", *["guarded"] * (len(shapes) - 1)]
    model = Model(rule, backend, shapes, format, layouts, flatten=flatten)
    model.train(1)
    for state in model.optimizer.state.values():
        state["step"] = state["step"].clone()
    model.train(1)


AMP = [(None, 1.0), (None, None), (3.7, 0.0), (3.7, 3.0), (5.0, None)]
"""grad_scale and found_inf at each step."""


@backends
@rules
def test_options_of_groups_and_of_a_grad_scaler(backend: str, rule: str, flatten: bool) -> None:
    """What is skipped changes nothing, not even at the first step and with NaN in a gradient. The scale is
    no power of two, so that a reciprocal would show."""
    format = turn([*STORED, "fp64", "complex64"], 2 * list(RULES).index(rule), flatten)
    options: list[dict[str, Any]] = [
        {},
        {"maximize": True},
        {"weight_decay_mask": [True, False]},
        {"lr": torch.tensor(0.01, dtype=F64), "weight_decay": 0.0},
        {"betas": (0.5, 0.75), "eps": 1e-3},
    ]
    if backend == "triton":  # its interpreter takes its time
        options = options[flatten::2]
    model = Model(
        rule, backend, [(5,), (program(format),)] * len(options), format, ["every third", ""] * len(options),
        lambda params: [{"params": params[2 * i : 2 * i + 2], **o} for i, o in enumerate(options)],
        decoupled_lr=True, flatten=flatten,
    )  # fmt: skip
    for i, (scale, found_inf) in enumerate(AMP):
        model.set_gradients()
        if found_inf:
            for p in model.params:
                p.grad[1] = torch.nan
        for group in model.optimizer.param_groups[::2]:
            group["lr"] = 1e-2 / (i + 1)
        for name, value in (("grad_scale", scale), ("found_inf", found_inf)):
            given = None
            if value is not None:
                given = torch.tensor([value] if i % 2 else value, dtype=turn([F32, F64], i)).to(model.device)
            setattr(model.optimizer, name, given)
        model.step()
    assert {int(s["step"]) for s in model.optimizer.state.values()} == {3}


def special_values(dtype: torch.dtype) -> Tensor:
    """NaN, infinities, zeros, subnormals and the largest values of ``dtype``."""
    nan, inf, tiny, huge = torch.nan, torch.inf, torch.finfo(dtype).tiny, torch.finfo(dtype).max
    special = [nan, inf, -inf, 0.0, -0.0, tiny, -tiny, tiny / 8, -tiny / 64, huge, -huge]
    return torch.tensor(special, dtype=F64).to(dtype)


@fused
@pytest.mark.parametrize(
    ("rule", "format"),
    [(turn(list(RULES), i, k), f) for i, f in enumerate((*STORED, "fp64", "fp16")) for k in (0, 2)],
)
def test_special_values(backend: str, rule: str, format: str) -> None:
    """In a full program and in a tail, with eps 0: nothing is flushed to zero, every NaN is where the
    reference has one. And tiny gradients."""
    special = special_values(FORMATS[format][1])
    model = Model(
        rule, backend, [(program(format),), (100,)] * 2, format,
        groups=lambda params: [{"params": params[:2], "eps": 0.0}, {"params": params[2:]}],
    )  # fmt: skip
    for scale in (1e-30, 1e-20):
        model.set_gradients()
        for p in model.params[:2]:
            p.grad[: len(special)] = special
        for p in model.params[2:]:
            p.grad *= scale
        model.step()


@fused
@stored
def test_one_unusual_value_in_a_full_program(backend: str, format: str) -> None:
    """Each alone, in a gradient; then in memory, where gradients are ordinary again; and a zero that is
    written to a parameter."""
    unusual = special_values(FORMATS[format][1])
    rule = turn(list(RULES), STORED.index(format))
    model = Model(rule, backend, [(program(format),)] * (len(unusual) + 1), format)
    for step in range(2):
        model.set_gradients()
        for p, x in zip(model.params, unusual if step == 0 else ()):
            p.grad[500] = x
        with torch.no_grad():
            model.params[-1][:500:3] = 0
        model.step()


COUNTS = [0, 1, 158, 159, 160, 999, 12345678, 2**31 - 3, 2**31 - 2, 2**31 - 1]


@fused
@pytest.mark.parametrize(("rule", "format"), [*zip(RULES, STORED), ("adabelief-nesterov", "fp64")])
def test_step_numbers(backend: str, rule: str, format: str) -> None:
    """From the first to where they saturate. Bias corrections become 1, and no sooner may a backend leave out
    the divisions, in full programs and in tails. A number below 0 ends too."""
    counts = [*COUNTS, *(steps_until_one(beta, F32) - 2 for beta in (0.9, 0.999) for _ in range(2))]
    model = Model(
        rule, backend, [(65,)] * len(COUNTS) + [(program(format),), (100,)] * 2, format,
        groups=lambda params: [
            {"params": params[: len(COUNTS)], "betas": (0.9, 0.999999)}, {"params": params[len(COUNTS) :]}
        ],
    )  # fmt: skip
    model.optimizer.found_inf = torch.tensor(1.0, device=model.device)
    model.train(1)
    del model.optimizer.found_inf
    states = [model.optimizer.state[p] for p in model.params]
    for state, count in zip(states, counts):
        state["step"] = torch.tensor(count, device=model.device)
    model.train(2)
    assert all(bool(p.isfinite().all()) for p in model.params)
    assert [int(s["step"]) for s in states] == [min(count + 2, 2**31 - 1) for count in counts]
    for state in states:
        state["step"].fill_(-5)
    model.optimizer.step()
    assert {int(s["step"]) for s in states} == {-4}


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", [marked(name) for name in ("cpu", "triton")])
@pytest.mark.parametrize("formats", COVERING, ids=str)
def test_between_guards_and_of_shards(backend: str, formats: Formats) -> None:
    """Every operand lies between guards of NaN, or of other values that would show: none is read into a
    result or written. Aligned and not, and rows whose first element is not the parameter's, also amid the
    eight that share random bits."""
    if device_of(backend) != "cpu":
        pytest.skip("the table of this test lies on the CPU")
    rows = [Row(2500, first=first) for first in (0, 8, 13, 2**33 + 3)]
    rows += [Row(n, (odd,) * 7) for n in (0, 1, 129, 1027) for odd in (0, 1)]
    i = COVERING.index(formats)
    rows = rows[i % 3 :: 3] if backend == "triton" else rows  # its interpreter takes its time
    rule = turn(list(REFERENCES), i)
    worlds = [World(rule, formats, rows) for _ in range(2)]
    for _ in range(2):
        for world, name in zip(worlds, (backend, "eager")):
            world.new_gradients()
            BACKENDS[name].step(world.batch, world.inputs(None, None))
        assert_same_bits(worlds[0].contents(), worlds[1].contents())


@cpu
@stored
def test_cpu_with_any_number_of_threads(format: str) -> None:
    k = STORED.index(format)
    for i, n in enumerate(((1, 3), (2, 8))[k % 2]):
        rule = turn(list(RULES), i, k)
        shapes = [(50003,), *[(i,) for i in range(40)]]
        with threads(n):
            Model(rule, "cpu", shapes, format, flatten=(i + k // 2) % 2 == 1).train(1)


ISAS = extension("_cpu")[0].isas() if extension("_cpu")[0] else ["none"]
DIVISORS = [0.6321206, 1.9999999, 0.50000006, 0.99999994, 1e-4, 3e-5, 49152.0, 3e7, -1.0, -0.75]


@cpu
@pytest.mark.parametrize("isa", ISAS)
def test_cpu_with_every_instruction_set(isa: str) -> None:
    """Forced, in a process of its own: every rule in formats that differ in how they are stored."""
    code = """
import fused_optim.__main__, test_backends
for rule in test_backends.RULES:
    for format in (*test_backends.STORED, "fp64", "fp16_grad_fp32"):
        test_backends.Model(rule, "cpu", [(1027,), (33,)], format).train(2)
fused_optim.__main__.main()
"""
    assert f"instruction set {isa}," in in_a_process(code, FUSED_OPTIM_ISA=isa)


@cpu
def test_an_instruction_set_that_there_is_not() -> None:
    code = """
import fused_optim, torch
try:
    fused_optim.AdaBelief([torch.ones(3, requires_grad=True)], backend="cpu")
except ValueError as error:
    print(error)
"""
    said = in_a_process(code, FUSED_OPTIM_ISA="sse9")
    assert said.startswith("FUSED_OPTIM_ISA must be one of [")
    assert "'baseline'" in said and "got 'sse9'" in said


@cpu
@pytest.mark.parametrize(("divisor", "isa"), list(zip(DIVISORS, itertools.cycle(ISAS))))
def test_cpu_division(divisor: float, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every significand divided, and what is too small or large for the way without a division instruction.
    With beta1 = 0 and a first moment of -0 the new one is the quotient, signs of zeros included."""
    monkeypatch.setattr("fused_optim.backends.native.instruction_set", lambda cpu: isa)
    edges = [0.0, -0.0, 1e-45, -1e-40, 2.0**-100, -(2.0**-101), 2.0**112, -3.4e38, float("inf")]
    exponents = torch.tensor([127, 26, 238]).repeat_interleave(2**23 // 3)
    significands = torch.arange(len(exponents)) * 3 % 2**23
    x = torch.cat([(exponents << 23 | significands).int().view(F32), torch.tensor(edges).repeat(37)])
    x[: 2**20 : 5] = -0.0
    p = torch.zeros_like(x, requires_grad=True)
    p.grad = x
    optimizer = AdamaxW([p], betas=(0.0, 0.5), backend="cpu")
    optimizer.step()
    optimizer.state[p]["exp_avg"].fill_(-0.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(divisor), torch.tensor(0.0)
    optimizer.step()
    assert_same_bits(optimizer.state[p]["exp_avg"], x / torch.tensor(divisor))


@pytest.mark.parametrize("clips", [False, True])
def test_launches_of_triton(flatten: bool, clips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launches a step, and two more with clipping, whatever the number of tensors and groups; counted,
    not run."""
    kernels = pytest.importorskip("fused_optim.kernels.step")
    norm = pytest.importorskip("fused_optim.kernels.norm")
    launches: list[str] = []
    for module, name in ((norm, "square_sums"), (norm, "clip"), (kernels, "prologue"), (kernels, "step")):
        monkeypatch.setattr(module, f"launch_{name}", lambda *a, name=name: launches.append(name))
    params = [torch.ones(i % 7, 9, device=device_of("triton")).requires_grad_() for i in range(1000)]
    for p in params:
        p.grad = torch.ones_like(p)
    groups = [{"params": params[:500]}, {"params": params[500:], "weight_decay": 0.0}]
    clipping = {"max_grad_norm": 1.0} if clips else {}
    optimizer = AdaBelief(groups, weight_decay=0.1, flatten=flatten, backend="triton", **clipping)
    for _ in range(3):
        launches.clear()
        optimizer.step()
        assert launches == ["square_sums", "clip"] * clips + ["prologue", "step"]


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
