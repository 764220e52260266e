"""What the tests share: comparisons of bits, small models, and "raises and changes nothing"."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_optim import AdaBelief, AdamaxW

RULES = [AdaBelief, AdamaxW]
BACKENDS = ["eager", "cpu"]
"""The backends that the tests of bad input and of the optimizer's contract run over."""
SHAPES: list[tuple[int, ...]] = [(), (5,), (4, 5)]


def bits(t: Tensor) -> Tensor:
    """The bytes of a tensor's elements in logical order, every NaN written the same way."""
    t = t.detach().resolve_conj().resolve_neg()
    t = torch.view_as_real(t) if t.is_complex() else t
    t = t.cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
    if t.is_floating_point():
        t[t.isnan()] = torch.nan
    return t.view(torch.uint8)


def assert_same_bits(got: Any, want: Any, what: str = "value") -> None:
    """Compare nested lists, tuples and dicts of tensors and plain values, tensors bit for bit."""
    if isinstance(want, Tensor):
        assert isinstance(got, Tensor), f"{what}: {got!r} is no tensor"
        assert (got.dtype, got.shape) == (want.dtype, want.shape), f"{what}: {got.dtype}, {got.shape}"
        assert torch.equal(bits(got), bits(want)), f"{what}: {got} is not {want}"
    elif isinstance(want, dict):
        assert got.keys() == want.keys(), f"{what}: {got.keys()} is not {want.keys()}"
        for key in want:
            assert_same_bits(got[key], want[key], f"{what}[{key!r}]")
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want), f"{what}: {len(got)} is not {len(want)} long"
        for i, (a, b) in enumerate(zip(got, want)):
            assert_same_bits(a, b, f"{what}[{i}]")
    else:
        assert got == want, f"{what}: {got!r} is not {want!r}"


def parameters(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.nn.Parameter]:
    """Contiguous parameters of normal values."""
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.complex64 if dtype.is_complex else torch.float32
    return [torch.nn.Parameter(torch.randn(shape, generator=rng, dtype=drawn).to(dtype)) for shape in shapes]


def gradient(p: Tensor, seed: int) -> Tensor:
    """A contiguous gradient for ``p``: random sign, magnitudes 1e-3 to 1e1."""
    rng = torch.Generator().manual_seed(seed)

    def real() -> Tensor:
        size = 10 ** (4 * torch.rand(p.shape, generator=rng, dtype=torch.float64) - 3)
        return torch.where(torch.rand(p.shape, generator=rng) < 0.5, size, -size)

    return (torch.complex(real(), real()) if p.is_complex() else real()).to(p.dtype)


def set_gradients(params: Sequence[Tensor], seed: int, skip: Sequence[int] = ()) -> None:
    """Give every parameter a new gradient, but for those numbered in ``skip``."""
    for i, p in enumerate(params):
        p.grad = None if i in skip else gradient(p, 1000 * seed + i)


def train(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: int, first: int = 0) -> None:
    """Make ``steps`` steps with :func:`set_gradients` of the seeds from ``first`` on."""
    for seed in range(first, first + steps):
        set_gradients(params, seed)
        optimizer.step()


def copies(values: Any) -> Any:
    """Nested containers with every tensor cloned."""
    if isinstance(values, Tensor):
        return values.detach().clone()
    if isinstance(values, dict):
        return {key: copies(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [copies(value) for value in values]
    return copy.deepcopy(values)


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies of the parameters, their states and the count of steps."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "params": copies([p.data for p in params]),
        "states": [copies(dict(optimizer.state.get(p, {}))) for p in params],
        "count": optimizer.state_dict()["count"],
    }


def results(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """:func:`snapshot` and the groups' options: all that training may depend on."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return {**snapshot(optimizer), "groups": copies(groups)}


@contextlib.contextmanager
def raises_unchanged(
    optimizer: torch.optim.Optimizer, kind: type[Exception] | tuple[type[Exception], ...], *texts: str
) -> Iterator[None]:
    """The block raises ``kind`` with all ``texts`` in its message, and changes no bit of
    parameters, states and count."""
    before = snapshot(optimizer)
    with pytest.raises(kind) as caught:
        yield
    for text in texts:
        assert text in str(caught.value), f"{text!r} is not in {str(caught.value)!r}"
    assert_same_bits(snapshot(optimizer), before, "snapshot")


@contextlib.contextmanager
def raises_with(kind: type[Exception] | tuple[type[Exception], ...], *texts: str) -> Iterator[None]:
    """The block raises ``kind`` with all ``texts`` in its message."""
    with pytest.raises(kind, match="".join(f"(?=[^\\0]*{re.escape(text)})" for text in texts)):
        yield


def flat_like_plain(run: Callable[[bool], Any]) -> Any:
    """``run(False)``, which ``run(True)`` (that is, with ``flatten=True``) must equal bit for bit."""
    plain = run(False)
    assert_same_bits(run(True), plain, "flatten=True")
    return plain


def built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """A folder that ``build`` filled, shared by the workers of one pytest-xdist run."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, done = base / name, base / f"{name}.done"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            build(folder)
            done.touch()
    return folder
