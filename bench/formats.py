"""The memory formats that are measured, and those whose compiled kernels are read."""

from typing import Any

from fused_optim.storage import FORMATS

_BF16 = ("bfloat16",)
_ALL = ("float32", "bfloat16", "float16")

OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "fp32": ({}, (*_ALL, "float64")),
    "bf16": ({"state_format": "bf16"}, _ALL),
    "8bit": ({"state_format": "8bit"}, _ALL),
    "split16": ({"master_weights": "split16"}, _BF16),
    "split16-bf16": ({"master_weights": "split16", "state_format": "bf16"}, _BF16),
    "split8-8bit": ({"master_weights": "split8", "state_format": "8bit"}, _BF16),
    "stochastic": ({"stochastic_rounding": True}, _BF16),
}
"""By name: arguments of our optimizers' constructors, and the parameters' dtypes they are for."""

TRIPLES = (
    ("fp32", "fp32", "fp32"), ("bf16", "bf16", "fp32"), ("fp16", "fp16", "fp32"), ("fp64", "fp64", "fp64"),
    ("bf16", "fp32", "fp32"), ("split16", "bf16", "fp32"), ("split8", "bf16", "fp32"),
    ("bf16_stochastic", "bf16", "fp32"), ("fp32", "fp32", "bf16"), ("fp32", "fp32", "8bit"),
    ("bf16", "bf16", "bf16"), ("bf16", "bf16", "8bit"), ("split16", "bf16", "bf16"),
    ("split8", "bf16", "8bit"), ("bf16_stochastic", "bf16", "8bit"),
)  # fmt: skip
"""Kernels that are compiled and read: formats of parameter and gradient, and a key of STATES."""
STATES = {
    "fp32": ("fp32", "fp32"),
    "fp64": ("fp64", "fp64"),
    "bf16": ("bf16_dither", "bf16_dither"),
    "8bit": ("e4m3", "e5m3"),
}
"""Formats of the two moments."""


def part_bytes(name: str) -> list[int]:
    """Bytes of an element in each tensor of a format that has a value for each element."""
    form = FORMATS[name]
    beside = [form.aux.dtype.itemsize] if form.aux is not None and form.aux.block == 1 else []
    return [form.dtype.itemsize, *beside]
