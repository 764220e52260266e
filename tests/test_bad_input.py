"""Section 5 of the specification, row by row: bad input gives a clear error before anything is
written, or the right result."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    BACKENDS,
    RULES,
    assert_same_bits,
    bits,
    copies,
    gradient,
    parameters,
    raises_unchanged,
    raises_with,
    results,
    set_gradients,
    snapshot,
    train,
)
from torch import Tensor

from fused_optim import AdaBelief, AdamaxW

pytestmark = pytest.mark.filterwarnings("error")

Make = Callable[..., torch.optim.Optimizer]
REAL_DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES = [*REAL_DTYPES, torch.complex64, torch.complex128]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=RULES, ids=lambda cls: cls.__name__)
def make(request: pytest.FixtureRequest, backend: str) -> Make:
    """The constructor of each optimizer, on each backend."""

    def construct(params: Any, **options: Any) -> torch.optim.Optimizer:
        return request.param(params, **{"backend": backend, **options})

    return construct


def states_of(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    return copies(dict(optimizer.state[p]))


# Hyperparameters


NUMBERS: list[tuple[Any, type[Exception]]] = [
    (-1.0, ValueError),
    (-1e-30, ValueError),
    (math.nan, ValueError),
    (math.inf, ValueError),
    (-math.inf, ValueError),
    ("0.1", TypeError),
    (None, TypeError),
    (True, TypeError),
    (1j, TypeError),
    ([0.1], TypeError),
]
BAD_OPTIONS: list[tuple[str, Any, type[Exception]]] = [
    *((name, value, kind) for name in ("lr", "eps", "weight_decay") for value, kind in NUMBERS),
    ("lr", torch.tensor(-1.0), ValueError),
    ("lr", torch.tensor(math.nan), ValueError),
    ("lr", torch.tensor([0.1, 0.1]), ValueError),
    ("lr", torch.tensor([]), ValueError),
    ("lr", torch.tensor(1), ValueError),
    ("eps", torch.tensor(0.1), TypeError),
    ("betas", (1.0, 0.9), ValueError),
    ("betas", (0.9, 1.0), ValueError),
    ("betas", (-0.1, 0.9), ValueError),
    ("betas", (0.9, math.nan), ValueError),
    ("betas", (0.9,), ValueError),
    ("betas", (0.9, 0.9, 0.9), ValueError),
    ("betas", 0.9, TypeError),
    ("betas", None, TypeError),
    ("betas", ("0.9", 0.9), TypeError),
    ("betas", "99", TypeError),
    ("maximize", 1, TypeError),
    ("maximize", None, TypeError),
]
BELIEF_OPTIONS: list[tuple[str, Any, type[Exception]]] = [
    *(("eps_root", value, kind) for value, kind in NUMBERS),
    ("nesterov", 1, TypeError),
]
PER_GROUP = [
    *((cls, *bad) for cls in RULES for bad in BAD_OPTIONS),
    *((AdaBelief, *bad) for bad in BELIEF_OPTIONS),
]
CONSTRUCTOR_ONLY: list[tuple[str, Any, type[Exception]]] = [
    ("flatten", 1, TypeError),
    ("flatten", "fixed", TypeError),
    ("decoupled_lr", None, TypeError),
    ("backend", "gpu", ValueError),
    ("weight_decay_mask", 3, TypeError),
    ("weight_decay_mask", "yes", TypeError),
    ("weight_decay_mask", [True], ValueError),
    ("weight_decay_mask", [True] * 4, ValueError),
    ("weight_decay_mask", {"x": True}, ValueError),
]
RATHER = {
    "lr": "must be",
    "flatten": 'True, False or "static"',
    "maximize": "True or False",
    "nesterov": "True or False",
    "decoupled_lr": "True or False",
    "weight_decay_mask": "",
}
"""What the message says would be right."""


@pytest.mark.parametrize(("cls", "name", "value", "kind"), PER_GROUP)
def test_bad_options_are_refused_by_the_constructor(
    cls: Any, name: str, value: Any, kind: type[Exception], backend: str
) -> None:
    with raises_with(kind, name, RATHER.get(name, "must be")):
        cls(parameters(), **{name: value}, backend=backend)
    good, bad = parameters(), parameters()
    with raises_with(kind, name, "group 1", RATHER.get(name, "must be")):
        cls([{"params": good}, {"params": bad, name: value}], backend=backend)


@pytest.mark.parametrize(("cls", "name", "value", "kind"), PER_GROUP)
def test_bad_options_are_refused_by_add_param_group(
    cls: Any, name: str, value: Any, kind: type[Exception], backend: str
) -> None:
    params = parameters()
    optimizer = cls(params, backend=backend)
    train(optimizer, params, 1)
    with raises_unchanged(optimizer, kind, name, "group 1"):
        optimizer.add_param_group({"params": parameters(), name: value})
    assert len(optimizer.param_groups) == 1
    train(optimizer, params, 1)


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize(("cls", "name", "value", "kind"), PER_GROUP)
def test_bad_options_are_refused_by_step(
    cls: Any, name: str, value: Any, kind: type[Exception], warm: int, backend: str
) -> None:
    params = parameters()
    optimizer = cls([{"params": params[:1]}, {"params": params[1:]}], backend=backend)
    train(optimizer, params, warm)
    set_gradients(params, warm)
    good = optimizer.param_groups[1][name]
    optimizer.param_groups[1][name] = value
    for _ in range(2):
        with raises_unchanged(optimizer, kind, name, "group 1"):
            optimizer.step()
    optimizer.param_groups[1][name] = good
    optimizer.step()
    want_params = parameters()
    want = cls([{"params": want_params[:1]}, {"params": want_params[1:]}], backend=backend)
    train(want, want_params, warm + 1)
    assert_same_bits(snapshot(optimizer), snapshot(want))


@pytest.mark.parametrize(("name", "value", "kind"), CONSTRUCTOR_ONLY)
def test_bad_arguments_are_refused(make: Make, name: str, value: Any, kind: type[Exception]) -> None:
    with raises_with(kind, name, RATHER.get(name, "must be")):
        make(parameters(), **{name: value})


def test_unavailable_backends_say_why(make: Make) -> None:
    with raises_with(RuntimeError, "'cuda'", "not available", "cpu"):
        make(parameters(), backend="cuda")


def test_betas_changed_in_place_are_checked(make: Make) -> None:
    params = parameters()
    optimizer = make(params, betas=[0.9, 0.99])
    train(optimizer, params, 2)
    optimizer.param_groups[0]["betas"][1] = 1.5
    with raises_unchanged(optimizer, ValueError, "betas[1]", "must be"):
        optimizer.step()
    optimizer.param_groups[0]["betas"][1] = 0.5
    optimizer.step()
    want_params = parameters()
    want = make(want_params, betas=(0.9, 0.99))
    train(want, want_params, 2)
    want.param_groups[0]["betas"] = (0.9, 0.5)
    set_gradients(want_params, 1)
    want.step()
    assert_same_bits(snapshot(optimizer), snapshot(want))


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize(
    ("value", "kind"),
    [(-1.0, ValueError), (math.nan, ValueError), (None, TypeError), ("high", (TypeError, ValueError))],
)
def test_what_callables_return_is_checked(make: Make, name: str, value: Any, kind: Any) -> None:
    with raises_with(kind, name):
        make(parameters(), **{name: lambda count: value})
    params = parameters()
    optimizer = make(params, **{name: lambda count: 0.1 if count < 2 else value})
    train(optimizer, params, 2)
    with raises_unchanged(optimizer, kind, name):
        optimizer.step()


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0), lambda count: 0.1])
def test_decoupled_lr_needs_an_initial_lr(make: Make, lr: Any) -> None:
    with raises_with(ValueError, "decoupled_lr", "lr must be"):
        make(parameters(), lr=lr, decoupled_lr=True)
    with raises_with(ValueError, "decoupled_lr", "lr must be"):
        make([{"params": parameters()}, {"params": parameters(), "lr": lr}], lr=0.1, decoupled_lr=True)


def test_decoupled_lr_with_a_zero_initial_lr_in_a_group(make: Make) -> None:
    with raises_with(ValueError, "initial_lr"):
        make([{"params": parameters(), "initial_lr": 0.0}], lr=0.1, decoupled_lr=True)
    params = parameters()
    optimizer = make(params, lr=0.1, decoupled_lr=True)
    train(optimizer, params, 1)
    optimizer.param_groups[0]["initial_lr"] = 0.0
    with raises_unchanged(optimizer, ValueError, "initial_lr"):
        optimizer.step()


# Parameters


def test_what_torch_refuses(make: Make) -> None:
    with raises_with(ValueError, "empty parameter list"):
        make([])
    with raises_with(TypeError, "iterable"):
        make(torch.nn.Parameter(torch.ones(2)))
    with raises_with(ValueError, "non-leaf"):
        make([torch.nn.Parameter(torch.ones(2)) * 2])
    with raises_with(TypeError, "Tensors"):
        make([1.0])
    with raises_with(TypeError, "must be a dict"):
        make(parameters()).add_param_group(parameters())


@pytest.mark.parametrize("warm", [0, 2])
def test_an_integer_parameter_with_a_gradient(make: Make, warm: int) -> None:
    params = parameters()
    integer = torch.nn.Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False)
    optimizer = make([*params, integer])
    train(optimizer, params, warm)
    integer.grad = torch.ones_like(integer)
    with raises_unchanged(optimizer, (NotImplementedError, RuntimeError), "parameter 3 of group 0", "int32"):
        optimizer.step()


def test_the_same_parameter_twice(make: Make) -> None:
    a, b = parameters([(3,), (3,)])
    with raises_with(ValueError, "1 of group 0", "2 of group 0", "same"):
        make([b, a, a])
    with raises_with(ValueError, "0 of group 0", "1 of group 1", "same"):
        make([{"params": [a]}, {"params": [b, a]}])
    with raises_with(ValueError, "'first'", "'second'", "same"):
        make([("first", a), ("second", a)])
    with raises_with(ValueError, "'first'", "'second'", "same"):
        make([{"params": [("first", a)]}, {"params": [("second", a)]}])
    optimizer = make([a])
    train(optimizer, [a], 1)
    with raises_unchanged(optimizer, ValueError, "0 of group 0", "1 of group 1", "same"):
        optimizer.add_param_group({"params": [b, a]})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["params"].append(a)
    with raises_unchanged(optimizer, ValueError, "0 of group 0", "1 of group 0"):
        optimizer.step()


def test_overlapping_parameters(make: Make) -> None:
    memory = torch.randn(6, 4)
    rows = torch.nn.Parameter(memory[:3])
    overlapping = [
        torch.nn.Parameter(memory[2:]),
        torch.nn.Parameter(memory[:, 1]),
        torch.nn.Parameter(memory.view(torch.int32).view(torch.float32)),
        torch.nn.Parameter(memory.view(-1)[1::3]),
        torch.nn.Parameter(memory.view(-1).view(torch.bfloat16)[23:25]),
    ]
    for other in overlapping:
        for pair in ([rows, other], [other, rows]):
            with raises_with(ValueError, "0 of group 0", "1 of group 0", "overlap"):
                make(pair)
        with raises_with(ValueError, "0 of group 0", "0 of group 1", "overlap"):
            make([{"params": [rows]}, {"params": [other]}])
    with raises_with(ValueError, "'x'", "'y'", "overlap"):
        make([("x", rows), ("y", overlapping[0])])
    with raises_with(ValueError, "0 of group 0", "overlap"):
        make([torch.nn.Parameter(torch.zeros(1).expand(4))])


def test_neighbours_and_interleaved_columns_do_not_overlap(make: Make) -> None:
    memory = torch.randn(6, 4)
    plain = memory.clone()
    params = [torch.nn.Parameter(memory[:, j]) for j in (2, 0)] + [torch.nn.Parameter(memory[:, 3])]
    twins = [torch.nn.Parameter(plain[:, j].clone()) for j in (2, 0, 3)]
    optimizer, twin = make(params), make(twins)
    train(optimizer, params, 3)
    train(twin, twins, 3)
    assert_same_bits(snapshot(optimizer), snapshot(twin))
    assert torch.equal(memory[:, 1], plain[:, 1])


@pytest.mark.parametrize("warm", [0, 2])
def test_parameters_that_come_to_overlap(make: Make, warm: int) -> None:
    params = parameters([(4,), (4,)])
    optimizer = make(params)
    train(optimizer, params, warm)
    set_gradients(params, warm)
    params[1].data = params[0].data[:]
    with raises_unchanged(optimizer, ValueError, "0 of group 0", "1 of group 0", "overlap"):
        optimizer.step()


@pytest.mark.parametrize("warm", [0, 2])
def test_a_parameter_that_overlaps_itself(make: Make, warm: int) -> None:
    params = parameters([(4,), (3, 3)])
    optimizer = make(params)
    train(optimizer, params, warm)
    set_gradients(params, warm)
    params[1].data = torch.randn(5).as_strided((3, 3), (1, 1))
    with raises_unchanged(optimizer, ValueError, "1 of group 0", "overlap"):
        optimizer.step()


def misaligned(values: Tensor) -> tuple[Tensor, bytearray]:
    """``values`` at an odd address, and the memory they lie in. No torch operation may touch
    them: torch's own copy kernels crash at such addresses."""
    content = bytes(bits(values).tolist())
    memory = bytearray(len(content) + 2)
    offset = 1 - torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 2
    memory[offset : offset + len(content)] = content
    t = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset)
    assert t.data_ptr() % 2 == 1
    return t, memory


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_parameter(make: Make, dtype: torch.dtype) -> None:
    good = torch.nn.Parameter(torch.ones(5))
    t, memory = misaligned(torch.arange(5).to(dtype))
    p = t.requires_grad_()
    optimizer = make([good, p])
    good.grad, p.grad = torch.ones(5), torch.ones(5, dtype=dtype)
    before = bytes(memory)
    with raises_with(ValueError, "parameter 1 of group 0", "multiple of its element size"):
        optimizer.step()
    assert bytes(memory) == before
    assert torch.equal(good, torch.ones(5))
    assert not any(optimizer.state.values())
    assert optimizer.state_dict()["count"] == 0


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_gradient(make: Make, dtype: torch.dtype, warm: int) -> None:
    params = [torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(5, dtype=dtype))]
    optimizer = make(params)
    train(optimizer, params, warm)
    set_gradients(params, warm)
    params[1].grad, _ = misaligned(params[1].grad)
    with raises_unchanged(
        optimizer, ValueError, "gradient of parameter 1 of group 0", "multiple of its element size"
    ):
        optimizer.step()


