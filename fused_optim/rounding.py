"""Random bits for rounding: the same in every backend, from integer operations alone.

Rounded to nearest, a decay of 0.1% a step is lost in the 8 bits of a bfloat16 mantissa: a state stalls. So
values are rounded up or down at the odds of what is cut off, which is right in the mean. States take
:func:`dither`, parameters :func:`random_words`. Both go by the element's logical index in its parameter
(``index``, int64) and the parameter's step number, never by address, thread or partition.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
PARAM, MU, NU = range(3)  # what is rounded; each has a dither of its own
WEYL = 0x9E3779B9  # 2^32 divided by the golden ratio
# By PARAM, MU and NU: 2^32 times the fractions of the roots of 7, 2 and 3, made odd.
DITHER_FACTORS = (0xA54FF53B, 0x6A09E667, 0xBB67AE85)


class Place(NamedTuple):
    """What a rounding may depend on beside the value and its index."""

    step: Tensor  # 0-dim int64: the parameter's step number
    key: int  # the parameter's random_key
    operand: int  # PARAM, MU or NU
    offset: int = 0  # the first value's index in its parameter, of which this may be a shard


def random_key(seed: int, parameter: int) -> int:
    """Philox's key for the parameter of this number: seed in the low 32 bits, number in the high."""
    return parameter << 32 | seed


def dither(index: Tensor, place: Place) -> Tensor:
    """32 bits for each element, a Weyl sequence of index and step; a narrower dither takes the highest. Over
    steps, and over neighbours, it spreads more evenly than random bits, so its errors cancel sooner."""
    return (index * DITHER_FACTORS[place.operand] + place.step * WEYL) & MASK


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox 4x32-10 (Salmon et al., SC 2011): four words of 32 bits, as int64, for each counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product of two 32-bit words wraps in int64; its bits are right.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (p1 >> 32) & MASK ^ c1 ^ k0, p1 & MASK
        c2, c3 = (p0 >> 32) & MASK ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def random_words(index: Tensor, place: Place) -> Tensor:
    """16 random bits for each element: eight neighbours share one Philox counter, which is (group's low
    word, group's high word, step number, 0)."""
    group = index >> 3
    zero = torch.zeros_like(group)
    counter = (group & MASK, group >> 32, zero + place.step, zero)
    words = torch.stack(philox(counter, (place.key & MASK, place.key >> 32)))
    word = words.gather(0, ((index >> 1) & 3)[None])[0]
    return word >> 16 * (index & 1) & 0xFFFF
