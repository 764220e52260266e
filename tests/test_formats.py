"""Storage formats in the optimizer: bytes, masters, stochastic rounding, refusals. The codecs themselves
are in test_codecs.py, backends in test_backends.py, checkpoints in test_checkpoints.py."""

from typing import Any

import pytest
import torch
from helpers import BF16, FORMATS, Make, Rule, assert_same_bits, parameters, raises_with, set_gradients, train
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_optim import AdaBelief, AdamaxW
from fused_optim.backends import extension

F16 = torch.float16
OF_BF16 = {name: options for name, (dtype, _, options) in FORMATS.items() if dtype == BF16}


@pytest.mark.parametrize(
    ("dtype", "options", "most"),
    [
        (torch.float32, {}, 16),
        (BF16, {"master_weights": "split16"}, 14),
        (BF16, {"master_weights": "split16", "state_format": "bf16"}, 10),
        (BF16, {"master_weights": "split8", "state_format": "8bit"}, 7.13),
    ],
)
def test_bytes_a_parameter(
    make: Make, dtype: torch.dtype, options: dict[str, Any], most: float, flatten: bool
) -> None:
    (p,) = parameters([(256, 256)], dtype)
    optimizer = make([p], flatten=flatten, **options)
    train(optimizer, [p], 1)
    state = [t for key, t in optimizer.state[p].items() if key != "step"]
    counted = sum(t.numel() * t.element_size() for t in (p, p.grad, *state)) / p.numel()
    assert counted <= most
    memory = optimizer.memory()
    assert (sum(memory.values()) - memory["metadata"]) / p.numel() == counted
    assert memory["metadata"] < 0.02 * p.numel()


class Allocations(TorchDispatchMode):
    """Elements of the largest tensor that PyTorch makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(t, Tensor) and not func.is_view:
                self.largest = max(self.largest, t.numel())
        return result


@pytest.mark.skipif(extension("_cpu")[0] is None, reason="needs the compiled module")
@pytest.mark.parametrize("options", OF_BF16.values(), ids=OF_BF16)
def test_a_fused_step_makes_nothing_of_the_size_of_a_parameter(
    rule: Rule, options: dict[str, Any], flatten: bool
) -> None:
    params = parameters([(100, 1000)], BF16)
    optimizer = rule.optimizer(params, backend="cpu", flatten=flatten, **options)
    train(optimizer, params, 2)
    with Allocations() as allocations:
        optimizer.step()
    assert allocations.largest < 1000


@pytest.mark.skipif(extension("_cpu")[0] is None, reason="needs the compiled module")
def test_a_split_parameter_follows_a_float32_one_for_1000_steps(rule: Rule) -> None:
    params = parameters([(30,), (7, 4)], BF16)
    exact = [torch.nn.Parameter(p.detach().float()) for p in params]
    options = {"lr": 1e-3, "weight_decay": 0.1, "backend": "cpu"}
    optimizer = rule.optimizer(params, master_weights="split16", **options)
    reference = rule.optimizer(exact, **options)
    for step in range(1000):
        if step < 10:
            set_gradients(params, step)
        for p, q in zip(params, exact):
            p.grad.mul_(-1.0 if step % 3 else 1.5).clamp_(-10, 10)
            q.grad = p.grad.float()
        optimizer.step()
        reference.step()
    for p, q in zip(params, exact):
        assert_same_bits(optimizer.decoded_state(p)["master"], q.detach(), "master")
        for key in ("exp_avg", rule.nu):
            assert_same_bits(optimizer.state[p][key], reference.state[q][key], key)


def test_small_updates_get_through(make: Make, rule: Rule) -> None:
    """Updates below half of a bfloat16's unit: lost to nearest rounding, not at odds nor with a master."""
    lr = 1e-3 if rule.optimizer is AdamaxW else 4e-4

    def after(**options: Any) -> float:
        p = torch.nn.Parameter(torch.ones(4096, dtype=BF16))
        optimizer = make([p], lr=lr, weight_decay=0.0, **options)
        rng = torch.Generator().manual_seed(0)
        for _ in range(100):
            p.grad = 1 + torch.randn(p.shape, generator=rng).to(BF16)
            optimizer.step()
        return float(p.detach().float().mean())

    exact = after(master_weights="split16")
    assert exact < 0.98
    assert after() > 0.9999
    # Rounding has a standard deviation of half a unit (2^-8 below 1) at most in each step and element.
    noise = 5 * 2**-9 * (100 / 4096) ** 0.5
    assert abs(after(stochastic_rounding=True) - exact) < noise
    assert abs(after(master_weights="split8") - exact) < noise


