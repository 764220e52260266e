"""Memory that runs out, signals, forks, threads and broken checkpoints: the error is raised, every parameter
is whole, and the next step is right."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from helpers import RULES, Make, assert_same_bits, built_once, in_a_process, like, parameters, snapshot, train
from test_backends import cpu, threads
from test_histories import Model

import fused_optim
from examples.train_gpt import History, save_checkpoint

MODEL = [(0, 8, 0, False), (4, 17, 0, False), (2, 9, 1, False), (0, 12, 1, True)]
"""Parameters as :class:`Model` takes them: dtype, shape with layout, group, and whether in shared memory."""


PACKAGE = str(Path(fused_optim.__file__).parent)


# Memory


def fail_every_allocation(options: int, backend: str, flatten: bool, warm: int) -> None:
    """In a step of MODEL, one after another; run where failing_allocations.cpp is preloaded."""
    library = ctypes.CDLL(None)

    @contextmanager
    def failing(n: int) -> Iterator[None]:
        library.fail_after(n)
        try:
            yield
        finally:
            failing.left = library.allocations_left()
            library.fail_after(-1)

    failed = 0
    while True:
        w = Model(MODEL, options, "adabelief", backend, flatten)
        w.train(warm)
        w.new_gradients()
        w.interrupt(failing(failed))
        if failing.left >= 0:
            print(failed)
            return
        failed += 1
        w.step()
        w.train(1)


@cpu
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ and glibc")
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="something else is preloaded")
@pytest.mark.parametrize("case", [(0, "cpu", False, 0), (0, "cpu", False, 1), (6, "cpu", True, 1)])
def test_memory_runs_out(
    case: Any, tmp_path_factory: pytest.TempPathFactory, record_property: Callable[[str, object], None]
) -> None:
    """At each allocation of a tensor in a step, and at each that the extension makes."""
    source = str(Path(__file__).with_name("failing_allocations.cpp"))

    def build(folder: Path) -> None:
        command = ["g++", "-shared", "-fPIC", "-O1", source, "-o", str(folder / "failing.so")]
        subprocess.run(command, check=True)

    library = built_once(tmp_path_factory, "failing_allocations", build) / "failing.so"
    code = f"import test_faults; test_faults.fail_every_allocation(*{case!r})"
    failed = int(in_a_process(code, LD_PRELOAD=str(library)))
    assert failed > (2 if case[3] else 5)  # a step like one before has coefficients, and what threads share
    record_property("allocations failed", failed)


# Signals


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """KeyboardInterrupt after a while, unless the block has ended by then."""
    running = True

    def handler(*_: object) -> None:
        if running:
            raise KeyboardInterrupt

    # It stays, and does nothing later: CPython reports a signal that meets the exchange of its handler.
    signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        try:
            running = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        finally:
            torch.set_grad_enabled(True)  # torch.no_grad leaves it off where a signal meets its end


# CPython reports and drops a KeyboardInterrupt that meets a finalizer or a callback of the garbage
# collector's, and other tests in the same process leave some of these.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("options", [0, 6])
def test_interrupted_at_any_time(
    options: int, backend: str, flatten: bool, record_property: Callable[[str, object], None]
) -> None:
    interrupted = 0
    w = Model(MODEL, options, "adabelief", backend, flatten)
    for i in range(25):
        w.new_gradients()
        interrupted += bool(w.interrupt(alarm((1 + i) * (4e-5 if backend == "cpu" else 1.5e-4))))
        w.step()
    record_property("steps interrupted", interrupted)


class AtLine:
    """KeyboardInterrupt before the ``n``-th line of the package that the block comes to, if there is one."""

    def __init__(self, n: int) -> None:
        self.n, self.seen = n, set[Any]()

    def trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.seen.add((frame.f_code, frame.f_lineno))
            if len(self.seen) > self.n:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self.trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)


def test_interrupted_at_each_line(flatten: bool, record_property: Callable[[str, object], None]) -> None:
    """Of a step that has another lr, which is taken back then, and makes states and a plan."""
    w = Model([(1, 17, 0, False)], 6, "adabelief", "cpu", flatten)
    group, interrupted = w.optimizer.param_groups[0], 0
    lr, group["lr"] = group["lr"], 0.3
    while w.interrupt(AtLine(interrupted)):
        assert torch.is_grad_enabled()
        interrupted, group["lr"] = interrupted + 1, lr
        w.new_gradients()
        w.step()
        w.optimizer.state.clear()
        group["lr"] = 0.3
    assert interrupted > 100
    record_property("steps interrupted", interrupted)


# Processes and threads

STEPPED = """
import os, sys, threading, time
import torch
from fused_optim import AdaBelief
torch.set_num_threads(4)
p = torch.ones(200000, requires_grad=True)
p.grad = torch.full_like(p, 0.5)
optimizer = AdaBelief([p], backend="cpu")
optimizer.step()
"""


@cpu
def test_a_forked_child_steps(tmp_path: Path) -> None:
    """After a step with several threads, of which the child has none; the parent goes on with all of them."""
    code = f"""
