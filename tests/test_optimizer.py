"""The ``torch.optim`` contract, with and without ``flatten``: groups, hooks, schedulers,
checkpoints, and what user code does to parameters, gradients and states between steps."""

from __future__ import annotations

import copy
import io
import pickle
import platform
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    BACKENDS,
    RULES,
    assert_same_bits,
    copies,
    flat_like_plain,
    gradient,
    parameters,
    raises_with,
    results,
    set_gradients,
    snapshot,
    train,
)
from torch import Tensor
from torch.optim import lr_scheduler

from fused_optim import AdaBelief, AdamaxW
from fused_optim.backends import extension

pytestmark = pytest.mark.filterwarnings("error")

Make = Callable[..., torch.optim.Optimizer]
Parameters = list[torch.nn.Parameter]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=RULES, ids=lambda cls: cls.__name__)
def make(request: pytest.FixtureRequest, backend: str) -> Make:
    """The constructor of each optimizer, on each backend."""

    def construct(params: Any, **options: Any) -> torch.optim.Optimizer:
        return request.param(params, **{"backend": backend, **options})

    return construct


flat = pytest.mark.parametrize("flatten", [False, True], ids=["plain", "flat"])


def named(params: Parameters) -> list[tuple[str, torch.nn.Parameter]]:
    return list(zip("abcdefg", params))


def saved_and_loaded(value: Any) -> Any:
    """Through ``torch.save`` and ``torch.load(weights_only=True)``."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Groups and masks


def test_groups_have_their_own_options(make: Make) -> None:
    """Each group steps as it would in an optimizer of its own."""
    options: list[dict[str, Any]] = [
        {},
        {"lr": 0.1, "betas": (0.8, 0.95)},
        {"lr": torch.tensor(0.05), "eps": 1e-3, "weight_decay": 0.2},
        {"maximize": True},
        {"lr": 0},
    ]

    def run(flatten: bool) -> Any:
        groups = [{"params": parameters(seed=i), **o} for i, o in enumerate(options)]
        optimizer = make(groups, lr=0.02, flatten=flatten)
        train(optimizer, [p for group in groups for p in group["params"]], 4)
        return snapshot(optimizer)

    got = flat_like_plain(run)
    want: list[Any] = []
    states: list[Any] = []
    for i, o in enumerate(options):
        params = parameters(seed=i)
        optimizer = make(params, **{"lr": 0.02, **o})
        for seed in range(4):
            for j, p in enumerate(params):
                p.grad = gradient(p, 1000 * seed + len(params) * i + j)
            optimizer.step()
        alone = snapshot(optimizer)
        want += alone["params"]
        states += alone["states"]
    assert_same_bits(got, {"params": want, "states": states, "count": 4})


def test_groups_of_nesterov_and_plain(backend: str) -> None:
    def run(flatten: bool) -> Any:
        groups = [{"params": parameters(), "nesterov": True}, {"params": parameters()}]
        optimizer = AdaBelief(groups, backend=backend, flatten=flatten)
        for seed in range(3):
            for group in groups:
                set_gradients(group["params"], seed)
            optimizer.step()
        return snapshot(optimizer)

    got = flat_like_plain(run)["params"]
    for nesterov, part in ((True, got[:3]), (False, got[3:])):
        params = parameters()
        optimizer = AdaBelief(params, nesterov=nesterov, backend=backend)
        train(optimizer, params, 3)
        assert_same_bits(part, [p.detach() for p in params])
    assert not torch.equal(got[2], got[5])


def test_named_parameters(make: Make) -> None:
    params, twins = parameters(), parameters()
    optimizer, want = make(named(params)), make(twins)
    assert optimizer.param_groups[0]["param_names"] == ["a", "b", "c"]
    train(optimizer, params, 2)
    train(want, twins, 2)
    assert_same_bits(snapshot(optimizer), snapshot(want))
    assert saved_and_loaded(optimizer.state_dict())["param_groups"][0]["param_names"] == ["a", "b", "c"]
    params[1].grad.data = torch.ones(3)
    with raises_with(RuntimeError, "parameter 'b'"):
        optimizer.step()


MASKS: list[Any] = [
    lambda name, p: p.dim() > 1 or name == "a",
    {"a": True, "b": False, "c": True},
    [True, False, True],
    (True, False, True),
]


@pytest.mark.parametrize("mask", MASKS, ids=["callable", "mapping", "list", "tuple"])
@flat
def test_weight_decay_mask(make: Make, mask: Any, flatten: bool) -> None:
    params, twins = parameters(), parameters()
    optimizer = make(named(params), weight_decay=0.3, weight_decay_mask=mask, flatten=flatten)
    groups = [{"params": [twins[0], twins[2]]}, {"params": [twins[1]], "weight_decay": 0.0}]
    want = make(groups, weight_decay=0.3)
    train(optimizer, params, 3)
    train(want, twins, 3)
    assert_same_bits([p.detach() for p in params], [p.detach() for p in twins])
    group = saved_and_loaded(optimizer.state_dict())["param_groups"][0]
    assert group["weight_decay_mask"] == [True, False, True]


def test_weight_decay_mask_over_groups(make: Make) -> None:
    """A list runs on through the groups; a group may have its own; unnamed parameters are
    numbered within their group."""
    seen = []

    def by_name(name: str, p: Tensor) -> bool:
        seen.append(name)
        return True

    make([{"params": parameters()}, {"params": parameters()}], weight_decay_mask=by_name)
    assert seen == ["0", "1", "2"] * 2
    optimizer = make(
        [{"params": parameters()}, {"params": parameters([(2,)])}],
        weight_decay_mask=[True, False, False, True],
    )
    assert [g["weight_decay_mask"] for g in optimizer.param_groups] == [[True, False, False], [True]]
    optimizer = make([{"params": parameters()}, {"params": parameters([(2,)]), "weight_decay_mask": [False]}])
    assert [g["weight_decay_mask"] for g in optimizer.param_groups] == [None, [False]]


def test_a_mask_changed_between_steps(make: Make) -> None:
    params, twins = parameters(), parameters()
    optimizer = make(params, weight_decay=0.3, weight_decay_mask=[True, True, True])
    want = make(twins, weight_decay=0.3, weight_decay_mask=[True, True, True])
    train(optimizer, params, 2)
    train(want, twins, 2)
    optimizer.param_groups[0]["weight_decay_mask"][1] = False
    want.param_groups[0]["weight_decay_mask"] = [True, False, True]
    train(optimizer, params, 2, first=2)
    train(want, twins, 2, first=2)
    assert_same_bits(snapshot(optimizer), snapshot(want))


def test_groups_added_later(make: Make) -> None:
    def run(flatten: bool) -> Any:
        params, late = parameters(), parameters([(6,), (2, 2)], seed=9)
        optimizer = make(params, flatten=flatten)
        train(optimizer, params, 2)
        optimizer.add_param_group({"params": late, "lr": 0.5})
        train(optimizer, [*params, *late], 2, first=2)
        assert [int(optimizer.state[p]["step"]) for p in [*params, *late]] == [4, 4, 4, 2, 2]
        return results(optimizer)

    flat_like_plain(run)


def test_parameters_that_start_after_a_group_was_added(make: Make) -> None:
    """They are younger than their neighbours in the flat buffer."""

    def run(flatten: bool) -> Any:
        params = parameters()
        optimizer = make(params, flatten=flatten)
        set_gradients(params, 0, skip=[1])
        optimizer.step()
        late = parameters([(6,)], seed=9)
        optimizer.add_param_group({"params": late})
        train(optimizer, [*params, *late], 3, first=2)
        assert [int(optimizer.state[p]["step"]) for p in [*params, *late]] == [4, 3, 4, 3]
        if flatten:
            assert_rows(optimizer, 4)
        return snapshot(optimizer)

    flat_like_plain(run)


# Closures and hooks


def test_closures(make: Make) -> None:
    def run(flatten: bool) -> Any:
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
        assert losses == sorted(losses, reverse=True)
        assert optimizer.step(lambda: "any value") == "any value"
        assert optimizer.step() is None
        with torch.no_grad():
            optimizer.step(closure)
        assert torch.is_grad_enabled()
        return snapshot(optimizer)

    flat_like_plain(run)


def test_step_hooks(make: Make) -> None:
    params = parameters()
    optimizer = make(params)
    calls: list[str] = []

    def double_gradients(opt: Any, args: Any, kwargs: Any) -> None:
        assert opt is optimizer
        calls.append("pre")
        for p in params:
            p.grad *= 2

    handles = [
        optimizer.register_step_pre_hook(double_gradients),
        optimizer.register_step_post_hook(lambda opt, args, kwargs: calls.append("post")),
    ]
    train(optimizer, params, 2)
    assert calls == ["pre", "post"] * 2
    for handle in handles:
        handle.remove()
    twins = parameters()
    want = make(twins)
    for seed in range(2):
        set_gradients(twins, seed)
        for p in twins:
            p.grad *= 2
        want.step()
    train(optimizer, params, 1, first=2)
    train(want, twins, 1, first=2)
    assert_same_bits(snapshot(optimizer), snapshot(want))


def test_state_dict_hooks(make: Make) -> None:
    params, twins = parameters(), parameters()
    optimizer, loaded = make(params), make(twins)
    train(optimizer, params, 2)
    calls: list[str] = []

    def keep_extra(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("post save")
        return {**state_dict, "extra": 5}

    def scale_moments(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("pre load")
        assert state_dict["extra"] == 5
        state = {i: {**s, "exp_avg": s["exp_avg"] * 2} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    def see_state(opt: Any) -> None:
        calls.append("post load")
        assert_same_bits(opt.state[twins[2]]["exp_avg"], optimizer.state[params[2]]["exp_avg"] * 2)

    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("pre save"))
    optimizer.register_state_dict_post_hook(keep_extra)
    loaded.register_load_state_dict_pre_hook(scale_moments)
    loaded.register_load_state_dict_post_hook(see_state)
    loaded.load_state_dict(optimizer.state_dict())
    assert calls == ["pre save", "post save", "pre load", "post load"]


def test_autograd_sees_the_write(make: Make) -> None:
    """Backward through a graph that saved the parameter's old value must be refused."""
    params = parameters([(4,)])
    optimizer = make(params)
    loss = (params[0] ** 3).sum()
    train(optimizer, params, 1)
    with raises_with(RuntimeError, "modified by an inplace operation"):
        loss.backward()


