"""Section 5 of the specification, row by row: bad input gives a clear error before anything is
written, or the right result. What changes between steps is in test_changes.py."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch

from helpers import (  # isort: skip
    DTYPES, RULES, Judge, Make, assert_same_bits, bits, copies, gradient, parameters, raises_unchanged,
    raises_with, set_gradients, snapshot, train, trained,
)  # fmt: skip
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

# Hyperparameters

TORCHS_WORDS = {"lr": "learning rate", "eps": "eps value", "weight_decay": "weight_decay value"}
NUMBERS: list[tuple[Any, type[Exception]]] = [
    *((value, ValueError) for value in (-1.0, -1e-30, math.nan, math.inf, -math.inf, 10**400)),
    *((value, TypeError) for value in ("0.1", None, True, 1j, [0.1])),
]
BAD_OPTIONS: list[tuple[str, Any, type[Exception], str]] = [
    *((name, value, kind, f"Invalid {text}: " if kind is ValueError else name)
      for name, text in TORCHS_WORDS.items() for value, kind in NUMBERS),
    ("lr", torch.tensor(-1.0), ValueError, "Invalid learning rate: -1.0"),
    ("lr", torch.tensor(math.nan), ValueError, "Invalid learning rate: nan"),
    ("lr", torch.tensor([0.1, 0.1]), ValueError, "Tensor lr must be 1-element"),
    ("lr", torch.tensor([]), ValueError, "Tensor lr must be 1-element"),
    ("lr", torch.tensor(1), ValueError, "floating-point"),
    ("eps", torch.tensor(0.1), TypeError, "eps"),
    ("betas", (1.0, 0.9), ValueError, "Invalid beta parameter at index 0: 1.0"),
    ("betas", (0.9, 1.0), ValueError, "Invalid beta parameter at index 1: 1.0"),
    ("betas", (-0.1, 0.9), ValueError, "Invalid beta parameter at index 0: -0.1"),
    ("betas", (0.9, math.nan), ValueError, "Invalid beta parameter at index 1: nan"),
    *(("betas", value, ValueError, "betas") for value in ((0.9,), (0.9, 0.9, 0.9))),
    *(("betas", value, TypeError, "betas") for value in (0.9, None, ("0.9", 0.9), "99")),
    *(("maximize", value, TypeError, "maximize") for value in (1, None)),
]  # fmt: skip
BELIEF_OPTIONS: list[tuple[str, Any, type[Exception], str]] = [
    *(("eps_root", value, kind, "eps_root") for value, kind in NUMBERS),
    ("nesterov", 1, TypeError, "nesterov"),
]
PER_GROUP = [
    *((list(RULES)[i % len(RULES)], *bad) for i, bad in enumerate(BAD_OPTIONS)),
    *(("adabelief", *bad) for bad in BELIEF_OPTIONS),
]


def same_start(error: BaseException, text: str) -> bool:
    return not text.startswith(("Invalid", "Tensor")) or str(error).startswith(text)


@pytest.mark.parametrize(("name_of", "name", "value", "kind", "text"), PER_GROUP, ids=repr)
def test_bad_options_are_refused(
    name_of: str, name: str, value: Any, kind: type[Exception], text: str, backend: str
) -> None:
    """By the constructor, by ``add_param_group`` and, where a group was changed since, by ``step``; with
    torch's own words first, and then with what would be right."""
    cls = RULES[name_of].optimizer
    right = "must be" if name not in ("maximize", "nesterov") else "True or False"
    for params, texts in (
        (parameters(), ()),
        ([{"params": parameters()}, {"params": parameters(), name: value}], ("group 1",)),
    ):
        with pytest.raises(kind) as caught:
            cls(params, backend=backend, **({} if texts else {name: value}))
        assert all(t in str(caught.value) for t in (name, text, right, *texts)), str(caught.value)
        assert same_start(caught.value, text)
    params = parameters()
    optimizer = cls([{"params": params[:1]}, {"params": params[1:]}], backend=backend)
    for warm in (0, 1):
        train(optimizer, params, warm)
        with raises_unchanged(optimizer, kind, name, "group 2"):
            optimizer.add_param_group({"params": parameters(), name: value})
        assert len(optimizer.param_groups) == 2
        good = optimizer.param_groups[1][name]
        optimizer.param_groups[1][name] = value
        set_gradients(params, 1)
        for _ in range(2):
            with raises_unchanged(optimizer, kind, name, text, "group 1"):
                optimizer.step()
        optimizer.param_groups[1][name] = good
    train(optimizer, params, 1)


