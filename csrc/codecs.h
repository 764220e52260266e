// How values lie in memory: the C++ statement of fused_optim/storage.py. A codec is
//
//   name                as in fused_optim/storage.py
//   Working             what the rules compute with: float or double
//   Stored, Extra       what lies in memory: one Stored an element, and one Extra for each
//                       `block` elements (NoExtra for none)
//   random              which random bits `store` is given: none, 32 of the dither or 16 of Philox
//   load(stored, extra) the value in the working precision
//   store(x, random, extra)  what to store. Where block is 1, it sets `extra`; else `extra` comes
//                       from `extra_of`, given the largest `magnitude` of the block.
//   store_usual         where `has_usual`, the same in fewer operations for magnitudes below kUnusual
//   load_usual          of blocked formats, the same where the bits `code_bits` of each code are
//                       below `infinity`
//   is_upper_half       what is stored are 16 bits that are the upper halves of words
//
// Values, integers and random bits are single numbers or packs of them, see numbers.h. What is
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

struct NoExtra {};

enum Random { kNearest, kDither, kPhilox };

constexpr int64_t kBlockElements = 128;  // that share one base in the 8-bit formats

// Values from here on are infinite, NaN or about to be rounded to infinity; `has_usual` codecs
// store what lies below in fewer operations.
constexpr uint32_t kUnusual = 0x7f000000u;

// What most codecs have in common.
struct Codec {
  using Working = float;
  using Extra = NoExtra;
  static constexpr int64_t block = 1;
  static constexpr Random random = kNearest;
  static constexpr bool has_usual = false;
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
  static FUSED_OPTIM_HD F load(F x, NoExtra) {
    return x;
  }
  template <class F, class R, class E>
  static FUSED_OPTIM_HD F store(F x, R, E&) {
    return x;
  }
};

struct Fp32 : Plain<float> {
  static constexpr const char* name = "fp32";
};

struct Fp64 : Plain<double> {
  static constexpr const char* name = "fp64";
};

struct Bf16 : Codec {
  static constexpr const char* name = "bf16";
  static constexpr bool has_usual = true;
  static constexpr bool is_upper_half = true;
  using Stored = uint16_t;

  template <class W>
  static FUSED_OPTIM_HD auto load(W x, NoExtra) {
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
  static FUSED_OPTIM_HD auto at_odds_usual(F x, R word) {
    return bits_of(x) + word;
  }

  template <class F, class R, class E>
  static FUSED_OPTIM_HD auto store(F x, R, E&) {
    return nearest(x);
  }
  template <class F, class R, class E>
  static FUSED_OPTIM_HD auto store_usual(F x, R, E&) {
    return nearest_bits(x);
  }
};

struct Fp16 : Codec {
  static constexpr const char* name = "fp16";
  using Stored = uint16_t;

