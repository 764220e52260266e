"""Storage formats in the optimizer: bytes, masters, stochastic rounding, checkpoints, refusals.
The codecs themselves are in test_codecs.py, backends against eager in test_backends.py."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import (
    BACKENDS,
    RULES,
    assert_same_bits,
    gradient,
    parameters,
    raises_with,
    set_gradients,
    snapshot,
    train,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_optim import AdaBelief, AdamaxW
from fused_optim.storage import FORMATS

SHAPES = [(300,), (7, 40), (), (129,)]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FORMATS_16BIT: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"state_format": "bf16"},
    "8bit": {"state_format": "8bit"},
    "master": {"master_weights": "fp32"},
    "split16": {"master_weights": "split16"},
    "split16+bf16": {"master_weights": "split16", "state_format": "bf16"},
    "split8+8bit": {"master_weights": "split8", "state_format": "8bit"},
    "stochastic": {"stochastic_rounding": True},
    "stochastic+8bit": {"stochastic_rounding": True, "state_format": "8bit"},
}

rules = pytest.mark.parametrize("cls", RULES)
backends = pytest.mark.parametrize("backend", BACKENDS)
formats = pytest.mark.parametrize("options", FORMATS_16BIT.values(), ids=FORMATS_16BIT)


def master_of(optimizer: Any, p: Tensor) -> Tensor:
    """The float32 that a parameter and its state stand for."""
    state = optimizer.state[p]
    extra = state.get("master", state.get("remainder"))
    name = {torch.float32: "bf16_master", torch.int16: "split16", torch.int8: "split8"}[extra.dtype]
    return FORMATS[name].decode(p.detach(), extra)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(
    ("dtype", "options", "most"),
    [
        (F32, {}, 16),
        (BF16, {"master_weights": "split16"}, 14),
        (BF16, {"master_weights": "split16", "state_format": "bf16"}, 10),
        (BF16, {"master_weights": "split8", "state_format": "8bit"}, 7.13),
    ],
)
def test_bytes_a_parameter(dtype: torch.dtype, options: dict[str, Any], most: float, flatten: bool) -> None:
    (p,) = params = parameters([(256, 256)], dtype)
    optimizer = AdaBelief(params, flatten=flatten, backend="cpu", **options)
    train(optimizer, params, 1)
    state = [t for key, t in optimizer.state[p].items() if key != "step"]
    counted = sum(t.numel() * t.element_size() for t in (p, p.grad, *state)) / p.numel()
    assert counted <= most
    memory = optimizer.memory()
    parts = memory.per_parameter()
    assert parts["total"] - parts["metadata"] == counted
    assert memory.metadata + memory.step < 0.02 * p.numel()
    assert f"{memory.total:,}" in str(memory)


class Allocations(TorchDispatchMode):
    """Elements of the largest tensor that PyTorch makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(t, Tensor) and not func.is_view:
                self.largest = max(self.largest, t.numel())
        return result


@rules
@formats
@pytest.mark.parametrize("flatten", [False, True])
def test_a_fused_step_makes_nothing_of_the_size_of_a_parameter(
    cls: type, options: dict[str, Any], flatten: bool
) -> None:
    params = parameters([(100, 1000)], BF16)
    optimizer = cls(params, backend="cpu", flatten=flatten, **options)
    train(optimizer, params, 2)
    with Allocations() as allocations:
        optimizer.step()
    assert allocations.largest < 1000
    assert optimizer.memory().step < 1000
    assert cls(params, backend="eager", **options).memory().step == 0
    eager = cls(params, backend="eager", **options)
    eager.step()
    assert eager.memory().step is None


@rules
@backends
@pytest.mark.parametrize("master", ["fp32", "split16"])
def test_a_master_follows_float32_parameters_for_1000_steps(cls: type, backend: str, master: str) -> None:
    params = parameters([(300,), (7, 40)], BF16)
    exact = [torch.nn.Parameter(p.detach().float()) for p in params]
    optimizer = cls(params, lr=1e-3, weight_decay=0.1, master_weights=master, backend=backend)
    reference = cls(exact, lr=1e-3, weight_decay=0.1, backend="cpu")
    for step in range(1000):
        for i, (p, q) in enumerate(zip(params, exact)):
            p.grad = gradient(p, 10 * step + i)
            q.grad = p.grad.float()
        optimizer.step()
        reference.step()
    for p, q in zip(params, exact):
        assert_same_bits(master_of(optimizer, p), q.detach(), "master")
        for key, value in reference.state[q].items():
            assert_same_bits(optimizer.state[p][key], value, key)


