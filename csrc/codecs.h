// How values lie in memory: the C++ statement of fused_optim/storage.py. A codec is
//
//   name                 as in fused_optim/storage.py
//   PlainCodec           of a parameter: the codec of its dtype's values as they are
//   Working              what the rules compute with: float or double
//   Stored, Aux          what lies in memory: one Stored an element, and one Aux for each `block` elements
//                        (NoAux for none)
//   random               which random bits `store` is given: none, 32 of the dither or 16 of Philox
//   load(stored, aux)    the value in the working precision
//   store(x, random, aux)  what to store. Where block is 1, it sets `aux`; else `aux` is the block exponent,
//                        which `exponent_of` makes of the largest `magnitude` in the block.
//   store_finite         where `low_precision`, the same in fewer operations for magnitudes below kFiniteLimit
//   load_finite          of block formats, the same where the bits `code_bits` of each code are below `infinity`
//   is_upper_half        what is stored are 16 bits that are the upper halves of words
//
// Values, integers and random bits are single numbers or vectors of them, see numbers.h. What is
// stored comes and goes in 32 bits, cut to Stored in memory.
//
// NaN becomes the canonical NaN of the format.
#pragma once

#include <cstdint>
#include <type_traits>

#include "numbers.h"
#include "rounding.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace fused_optim {

struct NoAux {};

enum Random { kNearest, kDither, kPhilox };

constexpr int64_t kBlockElements = 128;  // that share one exponent in the 8-bit formats

// Values from here on are infinite, NaN or about to be rounded to infinity; `low_precision` codecs
// store what lies below in fewer operations.
constexpr uint32_t kFiniteLimit = 0x7f000000u;

// What most codecs have in common.
struct Codec {
  using Working = float;
  using Aux = NoAux;
  static constexpr int64_t block = 1;
  static constexpr Random random = kNearest;
  static constexpr bool low_precision = false;
  static constexpr bool is_upper_half = false;
};

constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u, kNaN = 0x7fc00000u;

template <class F>
FUSED_OPTIM_HD auto magnitude_bits(F x) {
  return bits_of(x) & kMagnitude;
}

template <class F>
FUSED_OPTIM_HD auto canonical_bits(F x) {
  return select(magnitude_bits(x) > kInfinity, kNaN, bits_of(x));
}

// Stored as it is.
template <class T>
struct Plain : Codec {
  using Stored = T;
  using Working = T;
  template <class F>
  static FUSED_OPTIM_HD F load(F x, NoAux) {
    return x;
  }
  template <class F, class R, class E>
  static FUSED_OPTIM_HD F store(F x, R, E&) {
    return x;
  }
};

struct Fp32 : Plain<float> {
  using PlainCodec = Fp32;
  static constexpr const char* name = "fp32";
};

struct Fp64 : Plain<double> {
  using PlainCodec = Fp64;
  static constexpr const char* name = "fp64";
};

struct Bf16 : Codec {
  static constexpr const char* name = "bf16";
  using PlainCodec = Bf16;
  static constexpr bool low_precision = true;
  static constexpr bool is_upper_half = true;
  using Stored = uint16_t;

  template <class W>
  static FUSED_OPTIM_HD auto load(W x, NoAux) {
    return float_of(x);
  }

  template <class F>
  static FUSED_OPTIM_HD auto nearest_bits(F x) {
    const auto b = bits_of(x);
    return b + 0x7fffu + ((b >> 16) & 1u);
  }

  template <class F>
  static FUSED_OPTIM_HD auto nearest(F x) {
    return select(magnitude_bits(x) > kInfinity, kNaN, nearest_bits(x));
  }

  // `word`: 16 bits. A finite value becomes infinite only where rounding to nearest makes it so.
  template <class F, class R>
  static FUSED_OPTIM_HD auto at_odds(F x, R word) {
    const auto b = canonical_bits(x);
    return b + select((b & kMagnitude) >= 0x7f7f0000u, 0x8000u, word);
  }

  template <class F, class R>
  static FUSED_OPTIM_HD auto at_odds_finite(F x, R word) {
    return bits_of(x) + word;
  }

