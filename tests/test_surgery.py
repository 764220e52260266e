"""States as values: ``decoded_state`` and ``set_decoded_state``, in every format."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import (  # isort: skip
    BF16, FORMATS, KEPT, Judge, Make, Rule, assert_same_bits, copies, like, parameters, raises_unchanged,
    raises_with, set_gradients, snapshot, train, trained,
)  # fmt: skip
from fused_optim import AdaBelief

ROWS = [(6, 128), (5,)]  # rows of whole blocks: those of the 8-bit formats move with them


@pytest.mark.parametrize("format", KEPT)
def test_what_is_taken_out_and_put_back_is_the_same(
    make: Make, rule: Rule, format: str, flatten: bool
) -> None:
    """What is taken out are copies, in the working precision; training goes on to the bit."""
    dtype, options = KEPT[format]
    params, optimizer = trained(make, 3, parameters([(300,), (7, 40), ()], dtype), flatten=flatten, **options)
    copied = copy.deepcopy(optimizer)
    working = {torch.float64: torch.float64}.get(dtype, dtype if dtype.is_complex else torch.float32)
    for p in params:
        state = optimizer.decoded_state(p)
        moments = {"exp_avg", rule.nu, *(["master"] if "split" in format else [])}
        assert state.keys() == {"step", *moments} and int(state["step"]) == 3
        assert all((state[key].dtype, state[key].shape) == (working, p.shape) for key in moments)
        kept = copies(state)
        optimizer.set_decoded_state(p, state)
        for t in state.values():
            t.zero_()
        assert_same_bits(optimizer.decoded_state(p), kept)
    for o in (optimizer, copied):
        train(o, o.param_groups[0]["params"], 2, first=3)
    assert_same_bits(snapshot(optimizer), snapshot(copied))


SURGERY: dict[str, Callable[[Tensor], Tensor]] = {
    "pruned": lambda t: t[[0, 2, 5]],
    "grown": lambda t: torch.cat([t, torch.zeros(3, 128, dtype=t.dtype)]),
    "permuted": lambda t: t[[3, 1, 0, 5, 4, 2]],
}


@pytest.mark.parametrize("format", ["fp32", "fp64", "complex64", "fp16+8bit", "split8",
    "split16_grad_fp32+bf16", "split8+8bit", "stochastic_grad_fp32+8bit"])  # fmt: skip
@pytest.mark.parametrize("operation", SURGERY)
def test_surgery(make: Make, rule: Rule, format: str, operation: str) -> None:
    """A parameter is replaced by one of other rows, with their state, and is stepped on from there."""
    dtype, _, options = FORMATS[format]
    flatten = (len(format) + len(operation)) % 2 == 0
    (old, other), optimizer = trained(make, 3, parameters(ROWS, dtype), flatten=flatten, **options)
    change = SURGERY[operation]

    state, new = optimizer.decoded_state(old), torch.nn.Parameter(change(old.detach()))
    optimizer.param_groups[0]["params"][0] = new
    del optimizer.state[old]
    optimizer.set_decoded_state(new, {key: change(t) if t.dim() else t for key, t in state.items()})

    for key, value in optimizer.decoded_state(new).items():
        assert_same_bits(value, change(state[key]) if value.dim() else state[key], key)
    judge = Judge(rule, **{"state_format": "fp32", **options})
    judge.train(optimizer, 2, first=3)
    assert set(optimizer.state) == {new, other}


def test_a_state_that_there_is_not_yet(make: Make) -> None:
    """Is what the first step starts from; and one of another format is converted."""
    params = parameters(ROWS, BF16)
    optimizer, fresh = make(params, master_weights="split8"), make(like(params), master_weights="split8")
    kept = snapshot(optimizer)
    states = [optimizer.decoded_state(p) for p in params]
    assert_same_bits(snapshot(optimizer), kept)
    for p, state in zip(params, states):
        optimizer.set_decoded_state(p, state)
    for o in (optimizer, fresh):
        train(o, o.param_groups[0]["params"], 2)
    assert_same_bits(snapshot(optimizer), snapshot(fresh))
    wider = make(like(params), master_weights="split16", state_format="8bit")
    for p, q in zip(params, wider.param_groups[0]["params"]):
        state = optimizer.decoded_state(p)
        wider.set_decoded_state(q, state)
        assert_same_bits(wider.decoded_state(q)["master"], state["master"])


@pytest.mark.parametrize("shape", [(301,), (3, 100), (5,)])
def test_a_state_of_another_shape_is_refused(make: Make, flatten: bool, shape: tuple[int, ...]) -> None:
    """An 8-bit one too whose blocks are as many as the parameter's."""
    (p,), optimizer = trained(make, 2, parameters([(300,)]), state_format="8bit", flatten=flatten)
    state, saved = optimizer.decoded_state(p), optimizer.state_dict()
    p.grad, p.data = None, torch.ones(shape)
    set_gradients([p], 2)
    texts = ("parameter 0 of group 0", "(300,)", str(shape))
    for call in (optimizer.step, lambda: optimizer.decoded_state(p)):
        with raises_unchanged(optimizer, RuntimeError, *texts):
            call()
    for load in (lambda: optimizer.set_decoded_state(p, state), lambda: optimizer.load_state_dict(saved)):
        with raises_unchanged(optimizer, ValueError, *texts):
            load()


BAD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a key": ({"exp_avg_sq": torch.zeros(6, 128)}, ("'exp_avg_sq'", "'exp_avg_var'")),
    "shape": ({"exp_avg_var": torch.zeros(128, 6)}, ("'exp_avg_var'", "(128, 6)", "(6, 128)")),
    "master": ({"master": torch.zeros(6)}, ("'master'", "(6,)")),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_states_are_refused(what: str) -> None:
    given, texts = BAD[what]
    params, optimizer = trained(AdaBelief, 2, parameters(ROWS, BF16), master_weights="split16")
    state = optimizer.decoded_state(params[0])
    with raises_unchanged(optimizer, ValueError, "parameter 0 of group 0", *texts):
        optimizer.set_decoded_state(params[0], {**state, **given})
    for call in (lambda p: optimizer.decoded_state(p), lambda p: optimizer.set_decoded_state(p, state)):
        with raises_with(ValueError, "(6, 128)", "in no group"):
            call(torch.nn.Parameter(params[0].detach()))
