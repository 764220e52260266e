"""The ``torch.optim`` contract, list and flat: groups, masks, closures, hooks, learning rates, flat
buffers. What somebody changes between steps is in test_changes.py, checkpoints in test_checkpoints.py."""

import copy
import io
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from helpers import (  # isort: skip
    DTYPES, RULES, SHAPES, Judge, Make, Parameters, Rule, assert_same_bits, copies, parameters,
    raises_unchanged, raises_with, saved_and_loaded, set_gradients, snapshot, train, trained,
)  # fmt: skip
from torch import Tensor
from torch.optim import lr_scheduler


def named(params: Parameters) -> list[tuple[str, torch.nn.Parameter]]:
    return list(zip("abcdefg", params))


# Groups and masks


def test_names_after_a_group_was_changed(make: Make) -> None:
    """A parameter appended to a named group has a name still, and none gets its neighbour's."""
    params = parameters([(3,), (3,), (3,), (3,)])
    optimizer = make([{"params": named(params[:2])}, {"params": [("x", params[2])]}])
    train(optimizer, params[:3], 1)
    optimizer.param_groups[0]["params"].append(params[3])
    train(optimizer, params, 1)
    params[3].grad.data = torch.ones(5)
    with raises_with(RuntimeError, "parameter 2 of group 0"):
        optimizer.step()
    del optimizer.param_groups[0]
    params[2].grad.data = torch.ones(5)
    with raises_with(RuntimeError, "parameter 'x'"):
        optimizer.step()


MASKS: list[Any] = [
    lambda name, p: p.dim() > 1 or name == "a",
    {"a": True, "b": False, "c": True},
    [True, False, True],
    (True, False, True),
]


@pytest.mark.parametrize("mask", MASKS, ids=["callable", "mapping", "list", "tuple"])
def test_weight_decay_mask(make: Make, judge: Judge, mask: Any, flatten: bool) -> None:
    optimizer = make(named(parameters()), weight_decay=0.3, weight_decay_mask=mask, flatten=flatten)
    for group in (optimizer.param_groups[0], saved_and_loaded(optimizer.state_dict())["param_groups"][0]):
        assert group["weight_decay_mask"] == [True, False, True]
        assert group["param_names"] == ["a", "b", "c"]
    judge.train(optimizer)


def test_weight_decay_mask_over_groups(make: Make) -> None:
    """A list runs on through the groups; a group may have its own; unnamed parameters are
    numbered within their group."""
    seen = []

    def by_name(name: str, p: Tensor) -> bool:
        seen.append(name)
        return True

    def masks(mask: Any, **of_second: Any) -> list[Any]:
        groups = [{"params": parameters()}, {"params": parameters([(2,)]), **of_second}]
        return [g["weight_decay_mask"] for g in make(groups, weight_decay_mask=mask).param_groups]

    assert masks(by_name) == [[True] * 3, [True]]
    assert seen == ["0", "1", "2", "0"]
    assert masks([True, False, False, True]) == [[True, False, False], [True]]
    assert masks(None, weight_decay_mask=[False]) == [None, [False]]


def test_what_factories_pass_is_taken(make: Make) -> None:
    """None and False of all, True of what every step is anyway; in a group too. It changes nothing."""
    off = {"foreach": None, "fused": False, "capturable": False, "amsgrad": False, "differentiable": False}
    on = {**off, "foreach": True, "fused": True, "capturable": True}
    plain = snapshot(trained(make)[1])
    for given in (off, on):
        _, optimizer = trained(make, **given)
        assert_same_bits(snapshot(optimizer), plain)
        assert "fused" not in optimizer.param_groups[0]
        assert_same_bits(snapshot(trained(lambda ps, g=given: make([{"params": ps, **g}]))[1]), plain)


# Closures and hooks


