"""Tensors of any number, layout and dtype -> the table of addresses that kernels walk.

An :class:`Operands` is one parameter's tensors, all dense and with equal strides, so
that its elements can be walked in memory order. A :class:`Batch` holds all operands
that one launch can take, as a table:

- ``rows``, int64 ``[n, 10]``: numel, counter, the addresses of the gradient, the parameter, the two
  moments and of these three's auxiliary tensors (0 for none; see :class:`~.storage.Format`), and the
  key of the parameter's random bits. Neighbours in a flat buffer share one row.
- ``chunks``, int32 ``[n, 2]``: row and chunk number, one for each program of a launch.
- ``counters``, int64 ``[n, 2]``: the address of a step number, and the row of hyperparameters that
  goes with it. Parameters that have always stepped together share a step number, and so a counter.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rules import Rule
from .storage import Format, Formats

ROW_COLUMNS = (
    "numel", "counter", "grad", "param", "mu", "nu", "param_aux", "mu_aux", "nu_aux", "key"
)  # fmt: skip
GRAD_COLUMN = ROW_COLUMNS.index("grad")
ADDRESSES = slice(GRAD_COLUMN, ROW_COLUMNS.index("key"))
VECTOR_BYTES = 16
"""What a full chunk's addresses must be multiples of: one 128-bit access."""


def int64_tensor(values: Sequence[int]) -> Tensor:
    """A CPU tensor of Python integers; 20 times as fast as ``torch.tensor(list)``."""
    return (
        torch.frombuffer(array("q", values), dtype=torch.int64)
        if values
        else torch.empty(0, dtype=torch.int64, device="cpu")
    )


def finish(write: Callable[[], Any]) -> None:
    """Write to the end: what interrupts it is raised when it is done once more."""
    try:
        write()
    except BaseException:
        write()
        raise


@dataclass
class Operands:
    """One parameter's tensors as kernels see them: dense, of equal strides, complex ones as real pairs."""

    name: str
    source: Tensor
    """The parameter as the user has it."""
    dense: Tensor
    """It, or memory for a dense copy of it."""
    grad_copy: Tensor | None
    """Memory for the gradient in a dtype and layout that kernels can read, where its own is another."""
    state: dict[str, Any]
    keys: tuple[str, str]
    """Of the two moments in ``state``."""
    formats: Formats
    hyper_row: int
    random_key: int
    slot: tuple[int, int] | None = None
    """With ``flatten``: (start, end) in its flat buffers, in real elements, padding included."""

    @property
    def grad(self) -> Tensor:
        grad = self.source.grad if self.grad_copy is None else self.grad_copy
        assert grad is not None
        return _real(grad)

    @property
    def stored(self) -> tuple[Tensor, Tensor, Tensor]:
        """The parameter and its moments."""
        mu, nu = (_real(self.state[key]) for key in self.keys)
        return _real(self.dense), mu, nu

    @property
    def aux(self) -> list[Tensor | None]:
        """The auxiliary tensors of :attr:`stored`, in formats that have one."""
        parts = (format.aux_of(key) for key, format in zip(("", *self.keys), self.formats))
        return [None if part is None else self.state[part.key] for part in parts]

    @property
    def step(self) -> Tensor:
        """0-dim int64: the number of steps that this parameter has made."""
        step: Tensor = self.state["step"]
        return step

    @property
    def copies(self) -> bool:
        return self.dense is not self.source or self.grad_copy is not None

    def load_copies(self) -> None:
        if self.dense is not self.source:
            self.dense.copy_(self.source)
        if self.grad_copy is not None:
            assert self.source.grad is not None
            self.grad_copy.copy_(self.source.grad)

    def store_copies(self) -> None:
        if self.dense is not self.source:
            self.source.copy_(self.dense)


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


class BatchKey(NamedTuple):
    """What all operands of one launch have in common."""

    device: torch.device
    rule: Rule
    param: Format
    grad: Format
    mu: Format
    nu: Format


class Batch:
    """All operands of one launch, and their table."""

    def __init__(self, key: BatchKey, items: list[Operands]) -> None:
        self.key = key
        self.items = items
        self.copied = [o for o in items if o.copies]
        self.first_items: list[int] = []
        """The number of each row's first item."""
        rows: list[int] = []
        counter_of: dict[int, int] = {}
        counters: list[int] = []
        in_order = Formats(key.param, key.mu, key.nu).index_dependent
        previous: Operands | None = None
        first = 0
        for i, o in enumerate(items):
            counter = counter_of.setdefault(id(o.step), len(counter_of))
            if 2 * counter == len(counters):
                counters += (o.step.data_ptr(), o.hyper_row)
            start = 0 if o.slot is None else o.slot[0]
            if previous is not None and not in_order and _continues(previous, o):
                rows[-len(ROW_COLUMNS)] = start - first + o.stored[0].numel()
            else:
                self.first_items.append(i)
                first = start
                addresses = (0 if t is None else t.data_ptr() for t in _in_row(o))
                rows += (o.stored[0].numel(), counter, *addresses, o.random_key)
            previous = o
        self.rows = int64_tensor(rows).view(-1, len(ROW_COLUMNS))
        self.numel = sum(o.dense.numel() for o in items)
        self.counters = int64_tensor(counters).view(-1, 2)
        self._chunks: dict[int, Tensor] = {}
        self.on_device: dict[str, Tensor] = {}
        """Where a GPU backend keeps its copies of the table; emptied when rows change."""

    def store_copies(self) -> None:
        for o in self.copied:
            o.store_copies()

    def tensors(self) -> list[Tensor]:
        """The table, on the host and on the device, and copies of what kernels cannot walk as it is."""
        copies = [
            t for o in self.copied for t in (o.grad_copy, o.dense) if t is not None and t is not o.source
        ]
        return [self.rows, self.counters, *self._chunks.values(), *self.on_device.values(), *copies]

    def chunks(self, size: int) -> Tensor:
        """Rows cut into chunks of ``size`` elements: int32 ``[n, 2]`` of (row, chunk).

        A tail chunk, which is short or has an address in its row that is not a multiple of 16
        bytes, has its number complemented (``~chunk``, negative).
        """
        if size not in self._chunks:
            numel = self.rows[:, 0]
            count = (numel + size - 1) // size
            row = torch.repeat_interleave(torch.arange(len(count), device="cpu"), count)
            chunk = torch.arange(len(row), device="cpu") - torch.repeat_interleave(
                count.cumsum(0) - count, count
            )
            aligned = (self.rows[:, ADDRESSES] % VECTOR_BYTES == 0).all(1)
            full = aligned[row] & ((chunk + 1) * size <= numel[row])
            self._chunks[size] = torch.stack([row, torch.where(full, chunk, ~chunk)], 1).int()
        return self._chunks[size]


def _in_row(o: Operands) -> tuple[Tensor | None, ...]:
    """What a row holds the addresses of, in its order."""
    return (o.grad, *o.stored, *o.aux)


def _continues(a: Operands, b: Operands) -> bool:
    """Whether ``b`` follows ``a`` in the same flat buffers and steps just like it."""
    if a.slot is None or b.slot is None or a.slot[1] != b.slot[0]:
        return False
    if a.hyper_row != b.hyper_row or a.step is not b.step:
        return False
    elements = b.slot[0] - a.slot[0]
    return all(
        y.data_ptr() - x.data_ptr() == elements * x.element_size()
        for x, y in zip(_in_row(a), _in_row(b))
        if x is not None and y is not None
    )
