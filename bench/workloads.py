"""What is stepped: lists of shapes, as models and bad cases have them."""

import argparse
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Workload:
    """Parameters to step: their shapes, and the groups that they are dealt to, neighbours together."""

    name: str
    title: str
    shapes: Shapes
    groups: int = 1
    condition: str = ""  # of CONDITIONS

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes))


def _gpt2() -> Shapes:
    width = 768
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return ((50257, width), (1024, width), *(12 * block), (width,), (width,))


def _llama_7b() -> Shapes:
    width, hidden = 4096, 11008
    block = [*(4 * [(width, width)]), (hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    return ((32000, width), *(32 * block), (width,), (32000, width))


def _lora() -> Shapes:
    """Rank 16 beside each of Llama-7B's 224 linear layers."""
    layers = [shape for shape in _llama_7b()[1:-1] if len(shape) == 2]
    return tuple(pair for out, into in layers for pair in ((16, into), (out, 16)))


MODELS: dict[str, tuple[str, Callable[[], Shapes], int]] = {
    "gpt2": ("GPT-2 124M, 148 tensors", _gpt2, 1),
    "llama-7b": ("Llama-7B, 291 tensors", _llama_7b, 1),
    "lora": ("LoRA of Llama-7B, 448 tensors", _lora, 1),
    "500-groups": ("500 parameter groups of 4,096", lambda: 500 * ((4096,),), 500),
    "huge-and-tiny": ("one tensor of 2^24 and 10,000 of 7", lambda: ((2**24,), *10000 * ((7,),)), 1),
}
"""Title, shapes and number of groups."""


def _moved(t: Tensor, start: int, step: int) -> Tensor:
    """The same values elsewhere, ``start`` elements past an aligned address, neighbours ``step`` apart."""
    memory = torch.empty(start + step * t.numel(), dtype=t.dtype, device=t.device)
    return memory.as_strided(t.shape, [step * s for s in t.stride()], start).copy_(t)


BUSY = "busy-cores"
CONDITIONS: dict[str, Callable[[Any], Any]] = {
    "": lambda p: None,
    "gradients-of-0": lambda p: p.grad.zero_(),
    # Nine in ten, as of an embedding.
    "zero-rows": lambda p: p.grad.view(-1, 64).mul_(torch.arange(p.numel() // 64).to(p)[:, None] % 10 == 0),
    "gradients-of-1e-20": lambda p: p.grad.fill_(1e-20),  # whose square is subnormal in float32
    "gradients-of-1e-41": lambda p: p.grad.fill_(1e-41),
    "unaligned": lambda p: [setattr(p, k, _moved(getattr(p, k), 1, 1)) for k in ("data", "grad")],
    "gradient-with-gaps": lambda p: setattr(p, "grad", _moved(p.grad, 0, 2)),
    "parameter-with-gaps": lambda p: setattr(p, "data", _moved(p.data, 0, 2)),
    "4-threads-a-core": lambda p: torch.set_num_threads(4 * (os.cpu_count() or 1)),
    BUSY: lambda p: None,  # bench.plan sees to it
}
"""What is done to a parameter with its gradient, by a name that follows a workload's and a colon."""
KNOWN = f"{', '.join(MODELS)}, any 2^n, or NxM: N tensors of M"


def workload(name: str) -> Workload:
    """The workload of a name: ``2^n`` is one tensor, ``NxM`` is N tensors of M elements."""
    name, _, condition = name.partition(":")
    if condition:
        if condition not in CONDITIONS:
            raise argparse.ArgumentTypeError(f"no condition {condition!r}: take {', '.join(CONDITIONS)}")
        full = workload(name)
        title = f"{full.title}, {condition}"
        return replace(full, name=f"{name}:{condition}", title=title, condition=condition)
    if match := re.fullmatch(r"2\^(\d+)", name):
        return Workload(name, f"one tensor of {name}", ((2 ** int(match[1]),),))
    if match := re.fullmatch(r"(\d+)x(\d+)", name):
        n, size = int(match[1]), int(match[2])
        return Workload(name, f"{n:,} x {size:,}", n * ((size,),))
    if name not in MODELS:
        raise argparse.ArgumentTypeError(f"no workload {name!r}: take {KNOWN}")
    title, shapes, groups = MODELS[name]
    return Workload(name, title, shapes(), groups)


def fitted(full: Workload, most: int) -> Workload:
    """The workload with its dimensions divided until it has no more than ``most`` elements."""
    by, small = 1, full
    while small.numel > most:
        by *= 2
        shapes = tuple(tuple(-(-n // by) for n in shape) for shape in full.shapes)
        small = replace(full, title=f"{full.title}, dimensions / {by}", shapes=shapes)
    return small