def test_closures(make: Make, flatten: bool) -> None:
    params = parameters()
    optimizer = make(params, flatten=flatten)
    target = [p.detach() + 1 for p in params]

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = sum(((p - t) ** 2).sum() for p, t in zip(params, target))
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    with torch.no_grad():
        losses.append(optimizer.step(closure).item())
    assert torch.is_grad_enabled()
    assert losses == sorted(set(losses), reverse=True)
    assert optimizer.step(lambda: "any value") == "any value"
    assert optimizer.step() is None


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_autograd_records_nothing(make: Make, flatten: bool, max_grad_norm: float | None) -> None:
    """Of gradients, a scale and a schedule that require a gradient, and no graph is kept. The last parameter
    has gaps, and is copied, as its gradient is."""
    params = [*parameters([(4,)]), torch.nn.Parameter(torch.ones(3, 8)[:, ::2])]
    scale = torch.tensor(2.0, requires_grad=True)
    optimizer = make(params, lr=lambda count: scale * 0.1, flatten=flatten, max_grad_norm=max_grad_norm)
    optimizer.grad_scale, factors = scale, []
    for seed in range(3):
        set_gradients(params, seed)
        for p in params:
            factor = torch.ones_like(p).requires_grad_()
            factors.append(weakref.ref(factor))
            grad = p.grad * factor
            p.grad = grad if p.dim() == 1 else grad.mT.contiguous().mT
        optimizer.step()
    states = [t for p in params for t in optimizer.state[p].values()]
    made = [params[0].grad] * flatten + [optimizer.grad_norm] * (max_grad_norm is not None)
    assert all(t.grad_fn is None for t in (*params, *states, *made))
    del p.grad, params[0].grad, factor, grad, made
    assert [ref() for ref in factors] == [None] * 6


# Learning rates


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(o, two(o), [2]),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(two(o)),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=2, cycle_momentum=True),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8, cycle_momentum=True),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=3),
}


def two(o: torch.optim.Optimizer) -> list[Any]:
    return [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]


def test_no_scheduler_is_forgotten() -> None:
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("decoupled_lr", [False, True], ids=["times lr", "decoupled"])
def test_every_scheduler(name: str, decoupled_lr: bool) -> None:
    """The scheduler changes what it changes for ``torch.optim.Adam``, and the steps are those of its
    numbers. ``decoupled_lr`` goes on referring to the first lr, whatever a scheduler keeps in the group."""
    rule = RULES["adabelief"]
    in_tensor = decoupled_lr == (len(name) % 2 == 0)
    lr = torch.tensor(0.02, dtype=torch.float64) if in_tensor else 0.02
    optimizer = rule.optimizer(
        parameters(), lr=lr, weight_decay=0.1, decoupled_lr=decoupled_lr, flatten=in_tensor, backend="cpu"
    )
    judge = Judge(rule, reference_lr=0.02 if decoupled_lr else 0.0)
    adam_params = parameters()
    adam = torch.optim.Adam(adam_params, lr=0.02)
    schedulers = [SCHEDULERS[name](o) for o in (optimizer, adam)]
    rates = []
    for seed in range(6):
        ours, adams = optimizer.param_groups[0], adam.param_groups[0]
        rates.append(float(ours["lr"]))
        assert (rates[-1], *ours["betas"]) == pytest.approx((adams["lr"], *adams["betas"]), rel=1e-12)
        train(adam, adam_params, 1, first=seed)
        judge.train(optimizer, 1, first=seed)
        for s in schedulers:
            s.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert len(set(rates)) > 1, "the scheduler changed nothing"


def test_a_tensor_lr_is_the_float_of_its_value(make: Make, judge: Judge) -> None:
    lrs = [torch.full(s, 0.0123, dtype=d) for s in ((), (1,), (1, 1)) for d in DTYPES if not d.is_complex]
    optimizer = make([{"params": parameters(dtype=d), "lr": lr} for lr in lrs for d in DTYPES[:2]])
    judge.train(optimizer, 2)
    for lr in lrs:
        lr.mul_(0.37)
    judge.train(optimizer, 2, first=2)
    assert all(any(group["lr"] is lr for lr in lrs) for group in optimizer.param_groups)


# Callables


