"""What only a GPU can show: graph capture, streams, learning rates in its memory, no waiting.

Bits are compared with eager on the CPU. All of it is skipped where there is no GPU.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator

import pytest
import torch
from helpers import assert_same_bits, snapshot
from torch import Tensor

from fused_optim import AdaBelief
from fused_optim.backends import BACKENDS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

SIZES = (5, 1025, 40000)


def ready(name: str) -> bool:
    return torch.cuda.is_available() and BACKENDS[name].why_not(torch.device("cuda")) is None


@pytest.fixture(params=["triton", "cuda", "eager"])
def backend(request: pytest.FixtureRequest) -> str:
    if not ready(request.param):
        pytest.skip(f"backend {request.param}: {BACKENDS[request.param].why_not(torch.device('cuda'))}")
    return str(request.param)


def parameters(device: str) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    params = [torch.randn(n, generator=rng).to(device).requires_grad_() for n in SIZES]
    for p in params:
        p.grad = torch.randn(p.shape, generator=rng).to(device)
    return params


def check(got: list[Tensor], optimizer: AdaBelief, want: list[Tensor], eager: AdaBelief) -> None:
    for p, q in zip(got, want):
        assert_same_bits(p.detach().cpu(), q.detach())
        assert_same_bits({k: v.cpu() for k, v in optimizer.state[p].items()}, eager.state[q])


@pytest.fixture
def no_waiting() -> Iterator[None]:
    with warnings.catch_warnings():
        # torch warns, once a process, that the mode does not yet notice every wait.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits(backend: str, flatten: bool, request: pytest.FixtureRequest) -> None:
    got, want = parameters("cuda"), parameters("cpu")
    optimizer = AdaBelief(got, lr=1e-2, flatten=flatten, backend=backend)
    eager = AdaBelief(want, lr=1e-2, backend="eager")
    optimizer.step()
    request.getfixturevalue("no_waiting")
    for lr in (1e-2, 1e-3):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    for lr in (1e-2, 1e-2, 1e-3):
        eager.param_groups[0]["lr"] = lr
        eager.step()
    check(got, optimizer, want, eager)


def test_capture_and_replay_with_a_learning_rate_on_the_gpu(backend: str, flatten: bool) -> None:
    got, want = parameters("cuda"), parameters("cpu")
    lr = torch.tensor(1e-2, device="cuda")
    optimizer = AdaBelief(got, lr=lr, weight_decay=0.1, flatten=flatten, backend=backend)
    eager = AdaBelief(want, lr=1e-2, weight_decay=0.1, backend="eager")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    eager.step()
    for value in (1e-2, 1e-3, 1e-4):
        lr.fill_(value)
        graph.replay()
        eager.param_groups[0]["lr"] = float(torch.tensor(value))
        eager.step()
    check(got, optimizer, want, eager)
    optimizer.step()
    eager.step()
    check(got, optimizer, want, eager)


# What is refused leaves a graph without kernels, of which torch warns.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capture_refuses_what_would_freeze(backend: str) -> None:
    params = parameters("cuda")
    optimizer = AdaBelief(params, lr=lambda count: 1e-2, backend=backend)
    optimizer.step()
    with (
        pytest.raises(RuntimeError, match="lr of group 0 would freeze"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
    fresh = AdaBelief(parameters("cuda"), backend=backend)
    loaded = AdaBelief(parameters("cuda"), backend=backend)
    loaded.load_state_dict(optimizer.state_dict())  # states are there, but no step was made
    for other in (fresh, loaded):
        before = snapshot(other)
        with pytest.raises(RuntimeError, match="make a step"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            other.step()
        assert_same_bits(snapshot(other), before)


def test_a_kernel_that_does_not_load_changes_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = BACKENDS[backend]

    def load(key: object) -> None:
        raise RuntimeError("the compiler's")

    optimizer = AdaBelief(parameters("cuda"), backend=backend)
    monkeypatch.setitem(BACKENDS, backend, dataclasses.replace(real, load=load))
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="the compiler's"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)


def test_a_side_stream(backend: str) -> None:
    got, want = parameters("cuda"), parameters("cpu")
    optimizer, eager = AdaBelief(got, backend=backend), AdaBelief(want, backend="eager")
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for i in range(6):
        stream = streams[i % 2]
        stream.wait_stream(streams[1 - i % 2])
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            optimizer.param_groups[0]["lr"] = 1e-3 / (i + 1)
            optimizer.step()
        eager.param_groups[0]["lr"] = 1e-3 / (i + 1)
        eager.step()
    torch.cuda.synchronize()
    check(got, optimizer, want, eager)


@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler(backend: str, overflow: bool) -> None:
    got, want = parameters("cuda"), parameters("cpu")
    optimizer, eager = AdaBelief(got, backend=backend), AdaBelief(want, backend="eager")
    optimizer.step()
    eager.step()
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(torch.zeros((), device="cuda"))
    if overflow:
        got[1].grad[7] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    eager.grad_scale = torch.tensor(1024.0)
    if not overflow:
        eager.step()
    check(got, optimizer, want, eager)


def test_a_second_device(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    got = [p for i in range(2) for p in parameters(f"cuda:{i}")]
    want = [p for _ in range(2) for p in parameters("cpu")]
    optimizer, eager = AdaBelief(got, backend=backend), AdaBelief(want, backend="eager")
    for _ in range(3):
        optimizer.step()
        eager.step()
    assert torch.cuda.current_device() == 0
    check(got, optimizer, want, eager)
