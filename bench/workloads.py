"""What is stepped: lists of shapes, as models and bad cases have them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Workload:
    """Parameters to step.

    Attributes:
        name: what the command line calls it.
        title: what tables and plots call it.
        shapes: one for each parameter.
        groups: parameter groups that the parameters are dealt to, neighbours together.
        new_gradients: each step is given new gradient tensors, as after ``zero_grad()``.
    """

    name: str
    title: str
    shapes: Shapes
    groups: int = 1
    new_gradients: bool = False

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


def _gpt2() -> Shapes:
    width = 768
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return ((50257, width), (1024, width), *(12 * block), (width,), (width,))


def _llama_7b() -> Shapes:
    width, hidden = 4096, 11008
    block = [*(4 * [(width, width)]), (hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    return ((32000, width), *(32 * block), (width,), (32000, width))


def _resnet50() -> Shapes:
    def convolution(out: int, into: int, size: int) -> list[tuple[int, ...]]:
        """With the batch norm that follows."""
        return [(out, into, size, size), (out,), (out,)]

    shapes = convolution(64, 3, 7)
    into = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(width, into, 1) + convolution(width, width, 3)
            shapes += convolution(4 * width, width, 1)
            if block == 0:
                shapes += convolution(4 * width, into, 1)
            into = 4 * width
    return (*shapes, (1000, into), (1000,))


def _lora() -> Shapes:
    """Rank 16 beside each of Llama-7B's 224 linear layers."""
    rank = 16
    layers = [shape for shape in _llama_7b()[1:-1] if len(shape) == 2]
    return tuple(pair for out, into in layers for pair in ((rank, into), (out, rank)))


def _divided(shapes: Shapes, by: int) -> Shapes:
    return tuple(tuple(-(-n // by) for n in shape) for shape in shapes)


_NAMED: dict[str, Callable[[], Workload]] = {
    "gpt2": lambda: Workload("gpt2", "GPT-2 124M, 148 tensors", _gpt2()),
    "gpt2-new-gradients": lambda: Workload(
        "gpt2-new-gradients",
        "GPT-2's list, dimensions / 16, new gradients each step",
        _divided(_gpt2(), 16),
        new_gradients=True,
    ),
    "llama-7b": lambda: Workload("llama-7b", "Llama-7B, 291 tensors", _llama_7b()),
    "resnet50": lambda: Workload("resnet50", "ResNet-50, 161 tensors", _resnet50()),
    "lora": lambda: Workload("lora", "LoRA of Llama-7B, 448 tensors", _lora()),
    "500-groups": lambda: Workload("500-groups", "500 parameter groups of 4,096", 500 * ((4096,),), 500),
}
NAMES = ("2^20", "2^26", "10000x64", *_NAMED)
"""Examples of names, for help and errors."""


def workload(name: str) -> Workload:
    """The workload of a name: ``2^n`` is one tensor, ``NxM`` is N tensors of M elements."""
    if match := re.fullmatch(r"2\^(\d+)", name):
        return Workload(name, f"one tensor of {name}", ((2 ** int(match[1]),),))
    if match := re.fullmatch(r"(\d+)x(\d+)", name):
        n, size = int(match[1]), int(match[2])
        return Workload(name, f"{n:,} x {size:,}", n * ((size,),))
    if name not in _NAMED:
        raise ValueError(f"no workload {name!r}: take {', '.join(NAMES)}, any 2^n, or NxM (N tensors of M)")
    return _NAMED[name]()


def fitted(full: Workload, most: int) -> Workload:
    """The workload with its dimensions divided until it has no more than ``most`` elements."""
    by = 1
    shapes = full.shapes
    while sum(map(math.prod, shapes)) > most:
        by *= 2
        shapes = _divided(full.shapes, by)
    if by == 1:
        return full
    title = f"{full.title}, dimensions / {by}"
    return Workload(full.name, title, shapes, full.groups, full.new_gradients)
