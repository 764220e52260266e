"""Legal hyperparameters at their edges and any bits for values: eager against a restatement in NumPy that is
kept here, and every CPU backend, format, partition and number of threads against eager.

``FUSED_OPTIM_CASES`` says how many cases there are: 400 by default, 100,000 in ``make test-long``.
"""

import operator
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import BF16, F16, F32, F64, RULES, assert_same_bits, generated, plain
from hypothesis import strategies as st
from test_backends import cpu, placed, threads

from fused_optim.reference import MAX_COUNT

CASES = int(os.environ.get("FUSED_OPTIM_CASES", "400"))
BATCHES = 4
Array = Any

NUMBERS = st.sampled_from([0.0, 1e-45, 1e-30, 1e-16, 1e-8, 1e-3, 1.0, 1e4, 1e38, 1e300]) | st.floats(0, 1e10)
EDGES = st.sampled_from([0.0, 0.5, 0.9, 0.999, 1 - 2**-24, 1 - 2**-53, 5e-324])
BETAS = EDGES | st.floats(0, 1, exclude_max=True)
OPTIONS = st.fixed_dictionaries(
    {
        "lr": NUMBERS, "betas": st.tuples(BETAS, BETAS), "eps": NUMBERS, "weight_decay": NUMBERS,
        "maximize": st.booleans(), "decoupled_lr": st.booleans(),
    }
)  # fmt: skip
COUNTS = st.sampled_from([0, 1, 2, 157, 17319, 2**24, MAX_COUNT - 2, MAX_COUNT]) | st.integers(0, MAX_COUNT)
SEEDS = st.integers(0, 2**32 - 1)


def values(rng: Any, n: int, dtype: torch.dtype) -> torch.Tensor:
    """Any bits; ordinary numbers; and both: zeros, subnormal, huge, infinite and NaN among ordinary ones."""
    kind = rng.integers(3)
    bits = rng.integers(0, 256, (n, dtype.itemsize), dtype=np.uint8)
    any_bits = torch.from_numpy(bits).view(dtype).reshape(n)
    ordinary = torch.from_numpy(rng.standard_normal(n) * 10 ** rng.uniform(-8, 8, n)).to(dtype)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-39, 3.4e38, torch.inf, -torch.inf, torch.nan], dtype=F64)
    some = special.to(dtype)[torch.from_numpy(rng.integers(0, 8, n))]
    choice = torch.from_numpy(rng.random(n) < 0.1)
    return (any_bits, ordinary, torch.where(choice, some, ordinary))[kind]


# The rules once more, from the specification, in NumPy: one operation a line, in float32 or float64.


def power(base: Array, exponent: int) -> Array:
    result = np.float64(1)
    while exponent:
        if exponent & 1:
            result = result * base
        base, exponent = base * base, exponent >> 1
    return result


def restated(
    rule: str, p: Array, g: Array, m: Array, v: Array, count: int, o: dict[str, Any], reference_lr: float,
    corrected: Callable[[Array, Array], Array] = operator.truediv,
) -> tuple[Array, Array, Array]:  # fmt: skip
    w = p.dtype.type
    (b1, b2), lr, decay = o["betas"], np.float64(o["lr"]), np.float64(o["weight_decay"])

    def correction(beta: float, t: int) -> Array:
        return w(1) - w(power(np.float64(w(beta)), min(t, MAX_COUNT)))

    g = -g if o.get("maximize") else g
    t = min(count + 1, MAX_COUNT)
    m = w(1 - b1) * g + w(b1) * m
    eps, root = w(o["eps"]), w(o.get("eps_root", 0.0))
    if rule == "adabelief":
        e = g - m
        v = (w(1 - b2) * (e * e) + w(b2) * v) + root
    elif rule == "adamw":
        v = w(1 - b2) * (g * g) + w(b2) * v
    else:
        large, small = np.abs(g) + eps, w(b2) * v
        v = np.where((small > large) | np.isnan(small), small, large)
    m_hat = corrected(m, correction(b1, t))
    if o.get("nesterov"):
        look_ahead = w(b1) * corrected(m, correction(b1, t + 1))
        m_hat = look_ahead + w(1 - b1) * corrected(g, correction(b1, t))
    if rule == "adamaxw":
        u = m_hat / v
    else:
        under = corrected(v, correction(b2, t))
        u = m_hat / (np.sqrt(under + root if rule == "adamw" else under) + eps)
    decoupled = o.get("decoupled_lr", False)
    if decay != 0 and not decoupled:
        u = u + w(decay) * p
    new = p + w(-lr) * u
    if decay != 0 and decoupled:
        new = new - w(decay * (lr / np.float64(reference_lr))) * p
    return new, m, v


