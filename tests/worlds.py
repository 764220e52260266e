"""What the tests of compiled kernels step: parameters of awkward sizes and addresses, each with a
pattern around it that nothing may write to, and the table of them."""

import functools
import itertools
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor

from fused_optim import storage
from fused_optim.backends.base import Inputs
from fused_optim.backends.eager import EAGER
from fused_optim.clip import Clipping
from fused_optim.reference import MAX_COUNT, Hyperparameters
from fused_optim.rounding import MU, NU, PARAM, Place
from fused_optim.rules import RULES
from fused_optim.storage import FORMATS, Format, native_gradient
from fused_optim.table import ADDRESSES, Batch, BatchKey, Operands


class Formats(NamedTuple):
    """What a kernel is made for beside its rule."""

    param: Format
    grad: Format
    mu: Format
    nu: Format

    def __str__(self) -> str:
        return "-".join(f.name for f in self[:3])


def named(*names: str) -> Formats:
    return Formats(*(FORMATS[name] for name in names))


def of_operand(operand: int) -> list[Format]:
    """Formats of float32 arithmetic that this operand may be stored in."""
    return [f for f in FORMATS.values() if operand in f.operands and f.working == torch.float32]


MOMENTS = [(mu, nu) for mu in of_operand(MU) for nu in of_operand(NU) if mu.choice == nu.choice]
FP32, FP64 = named("fp32", "fp32", "fp32", "fp32"), named("fp64", "fp64", "fp64", "fp64")
COVERING = [FP64]
"""Each parameter format with each of moments, and either with each of gradients."""
for i, param in enumerate(of_operand(PARAM)):
    grads = [f for f in of_operand(PARAM) if f.plain and native_gradient(param.dtype, f.dtype)]
    COVERING += [Formats(param, grads[(i + k) % len(grads)], *moments) for k, moments in enumerate(MOMENTS)]
LOW_PRECISION = [f for f in COVERING if f.mu.low_precision]
WITH_CODES = named("fp32", "fp32", "e4m3", "e5m3")
OF_BF16 = named("bf16", "bf16", "bf16_dither", "bf16_dither")
FEW = [FP32, FP64, OF_BF16, named("split8", "bf16", "e4m3", "e5m3")]
"""Where formats differ most."""
OF_GRADIENTS = [FP32, FP64, OF_BF16, named("fp16", "fp16", "fp32", "fp32")]
"""Each format of gradients."""


class Row(NamedTuple):
    """One parameter of a test: its size, and how many elements past a 16-byte boundary each
    of its tensors lies: gradient, parameter, moments and the auxiliary ones, as in the table."""

    numel: int
    offsets: tuple[int, ...] = (0,) * 7
    hyper_row: int = 0
    count: int = 0
    first: int = 0  # the index of its first element in a whole parameter, of which it is a shard


HYPER = [
    Hyperparameters(1e-3, 0.0, 0.9, 0.999, 1e-8, 1e-16, 0.0, 0.0, 0.0),
    Hyperparameters(2e-3, 0.1, 0.8, 0.99, 1e-3, 1e-8, 0.0, 1.0, 1.0),
    Hyperparameters(0.1, 0.01, 0.0, 0.5, 1e-2, 0.0, 0.3, 0.0, 0.0),
    Hyperparameters(0.0, 0.0, 0.99, 0.0, 1.0, 1e-3, 0.0, 1.0, 0.0),
    Hyperparameters(1e-3, 0.0, 0.9, 0.999, 1e-8, 1e-16, 0.0, 0.0, 1.0),
]
NESTEROV = len(HYPER) - 1
"""The row that differs from the first in Nesterov's look-ahead alone."""
SPECIAL = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-41, 6e-8, -6e4, 3e38]
GUARD = 64