  // Likewise; below 2^-14, where the unit is 2^-24, what lies below 2^-40 is dropped.
  template <class F, class R>
  static FUSED_OPTIM_HD auto at_odds(F x, R word) {
    const auto b = bits_of(x);
    const auto magnitude = b & kMagnitude;
    const auto odds = select(magnitude >= 0x477fe000u, 0x8000u, word);  // the largest float16
    const auto small = magnitude < 0x38800000u;
    const auto fixed = float_of(select(small, magnitude, 0u)) * 1099511627776.0f;  // 2^40
    const auto subnormal = (bit_cast<decltype(b & b)>(Traits<F>::truncated(fixed)) + odds) >> 16;
    auto h = select(small, subnormal, (magnitude - 0x38000000u + (odds >> 3)) >> 13);
    h = select(magnitude >= 0x47800000u, 0x7c00u, h) | ((b >> 16) & 0x8000u);
    return select(magnitude > kInfinity, 0x7e00u, h);
  }

#if defined(__CUDA_ARCH__)
  static FUSED_OPTIM_HD float load(uint16_t x, NoExtra) { return __half2float(__ushort_as_half(x)); }
  static FUSED_OPTIM_HD uint16_t nearest(float x) { return __half_as_ushort(__float2half_rn(x)); }
#else
  // Integers and selects alone, since a processor may lack F16C.
  template <class W>
  static FUSED_OPTIM_HD auto load(W x, NoExtra) {
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

// A master beside the parameter. Where somebody wrote to the parameter, that is its value; else
// the two are half a unit apart at most, whichever way a tie was rounded.
struct Bf16Master : Bf16 {
  static constexpr const char* name = "bf16_master";
  using Extra = float;

  template <class W, class F>
  static FUSED_OPTIM_HD auto load(W x, F master) {
    return float_of(select(bits_of(master) - x + 0x8000u <= 0x10000u, bits_of(master), x));
  }

  template <class F, class R>
  static FUSED_OPTIM_HD auto store(F x, R, F& master) {
    master = x;
    return nearest(x);
  }
  template <class F, class R>
  static FUSED_OPTIM_HD auto store_usual(F x, R, F& master) {
    master = x;
    return nearest_bits(x);
  }
};

struct Fp16Master : Fp16 {
  static constexpr const char* name = "fp16_master";
  using Extra = float;

  template <class W, class F>
  static FUSED_OPTIM_HD auto load(W x, F master) {
    const auto param = bits_of(Fp16::load(x, NoExtra{}));
    return float_of(select(nearest(master) == x, bits_of(master), param));
  }

  template <class F, class R>
  static FUSED_OPTIM_HD auto store(F x, R, F& master) {
    master = x;
    return nearest(x);
  }
};

// The float32 of a bfloat16 and the rest. A zero has no negative rest unless somebody wrote it to
// the parameter: then there is none, since its sum with the old one would be a NaN.
template <class W, class I>
FUSED_OPTIM_HD auto joined(W x, I rest) {
  const auto least = -int_of(smaller(x << 1, 0x8000u));
  return float_of(x + bits_of(larger(rest, least)));
}

// A float32 as a bfloat16, rounded half away from zero, and the rest.
struct Split16 : Codec {
  static constexpr const char* name = "split16";
  static constexpr bool has_usual = true;
  static constexpr bool is_upper_half = true;
  using Stored = uint16_t;
  using Extra = int16_t;

  template <class W, class E>
  static FUSED_OPTIM_HD auto load(W x, E rest) {
    return joined(x, int_of(rest));
  }

  template <class W, class E>
  static FUSED_OPTIM_HD auto split(W b, E& rest) {
    rest = (E)b;  // less a multiple of 2^16
    return b + 0x8000u;
  }

  template <class F, class R, class E>
  static FUSED_OPTIM_HD auto store(F x, R, E& rest) {
    return split(canonical_bits(x), rest);
  }
  template <class F, class R, class E>
  static FUSED_OPTIM_HD auto store_usual(F x, R, E& rest) {
    return split(bits_of(x), rest);
  }
};

// The highest 24 bits of a float32 in the same way.
struct Split8 : Codec {
  static constexpr const char* name = "split8";
  static constexpr bool has_usual = true;
  static constexpr bool is_upper_half = true;
  using Stored = uint16_t;
  using Extra = int8_t;
  static constexpr Random random = kDither;

  template <class W, class E>
  static FUSED_OPTIM_HD auto load(W x, E rest) {
    return joined(x, int_of(rest) * 256);
  }

  template <class W, class E>
  static FUSED_OPTIM_HD auto split(W b, E& rest) {
    rest = (E)(b >> 8);  // less a multiple of 2^16
    return b + 0x8000u;
  }

  template <class F, class R, class E>
  static FUSED_OPTIM_HD auto store(F x, R random, E& rest) {
    const auto b = canonical_bits(x);
    // The largest finite values are cut: no dither carries them to infinity.
    return split(b + select((b & kMagnitude) >= 0x7f7fff00u, 0u, random >> 24), rest);
  }

  template <class F, class R, class E>
  static FUSED_OPTIM_HD auto store_usual(F x, R random, E& rest) {
    return split(bits_of(x) + (random >> 24), rest);
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
  static FUSED_OPTIM_HD auto store_usual(F x, R random, E&) {
    return at_odds_usual(x, random);
  }
};

struct Fp16Stochastic : Fp16 {
  static constexpr const char* name = "fp16_stochastic";
  static constexpr Random random = kPhilox;
  template <class F, class R, class E>
  static FUSED_OPTIM_HD auto store(F x, R random, E&) {
    return at_odds(x, random);
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
  static FUSED_OPTIM_HD auto store_usual(F x, R random, E&) {
    return at_odds_usual(x, random >> 16);
  }
};

// 8 bits under the exponent of a block, which all its elements share.
struct Blocked : Codec {
  using Stored = uint8_t;
  using Extra = uint8_t;
  static constexpr int64_t block = kBlockElements;
  static constexpr bool has_usual = true;
  static constexpr Random random = kDither;

  // Of finite values; it is the largest of a block that counts.
  template <class F>
  static FUSED_OPTIM_HD auto magnitude(F x) {
    const auto m = magnitude_bits(x);
    return select(m < kInfinity, m, 0u);
  }

  static FUSED_OPTIM_HD uint8_t exponent_below(uint32_t largest, int32_t orders) {
    const int32_t base = static_cast<int32_t>(largest >> 23) - orders;
    return static_cast<uint8_t>(base > 0 ? base : 0);
  }

  // The codes of infinity and, after it, NaN; and no finite value is rounded to infinity, of
  // which 2040 is the code under base 0.
  template <class W>
  static FUSED_OPTIM_HD auto unusual(W code, W magnitude, uint32_t base, uint32_t infinity) {
    const uint32_t limit = 2039 - 8 * base;
    const auto special = select(magnitude > kInfinity, infinity + 1, infinity);
    return select(magnitude < kInfinity, smaller(code, limit), special);
  }
};

// Sign, 4 bits of exponent, 3 of mantissa, subnormal below; 126 is infinity, 127 NaN.
struct E4M3 : Blocked {
  static constexpr const char* name = "e4m3";
  static constexpr uint32_t infinity = 126, code_bits = 0x7fu;

  static FUSED_OPTIM_HD uint8_t extra_of(uint32_t largest) { return exponent_below(largest, 14); }

  // The smallest normal value: subnormal codes are the mantissa's first bits of a sum with it.
  static FUSED_OPTIM_HD uint32_t normal_bits(uint32_t base) { return (base + 1) << 23; }

  // Below `one` the subnormal value is the smaller of the two, above it the normal one.
  template <class W>
  static FUSED_OPTIM_HD auto finite_bits(W code, uint32_t base) {
    const auto bits = code << 20;
    const uint32_t one = normal_bits(base);
    const auto subnormal = bits_of(float_of(bits + one) - float_of(one));
    const auto normal = bits + (base << 23);
    return smaller(subnormal, normal);
  }

  template <class W>
  static FUSED_OPTIM_HD auto load(W x, uint32_t base) {
    const auto code = x & code_bits;
    const auto value = select(code < infinity, finite_bits(code, base), kInfinity + ((code - infinity) << 22));
    return float_of(value | (x & 0x80u) << 24);
  }

  template <class W>
  static FUSED_OPTIM_HD auto load_usual(W x, uint32_t base) {
    return float_of(finite_bits(x & code_bits, base) | ((x << 24) & 0x80000000u));
  }

  template <class W>
  static FUSED_OPTIM_HD auto finite_code(W magnitude, W random, uint32_t base) {
    const uint32_t one = normal_bits(base);
    const auto subnormal = int_of(bits_of(float_of(magnitude) + float_of(one)) - one);
    const auto normal = int_of(magnitude - (base << 23));
    // Below `one` the subnormal code is the larger of the two, above it the normal one.
    return (bits_of(larger(subnormal, normal)) + (random >> 12)) >> 20;
  }

  template <class F, class R>
  static FUSED_OPTIM_HD auto store_usual(F x, R random, uint32_t base) {
    const auto b = bits_of(x);
    return finite_code(b & kMagnitude, random, base) | ((b >> 24) & 0x80u);
  }

  template <class F, class R>
  static FUSED_OPTIM_HD auto store(F x, R random, uint32_t base) {
    const auto b = bits_of(x), magnitude = b & kMagnitude;
    const auto code = unusual(finite_code(magnitude, random, base), magnitude, base, infinity);
    // A NaN has no sign here: devices give the NaN of an operation different ones.
    return code | select(magnitude > kInfinity, 0u, (b >> 24) & 0x80u);
  }
};

// 5 bits of exponent, 3 of mantissa, for what is never negative; 0 is zero and nothing else,
// 254 infinity, 255 NaN.
struct E5M3 : Blocked {
  static constexpr const char* name = "e5m3";
  static constexpr uint32_t infinity = 254, code_bits = 0xffu;

  static FUSED_OPTIM_HD uint8_t extra_of(uint32_t largest) { return exponent_below(largest, 30); }

  template <class W>
  static FUSED_OPTIM_HD auto finite_bits(W code, uint32_t base) {
    return select(code == 0u, 0u, (code << 20) + (base << 23));
  }

  template <class W>
  static FUSED_OPTIM_HD auto load(W code, uint32_t base) {
    return float_of(select(code < infinity, finite_bits(code, base), kInfinity + ((code - infinity) << 22)));
  }

  template <class W>
  static FUSED_OPTIM_HD auto load_usual(W code, uint32_t base) {
    return float_of(finite_bits(code, base));
  }

  template <class W>
  static FUSED_OPTIM_HD auto finite_code(W magnitude, W random, uint32_t base) {
    const auto code = int_of((magnitude + (random >> 12)) >> 20) - static_cast<int32_t>(8 * base);
    return smaller(bits_of(larger(code, 1)), magnitude);  // zero is the only one below its code
  }

  template <class F, class R>
  static FUSED_OPTIM_HD auto store_usual(F x, R random, uint32_t base) {
    return finite_code(magnitude_bits(x), random, base);
  }

  template <class F, class R>
  static FUSED_OPTIM_HD auto store(F x, R random, uint32_t base) {
    const auto magnitude = magnitude_bits(x);
    return unusual(finite_code(magnitude, random, base), magnitude, base, infinity);
  }
};

template <class Codec>
constexpr bool kBlocked = Codec::block > 1;

// Whether each element has an extra of its own.
template <class Codec>
constexpr bool kExtraEach = !kBlocked<Codec> && !std::is_same<typename Codec::Extra, NoExtra>::value;

// Of parameters, of gradients and of moments.
#define FUSED_OPTIM_PLAIN_CODECS(X) X(Fp32) X(Fp64) X(Bf16) X(Fp16)
#define FUSED_OPTIM_PARAM_CODECS(X) \
  FUSED_OPTIM_PLAIN_CODECS(X) X(Bf16Master) X(Fp16Master) X(Split16) X(Split8) X(Bf16Stochastic) X(Fp16Stochastic)
#define FUSED_OPTIM_MOMENT_CODECS(X) X(Fp32) X(Fp64) X(Bf16Dither) X(E4M3) X(E5M3)

// The formats that go together, of mu and of nu. A pair here has a step_cuda_*.cu.
#define FUSED_OPTIM_MOMENTS(X) X(Fp32, Fp32) X(Fp64, Fp64) X(Bf16Dither, Bf16Dither) X(E4M3, E5M3)

}  // namespace fused_optim
