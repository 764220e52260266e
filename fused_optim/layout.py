"""How a tensor's elements lie in memory, and which tensors a kernel can be given."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy as is_uninitialized

from .storage import native_gradient, plain_format


def is_distributed(t: Any) -> bool:  # a DTensor
    return hasattr(t, "to_local") and hasattr(t, "placements")


def local(t: Any) -> Any:
    """What of a tensor lies in this process: a DTensor's local tensor; anything else itself."""
    if not is_distributed(t):  # asked so often that no_grad's 4 us for all were half of a new plan's time
        return t
    with torch.no_grad():  # else the local tensor would be a view to autograd
        return t.to_local()


def placed_alike(a: Any, b: Any) -> bool:
    """Whether two tensors are plain, or DTensors with equal meshes and placements."""
    if not (is_distributed(a) and is_distributed(b)):
        return is_distributed(a) == is_distributed(b)
    return bool(a.device_mesh == b.device_mesh and a.placements == b.placements)


def placed_like(p: Any, t: Tensor) -> Tensor:
    """A tensor like ``local(p)`` as a DTensor placed like ``p``, if that is one."""
    if not is_distributed(p):
        return t
    from torch.distributed.tensor import DTensor

    like = {"shape": p.shape, "stride": p.stride()}
    return DTensor.from_local(t, p.device_mesh, p.placements, run_check=False, **like)


def common_mesh(params: Iterable[Any]) -> Any:
    """The mesh of those that are DTensors, None if there are none. A ValueError if they have several."""
    meshes = list({id(p.device_mesh): p.device_mesh for p in params if is_distributed(p)}.values())
    for mesh in meshes[1:]:
        if mesh != meshes[0]:
            raise ValueError(
                f"max_grad_norm and skip_nonfinite need all DTensors on one mesh, got {meshes[0]} and {mesh}"
                "; clip before the step instead"
            )
    return meshes[0] if meshes else None


def is_counted_here(p: Any, mesh: Any) -> bool:
    """Whether this process is the first of those in the mesh that have the same part of a parameter."""
    placements = p.placements if is_distributed(p) else ()
    sharded = [not placement.is_replicate() for placement in placements] or [False] * mesh.ndim
    return all(x or place == 0 for x, place in zip(sharded, mesh.get_coordinate()))


def shard_of(p: Any, t: Any) -> Any:
    """Of a tensor like the whole ``p``, in any placement, what belongs to ``local(p)``. All processes that
    have a part of either must ask."""
    if is_distributed(t) and not placed_alike(p, t):
        t = t.redistribute(p.device_mesh, p.placements) if is_distributed(p) else t.full_tensor()
    elif is_distributed(p) and not is_distributed(t) and isinstance(t, Tensor) and t.shape == p.shape:
        from torch.distributed.tensor import distribute_tensor

        t = distribute_tensor(t, p.device_mesh, p.placements, src_data_rank=None)
    return local(t)


def first_index(name: str, p: Any) -> int:
    """The index in the whole parameter of its first element here: 0 unless it is a shard. Raises a ValueError
    where the elements here are not neighbours in the whole."""
    if not is_distributed(p):
        return 0
    first, rows = 0, p.shape[0] if p.dim() else 1
    neighbours = True
    for size, place, placement in zip(p.device_mesh.shape, p.device_mesh.get_coordinate(), p.placements):
        if size > 1 and not placement.is_replicate():
            # As torch.chunk cuts. What is strided is a subclass.
            neighbours &= type(placement).__name__ == "Shard" and placement.dim == 0
            most = -(-rows // size)
            first += min(place * most, rows)
            rows = max(0, min(most, rows - place * most))
    shape = local(p).shape
    if not neighbours or (p.dim() and shape != (rows, *p.shape[1:])):
        raise ValueError(
            f"parameter {name} has placements {p.placements}, and its formats round by an element's index in "
            "the whole parameter, for which a shard must be whole rows that follow each other, Replicate() "
            "or Shard(0); give state_format='fp32', master_weights=None or 'split16' and "
            "stochastic_rounding=False"
        )
    return int(first * math.prod(p.shape[1:]))


def span(t: Tensor) -> int:
    """Elements from the first to the last, gaps included."""
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride())) if t.numel() else 0


def _may_collide(t: Tensor) -> bool:
    """Whether a stride is so small that elements might share memory."""
    if t.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill their memory with no gaps and no overlap, in any order."""
    return t.is_contiguous() or (span(t) == t.numel() and not _may_collide(t))


def same_layout(a: Tensor, b: Tensor) -> bool:  # of tensors of one shape
    return all(x == y or n <= 1 for x, y, n in zip(a.stride(), b.stride(), a.shape))


def is_lazy(t: Tensor) -> bool:
    """Whether what lies in memory is the conjugate or the negative of the values."""
    return t.is_conj() or t.is_neg()


def dense_like(p: Tensor, in_order: bool) -> Tensor:
    """``p`` itself where a kernel can walk it (``in_order``: in the order of the logical index), else
    uninitialised dense memory for a copy of it."""
    if (p.is_contiguous() if in_order else is_dense(p)) and not is_lazy(p):
        return p
    return torch.empty(p.shape, dtype=p.dtype, device=p.device)


def has_nonzero_gradient(p: Any) -> bool:
    """Whether an element of the gradient is not zero, in any process's part of it."""
    total = p.grad.abs().sum()
    return bool((total.full_tensor() if is_distributed(total) else total) != 0)


def gradient_of(p: Any) -> Any:
    """What of the gradient belongs to ``local(p)``: that of a DTensor may be placed in another way."""
    g = p.grad
    return local(g if placed_alike(g, p) else g.redistribute(p.device_mesh, p.placements))


