"""Storage formats: every bit pattern for bfloat16, split16 and split8 (a sample of them unless
FUSED_OPTIM_EXHAUSTIVE is set), every 8-bit code, adversarial blocks; the eager definition against
its promises, the CPU's code against it."""

import os
from collections.abc import Iterator

import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor
from worlds import FP32, MOMENTS, WITH_CODES, Formats, Row, World, named

from fused_optim import storage
from fused_optim.backends import extension
from fused_optim.backends.eager import EAGER
from fused_optim.rounding import MU, NU, PARAM, Place, dither, philox, random_key, random_words
from fused_optim.storage import BLOCK, FORMATS, bits_of, float_of, round_to_bf16

EXHAUSTIVE = bool(os.environ.get("FUSED_OPTIM_EXHAUSTIVE"))
EXHAUSTED = ("bf16", "bf16_dither", "split16", "split8")
OPERANDS = {f.name: f.operands[0] for f in FORMATS.values() if f.dtype != f.working}
"""Formats that are not the working precision's own, and an operand that has each."""


def slices(name: str) -> Iterator[Tensor]:
    """float32 values of all bit patterns, or all that 16 bits hold and slices of 65,536 that lie evenly
    among them and around where something happens: the smallest normal, 1, infinity, float16's limits."""
    if EXHAUSTIVE and name in EXHAUSTED:
        # In slices that caches hold: 15 times as fast as in slices of 2^22.
        for first in range(0, 2**32, 2**17):
            yield float_of(torch.arange(first, first + 2**17))
        return
    for dtype in (torch.bfloat16, torch.float16):  # all values of either
        yield torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    edges = (0x00800000, 0x3F800000, 0x7F800000, 0xFF800000, 0x477FE000, 0x38800000, 0x33000000)
    for first in (*range(0, 2**32 - 2**16, 2**32 // 13), 2**32 - 2**16, *(bits - 2**15 for bits in edges)):
        yield float_of(torch.arange(first, first + 2**16))


def place(step: int = 3, parameter: int = 5, operand: int = PARAM) -> Place:
    return Place(torch.tensor(step), random_key(11, parameter), operand)


def of_step(values: Tensor, name: str, step: int) -> tuple[Tensor, Tensor | None]:
    return FORMATS[name].encode(values, place(step, operand=OPERANDS[name]))


def ordered(x: Tensor) -> Tensor:
    """16-bit floats as integers in their order, neighbours one apart."""
    b = x.view(torch.int16).to(torch.int64)
    return torch.where(b < 0, -(b & 0x7FFF), b)


def test_philox_gives_the_published_words() -> None:
    """The known answers of Random123 for counter and key of zeros and of ones."""
    zero, ones = torch.zeros(1, dtype=torch.int64), torch.full((1,), 0xFFFFFFFF)
    for c, k, want in (
        (zero, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (ones, 0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ):
        assert tuple(int(w) for w in philox((c, c, c, c), (k, k))) == want


@pytest.mark.parametrize("word", [0, 1, 0x7FFF, 0x8000, 0xFFFF])
def test_rounding_at_odds_goes_to_a_neighbour_as_the_word_says(word: int) -> None:
    """Up exactly where the cut-off fraction and the word carry; finite stays finite where
    nearest does; the nearest neighbours bound the result."""
    for x in slices("bf16" if word == 0x7FFF else ""):
        got, down = (round_to_bf16(x, torch.full(x.shape, w)) for w in (word, 0))
        nearest = x.to(torch.bfloat16)
        assert torch.equal(got.isnan(), x.isnan())
        real = ~x.isnan()
        got, nearest, x, down = got[real], nearest[real], x[real], down[real]
        assert bool(((ordered(got) - ordered(nearest)).abs() <= 1).all())
        assert not bool((got.isinf() & ~nearest.isinf()).any())
        exact = nearest.float() == x
        assert torch.equal(got[exact].float(), x[exact])
        usual = x.abs() < torch.finfo(torch.bfloat16).max
        assert bool((down[usual].float().abs() <= x[usual].abs()).all())
        fraction = (x[usual].double() - down[usual].double()).abs()
        unit = (unit_above(down[usual]) - down[usual].double()).abs()
        carries = (fraction / unit * 65536).floor() + word >= 65536
        assert torch.equal(ordered(got[usual]) != ordered(down[usual]), carries)


def unit_above(x: Tensor) -> Tensor:
    """The neighbour of 16-bit values away from zero, in float64; past the largest, as if it went on."""
    b = x.view(torch.int16)
    away = (b + 1).view(x.dtype).double()
    return torch.where(away.isinf(), 2 * x.double() - (b - 1).view(x.dtype).double(), away)


def test_split16_is_exact() -> None:
    for x in slices("split16"):
        param, aux = of_step(x, "split16", 1)
        back = FORMATS["split16"].decode(param, aux)
        assert torch.equal(back.isnan(), x.isnan()) and torch.equal(param.isnan(), x.isnan())
        real = ~x.isnan()
        assert torch.equal(bits_of(back)[real], bits_of(x)[real])
        # To nearest, ties away from zero: never further than the even one.
        nearest = x.to(torch.bfloat16)
        finite = real & ~nearest.isinf()
        error, least = ((t.double() - x.double()).abs()[finite] for t in (param, nearest))
        assert torch.equal(error, least)


@pytest.mark.parametrize("name", OPERANDS)
def test_what_was_decoded_is_exact(name: str) -> None:
    """Rounded to nearest it comes out again, so that a state can be moved as values. That is so too where
    rounding carried a block's largest value to the power of two above."""
    format = FORMATS[name]
    rng = torch.Generator().manual_seed(0)
    for step in range(1, 9):
        x = torch.randn(64 * BLOCK, generator=rng) * 10 ** (10 * torch.rand(64 * BLOCK, generator=rng) - 9)
        x[:3] = torch.tensor([torch.inf, torch.nan, -0.0])
        x = x.abs() if OPERANDS[name] == NU else x
        values = format.decode(*of_step(x, name, step))
        assert_same_bits(format.decode(*format.encode(values, None)), values)


@pytest.mark.parametrize("name", ["split16", "split8"])
def test_a_remainder_can_be_made_for_a_master(name: str) -> None:
    """Of an older checkpoint: the value nearest to it that rounds to the parameter as it is."""
    format = FORMATS[name]
    for x in slices(""):
        x = x[x.isfinite() & ~x.to(torch.bfloat16).isinf()]
        if len(x) == 0:
            continue
        param = x.to(torch.bfloat16)
        back = format.decode(param, format.remainder_of(param, x))
        # A tie that was rounded to even needs a remainder of +32768, one more than there is.
        error = (bits_of(back) - bits_of(x)).abs()
        assert int(error.max()) <= (1 if name == "split16" else 256)
        of_another_value = format.remainder_of(param * 4, x)[param.abs() > 1e-30]
        assert not bool(of_another_value.any())


@pytest.mark.parametrize("step", [1, 2, 3, 1000])
def test_split8_is_off_by_less_than_a_unit_of_24_bits(step: int) -> None:
    for x in slices("split8" if step == 3 else ""):
        param, aux = of_step(x, "split8", step)
        back = FORMATS["split8"].decode(param, aux)
        assert torch.equal(back.isnan(), x.isnan())
        assert torch.equal(back[x.isinf()], x[x.isinf()])
        real = x.isfinite()
        error = bits_of(back)[real] - bits_of(x)[real]
        assert bool((error.abs() < 256).all())
        assert bool((bits_of(back)[real] & 0xFF == 0).all())
        again = FORMATS["split8"].decode(*of_step(back, "split8", step + 1))
        assert torch.equal(bits_of(again)[real], bits_of(back)[real])


@pytest.mark.parametrize("name, orders, largest", [("e4m3", 14, 120), ("e5m3", 30, 248)])
def test_every_8bit_code_decodes_and_encodes_to_itself(name: str, orders: int, largest: int) -> None:
    """All values that there are, under all exponents."""
    for exponent in range(255 - orders):
        finite = torch.arange(largest + 1 if exponent < 254 - orders else largest)
        codes = torch.cat([finite, torch.tensor([largest + 6, largest + 7])])  # infinity and NaN
        if name == "e4m3":
            codes = torch.cat([codes, codes + 128])
        # The block's largest value fixes its exponent: a block of its own for each code.
        top = torch.full((len(codes), BLOCK), 8 * orders + 7)
        top[:, 0] = codes
        exponents = torch.full((len(codes),), exponent, dtype=torch.uint8)
        values = FORMATS[name].decode(top.reshape(-1).to(torch.uint8), exponents)
        again = FORMATS[name].decode(*of_step(values, name, 3))
        assert_same_bits(again, values, f"exponent {exponent}")


@pytest.mark.parametrize("name", ["e4m3", "e5m3"])
def test_all_dithers_of_chosen_values(name: str) -> None:
    """Dithers evenly among all 2^20: the mean is the value, and each result one of its neighbours."""
    for value in (1.0, 1.0625, 1.3, 1.9999, 0.4242, 0.07, 3e-5 if name == "e5m3" else 1e-3):
        block = torch.ones(BLOCK)
        block[5] = value * 0.49
        block[6] = value
        seen = []
        # Codes only depend on the dither's top 20 bits; take them all through a patched dither.
        with pytest.MonkeyPatch.context() as patch:
            for k in range(0, 2**20, 2**14):
                patch.setattr(storage, "dither", lambda index, at, k=k: torch.full_like(index, k << 12))
                seen.append(float(FORMATS[name].decode(*of_step(block, name, 3))[6]))
        got = torch.tensor(seen, dtype=torch.float64)
        assert len(got.unique()) <= 2
        assert abs(float(got.mean()) - float(block[6])) <= 2e-2 * float(block[6]) / 8
        assert bool(((got - float(block[6])).abs() < float(block[6]) / 8).all())


def adversarial() -> dict[str, Tensor]:
    n = BLOCK
    rng = torch.Generator().manual_seed(0)
    tiny = torch.full((n,), 1e-30)
    one_huge = tiny.clone()
    one_huge[17] = 1e30
    mixed = torch.randn(n, generator=rng)
    mixed[[0, 1, 2, 3, 4]] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    return {
        "one huge among tiny": one_huge, "mixed": mixed, "short": torch.rand(7, generator=rng),
        "zeros": torch.zeros(n), "constant": torch.full((n,), 0.1),
        "infinities": torch.full((n,), torch.inf), "NaN": torch.full((n,), torch.nan),
        "the smallest": float_of(torch.arange(0, n)), "the largest": float_of(0x7F7FFFFF - torch.arange(n)),
        "subnormals": float_of(torch.arange(1, n + 1) * 60000),
        "29 orders": 2.0 ** -torch.arange(n).clamp(max=29),
    }  # fmt: skip


@pytest.mark.parametrize("what", adversarial())
@pytest.mark.parametrize("name", ["e4m3", "e5m3"])
@pytest.mark.parametrize("step", [1, 7])
def test_adversarial_blocks(name: str, what: str, step: int) -> None:
    x = adversarial()[what]
    x = x.abs() if name == "e5m3" else x
    got = FORMATS[name].decode(*of_step(x, name, step))
    assert torch.equal(got.isnan(), x.isnan())
    assert torch.equal(got.isinf(), x.isinf())
    assert bool((got[x == 0] == 0).all())
    assert torch.equal(got[~x.isnan()].signbit(), x[~x.isnan()].signbit())
    finite = x.isfinite() & (x != 0)
    if not bool(finite.any()):
        return
    largest = x[finite].abs().max().double()
    orders = 29 if name == "e5m3" else 13
    normal = finite & (x.abs().double() >= torch.maximum(largest * 2.0**-orders, torch.tensor(2.0**-126)))
    relative = ((got.double() - x.double()).abs() / x.double().abs())[normal]
    assert bool((relative < 1 / 8).all())
    if name == "e5m3":
        assert bool((got[finite] > 0).all()), "nothing but zero decodes to zero"
        below = finite & ~normal
        assert bool((got[below].double() <= torch.maximum(largest * 2.0**-28, torch.tensor(2.0**-125))).all())


@pytest.mark.parametrize("name", OPERANDS)
def test_every_nan_is_stored_alike(name: str) -> None:
    """What operation gave it, and where: a CPU's has a sign, a GPU's has none."""
    nan = float_of(torch.tensor([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF]))
    alone = [of_step(x.expand(BLOCK).contiguous(), name, 3) for x in nan]
    for got in alone:
        assert_same_bits(got, alone[0])


@pytest.mark.parametrize("name", ["e4m3", "e5m3"])
@pytest.mark.parametrize("neighbour", [torch.nan, 1e30])
def test_a_neighbouring_block_does_not_matter(name: str, neighbour: float) -> None:
    x = torch.rand(3, BLOCK, generator=torch.Generator().manual_seed(1))
    y = x.clone()
    y[1] = neighbour
    for want, got in zip(*(of_step(values.view(-1), name, 5) for values in (x, y))):
        assert want is not None and got is not None
        assert torch.equal(want.view(3, -1)[[0, 2]], got.view(3, -1)[[0, 2]])


def test_the_dither_is_even_over_steps_and_elements() -> None:
    """Each element's bits are spread evenly over steps, and each step's over neighbours (Weyl
    sequences: any n of them leave no gap of more than about 3/n); those of operands are unrelated."""
    index = torch.arange(4096)
    for operand in (PARAM, MU, NU):
        bits = torch.stack([dither(index, place(t, operand=operand)) for t in range(1, 257)]) / 2**32
        over_steps, over_neighbours = bits, bits.view(256, -1, 256)
        assert float(over_steps.sort(0).values.diff(dim=0).max()) < 3 / 256
        assert float(over_neighbours.sort(2).values.diff(dim=2).max()) < 3 / 256
        assert abs(float(bits[0].mean()) - 0.5) < 3 / 4096
    a, b, c = (dither(index, place(9, operand=o)) / 2**32 - 0.5 for o in (PARAM, MU, NU))
    for x, y in ((a, b), (b, c), (a, c)):
        assert abs(float((x * y).mean())) < 5 / 12 / len(x) ** 0.5


def test_random_words_go_by_seed_step_parameter_and_index_alone() -> None:
    index = torch.arange(1000)
    words = random_words(index, place())
    assert torch.equal(words[100:], random_words(index[100:], place()))
    assert int(words.min()) >= 0 and int(words.max()) < 65536
    for other in (place(step=4), place(parameter=6), place()._replace(key=random_key(12, 5))):
        assert float((random_words(index, other) == words).float().mean()) < 0.01
    far = random_words(index + 2**36, place())
    assert float((far == words).float().mean()) < 0.01


CPU, WHY_NOT = extension("_cpu")
ISAS = CPU.isas() if CPU else []
cpu = pytest.mark.skipif(CPU is None, reason=WHY_NOT or "built")


def cpu_step(isa: str, world: World) -> None:
    batch, counters, size = world.batch, world.batch.counters, 16384
    fields = [*(t.data_ptr() for t in (batch.rows, batch.grads, batch.chunks(size))), len(batch.chunks(size))]
    fields += [counters.data_ptr(), len(counters)]
    CPU.step(CPU.prepare(isa, batch.names, size, fields), world.hyper.data_ptr(), 1.0, 1.0, 1)


@cpu
@pytest.mark.parametrize("name", OPERANDS)
def test_the_cpu_encodes_and_decodes_every_pattern_like_eager(name: str) -> None:
    """Moments that were -0 become g and abs(g) by AdamaxW. A parameter becomes -lr*g by AdaBelief where g is
    finite, since the second moment is 0; a second step leaves it as it is."""
    format, operand = FORMATS[name], OPERANDS[name]
    at = place()._replace(key=random_key(12345, 0), operand=operand)
    rule, formats, eps = "adabelief", named(name, "fp32", "fp32", "fp32"), 1.0
    if operand != PARAM:
        rule, formats, eps = "adamaxw", Formats(*FP32[:2], *next(m for m in MOMENTS if format in m)), 0.0

    def step(world: World, isa: str, g: Tensor, lr: float) -> None:
        world.hyper = torch.tensor([[lr, 0.0, 0.0, 0.5, eps, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
        world.grads[0].copy_(g)
        world.steps[0].fill_(2)
        cpu_step(isa, world)

    for isa, chosen in zip(ISAS, (name, "", "")):
        size = len(next(slices(chosen)))
        world = World(rule, formats, [Row(size)])
        stored, aux = world.stored[0], world.aux[0]
        zeros = [f.encode(torch.full((size,), -0.0), at) for f in (formats.param, formats.mu, formats.nu)]
        for x in slices(chosen):
            for tensors, zero in zip(zip(stored, aux), zeros):
                for t, of_zero in zip(tensors, zero):
                    if t is not None:
                        t.copy_(of_zero)
            step(world, isa, -x if operand == PARAM else x, 1.0)
            x = {PARAM: x.where(x.isfinite(), torch.nan), MU: x, NU: x.abs()}[operand]
            want = format.encode(x, at)
            assert_same_bits([stored[operand], aux[operand]], list(want), f"{isa}: stored")
            if operand == PARAM:
                step(world, isa, torch.zeros(size), 0.0)
                again = format.encode(format.decode(*want), at)
                assert_same_bits([stored[operand], aux[operand]], list(again), f"{isa}: decoded and stored")


@cpu
@pytest.mark.parametrize("finite", [False, True], ids=["all", "finite alone, which take fewer operations"])
def test_the_cpu_decodes_all_codes_under_all_exponents_like_eager(finite: bool) -> None:
    """From -0 the parameter becomes what the moments say."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(255)
    exponents = torch.arange(255).repeat_interleave(2)
    for isa in ISAS:
        worlds = [World("adamaxw", WITH_CODES, [Row(len(codes))]) for _ in range(2)]
        for world in worlds:
            (p, mu, nu), (_, mu_exponents, nu_exponents) = world.stored[0], world.aux[0]
            p.fill_(-0.0)
            mu.copy_(codes)
            nu.copy_(codes.roll(3))
            mu_exponents.copy_(exponents % 241)
            nu_exponents.copy_(exponents % 225)
            if finite:
                mu[mu & 0x7F >= 126] = 1
                nu[nu >= 254] = 1
            world.grads[0].zero_()
        EAGER.step(worlds[0].batch, worlds[0].inputs(None, None))
        cpu_step(isa, worlds[1])
        assert_same_bits(worlds[1].contents(), worlds[0].contents(), isa)
