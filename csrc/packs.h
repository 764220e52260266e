// Packs: the neighbours that one instruction of an instruction set works on, as vectors of gcc's
// and clang's. Rules and codecs compute with them as with numbers (numbers.h); what they lack is
// here: how they come from memory and go there. FUSED_OPTIM_PACK_BYTES is a register's size.
//
// Left to itself gcc vectorises loops over several formats too, but mixes widths in one loop, with
// a shuffle for each change, and packs the masks of selects.
#pragma once

#include "cpu_standard.h"
#include "numbers.h"

namespace fused_optim {
namespace FUSED_OPTIM_ISA {

typedef float Floats __attribute__((vector_size(FUSED_OPTIM_PACK_BYTES)));
typedef uint32_t Words __attribute__((vector_size(FUSED_OPTIM_PACK_BYTES)));
typedef int32_t Ints __attribute__((vector_size(FUSED_OPTIM_PACK_BYTES)));
typedef double Doubles __attribute__((vector_size(FUSED_OPTIM_PACK_BYTES)));

constexpr int64_t kWords = FUSED_OPTIM_PACK_BYTES / 4;

// The pack that a stored number is read into, and how many of them there are in one.
template <class Stored>
struct PackOf {
  using Pack = Words;
  static constexpr int64_t size = kWords;
};
template <>
struct PackOf<float> {
  using Pack = Floats;
  static constexpr int64_t size = kWords;
};
template <>
struct PackOf<double> {
  using Pack = Doubles;
  static constexpr int64_t size = kWords / 2;
};

template <class To, class From>
FUSED_OPTIM_HD To read_as(const From* from) {
  To to;
  memcpy(&to, from, sizeof(to));
  return to;
}

// A whole pack from memory; integers are widened to 32 bits, those with a sign keep it.
FUSED_OPTIM_HD Floats read_pack(const float* from) { return read_as<Floats>(from); }
FUSED_OPTIM_HD Doubles read_pack(const double* from) { return read_as<Doubles>(from); }

FUSED_OPTIM_HD void write_pack(float* to, Floats values) { memcpy(to, &values, sizeof(values)); }
FUSED_OPTIM_HD void write_pack(double* to, Doubles values) { memcpy(to, &values, sizeof(values)); }

// gcc 12 splits __builtin_convertvector of the larger registers in pieces.
#if FUSED_OPTIM_PACK_BYTES == 64

FUSED_OPTIM_HD Words read_pack(const uint16_t* from) {
  return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(read_as<__m256i>(from)));
}
FUSED_OPTIM_HD Words read_pack(const int16_t* from) {
  return reinterpret_cast<Words>(_mm512_cvtepi16_epi32(read_as<__m256i>(from)));
}
FUSED_OPTIM_HD Words read_pack(const uint8_t* from) {
  return reinterpret_cast<Words>(_mm512_cvtepu8_epi32(read_as<__m128i>(from)));
}
FUSED_OPTIM_HD Words read_pack(const int8_t* from) {
  return reinterpret_cast<Words>(_mm512_cvtepi8_epi32(read_as<__m128i>(from)));
}
// Zeros and halves in turns; and every second half.
FUSED_OPTIM_HD Words read_upper_halves(const uint16_t* from) {
  const __m512i order = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8,  //
                                         7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512i halves = _mm512_castsi256_si512(read_as<__m256i>(from));
  return reinterpret_cast<Words>(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, order, halves));
}
FUSED_OPTIM_HD void write_upper_halves(uint16_t* to, Words values) {
  const __m512i order = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,  //
                                         31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  const __m512i halves = _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(values));
  const __m256i first = _mm512_castsi512_si256(halves);
  memcpy(to, &first, sizeof(first));
}
FUSED_OPTIM_HD void write_halves(void* to, Words values) {
  const __m256i halves = _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(values));
  memcpy(to, &halves, sizeof(halves));
}
FUSED_OPTIM_HD void write_bytes(void* to, Words values) {
  const __m128i bytes = _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(values));
  memcpy(to, &bytes, sizeof(bytes));
}
FUSED_OPTIM_HD Floats square_roots(Floats x) { return reinterpret_cast<Floats>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x))); }
FUSED_OPTIM_HD Doubles square_roots(Doubles x) { return reinterpret_cast<Doubles>(_mm512_sqrt_pd(reinterpret_cast<__m512d>(x))); }
FUSED_OPTIM_HD uint32_t largest_of(Words values) { return _mm512_reduce_max_epu32(reinterpret_cast<__m512i>(values)); }
FUSED_OPTIM_HD bool any_at_least(Words values, uint32_t limit) {
  return _mm512_cmpge_epu32_mask(reinterpret_cast<__m512i>(values), _mm512_set1_epi32(static_cast<int>(limit))) != 0;
}

#elif FUSED_OPTIM_PACK_BYTES == 32

