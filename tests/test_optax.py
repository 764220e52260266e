"""The eager backend against Optax, which defines what this package computes.

Optax runs without jit around its update: XLA contracts multiplications and additions within
one jitted function. (``optax.tree.bias_correction`` is jitted by Optax itself; it has nothing
to contract.) Values stay in the normal range, since XLA flushes subnormals on CPU.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import torch
from helpers import RULES, SHAPES, assert_same_bits
from test_properties import restated
from torch import Tensor

from fused_optim import AdaBelief, AdamaxW, AdamW
from fused_optim.reference import bias_correction
from fused_optim.rules import RULES as FUSED_RULES

if hasattr(jax, "enable_x64"):
    from jax import enable_x64
else:  # JAX 0.6, the last for Python 3.10
    from jax.experimental import enable_x64

# Where JAX sees a GPU, it would compute there.
jax.config.update("jax_platforms", "cpu")

STEPS = 40
BETAS = (0.9, 0.999)
NAMES = ("a", "b", "c")
"""One for each of SHAPES; Optax's parameters are a dict."""
MASK = {"a": True, "b": False, "c": True}
LR_TABLE = (0.01 * 0.98 ** np.arange(STEPS)).astype(np.float32)
DECAY_TABLE = (0.1 * (1 + np.sin(np.arange(STEPS) / 5)) / 2).astype(np.float32)

Tree = dict[str, Any]


def table_lookup(table: np.ndarray) -> tuple[Callable[[Any], Any], Callable[[int], float]]:
    """The same float32 values as a schedule for Optax and as one for us.

    A schedule's formula in jnp runs in float32 and ours in double; a table has no formula.
    """
    on_device = jnp.asarray(table)
    return (lambda count: on_device[count]), (lambda count: float(table[count]))


OPTAX_LR, OUR_LR = table_lookup(LR_TABLE)
OPTAX_DECAY, OUR_DECAY = table_lookup(DECAY_TABLE)
VARIANTS: list[tuple[Any, Any, Any, Any, Any]] = [
    (0.003, 0.003, 0.0, 0.0, None),
    (OPTAX_LR, OUR_LR, 0.1, 0.1, None),
    (0.003, 0.003, 0.1, 0.1, MASK),
    (OPTAX_LR, OUR_LR, OPTAX_DECAY, OUR_DECAY, None),
]
"""lr for Optax and for us, weight decay for Optax and for us, and what decays."""


def random_gradients(seed: int, dtype: Any = np.float32, steps: int = STEPS) -> list[Tree]:
    """Gradients of either sign from 1e-6 to 1e3 in magnitude, with a few exact zeros."""
    rng = np.random.default_rng(seed)

    def one(shape: tuple[int, ...]) -> np.ndarray:
        size = 10 ** rng.uniform(-6, 3, shape) * rng.choice([-1.0, 1.0], shape)
        return np.asarray(np.where(rng.random(shape) < 0.02, 0.0, size), dtype)

    return [{name: one(shape) for name, shape in zip(NAMES, SHAPES)} for _ in range(steps)]


def first_parameters(seed: int, dtype: Any = np.float32) -> Tree:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=shape), dtype) for name, shape in zip(NAMES, SHAPES)}


def named(tree: Tree) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, torch.nn.Parameter(torch.tensor(tree[name]))) for name in NAMES]


def vector(trees: Sequence[Tree]) -> np.ndarray:
    """All elements as one vector: one comparison in place of nine."""
    return np.concatenate([np.asarray(tree[name]).reshape(-1) for tree in trees for name in NAMES])


def assert_same_vector(got: np.ndarray, want: np.ndarray, what: str) -> None:
    assert got.dtype == want.dtype == np.float32
    assert np.array_equal(got.view(np.int32), want.view(np.int32)), f"{what}: {got} is not {want}"


def to_torch(tree: Tree) -> dict[str, Tensor]:
    return {name: torch.tensor(np.asarray(tree[name])) for name in NAMES}


def set_gradients(group: dict[str, Any], tree: Tree) -> None:
    for name, p in zip(group["param_names"], group["params"]):
        p.grad = torch.tensor(tree[name])


