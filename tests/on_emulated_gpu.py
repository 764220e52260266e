"""The Triton backend without its interpreter and without a GPU: see ``emulated_gpu``.

``test_triton_compiled.py`` runs this file in processes of their own: Triton chooses its interpreter when it
is imported. FUSED_OPTIM_EMULATED is the compute capability.
"""

import ctypes
import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import worlds
from emulated_gpu import EmulatedGpu
from fused_optim.kernels import step as kernels
from helpers import Parameters, assert_same_bits, gradient, parameters, raises_unchanged, results, train
from torch import Tensor
from triton.backends.compiler import GPUTarget
from worlds import FEW, FP32, FP64, Formats, Work, each, named

from bench.formats import STATES, TRIPLES
from fused_optim import AdaBelief, AdamaxW, AdamW
from fused_optim.backends import BACKENDS, Inputs
from fused_optim.backends.triton import TRITON
from fused_optim.rules import RULES
from fused_optim.table import Batch

torch.use_deterministic_algorithms(True)  # memory for the coefficients is filled with NaN
GPU = EmulatedGpu(int(os.environ["FUSED_OPTIM_EMULATED"]))
FORMATS = [named(*names[:2], *STATES[names[2]]) for names in TRIPLES]
PAIRS = [(rule, f) for rule in RULES for f in FORMATS if f in FEW or rule == "adabelief"]
"""One rule in each format, since it does not matter to a codec which; and each rule in a few."""
CHECKS = [
    *((worlds.check_sizes_and_alignments, *pair) for pair in PAIRS),
    *((worlds.check_special_values, *pair) for pair in PAIRS if pair[1].mu.low_precision),
    *((worlds.check_edges_of_ranges, rule, f) for rule in RULES for f in (worlds.SHOWS_EACH_BIT, FP32)),
    *((worlds.check_all_codes_under_all_exponents, given) for given in worlds.GRAD_EXPONENTS),
    *((worlds.check_corrections_that_become_one, rule, f) for rule in RULES for f in (FP32, FP64)),
    *((worlds.check_counters, "adamaxw", f, 5) for f in (FP32, FP64)),
    *((worlds.check_found_inf_changes_nothing, "adamaxw", f, torch.nan) for f in FEW),
    *((worlds.check_64_bit_offsets, f) for f in FEW),
    *((worlds.check_square_sums, f) for f in worlds.OF_GRADIENTS),
    (worlds.check_clip,),
]


class Library:
    """``fused_optim.backends.triton``, with a table that the test made."""

    def chunk_size(self, formats: Formats) -> int:
        return kernels.chunk_size(*(f.name for f in formats))

    def step(self, work: Work) -> int:
        batch, inputs = work.batch, work.inputs
        table = {"rows": work.rows, "grads": work.addresses, "chunks": work.chunks}
        table["counters"] = batch.counters
        constants = [*table.values(), *(t for t in inputs if t is not None), *work.grads]
        GPU.memory = lambda: ([*work.steps, *work.stored], constants)
        before = len(GPU.launched)
        batch.on_device = table
        TRITON.step(batch, inputs)
        return len(GPU.launched) - before

    def square_sums(self, batch: Batch, grad_scale: Tensor | None, sums: Tensor) -> None:
        given = [*(o.grad for o in batch.items), *([] if grad_scale is None else [grad_scale])]
        constants = [batch.rows, batch.grads, batch.norm_chunks, *given]
        GPU.memory = lambda: ([sums], constants)
        TRITON.square_sums(batch, grad_scale, sums)

    def clip(self, sums: Tensor, max_grad_norm: Tensor, skipped: Tensor | None) -> Tensor:
        GPU.memory = lambda: ([] if skipped is None else [skipped], [sums, max_grad_norm])
        return TRITON.clip(sums, max_grad_norm, skipped)


LIBRARY = Library()


@each(CHECKS)
def test_a_step(check: Callable[[Library], Any]) -> None:
    check(LIBRARY)