class World:
    """Parameters, gradients and states with a pattern around each, and the table of them."""

    def __init__(self, rule: str, formats: Formats, rows: Iterable[Row], special: bool = False) -> None:
        self.rng = torch.Generator().manual_seed(0)
        self.buffers: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.steps: list[Tensor] = []
        self.stored: list[list[Tensor]] = []
        self.aux: list[list[Tensor | None]] = []
        items = []
        batch_key, keys = BatchKey(torch.device("cpu"), RULES[rule], *formats), RULES[rule].states
        for key, row in enumerate(rows):
            g = self._guarded(formats.grad.dtype, row.numel, row.offsets[0])
            step = torch.tensor(row.count)
            state = {"step": step}
            stored: list[Tensor] = []
            aux: list[Tensor | None] = []
            for k, (f, name, operand) in enumerate(zip(batch_key.formats, ("", *keys), (PARAM, MU, NU))):
                values = self._values(row.numel, special).to(f.working)
                place = Place(torch.tensor(row.count), key, operand)
                new = f.encode(values.square() if operand == NU else values, place)
                stored.append(self._guarded(f.dtype, row.numel, row.offsets[1 + k]).copy_(new[0]))
                part = f.aux_of(name)
                aux.append(None)
                if part is not None:
                    numel = part.numel(row.numel)
                    memory = self._guarded(part.dtype, numel, row.offsets[4 + k])
                    aux[k] = state[part.key] = memory.copy_(new[1])
            state.update(zip(keys, stored[1:]))
            random_key = key << 32 | 12345
            owner, numbers = SimpleNamespace(state={stored[0]: state}), (row.hyper_row, random_key, row.first)
            operands = stored[0], None, g, owner, batch_key, *numbers
            items.append(Operands(str(key), *operands, number=key))
            self.grads.append(g)
            self.steps.append(step)
            self.stored.append(stored)
            self.aux.append(aux)
        self.batch = Batch(batch_key, items)
        self.hyper = torch.tensor(HYPER, dtype=torch.float64)

    def _guarded(self, dtype: torch.dtype, numel: int, offset: int) -> Tensor:
        fill = torch.nan if dtype.is_floating_point else 85
        buffer = torch.full((numel + offset + 2 * GUARD,), fill, dtype=dtype)
        assert buffer.data_ptr() % 16 == 0
        self.buffers.append(buffer)
        return buffer[GUARD + offset : GUARD + offset + numel]

    def _values(self, numel: int, special: bool) -> Tensor:
        values = torch.randn(numel, generator=self.rng, dtype=torch.float64)
        values *= 10 ** (4 * torch.rand(numel, generator=self.rng) - 3)
        # Rows of odd sizes have none: with low precision a full chunk that has one is stepped the long way.
        if special and numel >= len(SPECIAL) and numel % 2 == 0:
            values[torch.randperm(numel, generator=self.rng)[: len(SPECIAL)]] = torch.tensor(SPECIAL).double()
        return values

    def new_gradients(self, special: bool = False) -> None:
        for g in self.grads:
            g.copy_(self._values(len(g), special))

    def inputs(
        self, grad_scale: float | None, found_inf: float | None, factor: float | None = None, skip: float = 0
    ) -> Inputs:
        clip = None if factor is None else torch.tensor([0, 0, factor, skip], dtype=torch.float64)
        given = (None if x is None else torch.tensor(x) for x in (grad_scale, found_inf))
        return Inputs(self.hyper, *given, clip)

    def contents(self) -> list[list[Tensor]]:
        """All memory, guards included, and the step numbers."""
        return [[b.clone() for b in self.buffers], [s.clone() for s in self.steps]]

    def step(self, library: Any, inputs: Inputs, skipped: int = 0, **where: int) -> int:
        """One step by a library, of tensors as if ``skipped`` chunks lay before each; how many launches it
        took. ``where``: more arguments of the library's."""
        key, batch = self.batch.key, self.batch
        formats = Formats(key.param, key.grad, key.mu, key.nu)
        chunk = library.chunk_size(formats)
        number = batch.chunks(chunk)[:, 1]
        chunks = batch.chunks(chunk).clone()
        chunks[:, 1] = torch.where(number < 0, number - skipped, number + skipped)
        rows = batch.rows.clone()
        rows[:, 0] += skipped * chunk
        grads = batch.grads - skipped * chunk * key.grad.dtype.itemsize
        for i, f in enumerate(key.formats):
            rows[:, ADDRESSES.start + i] -= skipped * chunk * f.dtype.itemsize
            if f.aux is not None:
                bytes_skipped = skipped * chunk // f.aux.block * f.aux.dtype.itemsize
                rows[:, ADDRESSES.start + 3 + i] -= bytes_skipped
        stored = [t for parts in (*self.stored, *self.aux) for t in parts if t is not None]
        work = Work(batch, formats, rows, grads, chunks, inputs, self.steps, self.grads, stored)
        return library.step(work, **where)


