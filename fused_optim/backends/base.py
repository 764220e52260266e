"""What a backend is, and how a table gets to its device."""

from collections.abc import Callable, Mapping
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
    # Puts the sum of squares of each of the batch's norm_chunks in its place. Given: grad_scale, and the sums.
    square_sums: Callable[[Batch, Tensor | None, Tensor], None]
    # reference.clip. Given: sums, max_grad_norm, and what counts norms that skip the step, None if none does.
    clip: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    # Brings in all that such steps run, with or without grad_scale, found_inf and clip. It is called for all
    # batches before anything is written, so that a compiler's error changes nothing.
    load: Callable[[BatchKey, bool, bool, bool], Any] = lambda key, scaled, skippable, clips: None
    steps_all_at_once: bool = True  # whether ``step`` makes all of a batch or nothing, whatever interrupts it


def uploaded(
    held: dict[Any, Tensor], device: torch.device, makes: Mapping[Any, Callable[[], Tensor]]
) -> list[Tensor]:  # fmt: skip
    """``held[key]`` for each key of ``makes``, on ``device``, made in this order where it is missing; the host
    does not wait for a copy. Its memory is not given away before what this stream has yet to do is done."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    capturing = stream is not None and torch.cuda.is_current_stream_capturing()
    for key, make in makes.items():
        if key not in held:
            made = source = make()
            if device.type != source.device.type:
                pinned = source.pin_memory()
                made = pinned.to(device, non_blocking=True)
                vars(made)["source"] = pinned  # a captured copy reads it at each replay
            if stream is not None:
                vars(made).update(stream=stream, captured=capturing)
            held[key] = made
        elif stream is not None and not capturing and stream != vars(held[key])["stream"]:
            held[key].record_stream(stream)
    return [held[key] for key in makes]


def valid_now(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what a capture uploaded, which gets its values when the graph is replayed."""
    return {key: t for key, t in held.items() if not vars(t).get("captured", False)}


def tables_on(batch: Batch, *names: str) -> list[Tensor]:
    """Of a batch's tables, which are its attributes, those named, in the memory of its device."""
    return uploaded(batch.on_device, batch.key.device, {name: partial(getattr, batch, name) for name in names})


def table_on(batch: Batch, chunk_size: int) -> list[Tensor]:
    """The batch's rows, gradients, chunks and counters in the memory of its device. Chunks, 26 MiB of them for
    seven billion parameters, are made there."""
    held = batch.on_device
    makes: dict[str, Callable[[], Tensor]] = {
        "rows": lambda: batch.rows,
        "grads": lambda: batch.grads,
        "chunks": lambda: batch.chunks_of(held["rows"], held["grads"], chunk_size),
        "counters": lambda: batch.counters,
    }
    return uploaded(held, batch.key.device, makes)