  template <class F, class R, class E>
  static FUSED_OPTIM_HD auto store(F x, R, E&) {
    return nearest(x);
  }
  template <class F, class R, class E>
  static FUSED_OPTIM_HD auto store_finite(F x, R, E&) {
    return nearest_bits(x);
  }
};

struct Fp16 : Codec {
  static constexpr const char* name = "fp16";
  using PlainCodec = Fp16;
  using Stored = uint16_t;

#if defined(__CUDA_ARCH__)
  static FUSED_OPTIM_HD float load(uint16_t x, NoAux) { return __half2float(__ushort_as_half(x)); }
  static FUSED_OPTIM_HD uint16_t nearest(float x) { return __half_as_ushort(__float2half_rn(x)); }
#else
  // Integers and selects alone, since a processor may lack F16C.
  template <class W>
  static FUSED_OPTIM_HD auto load(W x, NoAux) {
    const auto sign = (x & 0x8000u) << 16, shifted = (x & 0x7fffu) << 13;
    // The exponent's bias is moved by a multiplication by 2^112, exact for subnormals too.
    const auto finite = bits_of(float_of(shifted) * bit_cast<float>(0x77800000u));
    return float_of(sign | select((x & 0x7c00u) == 0x7c00u, shifted | kInfinity, finite));
  }

  template <class F>
  static FUSED_OPTIM_HD auto nearest(F x) {
    const auto b = bits_of(x);
    const auto magnitude = b & kMagnitude;
    // Adding 0.5 leaves the subnormal half, rounded to nearest even, in the low bits.
    const auto subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    const auto normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    auto h = select(magnitude < 0x38800000u, subnormal, normal);
    h = select(magnitude >= 0x47800000u, 0x7c00u, h);
    h = select(magnitude > kInfinity, 0x7e00u, h);
    return h | ((b >> 16) & 0x8000u);
  }
#endif

  template <class F, class R, class E>
  static FUSED_OPTIM_HD auto store(F x, R, E&) {
    return nearest(x);
  }
};

// The float32 of a bfloat16 and the remainder. A zero has a negative remainder only where somebody wrote
// it to the parameter. The remainder then counts as 0, since the sum would be a NaN.
template <class W, class I>
FUSED_OPTIM_HD auto joined(W x, I remainder) {
  const auto least = -int_of(smaller(x << 1, 0x8000u));
  return float_of(x + bits_of(larger(remainder, least)));
}

// A float32 as a bfloat16, rounded half away from zero, and the remainder.
struct Split16 : Codec {
  static constexpr const char* name = "split16";
  using PlainCodec = Bf16;
  static constexpr bool low_precision = true;
  static constexpr bool is_upper_half = true;
  using Stored = uint16_t;
  using Aux = int16_t;

  template <class W, class E>
  static FUSED_OPTIM_HD auto load(W x, E remainder) {
    return joined(x, int_of(remainder));
  }

  template <class W, class E>
  static FUSED_OPTIM_HD auto split(W b, E& remainder) {
    remainder = (E)b;  // less a multiple of 2^16
    return b + 0x8000u;
  }

  template <class F, class R, class E>
  static FUSED_OPTIM_HD auto store(F x, R, E& remainder) {
    return split(canonical_bits(x), remainder);
  }
  template <class F, class R, class E>
  static FUSED_OPTIM_HD auto store_finite(F x, R, E& remainder) {
    return split(bits_of(x), remainder);
  }
};

// The highest 24 bits of a float32 in the same way.
struct Split8 : Codec {
  static constexpr const char* name = "split8";
  using PlainCodec = Bf16;
  static constexpr bool low_precision = true;
  static constexpr bool is_upper_half = true;
  using Stored = uint16_t;
  using Aux = int8_t;
  static constexpr Random random = kDither;

  template <class W, class E>
  static FUSED_OPTIM_HD auto load(W x, E remainder) {
    return joined(x, int_of(remainder) * 256);
  }

  template <class W, class E>
  static FUSED_OPTIM_HD auto split(W b, E& remainder) {
    remainder = (E)(b >> 8);  // less a multiple of 2^16
    return b + 0x8000u;
  }

  template <class F, class R, class E>
  static FUSED_OPTIM_HD auto store(F x, R random, E& remainder) {
    const auto b = canonical_bits(x);
    // The largest finite values are cut: no dither carries them to infinity.
    return split(b + select((b & kMagnitude) >= 0x7f7fff00u, 0u, random >> 24), remainder);
  }

