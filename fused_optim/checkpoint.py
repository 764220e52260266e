"""State dicts: what is saved, and what is made of one, be it ours or another optimizer's."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .options import Group, check_group, names_of, whole_number
from .plan import Settings
from .reference import MAX_COUNT
from .state import check_saved, checked_step, in_formats, own, with_exponent_keys

_ELSEWHERE = {
    *("foreach", "fused", "capturable", "differentiable", "buffer", "param_names"),
    *("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"),
}
"""Keys of others' groups that change no result, or that schedulers keep there."""
_DECOUPLED = ("decoupled_weight_decay", "weight_decouple", "decoupled_decay")
"""What others call decay that is not added to the gradient."""


@dataclass
class Loaded:
    """What a state dict holds, in this optimizer's formats."""

    groups: list[Group]
    states: dict[Tensor, dict[str, Any]]
    count: int
    seed: int | None


def snapshot(state_dict: dict[str, Any], count: int, seed: int | None) -> dict[str, Any]:
    """torch's state dict with tensors of its own, without callables, with count and seed."""
    state_dict["state"] = {
        key: {k: own(v) for k, v in state.items()} if isinstance(state, dict) else own(state)
        for key, state in state_dict["state"].items()
    }
    state_dict["param_groups"] = [
        {k: list(v) if isinstance(v, list) else own(v) for k, v in group.items() if k != "schedules"}
        for group in state_dict["param_groups"]
    ]
    state_dict["count"] = count
    if seed is not None:
        state_dict["seed"] = seed
    return state_dict


def read(saved: dict[str, Any], own: list[Group], settings: Settings, decoupled_lr: bool) -> Loaded:
    """Raises a ValueError that names what cannot be loaded; changes nothing."""
    groups = [_complete(group, own, i, decoupled_lr) for i, group in enumerate(saved["param_groups"])]
    states: dict[Tensor, dict[str, Any]] = {}
    steps: dict[Any, Tensor] = {}
    numbers = [0]
    for i, (group, ours) in enumerate(zip(groups, own)):
        for j, (name, key, p) in enumerate(zip(names_of(own, i), group["params"], ours["params"])):
            state = saved["state"].get(key)
            if not state:
                continue
            state = {"step": group["step"], **state} if "step" in group else state
            states[p] = _converted(name, p, state, settings)
            number = checked_step(name, state["step"], ValueError)
            numbers.append(number)
            # Equal numbers are one tensor: see plan.py, of what is stepped together.
            together = (i, p.device, number, group["weight_decay_mask"] and group["weight_decay_mask"][j])
            if together not in steps:
                steps[together] = torch.tensor(number, dtype=torch.int64, device=p.device)
            states[p]["step"] = steps[together]
    count = whole_number("the saved 'count'", saved.get("count", max(numbers)), MAX_COUNT + 1)
    seed = None if saved.get("seed") is None else whole_number("seed", saved["seed"], 2**32)
    for i, (group, ours) in enumerate(zip(saved["param_groups"], own)):
        if "weight_decay_mask" not in group:
            _warn_of_differences(group, ours, i)
    return Loaded(groups, states, count, seed)


def _converted(name: str, p: Tensor, state: dict[str, Any], settings: Settings) -> dict[str, Any]:
    if "step" not in state:
        raise ValueError(f"the saved state of parameter {name} has no 'step'; it has {sorted(state)}")
    keys = settings.rule.states
    state = with_exponent_keys({k: own(v) for k, v in state.items()}, keys)
    check_saved(name, p, state, keys, settings.rule.name)
    return in_formats(state, p, keys, settings.formats_of(p), settings.dense_like(p))


def _complete(group: Group, own: list[Group], index: int, decoupled_lr: bool) -> Group:
    """A saved group, with what another optimizer's lacks taken from ours."""
    ours = own[index] if index < len(own) else {}
    complete = {**{k: v for k, v in ours.items() if k not in ("params", "param_names", "schedules")}, **group}
    if decoupled_lr and "reference_lr" not in group and "initial_lr" in group:
        complete["reference_lr"] = float(group["initial_lr"])
    mask, n = complete.get("weight_decay_mask"), len(group["params"])
    if mask is not None and len(mask) != n:
        raise ValueError(
            f"weight_decay_mask of saved group {index} has {len(mask)} entries for {n} parameters"
        )
    check_group(complete, f" of saved group {index}")
    return complete


def _warn_of_differences(group: Group, ours: Group, index: int) -> None:
    """Say what another optimizer did that this one does not."""
    unknown = [
        f"{key}={value!r}"
        for key, value in group.items()
        if key not in ours and key not in (*_ELSEWHERE, *_DECOUPLED, "params", "step") and value
    ]
    if unknown:
        warnings.warn(
            f"saved group {index} has options that this optimizer does not have, so steps will differ from "
            f"those of the optimizer that saved it: {', '.join(unknown)}",
            UserWarning,
            stacklevel=8,
        )
    decoupled = next((group[key] for key in _DECOUPLED if key in group), None)
    if group.get("weight_decay") and not decoupled:
        warnings.warn(
            f"saved group {index} has weight_decay={group['weight_decay']!r}, and nothing in it says that decay "
            "was decoupled: torch.optim.Adamax and Adam add it to the gradient (L2), this optimizer to the update",
            UserWarning,
            stacklevel=8,
        )


def keep_schedules(old: list[Group], new: list[Group]) -> None:
    """Give loaded groups the callables of those that they replace; loaded values are no outside writes."""
    for before, group in zip(old, new):
        if "schedules" in before:
            group["schedules"] = before["schedules"]
            for key, scheduled in group["schedules"].items():
                scheduled.value = group[key]