@rules
@backends
def test_small_updates_get_through(cls: type, backend: str) -> None:
    """Updates below half of a bfloat16's unit: lost to nearest rounding, not at odds nor with a master."""
    lr = {AdaBelief: 4e-4, AdamaxW: 1e-3}[cls]

    def after(**options: Any) -> float:
        p = torch.nn.Parameter(torch.ones(4096, dtype=BF16))
        optimizer = cls([p], lr=lr, weight_decay=0.0, backend=backend, **options)
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


@rules
@formats
@pytest.mark.parametrize("flatten", [False, True])
def test_threads_and_layout_do_not_matter(cls: type, options: dict[str, Any], flatten: bool) -> None:
    def run(threads: int, flat: bool) -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            params = parameters([(50000,), *SHAPES], BF16)
            optimizer = cls(params, backend="cpu", flatten=flat, **options)
            train(optimizer, params, 3)
            return snapshot(optimizer)
        finally:
            torch.set_num_threads(before)

    assert_same_bits(run(3, flatten), run(1, False))


def test_a_flat_step_in_a_format_by_place_has_a_row_for_each_parameter() -> None:
    params = parameters(SHAPES, BF16)
    for options, rows in (
        ({}, 1),
        ({"master_weights": "split16"}, 1),
        ({"state_format": "8bit"}, len(SHAPES)),
    ):
        optimizer = AdaBelief(
            [p.detach().clone().requires_grad_() for p in params], flatten=True, backend="cpu", **options
        )
        train(optimizer, optimizer.param_groups[0]["params"], 1)
        assert [len(batch.rows) for _, batch in optimizer._plan.batches] == [rows]


def test_the_seed_decides_the_rounding_and_nothing_else_does() -> None:
    def run(seed: int) -> Tensor:
        torch.manual_seed(seed + 5)
        params = parameters([(1000,)], BF16)
        optimizer = AdaBelief(params, stochastic_rounding=True, lr=1e-4, backend="cpu")
        optimizer.seed = seed
        train(optimizer, params, 3)
        return params[0].detach()

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    optimizer = AdaBelief(parameters([(3,)], BF16), stochastic_rounding=True)
    for seed, kind in ((-1, ValueError), (2**32, ValueError), (1.5, TypeError), (True, TypeError)):
        with raises_with(kind, "seed", repr(seed)):
            optimizer.seed = seed  # type: ignore[assignment]


def test_rounding_leaves_the_generators_of_torch_alone() -> None:
    params = parameters(SHAPES, BF16)
    optimizer = AdaBelief(params, stochastic_rounding=True, state_format="8bit", backend="cpu")
    set_gradients(params, 0)
    before = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(before, torch.get_rng_state())