# Learning rates


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=2, cycle_momentum=True),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8, cycle_momentum=True),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=3),
}


def test_no_scheduler_is_forgotten() -> None:
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
def test_every_scheduler(make: Make, name: str, tensor_lr: bool) -> None:
    """The scheduler changes what it changes for ``torch.optim.Adam``, and the steps are those
    of the same values set by hand."""

    def run(flatten: bool) -> Any:
        params, twins, adam_params = parameters(), parameters(), parameters()
        lr = torch.tensor(0.02, dtype=torch.float64) if tensor_lr else 0.02
        optimizer = make(params, lr=lr, flatten=flatten)
        adam, by_hand = torch.optim.Adam(adam_params, lr=0.02), make(twins)
        scheduler, twin_scheduler = SCHEDULERS[name](optimizer), SCHEDULERS[name](adam)
        rates = []
        for seed in range(6):
            for key in ("lr", "betas"):
                value = optimizer.param_groups[0][key]
                by_hand.param_groups[0][key] = float(value) if key == "lr" else tuple(value)
                expected = adam.param_groups[0][key]
                assert by_hand.param_groups[0][key] == pytest.approx(expected, rel=1e-12)
            train(optimizer, params, 1, first=seed)
            train(adam, adam_params, 1, first=seed)
            train(by_hand, twins, 1, first=seed)
            rates.append(float(optimizer.param_groups[0]["lr"]))
            for s in (scheduler, twin_scheduler):
                s.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        assert len(set(rates)) > 1, "the scheduler changed nothing"
        assert_same_bits(snapshot(optimizer), snapshot(by_hand))
        return snapshot(optimizer)

    flat_like_plain(run)


def test_decoupled_lr_with_a_scheduler_and_a_checkpoint(make: Make) -> None:
    """The ratio is to the first lr, also after a resume at another one."""
    params, twins = parameters(), parameters()
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "decoupled_lr": True}
    optimizer, resumed = make(params, **options), make(twins, **{**options, "lr": 0.7})
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    for seed in range(2):
        train(optimizer, params, 1, first=seed)
        scheduler.step()
    assert optimizer.param_groups[0]["initial_lr"] == 0.1
    for p, twin in zip(params, twins):
        twin.data.copy_(p.data)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    train(optimizer, params, 2, first=2)
    train(resumed, twins, 2, first=2)
    assert_same_bits(results(resumed), results(optimizer))


LR_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", LR_DTYPES)
@pytest.mark.parametrize("of", [torch.float32, torch.float64])
def test_a_tensor_lr_is_the_float_of_its_value(
    make: Make, dtype: torch.dtype, of: torch.dtype, shape: tuple[int, ...]
) -> None:
    lr = torch.full(shape, 0.0123, dtype=dtype)
    params, twins = parameters(dtype=of), parameters(dtype=of)
    optimizer, want = make(params, lr=lr), make(twins, lr=lr.item())
    train(optimizer, params, 2)
    train(want, twins, 2)
    lr.mul_(0.37)
    want.param_groups[0]["lr"] = lr.item()
    train(optimizer, params, 2, first=2)
    train(want, twins, 2, first=2)
    assert_same_bits(snapshot(optimizer), snapshot(want))
    assert_same_bits(optimizer.param_groups[0]["lr"], torch.full(shape, 0.0123, dtype=dtype).mul_(0.37))


def test_callables_see_the_count(make: Make) -> None:
    """Of earlier ``step()`` calls, whatever became of them."""

    def run(flatten: bool) -> Any:
        params = parameters()
        seen: dict[str, list[int]] = {"lr": [], "weight_decay": []}

        def schedule(key: str, scale: float) -> Callable[[int], float]:
            def value(count: int) -> float:
                seen[key].append(count)
                return scale / (1 + count)

            return value

        optimizer = make(
            params, lr=schedule("lr", 0.1), weight_decay=schedule("weight_decay", 0.5), flatten=flatten
        )
        assert optimizer.param_groups[0]["lr"] == 0.1
        for counts in seen.values():
            counts.clear()
        train(optimizer, params, 2)
        for p in params:
            p.grad = None
        optimizer.step()
        set_gradients(params, 3)
        optimizer.found_inf = torch.tensor(1.0)
        optimizer.step()
        del optimizer.found_inf
        optimizer.step()
        assert seen == {"lr": [0, 1, 2, 3, 4], "weight_decay": [0, 1, 2, 3, 4]}
        assert all(type(c) is int for c in seen["lr"])
        return results(optimizer)

    flat_like_plain(run)