def gradient_is_native(g: Tensor, p: Tensor, dense: Tensor) -> bool:
    """Whether kernels read a gradient where it lies: its dtype is native, its layout that of ``dense``."""
    native = native_gradient(p.dtype, g.dtype) and same_layout(g, dense) and is_dense(g) and not is_lazy(g)
    # A lazy view of one element has no gaps, but a stride of its own.
    return native and (g.numel() > 1 or g.stride() == dense.stride())


def freed(t: Tensor) -> bool:
    """Whether a tensor's memory was given back (``untyped_storage().resize_(0)``), or never was its own."""
    return t.numel() != 0 and t.untyped_storage().data_ptr() == 0


def check_kind(name: str, p: Tensor, flatten: bool) -> None:
    """Raise where a new parameter is of a kind that cannot be stepped at all, naming it."""
    if is_uninitialized(p):
        return
    if flatten and is_distributed(p):
        raise ValueError(
            f"parameter {name} is a DTensor, whose memory flatten=True cannot move into a buffer; give "
            "flatten=False"
        )
    p = local(p)
    if p.device.type != "meta" and p.untyped_storage().device.type == "meta":
        raise TypeError(
            f"parameter {name} has no memory of its own to step ({type(p).__name__}); make the optimizer for "
            "real parameters: a FakeTensor's FakeTensorMode, say, must have ended before the model is made"
        )
    if flatten and p.device.type == "cpu" and not is_lazy(p) and p.untyped_storage().is_shared():
        raise ValueError(
            f"parameter {name} lies in shared memory, which flatten=True would move it out of; give "
            "flatten=False, or call share_memory() on what optimizer.unflatten() leaves"
        )


def check_address(what: str, t: Tensor) -> None:
    """Raise a ValueError where a kernel cannot read what lies there, naming it."""
    size = t.element_size() // (2 if t.is_complex() else 1)
    if freed(t):
        problem = "has no memory of its own: its storage was freed, or it is a subclass that holds others"
    elif t.data_ptr() % size != 0:
        problem = f"lies at address {t.data_ptr():#x}, not a multiple of its element size, {size} bytes"
    else:
        return
    raise ValueError(f"{what} {problem}")


def check_stepped(name: str, p: Any) -> None:
    """Raise what is wrong with a parameter that is stepped, or with the gradient if it has one, naming it."""
    if plain_format(p.dtype) is None:
        supported = "float32, float64, bfloat16, float16, complex64 and complex128"
        raise NotImplementedError(f"parameter {name} has dtype {p.dtype}; supported are {supported}")
    check_address(f"parameter {name}", local(p))
    g, problem = p.grad, None
    if g is None:
        return
    if g.layout != torch.strided:
        problem = "is sparse, which is not supported; give a dense one (p.grad.to_dense())"
    elif g.shape != p.shape:
        problem = f"has shape {tuple(g.shape)}, its parameter {tuple(p.shape)}; they must be equal"
    elif g.device != p.device:
        problem = f"is on {g.device}, its parameter on {p.device}; they must be on the same device"
    elif g.is_complex() != p.is_complex() or not (g.is_floating_point() or g.is_complex()):
        problem = f"has dtype {g.dtype}, its parameter {p.dtype}; both must be floating-point, or complex"
    elif is_distributed(g) != is_distributed(p):
        problem = (
            f"is a {type(g).__name__}, its parameter a {type(p).__name__}; both must be DTensors or none"
        )
    elif is_distributed(g) and g.device_mesh != p.device_mesh:
        problem = f"is on the mesh {g.device_mesh}, its parameter on {p.device_mesh}; they must be equal"
    if problem is not None:
        raise RuntimeError(f"the gradient of parameter {name} {problem}")
    check_address(f"the gradient of parameter {name}", local(g))


def check_no_overlap(named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise a ValueError that names two tensors which share memory, or one whose own elements do."""
    spans = []
    names: dict[int, str] = {}
    for name, t in named:
        if names.setdefault(id(t), name) != name:
            raise ValueError(f"{names[id(t)]} and {name} are the same tensor; give it once")
        t = local(t)
        if is_uninitialized(t) or t.layout is not torch.strided or t.numel() == 0 or t.data_ptr() == 0:
            continue
        if _may_collide(t) and len(set(_offsets(t).tolist())) != t.numel():
            raise ValueError(
                f"{name} overlaps itself: several of its elements share memory (strides "
                f"{t.stride()}); give a tensor with memory of its own, p.contiguous()"
            )
        start = t.data_ptr()
        spans.append((str(t.device), start, start + span(t) * t.element_size(), name, t))
    spans.sort(key=lambda entry: entry[:3])
    for i, (device, _, end, name, t) in enumerate(spans):
        for k in range(i + 1, len(spans)):
            other_device, other_start, _, other_name, other = spans[k]
            if other_device != device or other_start >= end:
                break
            if (is_dense(t) and is_dense(other)) or torch.isin(_bytes(t), _bytes(other)).any():
                raise ValueError(f"{name} and {other_name} overlap in memory; give each memory of its own")


def _offsets(t: Tensor) -> Tensor:  # of each element, in elements from the first
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for n, s in zip(t.shape, t.stride()):
        offsets = offsets[..., None] + torch.arange(n, device="cpu") * s
    return offsets.reshape(-1)


def _bytes(t: Tensor) -> Tensor:  # the addresses of all of its elements' bytes
    in_element = torch.arange(t.element_size(), device="cpu")
    return (t.data_ptr() + _offsets(t)[:, None] * t.element_size() + in_element).reshape(-1)
