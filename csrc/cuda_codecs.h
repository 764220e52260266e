// Codecs of usual values alone: Usual<Codec> loads and stores the bits that Codec does, but not where a
// new value is infinite, NaN or not below kUnusual in magnitude, or a code in memory is that of infinity or
// NaN. What codecs.h has for such values is taken where a GPU has nothing shorter.
#pragma once

#include "codecs.h"

namespace fused_optim {

template <class Codec, bool = Codec::has_usual>
struct StoringUsual : Codec {};

template <class Codec>
struct StoringUsual<Codec, true> : Codec {
  template <class E>
  static FUSED_OPTIM_HD auto store(float x, uint32_t random, E& extra) {
    return Codec::store_usual(x, random, extra);
  }
};

// Blocked codecs each say below which `magnitude` is not finite alone, or none is found to be unusual.
template <class Codec>
struct Usual : StoringUsual<Codec> {
  static_assert(!kBlocked<Codec>, "a blocked codec needs a magnitude that infinities and NaN have too");
};

// A zero with a negative rest, which somebody wrote to the parameter, is decoded to a NaN here; so the new
// parameter is one too.
template <>
struct Usual<Split16> : StoringUsual<Split16> {
  static FUSED_OPTIM_HD float load(uint32_t x, int32_t rest) { return float_of(x + bits_of(rest)); }
};

template <>
struct Usual<Split8> : StoringUsual<Split8> {
  static FUSED_OPTIM_HD float load(uint32_t x, int32_t rest) { return float_of(x + bits_of(rest * 256)); }
};

// A finite code, shifted, is a float32 of the value under base 0, subnormal values too: the base is a power
// of two to multiply by, in two factors since float32 has none above 2^127. Of codecs.h's integers and sums
// it takes four more instructions a load and four a store.
template <>
struct Usual<E4M3> : E4M3 {
  static FUSED_OPTIM_HD uint32_t magnitude(float x) { return magnitude_bits(x); }

  static FUSED_OPTIM_HD float power_of_two(uint32_t exponent) { return float_of((exponent + 127) << 23); }

  static FUSED_OPTIM_HD float load(uint32_t code, uint32_t base) {
    const uint32_t shifted = bits_of(int_of(code << 24) >> 4) & 0x87f00000u;
    return float_of(shifted) * power_of_two(120) * power_of_two(base - 120);
  }

  // The larger power first: a product that it rounds is zero after the other.
  static FUSED_OPTIM_HD uint32_t store(float x, uint32_t random, uint32_t base) {
    const uint32_t half = base < 126 ? base : 126;
    const float scaled = absolute(x) * power_of_two(half - base) * power_of_two(0 - half);
    return (bits_of(scaled) + (random >> 12)) >> 20 | ((bits_of(x) >> 24) & 0x80u);
  }
};

// With a sign, which usual values have not, the bits are above kUnusual.
template <>
struct Usual<E5M3> : E5M3 {
  static FUSED_OPTIM_HD uint32_t magnitude(float x) { return bits_of(x); }

  static FUSED_OPTIM_HD float load(uint32_t code, uint32_t base) { return load_usual(code, base); }

  static FUSED_OPTIM_HD uint32_t store(float x, uint32_t random, uint32_t base) {
    return finite_code(bits_of(x), random, base);
  }
};

}  // namespace fused_optim