def ours(optimizer: torch.optim.Optimizer, group: int) -> dict[str, dict[str, Tensor]]:
    """Parameters and both states of a group, by name."""
    keys = FUSED_RULES[optimizer.rule].states
    names, params = (optimizer.param_groups[group][key] for key in ("param_names", "params"))
    states = {key: {n: optimizer.state[p][key] for n, p in zip(names, params)} for key in keys}
    return {"params": {n: p.detach() for n, p in zip(names, params)}, **states}


def variant_groups(seed: int) -> list[dict[str, Any]]:
    """A parameter group for each of VARIANTS, all from the same parameters."""
    params = (named(first_parameters(seed)) for _ in VARIANTS)
    return [
        {"params": p, "lr": lr, "weight_decay": decay, "weight_decay_mask": mask}
        for p, (_, lr, _, decay, mask) in zip(params, VARIANTS)
    ]


def test_jax_power_is_correctly_rounded_at_the_counts_used() -> None:
    """JAX's float32 power is now and then off by one unit, and so would be all after it.

    Written as Optax compiles it (base and exponent both traced). At a count where this fails,
    the comparisons below would have to leave out the parameters; there is none up to 200.
    """
    counts = np.arange(1, 2001)
    power = jax.jit(lambda base, count: base**count)
    for beta, few in zip(BETAS, (200, 1)):
        got = np.array([power(beta, jnp.int32(t)) for t in counts])
        want = (np.float64(np.float32(beta)) ** counts).astype(np.float32)
        wrong = counts[got != want]
        assert len(wrong) <= few
        assert not (wrong <= STEPS + 1).any()
        assert not (1 - got != 1 - want).any()
        our = bias_correction(torch.tensor(beta, dtype=torch.float64), torch.tensor(counts), torch.float32)
        assert np.array_equal(our.numpy(), 1 - want)


def adabelief(
    lr: Any, b1: float = 0.9, b2: float = 0.999, weight_decay: Any = 0.0, mask: Any = None, **options: Any
) -> optax.GradientTransformation:
    """What newer versions of Optax build."""
    return optax.chain(
        optax.scale_by_belief(b1, b2, **options),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(lr),
    )


BOTH: list[tuple[Any, Any, dict[str, Any]]] = [
    (AdaBelief, adabelief, {}), (AdaBelief, adabelief, {"nesterov": True, "eps_root": 0.0}),
    (AdamaxW, optax.adamaxw, {}),
    (AdamW, optax.adamw, {}), (AdamW, optax.adamw, {"nesterov": True, "eps_root": 1e-10}),
]  # fmt: skip


@pytest.mark.parametrize(("ours_is", "optax_is", "options"), BOTH)
def test_optimizers_have_the_bits_of_optax(ours_is: Any, optax_is: Any, options: dict[str, Any]) -> None:
    grads = random_gradients(3)
    optimizer = ours_is(variant_groups(4), betas=BETAS, backend="eager", **options)
    oracles = [
        optax_is(lr, *BETAS, weight_decay=decay, mask=mask, **options) for lr, _, decay, _, mask in VARIANTS
    ]
    params = [on_jax(first_parameters(4)) for _ in VARIANTS]
    states = [oracle.init(p) for oracle, p in zip(oracles, params)]
    for t, grad in enumerate(grads):
        for group in optimizer.param_groups:
            set_gradients(group, grad)
        optimizer.step()
        grad = on_jax(grad)
        for i, oracle in enumerate(oracles):
            updates, states[i] = oracle.update(grad, states[i], params[i])
            params[i] = optax.apply_updates(params[i], updates)
            want = vector([params[i], states[i][0].mu, states[i][0].nu])
            assert_same_vector(vector(list(ours(optimizer, i).values())), want, f"step {t}, variant {i}")


class Oracle(NamedTuple):
    """Of a rule: Optax's optimizer at lr 0.01 and weight decay 0.1, and the direction that it goes in."""

    whole: optax.GradientTransformation
    direction: optax.GradientTransformation


ORACLES = {
    "adabelief": Oracle(adabelief(0.01, weight_decay=0.1), optax.scale_by_belief(*BETAS)),
    "adabelief-nesterov": Oracle(adabelief(0.01, weight_decay=0.1, nesterov=True),
                                 optax.scale_by_belief(*BETAS, nesterov=True)),
    "adamw": Oracle(optax.adamw(0.01, *BETAS, weight_decay=0.1, nesterov=True),
                    optax.scale_by_adam(*BETAS, nesterov=True)),
    "adamaxw": Oracle(optax.adamaxw(0.01, *BETAS, weight_decay=0.1), optax.scale_by_adamax(*BETAS)),
}  # fmt: skip
rules = pytest.mark.parametrize("rule", RULES)


