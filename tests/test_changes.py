"""Somebody changes something between two steps: the bits are those of the reference on fresh tensors.

One table of changes; for each the step after it, in both layouts, on every backend and in several
formats, must give what :class:`helpers.Judge` works out on copies. What cannot be stepped is refused.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BACKENDS, RULES, Judge, assert_same_bits, gradient, raises_unchanged, raises_with, snapshot
from torch import Tensor

from fused_optim.backends import BACKENDS as ALL_BACKENDS

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:parameters were moved out of the flat buffers"),
]

FORMATS: dict[str, tuple[torch.dtype, torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, torch.float64, {}),
    "bf16": (torch.float32, torch.bfloat16, {"state_format": "bf16"}),
    "8bit+split8": (torch.bfloat16, torch.float32, {"state_format": "8bit", "master_weights": "split8"}),
}
"""Of most parameters, of one more, and what the optimizer is asked for."""
DENSE = ("a", "b", "d", "e")
"""Parameters of one dtype that may lie in a flat buffer; c has gaps, and f another dtype."""


class World:
    """Seven parameters in two groups, an optimizer and its judge."""

    def __init__(self, rule: str, backend: str, flatten: bool, format: str) -> None:
        dtype, other, options = FORMATS[format]
        rng = torch.Generator().manual_seed(1)

        def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=rng).to(dtype)

        self.rule, self.steps = RULES[rule], 0
        self.p: dict[str, Any] = {
            name: torch.nn.Parameter(values)
            for name, values in {
                "a": new(5, 5), "b": new(5, 5), "c": new(5, 10)[:, ::2], "d": new(130), "e": new(),
                "f": new(3, dtype=other), "g": new(0),
            }.items()
        }  # fmt: skip
        self.judge = Judge(self.rule, **options)
        groups = [
            {"params": [(name, self.p[name]) for name in "abc"]},
            {
                "params": [(name, self.p[name]) for name in "defg"],
                "lr": 0.05,
                "weight_decay": 0.1,
                "weight_decay_mask": [True, False, True, True],
            },
        ]
        self.optimizer = self.rule.optimizer(
            groups, lr=0.02, backend=backend, flatten=flatten, **self.rule.options, **options
        )
        self.numbers: dict[str, float] = {}

    def state(self, name: str) -> dict[str, Any]:
        state: dict[str, Any] = self.optimizer.state[self.p[name]]
        return state

    def group(self, name: str) -> dict[str, Any]:
        return next(g for g in self.optimizer.param_groups if any(p is self.p[name] for p in g["params"]))

    def replace(self, name: str, new: torch.nn.Parameter) -> None:
        params = self.group(name)["params"]
        params[next(i for i, p in enumerate(params) if p is self.p[name])] = self.p[name] = new
        new.grad = gradient(new, self.steps)

    def new_gradients(self, names: str = "abcdefg") -> None:
        for i, (name, p) in enumerate(self.p.items()):
            p.grad = gradient(p, 100 * self.steps + i) if name in names and p.requires_grad else None

    def step(self) -> None:
        want = self.judge.expected(self.optimizer, **self.numbers)
        self.optimizer.step()
        self.steps += 1
        assert_same_bits(snapshot(self.optimizer), want, f"step {self.steps}")


Change = Callable[[World], Any]
CHANGES: dict[str, Change] = {}


def change(function: Change) -> Change:
    CHANGES[function.__name__] = function
    return function


# Gradients


@change
def nothing(w: World) -> None:
    pass


@change
def one_gradient_absent(w: World) -> None:
    w.p["b"].grad = None


@change
def gradients_absent(w: World) -> None:
    w.new_gradients("")


@change
def gradients_of_one_group(w: World) -> None:
    w.new_gradients("defg")


@change
def zeroed(w: World) -> None:
    w.optimizer.zero_grad(set_to_none=False)


@change
def zeroed_and_some_new(w: World) -> None:
    w.optimizer.zero_grad()
    assert all(p.grad is None for p in w.p.values() if p.requires_grad)
    (w.p["a"] * w.p["c"]).sum().backward()


@change
def zeroed_by_the_module(w: World) -> None:
    torch.nn.ParameterDict(w.p).zero_grad()
    (w.p["a"] * w.p["c"]).sum().backward()


@change
def accumulated(w: World) -> None:
    (w.p["a"] * w.p["b"]).sum().backward()
    (w.p["a"] * w.p["d"][0]).sum().backward()


@change
def gradient_replaced(w: World) -> None:
    w.kept = w.p["a"].grad  # type: ignore[attr-defined]  # so that its address is not used again
    w.p["a"].grad = gradient(w.p["a"], 77)


@change
def gradient_moved(w: World) -> None:
    w.p["a"].grad.data = w.p["a"].grad.data.clone()


@change
def gradient_written(w: World) -> None:
    w.p["a"].grad.mul_(3)


@change
def gradient_expanded(w: World) -> None:
    w.p["a"].grad = w.p["a"].grad[:1].expand(5, 5)
    w.p["d"].grad = torch.ones((), dtype=w.p["d"].dtype).expand(130)


@change
def gradient_not_contiguous(w: World) -> None:
    w.p["a"].grad = w.p["a"].grad.t().contiguous().t()
    w.p["d"].grad = w.p["d"].grad.repeat_interleave(2)[::2]


@change
def gradient_transposed_in_place(w: World) -> None:
    w.p["a"].grad.t_()


@change
def gradient_lazily_negated(w: World) -> None:
    w.p["d"].grad = torch._neg_view(w.p["d"].grad)


@change
def gradient_at_another_alignment(w: World) -> None:
    w.p["d"].grad = torch.cat([w.p["d"].grad[:1], w.p["d"].grad])[1:]


@change
def gradients_exchanged(w: World) -> None:
    w.p["a"].grad, w.p["b"].grad = w.p["b"].grad, w.p["a"].grad


@change
def gradients_exchanged_with_one_outside(w: World) -> None:
    w.p["a"].grad, w.p["c"].grad = w.p["c"].grad, w.p["a"].grad


@change
def one_gradient_of_two(w: World) -> None:
    w.p["a"].grad = w.p["b"].grad


@change
def gradients_in_a_bucket(w: World) -> None:
    bucket = torch.cat([w.p[name].grad.reshape(-1) for name in DENSE])
    for name, part in zip(DENSE, bucket.split([w.p[name].numel() for name in DENSE])):
        w.p[name].grad = part.view(w.p[name].shape)


@change
def gradients_of_another_dtype(w: World) -> None:
    for name, dtype in {"a": torch.float64, "d": torch.bfloat16, "f": torch.float32}.items():
        w.p[name].grad_dtype = None  # any
        w.p[name].grad = w.p[name].grad.to(dtype)


# Parameters


@change
def data_replaced(w: World) -> None:
    for name in "af":
        w.p[name].data = 2 * w.p[name].data.clone()


@change
def data_written(w: World) -> None:
    with torch.no_grad():
        w.p["a"].mul_(0.5)
        w.p["d"][:50] = 0


@change
def data_transposed(w: World) -> None:
    w.p["a"].data = w.p["a"].data.t()


@change
def data_sliced(w: World) -> None:
    w.p["a"].data = torch.linspace(-1, 1, 63).to(w.p["a"].dtype).view(7, 9)[1:6, 2:7]


@change
def data_exchanged(w: World) -> None:
    w.p["a"].data, w.p["b"].data = w.p["b"].data, w.p["a"].data


@change
def parameter_swapped(w: World) -> None:
    new = torch.nn.Parameter(gradient(w.p["a"], 7))
    torch.utils.swap_tensors(w.p["a"], new)
    w.p["a"].grad = gradient(w.p["a"], 8)


@change
def frozen_and_unfrozen(w: World) -> None:
    p = w.p["b"].requires_grad_(not w.p["b"].requires_grad)
    p.grad = gradient(p, 9) if p.requires_grad else None


@change
def frozen_with_its_gradient(w: World) -> None:
    w.p["b"].requires_grad_(False)


@change
def parameter_replaced_with_its_state(w: World) -> None:
    """As 3D Gaussian splatting does when it adds and removes points."""
    old, rows = w.p["a"], [0, 3, 1, 1, 2]
    state = w.optimizer.state.pop(old)
    for key, value in state.items():
        state[key] = value[rows] if value.shape == old.shape else value
    w.replace("a", torch.nn.Parameter(old.detach()[rows]))
    w.optimizer.state[w.p["a"]] = state


@change
def parameter_replaced_without_its_state(w: World) -> None:
    old = w.p["d"]
    w.replace("d", torch.nn.Parameter(gradient(torch.empty(150, dtype=old.dtype), 3)))
    del w.optimizer.state[old]


# Groups


@change
def parameter_removed(w: World) -> None:
    group = w.group("a")
    w.optimizer.state.pop(group["params"].pop(0), None)
    group["params"].append(torch.nn.Parameter(gradient(w.p["a"], 5)))
    w.p["a"] = group["params"][-1]
    w.p["a"].grad = gradient(w.p["a"], 4)


@change
def parameters_reordered(w: World) -> None:
    for group in w.optimizer.param_groups:
        group["params"].reverse()


@change
def parameter_moved_to_another_group(w: World) -> None:
    for name in "df":
        group = w.group(name)
        i = next(i for i, p in enumerate(group["params"]) if p is w.p[name])
        other = next(g for g in w.optimizer.param_groups if g is not group)
        for key in ("params", "param_names", "weight_decay_mask"):
            if group[key] is not None:
                value = group[key].pop(i)
                if other[key] is not None:
                    other[key].append(value)
        if other["weight_decay_mask"] is not None:
            other["weight_decay_mask"] = [True] * len(other["params"])


@change
def group_removed(w: World) -> None:
    if len(w.optimizer.param_groups) == 2:
        for p in w.optimizer.param_groups[0]["params"]:
            w.optimizer.state.pop(p)
        del w.optimizer.param_groups[0]


@change
def groups_reversed(w: World) -> None:
    w.optimizer.param_groups.reverse()


@change
def groups_another_list(w: World) -> None:
    w.optimizer.param_groups = [dict(group) for group in w.optimizer.param_groups]


@change
def group_added(w: World) -> None:
    name = f"h{len(w.p)}"
    w.p[name] = torch.nn.Parameter(gradient(w.p["d"], len(w.p)))
    w.p[name].grad = gradient(w.p["d"], 6)
    w.optimizer.add_param_group({"params": [(name, w.p[name])], "lr": 0.3, "maximize": True})


# States


@change
def states_removed(w: World) -> None:
    for name in "acf":
        del w.optimizer.state[w.p[name]]


@change
def states_cleared(w: World) -> None:
    w.optimizer.state.clear()


@change
def states_exchanged(w: World) -> None:
    s, a, b = w.optimizer.state, w.p["a"], w.p["b"]
    s[a], s[b] = s[b], s[a]


@change
def states_exchanged_by_new_entries(w: World) -> None:
    s, a, b = w.optimizer.state, w.p["a"], w.p["b"]
    x, y = s.pop(a), s.pop(b)
    s[b], s[a] = x, y


@change
def states_exchanged_with_one_outside(w: World) -> None:
    s, a, c = w.optimizer.state, w.p["a"], w.p["c"]
    s[a], s[c] = s[c], s[a]


@change
def contents_of_states_exchanged(w: World) -> None:
    a, b = dict(w.state("a")), dict(w.state("b"))
    w.state("a").update(b)
    w.state("b").update(a)


@change
def state_of_a_removed_parameter_left(w: World) -> None:
    """In the flat buffer, with the state given to another."""
    s = w.optimizer.state
    s[w.p["b"]] = s.pop(w.p["a"])


@change
def moments_exchanged_within_a_state(w: World) -> None:
    s = w.state("a")
    s["exp_avg"], s[w.rule.nu] = s[w.rule.nu], s["exp_avg"]


@change
def moments_replaced(w: World) -> None:
    for name in "acd":
        for key, value in w.state(name).items():
            if key != "step":
                w.state(name)[key] = value.flip(0).clone()


@change
def moments_written(w: World) -> None:
    w.state("a")["exp_avg"].zero_()
    w.state("c")[w.rule.nu].copy_(w.state("a")[w.rule.nu])


@change
def moments_moved(w: World) -> None:
    for name in "acdf":
        for value in w.state(name).values():
            value.data = value.data.clone()


@change
def moment_transposed(w: World) -> None:
    w.state("a")["exp_avg"] = w.state("a")["exp_avg"].mT.contiguous().mT


@change
def moment_transposed_in_place(w: World) -> None:
    w.state("a")["exp_avg"].t_()


@change
def storage_of_a_state_moved(w: World) -> None:
    storage = w.state("a")["exp_avg"].untyped_storage()
    before = storage.data_ptr()
    storage.resize_(2 * storage.nbytes() + (1 << 20))
    assert storage.data_ptr() != before


@change
def state_another_dict(w: World) -> None:
    w.optimizer.state[w.p["a"]] = {k: v.clone() for k, v in reversed(list(w.state("a").items()))}


@change
def state_of_others_kept(w: World) -> None:
    """What a user keeps there stays."""
    w.state("a")["note"] = "mine"
    w.state("b")["other"] = torch.ones(3)


@change
def step_shared_by_assignment(w: World) -> None:
    w.state("b")["step"] = w.state("a")["step"]
    w.state("d")["step"] = w.state("a")["step"]
    w.state("f")["step"] = w.state("a")["step"]


@change
def step_shared_and_one_left_out(w: World) -> None:
    w.state("d")["step"] = w.state("a")["step"]
    w.p["a"].grad = None


@change
def step_written(w: World) -> None:
    w.state("a")["step"].add_(3)


@change
def step_written_behind_autograd(w: World) -> None:
    w.state("a")["step"].data.add_(3)


@change
def step_written_through_an_alias(w: World) -> None:
    torch.utils.swap_tensors(w.state("a")["step"], w.state("a")["step"].data)
    w.state("a")["step"].add_(3)


@change
def step_replaced(w: World) -> None:
    w.state("a")["step"] = torch.tensor(5)
    w.state("b")["step"] = 7
    w.state("d")["step"] = torch.tensor(9.0)


@change
def step_at_its_end(w: World) -> None:
    w.state("a")["step"].fill_(2**31 - 1)


# The optimizer


@change
def loaded_from_itself(w: World) -> None:
    w.optimizer.load_state_dict(w.optimizer.state_dict())


@change
def loaded_from_an_older_snapshot(w: World) -> None:
    w.saved = getattr(w, "saved", w.optimizer.state_dict())  # type: ignore[attr-defined]
    w.optimizer.load_state_dict(w.saved)


@change
def deep_copied(w: World) -> None:
    w.p, w.optimizer = copy.deepcopy((w.p, w.optimizer))
    w.new_gradients()


@change
def pickled(w: World) -> None:
    w.p, w.optimizer = pickle.loads(pickle.dumps((w.p, w.optimizer)))
    w.new_gradients()


@change
def unflattened(w: World) -> None:
    w.optimizer.unflatten()
    tensors = [t for p in w.p.values() for t in (p, p.grad, *w.optimizer.state.get(p, {}).values())]
    owned = [t for t in tensors if t is not None and t.dim() and t.numel()]
    assert all(t.untyped_storage().nbytes() <= 2 * t.numel() * t.element_size() for t in owned)


@change
def options_changed(w: World) -> None:
    first, second = w.optimizer.param_groups
    first.update(lr=0.3, betas=(0.5, 0.75), maximize=not first["maximize"], weight_decay=0.2)
    second.update(lr=torch.tensor(0.01, dtype=torch.float64), eps=1e-3, weight_decay=0.0)
    if "nesterov" in first:
        first["nesterov"] = not first["nesterov"]


@change
def masks_changed(w: World) -> None:
    w.optimizer.param_groups[1]["weight_decay_mask"][0] ^= True
    w.optimizer.param_groups[0].update(weight_decay=0.3, weight_decay_mask=[False, True, True])


@change
def mask_removed(w: World) -> None:
    w.optimizer.param_groups[1]["weight_decay_mask"] = None


@change
def scaled(w: World) -> None:
    w.optimizer.grad_scale, w.optimizer.found_inf = torch.tensor(3.0), torch.tensor(0.0)


@change
def skipped(w: World) -> None:
    found = getattr(w.optimizer, "found_inf", None)
    w.optimizer.found_inf = torch.tensor(0.0 if found else 1.0)


@change
def skipped_at_the_first_step_of_some(w: World) -> None:
    states_removed(w)
    skipped(w)


def fail(*_: Any) -> None:
    raise KeyError("from a hook")


@change
def failed_in_a_hook_before(w: World) -> None:
    handle = w.optimizer.register_step_pre_hook(fail)
    with raises_unchanged(w.optimizer, KeyError, "from a hook"):
        w.optimizer.step()
    handle.remove()


@change
def failed_in_a_hook_after(w: World) -> None:
    want = w.judge.expected(w.optimizer)
    handle = w.optimizer.register_step_post_hook(fail)
    with pytest.raises(KeyError):
        w.optimizer.step()
    handle.remove()
    assert_same_bits(snapshot(w.optimizer), want)


@change
def failed_for_a_wrong_number(w: World) -> None:
    w.optimizer.param_groups[1]["lr"] = -1.0
    with raises_unchanged(w.optimizer, ValueError, "Invalid learning rate: -1.0"):
        w.optimizer.step()
    w.optimizer.param_groups[1]["lr"] = 0.05


@change
def failed_for_a_wrong_gradient(w: World) -> None:
    p = w.p["f"]
    grad, p.grad = p.grad, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        p.grad = torch.sparse_coo_tensor([[1]], [1.0], (3,), dtype=p.dtype)
    with raises_unchanged(w.optimizer, RuntimeError, "parameter 'f' is sparse"):
        w.optimizer.step()
    p.grad = grad


TRITON = ("one_gradient_absent", "data_transposed", "states_exchanged_with_one_outside", "groups_reversed",
          "step_shared_by_assignment", "skipped", "options_changed")  # fmt: skip
"""Triton's interpreter takes its time, and how tensors are found is the same for all backends."""