@pytest.mark.parametrize("place", ["params", "grads"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_aligned_to_the_element_only(make: Make, dtype: torch.dtype, place: str) -> None:
    p = torch.randn(41).to(dtype)
    twin = torch.nn.Parameter(p.clone())
    memory = torch.zeros(42, dtype=dtype)
    memory[1:] = p
    p = torch.nn.Parameter(memory[1:] if place == "params" else p)
    optimizer, want = make([p]), make([twin])
    for seed in range(3):
        set_gradients([p], seed)
        set_gradients([twin], seed)
        if place == "grads":
            moved = torch.empty(44, dtype=dtype)[3:]
            p.grad = moved.copy_(p.grad)
        optimizer.step()
        want.step()
    assert_same_bits(snapshot(optimizer), snapshot(want))
    assert memory[0] == 0


# Gradients


@pytest.mark.parametrize("warm", [0, 2])
def test_sparse_gradients_are_refused(make: Make, warm: int) -> None:
    embedding = torch.nn.Embedding(4, 3, sparse=True)
    params = [*parameters(), embedding.weight]
    optimizer = make(params)
    train(optimizer, params, warm)
    set_gradients(params, warm)
    embedding.weight.grad = None
    embedding(torch.tensor([1, 2])).sum().backward()
    with raises_unchanged(optimizer, (RuntimeError, ValueError), "parameter 3 of group 0", "sparse", "dense"):
        optimizer.step()


def test_differentiable_is_refused(make: Make) -> None:
    with raises_with((RuntimeError, ValueError), "differentiable", "not supported"):
        make([{"params": parameters(), "differentiable": True}])
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, 2)
    optimizer.param_groups[0]["differentiable"] = True
    with raises_unchanged(optimizer, (RuntimeError, ValueError), "differentiable", "not supported"):
        optimizer.step()


@pytest.mark.parametrize("shape", [(3,), (1,), (5, 1), (6,)])
@pytest.mark.parametrize("warm", [0, 2])
def test_a_gradient_of_another_shape(make: Make, warm: int, shape: tuple[int, ...]) -> None:
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, warm)
    set_gradients(params, warm)
    params[1].grad.data = torch.ones(shape)
    with raises_unchanged(optimizer, RuntimeError, "parameter 1 of group 0", str(shape), "(5,)"):
        optimizer.step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize("warm", [0, 2])