  template <class F, class R, class E>
  static FUSED_OPTIM_HD auto store_finite(F x, R random, E& remainder) {
    return split(bits_of(x) + (random >> 24), remainder);
  }
};

struct Bf16Stochastic : Bf16 {
  static constexpr const char* name = "bf16_stochastic";
  static constexpr Random random = kPhilox;
  template <class F, class R, class E>
  static FUSED_OPTIM_HD auto store(F x, R random, E&) {
    return at_odds(x, random);
  }
  template <class F, class R, class E>
  static FUSED_OPTIM_HD auto store_finite(F x, R random, E&) {
    return at_odds_finite(x, random);
  }
};

struct Bf16Dither : Bf16 {
  static constexpr const char* name = "bf16_dither";
  static constexpr Random random = kDither;
  template <class F, class R, class E>
  static FUSED_OPTIM_HD auto store(F x, R random, E&) {
    return at_odds(x, random >> 16);
  }
  template <class F, class R, class E>
  static FUSED_OPTIM_HD auto store_finite(F x, R random, E&) {
    return at_odds_finite(x, random >> 16);
  }
};

// 8 bits under the exponent of a block, which all its elements share.
struct Blocked : Codec {
  using Stored = uint8_t;
  using Aux = uint8_t;
  static constexpr int64_t block = kBlockElements;
  static constexpr bool low_precision = true;
  static constexpr Random random = kDither;

  // Of finite values; it is the largest of a block that counts.
  template <class F>
  static FUSED_OPTIM_HD auto magnitude(F x) {
    const auto m = magnitude_bits(x);
    return select(m < kInfinity, m, 0u);
  }

  static FUSED_OPTIM_HD uint8_t exponent_below(uint32_t largest, int32_t orders) {
    const int32_t exponent = static_cast<int32_t>(largest >> 23) - orders;
    return static_cast<uint8_t>(exponent > 0 ? exponent : 0);
  }

  // The codes of infinity and, after it, NaN; and no finite value is rounded to infinity, of
  // which 2040 is the code under exponent 0.
  template <class W>
  static FUSED_OPTIM_HD auto special(W code, W magnitude, uint32_t exponent, uint32_t infinity) {
    const uint32_t limit = 2039 - 8 * exponent;
    const auto special = select(magnitude > kInfinity, infinity + 1, infinity);
    return select(magnitude < kInfinity, smaller(code, limit), special);
  }
};

// Sign, 4 bits of exponent, 3 of mantissa, subnormal below; 126 is infinity, 127 NaN.
struct E4M3 : Blocked {
  static constexpr const char* name = "e4m3";
  static constexpr uint32_t infinity = 126, code_bits = 0x7fu;

  static FUSED_OPTIM_HD uint8_t exponent_of(uint32_t largest) { return exponent_below(largest, 14); }

  // The smallest normal value: subnormal codes are the mantissa's first bits of a sum with it.
  static FUSED_OPTIM_HD uint32_t normal_bits(uint32_t exponent) { return (exponent + 1) << 23; }

  // Below `one` the subnormal value is the smaller of the two, above it the normal one.
  template <class W>
  static FUSED_OPTIM_HD auto finite_bits(W code, uint32_t exponent) {
    const auto bits = code << 20;
    const uint32_t one = normal_bits(exponent);
    const auto subnormal = bits_of(float_of(bits + one) - float_of(one));
    const auto normal = bits + (exponent << 23);
    return smaller(subnormal, normal);
  }

  template <class W>
  static FUSED_OPTIM_HD auto load(W x, uint32_t exponent) {
    const auto code = x & code_bits;
    const auto value = select(code < infinity, finite_bits(code, exponent), kInfinity + ((code - infinity) << 22));
    return float_of(value | (x & 0x80u) << 24);
  }

  template <class W>
  static FUSED_OPTIM_HD auto load_finite(W x, uint32_t exponent) {
    return float_of(finite_bits(x & code_bits, exponent) | ((x << 24) & 0x80000000u));
  }

