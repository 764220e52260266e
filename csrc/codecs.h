// How values lie in memory: the C++ statement of fused_optim/storage.py. A codec is
//
//   Stored, Extra       what lies in memory: one Stored an element, and one Extra for each
//                       `block` elements (NoExtra for none)
//   load(stored, extra) the value in the working precision
//   store(x, random, extra)  what to store; `random` is as `random` says, 32 bits of the dither
//                       or 16 of Philox. Where block is 1, it sets `extra`; else `extra` comes
//                       from `extra_of`, given the largest `magnitude` of the block.
//   store_usual, load_usual  the same in fewer operations, for the CPU: for values whose largest
//                       magnitude is `usual`, and for what lies in memory where `usual_stored` says so
//
// NaN becomes the canonical NaN of the format.
#pragma once

#include <cstdint>
#include <cstring>

#include "coefficients.h"
#include "rounding.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace fused_optim {

template <class To, class From>
FUSED_OPTIM_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

struct NoExtra {};

enum Random { kNearest, kDither, kPhilox };

constexpr int64_t kBlockElements = 128;  // that share one base in the 8-bit formats

// What most codecs have in common.
struct Codec {
  using Working = float;
  using Extra = NoExtra;
  static constexpr int64_t block = 1;
  static constexpr Random random = kNearest;

  static constexpr bool has_usual = false;

  // Nothing is infinite, NaN or about to be rounded to infinity.
  static FUSED_OPTIM_HD bool usual(uint32_t largest) { return largest < 0x7f000000u; }
};

constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u, kNaN = 0x7fc00000u;

FUSED_OPTIM_HD uint32_t bits_of(float x) { return bit_cast<uint32_t>(x); }
FUSED_OPTIM_HD uint32_t magnitude_bits(float x) { return bits_of(x) & kMagnitude; }
FUSED_OPTIM_HD uint32_t canonical_bits(float x) {
  const uint32_t b = bits_of(x);
  return (b & kMagnitude) > kInfinity ? kNaN : b;
}

struct Fp32 : Codec {
  static constexpr const char* name = "fp32";
  using Stored = float;
  static FUSED_OPTIM_HD float load(float x, NoExtra) { return x; }
  static FUSED_OPTIM_HD float store(float x, uint32_t, NoExtra&) { return x; }
};

struct Fp64 : Codec {
  static constexpr const char* name = "fp64";
  using Stored = double;
  using Working = double;
  static FUSED_OPTIM_HD double load(double x, NoExtra) { return x; }
  static FUSED_OPTIM_HD double store(double x, uint32_t, NoExtra&) { return x; }
};

struct Bf16 : Codec {
  static constexpr const char* name = "bf16";
  using Stored = uint16_t;

  static FUSED_OPTIM_HD float load(uint16_t x, NoExtra) {
    return bit_cast<float>(static_cast<uint32_t>(x) << 16);
  }

  static FUSED_OPTIM_HD uint16_t nearest(float x) {
    const uint32_t b = bits_of(x);
    const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((b & kMagnitude) > kInfinity ? 0x7fc0u : rounded);
  }

  static FUSED_OPTIM_HD uint16_t store(float x, uint32_t, NoExtra&) { return nearest(x); }

  // `word`: 16 bits. A finite value becomes infinite only where rounding to nearest makes it so.
  static FUSED_OPTIM_HD uint16_t at_odds(float x, uint32_t word) {
    const uint32_t b = canonical_bits(x);
    return static_cast<uint16_t>((b + ((b & kMagnitude) >= 0x7f7f0000u ? 0x8000u : word)) >> 16);
  }

  static FUSED_OPTIM_HD uint16_t at_odds_usual(float x, uint32_t word) {
    return static_cast<uint16_t>((bits_of(x) + word) >> 16);
  }
};

struct Fp16 : Codec {
  static constexpr const char* name = "fp16";
  using Stored = uint16_t;
  static FUSED_OPTIM_HD uint16_t store(float x, uint32_t, NoExtra&) { return nearest(x); }

