// How values lie in memory: the C++ statement of fused_optim/storage.py. A codec is
//
//   name                 as in fused_optim/storage.py
//   PlainCodec           of a parameter: the codec of its dtype's values as they are
//   Working              what the rules compute with: float or double
//   Stored, Aux          what lies in memory: one Stored an element, one Aux (NoAux for none) for each `block`
//   random               which random bits `store` is given: none, 32 of the dither or 16 of Philox
//   load(stored, aux)    the value in the working precision. load<true> may take fewer operations: of block formats
//                        for finite codes, of split ones except for a zero with a negative remainder
//   store(x, random, aux)  what to store. Where block is 1, it sets `aux`; else `aux` is the block exponent,
//                        which `exponent_of` makes of the largest `magnitude` in the block. Where `low_precision`,
//                        store<true> is fewer operations, for a `finite_magnitude` below kFiniteLimit
//   is_upper_half        what is stored is 16 bits that are the upper halves of words
//
// Values, integers and random bits are single numbers or vectors of them, see numbers.h. What is stored comes and goes
// in 32 bits, cut to Stored in memory. NaN becomes the canonical NaN of the format.
#pragma once

#include <cstdint>

#include "numbers.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace fused_optim {

// Random bits for rounding: fused_optim/rounding.py in C++.
enum Operand { kParam, kMu, kNu };

// What a rounding may depend on beside the value and the element's logical index.
struct Place {
  uint32_t count;  // the parameter's step number
  uint64_t key;    // fused_optim.rounding.random_key
};

// `index`: the element's logical index, whose low 32 bits are enough; one or a vector of them.
template <class W>
FUSED_OPTIM_HD W dither(W index, const Place& place, Operand operand) {
  const uint32_t factor = operand == kParam ? 0xA54FF53Bu : operand == kMu ? 0x6A09E667u : 0xBB67AE85u;
  return index * factor + place.count * 0x9E3779B9u;
}

struct PhiloxWords {
  uint32_t word[4];
};

// Philox 4x32-10 for eight neighbours: 16 bits for each, the low half of a word first.
FUSED_OPTIM_HD PhiloxWords philox(uint64_t group, const Place& place) {
  uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32);
  uint32_t c2 = place.count, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(place.key), k1 = static_cast<uint32_t>(place.key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

struct NoAux {};
enum Random { kNearest, kDither, kPhilox };

constexpr int64_t kBlockElements = 128;  // that share one exponent in the 8-bit formats

// Values from here on are infinite, NaN or about to be rounded to infinity.
constexpr uint32_t kFiniteLimit = 0x7f000000u;

constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u, kNaN = 0x7fc00000u;

template <class F>
FUSED_OPTIM_HD auto magnitude_bits(F x) { return bits_of(x) & kMagnitude; }

struct Codec {  // what most have in common
  using Working = float;
  using Aux = NoAux;
  static constexpr int64_t block = 1;
  static constexpr Random random = kNearest;
  static constexpr bool low_precision = false;
  static constexpr bool is_upper_half = false;

  template <class F>
  static FUSED_OPTIM_HD auto finite_magnitude(F x) { return magnitude_bits(x); }
};

template <class F>
FUSED_OPTIM_HD auto canonical_bits(F x) { return select(magnitude_bits(x) > kInfinity, kNaN, bits_of(x)); }

template <class T>
struct Plain : Codec {
  using Stored = T;
  using Working = T;
  template <bool = false, class F>
  static FUSED_OPTIM_HD F load(F x, NoAux) { return x; }
  template <bool = false, class F, class R, class E>
  static FUSED_OPTIM_HD F store(F x, R, E&) { return x; }
};

struct Fp32 : Plain<float> {
  using PlainCodec = Fp32;
  static constexpr const char* name = "fp32";
};
struct Fp64 : Plain<double> {
  using PlainCodec = Fp64;
  static constexpr const char* name = "fp64";
};

struct UpperHalf : Codec {
  using PlainCodec = struct Bf16;
  using Stored = uint16_t;
  static constexpr bool low_precision = true;
  static constexpr bool is_upper_half = true;
};

struct Bf16 : UpperHalf {
  static constexpr const char* name = "bf16";

  template <bool = false, class W>
  static FUSED_OPTIM_HD auto load(W x, NoAux) { return float_of(x); }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  // One instruction, where integers take three; a NaN stays one.
  template <bool = false, class R, class E>
  static FUSED_OPTIM_HD uint32_t store(float x, R, E&) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(x), "f"(0.0f));
    return pair;
  }