def test_callables_are_the_values_that_they_return(make: Make) -> None:
    params, twins = parameters(), parameters()
    optimizer = make(params, lr=lambda c: 0.1 / (1 + c), weight_decay=lambda c: 0.2 * c)
    want = make(twins)
    for seed in range(4):
        want.param_groups[0].update(lr=0.1 / (1 + seed), weight_decay=0.2 * seed)
        train(optimizer, params, 1, first=seed)
        train(want, twins, 1, first=seed)
    assert_same_bits(results(optimizer), results(want))


def halving(count: int) -> float:
    """A schedule that pickle can find."""
    return 0.1 / 2**count


def test_callables_after_loading(make: Make) -> None:
    """The count comes back, the callable is the loading optimizer's, and a group added later
    starts at the count."""
    params, twins = parameters(), parameters()
    optimizer, resumed = make(params, lr=halving), make(twins, lr=halving)
    train(optimizer, params, 3)
    saved = optimizer.state_dict()
    assert saved["count"] == 3
    assert not any("count" in group for group in saved["param_groups"])
    for p, twin in zip(params, twins):
        twin.data.copy_(p.data)
    resumed.load_state_dict(saved_and_loaded(saved))
    train(optimizer, params, 2, first=3)
    train(resumed, twins, 2, first=3)
    assert_same_bits(results(resumed), results(optimizer))
    assert resumed.param_groups[0]["lr"] == halving(4)
    resumed.add_param_group({"params": parameters()})
    assert resumed.param_groups[1]["lr"] == halving(5)
    resumed.add_param_group({"params": parameters(), "lr": lambda count: 7.0 * count})
    assert resumed.param_groups[2]["lr"] == 35.0


# Checkpoints and copies


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
)
def test_resuming_gives_the_same_bits(make: Make, dtype: torch.dtype) -> None:
    def run(flatten: bool) -> Any:
        params, twins = parameters(dtype=dtype), parameters(dtype=dtype)
        options: dict[str, Any] = {"weight_decay": 0.1, "flatten": flatten}
        optimizer, resumed = make(params, lr=0.05, **options), make(twins, **options)
        train(optimizer, params, 2)
        set_gradients(params, 2, skip=[1])
        optimizer.step()
        for p, twin in zip(params, twins):
            twin.data.copy_(p.data)
        train(resumed, twins, 1)
        for p, twin in zip(params, twins):
            twin.data.copy_(p.data)
        resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
        assert_same_bits(results(resumed), results(optimizer))
        for seed in range(3, 6):
            skip = [0] if seed == 4 else []
            set_gradients(params, seed, skip)
            set_gradients(twins, seed, skip)
            optimizer.step()
            resumed.step()
        assert_same_bits(results(resumed), results(optimizer))
        return results(resumed)

    flat_like_plain(run)


def test_checkpoints_go_between_flat_and_plain(make: Make) -> None:
    for flatten in (False, True):
        params, twins = parameters(), parameters()
        optimizer, resumed = make(params, flatten=flatten), make(twins, flatten=not flatten)
        train(optimizer, params, 2)
        for p, twin in zip(params, twins):
            twin.data.copy_(p.data)
        resumed.load_state_dict(optimizer.state_dict())
        train(optimizer, params, 2, first=2)
        train(resumed, twins, 2, first=2)
        assert_same_bits(snapshot(resumed), snapshot(optimizer))


@flat
def test_saved_tensors_own_their_bytes_only(make: Make, flatten: bool) -> None:
    params = parameters([(), (5,), (4, 5), (0,), (1,)])
    optimizer = make(params, flatten=flatten)
    train(optimizer, params, 2)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        assert set(state) == set(optimizer.state[params[0]])
        for value in state.values():
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_go_their_own_way(make: Make, way: str) -> None:
    """Copied together with their parameters, before the first step and after."""

    def run(flatten: bool) -> Any:
        params = parameters()
        optimizer = make(named(params), lr=halving, weight_decay_mask=[True, False, True], flatten=flatten)
        for steps in (0, 2):
            train(optimizer, params, steps)
            twins, twin = COPIES[way]((params, optimizer))
            before = snapshot(optimizer)
            assert twin.param_groups[0]["params"][0] is twins[0]
            assert_same_bits(results(twin), results(optimizer))
            train(twin, twins, 2, first=steps)
            assert_same_bits(snapshot(optimizer), before, "the original")
            twin.zero_grad()
            train(twin, twins, 1, first=steps + 2)
            other = make(parameters(), lr=halving, weight_decay_mask=[True, False, True], flatten=flatten)
            train(other, other.param_groups[0]["params"], steps + 3)
            assert_same_bits(snapshot(twin), snapshot(other))
            assert repr(twin) == repr(optimizer).replace(
                str(halving(max(steps - 1, 0))), str(halving(steps + 2))
            )
        return snapshot(twin)

    flat_like_plain(run)


# Gradients that come and go


def test_missing_gradients_skip_their_parameter(make: Make) -> None:
    """Nothing of it changes, and its ``t`` does not advance."""
    skips = [[], [1], [0, 1], [0, 1, 2], [2], [], [1], []]

    def run(flatten: bool) -> Any:
        params = parameters()
        optimizer = make(params, flatten=flatten)
        for seed, skip in enumerate(skips):
            before = snapshot(optimizer)
            set_gradients(params, seed, skip)
            optimizer.step()
            after = snapshot(optimizer)
            for i in skip:
                assert_same_bits(
                    [after["params"][i], after["states"][i]], [before["params"][i], before["states"][i]]
                )
        return snapshot(optimizer)

    got = flat_like_plain(run)
    for i in range(3):
        p = parameters()[i]
        alone = make([p])
        for seed, skip in enumerate(skips):
            if i not in skip:
                p.grad = gradient(p, 1000 * seed + i)
                alone.step()
        assert_same_bits([p.detach(), dict(alone.state[p])], [got["params"][i], got["states"][i]])


def test_gradients_freed_and_made_anew(make: Make) -> None:
    """A new gradient mostly gets the address of an old one that is gone; here always."""
    params, twins = parameters([(500,)] * 3), parameters([(500,)] * 3)
    optimizer, want = make(params), make(twins)
    memory = [torch.empty(500), torch.empty(500), torch.empty(500, 2)[:, 0]]
    for seed in range(4):
        for i, p in enumerate(params):
            p.grad = None
            memory[i].copy_(gradient(p, 1000 * seed + i))
            p.grad = memory[i][:]
        optimizer.step()
        train(want, twins, 1, first=seed)
        assert_same_bits(snapshot(optimizer), snapshot(want), f"step {seed}")


def test_training_loops(make: Make) -> None:
    """zero_grad in both ways, and gradients that accumulate."""

    def run(flatten: bool, set_to_none: bool) -> Any:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        optimizer = make(model.named_parameters(), lr=0.05, flatten=flatten)
        x = torch.randn(16, 4)
        losses = []
        for _ in range(8):
            optimizer.zero_grad(set_to_none=set_to_none)
            for part in x.split(8):
                loss = (model(part) - part.sum(1, keepdim=True)).square().mean()
                loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        return snapshot(optimizer)

    first = flat_like_plain(lambda flatten: run(flatten, True))
    assert_same_bits(flat_like_plain(lambda flatten: run(flatten, False)), first)


# What users do to parameters and states


def test_a_parameter_replaced_with_its_state(make: Make) -> None:
    """As 3D Gaussian splatting does when it adds and removes points."""

    def run(flatten: bool) -> Any:
        params = parameters()
        groups = [{"params": [p], "name": str(i)} for i, p in enumerate(params)]
        optimizer = make(groups, lr=0.1, flatten=flatten)
        train(optimizer, params, 2)
        for seed, keep in ((2, [0, 2]), (3, [1, 1, 0, 1, 0])):
            group = optimizer.param_groups[2]
            old = group["params"][0]
            state = optimizer.state.pop(old)
            new = torch.nn.Parameter(old.detach()[keep])
            for key, value in state.items():
                if key != "step":
                    state[key] = value[keep]
            group["params"][0] = new
            optimizer.state[new] = state
            params[2] = new
            train(optimizer, params, 2, first=2 * seed)
        assert set(optimizer.state) == set(params)
        assert [p.shape for p in params] == [(), (5,), (5, 5)]
        return snapshot(optimizer)

    flat_like_plain(run)