@pytest.mark.parametrize("count", [3, 20000])
@pytest.mark.parametrize("formats", [FP32, worlds.WITH_CODES, *worlds.FEW[2:]], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_rows_without_a_gradient_cost_no_more(rule: str, formats: Formats, count: int) -> None:
    """A full chunk of zero gradients and moments takes no more instructions than others, divided by a scale
    and, at first, by both bias corrections. With a NaN some are divided as usual, or all stepped twice."""
    issued = []
    for values in (None, 0.0, torch.nan):
        row = worlds.Row(LIBRARY.chunk_size(formats), hyper_row=2, count=count)  # without eps_root
        world = worlds.World(rule, formats, [row])
        world.hyper[row.hyper_row, 2] = 0.9
        world.new_gradients()
        if values is not None:
            world.grads[0].fill_(values)
            for t in (*world.stored[0][1:], *world.aux[0][1:]):
                if t is not None:
                    t.zero_()
        world.step(LIBRARY, world.inputs(3.0, None))
        issued.append(GPU.issued)
    assert issued[1] <= issued[0] < (0.6 if formats.mu.low_precision else 1) * issued[2]


# The optimizers.


def whole_memory(tensors: Iterable[tuple[Tensor | None, int]]) -> list[Tensor]:
    """What lies behind tensors, each storage once, and of each tensor at least so many elements."""
    sizes = {
        t.untyped_storage().data_ptr(): max(t.untyped_storage().nbytes(), n * t.element_size())
        for t, n in tensors
        if t is not None and t.numel()
    }
    return [
        torch.frombuffer((ctypes.c_uint8 * n).from_address(at), dtype=torch.uint8) for at, n in sizes.items()
    ]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="triton" steps what is in the CPU's memory."""

    def step(batch: Batch, inputs: Inputs) -> None:
        # Neighbours in a flat buffer may share a row, which has the padding of their slots in it.
        merged = not batch.key.formats.index_dependent
        slots = [(o, o.slot[1] - o.slot[0] if merged else 0) for o in batch.items]
        stored = [(t, n) for o, n in slots for t in (*o.stored, *o.aux)]
        stored += [(batch.unread, 0), *((o.state["step"], 0) for o in batch.items)]
        constants = [*((o.grad, n) for o, n in slots), *((t, 0) for t in inputs)]
        memory = whole_memory(stored), whole_memory(constants)
        GPU.memory = lambda: memory
        TRITON.step(batch, inputs)

    norm = {"square_sums": LIBRARY.square_sums, "clip": LIBRARY.clip}
    backend = dataclasses.replace(TRITON, why_not=lambda device: None, step=step, **norm)
    monkeypatch.setitem(BACKENDS, "triton", backend)
    GPU.launched.clear()


def ours_and_eager(
    optimizer_class: Any, params: Callable[[], Parameters], **options: Any
) -> list[tuple[Any, Parameters]]:
    """Two optimizers and their parameters."""
    sets = [params(), params()]
    return [(optimizer_class(p, backend=b, **options), p) for b, p in zip(("triton", "eager"), sets)]


OPTIMIZERS: list[tuple[Any, torch.dtype, dict[str, Any]]] = [
    (AdaBelief, torch.float32, {}),
    (AdamaxW, torch.float32, {"state_format": "8bit", "flatten": True}),
    (AdamW, torch.float32, {"nesterov": True, "flatten": True}),
    (AdamW, torch.bfloat16, {"master_weights": "split16", "state_format": "bf16"}),
    (AdaBelief, torch.bfloat16, {"stochastic_rounding": True, "flatten": True}),
    (AdaBelief, torch.float32, {"max_grad_norm": 0.5}),
]


@pytest.mark.parametrize(("optimizer_class", "dtype", "options"), OPTIMIZERS, ids=str)
def test_optimizers(on_gpu: None, optimizer_class: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Two launches a step, whatever there is to step, and two more to clip; and the bits of eager."""
    shapes: list[tuple[int, ...]] = [(5,), (64, 65), (0,), (), (3, 1)]
    both = ours_and_eager(
        optimizer_class, lambda: parameters(shapes, dtype), lr=0.01, weight_decay=0.1, **options
    )
    for optimizer, params in both:
        train(optimizer, params, 1)
        for seed in (1, 2):
            for i, p in enumerate(params):
                p.grad.copy_(gradient(p, 1000 * seed + i))
            optimizer.step()
        for seed in (3, 4, 5):  # it comes and goes
            params[1].grad = gradient(params[1], seed) if seed == 4 else None
            optimizer.step()
    assert_same_bits(*(results(optimizer) for optimizer, _ in both))
    clipping = ["square_sums_kernel", "clip_kernel"] if "max_grad_norm" in options else []
    assert GPU.launched == [*clipping, "prologue_kernel", "step_kernel"] * 6


@pytest.mark.parametrize(("optimizer_class", "flatten"), [(AdaBelief, False), (AdamaxW, True)])
def test_interrupted_between_launches(
    on_gpu: None, optimizer_class: Any, flatten: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is raised between the prologue and the step kernel leaves all as it was."""
    both = ours_and_eager(optimizer_class, lambda: parameters([(300,), (2, 3)]), flatten=flatten)
    for optimizer, params in both:
        train(optimizer, params, 2)

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    GPU.launched.clear()
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "launch_step", interrupt)
        with raises_unchanged(both[0][0], KeyboardInterrupt):
            both[0][0].step()
    assert GPU.launched == ["prologue_kernel"]
    for optimizer, _ in both:
        optimizer.step()
    assert_same_bits(*(results(optimizer) for optimizer, _ in both))


def test_what_overlaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step kernel and its prologue: not where a driver may be too old to capture it."""
    gpus = {"a": ("cuda", 90, 32), "b": ("cuda", 89, 32), "c": ("hip", "gfx942", 64)}
    for cuda, overlapping in (("13.0", ["a"]), ("12.8", []), (None, ["a"])):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert [k for k, gpu in gpus.items() if kernels.overlaps(GPUTarget(*gpu))] == overlapping
    assert not kernels.overlaps(None)


def test_profilers_see_launches(on_gpu: None) -> None:
    params = parameters([(300,)])
    optimizer, seen = AdaBelief(params, backend="triton"), list[str]()

    def enter(launch: Any) -> None:
        seen.append(launch.get()["name"])

    hooks = kernels.triton.knobs.runtime.launch_enter_hook
    for _ in range(2):
        hooks.add(enter)
        train(optimizer, params, 1)
        hooks.remove(enter)
        train(optimizer, params, 1)
    assert seen == ["prologue_kernel", "step_kernel"] * 2


def test_failure_to_load(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that cannot be compiled or loaded fails before another is launched."""
    both = ours_and_eager(AdaBelief, lambda: parameters([(300,)], torch.float16), state_format="bf16")
    for _, (p,) in both:
        # In no other test, so that the kernel is not loaded yet.
        p.grad_dtype = torch.float32
        p.grad = torch.ones(300)
    load_binary = GPU.load_binary

    def fail(name: str, *rest: Any) -> tuple[Any, ...]:
        if name == "step_kernel":
            raise RuntimeError("no memory for it")
        return load_binary(name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(GPU, "load_binary", fail)
        with raises_unchanged(both[0][0], RuntimeError, "no memory for it"):
            both[0][0].step()
    assert GPU.launched == []
    for optimizer, _ in both:
        optimizer.step()
    assert_same_bits(*(results(optimizer) for optimizer, _ in both))


def test_nothing_is_compiled_twice(on_gpu: None) -> None:
    """Whatever the number of tensors, sizes, hyperparameters and step numbers: Triton compiles anew for an
    integer that is 1 or a multiple of 16, unless it is told not to."""

    def step(n: int, numel: int, **options: Any) -> None:
        params = parameters([(numel,)] * n)
        optimizer = AdaBelief(params, backend="triton", **options)
        train(optimizer, params, 2)

    step(2, 3)
    compiled = len(GPU.kernels)
    for n in (1, 15, 16, 17, 130):
        step(n, n, lr=n / 1000, betas=(0.5, n / 200), eps=1.0 / n, weight_decay=n / 100, maximize=n == 16)
    assert len(GPU.kernels) == compiled
