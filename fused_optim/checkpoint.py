"""State dicts: what is saved, and what is made of one, be it ours or another optimizer's."""

import warnings
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
}  # keys of others' groups that change no result, or that schedulers keep there
# What others call decay that is not added to the gradient.
_DECOUPLED = ("decoupled_weight_decay", "weight_decouple", "decoupled_decay")


Loaded = tuple[list[Group], dict[Tensor, dict[str, Any]], int, int | None]  # groups, states, count and seed


def snapshot(state_dict: dict[str, Any], count: int, seed: int | None) -> dict[str, Any]:
    """torch's state dict with tensors of its own, without callables, with count and seed."""
    state = {
        key: {k: own(v) for k, v in state.items()} if isinstance(state, dict) else own(state)
        for key, state in state_dict["state"].items()
    }
    groups = [
        {k: list(v) if isinstance(v, list) else own(v) for k, v in group.items() if k != "schedules"}
        for group in state_dict["param_groups"]
    ]
    seeds = {} if seed is None else {"seed": seed}
    return {**state_dict, "state": state, "param_groups": groups, "count": count, **seeds}


def read(saved: dict[str, Any], ours: list[Group], settings: Settings, decoupled_lr: bool) -> Loaded:
    """Raises a ValueError that names what cannot be loaded; changes nothing."""
    groups = [_complete(group, ours, i, decoupled_lr) for i, group in enumerate(saved["param_groups"])]
    states: dict[Tensor, dict[str, Any]] = {}
    steps: dict[Any, Tensor] = {}
    keys, numbers = settings.rule.states, [0]
    for i, (group, our) in enumerate(zip(groups, ours)):
        decays = group["weight_decay_mask"] or [True] * len(our["params"])
        for name, key, p, decay in zip(names_of(ours, i), group["params"], our["params"], decays):
            if not isinstance(saved["state"], dict) or not isinstance(saved["state"].get(key, {}), dict):
                raise TypeError(f"the saved 'state' must be a dict, with a dict for parameter {name}")
            if not saved["state"].get(key):
                continue
            state = {k: own(v) for k, v in saved["state"][key].items()}
            state = with_exponent_keys({"step": group.get("step"), **state}, keys)
            check_saved(name, p, state, keys, settings.rule.name)
            states[p] = in_formats(state, p, keys, settings.formats_of(p), settings.dense_like(p))
            numbers.append(checked_step(name, state["step"], ValueError))
            # Equal numbers are one tensor: see plan.py, of what is stepped together.
            together = (i, p.device, numbers[-1], decay)
            if together not in steps:
                steps[together] = torch.tensor(numbers[-1], dtype=torch.int64, device=p.device)
            states[p]["step"] = steps[together]
    count = whole_number("the saved 'count'", saved.get("count", max(numbers)), MAX_COUNT + 1)
    seed = None if saved.get("seed") is None else whole_number("seed", saved["seed"], 2**32)
    for i, (group, our) in enumerate(zip(saved["param_groups"], ours)):
        if "weight_decay_mask" not in group:
            _warn_of_differences(group, our, i)
    return groups, states, count, seed


def _complete(group: Group, ours: list[Group], index: int, decoupled_lr: bool) -> Group:
    """A saved group, with what another optimizer's lacks taken from ours."""
    our = ours[index] if index < len(ours) else {}
    complete = {**{k: v for k, v in our.items() if k not in ("params", "param_names", "schedules")}, **group}
    if decoupled_lr and "reference_lr" not in group and "initial_lr" in group:
        complete["reference_lr"] = float(group["initial_lr"])
    mask, n = complete.get("weight_decay_mask"), len(group["params"])
    where = f" of saved group {index}"
    if mask is not None and len(mask) != n:
        raise ValueError(f"weight_decay_mask{where} has {len(mask)} entries for {n} parameters")
    check_group(complete, where)
    return complete


def _warn_of_differences(group: Group, our: Group, index: int) -> None:
    """Say what another optimizer did that this one does not."""
    known, texts = {*our, *_ELSEWHERE, *_DECOUPLED, "params", "step"}, []
    unknown = [f"{key}={value!r}" for key, value in group.items() if key not in known and value]
    if unknown:
        texts.append(
            "has options that this optimizer does not have, so steps will differ from those of the optimizer "
            f"that saved it: {', '.join(unknown)}"
        )
    if group.get("weight_decay") and not next((group[key] for key in _DECOUPLED if key in group), None):
        texts.append(
            f"has weight_decay={group['weight_decay']!r}, and nothing in it says that decay was decoupled: "
            "torch.optim.Adamax and Adam add it to the gradient (L2), this optimizer to the update"
        )
    for text in texts:
        warnings.warn(f"saved group {index} {text}", UserWarning, stacklevel=8)


def keep_schedules(old: list[Group], new: list[Group]) -> None:
    """Give loaded groups the callables of those that they replace; loaded values are no outside writes."""
    for before, group in zip(old, new):
        if "schedules" in before:
            schedules = before["schedules"].items()
            group["schedules"] = {key: [schedule, group[key]] for key, (schedule, _) in schedules}
