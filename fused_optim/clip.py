"""Clipping inside the step: the norm of all gradients, and the coefficient that it gives.

The sums of squares lie one after another in the order of parameters, whatever batch and device steps them,
and are added up by :func:`~.reference.tree_sum`: the norm has the same bits in every backend and layout.
Processes that have shards of DTensors add up their totals likewise, in the order of their places in the mesh.
"""

import math
from itertools import accumulate
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from .backends import Backend, Inputs, uploaded
from .layout import is_counted_here
from .reference import NORM_CHUNK
from .table import Batch

Devices = dict[torch.device, Inputs]


class Clipping:
    """What a plan needs to clip: where each chunk's sum of squares goes."""

    def __init__(
        self, batches: list[tuple[Backend, Batch]], max_grad_norm: float | None, skipped: Tensor | None,
        mesh: Any = None,
    ) -> None:  # fmt: skip
        """``skipped``: counts the steps that a non-finite norm skips, None if it skips none. ``mesh``: of
        DTensors, whose processes add up their totals."""
        items = sorted((o for _, batch in batches for o in batch.items), key=lambda o: o.number)
        *firsts, self._n_sums = accumulate((-(-o.stored[0].numel() // NORM_CHUNK) for o in items), initial=0)
        for _, batch in batches:
            row, chunk = batch.chunks(NORM_CHUNK).long().unbind(1)
            first = torch.tensor([firsts[o.number] for o in batch.items], device="cpu")
            place = first[row] + torch.where(chunk < 0, ~chunk, chunk)
            batch.norm_chunks = torch.stack([row, chunk, place], 1).int()
        self._batches = batches
        limit = math.inf if max_grad_norm is None else max_grad_norm
        self._limit = torch.tensor(limit, dtype=torch.float64, device="cpu")
        self._limits: dict[torch.device, Tensor] = {}
        self.skipped, self._mesh = skipped, mesh
        elsewhere = [o.number for o in items if mesh is not None and not is_counted_here(o.source, mesh)]
        ends = [*firsts, self._n_sums]
        self._elsewhere = [slice(ends[i], ends[i + 1]) for i in elsewhere]
        if items:
            self._device = items[0].source.device
            self._backend = next(backend for backend, batch in batches if batch.key.device == self._device)
            self.skipped = None if skipped is None else skipped.to(self._device)

    def __call__(self, inputs: Devices) -> tuple[Devices, Tensor]:
        """``inputs`` with ``clip``, and the norm. Gradients are where kernels read them."""
        if not self._batches:
            return inputs, torch.zeros((), dtype=torch.float64, device="cpu")
        # Of several devices each has zeros in the places of the others' sums.
        make = torch.empty if len(inputs) == 1 else torch.zeros
        sums = {d: make(self._n_sums, dtype=torch.float64, device=d) for d in inputs}
        for backend, batch in self._batches:
            backend.square_sums(batch, inputs[batch.key.device].grad_scale, sums[batch.key.device])
        in_order = sums.pop(self._device)
        for others in sums.values():
            in_order += others.to(self._device)
        for part in self._elsewhere:  # what another process has too, and counts
            in_order[part] = 0
        [limit] = uploaded(self._limits, self._device, [self._device], lambda _: self._limit)
        for dim in reversed(range(self._mesh.ndim)) if self._mesh is not None else ():
            total = self._backend.clip(in_order, limit, None)[:1]
            totals = [torch.empty_like(total) for _ in range(self._mesh.size(dim))]
            torch.distributed.all_gather(totals, total, self._mesh.get_group(dim))
            in_order = torch.cat(totals)
        clip = self._backend.clip(in_order, limit, self.skipped)
        # A copy to the CPU is waited for: there the host reads it.
        on = {d: clip.to(d, non_blocking=d.type != "cpu") for d in inputs}
        return {d: each._replace(clip=on[d]) for d, each in inputs.items()}, clip[1]
