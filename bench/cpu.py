"""The CPU benchmark: one step against the memory's roof and against torch.

    python -m bench.cpu

Each figure is the median of interleaved runs on random data. The roof is a loop with the
same streams (reads four, writes three) in the same run. Before anything is timed, parameters
after two steps are compared with eager, bit for bit, on tensors of these shapes cut to 1,000 a
dimension.

Gradients stay where they are from step to step but in the case that says otherwise.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_optim import AdaBelief, AdamaxW, __version__

GPT2 = [(50257, 768), (1024, 768)] + 12 * [
    (768,), (768,), (2304, 768), (2304,), (768, 768), (768,), (768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)
] + [(768,), (768,)]  # fmt: skip
Step = Callable[[], Any]
RULES = ("AdaBelief", "AdamaxW")


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    params = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def check(shapes: list[tuple[int, ...]]) -> None:
    """Raise unless the CPU backend gives eager's bits on tensors like these."""
    small = [tuple(min(n, 1000) for n in shape) for shape in dict.fromkeys(shapes)]
    for optimizer_class in (AdaBelief, AdamaxW):
        want = parameters(small)
        got = [p.detach().clone().requires_grad_() for p in want]
        for p, q in zip(want, got):
            q.grad = p.grad.clone()
        for params, backend in ((want, "eager"), (got, "cpu")):
            optimizer = optimizer_class(params, weight_decay=0.1, backend=backend)
            for _ in range(2):
                optimizer.step()
        assert all(map(torch.equal, want, got)), f"{optimizer_class.__name__} differs from eager"


def roof(n: int) -> Step:
    """A loop over ``n`` elements with the traffic of one float32 step."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise SystemExit("the roof is a loop in C++: there is no C++ compiler on the PATH")
    source = Path(__file__).with_name("roof.cpp")
    folder = Path(tempfile.mkdtemp())
    subprocess.run(
        [
            compiler,
            "-O3",
            "-march=native",
            "-fopenmp",
            "-shared",
            "-fPIC",
            str(source),
            "-o",
            str(folder / "roof.so"),
        ],
        check=True,
    )
    same_traffic = ctypes.CDLL(str(folder / "roof.so")).same_traffic
    shutil.rmtree(folder)
    streams = [torch.randn(n) for _ in range(4)]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in streams]

    def run(streams: list[Tensor] = streams) -> None:
        same_traffic(*pointers, ctypes.c_int64(n), ctypes.c_int(torch.get_num_threads()))

    return run


def interleaved(steps: dict[str, Step], repeats: int, warmup: int = 3) -> dict[str, float]:
    """The median of each step's time in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(warmup + repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def optimizers(shapes: list[tuple[int, ...]], peers: dict[str, Any]) -> dict[str, Step]:
    steps = {
        "AdaBelief": AdaBelief(parameters(shapes), weight_decay=0.1).step,
        "AdamaxW": AdamaxW(parameters(shapes)).step,
    }
    return steps | {name: make(parameters(shapes)).step for name, make in peers.items()}


def fresh_gradients() -> dict[str, Step]:
    """Steps that are each given new gradient tensors, as after ``zero_grad()``. Making them
    is in the time, and the same for all."""
    shapes = [tuple(-(-n // 16) for n in shape) for shape in GPT2]

    def step_of(make: Any) -> Step:
        params = parameters(shapes)
        gradients = [p.grad for p in params]
        optimizer = make(params)

        def step() -> None:
            optimizer.zero_grad()
            for p, g in zip(params, gradients):
                p.grad = g.clone()
            optimizer.step()

        return step

    return {
        "AdaBelief": step_of(AdaBelief),
        "AdamaxW": step_of(AdamaxW),
        "torch AdamW fused": step_of(fused_adamw),
    }


def fused_adamw(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, fused=True)


def foreach_adamax(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adamax(params, foreach=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=int, default=11, help="timed runs of each, interleaved (default: 11)"
    )
    parser.add_argument("--json", type=Path, help="write the medians and ratios here")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for shapes in ([(1000,)], [(64,)] * 100, GPT2):
        check(shapes)

    results: dict[str, dict[str, float]] = {}

    def measure(case: str, steps: dict[str, Step]) -> None:
        results[case] = interleaved(steps, arguments.repeats)

    n = 2**26
    measure("one tensor of 2^26", {"roof": roof(n), **optimizers([(n,)], {"torch AdamW fused": fused_adamw})})
    measure(
        "10,000 tensors of 64",
        optimizers(
            [(64,)] * 10000, {"torch AdamW fused": fused_adamw, "torch Adamax foreach": foreach_adamax}
        ),
    )
    total = sum(torch.Size(shape).numel() for shape in GPT2)
    gpt2 = {
        **optimizers(GPT2, {"torch AdamW fused": fused_adamw, "torch Adamax foreach": foreach_adamax}),
        "AdaBelief, flatten=True": AdaBelief(parameters(GPT2), weight_decay=0.1, flatten=True).step,
        "AdaBelief, one tensor": AdaBelief(parameters([(total,)]), weight_decay=0.1).step,
        "AdamaxW, one tensor": AdamaxW(parameters([(total,)])).step,
    }
    measure("GPT-2's 148 tensors", gpt2)

    measure("GPT-2's list with dimensions divided by 16, new gradients each step", fresh_gradients())

    flat, tiny, model, fresh = results.values()
    torch_fused, torch_foreach = "torch AdamW fused", "torch Adamax foreach"
    ratios = {f"{rule} on 2^26, of the roof's bandwidth": (flat["roof"] / flat[rule], 0.90) for rule in RULES}
    ratios |= {
        f"{rule} on 10,000 x 64, times {torch_fused}": (tiny[torch_fused] / tiny[rule], 25) for rule in RULES
    }
    ratios |= {
        f"{rule} on GPT-2's list, of its speed on one tensor": (
            model[f"{rule}, one tensor"] / model[rule],
            0.95,
        )
        for rule in RULES
    }
    ratios["AdaBelief on GPT-2's list, of flatten=True"] = (
        model["AdaBelief, flatten=True"] / model["AdaBelief"],
        0.95,
    )
    ratios[f"AdamaxW on GPT-2's list, times {torch_foreach}"] = (model[torch_foreach] / model["AdamaxW"], 3)
    ratios[f"AdaBelief, new gradients each step, times {torch_fused}"] = (
        fresh[torch_fused] / fresh["AdaBelief"],
        1,
    )

    print(
        f"fused_optim {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, CPU: {processor()}"
    )
    for case, medians in results.items():
        print(f"\n{case}")
        for name, median in medians.items():
            print(f"  {name:24} {median:10.2f} ms")
    print("\nratio (median of interleaved runs)                              measured   goal")
    for name, (ratio, goal) in ratios.items():
        print(f"  {name:60} {ratio:8.2f} {goal:6.2f}{'' if ratio >= goal else '   not reached'}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                {
                    "cpu": processor(),
                    "threads": torch.get_num_threads(),
                    "torch": torch.__version__,
                    "fused_optim": __version__,
                    "date": time.strftime("%Y-%m-%d"),
                    "repeats": arguments.repeats,
                    "milliseconds": results,
                    "ratios": {name: ratio for name, (ratio, _) in ratios.items()},
                },
                indent=1,
            )
            + "\n"
        )


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