def test_a_parameter_replaced_without_state(make: Make) -> None:
    def run(flatten: bool) -> Any:
        params = parameters()
        optimizer = make(params, flatten=flatten)
        train(optimizer, params, 2)
        old, params[1] = params[1], torch.nn.Parameter(torch.ones(7))
        optimizer.param_groups[0]["params"][1] = params[1]
        train(optimizer, params, 2, first=2)
        # As in torch, a state that belongs to no parameter is in the way of state_dict().
        del optimizer.state[old]
        assert [int(optimizer.state[p]["step"]) for p in params] == [4, 2, 4]
        return snapshot(optimizer)

    flat_like_plain(run)


def test_a_parameter_removed_and_one_appended(make: Make) -> None:
    def run(flatten: bool) -> Any:
        params = parameters()
        optimizer = make(params, flatten=flatten)
        train(optimizer, params, 2)
        del optimizer.state[params[0]]
        del optimizer.param_groups[0]["params"][0]
        added = torch.nn.Parameter(torch.ones(3))
        optimizer.param_groups[0]["params"].append(added)
        frozen = params[0].detach().clone()
        train(optimizer, [*params, added], 2, first=2)
        assert torch.equal(params[0], frozen)
        return snapshot(optimizer)

    flat_like_plain(run)


def test_cleared_state_starts_anew(make: Make) -> None:
    def run(flatten: bool) -> Any:
        params = parameters()
        optimizer = make(params, flatten=flatten)
        train(optimizer, params, 3)
        optimizer.state.clear()
        train(optimizer, params, 2)
        assert [int(optimizer.state[p]["step"]) for p in params] == [2, 2, 2]
        del optimizer.state[params[1]]
        train(optimizer, params, 2, first=2)
        assert [int(optimizer.state[p]["step"]) for p in params] == [4, 2, 4]
        return snapshot(optimizer)

    got = flat_like_plain(run)
    # Parameter 2's last four steps are a fresh optimizer's, from where the first three led.
    params = parameters()
    train(make(params), params, 3)
    train(make(params), params, 4)
    assert_same_bits(params[2].detach(), got["params"][2])


def clone_values(state: dict[str, Tensor]) -> None:
    for key, value in state.items():
        state[key] = value.clone()


def clone_data(state: dict[str, Tensor]) -> None:
    for value in state.values():
        value.data = value.data.clone()


def to_and_from(state: dict[str, Tensor]) -> None:
    for key, value in state.items():
        state[key] = value.to(torch.float64).to(value.dtype)


def transpose(state: dict[str, Tensor]) -> None:
    for key, value in state.items():
        if value.dim() == 2:
            state[key] = value.mT.contiguous().mT


def plain_step(state: dict[str, Any]) -> None:
    state["step"] = int(state["step"])


def float_step(state: dict[str, Any]) -> None:
    state["step"] = state["step"].float()


def nothing(state: dict[str, Any]) -> None:
    pass


@pytest.mark.parametrize(
    "change", [clone_values, clone_data, to_and_from, transpose, plain_step, float_step, nothing]
)
def test_states_that_users_rewrite(make: Make, change: Callable[[Any], None]) -> None:
    """Values stay, so the steps are those of an optimizer that was left alone."""

    def run(flatten: bool) -> Any:
        params = parameters()
        optimizer = make(params, flatten=flatten)
        for seed in range(4):
            train(optimizer, params, 1, first=seed)
            for state in optimizer.state.values():
                change(state)
        train(optimizer, params, 2, first=4)
        return snapshot(optimizer)

    params = parameters()
    want = make(params)
    train(want, params, 6)
    assert_same_bits(flat_like_plain(run), snapshot(want))


def test_states_that_users_change_in_place(make: Make) -> None:
    """A moment set to 0, and step numbers set back, for one parameter only."""

    def run(flatten: bool) -> Any:
        params = parameters()
        optimizer = make(params, flatten=flatten)
        train(optimizer, params, 2)
        optimizer.state[params[1]]["exp_avg"].zero_()
        optimizer.state[params[1]]["step"].zero_()
        train(optimizer, params, 1, first=2)
        optimizer.zero_grad(set_to_none=True)
        set_gradients(params, 3, skip=[0])
        optimizer.step()
        train(optimizer, params, 1, first=4)
        assert [int(optimizer.state[p]["step"]) for p in params] == [4, 3, 5]
        return snapshot(optimizer)

    flat_like_plain(run)


def test_extra_values_in_the_state(make: Make) -> None:
    """They are the user's, and stay."""
    params, twins = parameters(), parameters()
    optimizer, want = make(params), make(twins)
    train(want, twins, 3)
    optimizer.state[params[0]]["note"] = "mine"
    train(optimizer, params, 2)
    optimizer.state[params[1]]["other"] = torch.ones(3)
    train(optimizer, params, 1, first=2)
    assert optimizer.state[params[0]].pop("note") == "mine"
    assert torch.equal(optimizer.state[params[1]].pop("other"), torch.ones(3))
    assert_same_bits(snapshot(optimizer), snapshot(want))


# Flat buffers


def rows_of(optimizer: Any) -> Tensor:
    return optimizer._plan.batches[0][1].rows


def assert_rows(optimizer: Any, count: int) -> None:
    rows = rows_of(optimizer)
    assert len(rows) == count, f"{len(rows)} rows"


def storages(tensors: list[Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


def test_flat_parameters_share_one_storage(make: Make) -> None:
    params = [*parameters(), *parameters([(2, 3), (7,)], torch.bfloat16)]
    values = copies([p.data for p in params])
    objects = list(params)
    optimizer = make(params, flatten=True)
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], objects))
    assert_same_bits([p.detach() for p in params], values)
    assert len(storages(params[:3])) == 1
    assert len(storages(params[3:])) == 1
    assert storages(params[:3]) != storages(params[3:])
    train(optimizer, params, 1)
    assert len(storages([p.grad for p in params[:3]])) == 1
    for key in ("exp_avg", "exp_avg_var" if isinstance(optimizer, AdaBelief) else "exp_inf"):
        assert len(storages([optimizer.state[p][key] for p in params[:3]])) == 1


@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_grad_keeps_the_flat_gradients(make: Make, set_to_none: bool) -> None:
    params = parameters()
    optimizer = make(params, flatten=True)
    set_gradients(params, 0, skip=[1])
    optimizer.step()
    grads = [p.grad for p in params]
    optimizer.zero_grad(set_to_none=set_to_none)
    for p, g in zip(params, grads):
        assert p.grad is g
        assert g is None or not g.any()
    sum((p * p).sum() for p in params).backward()
    assert params[0].grad is grads[0]
    assert params[1].grad is not None
    for p in params:
        assert torch.equal(p.grad, 2 * p)


