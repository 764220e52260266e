"""The memory's roofline: loops with the very reads and writes of a step, for three sizes of states. They
are providers like any other, interleaved with what is compared with them."""

import ctypes
import os
import subprocess
import tempfile
import zlib
from functools import cache, partial
from pathlib import Path

import torch

from .providers import Groups, Provider

SOURCE = Path(__file__).with_name("roofline.cpp")
_KINDS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}


@cache
def library() -> ctypes.CDLL:
    """roofline.cpp, compiled for this machine; kept among temporary files under its contents' hash."""
    command = [os.environ.get("CXX", "c++"), "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    name = f"{zlib.crc32(' '.join(command).encode() + SOURCE.read_bytes()):08x}"
    folder = Path(tempfile.gettempdir(), f"fused_optim_bench_{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    built = folder / f"roofline_{name}.so"
    if not built.exists():
        unfinished = built.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, str(SOURCE), "-o", str(unfinished)], check=True)
        unfinished.replace(built)
    return ctypes.CDLL(str(built))


class Streams:
    """A step's reads and writes: one loop on a CPU, three of torch's operators on a GPU."""

    def __init__(self, state_bytes: int, groups: Groups) -> None:
        n, first = sum(p.numel() for group in groups for p in group), groups[0][0]
        self.sizes, self.gpu = (first.element_size(), state_bytes), first.is_cuda
        kinds = [_KINDS[size] for size in self.sizes for _ in range(2)]
        self.streams = [torch.randint(0, 127, (n,), dtype=kind, device=first.device) for kind in kinds]
        self.moved = n * (3 * self.sizes[0] + 4 * state_bytes)

    def step(self) -> None:
        p, g, m, v = self.streams
        if self.gpu:
            p.add_(g)
            m.add_(1)
            v.add_(1)
            return
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in self.streams]
        library().streams(*pointers, ctypes.c_int64(len(p)), torch.get_num_threads(), *self.sizes)


_ALL = ("float32", "bfloat16", "float16")
ROOFLINES = {n: Provider(f"roofline, {n}-byte states", "", partial(Streams, n), dtypes=_ALL) for n in _KINDS}
"""By the bytes of an element of a state."""


def roofline_for(state_bytes_each: float) -> str:
    """The name of the loop whose states are nearest in size; a parameter has two."""
    return ROOFLINES[min(ROOFLINES, key=lambda n: abs(2 * n - state_bytes_each))].name