SWITCHES = [
    ("flatten", 1), ("flatten", "on"), ("decoupled_lr", None), ("unscale_in_step", 1), ("fused", 1),
    ("foreach", "on"), ("amsgrad", 0.0), ("stochastic_rounding", 1), ("skip_nonfinite", 1),
]  # fmt: skip
CONSTRUCTOR_ONLY: list[tuple[str, Any, type[Exception], str]] = [
    *((name, value, TypeError, "True or False") for name, value in SWITCHES),
    ("backend", "gpu", ValueError, "'cpu', 'cuda', 'eager', 'triton'"),
    *(("weight_decay_mask", value, TypeError, "") for value in (3, "yes")),
    *(("weight_decay_mask", value, ValueError, "") for value in ([True], [True] * 4, {"x": True})),
    *(("state_format", value, ValueError, "'fp32', 'bf16', '8bit'") for value in ("fp8", None)),
    ("master_weights", "fp32", ValueError, "None, 'split16', 'split8'"),
    ("max_grad_norm", 0.0, ValueError, "must be positive, or None"),
    *(("max_grad_norm", x, ValueError, f"Invalid max_grad_norm value: {float(x)}") for x in (-1, math.nan)),
    *(("max_grad_norm", value, TypeError, f"must be a number, got {value!r}") for value in ("1", True)),
]


@pytest.mark.parametrize(("name", "value", "kind", "right"), CONSTRUCTOR_ONLY)
def test_bad_arguments_are_refused(
    make: Make, name: str, value: Any, kind: type[Exception], right: str
) -> None:
    with raises_with(kind, name, right):
        make(parameters(), **{name: value})


OF_THE_OPTIMIZER = {
    "state_format": "8bit", "master_weights": "split8", "stochastic_rounding": True, "flatten": True,
    "backend": "cuda", "decoupled_lr": True, "unscale_in_step": True, "max_grad_norm": 1.0,
    "skip_nonfinite": True,
}  # fmt: skip


@pytest.mark.parametrize("name", OF_THE_OPTIMIZER)
def test_a_group_cannot_have_an_option_of_the_optimizer(make: Make, name: str) -> None:
    group = {"params": parameters(), name: OF_THE_OPTIMIZER[name]}
    with raises_with(ValueError, name, "whole optimizer", "group 1"):
        make([{"params": parameters()}, group])
    optimizer = make(parameters())
    with raises_unchanged(optimizer, ValueError, name, "whole optimizer", "group 1"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


RETURNED = [
    (-1.0, ValueError), (math.nan, ValueError), (None, TypeError), ("high", (TypeError, ValueError)),
    (torch.ones(2), (TypeError, ValueError, RuntimeError)),
]  # fmt: skip


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize(("value", "kind"), RETURNED, ids=str)
def test_what_callables_return_is_checked(make: Make, name: str, value: Any, kind: Any) -> None:
    with raises_with(kind, name):
        make(parameters(), **{name: lambda count: value})
    _, optimizer = trained(make, 2, **{name: lambda count: 0.1 if count < 2 else value})
    with raises_unchanged(optimizer, kind, name):
        optimizer.step()


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0), lambda count: 0.1])
def test_decoupled_lr_needs_an_lr_to_refer_to(make: Make, lr: Any) -> None:
    with raises_with(ValueError, "decoupled_lr", "lr must be"):
        make(parameters(), lr=lr, decoupled_lr=True)
    with raises_with(ValueError, "decoupled_lr", "lr must be"):
        make([{"params": parameters()}, {"params": parameters(), "lr": lr}], lr=0.1, decoupled_lr=True)
    _, optimizer = trained(make, 1, lr=0.1, decoupled_lr=True)
    optimizer.param_groups[0]["reference_lr"] = 0.0
    with raises_unchanged(optimizer, ValueError, "reference_lr"):
        optimizer.step()


# Parameters