#else
  template <bool finite = false, class F, class R, class E>
  static FUSED_OPTIM_HD auto store(F x, R, E&) {
    const auto b = bits_of(x), rounded = b + 0x7fffu + ((b >> 16) & 1u);
    return finite ? rounded : select(magnitude_bits(x) > kInfinity, kNaN, rounded);
  }
#endif
};

// By the random bits from `shift` on. A finite value becomes infinite only where rounding to nearest makes it so.
template <Random kind, int shift>
struct Bf16AtOdds : Bf16 {
  static constexpr Random random = kind;

  template <bool finite = false, class F, class R, class E>
  static FUSED_OPTIM_HD auto store(F x, R random, E&) {
    const auto b = finite ? bits_of(x) : canonical_bits(x), more = random >> shift;
    return b + (finite ? more : select((b & kMagnitude) >= 0x7f7f0000u, 0x8000u, more));
  }
};

struct Bf16Stochastic : Bf16AtOdds<kPhilox, 0> {
  static constexpr const char* name = "bf16_stochastic";
};
struct Bf16Dither : Bf16AtOdds<kDither, 16> {
  static constexpr const char* name = "bf16_dither";
};

struct Fp16 : Codec {
  static constexpr const char* name = "fp16";
  using PlainCodec = Fp16;
  using Stored = uint16_t;

#if defined(__CUDA_ARCH__)
  template <bool = false>
  static FUSED_OPTIM_HD float load(uint16_t x, NoAux) { return __half2float(__ushort_as_half(x)); }
  template <bool = false, class R, class E>
  static FUSED_OPTIM_HD uint16_t store(float x, R, E&) { return __half_as_ushort(__float2half_rn(x)); }
#else
  // Integers and selects alone, since a processor may lack F16C.
  template <bool = false, class W>
  static FUSED_OPTIM_HD auto load(W x, NoAux) {
    const auto sign = (x & 0x8000u) << 16, shifted = (x & 0x7fffu) << 13;
    // The exponent's bias is moved by a multiplication by 2^112, exact for subnormals too.
    const auto finite = bits_of(float_of(shifted) * bit_cast<float>(0x77800000u));
    return float_of(sign | select((x & 0x7c00u) == 0x7c00u, shifted | kInfinity, finite));
  }

  template <bool = false, class F, class R, class E>
  static FUSED_OPTIM_HD auto store(F x, R, E&) {
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
};

// A float32, without its last bits where Aux has fewer than 16, as a bfloat16, rounded half away from zero, and
// the remainder.
template <class Remainder>
struct Split : UpperHalf {
  using Aux = Remainder;
  static constexpr int missing_bits = 16 - 8 * sizeof(Aux);
  static constexpr Random random = missing_bits == 0 ? kNearest : kDither;

  // A zero has a negative remainder only where somebody wrote it to the parameter. The remainder then counts
  // as 0, since the sum would be a NaN.
  template <bool finite = false, class W, class E>
  static FUSED_OPTIM_HD auto load(W x, E remainder) {
    const auto scaled = int_of(remainder) * (1 << missing_bits), least = -int_of(smaller(x << 1, 0x8000u));
    return float_of(x + bits_of(finite ? scaled : larger(scaled, least)));
  }

  template <bool finite = false, class F, class R, class E>
  static FUSED_OPTIM_HD auto store(F x, R random, E& remainder) {
    auto b = finite ? bits_of(x) : canonical_bits(x);
    // The largest finite values are cut: no dither carries them to infinity.
    const auto dither = finite ? random >> 24 : select((b & kMagnitude) >= 0x7f7fff00u, 0u, random >> 24);
    if constexpr (missing_bits != 0) b += dither;
    remainder = (E)(b >> missing_bits);  // less a multiple of 2^16
    return b + 0x8000u;
  }
};

struct Split16 : Split<int16_t> {
  static constexpr const char* name = "split16";
};
struct Split8 : Split<int8_t> {
  static constexpr const char* name = "split8";
};

// 8 bits under the exponent of a block, which all its elements share. A format has
//
//   infinity, code_bits, sign_bit  the code of infinity, after which NaN's comes; the bits of a code, and its sign
//   orders                         binary orders of magnitude below the largest of a block
//   finite_bits(code, exponent)    the bits of a finite value, and, for a value, its rounded code:
//   finite_code(magnitude, random, exponent)
template <class Format>
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

  static FUSED_OPTIM_HD uint8_t exponent_of(uint32_t largest) {
    const int32_t exponent = static_cast<int32_t>(largest >> 23) - Format::orders;
    return static_cast<uint8_t>(exponent > 0 ? exponent : 0);
  }

