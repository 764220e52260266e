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

    @classmethod
    def on(cls, device: torch.device, hyper: Tensor, *amp: Tensor | None) -> Inputs:
        """With ``grad_scale`` and ``found_inf`` on ``device``. Towards the CPU a copy is waited for: there
        the step reads it on the host."""
        wait = device.type == "cpu"
        scale, found_inf = (
            None if t is None else t.reshape(()).to(device, torch.float32, non_blocking=not wait) for t in amp
        )
        return cls(hyper, scale, found_inf)


@dataclass(frozen=True)
class Backend:
    """One way to make a step.

    Attributes:
        name: what the user calls it.
        why_not: why it cannot step parameters on a device; None where it can.
        load: brings in all that steps of such a batch run, with and without ``grad_scale`` and
            ``found_inf``. It is called for all batches before anything is written, so that a compiler's
            error changes nothing.
        step: makes one step of a batch in place, step numbers included.
        steps_all_at_once: whether ``step`` makes all of a batch or nothing, whatever interrupts it.
    """

    name: str
    why_not: Callable[[torch.device], str | None]
    load: Callable[[BatchKey, bool, bool], None]
    step: Callable[[Batch, Inputs], None]
    steps_all_at_once: bool = True


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


def nothing_to_load(key: BatchKey, scaled: bool, skippable: bool) -> None:
    """The ``load`` of a backend whose code came with its module."""
