"""Tensors of any number, layout and dtype -> the table of addresses that kernels walk.

An :class:`Operands` is one parameter's tensors, all dense and with equal strides, so
that its elements can be walked in memory order. A :class:`Batch` holds all operands
that one launch can take, as a table:

- ``rows``, int64 ``[n, 10]``: numel, counter, the addresses of the gradient, the parameter, the
  two moments, and of these three's second parts (0 for none; see :class:`~.storage.Format`), and
  the key of the parameter's random bits. Neighbours in a flat buffer share one row.
- ``chunks``, int32 ``[n, 2]``: row and chunk number, one for each program of a launch.
- ``counters``, int64 ``[n, 2]``: the address of a step number, and the row of
  hyperparameters that goes with it.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .memory import nbytes
from .rules import Rule
from .storage import Format, Formats, plain_format

ROW_COLUMNS = (
    "numel", "counter", "grad", "param", "mu", "nu", "param_extra", "mu_extra", "nu_extra", "key"
)  # fmt: skip
ADDRESSES = slice(ROW_COLUMNS.index("grad"), ROW_COLUMNS.index("key"))
GRAD_COLUMN = ROW_COLUMNS.index("grad")
VECTOR_BYTES = 16
"""What a full chunk's addresses must be multiples of: one 128-bit access."""


def int64_tensor(values: Sequence[int]) -> Tensor:
    """A CPU tensor of Python integers; 20 times as fast as ``torch.tensor(list)``."""
    return (
        torch.frombuffer(array("q", values), dtype=torch.int64)
        if values
        else torch.empty(0, dtype=torch.int64, device="cpu")
    )


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill their memory with no gaps and no overlap, in any order."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape)):
        if size == 0:
            return True
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same memory order."""
    return all(x == y or n <= 1 for x, y, n in zip(a.stride(), b.stride(), a.shape))


def _not_lazy(t: Tensor) -> bool:
    """Neither a lazy conjugate nor a lazy negative."""
    return not (t.is_conj() or t.is_neg())


def check_parameter(name: str, p: Tensor) -> None:
    """Raise what is wrong with a parameter that has a gradient, naming it."""
    if plain_format(p.dtype) is None:
        raise NotImplementedError(
            f"parameter {name} has dtype {p.dtype}; supported are float32, float64, bfloat16, "
            "float16, complex64 and complex128"
        )
    check_address(f"parameter {name}", p)


def check_grad(name: str, p: Tensor, g: Tensor) -> None:
    """Raise what is wrong with a gradient, naming its parameter."""
    if g.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of parameter {name} is sparse, which is not supported; "
            "give a dense one (p.grad.to_dense())"
        )
    if g.shape != p.shape:
        raise RuntimeError(
            f"the gradient of parameter {name} has shape {tuple(g.shape)}, "
            f"its parameter {tuple(p.shape)}; they must be equal"
        )
    if g.device != p.device:
        raise RuntimeError(
            f"the gradient of parameter {name} is on {g.device}, its parameter on {p.device}; "
            "they must be on the same device"
        )
    if g.is_complex() != p.is_complex() or not (g.is_floating_point() or g.is_complex()):
        raise RuntimeError(
            f"the gradient of parameter {name} has dtype {g.dtype}, its parameter {p.dtype}; "
            "both must be real floating-point or both complex"
        )
    check_address(f"the gradient of parameter {name}", g)


def _real_size(t: Tensor) -> int:
    return t.element_size() // (2 if t.is_complex() else 1)


def misaligned(t: Tensor) -> bool:
    """Whether the address is not a multiple of the element size."""
    return t.data_ptr() % _real_size(t) != 0


def check_address(what: str, t: Tensor) -> None:
    """Raise a ValueError where a kernel cannot read what lies there, naming it."""
    if t.numel() and t.data_ptr() == 0:
        raise ValueError(
            f"{what} has no memory of its own: its storage was freed, or it is a tensor subclass "
            "that holds others"
        )
    if misaligned(t):
        raise ValueError(
            f"{what} lies at address {t.data_ptr():#x}, which is not a multiple of its "
            f"element size, {_real_size(t)} bytes"
        )


def check_no_overlap(named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise a ValueError that names two parameters which share memory, or one whose own
    elements do."""
    spans = []
    for name, p in named:
        if p.layout is not torch.strided or p.numel() == 0 or p.device.type == "meta":
            continue
        last = sum((n - 1) * s for n, s in zip(p.shape, p.stride()))
        if _strides_collide(p) and len(set(_offsets(p).tolist())) != p.numel():
            raise ValueError(
                f"parameter {name} overlaps itself: several of its elements share memory (strides "
                f"{p.stride()}); give a tensor with memory of its own, p.contiguous()"
            )
        start = p.data_ptr()
        spans.append((str(p.device), start, start + (last + 1) * p.element_size(), name, p))
    spans.sort(key=lambda span: span[:3])
    for i, (device, _, end, name, p) in enumerate(spans):
        for k in range(i + 1, len(spans)):
            other_device, other_start, _, other_name, other = spans[k]
            if other_device != device or other_start >= end:
                break
            if (is_dense(p) and is_dense(other)) or _share_a_byte(p, other):
                raise ValueError(
                    f"parameters {name} and {other_name} overlap in memory; "
                    "give each parameter once, with memory of its own"
                )