class Work(NamedTuple):
    """What a step is made from: a batch, with rows, gradients' addresses and chunks in place of its own, and
    what the addresses in these lead to."""

    batch: Batch
    formats: Formats
    rows: Tensor
    addresses: Tensor
    chunks: Tensor
    inputs: Inputs
    steps: list[Tensor]
    grads: list[Tensor]
    stored: list[Tensor]


def step_both(
    library: Any, worlds: list[World], grad_scale: float | None = None, found_inf: float | None = None,
    factor: float | None = None, skipped: int = 0,
) -> None:  # fmt: skip
    """One step of the first by eager and of the second by the library, which must agree."""
    inputs = worlds[0].inputs(grad_scale, found_inf, factor)
    EAGER.step(worlds[0].batch, inputs)
    assert worlds[1].step(library, inputs, skipped) == 2
    assert_same_bits(worlds[1].contents(), worlds[0].contents())


def rows_of_sizes(chunk: int) -> Iterator[Row]:
    """Each size aligned and unaligned, and a full chunk with one operand unaligned."""
    sizes = (0, 1, 7, 127, 128, 129, 1025, chunk - 1, chunk, chunk + 3, 2 * chunk + 5)
    for i, numel in enumerate(sizes):
        yield Row(numel, hyper_row=i % len(HYPER), count=i)
        yield Row(numel, (1,) * 7, hyper_row=(i + 1) % len(HYPER), count=i)
    for k in range(7):
        yield Row(chunk + 1, tuple(3 * (k == j) for j in range(7)), hyper_row=k % len(HYPER), count=100)
    for first in (8, 13, 2**33 + 3):  # of shards
        yield Row(chunk + 130, count=7, first=first)


def special_values(formats: Formats) -> Iterator[tuple[bool, str, float, float | None]]:
    """Whether a warp must notice it, the operand, what an element has stored, and in its auxiliary tensor."""
    yield False, "grad", 0.0, None
    for x in (torch.inf, -torch.inf, torch.nan, 2.0**127):
        yield True, "grad", x, None
        yield True, "param", x, 0
    if formats.param.name.startswith("split"):
        for zero in (0.0, -0.0):
            yield True, "param", zero, -1  # somebody wrote it
    if formats.mu.name == "e4m3":
        codes = [("mu", code | sign) for code in (126, 127) for sign in (0, 128)]
        yield from ((True, operand, code, None) for operand, code in [*codes, ("nu", 254), ("nu", 255)])
        yield True, "mu", 125, 239  # 1.6 * 2^127
    else:
        for x in (torch.inf, torch.nan, 3.38e38):
            yield True, "mu", x, None
            yield True, "mu", -x, None
            yield True, "nu", x, None


# Contracts that compiled kernels are held to, however they are run: a library has chunk_size(formats) and
# step(work, **where), which returns how many launches it took.


