"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..table import Batch, BatchKey


class Inputs(NamedTuple):
    """What a step is given beside the table, all on the batch's device."""

    hyper: Tensor
    """float64 ``[n, len(Hyperparameters)]``."""
    grad_scale: Tensor | None
    """0-dim float32: gradients are divided by it."""
    found_inf: Tensor | None
    """0-dim float32: if it is not 0, nothing changes."""


@dataclass(frozen=True)
class Backend:
    """One way to make a step.

    Attributes:
        name: what the user calls it.
        why_not: why it cannot step parameters on a device; None where it can.
        load: brings in all that a step of such a batch runs. It is called for all batches before the
            first of them is stepped, so that a compiler's error leaves no step half made.
        step: makes one step of a batch in place, step numbers included.
        step_bytes: memory that a step of a batch takes and gives back; None where that is not
            bounded by the number of tensors.
        steps_all_at_once: whether ``step`` makes all of a batch or nothing, whatever interrupts it.
    """

    name: str
    why_not: Callable[[torch.device], str | None]
    load: Callable[[BatchKey], None]
    step: Callable[[Batch, Inputs], None]
    step_bytes: Callable[[Batch], int | None]
    steps_all_at_once: bool = True


def coefficient_bytes(batch: Batch) -> int:
    """At most what a fused step takes: 16 values of the working precision for each step number."""
    return len(batch.counters) * 16 * batch.key.param.working.itemsize


class DeviceTable(NamedTuple):
    """A batch's table in the memory of its device."""

    rows: Tensor
    chunks: Tensor
    counters: Tensor


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """A copy on ``device`` that the host does not wait for."""
    if device.type == "cpu":
        return table
    pinned = table.pin_memory()
    copy = pinned.to(device, non_blocking=True)
    copy.source = pinned  # type: ignore[attr-defined]  # a captured copy reads it at each replay
    return copy


def used_on_current_stream(t: Tensor) -> Tensor:
    """``t``, whose memory is not given away before what this stream has yet to do is done."""
    if t.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        t.record_stream(torch.cuda.current_stream(t.device))
    return t


def table_on(batch: Batch, chunk_size: int) -> DeviceTable:
    """The batch's table on its device, uploaded where it changed."""
    tables = {"rows": batch.rows, "chunks": batch.chunks(chunk_size), "counters": batch.counters}
    for name, table in tables.items():
        if name not in batch.on_device:
            batch.on_device[name] = to_device(table, batch.key.device)
    return DeviceTable(**{name: used_on_current_stream(batch.on_device[name]) for name in tables})


def nothing_to_load(key: BatchKey) -> None:
    """The ``load`` of a backend whose code came with its module."""
