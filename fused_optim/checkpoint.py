"""State dicts: what is saved, and what is made of one, be it ours or another optimizer's."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from .layout import has_nonzero_gradient, local, shard_of
from .options import VERSION, Group, check_entries, check_group, lr_value, names_of, whole_number
from .plan import Settings
from .reference import MAX_COUNT
from .state import State, check_saved, from_saved, in_formats, own, portable

_ELSEWHERE = {
    *("foreach", "fused", "capturable", "differentiable", "buffer", "param_names"),
    *("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"),
}  # keys of others' groups that change no result, or that schedulers keep there
# What others call decay that is not added to the gradient.
_DECOUPLED = ("decoupled_weight_decay", "weight_decouple", "decoupled_decay")
Loaded = tuple[list[Group], dict[Tensor, State]]  # groups and states


def snapshot(state_dict: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """torch's state dict with tensors of its own and without callables."""
    keys, states = settings.rule.states, state_dict["state"].items()
    saved = {key: own(portable(state, keys) if isinstance(state, dict) else state) for key, state in states}
    groups = [{**own(group), "schedules": None} for group in state_dict["param_groups"]]
    return {**state_dict, "state": saved, "param_groups": groups}


@contextmanager
def loading(optimizer: torch.optim.Optimizer, settings: Settings) -> Iterator[None]:
    """Have torch's ``load_state_dict`` take our states, since its own casts moments to the parameter's dtype
    and cannot be told not to."""
    old = optimizer.param_groups
    loaded: list[Loaded] = []

    def check(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        loaded.append(_read(saved, old, settings))
        return {**saved, "param_groups": loaded[0][0], "state": {}}

    def install(_: torch.optim.Optimizer) -> None:
        for before, group in zip(old, optimizer.param_groups):  # what was loaded is no outside write
            schedules = before.get("schedules", {}).items()
            group["schedules"] = {key: [schedule, group[key]] for key, (schedule, _) in schedules}
        optimizer.state.update(loaded[0][1])

    with ExitStack() as hooks:
        hooks.callback(optimizer.register_load_state_dict_pre_hook(check).remove)
        hooks.callback(optimizer.register_load_state_dict_post_hook(install, prepend=True).remove)
        yield


def _read(saved: dict[str, Any], ours: list[Group], settings: Settings) -> Loaded:
    """Raises a ValueError that names what cannot be loaded; changes nothing."""
    groups = [_complete(g, ours, i, settings.decoupled_lr) for i, g in enumerate(saved["param_groups"])]
    _warn_of_names(groups, ours)
    states: dict[Tensor, State] = {}
    steps: dict[Any, Tensor] = {}
    numbers = [0]
    for i, (group, our) in enumerate(zip(groups, ours)):
        decays = group["weight_decay_mask"] or [True] * len(our["params"])
        for name, key, p, decay in zip(names_of(ours, i), group["params"], our["params"], decays):
            if not isinstance(saved["state"], dict) or not isinstance(saved["state"].get(key, {}), dict):
                raise TypeError(f"the saved 'state' must be a dict, with a dict for parameter {name}")
            # torch's flattened dicts are read by the keys of this optimizer's states, with {} for none.
            state = {k: v for k, v in saved["state"].get(key, {}).items() if not isinstance(v, dict)}
            if not state:
                continue
            states[p] = state = fitted(name, p, {"step": group.get("step"), **state}, settings)
            numbers.append(int(state["step"]))
            # Equal numbers are one tensor: see plan.py, of what is stepped together.
            state["step"] = steps.setdefault((i, p.device, numbers[-1], decay), state["step"])
    # Version 1 had both beside the groups.
    first = {**(saved["param_groups"][0] if saved["param_groups"] else {}), **saved}
    count = whole_number("the saved 'count'", first.get("count", max(numbers)), MAX_COUNT + 1)
    for group, our in zip(groups, ours):
        group["count"] = count
        group["seed"] = whole_number("seed", first.get("seed", our.get("seed", 0)), 2**32)
    for i, (group, our) in enumerate(zip(saved["param_groups"], ours)):
        if "weight_decay_mask" not in group:
            _warn_of_differences(group, our, i)
    return groups, states


def fitted(name: str, p: Tensor, saved: State, settings: Settings) -> State:
    """What this optimizer keeps of a saved state of ``p``; a ValueError names what is wrong."""
    keys, formats = settings.rule.states, settings.formats_of(p)
    state = {k: own(v if k == "step" else shard_of(p, v)) for k, v in saved.items()}
    state = from_saved(state, keys, formats.param)
    step = check_saved(name, local(p), state, keys, settings.rule.name)
    made = in_formats(state, local(p), keys, formats, settings.dense_like(p))
    return {**settings.placed(p, made), "step": torch.tensor(step, dtype=torch.int64, device=p.device)}


@torch.no_grad()
def asks_for_states(groups: list[Group]) -> bool:
    """Whether a first step is none but how ``torch.distributed.checkpoint`` asks for states that a checkpoint
    can be read into: learning rates of 0, and all gradients there and zero."""
    if not all(lr_value(group["lr"]) == 0 for group in groups):
        return False
    params = [p for group in groups for p in group["params"] if p.requires_grad]
    return all(p.grad is not None for p in params) and not any(map(has_nonzero_gradient, params))


def _complete(group: Group, ours: list[Group], index: int, decoupled_lr: bool) -> Group:
    """A saved group, with what another optimizer's lacks taken from ours."""
    our = ours[index] if index < len(ours) else {}
    complete = {**{k: v for k, v in our.items() if k not in ("params", "param_names", "schedules")}, **group}
    if decoupled_lr and "reference_lr" not in group and "initial_lr" in group:
        complete["reference_lr"] = float(group["initial_lr"])
    where = f" of saved group {index}"
    check_entries(complete.get("weight_decay_mask"), len(group["params"]), where)
    check_group(complete, where)
    version = whole_number(f"version{where}", group.get("version", 1), 2**31)
    if version > VERSION:
        newer = "of a newer fused_optim; this one reads up to"
        raise ValueError(f"version{where} is {version}, {newer} {VERSION}")
    return {**complete, "version": VERSION, "schedules": {}}


def _warn_of_names(groups: list[Group], ours: list[Group]) -> None:
    """Say where parameters that are matched by their order have other names. (torch.distributed.checkpoint
    has names in place of numbers, and matches by them.)"""
    for i, (group, our) in enumerate(zip(groups, ours)):
        saved, names = group.get("param_names"), our.get("param_names")
        numbered = all(isinstance(key, int) for key in group["params"])
        if saved and names and numbered and list(saved) != list(names):
            which = "in another order" if sorted(saved) == sorted(names) else "other names"
            pairs = ", ".join(f"{a!r} for {b!r}" for a, b in zip(saved, names) if a != b)
            text = f"its parameters {which}, and states are loaded by their order: {pairs}; make the "
            text += "optimizer for the same parameters in the saved order"
            warnings.warn(f"saved group {i} has {text}", UserWarning, stacklevel=7)
        if names:
            group["param_names"] = list(names)


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