def each(cases: Iterable[tuple[Any, ...]]) -> Any:
    """A test's parameter ``check``, a function of a library: of each case the first, given the rest."""
    cases = list(cases)
    names = ["-".join([check.__name__.removeprefix("check_"), *map(str, given)]) for check, *given in cases]
    checks = [lambda library, c=check, g=given: c(library, *g) for check, *given in cases]
    return pytest.mark.parametrize("check", checks, ids=names)


def check_sizes_and_alignments(library: Any, rule: str, formats: Formats) -> None:
    chunk = library.chunk_size(formats)
    worlds = [World(rule, formats, rows_of_sizes(chunk), special=True) for _ in range(2)]
    numbers = worlds[0].batch.chunks(chunk)[:, 1]
    assert 0 < int((numbers >= 0).sum()) < len(numbers)
    for scale, found_inf, factor, special in (
        (None, None, None, False), (3.0, 0.0, 0.3, True), (-0.5, None, None, False)
    ):  # fmt: skip
        for world in worlds:
            world.new_gradients(special)
        step_both(library, worlds, scale, found_inf, factor)


@functools.cache
def steps_until_one(beta: float, working: torch.dtype) -> int:
    """The first step number whose bias correction is exactly 1."""
    rounded = float(torch.tensor(beta, dtype=working))
    return next(n for n in itertools.count(1) if 1 - torch.tensor(rounded**n).to(working) == 1)


def check_corrections_that_become_one(library: Any, rule: str, formats: Formats) -> None:
    """Step by step from corrections other than 1 to 1, with a learning rate that shows the last bit."""
    chunk, working = library.chunk_size(formats), formats.param.working
    first, second = (steps_until_one(beta, working) for beta in (0.9, 0.999))
    if working == torch.float32:
        assert (first, second) == (165, 17321)
    counts = (first, second, second + 80)
    rows = [Row(chunk + 5, count=count - 4, hyper_row=h) for count in counts for h in (0, NESTEROV)]
    worlds = [World(rule, formats, rows) for _ in range(2)]
    for world in worlds:
        world.hyper[[0, NESTEROV], 0] = 1.0
    for _ in range(5):
        for world in worlds:
            world.new_gradients()
        step_both(library, worlds)