def saved_and_read(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@rules
@backends
@formats
@pytest.mark.parametrize("flatten", [False, True])
def test_resuming_continues_bit_for_bit(
    cls: type, backend: str, options: dict[str, Any], flatten: bool
) -> None:
    params = parameters(SHAPES, BF16)
    optimizer = cls(params, backend=backend, flatten=flatten, **options)
    optimizer.seed = 7
    train(optimizer, params, 3)
    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = cls(again, backend=backend, **options)
    other.load_state_dict(saved_and_read(optimizer))
    pickled = pickle.loads(pickle.dumps(optimizer))
    third = pickled.param_groups[0]["params"]
    for o, p in ((optimizer, params), (other, again), (pickled, third)):
        if not options.get("stochastic_rounding"):
            assert "seed" not in o.state_dict()
        train(o, p, 3, first=10)
    assert_same_bits(snapshot(other), snapshot(optimizer))
    assert_same_bits(snapshot(pickled), snapshot(optimizer))
    copied = copy.deepcopy(optimizer)
    assert copied.state_dict().keys() == optimizer.state_dict().keys()


@rules
@pytest.mark.parametrize("source", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("target", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("flatten", [False, True])
def test_moments_of_another_format_load(cls: type, source: str, target: str, flatten: bool) -> None:
    """Widening is exact; narrowing is within half a unit of the narrower format."""
    params = parameters(SHAPES)
    optimizer = cls(params, state_format=source, backend="cpu")
    train(optimizer, params, 5)
    saved = saved_and_read(optimizer)
    loaded = cls(
        [p.detach().clone().requires_grad_() for p in params],
        state_format=target,
        flatten=flatten,
        backend="cpu",
    )
    loaded.load_state_dict(saved)
    for p, q in zip(params, loaded.param_groups[0]["params"]):
        for operand, key in enumerate(loaded._rule(loaded.param_groups[0]).states):
            want, got = (moment(o, t, key, operand) for o, t in ((optimizer, p), (loaded, q)))
            # Half of a unit in the last place, of 8 or 3 bits of mantissa.
            unit = {"fp32": 0.0, "bf16": 2.0**-8, "8bit": 2.0**-4}[target]
            smallest = float(want.abs().max()) * 2.0**-17 if target == "8bit" else 0.0
            if ["fp32", "bf16", "8bit"].index(source) >= ["fp32", "bf16", "8bit"].index(target):
                assert torch.equal(got, want)
            assert bool(((got - want).abs() <= unit * want.abs() + smallest).all())
    q = loaded.param_groups[0]["params"]
    train(loaded, q, 1)
    assert loaded.state[q[0]]["step"] == 6


def moment(optimizer: Any, p: Tensor, key: str, operand: int) -> Tensor:
    state = optimizer.state[p]
    stored = state[key]
    if stored.dtype == torch.uint8:
        return FORMATS[("e4m3", "e5m3")[operand]].decode(stored, state[key + "_base"])
    return stored.float()


@rules
@pytest.mark.parametrize("source", [None, "fp32", "split16", "split8"])
@pytest.mark.parametrize("target", [None, "fp32", "split16", "split8"])
def test_masters_of_another_format_load(cls: type, source: str | None, target: str | None) -> None:
    """With the parameters that were saved with it, a master keeps all that the new format holds."""
    params = parameters(SHAPES, BF16)
    optimizer = cls(params, master_weights=source, backend="cpu")
    train(optimizer, params, 5)
    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = cls(again, master_weights=target, backend="cpu")
    loaded.load_state_dict(saved_and_read(optimizer))
    for p, q in zip(params, again):
        assert_same_bits(q.detach(), p.detach(), "parameter")
        if target is None:
            assert not {"master", "remainder"} & set(loaded.state[q])
            continue
        want = master_of(optimizer, p) if source else p.detach().float()
        error = (master_of(loaded, q) - want).abs()
        if target == "split8" and source in ("fp32", "split16"):
            assert bool((error <= want.abs() * 2.0**-15).all())
        else:
            # A tie that fp32 rounded the other way is off by the last bit of a float32.
            assert bool(
                (error <= want.abs() * (2.0**-23 if (source, target) == ("fp32", "split16") else 0)).all()
            )
    train(loaded, again, 1)


@pytest.mark.parametrize("master", ["fp32", "split16", "split8"])
@backends
def test_what_is_written_to_a_parameter_counts(master: str, backend: str) -> None:
    (p,) = params = parameters([(300,)], BF16)
    optimizer = AdaBelief(params, lr=1e-3, master_weights=master, backend=backend)
    train(optimizer, params, 3)
    with torch.no_grad():
        p.fill_(100.0)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert bool(((p.detach().float() - 100).abs() < 1).all())


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"state_format": "fp8"}, ("state_format", "'fp32', 'bf16', '8bit'", "'fp8'")),
        ({"state_format": None}, ("state_format", "None")),
        ({"master_weights": "bf16"}, ("master_weights", "'split16'", "'bf16'")),
        (
            {"stochastic_rounding": True, "master_weights": "fp32"},
            ("stochastic_rounding", "master_weights='fp32'"),
        ),
    ],
)
@rules
def test_what_no_format_is_is_refused(cls: type, options: dict[str, Any], texts: tuple[str, ...]) -> None:
    with raises_with(ValueError, *texts):
        cls(parameters(SHAPES, BF16), **options)
    with raises_with(TypeError, "stochastic_rounding", "1"):
        cls(parameters(SHAPES, BF16), stochastic_rounding=1)


