"""What is stepped: lists of shapes, as models and bad cases have them."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Workload:
    """Parameters to step: their shapes, and the groups that they are dealt to, neighbours together."""

    name: str
    title: str
    shapes: Shapes
    groups: int = 1

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
}
"""Title, shapes and number of groups."""


def workload(name: str) -> Workload:
    """The workload of a name: ``2^n`` is one tensor, ``NxM`` is N tensors of M elements."""
    if match := re.fullmatch(r"2\^(\d+)", name):
        return Workload(name, f"one tensor of {name}", ((2 ** int(match[1]),),))
    if match := re.fullmatch(r"(\d+)x(\d+)", name):
        n, size = int(match[1]), int(match[2])
        return Workload(name, f"{n:,} x {size:,}", n * ((size,),))
    if name not in MODELS:
        known = f"{', '.join(MODELS)}, any 2^n, or NxM (N tensors of M)"
        raise argparse.ArgumentTypeError(f"no workload {name!r}: take {known}")
    title, shapes, groups = MODELS[name]
    return Workload(name, title, shapes(), groups)


def known_name(name: str) -> str:
    return workload(name).name


def fitted(full: Workload, most: int) -> Workload:
    """The workload with its dimensions divided until it has no more than ``most`` elements."""
    by, small = 1, full
    while small.numel > most:
        by *= 2
        shapes = tuple(tuple(-(-n // by) for n in shape) for shape in full.shapes)
        small = replace(full, title=f"{full.title}, dimensions / {by}", shapes=shapes)
    return small