def optimizer_of(rule: str, params: Tree, **options: Any) -> Any:
    options = {"lr": 0.01, "weight_decay": 0.1, "backend": "eager", **RULES[rule].options, **options}
    return RULES[rule].optimizer(named(params), **options)


def on_jax(tree: Tree) -> Tree:
    return {name: jnp.asarray(value) for name, value in tree.items()}


def run_optax(oracle: optax.GradientTransformation, params: Tree, grads: list[Tree]) -> tuple[Tree, Any]:
    params = on_jax(params)
    state = oracle.init(params)
    for grad in grads:
        updates, state = oracle.update(on_jax(grad), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def run_ours(optimizer: torch.optim.Optimizer, grads: list[Tree]) -> None:
    for grad in grads:
        set_gradients(optimizer.param_groups[0], grad)
        optimizer.step()


CHOSEN: list[tuple[Any, dict[str, Any], optax.GradientTransformation]] = [
    (AdaBelief, {}, optax.adabelief(1e-3)),
    (AdamaxW, {}, optax.adamaxw(2e-3)),
    (AdamW, {}, optax.adamw(1e-3)),
]
"""The defaults, and other betas and eps."""
for betas in ((0.0, 0.0), (0.5, 0.25), (0.99, 0.5)):
    options = {"lr": 0.02, "betas": betas, "eps": 1e-3}
    CHOSEN += [
        (AdaBelief, {**options, "eps_root": 1e-5}, adabelief(0.02, *betas, eps=1e-3, eps_root=1e-5)),
        (AdamaxW, options, optax.adamaxw(0.02, *betas, eps=1e-3)),
        (AdamW, {**options, "eps_root": 1e-5}, optax.adamw(0.02, *betas, eps=1e-3, eps_root=1e-5)),
    ]


def test_defaults_and_other_options_have_the_bits_of_optax() -> None:
    grads, start = random_gradients(5, steps=15), first_parameters(6)
    for cls, options, oracle in CHOSEN:
        optimizer = cls(named(start), backend="eager", **options)
        run_ours(optimizer, grads)
        params, _ = run_optax(oracle, start, grads)
        assert_same_bits(ours(optimizer, 0)["params"], to_torch(params), f"{cls.__name__} {options}")


@rules
def test_complex_parameters_are_pairs_of_reals(rule: str) -> None:
    real, imaginary = random_gradients(11, steps=15), random_gradients(12, steps=15)
    grads = [
        {name: np.asarray(a[name] + 1j * b[name], np.complex64) for name in NAMES}
        for a, b in zip(real, imaginary)
    ]
    start = {
        name: np.asarray(a + 1j * first_parameters(14)[name], np.complex64)
        for name, a in first_parameters(13).items()
    }
    optimizer = optimizer_of(rule, start)
    run_ours(optimizer, grads)
    oracle = optax.contrib.split_real_and_imaginary(ORACLES[rule].whole)
    params, state = run_optax(oracle, start, grads)
    got, moments = ours(optimizer, 0), state.inner_state[0]
    assert_same_bits(got["params"], to_torch(params), "params")
    for key, tree in zip([k for k in got if k != "params"], (moments.mu, moments.nu)):
        want = {n: torch.tensor(np.asarray(tree[n].real) + 1j * np.asarray(tree[n].imaginary)) for n in NAMES}
        assert_same_bits(got[key], want, key)


@rules
def test_float64(rule: str) -> None:
    """Moments are equal, directions agree: with p = 0, lr = 1 and no decay the parameter shows ``-u``. And
    whole parameters."""
    zeros = {name: np.zeros(shape) for name, shape in zip(NAMES, SHAPES)}
    optimizer = optimizer_of(rule, zeros, lr=1.0, weight_decay=0.0)
    with enable_x64(True):
        state = ORACLES[rule].direction.init(on_jax(zeros))
        for grad in random_gradients(15, np.float64, steps=30):
            set_gradients(optimizer.param_groups[0], grad)
            for p in optimizer.param_groups[0]["params"]:
                p.data.zero_()
            optimizer.step()
            directions, state = ORACLES[rule].direction.update(on_jax(grad), state)
            got, want = ours(optimizer, 0), to_torch(directions)
            for name in NAMES:
                assert want[name].dtype == torch.float64
                torch.testing.assert_close(-got["params"][name], want[name], rtol=1e-12, atol=0)
            moments = [got[key] for key in got if key != "params"]
            assert_same_bits(moments, [to_torch(state.mu), to_torch(state.nu)], "moments")
        grads, start = random_gradients(16, np.float64, steps=15), first_parameters(17, np.float64)
        optimizer = optimizer_of(rule, start)
        run_ours(optimizer, grads)
        params, _ = run_optax(ORACLES[rule].whole, start, grads)
        for name, want in to_torch(params).items():
            # p is of order 1 and each of the 15 steps of order 0.01, its u good to 1e-12.
            torch.testing.assert_close(ours(optimizer, 0)["params"][name], want, rtol=1e-12, atol=1e-12)


@rules
def test_a_tree_with_one_leaf_differs_by_the_reciprocal_alone(rule: str) -> None:
    """XLA multiplies by the reciprocal there. Divided, as Optax's source says and we do, the same tree
    with a second leaf has our bits; and the bits of the single leaf are ours but for that."""
    eps, root = (1e-16, 1e-16) if "adabelief" in rule else (1e-8, 0.0)
    numbers = {"lr": 0.01, "betas": BETAS, "weight_decay": 0.0, "eps": eps, "eps_root": root}
    numbers |= RULES[rule].options

    def by_reciprocal(x: np.ndarray, correction: np.float32) -> np.ndarray:
        return x * (np.float32(1) / correction)

    rng = np.random.default_rng(22)
    start = np.asarray(0.01 * rng.normal(size=500), np.float32)
    grads = [np.asarray(rng.normal(size=500), np.float32) for _ in range(20)]
    oracle = optax.chain(ORACLES[rule].direction, optax.scale_by_learning_rate(0.01))
    alone, _ = run_optax(oracle, {"a": start}, [{"a": g} for g in grads])
    beside, _ = run_optax(oracle, {"a": start, "b": start[:3]}, [{"a": g, "b": g[:3]} for g in grads])
    p = torch.nn.Parameter(torch.tensor(start))
    optimizer = RULES[rule].optimizer([p], lr=0.01, weight_decay=0.0, backend="eager", **RULES[rule].options)
    multiplied = (start, np.zeros_like(start), np.zeros_like(start))
    for t, g in enumerate(grads):
        p.grad = torch.tensor(g)
        optimizer.step()
        values, *moments = multiplied
        multiplied = restated(RULES[rule].reference, values, g, *moments, t, numbers, 0.01, by_reciprocal)
    divided = p.detach().numpy()
    assert_same_vector(divided, np.asarray(beside["a"]), "two leaves")
    # JAX 0.6.2, the last one for Python 3.10, divides there as well.
    one_leaf = divided if jax.__version_info__ <= (0, 6, 2) else multiplied[0]
    assert_same_vector(np.asarray(alone["a"]), one_leaf, "one leaf, by reciprocals")
    assert (divided != multiplied[0]).mean() > 0.1


@rules
def test_maximize_is_optax_on_negated_gradients(rule: str) -> None:
    grads, start = random_gradients(9, steps=15), first_parameters(10)
    optimizer = optimizer_of(rule, start, maximize=True)
    run_ours(optimizer, grads)
    negated = [{name: -g for name, g in grad.items()} for grad in grads]
    params, _ = run_optax(ORACLES[rule].whole, start, negated)
    assert_same_bits(ours(optimizer, 0)["params"], to_torch(params), rule)


def test_decay_is_selected_by_weight_decay() -> None:
    """An infinite parameter with weight decay becomes NaN even where the factor of the decay
    is 0, and one without weight decay stays."""
    for decay, want in ((0.1, torch.nan), (0.0, torch.inf)):
        p = torch.nn.Parameter(torch.full((2,), torch.inf))
        optimizer = AdaBelief([p], lr=0.1, weight_decay=decay, decoupled_lr=True, backend="eager")
        optimizer.param_groups[0]["lr"] = 0.0
        p.grad = torch.ones(2)
        optimizer.step()
        assert_same_bits(p.detach(), torch.full((2,), want), f"weight_decay {decay}")