def test_equal_parameters_share_a_row(make: Make) -> None:
    shapes = [(3,), (4, 5), (), (2, 2)]
    params = parameters(shapes)
    optimizer = make(params, flatten=True)
    train(optimizer, params, 1)
    assert_rows(optimizer, 1)
    # One falls a step behind: it parts its neighbours.
    set_gradients(params, 1, skip=[1])
    optimizer.step()
    train(optimizer, params, 1, first=2)
    assert_rows(optimizer, 3)
    # The others lose a step too, and all are equal again.
    set_gradients(params, 3, skip=[0, 2, 3])
    optimizer.step()
    train(optimizer, params, 1, first=4)
    assert_rows(optimizer, 1)
    # A group with another weight decay has a row of its own.
    params = parameters(shapes)
    optimizer = make([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.5}], flatten=True)
    train(optimizer, params, 2)
    assert_rows(optimizer, 2)
    params = parameters(shapes)
    optimizer = make(params, weight_decay=0.5, weight_decay_mask=[False, True, True, True], flatten=True)
    train(optimizer, params, 2)
    assert_rows(optimizer, 2)


def test_skipped_steps_keep_the_rows_right(make: Make) -> None:
    """``found_inf`` skips all parameters that have a gradient, and no others: which have
    equal step numbers is then not known without reading them."""

    def run(flatten: bool) -> Any:
        params = parameters()
        optimizer = make(params, flatten=flatten)
        # (parameters without a gradient, whether the step is skipped)
        for seed, (skip, inf) in enumerate(
            [
                ([1, 2], True),
                ([0, 2], False),
                ([0, 1], True),
                ([], False),
                ([0], True),
                ([1, 2], False),
                ([], True),
                ([], False),
            ]
        ):
            set_gradients(params, seed, skip)
            optimizer.found_inf = torch.tensor(float(inf))
            optimizer.grad_scale = torch.tensor(1.0)
            optimizer.step()
        return snapshot(optimizer)

    flat_like_plain(run)


@pytest.mark.parametrize("way", COPIES)
def test_copies_of_a_flat_optimizer_are_flat(make: Make, way: str) -> None:
    params = parameters()
    optimizer = make(params, flatten=True)
    train(optimizer, params, 2)
    twins, twin = COPIES[way]((params, optimizer))
    train(twin, twins, 1, first=2)
    assert len(storages(twins)) == 1
    assert not storages(twins) & storages(params)


def test_flat_with_parameters_of_many_kinds(make: Make) -> None:
    """Parameters with gaps stay where they are; empty ones have no address."""

    def run(flatten: bool) -> Any:
        params = [
            *parameters([(3,), (0,), (4, 5)]),
            torch.nn.Parameter(torch.arange(20.0).view(4, 5)[:, 1:3]),
            *parameters([(3, 2), (0,)], torch.float64),
            *parameters([(3,), (2,)], torch.complex64),
            torch.nn.Parameter(torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)),
        ]
        optimizer = make(params, flatten=flatten)
        for seed in range(4):
            optimizer.zero_grad()
            set_gradients(params, seed, skip=[seed])
            optimizer.step()
        return snapshot(optimizer)

    flat_like_plain(run)


def model_and_optimizer(make: Make, flatten: bool = True) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = make(model.parameters(), lr=0.1, flatten=flatten)
    model_steps(model, optimizer, 2)
    return model, optimizer


def model_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for seed in range(first, first + steps):
        optimizer.zero_grad()
        for i, p in enumerate(model.parameters()):
            (p * gradient(p, 1000 * seed + i)).sum().backward()
        optimizer.step()


def test_module_zero_grad(make: Make) -> None:
    def run(flatten: bool) -> Any:
        model, optimizer = model_and_optimizer(make, flatten)
        for seed in range(2, 5):
            model.zero_grad(set_to_none=True)
            for i, p in enumerate(model.parameters()):
                if i != 1:
                    (p * gradient(p, 1000 * seed + i)).sum().backward()
            optimizer.step()
        return snapshot(optimizer)

    flat_like_plain(run)


