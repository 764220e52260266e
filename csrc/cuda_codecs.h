// Codecs of finite values alone: Finite<Codec> loads and stores the bits that Codec does, but not where a
// new value is infinite, NaN or not below kFiniteLimit in magnitude, or a code in memory is that of infinity or
// NaN. (A zero with a negative remainder, which somebody wrote to the parameter, is decoded to a NaN; so the new
// parameter is one too.) What codecs.h has for such values is taken where a GPU has nothing shorter.
#pragma once

#include "codecs.h"

namespace fused_optim {

template <class Codec>
struct Finite : Codec {
  static_assert(!kBlocked<Codec>, "a blocked codec needs a magnitude that infinities and NaN have too");

  template <class X, class E>
  static FUSED_OPTIM_HD auto load(X x, E aux) { return Codec::template load<true>(x, aux); }
  template <class X, class E>
  static FUSED_OPTIM_HD auto store(X x, uint32_t random, E& aux) {
    return Codec::template store<true>(x, random, aux);
  }
};

// A finite code, shifted, is a float32 of the value under exponent 0, subnormal values too: the exponent is a power
// of two to multiply by, in two factors since float32 has none above 2^127. Of codecs.h's integers and sums
// it takes four more instructions a load and four a store.
template <>
struct Finite<E4M3> : E4M3 {
  static FUSED_OPTIM_HD uint32_t magnitude(float x) { return magnitude_bits(x); }

  static FUSED_OPTIM_HD float power_of_two(uint32_t exponent) { return float_of((exponent + 127) << 23); }

  static FUSED_OPTIM_HD float load(uint32_t code, uint32_t exponent) {
    const uint32_t shifted = bits_of(int_of(code << 24) >> 4) & 0x87f00000u;
    return float_of(shifted) * power_of_two(120) * power_of_two(exponent - 120);
  }

  // The larger power first: a product that it rounds is zero after the other.
  static FUSED_OPTIM_HD uint32_t store(float x, uint32_t random, uint32_t exponent) {
    const uint32_t half = exponent < 126 ? exponent : 126;
    const float scaled = absolute(x) * power_of_two(half - exponent) * power_of_two(0 - half);
    return (bits_of(scaled) + (random >> 12)) >> 20 | ((bits_of(x) >> 24) & 0x80u);
  }
};

// With a sign, which finite values have not, the bits are above kFiniteLimit.
template <>
struct Finite<E5M3> : E5M3 {
  static FUSED_OPTIM_HD uint32_t magnitude(float x) { return bits_of(x); }

  static FUSED_OPTIM_HD float load(uint32_t code, uint32_t exponent) { return E5M3::load<true>(code, exponent); }

  static FUSED_OPTIM_HD uint32_t store(float x, uint32_t random, uint32_t exponent) {
    return finite_code(bits_of(x), random, exponent);
  }
};

}  // namespace fused_optim