def worlds() -> list[Any]:
    """Each change in both layouts: on cpu in each format, on eager in one, with the rules in turn."""
    cases = []
    formats, rules = list(FORMATS), list(RULES)
    reason = ALL_BACKENDS["triton"].why_not(torch.device("cpu"))
    for i, name in enumerate(CHANGES):
        for k, (backend, flatten) in enumerate((b, f) for b in BACKENDS for f in (False, True)):
            for j, format in enumerate(formats):
                if backend != "eager" or j == (i + k) % len(formats):
                    cases.append((name, rules[(i + j + k) % len(rules)], backend, flatten, format))
        if name in TRITON and reason is None:
            cases.append((name, rules[i % len(rules)], "triton", i % 2 == 0, "fp32"))
    return [
        pytest.param(*case, id="-".join((case[0], case[2], "flat" if case[3] else "list", case[4])))
        for case in cases
    ]


def run(what: str, rule: str, backend: str, flatten: bool, format: str) -> None:
    w = World(rule, backend, flatten, format)
    for _ in range(2):
        w.new_gradients()
        w.step()
    w.step()  # nothing is new
    CHANGES[what](w)  # gradients are those of the step before, where they were
    w.step()
    w.new_gradients()
    w.step()
    CHANGES[what](w)
    w.step()
    w.step()