def made(rule: str, params: Any, options: dict[str, Any], root: float, **others: Any) -> Any:
    """An optimizer with legal options: decoupled_lr needs an lr other than 0, and AdamaxW has no eps_root."""
    options = {**RULES[rule].options, **options}
    options["decoupled_lr"] &= options["lr"] > 0
    if RULES[rule].reference != "adamaxw":
        options["eps_root"] = root
    return RULES[rule].optimizer(params, **options, **others), options


def restatement(
    rule: str, options: Any, root: float, count: int, steps: int, lr_later: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    dtype = (F32, F64)[seed % 2]
    p = torch.nn.Parameter(values(rng, 33, dtype))
    optimizer, given = made(rule, [p], options, root, backend="eager")
    reference_lr, name = given["lr"], RULES[rule].reference
    state = [p.detach().numpy().copy(), *(torch.zeros(33, dtype=dtype).numpy() for _ in range(2))]
    for k in range(steps):
        if k == 1:  # a number that a checkpoint may bring
            optimizer.state[p]["step"] = torch.tensor(count)
            optimizer.param_groups[0]["lr"] = given["lr"] = lr_later
        p.grad = values(rng, 33, dtype)
        t = k if k == 0 else min(count + k - 1, MAX_COUNT)
        with np.errstate(all="ignore"):
            state = list(restated(name, state[0], p.grad.numpy(), *state[1:], t, given, reference_lr))
        optimizer.step()
        got = [p.detach(), *(optimizer.state[p][key] for key in ("exp_avg", RULES[rule].nu))]
        assert_same_bits([plain(x) for x in got], [torch.from_numpy(x) for x in state], f"step {k}")


FORMATS = [
    (F32, {}), (F64, {}), (BF16, {}), (F16, {}), (F32, {"state_format": "bf16"}),
    (F32, {"state_format": "8bit"}), (BF16, {"master_weights": "split16"}),
    (BF16, {"master_weights": "split8", "state_format": "8bit"}), (BF16, {"stochastic_rounding": True}),
    (F16, {"state_format": "8bit"}),
]  # fmt: skip


def partitions(
    rule: str, options: Any, root: float, count: int, steps: int, lr_later: float, seed: int
) -> None:
    """The CPU's step against eager's. Plain formats: in other pieces too, at other addresses."""
    rng = np.random.default_rng(seed)
    dtype, chosen = FORMATS[seed % len(FORMATS)]
    n = int(rng.integers(1, 700))
    whole = values(rng, n, dtype)
    cut = int(rng.integers(0, n)) if not chosen else 0
    pieces = [[whole.clone()], [placed(t, (1,), int(rng.integers(0, 5))) for t in (whole[:cut], whole[cut:])]]
    results = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fused_optim.backends.native.CPU_CHUNK", 256)
        grads = [values(rng, n, dtype) for _ in range(steps)]
        for backend, tensors in zip(("eager", "cpu"), pieces):
            params = [torch.nn.Parameter(t) for t in tensors if backend == "eager" or t.numel() or not chosen]
            optimizer, _ = made(rule, params, options, root, backend=backend, flatten=seed % 3 == 0, **chosen)
            for k, g in enumerate(grads):
                parts = g.split([len(p) for p in params])
                for p, part in zip(params, parts):
                    p.grad = placed(part, (1,), int(rng.integers(0, 5))) if backend == "cpu" else part.clone()
                if k == 1:
                    for p in params:
                        optimizer.state[p]["step"] = torch.tensor(count)
                    optimizer.param_groups[0]["lr"] = lr_later
                with threads(1 + seed % 4 if backend == "cpu" else 1):
                    optimizer.step()
            states = [optimizer.state[p] for p in params]
            results.append([torch.cat([p.detach() for p in params])])
            results[-1] += [torch.cat([s[k] for s in states]) for k in sorted(states[0]) if k != "step"]
            results[-1].append(states[0]["step"])
    assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("batch", range(BATCHES))
@pytest.mark.parametrize("check", [restatement, pytest.param(partitions, marks=cpu)])
def test_cases(check: Any, batch: int, record_property: Callable[[str, object], None]) -> None:
    strategies = (st.sampled_from(list(RULES)), OPTIONS, NUMBERS, COUNTS, st.integers(1, 4), NUMBERS, SEEDS)
    n = generated(check, CASES // (2 * BATCHES), batch, *strategies)
    record_property("property cases", n)
