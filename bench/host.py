"""Our optimizers as ``bench host`` times them besides: with parts of the host's work replaced."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

from .providers import OUR_RULES, Groups, Provider, make_ours

RULE = next(iter(OUR_RULES))


class _NullGpu:
    """What Triton asks of a driver, for kernels that are compiled for sm_90 and launched nowhere."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target, self.utils = GPUTarget("cuda", 90, 32), self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 99 * 1024}

    def load_binary(self, *arguments: Any) -> tuple[Any, ...]:
        registers, spills, most_threads = 0, 0, 1024
        return "module", "function", registers, spills, most_threads

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None


def _make(backend: str, in_python: bool, groups: Groups) -> Any:
    """``backend`` "triton" and "cuda" launch nothing. ``in_python``: the package asks in Python where tensors
    are, as where its C++ was not built; a step on the CPU is C++ all the same."""
    from fused_optim.backends import BACKENDS, native

    if backend != "cpu":
        BACKENDS[backend] = dataclasses.replace(BACKENDS[backend], why_not=lambda device: None)
    if backend == "triton":
        import triton

        triton.runtime.driver.set_active(_NullGpu())
    if backend == "cuda":
        nothing = SimpleNamespace(load=id, step=lambda *given: 2, chunk_size=4096, coefficients_bytes=128)
        extension = native.extension
        vars(native)["extension"] = lambda name: (nothing, None) if name == "_cuda" else extension(name)
        vars(native)["_stream"] = lambda device: 0
    for name, module in list(sys.modules.items()) if in_python else []:
        if name.startswith("fused_optim.") and ".backends" not in name and hasattr(module, "extension"):
            vars(module)["extension"] = lambda name: (None, "hidden by the benchmark")
    return make_ours(RULE, backend, "fp32", "list", groups)


def _variant(backend: str, in_python: bool, what: str, rule: str = "") -> Provider:
    make = partial(_make, backend, in_python)
    kind = (rule, backend, "fp32", "list") if rule else ()
    return Provider(f"{OUR_RULES[RULE][0]} {what}", rule, make, "", ("cpu",), ("float32",), 1e-4, None, *kind)


HOST_VARIANTS = [
    _variant("cpu", True, "cpu fp32 list, addresses in Python", RULE),
    _variant("cuda", False, "cuda, launches nothing"),
]
if importlib.util.find_spec("triton") and os.environ.get("TRITON_INTERPRET") != "1":
    HOST_VARIANTS.append(_variant("triton", False, "triton, launches nothing"))
    HOST_VARIANTS.append(_variant("triton", True, "triton, launches nothing, addresses in Python"))
