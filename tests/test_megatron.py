"""Megatron-Core's contract with its optimizers, restated here from its published source:
``distrib_optimizer.py`` and ``optimizer/__init__.py`` of Megatron-LM (commit d98e8a6 of August 2026), and
TransformerEngine's ``FusedAdam``, which it was written for. Neither is needed, and neither was run.

``ForMegatron`` is the recipe: it needs public interfaces alone.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import (  # isort: skip
    BF16, F32, Make, Parameters, Rule, assert_same_bits, gradient, like, parameters, saved_and_loaded,
    snapshot,
)  # fmt: skip
from fused_optim import AdamW

NAMES = {"exp_avg_var": "exp_avg_sq", "exp_inf": "exp_avg_sq", "master": "master_param"}
"""What Megatron calls that which ``decoded_state`` names otherwise."""


class ForMegatron:
    """What Megatron-Core asks of an optimizer that is precision-aware: gradients from another attribute, of
    another dtype; ``step`` in the groups; states as float32 under the names of Adam's, masters among them."""

    def __init__(self, optimizer: Any, gradient: str = "decoupled_grad") -> None:
        self.optimizer, self.gradient = optimizer, gradient
        optimizer.register_step_pre_hook(self._take_gradients)
        optimizer.register_step_post_hook(self._count)

    def __getattr__(self, name: str) -> Any:  # step, zero_grad, param_groups
        return getattr(self.optimizer, name)

    def _params(self) -> Parameters:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _take_gradients(self, *_: Any) -> None:
        for p in self._params():
            p.grad_dtype = None  # any
            p.grad = getattr(p, self.gradient, None)

    def _count(self, *_: Any) -> None:
        for group in self.optimizer.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
        for p in self._params():
            p.grad = None

    @property
    def state(self) -> Mapping[Tensor, dict[str, Tensor]]:
        return States(self.optimizer)

    def initialize_state(self, p: Tensor, store_param_remainders: bool = False) -> None:
        self.optimizer.set_decoded_state(p, self.optimizer.decoded_state(p))

    def get_unscaled_state(self, p: Tensor, name: str) -> Tensor:
        return self.state[p][name]

    def set_scaled_state(self, p: Tensor, name: str, value: Tensor) -> None:
        self.optimizer.set_decoded_state(p, self._ours(p, {**self.state[p], name: value}))

    def _ours(self, p: Tensor, theirs: dict[str, Any]) -> dict[str, Any]:
        own = self.optimizer.decoded_state(p)
        return {key: t if key == "step" else theirs[NAMES.get(key, key)] for key, t in own.items()}

    def state_dict(self) -> dict[str, Any]:
        states = {i: self.state[p] for i, p in enumerate(self._params()) if p in self.state}
        return {**self.optimizer.state_dict(), "state": states}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Each parameter's number of steps is its group's."""
        steps = {i: group["step"] for group in saved["param_groups"] for i in group["params"]}
        states = {
            i: {**self._ours(p, saved["state"][i]), "step": steps[i]}
            for i, p in enumerate(self._params())
            if i in saved["state"]
        }
        self.optimizer.load_state_dict({**saved, "state": states})


class States(Mapping[Tensor, dict[str, Tensor]]):
    """A parameter's state as Megatron reads it, made when it is asked for."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def __getitem__(self, p: Tensor) -> dict[str, Tensor]:
        decoded = self._optimizer.decoded_state(p)
        return {NAMES.get(key, key): t for key, t in decoded.items() if key != "step"}

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._optimizer.state)

    def __len__(self) -> int:
        return len(self._optimizer.state)


# As Megatron-Core's distributed optimizer uses it: shards of one dimension, which all step together.

SHARDS = [(300,), (77,), (1,)]


def give_gradients(params: Parameters, attribute: str, dtype: torch.dtype, seed: int) -> None:
    for i, p in enumerate(params):
        setattr(p, attribute, gradient(torch.empty(p.shape, dtype=dtype), 1000 * seed + i))


def taken_out(optimizer: Any, p: Tensor) -> dict[str, Tensor]:
    """``_get_main_param_and_optimizer_states``."""
    tensors = {
        name: optimizer.get_unscaled_state(p, name)
        for name, value in optimizer.state[p].items()
        if isinstance(value, Tensor)
    }
    tensors["param"] = tensors.pop("master_param")
    return tensors


def put_back(optimizer: Any, p: Tensor, tensors: dict[str, Tensor]) -> None:
    """``_set_main_param_and_optimizer_states``."""
    for name, value in tensors.items():
        optimizer.set_scaled_state(p, "master_param" if name == "param" else name, value)