CALLS: list[tuple[str, Any, tuple[str, ...]]] = [
    ("make([])", ValueError, ("empty parameter list",)),
    ("make(a)", TypeError, ("iterable",)),
    ("make([a * 2])", ValueError, ("non-leaf",)),
    ("make([1.0])", TypeError, ("Tensors",)),
    ("make([a]).add_param_group([b])", TypeError, ("must be a dict",)),
    ("make([a]).add_param_group({'params': [b, a]})", ValueError, ("0 of group 0", "1 of group 1", "same")),
    ("make([a], backend='cuda')", RuntimeError, ("'cuda'", "not available", "cpu")),
    *((call, ValueError, (f"{key}=True is not supported: ",)) for key in ("differentiable", "amsgrad")
      for call in (f"make([a], {key}=True)", f"make([{{'params': [a], '{key}': True}}])")),
    ("make([b, a, a])", ValueError, ("1 of group 0", "2 of group 0", "same")),
    ("make([{'params': [a]}, {'params': [b, a]}])", ValueError, ("0 of group 0", "1 of group 1", "same")),
    ("make([('first', a), ('second', a)])", ValueError, ("'first'", "'second'", "same")),
    ("make([{'params': [('first', a)]}, {'params': [('second', a)]}])", ValueError,
     ("'first'", "'second'", "same")),
    ("make([torch.zeros(1).expand(4).requires_grad_()])", ValueError, ("0 of group 0", "overlap")),
    ("make([torch.randn(5).as_strided((3, 3), (1, 1)).requires_grad_()])", ValueError,
     ("0 of group 0", "overlap")),
    ("make([('weight', fake)])", (TypeError, ValueError), ("Fake", "memory", "parameter 'weight'")),
    ("make([a], stochastic_rounding=True, master_weights='split8')", ValueError,
     ("stochastic_rounding", "master_weights='split8'")),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "texts"), CALLS)
def test_parameters_that_are_refused(make: Make, call: str, kind: Any, texts: tuple[str, ...]) -> None:
    """With torch's words, where torch refuses them too."""
    a, b = parameters([(3,), (3,)])
    with FakeTensorMode():
        fake = torch.nn.Parameter(torch.ones(3))
    with raises_with(kind, *texts):
        eval(call, {"make": make, "a": a, "b": b, "fake": fake, "torch": torch})


def test_lazy_parameters_are_skipped_until_they_have_a_shape(make: Make, judge: Judge, flatten: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.LazyLinear(2))
    optimizer = make(model.parameters(), weight_decay=0.1, flatten=flatten)
    optimizer.step()
    for seed in range(3):
        model(torch.randn(4, 5)).sum().backward()
        judge.step(optimizer, str(seed))


@pytest.mark.parametrize("warm", [0, 2])
def test_an_integer_parameter_with_a_gradient(make: Make, warm: int) -> None:
    params = parameters()
    integer = torch.nn.Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False)
    optimizer = make([*params, integer])
    train(optimizer, params, warm)
    integer.grad = torch.ones_like(integer)
    with raises_unchanged(optimizer, (NotImplementedError, RuntimeError), "parameter 3 of group 0", "int32"):
        optimizer.step()


def test_overlapping_parameters(make: Make) -> None:
    memory = torch.randn(6, 4)
    rows, row = torch.nn.Parameter(memory[:3]), memory.view(-1)
    others = [memory[2:], memory[:, 1], memory.view(torch.int32).view(torch.float32), row[1::3]]
    for other in map(torch.nn.Parameter, (*others, row.view(torch.bfloat16)[23:25])):
        for pair in ([rows, other], [other, rows]):
            with raises_with(ValueError, "0 of group 0", "1 of group 0", "overlap"):
                make(pair)
        with raises_with(ValueError, "0 of group 0", "0 of group 1", "overlap"):
            make([{"params": [rows]}, {"params": [other]}])
        with raises_with(ValueError, "'x'", "'y'", "overlap"):
            make([("x", rows), ("y", other)])


def test_neighbours_and_interleaved_columns_do_not_overlap(make: Make, judge: Judge) -> None:
    memory = torch.randn(6, 4)
    before = memory.clone()
    judge.train(make([torch.nn.Parameter(memory[:, j]) for j in (2, 0, 3)]))
    assert torch.equal(memory[:, 1], before[:, 1])


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
def test_misaligned(make: Make, dtype: torch.dtype) -> None:
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
    assert optimizer.param_groups[0]["count"] == 0
    for warm in (0, 2):
        params, optimizer = trained(make, warm, [*parameters([(5,)]), *parameters([(5,)], dtype)])
        set_gradients(params, warm)
        params[1].grad, _ = misaligned(params[1].grad)
        with raises_unchanged(optimizer, ValueError, "gradient of parameter 1 of group 0", "multiple of its"):
            optimizer.step()


# Gradients


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_a_gradient_on_another_device(make: Make) -> None:
    params = parameters()
    optimizer = make(params)
    set_gradients(params, 0)
    params[1].grad.data = params[1].grad.data.cuda()
    with raises_unchanged(optimizer, RuntimeError, "parameter 1 of group 0", "cuda", "cpu"):
        optimizer.step()


