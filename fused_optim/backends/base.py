"""What a backend is, and how a table gets to its device."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..table import Batch, BatchKey


class Inputs(NamedTuple):
    """What a step is given beside the table, all on the batch's device."""

    hyper: Tensor  # float64 [n, len(Hyperparameters)]
    grad_scale: Tensor | None  # 0-dim float32: gradients are divided by it
    found_inf: Tensor | None  # 0-dim float32: if it is not 0, nothing changes
    clip: Tensor | None = None  # what reference.clip gives

    @property
    def skips(self) -> list[Tensor]:
        """Where one of them is not 0, nothing changes."""
        return [t for t in (self.found_inf, None if self.clip is None else self.clip[3]) if t is not None]


@dataclass(frozen=True)
class Backend:
    """One way to make a step."""

    name: str  # what the user calls it
    why_not: Callable[[torch.device], str | None]  # why it cannot step parameters there; None where it can
    step: Callable[[Batch, Inputs], None]  # one step of a batch in place, step numbers included
    # Puts the sum of squares of each of the batch's norm_chunks in its place. Given: grad_scale and the sums.
    square_sums: Callable[[Batch, Tensor | None, Tensor], None]
    # reference.clip. Given: sums, max_grad_norm, and what counts norms that skip the step, None if none does.
    clip: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    # Brings in all that such steps run, with or without grad_scale, found_inf and clip. It is called for all
    # batches before anything is written, so that a compiler's error changes nothing.
    load: Callable[[BatchKey, bool, bool, bool], Any] = lambda key, scaled, skippable, clips: None
    steps_all_at_once: bool = True  # whether ``step`` makes all of a batch or nothing, whatever interrupts it


def uploaded(
    held: dict[Any, Tensor], device: torch.device, keys: Iterable[Any], make: Callable[[Any], Tensor]
) -> list[Tensor]:
    """``held[key]`` for each of ``keys``, on ``device``, made in this order where it is missing; the host
    does not wait for a copy. Its memory is not given away before what this stream has yet to do is done."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    # Not the streams are compared: that runs Python, five times a step.
    handle = None if stream is None else stream.cuda_stream
    capturing = stream is not None and torch.cuda.is_current_stream_capturing()
    for key in keys:
        if key not in held:
            made = source = make(key)
            if device.type != source.device.type:
                pinned = source.pin_memory()
                made = pinned.to(device, non_blocking=True)
                vars(made)["source"] = pinned  # a captured copy reads it at each replay
            if stream is not None:
                vars(made).update(handle=handle, captured=capturing)
            held[key] = made
        elif stream is not None and not capturing and handle != vars(held[key])["handle"]:
            held[key].record_stream(stream)
    return [held[key] for key in keys]


def valid_now(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what a capture uploaded, which gets its values when the graph is replayed."""
    return {key: t for key, t in held.items() if not vars(t).get("captured", False)}


def tables_on(batch: Batch, *names: str) -> list[Tensor]:
    """Of a batch's tables, which are its attributes, those named, in the memory of its device."""
    return uploaded(batch.on_device, batch.key.device, names, partial(getattr, batch))


def table_on(batch: Batch, chunk_size: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
    """The batch's rows, gradients, chunks and counters in the memory of its device, and memory for each
    counter's coefficients. Chunks, 26 MiB of them for seven billion parameters, are made there."""
    held, device = batch.on_device, batch.key.device

    def make(name: str) -> Tensor:
        if name == "chunks":
            return batch.chunks_of(held["rows"], held["grads"], chunk_size)
        if name == "coefficients":
            return torch.empty(len(batch.counters) * columns, dtype=dtype, device=device)
        table: Tensor = getattr(batch, name)
        return table

    return uploaded(held, device, ("rows", "grads", "chunks", "counters", "coefficients"), make)