@rules
@pytest.mark.parametrize(
    ("dtype", "options", "texts"),
    [
        (
            torch.float64,
            {"state_format": "8bit"},
            ("state_format='8bit'", "parameter 0 of group 0", "float64", "fp32"),
        ),
        (torch.complex64, {"state_format": "bf16"}, ("state_format='bf16'", "complex64")),
        (
            F16,
            {"master_weights": "split16"},
            ("master_weights='split16'", "parameter 0 of group 0", "'fp32'"),
        ),
        (F16, {"master_weights": "split8"}, ("master_weights='split8'", "float16")),
    ],
)
def test_what_a_format_is_not_for_is_refused(
    cls: type, dtype: torch.dtype, options: dict[str, Any], texts: tuple[str, ...]
) -> None:
    with raises_with(ValueError, *texts):
        cls(parameters([(3,)], dtype), **options)
    optimizer = cls(parameters([(3,)]), **options)
    with raises_with(ValueError, *(text.replace("group 0", "group 1") for text in texts)):
        optimizer.add_param_group({"params": parameters([(3,)], dtype)})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [F32, torch.float64])
@pytest.mark.parametrize("options", [{"master_weights": "split8"}, {"stochastic_rounding": True}])
def test_wider_parameters_are_their_own_master(dtype: torch.dtype, options: dict[str, Any]) -> None:
    results = []
    for given in (options, {}):
        params = parameters(SHAPES, dtype)
        optimizer = AdamaxW(params, backend="cpu", **given)
        train(optimizer, params, 3)
        results.append(snapshot(optimizer))
    assert_same_bits(*results)


@pytest.mark.parametrize("flatten", [False, True])
def test_a_model_cast_to_float32_steps_on_without_what_its_bits_needed(flatten: bool) -> None:
    model = torch.nn.Linear(30, 20).to(BF16)
    optimizer = AdaBelief(
        model.parameters(), master_weights="split16", state_format="8bit", flatten=flatten, backend="cpu"
    )
    train(optimizer, list(model.parameters()), 2)
    model.float()
    with pytest.warns(UserWarning, match="flat buffers") if flatten else contextlib.nullcontext():
        train(optimizer, list(model.parameters()), 1)
    for p in model.parameters():
        assert set(optimizer.state[p]) == {
            "step", "exp_avg", "exp_avg_base", "exp_avg_var", "exp_avg_var_base",
        }  # fmt: skip
        assert optimizer.state[p]["step"] == 3


def broken_states() -> Iterator[Any]:
    n = 300
    yield "lost base", lambda s: s.pop("exp_avg_base"), ("exp_avg", "exp_avg_base", "uint8")
    yield "short base", lambda s: s.update(exp_avg_base=s["exp_avg_base"][:1]), ("exp_avg_base", "(3,)")
    yield "large base", lambda s: s["exp_avg_base"].fill_(241), ("exp_avg_base", "at most 240", "241")
    yield (
        "large base of nu",
        lambda s: s["exp_avg_var_base"].fill_(225),
        ("exp_avg_var_base", "at most 224", "225"),
    )
    yield (
        "integer moment",
        lambda s: s.update(exp_avg=torch.zeros(n, dtype=torch.int32)),
        ("exp_avg", "int32"),
    )
    yield (
        "wide remainder",
        lambda s: s.update(remainder=torch.zeros(n, dtype=torch.int32)),
        ("remainder", "int32"),
    )
    yield "short remainder", lambda s: s.update(remainder=s["remainder"][:5]), ("remainder", "(5,)", "(300,)")