def _strides_collide(t: Tensor) -> bool:
    """Whether a stride is so small that elements might share memory."""
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _offsets(t: Tensor) -> Tensor:
    """Where each element is, in elements from the first."""
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for n, s in zip(t.shape, t.stride()):
        offsets = offsets[..., None] + torch.arange(n, device="cpu") * s
    return offsets.reshape(-1)


def _share_a_byte(a: Tensor, b: Tensor) -> bool:
    def addresses(t: Tensor) -> Tensor:
        byte = torch.arange(t.element_size(), device="cpu")
        return (t.data_ptr() + _offsets(t)[:, None] * t.element_size() + byte).reshape(-1)

    return bool(torch.isin(addresses(a), addresses(b)).any())


@dataclass
class Operands:
    """One parameter's tensors, dense and of equal strides; complex ones as real pairs."""

    param: Tensor
    mu: Tensor
    nu: Tensor
    extras: tuple[Tensor | None, Tensor | None, Tensor | None]
    """The second parts of the parameter, ``mu`` and ``nu``, in formats that have one."""
    step: Tensor
    """0-dim int64: the number of steps that this parameter has made."""
    grad_source: weakref.ref[Tensor]
    """The gradient: not kept alive, since users drop gradients to save memory."""
    grad_copy: Tensor | None = None
    """Memory for the gradient in the parameter's layout, where it has another."""
    param_source: Tensor | None = None
    """The parameter itself, where ``param`` is memory for a dense copy of it."""
    position: int = 0
    """Which of the step's gradients is this one's."""
    hyper_row: int = 0
    random_key: int = 0
    slot: tuple[int, int] | None = None
    """With ``flatten``: (start, end) in its flat buffers, in real elements, padding included."""
    history: object = None
    """Equal for parameters that are known to have equal step numbers."""

    @property
    def grad(self) -> Tensor:
        grad = self.grad_source() if self.grad_copy is None else self.grad_copy
        assert grad is not None
        return torch.view_as_real(grad) if grad.is_complex() else grad

    @property
    def staged(self) -> bool:
        return self.param_source is not None or self.grad_copy is not None

    def load_sources(self) -> None:
        if self.param_source is not None:
            _complex_like(self.param_source, self.param).copy_(self.param_source)
        if self.grad_copy is not None:
            source = self.grad_source()
            assert source is not None
            self.grad_copy.copy_(source)

    def store_sources(self) -> None:
        if self.param_source is not None:
            self.param_source.copy_(_complex_like(self.param_source, self.param))


def _complex_like(like: Tensor, values: Tensor) -> Tensor:
    """``values`` as complex numbers where ``like`` is complex."""
    return torch.view_as_complex(values) if like.is_complex() else values


def dense_like(p: Tensor, by_place: bool) -> Tensor:
    """``p`` itself where a kernel can walk it, else uninitialised dense memory for it.

    Args:
        by_place: whether the walk must go in the order of the logical index.
    """
    if (p.is_contiguous() if by_place else is_dense(p)) and _not_lazy(p):
        return p
    return torch.empty(p.shape, dtype=p.dtype, device=p.device)