def test_lazy_conjugates_and_negatives(make: Make, judge: Judge) -> None:
    """Gradients, and parameters, that are lazily conjugated or negated at one step, where they lie, and
    plain at the next."""
    params = [*parameters([(40,)] * 2, torch.complex64), *parameters([(40,), ()])]
    optimizer = make(params)
    memory = gradient(params[1], 0)
    for seed in range(6):
        set_gradients(params, seed)
        memory.copy_(params[1].grad)
        params[1].grad = memory.conj() if seed % 2 else memory
        if seed % 2:
            params[0].grad = params[0].grad.conj()
            for p in params[2:]:
                p.grad = torch.complex(p.grad, p.grad).conj().imag
        if seed == 4:
            params[0].data = params[0].data.conj()
        judge.step(optimizer, f"step {seed}")


# p.data


CASTS = [
    (torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float64, torch.bfloat16),
    (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), CASTS)
def test_cast_data_converts_the_state_once_with_a_warning(
    make: Make, judge: Judge, old: torch.dtype, new: torch.dtype
) -> None:
    """Where its working precision is another; else the state is kept. A step without gradients is none."""
    (p,), optimizer = trained(make, 2, parameters([(40,)], old))
    p.data, p.grad = p.data.to(new), None
    kept = snapshot(optimizer)
    optimizer.step()
    assert_same_bits(snapshot(optimizer), {**kept, "count": 3})
    twin = torch.nn.Parameter(p.detach().clone())
    converted = make([twin])
    working = torch.float64 if new == torch.float64 else torch.float32
    state = copies(dict(optimizer.state[p]))
    converted.state[twin] = {k: v if k == "step" else v.to(working) for k, v in state.items()}
    converted.load_state_dict({**converted.state_dict(), "count": 3})
    for q in (p, twin):
        set_gradients([q], 2)
    want = judge.expected(converted)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    texts = [str(w.message) for w in caught]
    assert len(texts) == (torch.float64 in (old, new)) and all("parameter 0 of group 0" in t for t in texts)
    assert_same_bits(snapshot(optimizer), want)
    judge.train(optimizer, 2, first=3)


# AMP


@pytest.mark.parametrize("between", ["", "unscale", "clip"])
@pytest.mark.parametrize("in_step", [False, True], ids=["by the scaler", "in the step"])
def test_a_real_grad_scaler(make: Make, judge: Judge, in_step: bool, between: str, flatten: bool) -> None:
    """Gradients are unscaled once, clipped in between or not. A step that is skipped, by the scaler or
    inside, leaves parameters, states and step numbers; only the latter is counted as a call. The scale
    shrinks then, and grows after two good steps."""
    params = parameters()
    optimizer = make(params, flatten=flatten, unscale_in_step=in_step)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    scales = []
    for seed in range(8):
        set_gradients(params, seed)
        factors = [gradient(p, 1000 * seed + i) for i, p in enumerate(params)]
        if between == "clip":
            torch.nn.utils.clip_grad_norm_(params, 0.1)
        want = judge.expected(optimizer)
        if seed in (2, 5):
            factors[1][0] = torch.inf
            want = snapshot(optimizer)
            want["count"] += in_step
        optimizer.zero_grad()
        scaler.scale(sum((p * f).sum() for p, f in zip(params, factors))).backward()
        if between:
            scaler.unscale_(optimizer)
        if between == "clip":
            torch.nn.utils.clip_grad_norm_(params, 0.1)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        assert_same_bits(snapshot(optimizer), want, f"step {seed}")
    assert scales == [8, 16, 8, 8, 16, 8, 8, 16]
    assert optimizer.state[params[0]]["step"] == 6
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
    for summed in (1.0, 2.0):  # over devices; the caller may set it too
        optimizer.found_inf, want = torch.tensor(summed), snapshot(optimizer)
        optimizer.step()
        assert_same_bits(snapshot(optimizer), {**want, "count": want["count"] + 1})
    del optimizer.found_inf
    for o in (optimizer, copy.deepcopy(optimizer)) if in_step else ():  # with no gradient at all
        before = snapshot(o)
        o.zero_grad()
        scaler.step(o)
        assert_same_bits(snapshot(o)["params"], before["params"])


# Closures and schedules


def test_a_closure_or_a_schedule_that_raises(make: Make, judge: Judge) -> None:
    params = parameters()
    optimizer = make(params, lr=lambda count: [0.1, 0.05, 0.025][count])

    def closure() -> Tensor:
        set_gradients(params, 5)
        raise KeyError("from the closure")

    for seed in range(3):
        with raises_unchanged(optimizer, KeyError, "from the closure"):
            optimizer.step(closure)
        judge.train(optimizer, 1, first=seed, lr=[0.1, 0.05, 0.025][seed])
    with raises_unchanged(optimizer, IndexError):
        optimizer.step()
