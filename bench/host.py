"""Our optimizers as ``bench host`` times them besides: with parts of the host's work replaced."""

import dataclasses
import importlib.util
import os
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

from .providers import OUR_RULES, Groups, Provider, make_ours

RULE = next(iter(OUR_RULES))


def _null_gpu() -> Any:
    """What Triton asks of a driver, for kernels that are compiled for sm_90 and launched nowhere."""
    from triton.backends.compiler import GPUTarget

    target, registers, spills, most_threads = GPUTarget("cuda", 90, 32), 0, 0, 1024
    return SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
        launcher_cls=lambda source, metadata: lambda *given: None,
        utils=SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 99 * 1024},
            load_binary=lambda *given: ("module", "function", registers, spills, most_threads),
        ),
    )


def _make(backend: str, in_python: bool, groups: Groups) -> Any:
    """``backend`` "triton" and "cuda" launch nothing. ``in_python``: the package asks in Python where tensors
    are, as where its C++ was not built; a step on the CPU is C++ all the same."""
    from fused_optim.backends import BACKENDS, native

    if backend != "cpu":
        BACKENDS[backend] = dataclasses.replace(BACKENDS[backend], why_not=lambda device: None)
    if backend == "triton":
        import triton

        triton.runtime.driver.set_active(_null_gpu())
    if backend == "cuda":
        nothing = SimpleNamespace(load=id, step=lambda *given: 2, chunk_size=4096, coefficients_bytes=128)
        extension = native.extension
        vars(native)["extension"] = lambda name: (nothing, None) if name == "_cuda" else extension(name)
        vars(native)["_stream"] = lambda device: 0
    for name, module in list(sys.modules.items()) if in_python else []:
        if name.startswith("fused_optim.") and ".backends" not in name and hasattr(module, "extension"):
            vars(module)["extension"] = lambda name: (None, "hidden by the benchmark")
    return make_ours(groups, RULE, backend, "fp32", "list")


def _variant(what: str, backend: str, in_python: bool = False, rule: str = "") -> Provider:
    kind = {"rule": rule, "backend": backend, "format": "fp32", "layout": "list"}
    name, make = f"{OUR_RULES[RULE][0]} {what}", partial(_make, backend, in_python)
    return Provider(name, rule, make, devices=("cpu",), dtypes=("float32",), **kind)


HOST_VARIANTS = [
    _variant("cpu fp32 list, addresses in Python", "cpu", True, RULE),
    _variant("cuda, launches nothing", "cuda"),
]
if importlib.util.find_spec("triton") and os.environ.get("TRITON_INTERPRET") != "1":
    HOST_VARIANTS.append(_variant("triton, launches nothing", "triton"))
    HOST_VARIANTS.append(_variant("triton, launches nothing, addresses in Python", "triton", True))