def operands(
    p: Tensor,
    g: Tensor,
    param: Tensor,
    mu: Tensor,
    nu: Tensor,
    extras: tuple[Tensor | None, Tensor | None, Tensor | None],
    step: Tensor,
) -> Operands:
    """One parameter's operands.

    Args:
        p, g: the parameter and its gradient, in any layout.
        param: ``dense_like(p)``; ``mu`` and ``nu`` have its strides.
    """
    param_format, grad_format = plain_format(p.dtype), plain_format(g.dtype)
    assert param_format is not None
    working = param_format.working
    native = grad_format is not None and grad_format.working == working
    grad_copy = None
    if not (native and same_layout(g, param) and is_dense(g) and _not_lazy(g)):
        dtype = g.dtype if native else p.dtype if p.is_complex() else working
        grad_copy = torch.empty_strided(p.shape, param.stride(), dtype=dtype, device=g.device)
    param_source = None if param is p else p
    if p.is_complex():
        param, mu, nu = map(torch.view_as_real, (param, mu, nu))
    return Operands(param, mu, nu, extras, step, weakref.ref(g), grad_copy, param_source)


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
        self.staged = [o for o in items if o.staged]
        rows: list[int] = []
        self.first_item: list[int] = []
        previous: Operands | None = None
        by_place = Formats(key.param, key.mu, key.nu).index_dependent
        first = 0
        for i, o in enumerate(items):
            start = 0 if o.slot is None else o.slot[0]
            if previous is not None and not by_place and _continues(previous, o):
                rows[-len(ROW_COLUMNS)] = start - first + o.param.numel()
            else:
                self.first_item.append(i)
                first = start
                addresses = (0 if t is None else t.data_ptr() for t in _in_row(o))
                rows += (o.param.numel(), i, *addresses, o.random_key)
            previous = o
        self.rows = int64_tensor(rows).view(-1, len(ROW_COLUMNS))
        self.numel = sum(o.param.numel() for o in items)
        self.counters = int64_tensor([x for o in items for x in (o.step.data_ptr(), o.hyper_row)]).view(-1, 2)
        self._chunks: dict[int, Tensor] = {}
        self.on_device: dict[str, Tensor] = {}
        """Where a GPU backend keeps its copies of the table; emptied when rows change."""

    @property
    def table_bytes(self) -> int:
        """Memory of the table, on the host and on the device."""
        return nbytes(self.rows, self.counters, *self._chunks.values(), *self.on_device.values())

    @property
    def copy_bytes(self) -> int:
        """Memory for what kernels cannot walk where it lies."""
        grads = (o.grad_copy for o in self.items)
        return nbytes(*grads, *(o.param for o in self.items if o.param_source is not None))

    def take_grads(self, grads: list[Tensor], moved: bool) -> None:
        """Take new gradients of the same dtype and layout, at other addresses if ``moved``."""
        for o, g in zip(self.items, grads):
            o.grad_source = weakref.ref(g)
        if not moved:
            return
        aligned = self._aligned()
        self.rows[:, GRAD_COLUMN] = int64_tensor([self.items[i].grad.data_ptr() for i in self.first_item])
        self.on_device.pop("rows", None)
        if not torch.equal(aligned, self._aligned()):
            self._chunks.clear()
            self.on_device.pop("chunks", None)

    def _aligned(self) -> Tensor:
        """Which rows a full chunk can be taken of."""
        return (self.rows[:, ADDRESSES] % VECTOR_BYTES == 0).all(1)

    def chunks(self, size: int) -> Tensor:
        """Rows cut into chunks of ``size`` elements: int32 ``[n, 2]`` of (row, chunk).

        The chunk number is complemented (``~chunk``, negative) where the chunk is short
        or an address of its row is not a multiple of 16 bytes.
        """
        if size not in self._chunks:
            numel = self.rows[:, 0]
            count = (numel + size - 1) // size
            row = torch.repeat_interleave(torch.arange(len(count), device="cpu"), count)
            chunk = torch.arange(len(row), device="cpu") - torch.repeat_interleave(
                count.cumsum(0) - count, count
            )
            whole = self._aligned()[row] & ((chunk + 1) * size <= numel[row])
            self._chunks[size] = torch.stack([row, torch.where(whole, chunk, ~chunk)], 1).int()
        return self._chunks[size]


def _in_row(o: Operands) -> tuple[Tensor | None, ...]:
    """What a row holds the addresses of, in its order."""
    return (o.grad, o.param, o.mu, o.nu, *o.extras)


def _continues(a: Operands, b: Operands) -> bool:
    """Whether ``b`` follows ``a`` in the same flat buffers and steps just like it."""
    if a.slot is None or b.slot is None or a.slot[1] != b.slot[0]:
        return False
    if a.hyper_row != b.hyper_row or a.history != b.history:
        return False
    elements = b.slot[0] - a.slot[0]
    return all(
        y.data_ptr() - x.data_ptr() == elements * x.element_size()
        for x, y in zip(_in_row(a), _in_row(b))
        if x is not None and y is not None
    )
