"""What an optimizer keeps in memory, in bytes, counted from the tensors themselves."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """Bytes, by what they are for. ``str()`` of it is a table.

    Attributes:
        numel: elements of all parameters.
        parameters: the parameters.
        gradients: those that there are now.
        moments: both moments, with the block exponents of 8-bit ones.
        master: what is left of master weights beside a split parameter.
        metadata: step numbers, tables of addresses, padding of flat buffers, dense copies.
    """

    numel: int
    parameters: int
    gradients: int
    moments: int
    master: int
    metadata: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.moments + self.master + self.metadata

    def per_parameter(self) -> dict[str, float]:
        """Bytes for each element of the parameters, by part, and their ``"total"``."""
        parts = [field.name for field in fields(self) if field.name != "numel"]
        return {name: getattr(self, name) / max(self.numel, 1) for name in (*parts, "total")}

    def __str__(self) -> str:
        lines = [f"{'':12}{'bytes':>16}{'a parameter':>14}"]
        for name, each in self.per_parameter().items():
            lines.append(f"{name:12}{getattr(self, name):16,}{each:14.2f}")
        return "\n".join(lines)


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of the tensors' elements."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def memory_of(params: list[Tensor], state: dict[Any, Any], other: int) -> Memory:
    """Count what there is now; ``other``: bytes that are neither in parameters nor in states."""
    items = [(k, t) for s in state.values() for k, t in s.items() if isinstance(t, Tensor)]
    steps = {id(t): t for k, t in items if k == "step"}.values()
    return Memory(
        numel=sum(p.numel() for p in params),
        parameters=nbytes(*params),
        gradients=nbytes(*(p.grad for p in params)),
        moments=nbytes(*(t for k, t in items if k not in ("step", "remainder"))),
        master=nbytes(*(t for k, t in items if k == "remainder")),
        metadata=nbytes(*steps) + other,
    )