FUSED_OPTIM_HD Words read_pack(const uint16_t* from) {
  return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(read_as<__m128i>(from)));
}
FUSED_OPTIM_HD Words read_pack(const int16_t* from) {
  return reinterpret_cast<Words>(_mm256_cvtepi16_epi32(read_as<__m128i>(from)));
}
FUSED_OPTIM_HD Words read_pack(const uint8_t* from) {
  return reinterpret_cast<Words>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
FUSED_OPTIM_HD Words read_pack(const int8_t* from) {
  return reinterpret_cast<Words>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
// Chosen bytes of each half of the register, and then the two side by side.
FUSED_OPTIM_HD void write_chosen_halves(void* to, Words values, __m256i chosen) {
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(reinterpret_cast<__m256i>(values), chosen), 0x08);
  const __m128i first = _mm256_castsi256_si128(halves);
  memcpy(to, &first, sizeof(first));
}
FUSED_OPTIM_HD void write_halves(void* to, Words values) {
  write_chosen_halves(to, values,
                      _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                       0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1));
}
FUSED_OPTIM_HD void write_upper_halves(uint16_t* to, Words values) {
  write_chosen_halves(to, values,
                      _mm256_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                       2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1));
}
FUSED_OPTIM_HD Words read_upper_halves(const uint16_t* from) { return read_pack(from) << 16; }
FUSED_OPTIM_HD void write_bytes(void* to, Words values) {
  const __m256i chosen = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                          0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i fours = _mm256_shuffle_epi8(reinterpret_cast<__m256i>(values), chosen);
  const __m128i bytes = _mm_unpacklo_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
  memcpy(to, &bytes, 8);
}
FUSED_OPTIM_HD Floats square_roots(Floats x) { return reinterpret_cast<Floats>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x))); }
FUSED_OPTIM_HD Doubles square_roots(Doubles x) { return reinterpret_cast<Doubles>(_mm256_sqrt_pd(reinterpret_cast<__m256d>(x))); }
FUSED_OPTIM_HD uint32_t largest_of(Words values) {
  const __m256i all = reinterpret_cast<__m256i>(values);
  __m128i largest = _mm_max_epu32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  largest = _mm_max_epu32(largest, _mm_shuffle_epi32(largest, 0x4e));
  largest = _mm_max_epu32(largest, _mm_shuffle_epi32(largest, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(largest));
}
FUSED_OPTIM_HD bool any_at_least(Words values, uint32_t limit) {
  const Ints reached = reinterpret_cast<Ints>(values >= limit);
  return !_mm256_testz_si256(reinterpret_cast<__m256i>(reached), reinterpret_cast<__m256i>(reached));
}

#else

template <class Stored>
using Narrow __attribute__((vector_size(kWords * sizeof(Stored)))) = Stored;

template <class Stored>
FUSED_OPTIM_HD Words read_pack(const Stored* from) {
  return __builtin_convertvector(read_as<Narrow<Stored>>(from), Words);
}
template <class Stored>
FUSED_OPTIM_HD void write_narrow(void* to, Words values) {
  const auto narrow = __builtin_convertvector(values, Narrow<Stored>);
  memcpy(to, &narrow, sizeof(narrow));
}
FUSED_OPTIM_HD void write_halves(void* to, Words values) { write_narrow<uint16_t>(to, values); }
FUSED_OPTIM_HD void write_bytes(void* to, Words values) { write_narrow<uint8_t>(to, values); }
FUSED_OPTIM_HD Words read_upper_halves(const uint16_t* from) { return read_pack(from) << 16; }
FUSED_OPTIM_HD void write_upper_halves(uint16_t* to, Words values) { write_halves(to, values >> 16); }
#if defined(__SSE2__)
FUSED_OPTIM_HD Floats square_roots(Floats x) { return reinterpret_cast<Floats>(_mm_sqrt_ps(reinterpret_cast<__m128>(x))); }
FUSED_OPTIM_HD Doubles square_roots(Doubles x) { return reinterpret_cast<Doubles>(_mm_sqrt_pd(reinterpret_cast<__m128d>(x))); }
#else
template <class Pack>
FUSED_OPTIM_HD Pack square_roots(Pack x) {
  for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) x[i] = square_root(x[i]);
  return x;
}
#endif
FUSED_OPTIM_HD uint32_t largest_of(Words values) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < kWords; ++i) largest = values[i] > largest ? values[i] : largest;
  return largest;
}
FUSED_OPTIM_HD bool any_at_least(Words values, uint32_t limit) {
  const auto reached = values >= limit;
  uint64_t halves[2];
  memcpy(halves, &reached, sizeof(reached));
  return (halves[0] | halves[1]) != 0;
}

#endif

