"""Who is measured: fused_optim in all its forms, and what people use today.

A provider is a name, the algorithm that it is held to, and a function that makes an optimizer for
groups of parameters. An optimizer of fused_optim is a line in OUR_RULES, a peer a line in PEERS.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from typing import Any

import torch
from torch import Tensor

from .formats import OPTIONS

Groups = list[list[Tensor]]
"""Parameters with gradients, by parameter group."""
Make = Callable[[Groups], Any]


@dataclass(frozen=True)
class Provider:
    """One way to make a step: ``make`` gives a torch optimizer, or what has a ``step()``. It is held to
    ``algorithm`` ("" of a loop), with an error of ``error`` of the update at most; with more than
    ``most_tensors`` it would take minutes to compile. The last four are of fused_optim's own."""

    name: str
    algorithm: str
    make: Make
    module: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    error: float = 1e-4
    most_tensors: int | None = None
    rule: str = ""
    backend: str = ""
    format: str = ""
    layout: str = ""

    @property
    def loop(self) -> bool:  # whether it is a roofline, and no optimizer
        return not self.algorithm

    def why_not(self, device: str, dtype: str, tensors: int) -> str | None:
        """Why it cannot step parameters here; None if it can. Imports no peer."""
        if device not in self.devices:
            return f"it is for {' and '.join(self.devices)} only"
        if dtype not in self.dtypes:
            return f"it takes {' and '.join(self.dtypes)} only"
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        if self.most_tensors is not None and tensors > self.most_tensors:
            return f"it compiles each tensor's step: minutes for {tensors} tensors"
        if self.rule:
            from fused_optim.backends import BACKENDS

            return BACKENDS[self.backend].why_not(torch.device(device))
        return None


EPS = 1e-8
BASE: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.999), "eps": EPS}
DECAYED = {**BASE, "weight_decay": 0.1}
"""What every provider is constructed with: large enough for a bfloat16 parameter to move."""


def as_groups(groups: Groups) -> list[dict[str, Any]]:
    return [{"params": group} for group in groups]


# fused_optim

OUR_RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "adabelief": ("AdaBelief", {"eps_root": EPS}),
    "adamw": ("AdamW", {}),
    "adamaxw": ("AdamaxW", {}),
}
"""By the reference's name: the optimizer's class, and options beside the common ones."""
# Triton's interpreter, where it is chosen, runs on the CPU: to rehearse, not to be timed.
_TRITON = ("cpu", "cuda") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
BACKENDS = {"triton": _TRITON, "cuda": ("cuda",), "cpu": ("cpu",)}
LAYOUTS = ("list", "flat")


def make_ours(groups: Groups, rule: str, backend: str, format: str, layout: str) -> Any:
    import fused_optim

    title, options = OUR_RULES[rule]
    options = {**DECAYED, **options, **OPTIONS[format][0], "flatten": layout == "flat", "backend": backend}
    return getattr(fused_optim, title)(as_groups(groups), **options)


def _ours(rule: str, backend: str, format: str, layout: str) -> Provider:
    kind = {"rule": rule, "backend": backend, "format": format, "layout": layout}
    name, make = f"{OUR_RULES[rule][0]} {backend} {format} {layout}", partial(make_ours, **kind)
    return Provider(name, rule, make, devices=BACKENDS[backend], dtypes=OPTIONS[format][1], **kind)


OURS = tuple(_ours(r, b, f, l) for r in OUR_RULES for b in BACKENDS for f in OPTIONS for l in LAYOUTS)


# Peers


def _peer(name: str, algorithm: str, optimizer: str, options: Any = None, **provider: Any) -> Provider:
    """An optimizer given as ``module:class``."""
    module, cls = optimizer.split(":")

    def make(groups: Groups) -> Any:
        with redirect_stdout(StringIO()):
            return getattr(importlib.import_module(module), cls)(as_groups(groups), **(options or DECAYED))

    return Provider(name, algorithm, make, module.split(".")[0], **provider)


_GPU: dict[str, Any] = {"devices": ("cuda",)}
_8BIT: dict[str, Any] = {"error": 0.15}
_BELIEF = {**DECAYED, "rectify": False, "weight_decouple": True}
_QUIET = {**_BELIEF, "print_change_log": False}
TORCH, DEEPSPEED = "torch AdamW fused", "DeepSpeedCPUAdam"
PEERS = (
    _peer(TORCH, "adamw", "torch.optim:AdamW", {**DECAYED, "fused": True}),
    _peer("torch AdamW foreach", "adamw", "torch.optim:AdamW", {**DECAYED, "foreach": True}),
    _peer("torch Adamax foreach", "adamax", "torch.optim:Adamax", {**BASE, "foreach": True}),
    _peer(DEEPSPEED, "adamw", "deepspeed.ops.adam:DeepSpeedCPUAdam", DECAYED, devices=("cpu",)),
    _peer("adabelief-pytorch", "adabelief", "adabelief_pytorch:AdaBelief", _QUIET),
    _peer("pytorch_optimizer AdaBelief", "adabelief", "pytorch_optimizer:AdaBelief", _BELIEF),
    _peer("torch-optimi AdamW", "adamw", "optimi:AdamW"),
    _peer("flashoptim AdamW", "adamw", "flashoptim:FlashAdamW", **_GPU, **_8BIT),
    _peer("bitsandbytes AdamW8bit", "adamw", "bitsandbytes.optim:AdamW8bit", **_8BIT),
    _peer("torchao AdamW8bit", "adamw", "torchao.optim:AdamW8bit", most_tensors=20, **_8BIT),
    _peer("apex FusedAdam", "adamw", "apex.optimizers:FusedAdam", **_GPU),
    _peer("TransformerEngine FusedAdam", "adamw", "transformer_engine.pytorch.optimizers:FusedAdam", **_GPU),
)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that an optimizer keeps, step numbers and other single numbers left out."""
    return sum(_bytes(value) for state in optimizer.state.values() for value in state.values())


def _bytes(value: Any) -> int:
    """Of tensors in nested containers; of a tensor subclass, of what it is made of."""
    if isinstance(value, (dict, list, tuple)):
        return sum(map(_bytes, value.values() if isinstance(value, dict) else value))
    if not isinstance(value, Tensor):
        return 0
    if type(value) is not Tensor and hasattr(value, "__tensor_flatten__"):
        return sum(_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size() if value.numel() > 1 else 0