def test_callables_see_the_count(make: Make, flatten: bool) -> None:
    """Of earlier ``step()`` calls, whatever became of them."""
    params = parameters()
    seen: list[int] = []

    def lr(count: int) -> float:
        seen.append(count)
        return 0.1 / (1 + count)

    optimizer = make(params, lr=lr, weight_decay=lambda count: lr(count) / 2, flatten=flatten)
    assert optimizer.param_groups[0]["lr"] == 0.1
    seen.clear()
    train(optimizer, params, 2)
    optimizer.zero_grad()
    optimizer.step()
    optimizer.found_inf = torch.tensor(1.0)
    train(optimizer, params, 1)
    del optimizer.found_inf
    optimizer.step()
    assert seen == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert all(type(c) is int for c in seen)


@pytest.mark.parametrize("kind", [float, torch.tensor, np.float32, np.array, lambda x: torch.tensor([x])])
def test_callables_are_the_values_that_they_return(make: Make, judge: Judge, kind: Any) -> None:
    """Whatever ``float()`` takes: Optax's schedules give arrays without a dimension."""
    optimizer = make(parameters(), lr=lambda c: kind(0.1 / (1 + c)), weight_decay=lambda c: kind(0.25 * c))
    for seed in range(3):
        lr, decay = float(kind(0.1 / (1 + seed))), float(kind(0.25 * seed))
        judge.train(optimizer, 1, first=seed, lr=lr, weight_decay=decay)
        assert optimizer.param_groups[0]["lr"] == lr


def constant(value: float) -> Callable[[int], float]:
    return lambda count: value


@pytest.mark.parametrize("way", ["removed", "reversed", "replaced", "emptied"])
def test_callables_live_with_their_group(make: Make, way: str) -> None:
    params = parameters([(3,)] * 3)
    rates, decays = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    numbers = zip(params, rates, decays)
    optimizer = make([{"params": [p], "lr": constant(r), "weight_decay": constant(d)} for p, r, d in numbers])
    train(optimizer, params, 1)
    if way == "removed":
        del optimizer.param_groups[0]
    elif way == "reversed":
        optimizer.param_groups.reverse()
    elif way == "replaced":
        optimizer.param_groups = [optimizer.param_groups[i] for i in (2, 0)]
    else:
        optimizer.param_groups = []
        optimizer.state.clear()
        optimizer.add_param_group({"params": [params[1]], "lr": 0.25, "weight_decay": 0.0})
    optimizer.step()
    for group in optimizer.param_groups:
        number = next(k for k in range(3) if params[k] is group["params"][0])
        want = (0.25, 0.0) if way == "emptied" else (rates[number], decays[number])
        assert (group["lr"], group["weight_decay"]) == want


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_a_write_from_outside_wins_for_one_step(make: Make, judge: Judge, key: str) -> None:
    """Checkpoint helpers set lr to 0 for a dummy step; a scheduler multiplies what it finds."""
    optimizer = make(parameters(), **{key: lambda count: 0.1 / 2**count})
    for seed, written in enumerate([None, 0.0, None, 0.3, torch.tensor(0.7) if key == "lr" else 0.7, None]):
        number = 0.1 / 2**seed
        if written is not None:
            optimizer.param_groups[0][key] = written
            number = float(written)
        judge.train(optimizer, 1, first=seed, **{key: number})
        assert float(optimizer.param_groups[0][key]) == number


def test_callables_of_groups_added_later(make: Make) -> None:
    """They start at the count, as the others go on."""
    _, optimizer = trained(make, 5, lr=lambda count: 0.1 / 2**count)
    optimizer.add_param_group({"params": parameters()})
    assert optimizer.param_groups[1]["lr"] == 0.1 / 2**5
    optimizer.add_param_group({"params": parameters(), "lr": lambda count: 7.0 * count})
    assert optimizer.param_groups[2]["lr"] == 35.0


# Flat buffers


