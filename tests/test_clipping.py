"""Clipping inside the step: the norm and what follows from it, bit for bit in every backend; against
PyTorch's ``clip_grad_norm_``, whose norm is float32; and steps that a norm which is not finite skips."""

import copy
import itertools
import math
import pickle

import helpers
import pytest
import test_backends as b
import torch
from helpers import F32, F64, FORMATS, RULES, Make, assert_same_bits, parameters, train
from test_backends import Model, backends, cpu, device_of, fused

from fused_optim import AdamaxW, AdamW, reference

pytestmark = helpers.interpreted


def pairwise(values: list[float]) -> float:
    while len(values) > 1:
        values = [a + b for a, b in zip(values[::2], values[1::2])]
    return values[0]


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 700, 4096])
def test_the_order_of_a_sum(n: int) -> None:
    x = 10 ** torch.linspace(-8, 8, n, dtype=F64)[torch.randperm(n)]
    lanes = [0.0] * 256
    for i, value in enumerate(x.tolist()):
        lanes[i % 256] += value
    assert float(reference.tree_sum(x)) == pairwise(lanes)


@backends
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_and_layout(backend: str, format: str) -> None:
    i = list(FORMATS).index(format)
    chosen = b.tensors(b.program(format))
    if backend == "triton" and device_of(backend) == "cpu":
        chosen = chosen[i % 3 :: 3]
    rule = b.turn(list(RULES), i)
    b.check_layouts(rule, backend, format, chosen, flatten=i % 4 < 2, max_grad_norm=0.5)


@backends
def test_every_layout_has_the_same_norm(backend: str, flatten: bool) -> None:
    """Of parameters and of gradients, for squares are added by the logical index."""
    layouts = ["", "every third", "columns", "transposed", "last outermost", "channels_last"]
    for of_gradients in (layouts, layouts[::-1]):
        norms = []
        for of_param, of_gradient in zip(layouts, of_gradients):
            options = {"flatten": flatten, "max_grad_norm": 0.5}
            model = Model("adamw", backend, [(9, 16, 6, 5)], "fp32", [of_param], **options)
            model.set_gradients(layouts=[of_gradient])
            model.step()
            norms.append(model.optimizer.grad_norm)
        assert_same_bits(norms[1:], norms[:1] * 5)


SIZES = [4095, 4096, 4097, 8192, 8193, 0, *range(1, 60)]


@backends
def test_sizes_around_a_chunk_and_parameters_of_several_batches(backend: str) -> None:
    """And of all backends, list or flat, the same norm; a limit that is not reached changes nothing."""
    norms = []
    shapes = [(n,) for n in (SIZES if backend != "triton" else SIZES[1:9])]
    for flatten, limit in ((False, 1e9), (True, None)):
        params = [p for pair in zip(parameters(shapes), parameters(shapes, F64, 1)) for p in pair]
        options = {"skip_nonfinite": True} if limit is None else {"max_grad_norm": limit}
        params = [p.to(device_of(backend)).detach().requires_grad_() for p in params]
        plain, clipped = (
            AdamW(copy.deepcopy(params), flatten=flatten, backend=backend, **given) for given in ({}, options)
        )
        for optimizer in (plain, clipped):
            train(optimizer, optimizer.param_groups[0]["params"], 2)
        assert_same_bits(helpers.snapshot(clipped), helpers.snapshot(plain))
        norms.append(clipped.grad_norm)
    eager = AdamW(params, backend="eager", max_grad_norm=math.inf)
    train(eager, params, 2)
    for norm in norms:
        assert_same_bits(norm, eager.grad_norm)


@backends
def test_groups_and_a_grad_scaler(backend: str, flatten: bool) -> None:
    """Clipped after the division by grad_scale and before maximize, over all groups; found_inf skips too."""
    format = b.turn([*b.STORED, "complex64"], flatten)
    model = Model(
        "adamw", backend, [(5,), (4100,), (3, 4), (300,)], format, ["every third", "", "", ""],
        lambda params: [{"params": params[:2], "maximize": True}, {"params": params[2:], "lr": 0.1}],
        flatten=flatten, max_grad_norm=2.5, skip_nonfinite=True,
    )  # fmt: skip
    for i, (scale, found_inf) in enumerate([*b.AMP, (0.25, 1.0)]):
        model.set_gradients()
        if i == 2:
            model.params[1].grad[7] = torch.inf
        for name, value in (("grad_scale", scale), ("found_inf", found_inf)):
            given = None if value is None else torch.tensor(value, device=model.device)
            setattr(model.optimizer, name, given)
        model.step()
    assert {int(s["step"]) for s in model.optimizer.state.values()} == {2}
    assert int(model.optimizer.skipped) == 1