def test_the_seed_of_each_step_decides_the_rounding_and_nothing_else_does(make: Make) -> None:
    def run(*seeds: int) -> Tensor:
        params = parameters([(1000,)], BF16)
        optimizer = make(params, stochastic_rounding=True, state_format="8bit", lr=1e-4)
        before = torch.get_rng_state()
        for i, optimizer.seed in enumerate(seeds):
            train(optimizer, params, 1, first=i)
        assert torch.equal(before, torch.get_rng_state())
        return params[0].detach()

    torch.manual_seed(9)
    results = [run(*seeds) for seeds in ((1, 1), (1, 2), (2, 2))]
    assert all(torch.equal(a, b) == (a is b) for a in results for b in results)
    torch.manual_seed(8)
    assert torch.equal(run(1, 2), results[1])


@pytest.mark.parametrize("master", ["split16", "split8"])
@pytest.mark.parametrize("written", [100.0, 0.0, -0.0])
def test_what_is_written_to_a_parameter_counts(make: Make, master: str, written: float) -> None:
    (p,) = parameters([(300,)], BF16)
    optimizer = make([p], lr=1e-3, master_weights=master)
    train(optimizer, [p], 3)
    with torch.no_grad():
        p.fill_(written)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert bool(((p.detach().float() - written).abs() < (1 if written else 0.1)).all())


@pytest.mark.parametrize(
    ("dtype", "options", "texts"),
    [
        (torch.float64, {"state_format": "8bit"}, ("state_format='8bit'", "float64", "fp32")),
        (torch.complex64, {"state_format": "bf16"}, ("state_format='bf16'", "complex64")),
        (F16, {"master_weights": "split16"}, ("master_weights='split16'", "float16")),
        (F16, {"master_weights": "split8"}, ("master_weights='split8'", "float16")),
        (F16, {"stochastic_rounding": True}, ("stochastic_rounding is for bfloat16 parameters", "float16")),
    ],
)
def test_what_a_format_is_not_for_is_refused(
    make: Make, dtype: torch.dtype, options: dict[str, Any], texts: tuple[str, ...]
) -> None:
    with raises_with(ValueError, "parameter 0 of group 0", *texts):
        make(parameters([(3,)], dtype), **options)
    optimizer = make(parameters([(3,)]), **options)
    with raises_with(ValueError, "parameter 0 of group 1", *texts):
        optimizer.add_param_group({"params": parameters([(3,)], dtype)})
    assert len(optimizer.param_groups) == 1


def test_a_model_cast_to_float32_steps_on_without_what_its_bits_needed(flatten: bool) -> None:
    model = torch.nn.Linear(30, 20).to(BF16)
    optimizer = AdaBelief(
        model.parameters(), master_weights="split16", state_format="8bit", flatten=flatten, backend="cpu"
    )
    train(optimizer, list(model.parameters()), 2)
    model.float()
    train(optimizer, list(model.parameters()), 1)
    for p in model.parameters():
        state = {"step", "exp_avg", "exp_avg_e4m3", "exp_avg_var", "exp_avg_var_e5m3"}
        assert set(optimizer.state[p]) == state
        assert optimizer.state[p]["step"] == 3