def in_one_buffer(tensors: list[Any]) -> bool:
    """Whether each begins where the one before it ends, at the next multiple of 16 elements."""
    places = [t.data_ptr() for t in tensors]
    gaps = [-(-t.numel() // 16) * 16 * t.element_size() for t in tensors]
    return all(b - a == gap for a, b, gap in zip(places, places[1:], gaps))


def alone(tensors: list[Any]) -> bool:
    """Whether each has a storage of its own, of its size: what torch.save and safetensors go by."""
    storages = {t.untyped_storage().data_ptr() for t in tensors}
    return len(storages) == len(tensors) and all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)


def test_flat_parameters_are_neighbours(make: Make, rule: Rule) -> None:
    params = [*parameters(), *parameters([(2, 3), (7,)], torch.bfloat16)]
    values = copies([p.data for p in params])
    objects = list(params)
    optimizer = make(params, flatten=True)
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], objects))
    assert_same_bits([p.detach() for p in params], values)
    train(optimizer, params, 1)

    def kinds() -> list[list[Any]]:
        states = [optimizer.state[p] for p in params]
        return [params, [p.grad for p in params], *([s[key] for s in states] for key in ("exp_avg", rule.nu))]

    for tensors in kinds():
        assert in_one_buffer(tensors[:3]) and in_one_buffer(tensors[3:])
    flat = [t.detach() for tensors in kinds() for t in tensors]
    assert alone(flat)
    file = io.BytesIO()
    torch.save(params[4], file)
    assert file.tell() < 4000
    optimizer.unflatten()
    assert alone([*flat, *(t for tensors in kinds() for t in tensors)])
    assert optimizer.memory()["moments"] > 0


def test_gradients_are_not_kept_alive(make: Make) -> None:
    params, optimizer = trained(make, 2)
    grads = [weakref.ref(p.grad) for p in params]
    optimizer.zero_grad()
    assert [g() for g in grads] == [None] * 3


def test_shared_memory_is_refused_when_flat(make: Make) -> None:
    module = torch.nn.Linear(3, 2).share_memory()
    with raises_with(ValueError, "parameter 'weight'", "shared memory", "flatten"):
        make(module.named_parameters(), flatten=True)
    assert all(p.is_shared() for p in module.parameters())
    train(make(module.parameters()), list(module.parameters()), 1)
    assert all(p.is_shared() for p in module.parameters())


def test_parameters_that_leave_the_flat_buffers(make: Make, judge: Judge) -> None:
    """The step is right. What was put elsewhere on its device stays there; what got another dtype, or was
    moved to another device, is in the buffers again."""
    params = parameters([*SHAPES, (3,)])
    optimizer = make(params, flatten=True)
    judge.train(optimizer, 2)
    mine = torch.full((5,), 0.5)
    for i, data, buffer in ((1, mine, (0, 2, 3)), (2, params[2].data.to(torch.bfloat16), (0, 3))):
        params[i].data, params[i].grad = data, None
        set_gradients(params, 2)
        judge.step(optimizer)
        judge.train(optimizer, 1, first=3)
        for tensors in (params, [p.grad for p in params]):
            assert in_one_buffer([tensors[k] for k in buffer])
        assert params[1].data_ptr() == mine.data_ptr()


# What is in the way of a step


def test_under_another_default_device(make: Make, flatten: bool) -> None:
    def run(device: str) -> Any:
        params, gradients = parameters(), parameters(seed=1)
        with torch.device(device):
            optimizer = make(params, flatten=flatten, lr=torch.tensor(0.1, device="cpu"))
            for p, g in zip(params, gradients):
                p.grad = g.detach()
            for _ in range(3):
                optimizer.step()
        return snapshot(optimizer)

    assert_same_bits(run("meta"), run("cpu"))


def test_inference_tensors_have_no_version(make: Make) -> None:
    def stepped() -> list[Tensor]:
        params = [torch.ones(3) for _ in range(3)]
        train(make(params), params, 3)
        return params

    with torch.inference_mode():
        params = stepped()
    assert_same_bits(params, stepped())


def test_state_keys_and_dtypes(make: Make, rule: Rule) -> None:
    """Parameters wider than 16 bits are their own master."""
    for dtype in DTYPES:
        plain = None
        for options in ({}, {"master_weights": "split8"}, {"stochastic_rounding": True}):
            if options and dtype.itemsize == 2:
                continue
            p = torch.nn.Parameter(torch.ones(3, dtype=dtype))
            optimizer = make([p], **options)
            assert not optimizer.state
            train(optimizer, [p], 1)
            kinds = {key: value.dtype for key, value in optimizer.state[p].items()}
            moments = torch.float32 if dtype.itemsize == 2 else dtype
            assert kinds == {"step": torch.int64, "exp_avg": moments, rule.nu: moments}
            assert optimizer.state[p]["step"].shape == ()
            plain = plain or snapshot(optimizer)
            assert_same_bits(snapshot(optimizer), plain, str(options))