CHANGES: dict[str, Callable[[torch.nn.Module], Any]] = {
    "double": lambda model: model.double(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "data": lambda model: setattr(model[0].weight, "data", torch.full((4, 3), 0.5)),
    "transposed data": lambda model: setattr(model[0].weight, "data", torch.full((3, 4), 0.5).mT),
}


@pytest.mark.parametrize("change", CHANGES)
def test_parameters_that_leave_the_flat_buffers(make: Make, change: str) -> None:
    """The step is right, there is one warning, and they are in the buffers again."""

    def run(flatten: bool) -> Any:
        model, optimizer = model_and_optimizer(make, flatten)
        CHANGES[change](model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model_steps(model, optimizer, 2, first=2)
        texts = [str(w.message) for w in caught if "gradient layout contract" not in str(w.message)]
        assert len(texts) == (flatten or change == "double"), texts
        if flatten:
            params = list(model.parameters())
            assert len(storages(params)) == 1
            assert len(storages([p.grad for p in params])) == 1
        return snapshot(optimizer)

    flat_like_plain(run)


@pytest.mark.parametrize("what", ["gradients", "states"])
def test_tensors_that_change_places(make: Make, what: str) -> None:
    """Each is in the other's slot of a flat buffer then."""

    def run(flatten: bool) -> Any:
        params = parameters([(4, 3), (4, 3), (2,)])
        optimizer = make(params, flatten=flatten)
        train(optimizer, params, 2)
        a, b = params[:2]
        if what == "gradients":
            a.grad, b.grad = b.grad, a.grad
        else:
            optimizer.state[a], optimizer.state[b] = optimizer.state[b], optimizer.state[a]
        optimizer.step()
        return snapshot(optimizer)

    flat_like_plain(run)


def test_parameters_replaced_by_assignment(make: Make) -> None:
    """``load_state_dict(assign=True)`` gives the model new parameters, which the optimizer does
    not have. It says so once."""
    model, optimizer = model_and_optimizer(make)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    before = copies(list(model.parameters()))
    with pytest.warns(UserWarning, match="assign=True") as caught:
        model_steps(model, optimizer, 3, first=2)
    assert len(caught) == 1
    assert_same_bits([p.detach() for p in model.parameters()], before)


def test_nothing_else_warns(make: Make) -> None:
    """Flat optimizers in ordinary use, among them a step whose gradients are all None and
    parameters of another dtype that come into use late."""
    late = parameters([(3,)], torch.bfloat16)
    params = [*parameters(), *late]
    optimizer = make(params, flatten=True)
    for seed in range(6):
        optimizer.zero_grad()
        set_gradients(params, seed, skip=[3] if seed < 3 else [])
        optimizer.step()
    for p in params:
        p.grad = None
    optimizer.zero_grad()
    before = snapshot(optimizer)
    optimizer.step()
    assert_same_bits(snapshot(optimizer), {**before, "count": before["count"] + 1})


def test_state_keys_and_dtypes(backend: str) -> None:
    for cls, nu in ((AdaBelief, "exp_avg_var"), (AdamaxW, "exp_inf")):
        for dtype, state in (
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
            (torch.float64, torch.float64),
            (torch.complex64, torch.complex64),
            (torch.complex128, torch.complex128),
        ):
            p = torch.nn.Parameter(torch.ones(3, dtype=dtype))
            optimizer = cls([p], backend=backend)
            assert not optimizer.state
            train(optimizer, [p], 1)
            kinds = {key: value.dtype for key, value in optimizer.state[p].items()}
            assert kinds == {"step": torch.int64, "exp_avg": state, nu: state}
            assert optimizer.state[p]["step"].shape == ()


def test_found_inf_on_and_off_for_long_with_gradients_that_come_and_go(make: Make) -> None:
    """What is known of step numbers stays small, however often the plan changes."""
    params = parameters()
    optimizer = make(params, flatten=True)
    for seed in range(1200):
        optimizer.found_inf = torch.tensor(0.0)
        set_gradients(params, seed % 3, skip=[0] if seed % 2 else [])
        optimizer.step()
    assert {int(s["step"]) for s in optimizer.state.values()} == {600, 1200}


def test_a_parameter_conjugated_in_its_place(make: Make) -> None:
    params, twins = parameters(dtype=torch.complex64), parameters(dtype=torch.complex64)
    optimizer, want = make(params), make(twins)
    train(optimizer, params, 2)
    train(want, twins, 2)
    for p, q in zip(params, twins):
        p.data = p.data.conj()
        q.data = q.data.conj().resolve_conj()
    train(optimizer, params, 1, first=2)
    train(want, twins, 1, first=2)
    assert_same_bits([p.detach().resolve_conj() for p in params], [q.detach() for q in twins])


def test_a_parameter_whose_storage_was_freed_is_refused(make: Make) -> None:
    (p,) = parameters([(5,)])
    optimizer = make([p])
    train(optimizer, [p], 1)
    set_gradients([p], 1)
    p.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="parameter 0 of group 0 has no memory"):
        optimizer.step()


@pytest.mark.parametrize("flatten", [False, True])
def test_under_another_default_device(make: Make, flatten: bool) -> None:
    def run(device: str) -> Any:
        params = parameters()
        gradients = parameters(seed=1)
        with torch.device(device):
            optimizer = make(params, flatten=flatten, lr=torch.tensor(0.1, device="cpu"))
            for p, g in zip(params, gradients):
                p.grad = g.detach()
            for _ in range(3):
                optimizer.step()
        return snapshot(optimizer)

    assert_same_bits(run("meta"), run("cpu"))


def test_new_gradients_at_each_step_are_followed_without_a_new_plan(make: Make) -> None:
    params = parameters()
    optimizer = make(params)
    set_gradients(params, 0)
    optimizer.step()
    plan = optimizer._plan
    for seed in range(1, 4):
        keep = [p.grad for p in params]
        set_gradients(params, seed)
        optimizer.step()
        assert optimizer._plan is plan
        del keep


# What the watch over all tensors must not miss


MANY = 258
"""Parameters: more than one thread's portion."""


class Beside:
    """An optimizer, and its twin on twins of its parameters, which cannot miss a change, for it
    makes a new plan at each step and has no flat buffers."""

    def __init__(self, make: Make, backend: str, flatten: bool = False) -> None:
        n = 5 if backend == "eager" else MANY  # eager takes its time
        self.params, self.twins = parameters([(2, 3)] * n), parameters([(2, 3)] * n)
        self.optimizer, self.twin = make(self.params, flatten=flatten), make(self.twins)
        self.ends = (0, n - 1)
        self.steps = 0

    def both(self) -> list[tuple[Any, Parameters]]:
        return [(self.optimizer, self.params), (self.twin, self.twins)]

    def step(self, change: Callable[[Any, Parameters], None] = lambda *_: None, new: bool = True) -> None:
        """With new gradients, or the old ones, and after a change to both."""
        for optimizer, params in self.both():
            if new:
                set_gradients(params, self.steps)
            change(optimizer, params)
        self.twin._drop_plan()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.twin.step()
        self.steps += 1
        assert_same_bits(snapshot(self.optimizer), snapshot(self.twin), "step")


compiled = pytest.mark.skipif(extension("_cpu")[0] is None, reason=extension("_cpu")[1] or "built")


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def change_of(what: str, i: int) -> Callable[[Any, Parameters], None]:
    """A change to parameter ``i``, its gradient or its state."""

    def moved(t: Tensor) -> None:
        t.data = t.data.clone()

    def change(optimizer: Any, params: Parameters) -> None:
        p = params[i]
        state, second = optimizer.state[p], list(optimizer.state[p])[-1]
        if what == "parameter moved":
            moved(p)
        elif what == "parameter swapped":
            torch.utils.swap_tensors(p, torch.nn.Parameter(gradient(p, 7)))
            set_gradients([p], 8)
        elif what == "parameter replaced":
            params[i] = optimizer.param_groups[0]["params"][i] = torch.nn.Parameter(gradient(p, 9))
            optimizer.state[params[i]] = optimizer.state.pop(p)
            set_gradients([params[i]], 10)
        elif what == "parameter replaced without its state":
            params[i] = optimizer.param_groups[0]["params"][i] = torch.nn.Parameter(gradient(p, 9))
            set_gradients([params[i]], 10)
        elif what == "gradient replaced":
            p.grad = gradient(p, 11)
        elif what == "gradient moved":
            moved(p.grad)
        elif what == "gradient dropped":
            p.grad = None
        elif what == "gradient lazily negated in its place":
            p.grad = torch._neg_view(p.grad)
        elif what == "state replaced":
            state["exp_avg"] = gradient(p, 12)
        elif what == "state moved":
            moved(state[second])
        elif what == "step replaced":
            state["step"] = torch.tensor(5)
        elif what == "step moved":
            moved(state["step"])
        elif what == "step written":
            state["step"].add_(3)
        elif what == "step written through a tensor with a counter of its own":
            torch.utils.swap_tensors(state["step"], state["step"].data)
            state["step"].add_(3)
        elif what == "storage moved":
            storage = state["exp_avg"].untyped_storage()
            before = storage.data_ptr()
            storage.resize_(1 << 20)
            assert storage.data_ptr() != before
        elif what == "state started anew":
            del optimizer.state[p]
        elif what == "state a new dict":
            optimizer.state[p] = {**state, "exp_avg": gradient(p, 13)}

    return change


ELSEWHERE = [
    "parameter moved",
    "parameter swapped",
    "gradient replaced",
    "gradient moved",
    "gradient dropped",
    "gradient lazily negated in its place",
    "state replaced",
    "state moved",
    "step moved",
    "storage moved",
]
"""Changes that a look at every tensor is needed for."""
AT_ONCE = [
    "parameter replaced",
    "step replaced",
    "step written",
    "step written through a tensor with a counter of its own",
    "state started anew",
    "state a new dict",
]


@pytest.mark.parametrize("what", [*ELSEWHERE, *AT_ONCE])
@flat
def test_a_change_anywhere_is_noticed(
    make: Make, backend: str, flatten: bool, two_threads: None, what: str
) -> None:
    warnings.filterwarnings("ignore", "parameters were moved out of the flat buffers")
    beside = Beside(make, backend, flatten)
    for _ in range(2):
        beside.step()
    for i in beside.ends:
        beside.step(new=False)  # all gradients are there and where they were
        beside.step(change_of(what, i), new=False)
        beside.step()


@pytest.mark.parametrize(
    "what", ["parameter moved", "gradient replaced", "gradient moved", "gradient dropped", "state moved"]
)
def test_zero_grad_hides_no_change(make: Make, backend: str, two_threads: None, what: str) -> None:
    """It asks where gradients are, as the step that comes after it does."""
    warnings.filterwarnings("ignore", "parameters were moved out of the flat buffers")
    beside = Beside(make, backend, flatten=True)
    for _ in range(2):
        beside.step()

    def zeroed(optimizer: Any, params: Parameters) -> None:
        change_of(what, beside.ends[1])(optimizer, params)
        optimizer.zero_grad(set_to_none=False)
        for i, p in enumerate(params):
            if p.grad is not None:
                p.grad += gradient(p, i)

    beside.step(zeroed, new=False)
    beside.step()


@compiled
@pytest.mark.parametrize("what", [*ELSEWHERE, "parameter replaced without its state"])
@pytest.mark.parametrize("i", [0, MANY - 1])
def test_static_raises_when_a_change_has_its_turn(what: str, i: int) -> None:
    """And not before, for a step looks at 32 parameters; then it goes on from what is there."""
    params = parameters([(2, 3)] * MANY)
    optimizer = AdaBelief(named_many(params), backend="cpu", flatten="static")
    train(optimizer, params, 1)
    turns = -(-MANY // 32)
    for _ in range(2 * turns):
        optimizer.step()
    change_of(what, i)(optimizer, params)
    everywhere = what == "storage moved"  # the states share it
    for _ in range(0 if everywhere else i // 32):
        optimizer.step()
    before = copies([p.detach() for p in params])
    name = "'0'" if everywhere else f"'{i}'"
    with pytest.raises(RuntimeError, match=f"parameter {name}, its gradient or its state is not where"):
        optimizer.step()
    assert_same_bits([p.detach() for p in params], before)
    warnings.filterwarnings("ignore", "parameters were moved out of the flat buffers")
    set_gradients(params, 1)
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(params, before))


def named_many(params: Parameters) -> list[tuple[str, torch.nn.Parameter]]:
    return [(str(i), p) for i, p in enumerate(params)]


@compiled
def test_static_finds_the_modules_zero_grad_at_once() -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(100)])
    optimizer = AdamaxW(model.parameters(), flatten="static", backend="cpu")
    x = torch.ones(1, 2)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    model.zero_grad()
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"model\.zero_grad\(\)"):
        optimizer.step()