  // Likewise; below 2^-14, where the unit is 2^-24, what lies below 2^-40 is dropped.
  static FUSED_OPTIM_HD uint16_t at_odds(float x, uint32_t word) {
    const uint32_t b = bits_of(x);
    const uint32_t magnitude = b & kMagnitude;
    word = magnitude >= 0x477fe000u ? 0x8000u : word;  // the largest float16
    const bool small = magnitude < 0x38800000u;
    const float fixed = (small ? bit_cast<float>(magnitude) : 0.0f) * 1099511627776.0f;  // 2^40
    const uint32_t subnormal = (static_cast<uint32_t>(static_cast<int32_t>(fixed)) + word) >> 16;
    uint32_t h = small ? subnormal : (magnitude - 0x38000000u + (word >> 3)) >> 13;
    h = magnitude >= 0x47800000u ? 0x7c00u : h;
    h |= (b >> 16) & 0x8000u;
    return static_cast<uint16_t>(magnitude > kInfinity ? 0x7e00u : h);
  }

#if defined(__CUDA_ARCH__)
  static FUSED_OPTIM_HD float load(uint16_t x, NoExtra) { return __half2float(__ushort_as_half(x)); }
  static FUSED_OPTIM_HD uint16_t nearest(float x) { return __half_as_ushort(__float2half_rn(x)); }
#else
  // Integers and selects alone, so that it vectorises without F16C.
  static FUSED_OPTIM_HD float load(uint16_t x, NoExtra) {
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
    const uint32_t shifted = static_cast<uint32_t>(x & 0x7fffu) << 13;
    // The exponent's bias is moved by a multiplication by 2^112, exact for subnormals too.
    const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(shifted) * bit_cast<float>(0x77800000u));
    const uint32_t magnitude = (x & 0x7c00u) == 0x7c00u ? shifted | 0x7f800000u : finite;
    return bit_cast<float>(sign | magnitude);
  }

  static FUSED_OPTIM_HD uint16_t nearest(float x) {
    const uint32_t b = bits_of(x);
    const uint32_t magnitude = b & kMagnitude;
    // Adding 0.5 leaves the subnormal half, rounded to nearest even, in the low bits.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
    h = magnitude >= 0x47800000u ? 0x7c00u : h;
    h = magnitude > 0x7f800000u ? 0x7e00u : h;
    return static_cast<uint16_t>(h | ((b >> 16) & 0x8000u));
  }
#endif
};

// A master beside the parameter. Where somebody wrote to the parameter, that is its value; else
// the two are half a unit apart at most, whichever way a tie was rounded.
struct Bf16Master : Bf16 {
  static constexpr const char* name = "bf16_master";
  using Extra = float;

  static FUSED_OPTIM_HD float load(uint16_t x, float master) {
    const uint32_t param = static_cast<uint32_t>(x) << 16;
    return bits_of(master) - param + 0x8000u <= 0x10000u ? master : bit_cast<float>(param);
  }

  static FUSED_OPTIM_HD uint16_t store(float x, uint32_t, float& master) {
    master = x;
    return nearest(x);
  }
};

struct Fp16Master : Fp16 {
  static constexpr const char* name = "fp16_master";
  using Extra = float;

  static FUSED_OPTIM_HD float load(uint16_t x, float master) {
    return nearest(master) == x ? master : Fp16::load(x, NoExtra{});
  }

  static FUSED_OPTIM_HD uint16_t store(float x, uint32_t, float& master) {
    master = x;
    return nearest(x);
  }
};

// The float32 of a bfloat16 and the rest. A zero has no negative rest unless somebody wrote it to
// the parameter: then there is none, since its sum with the old one would be a NaN.
FUSED_OPTIM_HD float joined(uint16_t x, int32_t remainder) {
  const uint32_t b = static_cast<uint32_t>(x) << 16, twice = b << 1;
  const int32_t least = -static_cast<int32_t>(twice < 0x8000u ? twice : 0x8000u);
  return bit_cast<float>(b + static_cast<uint32_t>(remainder > least ? remainder : least));
}

// A float32 as a bfloat16, rounded half away from zero, and the rest.
struct Split16 : Codec {
  static constexpr const char* name = "split16";
  using Stored = uint16_t;
  using Extra = int16_t;

  static FUSED_OPTIM_HD float load(uint16_t x, int16_t remainder) {
    return joined(x, remainder);
  }

  static FUSED_OPTIM_HD uint16_t store(float x, uint32_t, int16_t& remainder) {
    const uint32_t b = canonical_bits(x);
    remainder = static_cast<int16_t>(b);  // less a multiple of 2^16
    return static_cast<uint16_t>((b + 0x8000u) >> 16);
  }
};

// The highest 24 bits of a float32 in the same way.
struct Split8 : Codec {
  static constexpr const char* name = "split8";
  static constexpr bool has_usual = true;
  using Stored = uint16_t;
  using Extra = int8_t;
  static constexpr Random random = kDither;

  static FUSED_OPTIM_HD float load(uint16_t x, int8_t remainder) {
    return joined(x, static_cast<int32_t>(remainder) * 256);
  }