LETS_GO: dict[str, Callable[[Any], Any]] = {
    "offloaded": lambda o: [s.update({key: t.clone() for key, t in s.items()}) for s in o.state.values()],
    "cleared": lambda o: o.state.clear(),
    "loaded": lambda o: o.load_state_dict(o.state_dict()),
}


@pytest.mark.parametrize("how", LETS_GO)
def test_what_is_replaced_is_let_go(make: Make, judge: Judge, how: str) -> None:
    """States that are replaced between two steps leave their memory at once."""
    _, optimizer = trained(make, 2)
    gone = [weakref.ref(t) for state in optimizer.state.values() for t in state.values()]
    LETS_GO[how](optimizer)
    assert not any(t() is not None for t in gone)
    judge.train(optimizer, 2, first=3)


# CUDA graphs, rehearsed: the CPU steps, and torch says that it captures. On a GPU: test_on_gpu.py


def captured_step(optimizer: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        optimizer.step()


def test_what_a_capture_refuses(make: Make) -> None:
    """What would freeze, and a step that is not like the one before."""
    params, optimizer = trained(make, 1, lr=lambda count: 0.1)
    with raises_unchanged(optimizer, RuntimeError, "lr of group 0 would freeze"):
        captured_step(optimizer)
    params, optimizer = trained(make, 1)
    for undo in (params[0].grad, None):
        params[0].grad = None if undo is not None else params[0].detach().clone()
        with raises_unchanged(optimizer, RuntimeError, "like the one before it"):
            captured_step(optimizer)
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())  # no graph is to be captured again
    optimizer.step()
    captured_step(optimizer)


REPLACES: dict[str, Callable[[Any, Tensor], Any]] = {
    "load_state_dict": lambda o, p: o.load_state_dict(o.state_dict()),
    "set_decoded_state": lambda o, p: o.set_decoded_state(p, o.decoded_state(p)),
    "unflatten": lambda o, p: o.unflatten(),
}


@pytest.mark.parametrize("what", REPLACES)
def test_new_tensors_after_a_capture_are_warned_of(
    make: Make, judge: Judge, what: str, flatten: bool
) -> None:
    """Replays go on with those of before, which are kept. The optimizer steps on with the new ones."""
    params, optimizer = trained(make, 2, flatten=flatten)
    copied = copy.deepcopy(optimizer)
    captured_step(optimizer)
    captured = [weakref.ref(t) for t in (*optimizer.state[params[0]].values(), params[0].untyped_storage())]
    with pytest.warns(RuntimeWarning, match=rf"{what} made new tensors.*capture it again"):
        REPLACES[what](optimizer, params[0])
    judge.train(optimizer, 2, first=3)
    assert all(t() is not None for t in captured)
    captured_step(optimizer)
    REPLACES[what](copied, copied.param_groups[0]["params"][0])  # nothing was captured of it


def test_a_capture_keeps_the_gradients_that_it_copies(make: Make, flatten: bool) -> None:
    """Into flat slots, that is: each replay copies them again."""
    params, optimizer = trained(make, 1, flatten=flatten)
    params[0].grad = grad = params[0].grad.clone()
    kept = weakref.ref(grad)
    del grad
    captured_step(optimizer)
    assert kept() is not None


def test_a_step_of_nothing_is_a_step() -> None:
    """A learning rate of 0, gradients of 0 and no state ask for states at the very first step alone."""
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.zeros(3)
    optimizer = RULES["adamw"].optimizer([p], lr=0.0)
    optimizer.step()
    assert (optimizer.param_groups[0].get("count"), int(optimizer.state[p]["step"])) == (0, 0)
    for _ in range(2):
        optimizer.step()
        optimizer.state.clear()
    optimizer.step()
    assert (optimizer.param_groups[0]["count"], int(optimizer.state[p]["step"])) == (3, 1)