def test_a_gradient_on_another_device(make: Make, warm: int) -> None:
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, warm)
    set_gradients(params, warm)
    params[1].grad.data = params[1].grad.data.cuda()
    with raises_unchanged(optimizer, RuntimeError, "parameter 1 of group 0", "cuda", "cpu"):
        optimizer.step()


def relaid(t: Tensor, layout: str) -> Tensor:
    """The values of ``t``, shape (2, 3, 4, 5), in another memory layout."""
    memory = {
        "channels_last": lambda: torch.empty(t.shape, dtype=t.dtype, memory_format=torch.channels_last),
        "transposed": lambda: torch.empty((2, 3, 5, 4), dtype=t.dtype).mT,
        "permuted": lambda: torch.empty((5, 2, 4, 3), dtype=t.dtype).permute(1, 3, 2, 0),
        "columns": lambda: torch.full((2, 3, 4, 9), 7.0, dtype=t.dtype)[..., 2:7],
        "every other": lambda: torch.full((2, 3, 8, 5), 7.0, dtype=t.dtype)[:, :, ::2],
        "offset": lambda: torch.full((121,), 7.0, dtype=t.dtype)[1:].view(2, 3, 4, 5),
    }[layout]()
    return memory.copy_(t)


LAYOUTS = ["channels_last", "transposed", "permuted", "columns", "every other", "offset"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_any_layout(make: Make, layout: str, dtype: torch.dtype) -> None:
    """Also one that changes from step to step."""
    params, twins = parameters([(2, 3, 4, 5)] * 2, dtype), parameters([(2, 3, 4, 5)] * 2, dtype)
    optimizer, twin = make(params), make(twins)
    for seed, kinds in enumerate([(layout, None), (layout, layout), (None, None), ("transposed", layout)]):
        set_gradients(params, seed)
        set_gradients(twins, seed)
        for p, kind in zip(params, kinds):
            if kind:
                p.grad = relaid(p.grad, kind)
        optimizer.step()
        twin.step()
        assert_same_bits(snapshot(optimizer), snapshot(twin), f"step {seed}")


def test_expanded_gradients(make: Make) -> None:
    params, twins = parameters([(4, 5)] * 2), parameters([(4, 5)] * 2)
    optimizer, twin = make(params), make(twins)
    values = [torch.randn(()), torch.randn(4, 1), torch.randn(5), torch.randn(4, 5)]
    for value in values:
        for p, t in zip(params, twins):
            p.grad = value.expand(4, 5)
            t.grad = value.expand(4, 5).contiguous()
        optimizer.step()
        twin.step()
        assert_same_bits(snapshot(optimizer), snapshot(twin))
    # sum().backward() is where expanded gradients come from.
    q = torch.nn.Parameter(torch.zeros(4, 5))
    t = torch.nn.Parameter(torch.zeros(4, 5))
    q_step, t_step = make([q]), make([t])
    q.sum().backward()
    t.grad = torch.ones(4, 5)
    q_step.step()
    t_step.step()
    assert_same_bits(snapshot(q_step), snapshot(t_step))


GRADIENT_DTYPES = [*REAL_DTYPES, torch.float8_e4m3fn]


@pytest.mark.parametrize("grad_dtype", GRADIENT_DTYPES)
@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_gradients_of_another_dtype(make: Make, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """They are rounded to the working precision, not to the parameter's dtype. The twin
    is a parameter in the working precision, rounded after each step."""
    working = torch.float64 if dtype == torch.float64 else torch.float32
    (p,) = parameters([(40,)], dtype)
    twin = torch.nn.Parameter(p.detach().to(working))
    optimizer, want = make([p], lr=0.1, weight_decay=0.1), make([twin], lr=0.1, weight_decay=0.1)
    p.grad_dtype = None
    for seed in range(3):
        p.grad = gradient(torch.empty(40, dtype=torch.float64), seed).to(grad_dtype)
        twin.grad = p.grad.to(working)
        optimizer.step()
        want.step()
        twin.data = twin.detach().to(dtype).to(working)
        assert_same_bits(p.detach(), twin.detach().to(dtype), f"step {seed}")
        assert_same_bits(states_of(optimizer, p), states_of(want, twin), f"step {seed}")


def test_a_gradient_dtype_that_changes(make: Make) -> None:
    """From step to step, with the gradient tensors at different or the same addresses."""
    (p,), (twin,) = parameters([(40,)]), parameters([(40,)])
    optimizer, want = make([p]), make([twin])
    p.grad_dtype = None
    for seed, dtype in enumerate(
        [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
    ):
        p.grad = gradient(p, seed).to(dtype)
        twin.grad = p.grad.float()
        optimizer.step()
        want.step()
        assert_same_bits(snapshot(optimizer), snapshot(want), f"step {seed}")


def test_lazy_conjugates_and_negatives(make: Make) -> None:
    """Gradients that are lazily conjugated or negated at one step and plain at the next."""
    params, twins = parameters([(40,)] * 2, torch.complex64), parameters([(40,)] * 2, torch.complex64)
    (real,), (real_twin,) = parameters([(40,)]), parameters([(40,)])
    params, twins = [*params, real], [*twins, real_twin]
    optimizer, want = make(params), make(twins)
    for seed in range(6):
        set_gradients(twins, seed)
        for i, (p, twin) in enumerate(zip(params, twins)):
            lazy = (seed + i) % 2
            if p.is_complex():
                p.grad = twin.grad.resolve_conj().conj().resolve_conj().conj() if lazy else twin.grad.clone()
            else:
                p.grad = torch._neg_view(-twin.grad) if lazy else twin.grad.clone()
            assert p.grad.is_conj() == (p.is_complex() and bool(lazy))
        optimizer.step()
        want.step()
        assert_same_bits(snapshot(optimizer), snapshot(want), f"step {seed}")


def test_a_gradient_conjugated_in_its_place(make: Make) -> None:
    """The same memory, read plainly at one step and as its conjugate at the next."""
    (p,), (twin,) = parameters([(40,)], torch.complex64), parameters([(40,)], torch.complex64)
    optimizer, want = make([p]), make([twin])
    memory = gradient(p, 0)
    for seed in range(4):
        memory.copy_(gradient(p, seed))
        p.grad = memory.conj() if seed % 2 else memory
        twin.grad = p.grad.resolve_conj().clone()
        optimizer.step()
        want.step()
        assert_same_bits(snapshot(optimizer), snapshot(want), f"step {seed}")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("flatten", [False, True])
def test_nan_and_infinity_reach_no_neighbour(make: Make, value: float, flatten: bool) -> None:
    params, twins = parameters([(5,), (4, 5)]), parameters([(5,), (4, 5)])
    optimizer, want = make(params, flatten=flatten), make(twins, flatten=flatten)
    for seed in range(3):
        set_gradients(params, seed)
        set_gradients(twins, seed)
        if seed == 1:
            params[0].grad[2] = value
            params[1].grad[0, 0] = value
        optimizer.step()
        want.step()
    for p, twin, place in zip(params, twins, (2, 0)):
        hit = torch.arange(p.numel()).view(p.shape) == place
        assert not p[hit].isfinite().any()
        assert p[~hit].isfinite().all()
        assert torch.equal(p[~hit], twin[~hit])
        for key, state in optimizer.state[p].items():
            if key != "step":
                assert not state[hit].isfinite().any()
                assert torch.equal(state[~hit], want.state[twin][key][~hit])


# Parameters' layouts


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_in_any_layout(make: Make, layout: str, dtype: torch.dtype, flatten: bool) -> None:
    values = torch.randn(2, 3, 4, 5).to(dtype)
    p, twin = torch.nn.Parameter(relaid(values, layout)), torch.nn.Parameter(values.clone())
    other, other_twin = parameters([(5,)])[0], parameters([(5,)])[0]
    whole = p.detach().as_strided((p.untyped_storage().nbytes() // p.element_size(),), (1,), 0)
    outside = torch.ones(whole.shape, dtype=torch.bool)
    outside.as_strided(p.shape, p.stride(), p.storage_offset()).fill_(False)
    before = bits(whole[outside])
    strides = p.stride()
    optimizer = make([p, other], flatten=flatten)
    want = make([twin, other_twin])
    train(optimizer, [p, other], 3)
    train(want, [twin, other_twin], 3)
    assert_same_bits(snapshot(optimizer), snapshot(want))
    assert p.stride() == strides
    assert torch.equal(bits(whole[outside]), before), "a write outside the parameter"


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1,), (1, 1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_and_empty_parameters(
    make: Make, dtype: torch.dtype, shape: tuple[int, ...], flatten: bool
) -> None:
    """Next to others; the twin holds the same values as a vector."""
    params = parameters([(5,), shape, (4,)], dtype)
    twins = [torch.nn.Parameter(p.detach().clone().reshape(-1)) for p in params]
    optimizer, want = make(params, flatten=flatten), make(twins)
    train(optimizer, params, 3)
    for seed in range(3):
        set_gradients(params, seed)
        for p, twin in zip(params, twins):
            twin.grad = p.grad.reshape(-1).clone()
        want.step()
    for p, twin in zip(params, twins):
        assert p.shape == optimizer.state[p]["exp_avg"].shape
        assert_same_bits(p.detach().reshape(-1), twin.detach())
        for key, state in want.state[twin].items():
            assert_same_bits(optimizer.state[p][key].reshape(state.shape), state, key)


def test_only_empty_parameters_and_no_gradients(make: Make) -> None:
    params = parameters([(0,), (5,)])
    optimizer = make(params)
    before = snapshot(optimizer)
    optimizer.step()
    assert_same_bits(snapshot(optimizer), {**before, "count": 1})
    params[0].grad = torch.zeros(0)
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1
    assert not optimizer.state.get(params[1])


# p.data


@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
def test_replaced_data(make: Make, layout: str) -> None:
    params, twins = parameters([(2, 3, 4, 5), (5,)]), parameters([(2, 3, 4, 5), (5,)])
    optimizer, want = make(params), make(twins)
    train(optimizer, params, 2)
    train(want, twins, 2)
    values = torch.randn(2, 3, 4, 5)
    old = params[0].detach()
    before = old.clone()
    params[0].data = values.clone() if layout == "contiguous" else relaid(values, layout)
    twins[0].data.copy_(values)
    train(optimizer, params, 2, first=2)
    train(want, twins, 2, first=2)
    assert_same_bits(snapshot(optimizer), snapshot(want))
    assert torch.equal(old, before), "a write to the old memory"


@pytest.mark.parametrize("what", ["params", "grads", "states"])
def test_transposed_where_they_lie(make: Make, what: str) -> None:
    """Another order of the elements at the same address, in the same tensor object."""
    params, twins = parameters([(5,), (4, 4)]), parameters([(5,), (4, 4)])
    optimizer, want = make(params), make(twins)
    for opt, group in ((optimizer, params), (want, twins)):
        train(opt, group, 2)
    for _ in range(2):
        if what == "params":
            params[1].data = params[1].data.mT
            twins[1].data.copy_(twins[1].data.mT.clone())
        elif what == "grads":
            params[1].grad.t_()
            twins[1].grad.copy_(twins[1].grad.mT.clone())
        else:
            optimizer.state[params[1]]["exp_avg"].t_()
            moment = want.state[twins[1]]["exp_avg"]
            moment.copy_(moment.mT.clone())
        optimizer.step()
        want.step()
        assert_same_bits(snapshot(optimizer), snapshot(want))


@pytest.mark.parametrize("what", ["params", "grads", "states"])
@pytest.mark.parametrize("warm", [1, 2])
def test_shrunk_where_they_lie(make: Make, what: str, warm: int) -> None:
    params = parameters([(4,), (8,)])
    optimizer = make(params)
    train(optimizer, params, warm)
    optimizer.step()
    shrunk = {"params": params[1], "grads": params[1].grad, "states": optimizer.state[params[1]]["exp_avg"]}[
        what
    ]
    shrunk.data = shrunk.data[:4]
    with raises_unchanged(optimizer, (RuntimeError, ValueError), "parameter 1 of group 0", "(4,)", "(8,)"):
        optimizer.step()


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("shape", [(5, 4), (20,), (3, 5), (8, 5), (0, 5), ()])
@pytest.mark.parametrize("grad", ["old", "new"])
def test_resized_data(make: Make, shape: tuple[int, ...], grad: str, flatten: bool) -> None:
    params = parameters([(5,), (4, 5)])
    optimizer = make(params, flatten=flatten)
    train(optimizer, params, 2)
    set_gradients(params, 2)
    if grad == "new":
        params[1].grad = None
    params[1].data = torch.randn(shape)
    if grad == "new":
        params[1].grad = torch.randn(shape)
    with raises_unchanged(
        optimizer, (RuntimeError, ValueError), "parameter 1 of group 0", str(shape), "(4, 5)"
    ):
        optimizer.step()


@pytest.mark.parametrize(
    ("old", "new"),
    [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float64, torch.bfloat16)],
)
def test_cast_data_converts_the_state_once_with_a_warning(
    make: Make, old: torch.dtype, new: torch.dtype
) -> None:
    (p,) = parameters([(40,)], old)
    optimizer = make([p])
    train(optimizer, [p], 2)
    kept = states_of(optimizer, p)
    p.data = p.data.to(new)
    p.grad = None
    set_gradients([p], 2)
    with pytest.warns(UserWarning, match="parameter 0 of group 0") as caught:
        optimizer.step()
    assert len(caught) == 1
    working = torch.float64 if new == torch.float64 else torch.float32
    (source,) = parameters([(40,)], old)
    train(make([source]), [source], 2)
    twin = torch.nn.Parameter(source.detach().to(new))
    want = make([twin])
    want.state[twin] = {key: value if key == "step" else value.to(working) for key, value in kept.items()}
    set_gradients([twin], 2)
    want.step()
    train(optimizer, [p], 2, first=3)
    train(want, [twin], 2, first=3)
    assert_same_bits(p.detach(), twin.detach())
    assert_same_bits(states_of(optimizer, p), states_of(want, twin))


@pytest.mark.parametrize("new", [torch.bfloat16, torch.float16])
def test_cast_to_16_bits_keeps_the_state(make: Make, new: torch.dtype) -> None:
    (p,) = parameters([(40,)])
    optimizer = make([p])
    train(optimizer, [p], 2)
    kept = states_of(optimizer, p)
    p.data = p.data.to(new)
    p.grad = None
    optimizer.step()
    assert_same_bits(states_of(optimizer, p), kept)
    train(optimizer, [p], 1)
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32


# load_state_dict


def trained(
    make: Make, steps: int = 3, **options: Any
) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    params = parameters()
    optimizer = make(params, **options)
    train(optimizer, params, steps)
    return params, optimizer


def second_moment(optimizer: torch.optim.Optimizer) -> str:
    return "exp_inf" if isinstance(optimizer, AdamaxW) else "exp_avg_var"


def bad_states(optimizer: torch.optim.Optimizer) -> list[tuple[dict[str, Any], list[str]]]:
    """Saved states that must be refused, and what the message names."""
    nu = second_moment(optimizer)

    def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        saved = copy.deepcopy(optimizer.state_dict())
        change(saved)
        return saved

    name = "parameter 2 of group 0"
    return [
        (changed(lambda s: s["state"][2].update(exp_avg=torch.zeros(5, 4))), [name, "'exp_avg'", "(5, 4)"]),
        (changed(lambda s: s["state"][2].update({nu: torch.zeros(1)})), [name, f"'{nu}'", "(1,)"]),
        (changed(lambda s: s["state"][2].pop("exp_avg")), [name, "'exp_avg'"]),
        (changed(lambda s: s["state"][2].pop(nu)), [name, f"'{nu}'"]),
        (changed(lambda s: s["state"][2].pop("step")), [name, "'step'"]),
        (changed(lambda s: s["state"][2].update({nu: 1.0})), [name, f"'{nu}'"]),
        (changed(lambda s: s["state"][2].update({nu: torch.zeros(4, 5, dtype=torch.complex64)})), [name, nu]),
        (
            changed(lambda s: s["state"][2].update(master=torch.zeros(4, 5, dtype=torch.int32))),
            [name, "'master'"],
        ),
        (changed(lambda s: s["state"][2].update(master=1.0)), [name, "'master'", "float"]),
        (
            changed(lambda s: s["state"][2].update(remainder=torch.zeros(4, 5))),
            [name, "'remainder'", "int16"],
        ),
        (changed(lambda s: s["state"][2].update(step=-1)), [name, "'step'", "-1"]),
        (changed(lambda s: s["state"][2].update(step=2.5)), [name, "'step'", "2.5"]),
        (changed(lambda s: s["state"][2].update(step=2**31)), [name, "'step'", "2147483648"]),
        (changed(lambda s: s["param_groups"].append(s["param_groups"][0])), ["parameter groups"]),
        (changed(lambda s: s["param_groups"][0]["params"].pop()), ["size"]),
        (changed(lambda s: s["param_groups"][0].update(lr=-1.0)), ["lr", "must be"]),
        (changed(lambda s: s["param_groups"][0].update(betas=(0.9, 1.0))), ["betas[1]", "must be"]),
    ]


BAD_ENTRIES: dict[str, Any] = {
    "exp_avg": [
        None,
        1.0,
        "zeros",
        torch.zeros(4, 5, dtype=torch.int32),
        torch.zeros(4, 5, dtype=torch.complex64),
    ],
    "step": [None, "three", -1, 2.5, 2**31, torch.tensor(-3.0)],
    "master": [torch.zeros(4, 5, dtype=torch.int32)],
    "remainder": [torch.zeros(4, 5, dtype=torch.int32)],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in BAD_ENTRIES.items() for value in values], ids=repr
)
def test_what_is_no_state_is_refused_by_a_step(make: Make, key: str, value: Any) -> None:
    params, optimizer = trained(make)
    optimizer.state[params[2]][key] = value
    set_gradients(params, 3)
    before = [p.detach().clone() for p in params]
    with raises_with(RuntimeError, "parameter 2 of group 0", repr(key)):
        optimizer.step()
    assert_same_bits([p.detach() for p in params], before)


@pytest.mark.parametrize("case", range(17))
def test_bad_saved_states_are_refused(make: Make, case: int) -> None:
    params, optimizer = trained(make)
    saved, texts = bad_states(trained(make, 1, lr=0.5)[1])[case]
    before = results(optimizer)
    with raises_unchanged(optimizer, ValueError, *texts):
        optimizer.load_state_dict(saved)
    assert_same_bits(results(optimizer), before)
    _, want = trained(make, 4)
    train(optimizer, params, 1, first=3)
    assert_same_bits(results(optimizer), results(want))


@pytest.mark.parametrize(
    "other", [torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop, AdaBelief, AdamaxW]
)
def test_the_state_of_another_optimizer_is_refused(make: Make, other: Any) -> None:
    _, optimizer = trained(make)
    if isinstance(optimizer, other):
        return
    other_params = parameters()
    source = other(other_params, lr=0.1, **({"momentum": 0.9} if other is torch.optim.SGD else {}))
    train(source, other_params, 2)
    before = results(optimizer)
    with raises_unchanged(optimizer, ValueError, "parameter 0 of group 0", "no "):
        optimizer.load_state_dict(source.state_dict())
    assert_same_bits(results(optimizer), before)


@pytest.mark.parametrize(
    "step", [torch.tensor(3.0), torch.tensor([3.0]), 3, 3.0, torch.tensor(3, dtype=torch.int32)]
)
def test_step_becomes_an_integer(make: Make, step: Any) -> None:
    params, optimizer = trained(make)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = step
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = make(twins)
    loaded.load_state_dict(saved)
    for p in twins:
        assert_same_bits(loaded.state[p]["step"], torch.tensor(3), "step")
    train(optimizer, params, 2, first=3)
    train(loaded, twins, 2, first=3)
    assert_same_bits(snapshot(loaded), snapshot(optimizer))


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_keep_their_bits_and_alias_nothing(make: Make, dtype: torch.dtype) -> None:
    params, twins = parameters(dtype=dtype), parameters(dtype=dtype)
    optimizer, loaded = make(params, lr=torch.tensor(0.1)), make(twins)
    train(optimizer, params, 3)
    for p, twin in zip(params, twins):
        twin.data.copy_(p.data)
    saved = optimizer.state_dict()
    kept = copies(saved)
    loaded.load_state_dict(saved)
    assert_same_bits(results(loaded), results(optimizer))
    train(loaded, twins, 2, first=3)
    assert_same_bits(copies(saved), kept, "the source")
    after = snapshot(loaded)
    for state in saved["state"].values():
        for value in state.values():
            value.fill_(17)
    saved["param_groups"][0]["lr"].fill_(17.0)
    saved["param_groups"][0]["params"].append(5)
    assert_same_bits(snapshot(loaded), after, "what was loaded")
    assert loaded.param_groups[0]["lr"] == torch.tensor(0.1)
    assert len(loaded.param_groups[0]["params"]) == 3


def test_moments_of_another_dtype_or_layout(make: Make) -> None:
    """They take this optimizer's format, whatever the parameter's dtype."""
    params, twins = parameters([(4, 5)], torch.bfloat16), parameters([(4, 5)], torch.bfloat16)
    optimizer, loaded = make(params), make(twins)
    train(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for key in ("exp_avg", second_moment(optimizer)):
        value = saved["state"][0][key]
        saved["state"][0][key] = torch.empty(5, 4, dtype=torch.float64).mT.copy_(value)
    loaded.load_state_dict(saved)
    assert_same_bits(snapshot(loaded)["states"], snapshot(optimizer)["states"])


def test_a_checkpoint_of_torch_adamax_continues(backend: str) -> None:
    params = parameters()
    adamax = torch.optim.Adamax(params, lr=0.01, betas=(0.8, 0.95))
    train(adamax, params, 3)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer = AdamaxW(twins, backend=backend)
    optimizer.load_state_dict(adamax.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.01, (0.8, 0.95), 0)
    assert optimizer.state_dict()["count"] == 3
    assert_same_bits(snapshot(optimizer)["states"][2]["step"], torch.tensor(3))
    train(adamax, params, 5, first=3)
    train(optimizer, twins, 5, first=3)
    for p, twin in zip(params, twins):
        torch.testing.assert_close(twin, p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step_in", ["state", "group"])
def test_checkpoints_of_adabelief_ports_continue(backend: str, step_in: str) -> None:
    params = parameters()
    optimizer = AdaBelief(params, lr=0.01, backend=backend)
    train(optimizer, params, 3)
    state = {
        i: {k: v.clone() for k, v in optimizer.state[p].items() if k != "step"} for i, p in enumerate(params)
    }
    group: dict[str, Any] = {
        "lr": 0.01,
        "betas": (0.9, 0.999),
        "eps": 1e-16,
        "weight_decay": 0,
        "amsgrad": False,
        "buffer": [[None, None, None] for _ in range(10)],
        "params": [0, 1, 2],
    }
    if step_in == "group":
        group["step"] = 3
    else:
        for s in state.values():
            s["step"] = 3
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = AdaBelief(twins, backend=backend)
    loaded.load_state_dict({"state": state, "param_groups": [group]})
    train(optimizer, params, 2, first=3)
    train(loaded, twins, 2, first=3)
    assert_same_bits(snapshot(loaded), snapshot(optimizer))
    again = AdaBelief([torch.nn.Parameter(p.detach().clone()) for p in twins], backend=backend)
    again.load_state_dict(loaded.state_dict())
    assert_same_bits(snapshot(again), snapshot(loaded))


# AMP


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("found_inf", [torch.tensor(1.0), torch.tensor([1.0]), torch.tensor(3.0)])
def test_found_inf_changes_nothing(make: Make, warm: int, found_inf: Tensor, flatten: bool) -> None:
    """Not even with gradients that need a copy, or parameters that have gaps; ``count``
    goes on, since the host cannot know."""
    params = parameters([(5,), (4, 5), (3,)])
    params.append(torch.nn.Parameter(torch.randn(4, 9)[:, 2:5]))
    optimizer = make(params, flatten=flatten)
    train(optimizer, params, warm)
    before = snapshot(optimizer)
    set_gradients(params, warm)
    params[0].grad.fill_(torch.nan)
    params[1].grad = torch.tensor(torch.inf).expand(4, 5)
    optimizer.found_inf, optimizer.grad_scale = found_inf, torch.tensor(4.0)
    optimizer.step()
    after = snapshot(optimizer)
    assert_same_bits(after["params"], before["params"])
    assert after["count"] == warm + 1
    if warm:
        assert_same_bits(after["states"], before["states"])
    else:
        assert all(not t.any() for state in after["states"] for t in state.values())
    del optimizer.found_inf, optimizer.grad_scale
    train(optimizer, params, 2, first=warm)
    twins = parameters([(5,), (4, 5), (3,)])
    twins.append(torch.nn.Parameter(before["params"][3] if warm == 0 else torch.zeros(4, 3)))
    if warm == 0:
        want = make(twins)
        train(want, twins, 2)
        assert_same_bits(snapshot(optimizer), {**snapshot(want), "count": 3})


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_scale_divides(make: Make, dtype: torch.dtype) -> None:
    """By a scale that is no power of two, so that a reciprocal would show."""
    params, twins = parameters(dtype=dtype), parameters(dtype=dtype)
    optimizer, want = make(params), make(twins)
    scale = torch.tensor(3.7)
    optimizer.grad_scale, optimizer.found_inf = scale, torch.tensor(0.0)
    for seed in range(3):
        set_gradients(params, seed)
        for p, twin in zip(params, twins):
            twin.grad_dtype = None
            if dtype.is_complex:
                real = torch.view_as_real(p.grad)
                twin.grad = torch.view_as_complex(real / scale.to(real.dtype))
            else:
                working = torch.float64 if dtype == torch.float64 else torch.float32
                twin.grad = p.grad.to(working) / scale.to(working)
        optimizer.step()
        want.step()
    assert_same_bits(snapshot(optimizer), snapshot(want))


@pytest.mark.parametrize("unscale", [False, True])
def test_a_real_grad_scaler(make: Make, unscale: bool) -> None:
    params, twins = parameters(), parameters()
    optimizer, want = make(params), make(twins)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    for seed in range(8):
        optimizer.zero_grad()
        factors = [gradient(p, 1000 * seed + i) for i, p in enumerate(params)]
        if seed in (2, 5):
            factors[1][0] = torch.inf
        scaler.scale(sum((p * f).sum() for p, f in zip(params, factors))).backward()
        if unscale:
            scaler.unscale_(optimizer)
        before = snapshot(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if seed in (2, 5):
            assert_same_bits(snapshot(optimizer), {**before, "count": seed + 1})
            continue
        for twin, f in zip(twins, factors):
            twin.grad = f
        want.step()
        got, expected = snapshot(optimizer), snapshot(want)
        assert_same_bits([got["params"], got["states"]], [expected["params"], expected["states"]])
    assert optimizer.state[params[0]]["step"] == 6


def test_a_grad_scaler_with_no_gradient_at_all(make: Make) -> None:
    params = parameters()
    optimizer = make(params)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    before = snapshot(optimizer)
    scaler.step(optimizer)
    assert_same_bits(snapshot(optimizer)["params"], before["params"])


# Closures


@pytest.mark.parametrize("warm", [0, 2])
def test_a_closure_that_raises(make: Make, warm: int) -> None:
    params = parameters()
    optimizer = make(params, lr=lambda count: 0.1 / (1 + count))
    train(optimizer, params, warm)

    def closure() -> Tensor:
        set_gradients(params, 5)
        raise KeyError("from the closure")

    with raises_unchanged(optimizer, KeyError, "from the closure"):
        optimizer.step(closure)
    want_params = parameters()
    want = make(want_params, lr=lambda count: 0.1 / (1 + count))
    train(optimizer, params, 1, first=warm)
    train(want, want_params, warm + 1)
    assert_same_bits(snapshot(optimizer), snapshot(want))


def test_a_schedule_that_raises(make: Make) -> None:
    params = parameters()
    optimizer = make(params, lr=lambda count: [0.1, 0.2][count])
    train(optimizer, params, 2)
    with raises_unchanged(optimizer, IndexError):
        optimizer.step()