@backends
@pytest.mark.parametrize(
    ("what", "spoil", "texts"), list(broken_states()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_broken_checkpoint_is_refused(backend: str, what: str, spoil: Any, texts: tuple[str, ...]) -> None:
    params = parameters([(300,)], BF16)
    optimizer = AdaBelief(params, master_weights="split8", state_format="8bit", backend=backend)
    train(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    spoil(saved["state"][0])
    before = snapshot(optimizer)
    with raises_with(ValueError, "parameter 0 of group 0", *texts):
        optimizer.load_state_dict(saved)
    assert_same_bits(snapshot(optimizer), before)


@backends
@rules
def test_found_inf_leaves_every_part_alone(cls: type, backend: str) -> None:
    params = parameters(SHAPES, BF16)
    optimizer = cls(params, master_weights="split8", state_format="8bit", backend=backend)
    train(optimizer, params, 2)
    before = snapshot(optimizer)
    optimizer.found_inf = torch.tensor(1.0)
    train(optimizer, params, 1)
    after = snapshot(optimizer)
    assert after.pop("count") == before.pop("count") + 1
    assert_same_bits(after, before)


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_a_parameter_in_another_order_has_the_bits_of_a_contiguous_one(layout: str) -> None:
    """Blocks and dither go by the logical index, not by the place in memory."""

    def run(lay_out: bool) -> list[Tensor]:
        (p,) = parameters([(4, 6, 5, 5)], BF16)
        data = p.detach()
        if lay_out and layout == "channels_last":
            data = data.contiguous(memory_format=torch.channels_last)
        elif lay_out:
            data = data.transpose(0, 3).contiguous().transpose(0, 3)
        p = torch.nn.Parameter(data)
        optimizer = AdaBelief([p], master_weights="split8", state_format="8bit", backend="cpu")
        for seed in range(3):
            p.grad = torch.empty_like(p).copy_(gradient(torch.empty(p.shape, dtype=BF16), seed))
            optimizer.step()
        assert (optimizer.memory().copies > 0) == lay_out
        return [p.detach().contiguous(), *(t for key, t in sorted(optimizer.state[p].items()))]

    assert_same_bits(run(True), run(False))


@rules
@backends
@pytest.mark.parametrize("master", ["fp32", "split16", "split8"])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_zero_written_to_a_parameter_is_a_zero(cls: type, backend: str, master: str, zero: float) -> None:
    (p,) = params = parameters([(300,)], BF16)
    optimizer = cls(params, lr=1e-3, master_weights=master, backend=backend)
    train(optimizer, params, 3)
    with torch.no_grad():
        p.fill_(zero)
    optimizer.step()
    assert bool((p.detach().abs() < 0.1).all())


@backends
@pytest.mark.parametrize("base", [None, torch.zeros(2, dtype=torch.uint8), torch.zeros(3)])
def test_a_base_that_somebody_spoiled_is_refused_by_step(backend: str, base: Tensor | None) -> None:
    (p,) = params = parameters([(300,)], BF16)
    optimizer = AdaBelief(params, state_format="8bit", backend=backend)
    train(optimizer, params, 2)
    del optimizer.state[p]["exp_avg_base"]
    if base is not None:
        optimizer.state[p]["exp_avg_base"] = base
    before = p.detach().clone()
    with raises_with(RuntimeError, "parameter 0 of group 0", "exp_avg_base", "(3,)"):
        optimizer.step()
    assert torch.equal(p.detach(), before)


def test_a_loaded_master_is_no_part_of_a_graph() -> None:
    source = parameters(SHAPES, BF16)
    optimizer = AdaBelief(source, backend="cpu")
    train(optimizer, source, 1)
    (*params,) = parameters(SHAPES, BF16)
    loaded = AdaBelief(params, master_weights="fp32", backend="cpu")
    loaded.load_state_dict(optimizer.state_dict())
    assert not any(loaded.state[p]["master"].requires_grad for p in params)
    copy.deepcopy(loaded)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "7", None])
def test_a_saved_seed_is_checked(seed: Any) -> None:
    optimizer = AdaBelief(parameters(SHAPES, BF16), stochastic_rounding=True, backend="cpu")
    optimizer.seed = 7
    with raises_with((TypeError, ValueError), "seed", repr(seed)):
        optimizer.load_state_dict({**optimizer.state_dict(), "seed": seed})
    assert optimizer.seed == 7


@backends
def test_a_negative_step_number_ends(backend: str) -> None:
    (p,) = params = parameters([(300,)], BF16)
    optimizer = AdaBelief(params, state_format="8bit", backend=backend)
    train(optimizer, params, 1)
    optimizer.state[p]["step"].fill_(-5)
    optimizer.step()
    assert optimizer.state[p]["step"] == -4