  template <class W>
  static FUSED_OPTIM_HD auto finite_code(W magnitude, W random, uint32_t exponent) {
    const uint32_t one = normal_bits(exponent);
    const auto subnormal = int_of(bits_of(float_of(magnitude) + float_of(one)) - one);
    const auto normal = int_of(magnitude - (exponent << 23));
    // Below `one` the subnormal code is the larger of the two, above it the normal one.
    return (bits_of(larger(subnormal, normal)) + (random >> 12)) >> 20;
  }

  template <class F, class R>
  static FUSED_OPTIM_HD auto store_finite(F x, R random, uint32_t exponent) {
    const auto b = bits_of(x);
    return finite_code(b & kMagnitude, random, exponent) | ((b >> 24) & 0x80u);
  }

  template <class F, class R>
  static FUSED_OPTIM_HD auto store(F x, R random, uint32_t exponent) {
    const auto b = bits_of(x), magnitude = b & kMagnitude;
    const auto code = special(finite_code(magnitude, random, exponent), magnitude, exponent, infinity);
    // A NaN has no sign here: devices give the NaN of an operation different ones.
    return code | select(magnitude > kInfinity, 0u, (b >> 24) & 0x80u);
  }
};

// 5 bits of exponent, 3 of mantissa, for what is never negative; 0 is zero and nothing else,
// 254 infinity, 255 NaN.
struct E5M3 : Blocked {
  static constexpr const char* name = "e5m3";
  static constexpr uint32_t infinity = 254, code_bits = 0xffu;

  static FUSED_OPTIM_HD uint8_t exponent_of(uint32_t largest) { return exponent_below(largest, 30); }

  template <class W>
  static FUSED_OPTIM_HD auto finite_bits(W code, uint32_t exponent) {
    return select(code == 0u, 0u, (code << 20) + (exponent << 23));
  }

  template <class W>
  static FUSED_OPTIM_HD auto load(W code, uint32_t exponent) {
    return float_of(select(code < infinity, finite_bits(code, exponent), kInfinity + ((code - infinity) << 22)));
  }

  template <class W>
  static FUSED_OPTIM_HD auto load_finite(W code, uint32_t exponent) {
    return float_of(finite_bits(code, exponent));
  }

  template <class W>
  static FUSED_OPTIM_HD auto finite_code(W magnitude, W random, uint32_t exponent) {
    const auto code = int_of((magnitude + (random >> 12)) >> 20) - static_cast<int32_t>(8 * exponent);
    return smaller(bits_of(larger(code, 1)), magnitude);  // zero is the only one below its code
  }

  template <class F, class R>
  static FUSED_OPTIM_HD auto store_finite(F x, R random, uint32_t exponent) {
    return finite_code(magnitude_bits(x), random, exponent);
  }

  template <class F, class R>
  static FUSED_OPTIM_HD auto store(F x, R random, uint32_t exponent) {
    const auto magnitude = magnitude_bits(x);
    return special(finite_code(magnitude, random, exponent), magnitude, exponent, infinity);
  }
};

template <class Codec>
constexpr bool kBlocked = Codec::block > 1;

// Whether each element has an aux of its own.
template <class Codec>
constexpr bool kAuxEach = !kBlocked<Codec> && !std::is_same<typename Codec::Aux, NoAux>::value;

template <class T>
using PlainOf = std::conditional_t<std::is_same<T, double>::value, Fp64, Fp32>;

// Gradients are read as they are in the parameter's plain format and in the working precision. Python copies others.
template <class Param, class Grad>
constexpr bool kNativeGrad = std::is_same<Grad, typename Param::PlainCodec>::value ||
                             std::is_same<Grad, PlainOf<typename Param::Working>>::value;

// Of gradients and of parameters.
#define FUSED_OPTIM_GRAD_CODECS(X) X(Fp32) X(Fp64) X(Bf16) X(Fp16)
#define FUSED_OPTIM_PARAM_CODECS(X) FUSED_OPTIM_GRAD_CODECS(X) X(Split16) X(Split8) X(Bf16Stochastic)

// The formats that go together, of mu and of nu.
#define FUSED_OPTIM_MOMENTS(X) X(Fp32, Fp32) X(Fp64, Fp64) X(Bf16Dither, Bf16Dither) X(E4M3, E5M3)

}  // namespace fused_optim