  template <bool finite = false, class W>
  static FUSED_OPTIM_HD auto load(W x, uint32_t exponent) {
    const auto code = Format::sign_bit == 0 ? x : x & Format::code_bits;
    const auto magnitude = Format::finite_bits(code, exponent), special = kInfinity + ((code - Format::infinity) << 22);
    const auto sign = (x << 24) & (Format::sign_bit << 24);
    return float_of((finite ? magnitude : select(code < Format::infinity, magnitude, special)) | sign);
  }

  template <bool finite = false, class F, class R>
  static FUSED_OPTIM_HD auto store(F x, R random, uint32_t exponent) {
    const auto m = finite ? Format::finite_magnitude(x) : magnitude_bits(x);
    const auto sign = (bits_of(x) >> 24) & Format::sign_bit;
    const auto code = Format::finite_code(m, random, exponent);
    const auto special = select(m > kInfinity, Format::infinity + 1, Format::infinity);
    // No finite value is rounded to infinity, of which 2040 is the code under exponent 0.
    const auto any = select(m < kInfinity, smaller(code, 2039 - 8 * exponent), special);
    // A NaN has no sign here: devices give the NaN of an operation different ones.
    return finite ? code | sign : any | select(m > kInfinity, 0u, sign);
  }
};

// Sign, 4 bits of exponent, 3 of mantissa, subnormal below; 126 is infinity, 127 NaN.
struct E4M3 : Blocked<E4M3> {
  static constexpr const char* name = "e4m3";
  static constexpr uint32_t infinity = 126, code_bits = 0x7fu, sign_bit = 0x80u;
  static constexpr int32_t orders = 14;

  // `one` is the smallest normal value: subnormal codes are the mantissa's first bits of a sum with it. Below it the
  // subnormal value is the smaller of the two, above it the normal one.
  template <class W>
  static FUSED_OPTIM_HD auto finite_bits(W code, uint32_t exponent) {
    const auto bits = code << 20;
    const uint32_t one = (exponent + 1) << 23;
    const auto subnormal = bits_of(float_of(bits + one) - float_of(one));
    return smaller(subnormal, bits + (exponent << 23));
  }

  // Of codes it is the larger one.
  template <class W, class R>
  static FUSED_OPTIM_HD auto finite_code(W magnitude, R random, uint32_t exponent) {
    const uint32_t one = (exponent + 1) << 23;
    const auto subnormal = int_of(bits_of(float_of(magnitude) + float_of(one)) - one);
    const auto normal = int_of(magnitude - (exponent << 23));
    return (bits_of(larger(subnormal, normal)) + (random >> 12)) >> 20;
  }
};

// 5 bits of exponent, 3 of mantissa, for what is never negative; 0 is zero and nothing else,
// 254 infinity, 255 NaN.
struct E5M3 : Blocked<E5M3> {
  static constexpr const char* name = "e5m3";
  static constexpr uint32_t infinity = 254, code_bits = 0xffu, sign_bit = 0;
  static constexpr int32_t orders = 30;

  // With a sign, which finite values have not, the bits are above every limit.
  template <class F>
  static FUSED_OPTIM_HD auto finite_magnitude(F x) { return bits_of(x); }

  template <class W>
  static FUSED_OPTIM_HD auto finite_bits(W code, uint32_t exponent) {
    return select(code == 0u, 0u, (code << 20) + (exponent << 23));
  }

  template <class W, class R>
  static FUSED_OPTIM_HD auto finite_code(W magnitude, R random, uint32_t exponent) {
    const auto code = int_of((magnitude + (random >> 12)) >> 20) - static_cast<int32_t>(8 * exponent);
    return smaller(bits_of(larger(code, 1)), magnitude);  // zero is the only one below its code
  }
};

template <class Codec>
constexpr bool kBlocked = Codec::block > 1;

template <class Codec>  // whether each element has an aux of its own
constexpr bool kAuxEach = !kBlocked<Codec> && !std::is_same<typename Codec::Aux, NoAux>::value;

// Whether kernels take these together. Gradients are read as they are in the parameter's plain format and in the
// working precision; Python copies others.
template <class Param, class Grad, class Mu>
constexpr bool kTogether = std::is_same<typename Param::Working, typename Mu::Working>::value &&
                           (std::is_same<Grad, typename Param::PlainCodec>::value ||
                            std::is_same<typename Grad::Stored, typename Param::Working>::value);

using GradCodecs = Types<Fp32, Fp64, Bf16, Fp16>;
using ParamCodecs = Types<Fp32, Fp64, Bf16, Fp16, Split16, Split8, Bf16Stochastic>;
using MuCodecs = Types<Fp32, Fp64, Bf16Dither, E4M3>;

// The second moment's format, which goes with the first's.
template <class Mu>
using NuOf = std::conditional_t<std::is_same<Mu, E4M3>::value, E5M3, Mu>;

}  // namespace fused_optim