FUSED_OPTIM_HD void write_pack(uint16_t* to, Words values) { write_halves(to, values); }
FUSED_OPTIM_HD void write_pack(int16_t* to, Words values) { write_halves(to, values); }
FUSED_OPTIM_HD void write_pack(uint8_t* to, Words values) { write_bytes(to, values); }
FUSED_OPTIM_HD void write_pack(int8_t* to, Words values) { write_bytes(to, values); }

// The first `n` of a pack alone, one or more. A call of memcpy for each operand of a tensor of one element takes
// longer than its step.
template <class Stored>
FUSED_OPTIM_HD void copy_from(Stored* part, const Stored* from, int64_t n) {
#if FUSED_OPTIM_PACK_BYTES == 64
  const __m512i bytes = _mm512_maskz_loadu_epi8(~uint64_t{0} >> (64 - n * sizeof(Stored)), from);
  memcpy(part, &bytes, PackOf<Stored>::size * sizeof(Stored));
#else
  memset(part, 0, PackOf<Stored>::size * sizeof(Stored));
  memcpy(part, from, n * sizeof(Stored));
#endif
}
template <class Stored>
FUSED_OPTIM_HD void copy_to(Stored* to, const Stored* part, int64_t n) {
#if FUSED_OPTIM_PACK_BYTES == 64
  __m512i bytes = _mm512_setzero_si512();
  memcpy(&bytes, part, PackOf<Stored>::size * sizeof(Stored));
  _mm512_mask_storeu_epi8(to, ~uint64_t{0} >> (64 - n * sizeof(Stored)), bytes);
#else
  memcpy(to, part, n * sizeof(Stored));
#endif
}

// How many elements of a pack there are: all, or, at a tensor's end, some. Then the rest is zero, or
// is not written.
struct All {};

template <bool upper_halves = false, class Stored, class Count>
FUSED_OPTIM_HD auto read_pack(const Stored* from, Count n) {
  Stored part[PackOf<Stored>::size];
  if constexpr (!std::is_same<Count, All>::value) {
    copy_from(part, from, n);
    from = part;
  }
  if constexpr (upper_halves)
    return read_upper_halves(from);
  else
    return read_pack(from);
}

template <bool upper_halves = false, class Stored, class Pack, class Count>
FUSED_OPTIM_HD void write_pack(Stored* to, Pack values, Count n) {
  Stored part[PackOf<Stored>::size];
  Stored* const whole = std::is_same<Count, All>::value ? to : part;
  if constexpr (upper_halves)
    write_upper_halves(whole, values);
  else
    write_pack(whole, values);
  if constexpr (!std::is_same<Count, All>::value) copy_to(to, part, n);
}

// `x` with zeros in the place of what is not there.
template <class Count>
FUSED_OPTIM_HD Floats first_of(Floats x, Count n) {
  if constexpr (std::is_same<Count, All>::value) return x;
  float part[kWords];
  write_pack(part, x);
  return read_pack(part, n);
}

// 0, 1, 2, ...
FUSED_OPTIM_HD Words iota() {
  Words words;
  for (int64_t i = 0; i < kWords; ++i) words[i] = static_cast<uint32_t>(i);
  return words;
}

// A constant that gcc keeps in a register: it would make it anew for each pack, from an integer's.
FUSED_OPTIM_HD Words in_register(Words constant) {
#if defined(__x86_64__)
  asm("" : "+v"(constant));
#endif
  return constant;
}

}  // namespace FUSED_OPTIM_ISA

template <>
struct Traits<FUSED_OPTIM_ISA::Floats> {
  using Float = FUSED_OPTIM_ISA::Floats;
  using Word = FUSED_OPTIM_ISA::Words;
  using Int = FUSED_OPTIM_ISA::Ints;
  static FUSED_OPTIM_HD Float square_root(Float x) { return FUSED_OPTIM_ISA::square_roots(x); }
  static FUSED_OPTIM_HD Float absolute(Float x) { return bit_cast<Float>(bit_cast<Word>(x) & 0x7fffffffu); }
  static FUSED_OPTIM_HD Int truncated(Float x) { return __builtin_convertvector(x, Int); }
};
template <>
struct Traits<FUSED_OPTIM_ISA::Words> : Traits<FUSED_OPTIM_ISA::Floats> {};
template <>
struct Traits<FUSED_OPTIM_ISA::Ints> : Traits<FUSED_OPTIM_ISA::Floats> {};

template <>
struct Traits<FUSED_OPTIM_ISA::Doubles> {
  using Double = FUSED_OPTIM_ISA::Doubles;
  typedef uint64_t Bits __attribute__((vector_size(FUSED_OPTIM_PACK_BYTES)));
  static FUSED_OPTIM_HD Double square_root(Double x) { return FUSED_OPTIM_ISA::square_roots(x); }
  static FUSED_OPTIM_HD Double absolute(Double x) {
    return bit_cast<Double>(bit_cast<Bits>(x) & 0x7fffffffffffffffu);
  }
};

}  // namespace fused_optim