def test_static_steps_like_plain(make: Make) -> None:
    """With groups, gradients that are always None, step numbers that somebody writes to, options
    that change and a checkpoint."""

    def run(flatten: bool) -> Any:
        params = [*parameters([(3,), (4, 5), (), (40, 41)]), *parameters([(7,)] * 70, seed=2)]
        groups = [{"params": params[:3], "weight_decay": 0.3}, {"params": params[3:]}]
        optimizer = make(groups, lr=0.02, flatten="static" if flatten else False)
        for seed in range(8):
            optimizer.zero_grad(set_to_none=False)
            for i, p in enumerate(params):
                if i == 1:
                    continue
                p.grad = (
                    gradient(p, 100 * seed + i)
                    if p.grad is None
                    else p.grad.copy_(gradient(p, 100 * seed + i))
                )
            if seed == 3:
                optimizer.param_groups[1]["lr"] = 0.1
                optimizer.state[params[0]]["step"].add_(2)
            if seed == 5:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.step()
        return snapshot(optimizer)

    flat_like_plain(run)


@pytest.mark.parametrize(
    ("state_format", "last"),
    [
        ("fp32", torch.ones(4, 8)[:, ::2]),
        ("8bit", torch.ones(4, 8)[:, ::2]),
        ("8bit", torch.ones(4, 8).t()),
        ("fp32", torch.ones(5, dtype=torch.complex64)),
    ],
    ids=["gaps", "gaps 8bit", "transposed 8bit", "complex"],
)
def test_static_beside_parameters_that_are_not_flat(make: Make, state_format: str, last: Tensor) -> None:
    """Nothing keeps their old gradients alive, so a step asks after all tensors. So it does where there
    is a complex one."""

    def run(flatten: bool) -> Any:
        params = [*parameters([(3,)] * 40), torch.nn.Parameter(last.clone())]
        if not last.is_complex():
            params[-1] = torch.nn.Parameter(torch.empty_strided(last.shape, last.stride()).copy_(last))
        optimizer = make(params, lr=0.1, flatten="static" if flatten else False, state_format=state_format)
        for _ in range(6):
            optimizer.zero_grad()
            sum((p * p).abs().sum() for p in params).backward()
            optimizer.step()
        if not last.is_complex():
            params[-1].grad = None
            optimizer.step()
        return snapshot(optimizer)

    flat_like_plain(run)


def test_static_where_all_tensors_are_asked(make: Make) -> None:
    """Under a torch function mode, which a default device is, ``zero_grad`` looks too."""
    params = parameters([(3,), (4,)])
    optimizer = make(params, flatten="static")
    train(optimizer, params, 1)
    with torch.device("cpu"):
        params[0].grad = gradient(params[0], 5)
        optimizer.zero_grad()
        assert params[0].grad is None
        assert not params[1].grad.any()


@compiled
def test_static_raises_before_another_plan_hides_a_change() -> None:
    params = parameters([(3,)] * 100)
    optimizer = AdaBelief(params, flatten="static", backend="cpu")
    train(optimizer, params, 1)
    params[99].grad = gradient(params[99], 5)
    optimizer.step()
    optimizer.param_groups[0]["nesterov"] = True
    with pytest.raises(RuntimeError, match="parameter 99 of group 0"):
        optimizer.step()
    optimizer.step()


def test_zero_grad_after_a_gradient_of_other_strides(make: Make) -> None:
    def run(flatten: bool) -> Any:
        (p,) = params = parameters([(4, 4)])
        optimizer = make(params, flatten=flatten)
        train(optimizer, params, 1)
        p.grad = p.grad.t()
        optimizer.step()
        p.grad = gradient(p, 3).t()
        optimizer.zero_grad()
        assert p.grad is None
        return snapshot(optimizer)

    flat_like_plain(run)


def test_zero_grad_with_gradients_of_another_dtype(make: Make) -> None:
    """They do not lie in the buffer, though their parameters do."""

    def run(flatten: bool) -> Any:
        params = parameters([(3,), (4,)], torch.bfloat16)
        params[1].grad_dtype = torch.float32
        optimizer = make(params, lr=0.1, flatten="static" if flatten else False)
        for _ in range(4):
            optimizer.zero_grad()
            sum((p * p).float().sum() for p in params).backward()
            optimizer.step()
        return snapshot(optimizer)

    flat_like_plain(run)


def test_zero_grad_with_a_sparse_gradient(make: Make) -> None:
    params = parameters([(4, 4)])
    optimizer = make(params, flatten=True)
    train(optimizer, params, 1)
    params[0].grad = torch.ones(4, 4).to_sparse()
    optimizer.zero_grad()
    assert params[0].grad is None


@pytest.mark.parametrize("between", ["seed", "checkpoint", "group"])
def test_a_step_number_written_while_there_is_no_plan(make: Make, between: str) -> None:
    """Neighbours whose step numbers were equal must not share a row then."""

    def run(flatten: bool) -> Any:
        params = parameters([(3,), (3,), (3,)])
        optimizer = make(params[:2], lr=0.1, flatten=flatten)
        train(optimizer, params, 1)
        if between == "seed":
            optimizer.seed = 1
        elif between == "checkpoint":
            optimizer.load_state_dict(optimizer.state_dict())
        else:
            optimizer.add_param_group({"params": params[2:]})
        optimizer.state[params[1]]["step"].add_(50)
        train(optimizer, params, 2, first=1)
        return snapshot(optimizer)

    flat_like_plain(run)


