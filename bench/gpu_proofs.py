"""What a machine with a GPU must show: every backend's bits are eager's on the CPU.

    python -m bench.gpu_proofs cuda triton,cuda [all | small | first | few]

``small``: small tensors alone. ``first``: of these, float32 and all in bfloat16. ``few``: four combinations, for
tools that make a step a hundred times slower. One line for each proof; the exit code is 1 if one fails.
``tests/test_on_gpu.py`` has capture, streams and waiting.
"""

import sys
from collections.abc import Iterator
from functools import partial
from itertools import chain

import torch

import fused_optim
from fused_optim.backends import BACKENDS

from .formats import OPTIONS
from .providers import LAYOUTS, OUR_RULES, make_ours
from .references import problem
from .worker import other_bits

Proof = tuple[str, str | None]
"""What was compared, and what is wrong."""
SMALL = (0, 1, 7, 1023, 1025, 2049)
SIZES = (*SMALL, 1024, 4096, 12289, 1000003)


FIRST = (("fp32", "float32"), ("bf16", "bfloat16"))
FEW = (("fp32", "float32"), ("split8-8bit", "bfloat16"))


def bits(device: str, backend: str, which: str) -> Iterator[Proof]:
    """Each rule, format and layout, and many tiny tensors."""
    small, few = which != "all", which == "few"
    chosen = {"first": FIRST, "few": FEW}.get(which)
    cases = [
        (rule, format, dtype, more, SMALL if small else SIZES)
        for rule in OUR_RULES
        if not few or rule != "adamw"
        for more in ({}, {"nesterov": True})
        if not more or (rule != "adamaxw" and chosen is None)
        for format, (_, dtypes) in OPTIONS.items()
        for dtype in dtypes
        if not small or dtype in ("float32", "bfloat16")
        if chosen is None or (format, dtype) in chosen
    ]
    if not small:
        cases.append(("adabelief", "fp32", "float32", {}, (33,) * 2000))
    for rule, format, dtype, more, sizes in cases:
        given = problem([(n,) for n in sizes], getattr(torch, dtype))
        eager = partial(make_ours, rule, "eager", format, "list", **more)
        for layout in LAYOUTS[:1] if few else LAYOUTS:
            ours = partial(make_ours, rule, backend, format, layout, **more)
            what = f"{rule} {dtype} {format} {layout} {more or ''} {backend}, {len(sizes)} tensors"
            yield what, other_bits(ours, eager, given, device)


def large(backend: str) -> Iterator[Proof]:
    """More than 2^31 elements: those at the ends and in the middle have the bits that they have alone."""
    n, window = 2**31 + 4099, 65536
    if torch.cuda.mem_get_info()[0] < 12 * n + 2**30:
        yield f"2^31 + 4099 elements: not tried, {12 * n >> 30} GiB are not free", None
        return
    p = torch.empty(n, dtype=torch.bfloat16, device="cuda").normal_()
    p.grad = torch.empty_like(p).normal_()
    parts = [slice(i, i + window) for i in (0, 2**31 - window // 2, n - window)]
    alone = [p[part].cpu().requires_grad_() for part in parts]
    for q, part in zip(alone, parts):
        q.grad = p.grad[part].cpu()
    ours = fused_optim.AdaBelief([p], backend=backend)
    eager = fused_optim.AdaBelief(alone, backend="eager")
    ours.step()
    eager.step()
    same = True
    for q, part in zip(alone, parts):
        same &= torch.equal(p[part].detach().cpu(), q.detach())
        for key in ("exp_avg", "exp_avg_var"):
            same &= torch.equal(ours.state[p][key][part].cpu(), eager.state[q][key])
    yield f"2^31 + 4099 elements {backend}", None if same else "has not eager's bits"


def main(device: str, backends: str, which: str = "all") -> int:
    tried = failed = 0
    for backend in backends.split(","):
        ready = (f"{backend} is ready", BACKENDS[backend].why_not(torch.device(device)))
        more = large(backend) if which == "all" else ()
        for what, wrong in chain([ready], () if ready[1] else chain(bits(device, backend, which), more)):
            tried, failed = tried + 1, failed + (wrong is not None)
            print(f"FAILED {what}: {wrong}" if wrong else f"ok {what}", flush=True)
    print(f"{tried} proofs on {device}, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
