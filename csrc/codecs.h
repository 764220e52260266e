// How values lie in memory: a codec's `load` gives the working precision, `store` rounds
// once to nearest even. The C++ statement of fused_optim/storage.py; NaN becomes the
// canonical NaN of the format.
#pragma once

#include <cstdint>
#include <cstring>

#include "coefficients.h"

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

struct Fp32 {
  static constexpr const char* name = "fp32";
  using Stored = float;
  using Working = float;
  static FUSED_OPTIM_HD float load(float x) { return x; }
  static FUSED_OPTIM_HD float store(float x) { return x; }
};

struct Fp64 {
  static constexpr const char* name = "fp64";
  using Stored = double;
  using Working = double;
  static FUSED_OPTIM_HD double load(double x) { return x; }
  static FUSED_OPTIM_HD double store(double x) { return x; }
};

struct Bf16 {
  static constexpr const char* name = "bf16";
  using Stored = uint16_t;
  using Working = float;

  static FUSED_OPTIM_HD float load(uint16_t x) {
    return bit_cast<float>(static_cast<uint32_t>(x) << 16);
  }

  static FUSED_OPTIM_HD uint16_t store(float x) {
    const uint32_t b = bit_cast<uint32_t>(x);
    const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((b & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
};

struct Fp16 {
  static constexpr const char* name = "fp16";
  using Stored = uint16_t;
  using Working = float;

#if defined(__CUDA_ARCH__)
  static FUSED_OPTIM_HD float load(uint16_t x) { return __half2float(__ushort_as_half(x)); }
  static FUSED_OPTIM_HD uint16_t store(float x) { return __half_as_ushort(__float2half_rn(x)); }
#else
  // Integers and selects alone, so that it vectorises without F16C.
  static FUSED_OPTIM_HD float load(uint16_t x) {
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
    const uint32_t shifted = static_cast<uint32_t>(x & 0x7fffu) << 13;
    // The exponent's bias is moved by a multiplication by 2^112, exact for subnormals too.
    const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(shifted) * bit_cast<float>(0x77800000u));
    const uint32_t magnitude = (x & 0x7c00u) == 0x7c00u ? shifted | 0x7f800000u : finite;
    return bit_cast<float>(sign | magnitude);
  }

  static FUSED_OPTIM_HD uint16_t store(float x) {
    const uint32_t b = bit_cast<uint32_t>(x);
    const uint32_t magnitude = b & 0x7fffffffu;
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

#define FUSED_OPTIM_CODECS(X) X(Fp32) X(Fp64) X(Bf16) X(Fp16)

}  // namespace fused_optim