@compiled
@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_static_refuses_old_graphs_from_the_first_step_on(written: int) -> None:
    """Also where autograd has saved a view, and however often a parameter was written to before."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    with torch.no_grad():
        for _ in range(written):
            model[0].weight.mul_(1.1)
    optimizer = AdamaxW(model.parameters(), flatten="static", backend="cpu")
    for i in range(4):
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3)).square().sum() + model[0].weight.square().sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        if i == 1:
            optimizer.add_param_group({"params": parameters([(3,)])})


@compiled
def test_static_leaves_versions_of_others_alone() -> None:
    """Of parameters without a gradient, which no step writes to."""
    params = [*parameters([(3,), (3,)]), *parameters([(2,)], torch.float64)]
    optimizer = AdaBelief(params, flatten="static", backend="cpu")
    set_gradients(params, 0, skip=[1, 2])
    loss = (params[1] * params[1]).sum() + (params[2] * params[2]).sum()
    for _ in range(3):
        optimizer.step()
    loss.backward()


@compiled
def test_static_parameters_share_their_versions() -> None:
    """So that a backward pass through a graph of before the step is still refused."""
    params = [*parameters([(3,)] * 70), *parameters([(2,)], torch.float64)]
    optimizer = AdaBelief(params, flatten="static", backend="cpu")
    train(optimizer, params, 1)
    assert len(optimizer._plan._buffers) == 2
    before = [p._version for p in params]
    loss = sum((p * p).sum() for p in params)
    optimizer.step()
    assert [p._version for p in params] == [v + 1 for v in before]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def kinds_of_gradients() -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "float64": lambda g: g.double(),
        "bfloat16": lambda g: g.bfloat16(),
        "other strides": lambda g: g.t().contiguous().t(),
        "broadcast": lambda g: g[:1].expand_as(g),
        "lazily negated": lambda g: torch._neg_view(g),
        "half aligned": lambda g: torch.cat([g.new_zeros(1), g.flatten()])[1:].view_as(g),
        "a subclass": lambda g: torch.nn.Buffer(g.clone()),
        "read back": lambda g: torch.from_numpy(g.numpy().copy()),
    }


@pytest.mark.parametrize("kind", kinds_of_gradients())
def test_new_gradients_of_another_kind(make: Make, backend: str, two_threads: None, kind: str) -> None:
    beside = Beside(make, backend)
    for _, params in beside.both():
        for p in params:
            p.grad_dtype = None  # any
    for _ in range(2):
        beside.step()
    for i in beside.ends:

        def change(_: Any, params: Parameters, i: int = i) -> None:
            params[i].grad = kinds_of_gradients()[kind](params[i].grad)

        beside.step(change)
        beside.step(change)
    beside.step()


def test_a_sparse_gradient_after_dense_ones(
    make: Make, two_threads: None, capfd: pytest.CaptureFixture[str]
) -> None:
    params = parameters([(2, 3)] * MANY)
    optimizer = make(params)
    train(optimizer, params, 2)
    set_gradients(params, 2)
    params[-1].grad = gradient(params[-1], 3).to_sparse()
    with raises_with(RuntimeError, f"parameter {MANY - 1} of group 0 is sparse"):
        optimizer.step()
    assert capfd.readouterr().err == ""


@compiled
def test_new_gradients_are_followed_by_address(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And without Python's help, where they are like the old ones."""
    params, twins = parameters([(3,)] * MANY), parameters([(3,)] * MANY)
    optimizer, twin = AdaBelief(params, backend="cpu"), AdaBelief(twins, backend="eager")
    train(optimizer, params, 1)
    plan = optimizer._plan
    with monkeypatch.context() as patch:
        patch.setattr("fused_optim.plan._Fingerprint", None)
        for seed in range(1, 4):
            keep = [p.grad for p in params]  # so that no address is used again
            train(optimizer, params, 1, first=seed)
            del keep
    assert optimizer._plan is plan
    train(twin, twins, 4)
    assert_same_bits(snapshot(optimizer), snapshot(twin))


def test_new_gradients_at_old_addresses_need_no_new_plan(make: Make) -> None:
    def run(flatten: bool) -> Any:
        params = parameters()
        optimizer = make(params, flatten=flatten)
        train(optimizer, params, 1)
        plan = optimizer._plan
        for _ in range(3):
            for p in params:
                p.grad = p.grad.view_as(p.grad)
            optimizer.step()
        assert optimizer._plan is plan
        return snapshot(optimizer)

    flat_like_plain(run)


def test_gradients_are_not_kept(make: Make) -> None:
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, 3)
    grads = [weakref.ref(p.grad) for p in params]
    optimizer.zero_grad()
    assert [g() for g in grads] == [None] * len(params)


@compiled
@flat
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc tells the size of an allocation")
def test_tensors_are_asked_by_digest(two_threads: None, flatten: bool) -> None:
    """Without it the answers are the same, later."""
    params = parameters([(2, 3)] * MANY)
    optimizer = AdaBelief(params, backend="cpu", flatten=flatten)
    train(optimizer, params, 1)
    watch = optimizer._plan._watch
    optimizer.step()
    assert watch.asked() == 0
    held = [params[-1].data, optimizer.state[params[1]]["step"].data]
    for _ in range(2):  # a tensor more or less of a storage is seen, and its tensors are asked once
        optimizer.step()
        asked = watch.asked()
        assert asked > 0
        optimizer.step()
        assert watch.asked() == asked
        held.clear()
    assert optimizer._plan._watch is watch


@compiled
@pytest.mark.parametrize("steps", [1, 3])
def test_versions_go_up_by_one_a_step(two_threads: None, steps: int) -> None:
    n = 2 * MANY
    params = parameters([(3,)] * n)
    optimizer = AdaBelief(params, backend="cpu")
    set_gradients(params, 0, skip=[1, 257])
    before = [p._version for p in params]
    for _ in range(steps):
        optimizer.step()
    gone_up = [p._version - v for p, v in zip(params, before)]
    assert gone_up == [0 if i in (1, 257) else steps for i in range(n)]


def test_inference_tensors_have_no_version(make: Make) -> None:
    with torch.inference_mode():
        params = [torch.ones(3) for _ in range(3)]
        optimizer = make(params)
        for seed in range(3):
            set_gradients(params, seed)
            optimizer.step()
    twins = [torch.ones(3) for _ in range(3)]
    want = make(twins)
    train(want, twins, 3)
    assert_same_bits(params, twins)


class Answers(torch.overrides.TorchFunctionMode):
    """Gives a parameter another gradient than C++ knows of."""

    def __init__(self, p: Tensor, grad: Tensor) -> None:
        super().__init__()
        self.p, self.grad = p, grad

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function == Tensor.grad.__get__ and args[0] is self.p:  # type: ignore[attr-defined]
            return self.grad
        return function(*args, **(kwargs or {}))


class Doubled(torch.nn.Parameter):
    twice = False

    @property
    def grad(self) -> Any:
        grad = Tensor.grad.__get__(self)  # type: ignore[attr-defined]
        return self.kept if self.twice and grad is not None else grad

    @grad.setter
    def grad(self, value: Any) -> None:
        Tensor.grad.__set__(self, value)  # type: ignore[attr-defined]
        self.kept = None if value is None else 2 * value


def test_what_python_says_of_p_grad_counts(make: Make) -> None:
    params, twins = parameters(), parameters()
    doubled = Doubled(torch.ones(3))
    twin = torch.nn.Parameter(torch.ones(3))
    optimizer, want = make([*params, doubled]), make([*twins, twin])
    for seed in range(6):
        set_gradients([*params, doubled], seed)
        set_gradients([*twins, twin], seed)
        doubled.twice = seed >= 4
        if doubled.twice:
            twin.grad = 2 * twin.grad
        if seed == 2:
            twins[1].grad = gradient(params[1], 99)
            with Answers(params[1], gradient(params[1], 99)):
                optimizer.step()
        else:
            optimizer.step()
        want.step()
        assert_same_bits([*params, doubled.data], [*twins, twin.data], str(seed))


def test_a_state_whose_storage_was_freed_is_refused(make: Make) -> None:
    (p,) = parameters([(5,)])
    optimizer = make([p])
    train(optimizer, [p], 1)
    optimizer.state[p]["exp_avg"].untyped_storage().resize_(0)
    set_gradients([p], 1)
    with pytest.raises(ValueError, match="state 'exp_avg' of parameter 0 of group 0 has no memory"):
        optimizer.step()