def check_special_values(library: Any, rule: str, formats: Formats) -> tuple[list[World], list[bool]]:
    """Each row is a full chunk with one special value: in a warp's first, middle or last lane of eight
    elements. Gives the worlds, and of each row whether its warp must notice."""
    chunk, warp = library.chunk_size(formats), 256
    cases = [
        (chunk - 3 * warp + place, case)
        for case in special_values(formats)
        for place in (0, warp // 2 + 3, warp - 1)
    ]
    rows = [Row(chunk, hyper_row=k % 2 * NESTEROV) for k in range(len(cases))]
    worlds = [World(rule, formats, rows) for _ in range(2)]
    for world in worlds:
        world.new_gradients()
        for row, (i, (_, operand, x, remainder)) in enumerate(cases):
            if operand == "grad":
                world.grads[row][i] = x
                continue
            k = ("param", "mu", "nu").index(operand)
            world.stored[row][k][i] = x
            aux = world.aux[row][k]
            if aux is not None and remainder is not None:
                aux[i if len(aux) == chunk else i // 128] = remainder
    step_both(library, worlds)
    return worlds, [noticed for _, (noticed, *_) in cases]


ALL_ONES = 2 - 2.0**-23
SMALL = [0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 2.0**-81, 2.0**-80, -(2.0**-80) * ALL_ONES, 2.0**-60,
         2.0**-40 * ALL_ONES]  # fmt: skip
LARGE = [1e-9, 0.5, -ALL_ONES, ALL_ONES / 4, 1 + 2.0**-23, 3.0, -0.1, 2.0**19]
BEYOND = [2.0**39, 2.0**40, 2.0**41, -(2.0**64), 2.0**127, torch.inf, torch.nan]
"""What fast paths divide and take roots of, and what they leave to others."""
SHOWS_EACH_BIT = named("split16", "fp32", "bf16_dither", "bf16_dither")


def check_edges_of_ranges(library: Any, rule: str, formats: Formats, together: int = 8) -> None:
    """Quotients and roots, each bit of which shows: most of the parameter is zeros, and the learning rate is
    1. Small numbers are divided by small and large ones, and others by large ones. ``together``: elements
    that are all divided as usual if one of them is small."""
    chunk = library.chunk_size(formats)
    hyper = [
        Hyperparameters(1.0, 0.0, b1, b2, eps, eps_root, 0.0, 0.0, nesterov)
        for b1, b2, eps_root in ((0.0, ALL_ONES / 2, 0.0), (0.0, 0.0, 0.0), (0.9, 0.999, 1e-16))
        for eps, nesterov in ((0.0, 0.0), (1e-23, 0.0), (1e-16, 0.0), (1e-8, 1.0), (2.0**127, 0.0))
    ]
    kinds = [(SMALL, SMALL, False), (SMALL + LARGE, LARGE, False), (SMALL + LARGE, LARGE, True)]
    cases = [(h, count, kind) for h in range(len(hyper)) for count in (3, 20000) for kind in kinds]
    rows = [Row(chunk, hyper_row=h, count=count) for h, count, _ in cases]
    worlds = [World(rule, formats, rows) for _ in range(2)]
    i = torch.arange(chunk)
    j = i // together
    for world in worlds:
        world.hyper = torch.tensor(hyper, dtype=torch.float64)
        for k, (h, _, (divided, divisors, beyond)) in enumerate(cases):
            g, (p, mu, nu), remainder = world.grads[k], world.stored[k], world.aux[k][0]
            g.copy_(torch.tensor(divided)[(j + k) % len(divided)])
            mu.copy_(torch.tensor(divided)[(j // len(divided) + k) % len(divided)])
            nu.copy_(torch.tensor(divisors)[i % len(divisors)].abs())
            p[i % 3 < 2], p[i % 3 == 0] = 0.0, -0.0
            if remainder is not None:
                remainder[i % 3 < 2] = 0
            if beyond:
                (g, mu)[h % 2][5 * k] = nu[7 * k] = BEYOND[h % len(BEYOND)]
    step_both(library, worlds)
    stepped = [torch.stack([t.float().abs() for t in stored]) for stored in worlds[0].stored]
    assert sum(bool((x < 2.0**40).all()) for x in stepped) > len(cases) / 3, "there are no fast paths"
    for scale in (3.0, 1.7 * 2.0**24):
        step_both(library, worlds, scale)


def check_64_bit_offsets(library: Any, formats: Formats) -> None:
    """Elements from 2^33 on."""
    chunk, before = library.chunk_size(formats), 2**33
    rows = [Row(chunk + 5), Row(chunk + 5, (1,) * 7)]
    worlds = [World("adamaxw", formats, rows) for _ in range(2)]
    for world in worlds:
        world.new_gradients()
    index = storage._index
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_index", lambda *given: index(*given) + before)
        step_both(library, worlds, skipped=before // chunk)


GRAD_EXPONENTS = [(-149, -20), (-20, 20), (20, 126)]


def check_all_codes_under_all_exponents(library: Any, grad_exponents: tuple[int, int]) -> None:
    """Every finite code under every block exponent, and gradients that lead to every exponent."""
    blocks = 240
    numel = 2 * blocks * 128
    worlds = [World("adamaxw", WITH_CODES, [Row(numel)]) for _ in range(2)]
    for world in worlds:
        _, mu, nu = world.stored[0]
        _, mu_exponents, nu_exponents = world.aux[0]
        code = torch.arange(numel) // 128 % 2 * 128 + torch.arange(numel) % 128
        mu.copy_(torch.where(code % 128 < 126, code, 0))
        nu.copy_(torch.where(code < 254, code, 0))
        mu_exponents.copy_((torch.arange(2 * blocks) // 2).clamp(max=238))
        nu_exponents.copy_((torch.arange(2 * blocks) // 2).clamp(max=222))
    first, last = grad_exponents
    for _ in range(3):
        for world in worlds:
            place = torch.rand(2 * blocks, generator=world.rng, dtype=torch.float64)
            spread = 2.0 ** (-20 * torch.rand(numel, generator=world.rng, dtype=torch.float64))
            sign = 1 - 2 * torch.randint(2, (numel,), generator=world.rng)
            world.grads[0].copy_(
                (2.0 ** (first + (last - first) * place)).repeat_interleave(128) * spread * sign
            )
        step_both(library, worlds)


def check_found_inf_changes_nothing(library: Any, rule: str, formats: Formats, found_inf: float) -> None:
    world = World(rule, formats, rows_of_sizes(library.chunk_size(formats)))
    world.new_gradients(special=True)
    before = world.contents()
    for inputs in (world.inputs(65536.0, found_inf), world.inputs(None, None, 0.5, skip=1.0)):
        assert world.step(library, inputs) == 2
        assert_same_bits(world.contents(), before)


def check_square_sums(library: Any, formats: Formats) -> None:
    """Of all sizes, alignments and special values. The library has ``square_sums`` as a backend has."""
    sizes = (0, 1, 7, 255, 256, 257, 4095, 4096, 4097, 2 * 4096 + 300)
    rows = [Row(numel, (odd,) * 7) for numel in sizes for odd in (0, 1)]
    world = World("adamaxw", formats, rows)
    Clipping([(EAGER, world.batch)], None, None)
    n = len(world.batch.norm_chunks)
    for scale, special in ((None, False), (3.0, False), (None, True)):
        world.new_gradients(special)
        given = None if scale is None else torch.tensor(scale)
        sums = [torch.full((n + GUARD,), -1.0, dtype=torch.float64) for _ in range(2)]
        EAGER.square_sums(world.batch, given, sums[0])
        library.square_sums(world.batch, given, sums[1])
        assert bool((sums[0][:n] >= 0).any()) and bool((sums[0][n:] == -1).all())
        assert_same_bits(sums[1], sums[0])


def check_clip(library: Any) -> None:
    """What becomes of sums of squares. The library has ``clip`` as a backend has."""
    rng = torch.Generator().manual_seed(0)
    for count, end in ((0, []), (1, []), (255, []), (9001, []), (9001, [torch.inf]), (256, [torch.nan])):
        drawn = 10 ** (8 * torch.rand(count, generator=rng, dtype=torch.float64) - 6)
        of_chunks = torch.cat([drawn, torch.tensor(end, dtype=torch.float64)])
        for limit, skips in ((0.3, True), (1e9, False), (torch.inf, True)):
            results = []
            for backend in (EAGER, library):
                skipped = torch.tensor(5) if skips else None
                clip = backend.clip(of_chunks, torch.tensor(limit, dtype=torch.float64), skipped)
                results.append([clip, skipped])
            assert_same_bits(results[1], results[0])
            assert not skips or int(results[0][1]) == 5 + len(end)


def check_counters(library: Any, rule: str, formats: Formats, steps: int) -> None:
    """Step numbers that end at the largest, under all hyperparameters, more than a program takes; and with
    nothing to step beside them."""
    counts = [0, 1, 5, 1000, MAX_COUNT - 3, MAX_COUNT - 1, MAX_COUNT] * 5
    for numel, n in ((3, len(counts)), (0, 2)):
        rows = [Row(numel, hyper_row=h, count=count) for count in counts[:n] for h in range(len(HYPER))]
        worlds = [World(rule, formats, rows) for _ in range(2)]
        for _ in range(steps):
            for world in worlds:
                world.new_gradients()
            step_both(library, worlds)
        assert [int(s) for s in worlds[1].steps] == [min(row.count + steps, MAX_COUNT) for row in rows]
