"""A GPU for Triton that is the emulator of ``ptx``: kernels are specialised, compiled, cached and launched
as on a machine that has one, over tensors in the CPU's memory."""

import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ptx
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget


def _lies_in(t: Tensor, whole: Tensor) -> bool:
    return 0 <= t.data_ptr() - whole.data_ptr() < whole.numel() * whole.element_size()


class EmulatedGpu:
    """What Triton asks of a driver.

    Attributes:
        memory: gives the tensors that the next launch may read and write, beside those that it is given as
            arguments, and those that it may only read.
        kernels: those that were loaded.
        launched: the names of those that were launched.
        issued: how many instructions the last one's warps were issued.
    """

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, ptx.WARP)
        self.memory: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]] = lambda: ((), ())
        self.kernels: list[ptx.Kernel] = []
        self.launched: list[str] = []
        self.issued = 0
        self.utils = self
        self._ptx_file = ""
        triton.knobs.runtime.kernel_load_start_hook.add(self._loading)
        triton.runtime.driver.set_active(self)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 99 * 1024}  # less than any target has

    def _loading(self, module: Any, function: Any, name: str, files: dict[str, str], hash: str) -> None:
        self._ptx_file = files[f"{name}.ptx"]

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        with open(self._ptx_file) as file:
            (kernel,) = ptx.parse(file.read())
        self.kernels.append(kernel)
        registers, spills, most_threads = 0, 0, 1024
        return name, kernel, registers, spills, most_threads

    def unload_module(self, module: Any) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return partial(self._launch, list(source.signature.values()), metadata.shared, metadata.launch_pdl)

    def _launch(
        self, types: list[str], shared: int, overlaps: bool, x: int, y: int, z: int, stream: int,
        kernel: ptx.Kernel, packed_metadata: Any, launch_metadata: Any, enter: Any, leave: Any,
        *arguments: Any,
    ) -> None:  # fmt: skip
        assert (y, z) == (1, 1)
        if enter is not None:
            enter(launch_metadata)
        tensors, constants = self.memory()
        known = [*tensors, *constants]
        own = [a for a in arguments if isinstance(a, Tensor) and not any(_lies_in(a, k) for k in known)]
        packed = []
        for kind, argument in zip(types, arguments, strict=True):
            if kind.startswith("*"):
                packed.append(struct.pack("q", argument.data_ptr()))
            elif kind != "constexpr":
                packed.append(struct.pack({"i32": "i"}[kind], argument))
        packed += [struct.pack("q", 0)] * 2  # scratch memory, of which there is none
        self.issued = ptx.run(kernel, x, packed, [*tensors, *own], constants, shared, overlaps)
        self.launched.append(kernel.name)
