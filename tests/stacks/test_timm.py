"""timm's factory, its registry and its Lookahead."""

from typing import Any

import pytest
import timm.scheduler
import torch
from helpers import RULES, Rule, assert_same_bits, saved_and_loaded, snapshot, train
from recorder import Recorder
from timm.optim import Lookahead, OptimInfo, create_optimizer_v2, param_groups_layer_decay
from timm.optim._optim_factory import default_registry  # it is exported nowhere else

from fused_optim import AdaBelief, AdamaxW, AdamW

pytestmark = [pytest.mark.stacks, pytest.mark.filterwarnings("default")]
for cls in (AdaBelief, AdamaxW, AdamW):
    default_registry.register(OptimInfo(f"our{cls.__name__}", cls, has_betas=True))


def vit() -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def fit(model: Any, optimizer: Any, steps: int = 4) -> None:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("rule", ["adabelief", "adamaxw", "adamw"])
@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.5}, {"foreach": False}], ids=str)
def test_factory(rule: str, options: dict[str, Any], flatten: bool) -> None:
    """By a registered name: groups with and without decay, or a learning rate for each layer."""
    model, name = vit(), RULES[rule].optimizer.__name__
    numbers = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-7}
    optimizer = create_optimizer_v2(model, f"our{name}", flatten=flatten, **numbers, **options)
    assert type(optimizer) is RULES[rule].optimizer
    assert sorted({group["weight_decay"] for group in optimizer.param_groups}) == [0.0, 0.1]
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.8, 0.99), 1e-7)}
    recorder = Recorder(optimizer)
    schedule = timm.scheduler.CosineLRScheduler(optimizer, t_initial=4, warmup_t=1, warmup_lr_init=1e-4)
    for epoch in range(3):
        schedule.step(epoch)
        fit(model, optimizer, 2)
    recorder.check(steps=6)


def test_groups_of_the_factory_to_the_constructor() -> None:
    model = vit()
    optimizer = AdamW(param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5), lr=0.01)
    recorder = Recorder(optimizer)
    fit(model, optimizer)
    recorder.check(steps=4)


@pytest.mark.parametrize("rule", list(RULES.values()), ids=list(RULES))
def test_lookahead(rule: Rule, flatten: bool) -> None:
    """Its slow weights lie in our states: they are kept, saved and loaded."""

    def steps(backend: str | None, flatten: bool, parts: tuple[int, ...]) -> tuple[Any, Any]:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(7))]
        done, saved = 0, None
        for part in parts:
            base = rule.optimizer(params, lr=0.01, backend=backend, flatten=flatten, **rule.options)
            optimizer = Lookahead(base, k=2)
            if saved is not None:
                optimizer.load_state_dict(saved)
            train(optimizer, params, part, first=done)
            done, saved = done + part, saved_and_loaded(optimizer.state_dict())
        return snapshot(base), saved

    got, saved = steps(None, flatten, (3, 4))
    assert all("lookahead_slow_buff" in state for state in saved["state"].values())
    assert_same_bits(got, steps("eager", False, (7,))[0])