FORMATS: dict[str, dict[str, Any]] = {
    "split16": {"master_weights": "split16"},
    "split16+bf16": {"master_weights": "split16", "state_format": "bf16"},
    "split8+8bit": {"master_weights": "split8", "state_format": "8bit"},
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_precision_aware_optimizer(
    make: Make, rule: Rule, format: str, dtype: torch.dtype, flatten: bool
) -> None:
    """Steps with other gradients are those that ``p.grad`` gives; a checkpoint in Megatron's way, and one of
    ``state_dict``, go on to the bit."""
    params = parameters(SHARDS, BF16)
    twins = like(params)
    optimizer = ForMegatron(make(params, lr=0.01, flatten=flatten, **FORMATS[format]))
    plain = make(twins, lr=0.01, **{**FORMATS[format], "backend": "eager"})
    for p in twins:
        p.grad_dtype = dtype

    def train(steps: range, *trained: tuple[Any, Parameters]) -> None:
        for seed in steps:
            for o, ps in trained:
                give_gradients(ps, "decoupled_grad", dtype, seed)
                o.step()
            give_gradients(twins, "grad", dtype, seed)
            plain.step()
        for o, _ in trained:
            assert_same_bits(snapshot(o.optimizer), snapshot(plain))

    assert len(optimizer.state) == 0
    for p in params:
        optimizer.initialize_state(p)
    assert [set(optimizer.state[p]) for p in params] == [{"exp_avg", "exp_avg_sq", "master_param"}] * 3
    train(range(3), (optimizer, params))
    assert all(p.grad is None for p in params)
    assert [g["step"] for g in optimizer.state_dict()["param_groups"]] == [3]

    saved = saved_and_loaded(optimizer.state_dict())
    assert all(t.dtype == F32 for state in saved["state"].values() for t in state.values())
    resumed, reloaded = (ForMegatron(make(like(params), **FORMATS[format])) for _ in range(2))
    # States of any values first, which put_back then replaces.
    dummies = {i: {name: torch.ones(p.shape) for name in optimizer.state[p]} for i, p in enumerate(params)}
    resumed.load_state_dict({**saved, "state": dummies})
    again = resumed.param_groups[0]["params"]
    for p, q in zip(params, again):
        put_back(resumed, q, taken_out(optimizer, p))
    reloaded.load_state_dict(saved)
    train(range(3, 5), (optimizer, params), (resumed, again), (reloaded, reloaded.param_groups[0]["params"]))


def test_main_parameters_that_megatron_keeps(backend: str) -> None:
    """Without precision-awareness the optimizer has float32 shards and ``p.grad``, and its contract is that
    of ``torch.optim.AdamW``. States are made, read and written in place; nothing is needed between."""

    def stepped(optimizer: Any, params: Parameters, steps: range) -> None:
        for seed in steps:
            give_gradients(params, "main_grad", BF16, seed)
            for p in params:
                p.grad = p.main_grad.float()
            optimizer.step()

    optimizers, both = [], [parameters(SHARDS), parameters(SHARDS)]
    for params in both:
        optimizers.append(AdamW(params, lr=0.01, backend=backend))
        for p in params:  # init_state_fn
            optimizers[-1].state[p]["exp_avg"] = torch.zeros_like(p.data)
            optimizers[-1].state[p]["exp_avg_sq"] = torch.zeros_like(p.data)
    (optimizer, resumed), (params, again) = optimizers, both
    plain = AdamW(like(params), lr=0.01, backend="eager")
    stepped(plain, plain.param_groups[0]["params"], range(5))
    stepped(optimizer, params, range(3))
    saved = optimizer.state_dict()
    (step,) = {state["step"].item() for state in saved["state"].values()}
    states = {
        i: {
            **{key: torch.ones(p.shape) for key in ("exp_avg", "exp_avg_sq")},
            "step": torch.tensor(float(step)),
        }
        for i, p in enumerate(params)
    }
    groups = [{**group, "step": step} for group in saved["param_groups"]]
    resumed.load_state_dict({"state": states, "param_groups": groups})
    for p, q in zip(params, again):
        for key, t in {"param": q.data, **resumed.state[q]}.items():
            t.copy_(p.data if key == "param" else optimizer.state[p][key])
    for o, ps in ((optimizer, params), (resumed, again)):
        stepped(o, ps, range(3, 5))
        assert_same_bits(snapshot(o)["params"], snapshot(plain)["params"])
        assert_same_bits(snapshot(o)["states"], snapshot(plain)["states"])
