"""What an optimizer keeps in memory, in bytes, counted from the tensors themselves."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .backends import Backend
    from .table import Batch


@dataclass(frozen=True)
class Memory:
    """Bytes, by what they are for. ``str()`` of it is a table.

    Attributes:
        numel: elements of all parameters.
        parameters: the parameters.
        gradients: those that there are now.
        moments: both moments, with the bases of 8-bit ones.
        master: master weights, or what is left of them beside a split parameter.
        metadata: step numbers, tables of addresses, padding of flat buffers.
        copies: memory for parameters and gradients that kernels cannot walk where they lie.
        step: what a step needs beside, and gives back; None for the eager backend, which makes
            temporary tensors as large as the largest parameter.
    """

    numel: int
    parameters: int
    gradients: int
    moments: int
    master: int
    metadata: int
    copies: int
    step: int | None

    @property
    def total(self) -> int:
        """All but ``step``."""
        return self.parameters + self.gradients + self.moments + self.master + self.metadata + self.copies

    def per_parameter(self) -> dict[str, float]:
        """Bytes for each element of the parameters, by part, and their ``"total"``."""
        parts = [f.name for f in fields(self) if f.name not in ("numel", "step")]
        return {name: getattr(self, name) / max(self.numel, 1) for name in (*parts, "total")}

    def __str__(self) -> str:
        lines = [f"{'':12}{'bytes':>16}{'a parameter':>14}"]
        for name, each in self.per_parameter().items():
            lines.append(f"{name:12}{getattr(self, name):16,}{each:14.2f}")
        step = "as large as parameters" if self.step is None else f"{self.step:,}"
        return "\n".join([*lines, f"{'in a step':12}{step:>16}"])


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of the tensors' elements."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def memory_of(
    params: list[Tensor],
    state: dict[Any, Any],
    batches: list[tuple[Backend, Batch]],
    padding: int,
    hyper: dict[Any, Tensor],
) -> Memory:
    """Count what there is now."""
    states = [s for s in state.values() if isinstance(s, dict)]
    master = sum(nbytes(s.get("master"), s.get("remainder")) for s in states)
    steps = nbytes(*{id(s.get("step")): s.get("step") for s in states}.values())
    moments = sum(
        nbytes(
            *(t for k, t in s.items() if isinstance(t, Tensor) and k not in ("master", "remainder", "step"))
        )
        for s in states
    )
    in_step = [backend.step_bytes(batch) for backend, batch in batches]
    tables = sum(batch.table_bytes for _, batch in batches) + nbytes(*hyper.values())
    return Memory(
        numel=sum(p.numel() for p in params),
        parameters=nbytes(*params),
        gradients=nbytes(*(p.grad for p in params)),
        moments=moments,
        master=master,
        metadata=steps + tables + padding,
        copies=sum(batch.copy_bytes for _, batch in batches),
        step=None if None in in_step else sum(n for n in in_step if n is not None),
    )
