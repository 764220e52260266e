"""Every storage format in Triton against eager, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_backends import DTYPES, RULES, Pair, guarded, strided, transposed, unaligned
from torch import Tensor

pytest.importorskip("triton")

PARAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("fp32", {}),
    "fp32_bf16": ("fp32_bf16", {}),
    "bf16": ("bf16", {}),
    "fp16": ("fp16", {}),
    "bf16_master": ("bf16", {"master_weights": "fp32"}),
    "fp16_master": ("fp16", {"master_weights": "fp32"}),
    "split16": ("bf16", {"master_weights": "split16"}),
    "split8": ("bf16", {"master_weights": "split8"}),
    "bf16_stochastic": ("bf16", {"stochastic_rounding": True}),
    "fp16_stochastic": ("fp16", {"stochastic_rounding": True}),
    "split16_fp32": ("bf16_fp32", {"master_weights": "split16"}),
    "fp16_stochastic_fp32": ("fp16_fp32", {"stochastic_rounding": True}),
}
params = pytest.mark.parametrize("param", PARAMS)
states = pytest.mark.parametrize("state", ["fp32", "bf16", "8bit"])
flat = pytest.mark.parametrize("flatten", [False, True], ids=["list", "flat"])
rules = pytest.mark.parametrize("rule", RULES)
ignore = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def pair(rule: str, param: str, state: str, shapes: Any, **options: Any) -> Pair:
    dtypes, extra = PARAMS[param]
    return Pair(rule, "triton", shapes, DTYPES[dtypes], state_format=state, **extra, **options)


SIZES = [(n,) for n in (0, 1, 7, 127, 128, 129, 1023, 1025, 2048, 4099)]


@rules
@params
@states
@flat
@ignore
def test_sizes(rule: str, param: str, state: str, flatten: bool) -> None:
    p = pair(rule, param, state, [*SIZES, (), (3, 5)], flatten=flatten, maximize=True)
    p.optimizer.seed = p.eager.seed = 0xFEDCBA98
    for _ in range(4):
        p.step()
    p.check()


@params
@states
@flat
@ignore
def test_tiny(param: str, state: str, flatten: bool) -> None:
    p = pair("adabelief", param, state, [(1 + i % 9,) for i in range(300)], flatten=flatten)
    p.step()
    p.step()
    p.check()


@params
@states
@flat
@ignore
@pytest.mark.parametrize("layout", [unaligned, strided, transposed])
def test_layouts(param: str, state: str, flatten: bool, layout: Any) -> None:
    place, check = guarded(layout)
    p = pair(
        "adamaxw", param, state, [(1025,), (33, 35), (2, 3, 5, 7), (4096,)], flatten=flatten, place=place
    )
    for _ in range(3):
        p.step()
    p.check()
    check()


@params
@states
@flat
@ignore
def test_groups_and_none(param: str, state: str, flatten: bool) -> None:
    def groups(params: list[Tensor]) -> Any:
        return [
            {"params": params[:2], "lr": 1e-3, "betas": (0.5, 0.9)},
            {"params": params[2:4], "lr": torch.tensor(1e-2), "eps": 1e-3, "weight_decay": 0.0},
            {"params": params[4:], "maximize": True, "eps_root": 1e-3},
        ]

    p = pair(
        "adabelief",
        param,
        state,
        [(5,), (1025,), (), (40, 40), (3,), (2050,)],
        flatten=flatten,
        groups=groups,
    )
    for skip in ((), (1,), (0, 2), (), (0, 1, 2, 3, 4, 5), (3,)):
        p.step(skip)
    p.check()


@rules
@params
@states
@ignore
def test_special_values(rule: str, param: str, state: str) -> None:
    grad = DTYPES[PARAMS[param][0]][1]
    tiny, huge, nan, inf = torch.finfo(grad).tiny, torch.finfo(grad).max, float("nan"), float("inf")
    first = torch.tensor(
        [nan, inf, -inf, 0.0, -0.0, tiny, -tiny, tiny / 8, -tiny / 64, huge, -huge], dtype=torch.float64
    )
    for options in (
        {"eps": 0.0},
        {},
        {"lr": 1e38},
        {"lr": 7e4, "weight_decay": 0.0},
        {"lr": 1e-9},
        {"lr": 1e-6},
    ):
        p = pair(rule, param, state, [(2048,), (100,), (300,)], **options)
        for _ in range(2):
            p.step(first=first)
        p.check()
        p = pair(rule, param, state, [(2048,), (100,), (300,)], **options)
        for scale in (1e-30, 1e-20, 1e-38, 1e-42):
            p.step()
            for a, b in zip(p.want, p.got):
                g = a.grad.double() * scale
                g[::3] *= 1e25
                a.grad.copy_(g)
                b.grad.copy_(a.grad)
            p.eager.step()
            p.optimizer.step()
        p.check()


@params
@states
@ignore
def test_any_bits(param: str, state: str) -> None:
    """Random bits in all that is stored."""
    p = pair("adabelief", param, state, [(4096,), (300,)])
    p.step()
    rng = torch.Generator().manual_seed(3)
    for a, b in zip(p.want, p.got):
        for x, y in [
            (a.data, b.data),
            *((v, p.optimizer.state[b][k]) for k, v in p.eager.state[a].items() if k != "step"),
        ]:
            raw = torch.randint(0, 256, (x.numel() * x.element_size(),), generator=rng, dtype=torch.uint8)
            if x.numel() == -(-a.numel() // 128):
                raw %= 241 if x.data_ptr() == p.eager.state[a]["exp_avg_base"].data_ptr() else 225
            x.view(-1).copy_(raw.view(x.dtype))
            y.copy_(x)
    p.step()
    p.step()
    p.check()


@params
@states
@ignore
@pytest.mark.parametrize("step", [1, 159, 12345678, 2**31 - 2**23 - 1, 2**31 - 2, 2**31 - 1])
def test_counts(param: str, state: str, step: int) -> None:
    p = pair("adabelief_nesterov", param, state, [(265,)])
    p.step()
    for optimizer in (p.eager, p.optimizer):
        for s in optimizer.state.values():
            s["step"].fill_(step)
    p.step()
    p.step()
    p.check()
