"""The CPU benchmark: one step against the memory's roof and against torch.

    python -m bench.cpu

Each figure is the median of interleaved runs on random data. The roof is a loop with the
same streams (reads four, writes three) in the same run. Every optimizer's result is compared
with eager, bit for bit, before anything is timed.
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
    folder = Path(tempfile.mkdtemp())
    source = Path(__file__).with_name("roof.cpp")
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

    flat, tiny, model = results.values()
    ratios = {
        f"{rule} on 2^26, of the roof's bandwidth": (flat["roof"] / flat[rule], 0.90)
        for rule in ("AdaBelief", "AdamaxW")
    }
    for rule in ("AdaBelief", "AdamaxW"):
        ratios[f"{rule} on 10,000 x 64, times torch AdamW fused"] = (
            tiny["torch AdamW fused"] / tiny[rule],
            25,
        )
        ratios[f"{rule} on GPT-2's list, of its own speed on one tensor"] = (
            model[f"{rule}, one tensor"] / model[rule],
            0.95,
        )
    ratios["AdamaxW on GPT-2's list, times torch Adamax foreach"] = (
        model["torch Adamax foreach"] / model["AdamaxW"],
        3,
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
