"""What a machine with a GPU must show: every backend's bits are eager's on the CPU.

    python -m bench.gpu_proofs --device cuda --backends triton,cuda

One line for each proof; the exit code is 1 if one fails. ``tests/test_on_gpu.py`` has the rest:
capture, streams, no waiting.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from fused_optim import AdaBelief, AdamaxW
from fused_optim.backends import BACKENDS

from .formats import FORMATS, Format

RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adabelief": (AdaBelief, {"weight_decay": 0.1}),
    "adabelief_nesterov": (AdaBelief, {"nesterov": True}),
    "adamaxw": (AdamaxW, {"weight_decay": 0.1}),
}
DTYPES = ("float32", "bfloat16", "float16", "float64")
SMALL = (0, 1, 7, 1023, 1025, 2049)
SIZES = (*SMALL, 1024, 4096, 12289, 1000003)


def tensors(sizes: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Random tensors; every third one begins one element past an aligned address."""
    rng = torch.Generator().manual_seed(seed)
    drawn = []
    for i, n in enumerate(sizes):
        t = torch.randn(n + 1, generator=rng).to(dtype)
        drawn.append(t[1:] if i % 3 == 2 else t[:-1])
    return drawn


def on(device: str, source: list[Tensor]) -> list[Tensor]:
    """Copies as far from an aligned address as their sources."""
    moved = []
    for t in source:
        offset = t.storage_offset()
        copy = torch.empty(t.numel() + offset, dtype=t.dtype, device=device)[offset:]
        moved.append(copy.copy_(t))
    return moved


def stepped(
    rule: str,
    format: Format,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    backend: str,
    flat: bool | Literal["static"],
) -> list[Tensor]:
    """Parameters and states after three steps, in two groups, the second with another lr."""
    optimizer_class, options = RULES[rule]
    params = [p.requires_grad_() for p in on(device, tensors(sizes, dtype, 0))]
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "lr": 1e-3}]
    groups = [group for group in groups if group["params"]]
    optimizer = optimizer_class(groups, lr=1e-2, backend=backend, flatten=flat, **options, **format.arguments)
    for step in range(3):
        for p, g in zip(params, on(device, tensors(sizes, dtype, step + 1))):
            # Where flatten has moved the gradients, they are written to.
            if p.grad is None:
                p.grad = g
            else:
                p.grad.copy_(g)
        optimizer.step()
    found = []
    for p in params:
        found.append(p.detach().cpu())
        states = optimizer.state[p]
        found += [states[key].cpu() for key in sorted(states) if isinstance(states[key], Tensor)]
    return found


def differing(got: list[Tensor], want: list[Tensor]) -> int:
    """Elements of other bits."""
    count = 0
    for a, b in zip(got, want, strict=True):
        a, b = a.contiguous().reshape(-1), b.contiguous().reshape(-1)
        if a.numel() != b.numel() or a.dtype != b.dtype:
            return max(a.numel(), b.numel())
        count += int((a.view(torch.uint8) != b.view(torch.uint8)).sum())
    return count


def bits(device: str, backends: list[str], small: bool) -> Iterator[tuple[str, str | None]]:
    """(what, what is wrong) of each combination."""
    for name in DTYPES[:2] if small else DTYPES:
        dtype = getattr(torch, name)
        for rule, (optimizer_class, _) in RULES.items():
            for format in FORMATS.values():
                plain = not format.arguments
                if not plain and format.why_not(optimizer_class, name) is not None:
                    continue
                sizes = SMALL if small or device == "cpu" else SIZES
                want = stepped(rule, format, sizes, dtype, "cpu", "eager", False)
                for backend in backends:
                    for flat in (False, True):
                        what = f"{rule} {name} {format.name} {backend} {'flat' if flat else 'list'}"
                        got = stepped(rule, format, sizes, dtype, device, backend, flat)
                        n = differing(got, want)
                        yield what, f"{n} bytes differ from eager's" if n else None


def many(device: str, backends: list[str]) -> Iterator[tuple[str, str | None]]:
    """Two thousand tiny tensors."""
    sizes = (33,) * (2000 if device == "cuda" else 40)
    want = stepped("adabelief", FORMATS["fp32"], sizes, torch.float32, "cpu", "eager", False)
    layouts: dict[str, bool | Literal["static"]] = {"list": False, "static": "static"}
    for backend in backends:
        for layout, flat in layouts.items():
            got = stepped("adabelief", FORMATS["fp32"], sizes, torch.float32, device, backend, flat)
            n = differing(got, want)
            what = f"{len(sizes)} tensors {backend} {layout}"
            yield what, f"{n} bytes differ from eager's" if n else None


def large(backends: list[str]) -> Iterator[tuple[str, str | None]]:
    """More than 2^31 elements: places beyond 32 bits have the bits that they have alone."""
    n, window = 2**31 + 4099, 65536
    need = n * 12 + 2**30
    if torch.cuda.mem_get_info()[0] < need:
        yield f"2^31 + 4099 elements: not tried, {need / 2**30:.0f} GiB are not free", None
        return
    for backend in backends:
        p = torch.empty(n, dtype=torch.bfloat16, device="cuda").normal_()
        p.grad = torch.empty_like(p).normal_()
        starts = (0, 2**31 - window // 2, n - window)
        alone = []
        for start in starts:
            q = p[start : start + window].cpu().requires_grad_()
            q.grad = p.grad[start : start + window].cpu()
            alone.append(q)
        optimizer, eager = AdaBelief([p], backend=backend), AdaBelief(alone, backend="eager")
        optimizer.step()
        eager.step()
        ours = [p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_var"]]
        wrong = 0
        for start, q in zip(starts, alone):
            parts = [t[start : start + window].detach().cpu() for t in ours]
            theirs = [q.detach(), eager.state[q]["exp_avg"], eager.state[q]["exp_avg_var"]]
            wrong += differing(parts, theirs)
        del p, optimizer, ours
        torch.cuda.empty_cache()
        yield f"2^31 + 4099 elements {backend}", f"{wrong} bytes differ from eager's" if wrong else None


def roof(device: str) -> Iterator[tuple[str, str | None]]:
    """The roof's loop does what it is timed for."""
    try:
        from .roof_kernel import same_streams
    except ImportError as error:
        yield "roof's loop", f"does not load: {error}"
        return
    p, g, m, v = (torch.randint(0, 50, (5001,), dtype=torch.int32, device=device) for _ in range(4))
    want = [t + g for t in (p, m, v)]
    same_streams(p, g, m, v)
    yield "roof's loop", None if all(map(torch.equal, (p, m, v), want)) else "has other sums"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--backends", required=True, help="names, with commas between")
    parser.add_argument("--small", action="store_true", help="a few small tensors only")
    arguments = parser.parse_args()
    device, failed, tried, ready = arguments.device, 0, 0, []
    for name in arguments.backends.split(","):
        reason = BACKENDS[name].why_not(torch.device(device))
        if reason is None:
            ready.append(name)
        else:
            failed += 1
            print(f"FAILED {name}: not ready: {reason}")

    def proofs() -> Iterator[tuple[str, str | None]]:
        yield from roof(device)
        yield from bits(device, ready, arguments.small)
        if not arguments.small:
            yield from many(device, ready)
            if device == "cuda":
                yield from large(ready)

    for what, wrong in proofs():
        tried += 1
        failed += wrong is not None
        print(f"FAILED {what}: {wrong}" if wrong else f"ok {what}", flush=True)
    print(f"{tried} proofs on {device}, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
