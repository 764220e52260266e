"""What only a GPU can show: graph capture, streams, learning rates in its memory, no waiting.

Bits are compared with eager on the CPU. All of it is skipped where there is no GPU.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, snapshot
from torch import Tensor

from fused_optim import AdaBelief
from fused_optim.backends import BACKENDS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

SIZES = (5, 1025, 40000)


@pytest.fixture(params=["triton", "cuda", "eager"])
def backend(request: pytest.FixtureRequest) -> str:
    why_not = BACKENDS[request.param].why_not(torch.device("cuda"))
    if why_not is not None:
        pytest.skip(f"backend {request.param}: {why_not}")
    return request.param


def parameters(device: str) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    params = [torch.randn(n, generator=rng).to(device).requires_grad_() for n in SIZES]
    for p in params:
        p.grad = torch.randn(p.shape, generator=rng).to(device)
    return params


class Pair:
    """The same parameters on GPUs, stepped by a backend, and on the CPU, by eager."""

    def __init__(
        self, backend: str | None, lr: Any = 1e-2, devices: tuple[str, ...] = ("cuda",), **options: Any
    ) -> None:
        self.params = [p for device in devices for p in parameters(device)]
        self.copies = [p for _ in devices for p in parameters("cpu")]
        self.ours = AdaBelief(self.params, lr=lr, backend=backend, **options)
        self.eager = AdaBelief(self.copies, lr=float(lr), backend="eager", **options)

    def eager_steps(self, *learning_rates: float) -> None:
        for lr in learning_rates:
            self.eager.param_groups[0]["lr"] = lr
            self.eager.step()

    def check(self) -> None:
        for p, q in zip(self.params, self.copies):
            assert_same_bits(p.detach().cpu(), q.detach())
            assert_same_bits({k: v.cpu() for k, v in self.ours.state[p].items()}, self.eager.state[q])


@pytest.fixture
def no_waiting() -> Iterator[None]:
    with warnings.catch_warnings():
        # torch warns, once a process, that the mode does not yet notice every wait.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits(backend: str, flatten: bool, request: pytest.FixtureRequest) -> None:
    pair = Pair(backend, flatten=flatten)
    pair.ours.step()
    request.getfixturevalue("no_waiting")
    for lr in (1e-2, 1e-3):
        pair.ours.param_groups[0]["lr"] = lr
        pair.ours.step()
    torch.cuda.set_sync_debug_mode("default")
    pair.eager_steps(1e-2, 1e-2, 1e-3)
    pair.check()


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_gradients_that_come_and_go(backend: str, flatten: bool, request: pytest.FixtureRequest) -> None:
    """Nothing waits for it, and a capture refuses it."""
    pair = Pair(backend, flatten=flatten)
    lists = (pair.params, pair.copies)
    gradients = [[p.grad for p in params] for params in lists]

    def give(missing: int) -> None:
        for params, grads in zip(lists, gradients):
            for i, p in enumerate(params):
                p.grad = None if i == missing else grads[i]

    for number, missing in enumerate((-1, 0, 1, -1, 0, -1, 1, 1, -1)):
        give(missing)
        if number == 3:  # by now each has a step number of its own
            request.getfixturevalue("no_waiting")
        pair.ours.step()
        pair.eager.step()
    torch.cuda.set_sync_debug_mode("default")
    pair.check()
    give(0)
    with pytest.raises(RuntimeError, match="make one before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        pair.ours.step()
    pair.ours.step()
    pair.eager.step()
    pair.check()


def test_capture_and_replay_with_a_learning_rate_on_the_gpu(backend: str, flatten: bool) -> None:
    lr = torch.tensor(1e-2, device="cuda")
    pair = Pair(backend, lr, weight_decay=0.1, flatten=flatten)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        pair.ours.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pair.ours.step()
    values = [float(torch.tensor(value)) for value in (1e-2, 1e-2, 1e-3, 1e-4)]
    for value in values[1:]:
        lr.fill_(value)
        graph.replay()
    pair.eager_steps(*values)
    pair.check()
    pair.ours.step()
    pair.eager.step()
    pair.check()


def test_what_changes_before_a_capture(backend: str, flatten: bool) -> None:
    """What it replaces was uploaded on the stream that captures, and must not be freed there."""
    pair = Pair(backend, flatten=flatten)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        pair.ours.step()
    torch.cuda.synchronize()
    pair.ours.param_groups[0]["lr"] = 1e-3
    for p in pair.params:
        p.grad = p.grad.clone()
    with torch.cuda.graph(graph, stream=stream):
        pair.ours.step()
    graph.replay()
    pair.ours.param_groups[0]["lr"] = 1e-4
    pair.ours.step()
    pair.eager_steps(1e-2, 1e-3, 1e-4)
    pair.check()


def test_learning_rates_of_many_kinds(backend: str) -> None:
    """On the GPU, of any dtype, beside numbers: the same bits as numbers."""
    lrs = [
        torch.tensor(1e-2, device="cuda"), 1e-3, torch.tensor([0.1], dtype=torch.bfloat16, device="cuda"),
        torch.tensor(0.1, dtype=torch.float64),
    ]  # fmt: skip
    made = []
    for device, rates, name in (("cuda", lrs, backend), ("cpu", list(map(float, lrs)), "eager")):
        groups = [{"params": parameters(device), "lr": lr} for lr in rates]
        made.append(AdaBelief(groups, weight_decay=0.1, backend=name))
        made[-1].step()
    for ours, eager in zip(*(optimizer.param_groups for optimizer in made)):
        for p, q in zip(ours["params"], eager["params"]):
            assert_same_bits(p.detach().cpu(), q.detach())


def test_a_graph_must_be_captured_again_after_a_load(backend: str, flatten: bool) -> None:
    """That is said, and the new one steps what was loaded."""
    pair, graphs = Pair(backend, flatten=flatten), [torch.cuda.CUDAGraph() for _ in range(2)]
    pair.ours.step()
    saved = pair.ours.state_dict()
    with torch.cuda.graph(graphs[0]):
        pair.ours.step()
    with pytest.warns(RuntimeWarning, match="capture it again"):
        pair.ours.load_state_dict(saved)
    pair.eager_steps(1e-2)
    pair.check()
    pair.ours.step()
    with torch.cuda.graph(graphs[1]):
        pair.ours.step()
    graphs[1].replay()
    pair.eager_steps(1e-2, 1e-2)
    pair.check()


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
        with pytest.raises(RuntimeError, match="make one before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            other.step()
        assert_same_bits(snapshot(other), before)


def test_a_side_stream(backend: str) -> None:
    pair = Pair(backend)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    rates = [1e-3 / i for i in range(1, 7)]
    for i, lr in enumerate(rates):
        pair.ours.param_groups[0]["lr"] = lr
        stream = streams[i % 2]
        stream.wait_stream(streams[1 - i % 2])
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            pair.ours.step()
    torch.cuda.synchronize()
    pair.eager_steps(*rates)
    pair.check()


def test_more_than_2_31_elements(backend: str) -> None:
    """Those at the ends and in the middle have the bits that they have alone."""
    n, window = 2**31 + 4099, 65536
    if backend == "eager" or torch.cuda.mem_get_info()[0] < 12 * n + 2**30:
        pytest.skip(f"needs a kernel, and {12 * n >> 30} GiB that are free")
    p = torch.empty(n, dtype=torch.bfloat16, device="cuda").normal_()
    p.grad = torch.empty_like(p).normal_()
    parts = [slice(i, i + window) for i in (0, 2**31 - window // 2, n - window)]
    alone = [p[part].cpu().requires_grad_() for part in parts]
    for q, part in zip(alone, parts):
        q.grad = p.grad[part].cpu()
    ours, eager = AdaBelief([p], backend=backend), AdaBelief(alone, backend="eager")
    ours.step()
    eager.step()
    for q, part in zip(alone, parts):
        assert_same_bits(p[part].cpu(), q.detach())
        for key in ("exp_avg", "exp_avg_var"):
            assert_same_bits(ours.state[p][key][part].cpu(), eager.state[q][key])


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("in_step", [False, True], ids=["by the scaler", "in the step"])
def test_grad_scaler(backend: str, in_step: bool, overflow: bool) -> None:
    pair = Pair(backend, unscale_in_step=in_step)
    pair.ours.step()
    pair.eager.step()
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(torch.zeros((), device="cuda"))
    if overflow:
        pair.params[1].grad[7] = torch.inf
    scaler.step(pair.ours)
    scaler.update()
    pair.eager.grad_scale = torch.tensor(1024.0)
    if not overflow:
        pair.eager.step()
    pair.check()


def test_a_second_device(backend: str, flatten: bool) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    pair = Pair(backend, devices=("cuda:0", "cuda:1"), flatten=flatten)
    for _ in range(3):
        pair.ours.step()
        pair.eager.step()
    assert torch.cuda.current_device() == 0
    pair.check()


def test_clipping_waits_for_nothing(backend: str, flatten: bool, request: pytest.FixtureRequest) -> None:
    """And is captured: replays read the gradients as they are then, and count what they skip."""
    pair = Pair(backend, flatten=flatten, max_grad_norm=0.5, skip_nonfinite=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        pair.ours.step()
    torch.cuda.current_stream().wait_stream(side)
    request.getfixturevalue("no_waiting")
    pair.ours.step()
    torch.cuda.set_sync_debug_mode("default")
    pair.eager_steps(1e-2, 1e-2)
    pair.check()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pair.ours.step()
    for factor in (2.0, torch.inf, 0.0):
        for p in (*pair.params, *pair.copies):
            p.grad.mul_(factor).nan_to_num_(nan=1.0, posinf=torch.inf, neginf=torch.inf)
        graph.replay()
        pair.eager_steps(1e-2)
        pair.check()
        assert_same_bits(pair.ours.grad_norm.cpu(), pair.eager.grad_norm)
    assert int(pair.ours.skipped) == int(pair.eager.skipped) == 1


def test_clipping_over_the_cpu_and_a_gpu() -> None:
    """The norm is that of the same parameters on one device."""
    pair = Pair(None, devices=("cpu", "cuda"), max_grad_norm=0.5, skip_nonfinite=True)
    pair.ours.step()
    pair.eager_steps(1e-2)
    pair.check()
    assert_same_bits(pair.ours.grad_norm, pair.eager.grad_norm)