  static FUSED_OPTIM_HD uint16_t split(uint32_t b, int8_t& remainder) {
    remainder = static_cast<int8_t>(b >> 8);  // less a multiple of 2^16
    return static_cast<uint16_t>((b + 0x8000u) >> 16);
  }

  static FUSED_OPTIM_HD uint16_t store(float x, uint32_t random, int8_t& remainder) {
    const uint32_t b = canonical_bits(x);
    // The largest finite values are cut: no dither carries them to infinity.
    return split(b + ((b & kMagnitude) >= 0x7f7fff00u ? 0u : random >> 24), remainder);
  }

  static FUSED_OPTIM_HD uint16_t store_usual(float x, uint32_t random, int8_t& remainder) {
    return split(bits_of(x) + (random >> 24), remainder);
  }
};

struct Bf16Stochastic : Bf16 {
  static constexpr const char* name = "bf16_stochastic";
  static constexpr bool has_usual = true;
  static constexpr Random random = kPhilox;
  static FUSED_OPTIM_HD uint16_t store(float x, uint32_t random, NoExtra&) { return at_odds(x, random); }
  static FUSED_OPTIM_HD uint16_t store_usual(float x, uint32_t random, NoExtra&) { return at_odds_usual(x, random); }
};

struct Fp16Stochastic : Fp16 {
  static constexpr const char* name = "fp16_stochastic";
  static constexpr Random random = kPhilox;
  static FUSED_OPTIM_HD uint16_t store(float x, uint32_t random, NoExtra&) { return at_odds(x, random); }
};

struct Bf16Dither : Bf16 {
  static constexpr const char* name = "bf16_dither";
  static constexpr bool has_usual = true;
  static constexpr Random random = kDither;
  static FUSED_OPTIM_HD uint16_t store(float x, uint32_t random, NoExtra&) { return at_odds(x, random >> 16); }
  static FUSED_OPTIM_HD uint16_t store_usual(float x, uint32_t random, NoExtra&) {
    return at_odds_usual(x, random >> 16);
  }
};

// 8 bits under the exponent of a block.
struct Blocked : Codec {
  using Stored = uint8_t;
  using Extra = uint8_t;
  static constexpr int64_t block = kBlockElements;
  static constexpr bool has_usual = true;
  static constexpr Random random = kDither;

  // Of finite values; it is the largest of a block that counts.
  static FUSED_OPTIM_HD uint32_t magnitude(float x) {
    const uint32_t m = bits_of(x) & kMagnitude;
    return m & (0u - static_cast<uint32_t>(m < kInfinity));
  }

  static FUSED_OPTIM_HD uint8_t exponent_below(uint32_t largest, int32_t orders) {
    const int32_t base = static_cast<int32_t>(largest >> 23) - orders;
    return static_cast<uint8_t>(base > 0 ? base : 0);
  }

  // The codes of infinity and, after it, NaN; and no finite value is rounded to infinity, of
  // which 2040 is the code under base 0.
  static FUSED_OPTIM_HD uint32_t unusual(uint32_t code, uint32_t magnitude, uint32_t base, uint32_t infinity) {
    const uint32_t limit = 2039 - 8 * base;
    code = code < limit ? code : limit;
    return magnitude < kInfinity ? code : infinity + static_cast<uint32_t>(magnitude > kInfinity);
  }
};

// Sign, 4 bits of exponent, 3 of mantissa, subnormal below; 126 is infinity, 127 NaN.
struct E4M3 : Blocked {
  static constexpr const char* name = "e4m3";

  static FUSED_OPTIM_HD uint8_t extra_of(uint32_t largest) { return exponent_below(largest, 14); }

  // The smallest normal value: subnormal codes are the mantissa's first bits of a sum with it.
  static FUSED_OPTIM_HD uint32_t normal_bits(uint32_t base) { return (base + 1) << 23; }

  // Below `one` the subnormal value is the smaller of the two, above it the normal one.
  static FUSED_OPTIM_HD uint32_t finite_bits(uint32_t code, uint32_t base) {
    const uint32_t bits = code << 20, one = normal_bits(base);
    const uint32_t subnormal = bits_of(bit_cast<float>(bits + one) - bit_cast<float>(one));
    const uint32_t normal = bits + (base << 23);
    return subnormal < normal ? subnormal : normal;
  }

  static FUSED_OPTIM_HD float load(uint8_t stored, uint8_t base) {
    const uint32_t code = stored & 0x7fu;
    const uint32_t value = code < 126 ? finite_bits(code, base) : kInfinity + ((code - 126) << 22);
    return bit_cast<float>(value | (stored & 0x80u) << 24);
  }

