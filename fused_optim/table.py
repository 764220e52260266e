"""Tensors of any number, layout and dtype, as the table of addresses that kernels walk.

- ``rows``, int64 ``[n, 10]``: numel, counter, the addresses of the parameter, the two moments and of these
  three's auxiliary tensors (0 for none; see :class:`~.storage.Format`), the key of the parameter's random
  bits and, where it is a shard, the index of its first element in the whole parameter. Neighbours in a flat
  buffer share one row.
- ``grads``, int64 ``[n]``: the address of each row's gradient, which may be another one at each step.
- ``chunks``, int32 ``[n, 2]``: row and chunk number, one for each program of a launch.
- ``counters``, int64 ``[n, 2]``: the address of a step number, and the row of hyperparameters that
  goes with it. Parameters that have always stepped together share a step number, and so a counter.

A row whose gradient is missing has no chunks, and its counter counts in memory that nobody reads.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import gradient_of, local
from .rules import Rule
from .storage import Format, Formats

ROW_COLUMNS = (
    "numel", "counter", "param", "mu", "nu", "param_aux", "mu_aux", "nu_aux", "key", "offset",
)  # fmt: skip
ADDRESSES = slice(ROW_COLUMNS.index("param"), ROW_COLUMNS.index("key"))
VECTOR_BYTES = 16  # what a full chunk's addresses must be multiples of: one 128-bit access


def finish(write: Callable[[], Any]) -> None:
    """Write to the end: what interrupts it is raised when it is done once more."""
    try:
        write()
    except BaseException:
        write()
        raise


def int64_tensor(values: Sequence[int]) -> Tensor:
    """A CPU tensor of Python integers; 20 times as fast as ``torch.tensor(list)``."""
    if not values:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    return torch.frombuffer(array("q", values), dtype=torch.int64)


class BatchKey(NamedTuple):
    """What all operands of one launch have in common."""

    device: torch.device
    rule: Rule
    param: Format
    grad: Format
    mu: Format
    nu: Format

    @property
    def formats(self) -> Formats:
        return Formats(self.param, self.mu, self.nu)

    @property
    def names(self) -> tuple[str, ...]:  # of the rule and the formats, in every language
        return tuple(x.name for x in self[1:])


@dataclass
class Operands:
    """One parameter's tensors as kernels see them: dense, of equal strides, complex ones as real pairs."""

    name: str
    source: Tensor  # the parameter as the user has it, which may be a DTensor, as may be its state
    param_copy: Tensor | None  # memory for a dense copy of it, where kernels cannot walk its own
    grad_copy: Tensor | None  # memory for the gradient, where kernels cannot read its own
    owner: Any  # what has the states: the optimizer, once this is stepped, so what it lets go is not kept
    key: BatchKey
    hyper_row: int
    random_key: int
    offset: int = 0  # the index of its first element in the whole parameter; 0 where formats do not ask
    number: int = 0  # among the parameters that are stepped
    slot: tuple[int, int] = (0, 0)  # with flatten: start and end in its flat buffers, in real elements
    grad_optional: bool = False  # whether the same batch serves for steps in which the gradient is missing

    @property
    def state(self) -> dict[str, Any]:
        own: dict[str, Any] = self.owner.state[self.source]
        return own

    @property
    def dense(self) -> Tensor:
        """What kernels walk: what is here of the parameter, or the copy of it."""
        here: Tensor = local(self.source) if self.param_copy is None else self.param_copy
        return here

    @property
    def grad(self) -> Tensor | None:
        grad = local(self.source.grad) if self.grad_copy is None else self.grad_copy
        return None if grad is None else _real(grad)

    @property
    def stored(self) -> tuple[Tensor, Tensor, Tensor]:
        """The parameter and its moments."""
        mu, nu = (_real(local(self.state[key])) for key in self.key.rule.states)
        return _real(self.dense), mu, nu

    @property
    def aux(self) -> list[Tensor | None]:
        """The auxiliary tensors of :attr:`stored`, in formats that have one."""
        parts = (f.aux_of(key) for key, f in zip(("", *self.key.rule.states), self.key.formats))
        return [None if part is None else local(self.state[part.key]) for part in parts]

    @property
    def in_row(self) -> tuple[Tensor | None, ...]:
        """What a row holds the addresses of, in its order."""
        return (self.grad, *self.stored, *self.aux)

    def continues(self, before: "Operands") -> bool:
        """Whether this follows another in the same flat buffers and steps just like it."""
        a, b = before, self
        if a.slot[1] != b.slot[0] or a.hyper_row != b.hyper_row or a.state["step"] is not b.state["step"]:
            return False
        elements = b.slot[0] - a.slot[0]
        pairs = [(x, y) for x, y in zip(a.in_row, b.in_row) if x is not None and y is not None]
        return all(y.data_ptr() - x.data_ptr() == elements * x.element_size() for x, y in pairs)


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def _n_chunks(rows: Tensor, grads: Tensor, size: int) -> Tensor:
    """The number of chunks in each row: none where the gradient is missing."""
    return torch.where(grads >= VECTOR_BYTES, (rows[:, 0] + size - 1) // size, 0)


class Batch:
    """All operands of one launch, and their table."""

    def __init__(self, key: BatchKey, items: list[Operands], merged: bool = True) -> None:
        """``merged``: neighbours in a flat buffer share a row, if no format goes by the logical index."""
        self.key = key
        self.names = key.names
        self.items = items
        self._copied = [(o, o.param_copy) for o in items if o.param_copy is not None]
        self._copied_grads = [(o, o.grad_copy) for o in items if o.grad_copy is not None]
        self.has_copies = bool(self._copied or self._copied_grads)
        rows: list[list[int]] = []
        grads: list[int] = []
        firsts: list[Operands] = []
        counters: dict[int, tuple[int, int, int]] = {}
        counter_of: list[int] = []
        merged = merged and not key.formats.index_dependent
        for i, o in enumerate(items):
            step = o.state["step"]
            counter = counters.setdefault(id(step), (len(counters), step.data_ptr(), o.hyper_row))[0]
            counter_of.append(counter)
            numel = o.stored[0].numel()
            if i and merged and o.continues(items[i - 1]):
                rows[-1][0] = o.slot[0] - firsts[-1].slot[0] + numel
            else:
                firsts.append(o)
                grad, *addresses = (0 if t is None else t.data_ptr() for t in o.in_row)
                grads.append(grad)
                rows.append([numel, counter, *addresses, o.random_key, o.offset])
        self.grads = int64_tensor(grads)
        self.rows = int64_tensor([x for row in rows for x in row]).view(-1, len(ROW_COLUMNS))
        self.counters = int64_tensor([x for _, *pair in counters.values() for x in pair]).view(-1, 2)
        self._steps = self.counters[:, 0].clone()
        self._counter_of, self._numbers = int64_tensor(counter_of), int64_tensor([o.number for o in items])
        self._needed = torch.tensor([not o.grad_optional for o in items], device="cpu")
        self.unread = torch.zeros((), dtype=torch.int64, device=key.device)  # steps of missing gradients
        followed = [(row, o.number) for row, o in enumerate(firsts) if o.grad_copy is None]
        self._followed = [int64_tensor(column) for column in zip(*followed)]
        self.numel = sum(o.dense.numel() for o in items)
        self._chunks: dict[int, Tensor] = {}
        self.norm_chunks = torch.empty(0, 3, dtype=torch.int32, device="cpu")  # see clip.py
        self.on_device: dict[str, Tensor] = {}  # a GPU backend's copies of the table
        self.prepared: tuple[Any, ...] = ()  # what its backend has worked out
        self._count_with(torch.tensor([o.grad is not None for o in items], device="cpu"))

    @torch.no_grad()
    def load_copies(self) -> None:  # of what kernels cannot walk as it is
        for o, copy in self._copied:
            copy.copy_(local(o.source))
        for o, copy in self._copied_grads:
            copy.copy_(gradient_of(o.source))

    @torch.no_grad()
    def store_copies(self) -> None:
        for o, copy in self._copied:
            local(o.source).copy_(copy)

    def follow(self, grads: Tensor, toggled: bool) -> bool:
        """Take the addresses of gradients that have moved: those of all parameters that are stepped. Where
        some came or went (``toggled``) of parameters that share a step number, and others not, this is False,
        and a new batch is needed."""
        if self._followed:
            rows, numbers = self._followed
            self.grads[rows] = grads[numbers]
            self.on_device.pop("grads", None)
        if not toggled:
            return True
        self._chunks, self.on_device, self.prepared = {}, {}, ()
        return self._count_with(self._needed | (grads[self._numbers] >= VECTOR_BYTES))

    def _count_with(self, present: Tensor) -> bool:
        """Advance the step numbers of the items whose gradients are ``present``, and no others."""
        n = len(self._steps)
        all_of = self._counter_of.bincount(minlength=n)
        present_of = self._counter_of[present].bincount(minlength=n)
        self.counters[:, 0] = torch.where(present_of > 0, self._steps, self.unread.data_ptr())
        return bool(((present_of == 0) | (present_of == all_of)).all())

    def tensors(self) -> list[Tensor]:
        """The table, on the host and on the device, and the dense copies."""
        copies = [copy for _, copy in (*self._copied, *self._copied_grads)]
        tables = [self.rows, self.grads, self.counters, self.norm_chunks, *self._chunks.values()]
        return [*tables, *self.on_device.values(), *copies]

    def chunks(self, size: int) -> Tensor:  # on the CPU
        if size not in self._chunks:
            self._chunks[size] = self.chunks_of(self.rows, self.grads, size)
        return self._chunks[size]

    def chunks_of(self, rows: Tensor, grads: Tensor, size: int) -> Tensor:
        """Rows cut into chunks of ``size`` elements: int32 ``[n, 2]`` of (row, chunk), on the device of
        ``rows`` and ``grads``, for which nothing waits. A tail chunk, which is short or has an address in its
        row that is not a multiple of 16 bytes, is ``~chunk``, negative; so is one of a row whose offset
        splits the eight neighbours that share random bits."""
        device, counts = rows.device, _n_chunks(rows, grads, size)
        total = int(_n_chunks(self.rows, self.grads, size).sum())
        row = torch.arange(len(rows), dtype=torch.int32, device=device)
        row = torch.repeat_interleave(row, counts, output_size=total)
        aligned = (rows[:, ADDRESSES] % VECTOR_BYTES == 0).all(1) & (grads % VECTOR_BYTES == 0)
        full = torch.where(aligned & (rows[:, -1] % 8 == 0), rows[:, 0] // size, 0)  # chunks of each row
        chunk = torch.arange(total, dtype=torch.int32, device=device) - (counts.cumsum(0) - counts).int()[row]
        return torch.stack([row, torch.where(chunk < full.int()[row], chunk, ~chunk)], 1)