@pytest.mark.parametrize(("what", "rule", "backend", "flatten", "format"), worlds())
def test_a_change_between_steps(what: str, rule: str, backend: str, flatten: bool, format: str) -> None:
    run(what, rule, backend, flatten, format)


@pytest.mark.parametrize("flatten", [False, True], ids=["list", "flat"])
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_where_python_asks_for_addresses(
    what: str, flatten: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the extension was not built."""
    monkeypatch.setattr("fused_optim.addresses.extension", lambda name: (None, "hidden by the test"))
    run(what, list(RULES)[len(what) % len(RULES)], "cpu", flatten, list(FORMATS)[len(what) % len(FORMATS)])


# Which parameters have a gradient at each step


def patterns() -> dict[str, list[str]]:
    rng = random.Random(0)
    return {
        "alternating as in GANs": ["abc", "defg"] * 4,
        "late": ["a", "a", "ab", "ab", "abcd", "abcdefg", "abcdefg"],
        "experts without tokens": ["a" + "".join(n for n in "bcdefg" if rng.random() < 0.5) for _ in range(12)],
        "apart and together": ["abcdefg", "bd", "ace", "abcdefg", "acefg", "bd", "abcdefg"],
        "none": ["", "abcdefg", "", "", "abcdefg"],
    }  # fmt: skip


@pytest.mark.parametrize("pattern", patterns())
@pytest.mark.parametrize("backward", [False, True], ids=["assigned", "backward"])
def test_gradients_that_come_and_go(pattern: str, backend: str, flatten: bool, backward: bool) -> None:
    for k, format in enumerate(FORMATS):
        w = World(list(RULES)[(k + backward) % len(RULES)], backend, flatten, format)
        for i, names in enumerate(patterns()[pattern]):
            if not backward:
                w.new_gradients(names)
            else:
                w.optimizer.zero_grad()
                for name in names:
                    (w.p[name] * gradient(w.p[name], i)).sum().backward()
            if pattern == "apart and together":
                w.optimizer.found_inf = torch.tensor(float(i % 3 == 1))
            w.step()


def test_what_had_no_gradient_when_the_module_zeroed_is_not_stepped(backend: str, flatten: bool) -> None:
    """Unused parameters with weight decay stay, whoever zeroed, in both ways."""
    w = World("adamaxw", backend, flatten, "fp32")
    w.new_gradients()
    w.step()
    for zero in (w.optimizer.zero_grad, torch.nn.ParameterDict(w.p).zero_grad):
        before = w.p["d"].detach().clone()
        zero()
        (w.p["a"] * w.p["b"]).sum().backward()
        w.step()
        assert torch.equal(w.p["d"], before)


# Refused


def freed(t: Tensor) -> None:
    t.untyped_storage().resize_(0)


def overlapping(w: World) -> None:
    w.p["b"].data = w.p["a"].data.view(-1).view(5, 5)


def cast_and_late(w: World) -> None:
    w.p["a"].grad.data = torch.ones(3, dtype=w.p["a"].dtype)


REFUSED: dict[str, tuple[Change, Any, tuple[str, ...]]] = {
    "freed parameter": (lambda w: freed(w.p["c"]), ValueError, ("parameter 'c'", "memory")),
    "freed gradient": (lambda w: freed(w.p["d"].grad), ValueError, ("gradient of parameter", "memory")),
    "freed moment": (lambda w: freed(w.state("c")["exp_avg"]), ValueError, ("'exp_avg'", "'c'", "memory")),
    "freed second moment": (lambda w: freed(w.state("f")[w.rule.nu]), ValueError, ("'f'", "memory")),
    "freed step": (lambda w: freed(w.state("f")["step"]), ValueError, ("'step'", "memory")),
    "one moment of two": (
        lambda w: w.state("a").update(exp_avg=w.state("b")["exp_avg"]),
        ValueError,
        ("'exp_avg'", "'a'", "'b'", "overlap"),
    ),
    "one moment twice": (
        lambda w: w.state("f").update({w.rule.nu: w.state("f")["exp_avg"]}),
        (ValueError, RuntimeError),
        ("'f'",),
    ),
    "one state of two": (
        lambda w: w.optimizer.state.update({w.p["a"]: w.state("b")}),
        ValueError,
        ("'a'", "'b'"),
    ),
    "overlapping parameters": (overlapping, ValueError, ("'a'", "'b'", "overlap")),
    "gradient of another shape": (cast_and_late, RuntimeError, ("'a'", "(3,)", "(5, 5)")),
    "parameter of another shape": (
        lambda w: setattr(w.p["c"], "data", w.p["c"].data[:4].clone()),
        (RuntimeError, ValueError),
        ("'c'", "(4, 5)"),
    ),
    "state of another shape": (
        lambda w: setattr(w.state("c")["exp_avg"], "data", w.state("c")["exp_avg"].data[:4]),
        (RuntimeError, ValueError),
        ("'exp_avg'", "'c'", "(4, 5)"),
    ),
    "the same parameter twice": (
        lambda w: w.optimizer.param_groups[0]["params"].append(w.p["d"]),
        ValueError,
        ("group",),
    ),
    "a mask that is too short": (
        lambda w: w.optimizer.param_groups[1]["weight_decay_mask"].pop(),
        ValueError,
        ("weight_decay_mask", "3", "4"),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("fresh", [False, True], ids=["old gradients", "new gradients"])
def test_a_change_that_is_refused(what: str, backend: str, flatten: bool, fresh: bool) -> None:
    """Twice, and parameters whose memory is there are as they were."""
    for python in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if python:
                patch.setattr("fused_optim.addresses.extension", lambda name: (None, "hidden by the test"))
            change, kind, texts = REFUSED[what]
            w = World("adabelief", backend, flatten, "fp32")
            for _ in range(3):
                w.new_gradients()
                w.step()
            if fresh and "gradient" not in what:
                w.new_gradients()
            change(w)
            alive = [p for p in w.p.values() if p.untyped_storage().nbytes()]
            before = [p.detach().clone() for p in alive]
            for _ in range(2):
                with raises_with(kind, *texts):
                    w.optimizer.step()
            assert_same_bits([p.detach() for p in alive], before)


# Interrupted


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("launch", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_interrupted_between_two_launches(
    monkeypatch: pytest.MonkeyPatch, backend: str, flatten: bool, format: str, launch: int, when: str
) -> None:
    """Each parameter is whole, as it was or as it had to become, and the next steps are right."""
    launches = [0]
    real = ALL_BACKENDS[backend]

    def step(batch: Any, inputs: Any) -> None:
        launches[0] += 1
        if launches[0] == launch and when == "before":
            raise KeyboardInterrupt
        real.step(batch, inputs)
        if launches[0] == launch:
            raise KeyboardInterrupt

    monkeypatch.setitem(ALL_BACKENDS, backend, dataclasses.replace(real, step=step))
    for warm in (0, 2):
        launches[0] = 10
        w = World("adabelief", backend, flatten, format)
        for _ in range(warm):
            w.new_gradients()
            w.step()
        w.new_gradients()
        before, want = snapshot(w.optimizer), w.judge.expected(w.optimizer)
        launches[0] = 0
        with pytest.raises(KeyboardInterrupt):
            w.optimizer.step()
        got = snapshot(w.optimizer)
        done = [bool(torch.equal(g, x)) for g, x in zip(got["params"][:-1], want["params"])]
        for i, stepped in enumerate(done):
            source = want if stepped else before
            assert_same_bits(got["params"][i], source["params"][i])
            if stepped or warm:
                assert_same_bits(got["states"][i], source["states"][i])
            else:
                assert not any(t.any() for t in got["states"][i].values())
        assert any(done) == (launch == 2 or when == "after")
        assert all(done) == (launch == 2 and when == "after")
        for names in ("abcdefg", "bdf", "abcdefg"):
            w.new_gradients(names)
            w.step()


def test_out_of_memory_before_the_first_launch(
    monkeypatch: pytest.MonkeyPatch, backend: str, flatten: bool
) -> None:
    """What is raised while the second batch is prepared finds the first not yet stepped."""
    real = ALL_BACKENDS[backend]

    def load(key: Any) -> None:
        if key.param.dtype == torch.float64:
            raise MemoryError("of the test")
        real.load(key)

    w = World("adamaxw", backend, flatten, "fp32")
    w.new_gradients("abcde")
    w.step()
    monkeypatch.setitem(ALL_BACKENDS, backend, dataclasses.replace(real, load=load))
    w.new_gradients()
    with raises_unchanged(w.optimizer, MemoryError, "of the test"):
        w.optimizer.step()
    monkeypatch.undo()
    w.step()


# Many parameters


@pytest.mark.parametrize("what", ["data_replaced", "gradient_moved", "moments_moved", "step_replaced"])
def test_a_change_among_many(what: str, flatten: bool) -> None:
    """At either end of more parameters than a thread's portion."""
    rule = RULES["adabelief"]
    params = {str(i): torch.nn.Parameter(torch.full((3,), float(i))) for i in range(600)}
    w = World("adabelief", "cpu", flatten, "fp32")
    w.p = params
    w.optimizer = rule.optimizer(params.items(), backend="cpu", flatten=flatten)
    for end in ("0", "599"):
        for _ in range(2):
            for name, p in params.items():
                p.grad = gradient(p, int(name))
            w.step()
        others = {"a": params[end], "b": params["1"], "c": params["2"], "d": params["3"], "f": params["4"]}
        w.p = others
        CHANGES[what](w)
        w.p = params
        w.step()