  static FUSED_OPTIM_HD uint8_t magnitude_of_stored(uint8_t stored) { return stored & 0x7fu; }
  static FUSED_OPTIM_HD bool usual_stored(uint8_t largest) { return largest < 126; }
  static FUSED_OPTIM_HD float load_usual(uint8_t stored, uint8_t base) {
    return bit_cast<float>(finite_bits(stored & 0x7fu, base) | (stored & 0x80u) << 24);
  }

  static FUSED_OPTIM_HD uint32_t finite_code(uint32_t magnitude, uint32_t random, uint32_t base) {
    const uint32_t one = normal_bits(base);
    const auto subnormal = static_cast<int32_t>(bits_of(bit_cast<float>(magnitude) + bit_cast<float>(one)) - one);
    const auto normal = static_cast<int32_t>(magnitude - (base << 23));
    // Below `one` the subnormal code is the larger of the two, above it the normal one.
    return (static_cast<uint32_t>(subnormal > normal ? subnormal : normal) + (random >> 12)) >> 20;
  }

  static FUSED_OPTIM_HD uint8_t store_usual(float x, uint32_t random, uint8_t base) {
    const uint32_t b = bits_of(x);
    return static_cast<uint8_t>(finite_code(b & kMagnitude, random, base) | ((b >> 24) & 0x80u));
  }

  static FUSED_OPTIM_HD uint8_t store(float x, uint32_t random, uint8_t& base) {
    const uint32_t b = bits_of(x), magnitude = b & kMagnitude;
    const uint32_t code = unusual(finite_code(magnitude, random, base), magnitude, base, 126);
    return static_cast<uint8_t>(code | ((b >> 24) & 0x80u));
  }
};

// 5 bits of exponent, 3 of mantissa, for what is never negative; 0 is zero and nothing else,
// 254 infinity, 255 NaN.
struct E5M3 : Blocked {
  static constexpr const char* name = "e5m3";

  static FUSED_OPTIM_HD uint8_t extra_of(uint32_t largest) { return exponent_below(largest, 30); }

  static FUSED_OPTIM_HD float load(uint8_t code, uint8_t base) {
    const uint32_t c = code;
    const uint32_t value = c == 0 ? 0u : (c << 20) + (static_cast<uint32_t>(base) << 23);
    return bit_cast<float>(c < 254 ? value : kInfinity + ((c - 254) << 22));
  }

  static FUSED_OPTIM_HD uint8_t magnitude_of_stored(uint8_t code) { return code; }
  static FUSED_OPTIM_HD bool usual_stored(uint8_t largest) { return largest < 254; }
  static FUSED_OPTIM_HD float load_usual(uint8_t code, uint8_t base) {
    return bit_cast<float>(code == 0 ? 0u : (static_cast<uint32_t>(code) << 20) + (static_cast<uint32_t>(base) << 23));
  }

  static FUSED_OPTIM_HD uint32_t finite_code(uint32_t magnitude, uint32_t random, uint32_t base) {
    const int32_t code = static_cast<int32_t>((magnitude + (random >> 12)) >> 20) - static_cast<int32_t>(8 * base);
    const uint32_t at_least_one = static_cast<uint32_t>(code > 1 ? code : 1);
    return at_least_one < magnitude ? at_least_one : magnitude;  // zero is the only one below its code
  }

  static FUSED_OPTIM_HD uint8_t store_usual(float x, uint32_t random, uint8_t base) {
    return static_cast<uint8_t>(finite_code(bits_of(x) & kMagnitude, random, base));
  }

  static FUSED_OPTIM_HD uint8_t store(float x, uint32_t random, uint8_t& base) {
    const uint32_t magnitude = bits_of(x) & kMagnitude;
    return static_cast<uint8_t>(unusual(finite_code(magnitude, random, base), magnitude, base, 254));
  }
};

// Of parameters, of gradients and of moments.
#define FUSED_OPTIM_PLAIN_CODECS(X) X(Fp32) X(Fp64) X(Bf16) X(Fp16)
#define FUSED_OPTIM_PARAM_CODECS(X) \
  FUSED_OPTIM_PLAIN_CODECS(X) X(Bf16Master) X(Fp16Master) X(Split16) X(Split8) X(Bf16Stochastic) X(Fp16Stochastic)
#define FUSED_OPTIM_MOMENT_CODECS(X) X(Fp32) X(Fp64) X(Bf16Dither) X(E4M3) X(E5M3)

}  // namespace fused_optim
