"""The memory's roofs: copy, triad, and a loop with the very streams of a step.

They are providers like any other, so that they run in the same run, interleaved with what is
compared with them.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .providers import Groups, Provider, Stepper

SOURCE = Path(__file__).with_name("roof.cpp")
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


@cache
def library() -> ctypes.CDLL:
    """roof.cpp, compiled for this machine; kept among temporary files under its contents' hash."""
    command = [compiler() or "c++", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    name = hashlib.sha256(" ".join(command).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"fused_optim_bench_{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    built = folder / f"roof_{name}.so"
    if not built.exists():
        unfinished = built.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, str(SOURCE), "-o", str(unfinished)], check=True)
        unfinished.replace(built)
    return ctypes.CDLL(str(built))


@dataclass
class Loop:
    """A roof that has been made for a number of elements."""

    run: Callable[[], None]
    streams: list[Tensor]
    moved: int
    """Bytes read and written by one run."""

    def step(self) -> None:
        self.run()

    def zero_grad(self) -> None:
        pass

    def params(self) -> list[Tensor]:
        return []

    def state_bytes(self) -> int:
        return 0


def _on_cpu(function: str, streams: list[Tensor], *sizes: int) -> Callable[[], None]:
    call = getattr(library(), function)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in streams]
    n = ctypes.c_int64(len(streams[0]))
    numbers = [ctypes.c_int(i) for i in (torch.get_num_threads(), *sizes)]
    return lambda: call(*pointers, n, *numbers)


def _random(n: int, device: torch.device, element_bytes: int) -> Tensor:
    """Random bits, as integers of a size."""
    dtype = _INTEGERS[element_bytes]
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max, (n,), dtype=dtype, device=device)


def _size(groups: Groups) -> tuple[int, torch.device]:
    return sum(p.numel() for group in groups for p in group), groups[0][0].device


def _copy(groups: Groups) -> Stepper:
    n, device = _size(groups)
    to, source = torch.randn(n, device=device), torch.randn(n, device=device)
    run = _on_cpu("copy", [to, source]) if device.type == "cpu" else lambda: (to.copy_(source), None)[1]
    return Loop(run, [to, source], 8 * n)


def _triad(groups: Groups) -> Stepper:
    n, device = _size(groups)
    a, b, c = (torch.randn(n, device=device) for _ in range(3))
    if device.type == "cpu":
        return Loop(_on_cpu("triad", [a, b, c]), [a, b, c], 12 * n)
    return Loop(lambda: (torch.add(b, c, alpha=3.0, out=a), None)[1], [a, b, c], 12 * n)


def _streams(state_bytes: int) -> Callable[[Groups], Stepper]:
    def make(groups: Groups) -> Stepper:
        n, device = _size(groups)
        param_bytes = groups[0][0].element_size()
        sizes = (param_bytes, param_bytes, state_bytes, state_bytes)
        streams = [_random(n, device, size) for size in sizes]
        moved = n * (3 * param_bytes + 4 * state_bytes)
        if device.type == "cpu":
            return Loop(_on_cpu("streams", streams, param_bytes, state_bytes), streams, moved)
        from .roof_kernel import same_streams

        return Loop(lambda: same_streams(*streams), streams, moved)

    return make


@dataclass(frozen=True)
class Roof(Provider):
    """A loop of the memory's speed, in place of an optimizer."""

    def why_not(self, device: str, dtype: str) -> str | None:
        if device == "cpu" and compiler() is None:
            return "it is a loop in C++: there is no C++ compiler on the PATH"
        if device == "cuda" and importlib.util.find_spec("triton") is None:
            return "its loop needs Triton"
        return super().why_not(device, dtype)


STATE_BYTES = {"fp32": 4, "bf16": 2, "8bit": 1}
COPY = Roof("roof: copy", "", _copy, dtypes=tuple(ELEMENT_BYTES))
TRIAD = Roof("roof: triad", "", _triad, dtypes=tuple(ELEMENT_BYTES))
STREAMS = {
    states: Roof(
        f"roof: streams of a step, {states} states",
        "",
        _streams(size),
        dtypes=tuple(ELEMENT_BYTES),
        format=states,
    )
    for states, size in STATE_BYTES.items()
}
"""By the states' format."""
ROOFS = {roof.name: roof for roof in (COPY, TRIAD, *STREAMS.values())}


def streams_for(state_bytes_per_param: float) -> Roof:
    """The loop whose states are nearest in size."""
    nearest = min(STATE_BYTES, key=lambda name: abs(2 * STATE_BYTES[name] - state_bytes_per_param))
    return STREAMS[nearest]