child = os.fork()
optimizer.step()
if child == 0:
    torch.save(p, {str(tmp_path / "child")!r})
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(p, torch.load({str(tmp_path / "child")!r}))
optimizer.step()
"""
    in_a_process(STEPPED + code)


@cpu
def test_the_interpreter_ends_while_a_daemon_thread_steps() -> None:
    """In the one step that it makes: the main thread ends after a quarter of what such a step takes."""
    code = """
begin = time.perf_counter()
optimizer.step()
quarter = (time.perf_counter() - begin) / 4
threading.Thread(target=optimizer.step, daemon=True).start()
time.sleep(quarter)
"""
    in_a_process(STEPPED.replace("200000", "2**25").replace("num_threads(4)", "num_threads(2)") + code)


def test_two_threads_and_a_backward_pass_beside_them(make: Make, flatten: bool) -> None:
    """Each optimizer, with its own lr, steps as it does alone. They are long enough in C++ to meet there."""
    shapes = [(300,), (7, 40), (), (400000,)]
    models = [parameters(shapes, seed=i) for i in range(3)]
    alone = [like(params) for params in models]
    beside = torch.ones(100, 100, requires_grad=True)

    def run(params: Any, lr: float) -> None:
        train(make(params, lr=lr, flatten=flatten), params, 12)

    def backward() -> None:
        while any(t.is_alive() for t in running):
            (beside @ beside).sum().backward()

    with threads(2):
        running = [threading.Thread(target=run, args=(params, 0.1**i)) for i, params in enumerate(models)]
        other = threading.Thread(target=backward)
        for t in [*running, other]:
            t.start()
        for t in [*running, other]:
            t.join()
    for i, (params, expected) in enumerate(zip(models, alone)):
        run(expected, 0.1**i)
        assert_same_bits([p.detach() for p in params], [p.detach() for p in expected])


# Checkpoints


def test_an_example_that_is_killed_while_it_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps the checkpoint of before."""
    path = tmp_path / "checkpoint"
    save_checkpoint(path, {}, 1, History())
    before = path.read_bytes()

    def killed(value: Any, file: Any) -> None:
        Path(file).write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {}, 2, History())
    assert path.read_bytes() == before


BROKEN = [
    "x[k] = x[k].double()", "x[k] = x[k].to(torch.int32)", "x[k] = x[k].to(torch.complex64)", "del x[k]",
    "x[k] = x[k].reshape(-1)[:-1]", "x[k] = x[k].repeat(2)", "x[k] = None", "x[k] = 'broken'", "x[k] = {}",
    "x[k] = torch.full_like(x[k], 255 if x[k].dtype == torch.uint8 else -1)",
    "x['step'] = torch.tensor(float('nan'))", "x['step'] = torch.tensor([1, 2])", "x['step'] = 2**40",
    "x['step'] = float('inf')", "x.clear()", "saved['state'] = {}", "saved['state'].pop(0)",
    "saved['param_groups'].pop()", "saved['param_groups'][0]['params'].pop()",
    "saved['param_groups'][0].pop('lr')", "saved['param_groups'][0]['betas'] = (0.9,)",
    "saved['param_groups'][0]['lr'] = float('nan')", "saved['count'] = -1", "saved['count'] = 'many'",
    "del saved['state']", "del saved['param_groups']", "saved['state'][0] = 3", "saved['state'] = []",
    "saved['param_groups'][0]['eps'] = '1e-8'",
]  # fmt: skip
"""What is done to a state dict, or to an entry k of the state x of its first parameter."""


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.filterwarnings("ignore:saved group:UserWarning")
def test_broken_state_dicts(broken: str, record_property: Callable[[str, object], None]) -> None:
    """They are refused, with nothing changed, or loaded; the next step is right either way."""
    for options in (0, 2, 6):
        for number in range(5):
            backend, flatten = ("eager", "cpu")[number % 2], (number // 2 + options // 2) % 2 == 1
            w = Model(MODEL[:1], options, list(RULES)[number % 4], backend, flatten)
            w.train(2)
            saved, before = w.optimizer.state_dict(), snapshot(w.optimizer)
            x = saved["state"][0]
            k = sorted(x)[number % len(x)]
            exec(broken, {"torch": torch, "saved": saved, "x": x, "k": k})  # noqa: S102
            try:
                w.optimizer.load_state_dict(saved)
            except (ValueError, TypeError, KeyError) as error:
                assert str(error)
                assert_same_bits(snapshot(w.optimizer), before)
            w.train(2)
    record_property("broken state dicts", 15)