@backends
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_a_norm_that_is_not_finite(backend: str, bad: float, limit: float | None) -> None:
    """Skips the step, or with ``skip_nonfinite=False`` goes where torch sends it."""
    for skips in (True, False)[: 1 if limit is None else 2]:
        options = {"max_grad_norm": limit, "skip_nonfinite": skips}
        model = Model("adabelief", backend, [(4097,), (3,)], flatten=skips, **options)
        model.train(1)
        model.set_gradients()
        model.params[0].grad[4096] = bad
        before = helpers.snapshot(model.optimizer)
        gradients = [p.grad.clone() for p in model.params]
        model.step()
        assert_same_bits([p.grad for p in model.params], gradients)
        if skips:
            after = helpers.snapshot(model.optimizer)
            assert (after.pop("count"), before.pop("count")) == (2, 1)
            assert_same_bits(after, before)
        model.train(1)
        assert not skips or int(model.optimizer.skipped) == 1
        assert skips or model.optimizer.skipped is None


@pytest.mark.parametrize("bad", [None, torch.nan, torch.inf])
@pytest.mark.parametrize(("limit", "scale"), [(1e-3, 1), (1, 1), (1e3, 1), (1e9, 1), (1e-6, 1e-8), (1e-7, 0)])
def test_as_torch_clips(limit: float, scale: float, bad: float | None) -> None:
    """Within 4 units of float32, small norms too; with beta1 = 0 the first moment is the clipped gradient."""
    params = parameters([(4097,), (10, 10), ()])
    optimizer = AdamaxW(params, betas=(0.0, 0.9), max_grad_norm=limit, backend="eager")
    helpers.set_gradients(params, 0)
    for p in params:
        p.grad *= scale
    if bad is not None:
        params[1].grad[0, 0] = bad
    optimizer.step()
    norm = torch.nn.utils.clip_grad_norm_(params, limit)
    unit = torch.finfo(F32).eps
    torch.testing.assert_close(optimizer.grad_norm.float(), norm, rtol=4 * unit, atol=0, equal_nan=True)
    for p in params:
        got = optimizer.state[p]["exp_avg"]
        torch.testing.assert_close(got, p.grad, rtol=4 * unit, atol=0, equal_nan=True)


@fused
def test_zero_gradients_and_none(backend: str) -> None:
    model = Model("adamaxw", backend, [(5000,), (0,), (3,)], max_grad_norm=1.0)
    model.set_gradients()
    for p in model.params:
        p.grad.zero_()
    model.step()
    assert float(model.optimizer.grad_norm) == 0
    model.set_gradients(skip=(0, 1, 2))
    model.step()
    assert float(model.optimizer.grad_norm) == 0
    model.set_gradients(skip=(0, 2))
    model.step()


@cpu
@pytest.mark.parametrize("format", ["fp32", "fp64", "bf16", "fp16"])
def test_cpu_with_any_number_of_threads(format: str) -> None:
    for n, flatten in itertools.product((1, 2, 8), (False, True)):
        with b.threads(n):
            shapes = [(50003,), *[(i,) for i in range(10)]]
            Model("adamw", "cpu", shapes, format, flatten=flatten, max_grad_norm=1e-2).train(1)


def test_what_is_told_before_and_after_steps(make: Make) -> None:
    params = parameters()
    optimizer = make(params, max_grad_norm=1.0, skip_nonfinite=True)
    assert optimizer.grad_norm is None and int(optimizer.skipped) == 0
    train(optimizer, params, 1)
    params[1].grad[0] = torch.nan
    optimizer.step()
    first = optimizer.grad_norm
    train(optimizer, params, 1)
    assert bool(first.isnan()) and bool(optimizer.grad_norm.isfinite())
    assert (optimizer.grad_norm.shape, optimizer.skipped.shape, int(optimizer.skipped)) == ((), (), 1)
    for copied in (lambda: copy.deepcopy(optimizer), lambda: pickle.loads(pickle.dumps(optimizer))):
        other = copied()
        train(optimizer, params, 1)
        train(other, other.param_groups[0]["params"], 1)
        assert_same_bits(helpers.snapshot(other), helpers.snapshot(optimizer))
        other.param_groups[0]["params"][0].grad.fill_(torch.inf)
        other.step()
        assert (int(other.skipped), int(optimizer.skipped)) == (2, 1)
    unclipped = make(parameters())
    train(unclipped, unclipped.param_groups[0]["params"], 1)
    assert unclipped.grad_norm is None and unclipped.skipped is None
