// Vectors of gcc and clang, as large as a register: FUSED_OPTIM_VECTOR_BYTES. Rules and codecs compute with them as
// with numbers (numbers.h); how they come from memory and go there is here. Left to itself gcc vectorises loops over
// several formats too, but mixes widths in one loop, with a shuffle for each change, and narrows the masks of selects.
#pragma once

#include "numbers.h"

namespace fused_optim {
namespace FUSED_OPTIM_ISA {

typedef float Floats __attribute__((vector_size(FUSED_OPTIM_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(FUSED_OPTIM_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(FUSED_OPTIM_VECTOR_BYTES)));
typedef double Doubles __attribute__((vector_size(FUSED_OPTIM_VECTOR_BYTES)));

// The bits of 2^-100 and 2^112, between which a number, or 0, is divided by multiplying.
constexpr uint32_t kLeastDividend = (127 - 100) << 23, kMostDividend = (127 + 112) << 23;

constexpr int64_t kWords = FUSED_OPTIM_VECTOR_BYTES / 4;

// The vector that a stored number is read into, and how many of them there are in one.
template <class Stored>
using VectorOf = std::conditional_t<std::is_same<Stored, double>::value, Doubles,
                                    std::conditional_t<std::is_same<Stored, float>::value, Floats, Words>>;
template <class Stored>
constexpr int64_t kSize = std::is_same<Stored, double>::value ? kWords / 2 : kWords;

template <class To, class From>
FUSED_OPTIM_HD To load(const From* from) {
  To to;
  memcpy(&to, from, sizeof(to));
  return to;
}

// A whole vector from memory, and to it.
FUSED_OPTIM_HD Floats read_vector(const float* from) { return load<Floats>(from); }
FUSED_OPTIM_HD Doubles read_vector(const double* from) { return load<Doubles>(from); }
FUSED_OPTIM_HD void write_vector(float* to, Floats values) { memcpy(to, &values, sizeof(values)); }
FUSED_OPTIM_HD void write_vector(double* to, Doubles values) { memcpy(to, &values, sizeof(values)); }

// For each instruction set: read_vector of integers, which widens them to 32 bits and keeps a sign; write_halves and
// write_bytes, which cut; write_upper_halves. gcc 12 splits __builtin_convertvector of larger registers in pieces.
#if FUSED_OPTIM_VECTOR_BYTES == 64
FUSED_OPTIM_HD Words read_vector(const uint16_t* p) { return (Words)_mm512_cvtepu16_epi32(load<__m256i>(p)); }
FUSED_OPTIM_HD Words read_vector(const int16_t* p) { return (Words)_mm512_cvtepi16_epi32(load<__m256i>(p)); }
FUSED_OPTIM_HD Words read_vector(const uint8_t* p) { return (Words)_mm512_cvtepu8_epi32(load<__m128i>(p)); }
FUSED_OPTIM_HD Words read_vector(const int8_t* p) { return (Words)_mm512_cvtepi8_epi32(load<__m128i>(p)); }
FUSED_OPTIM_HD void write_halves(void* to, Words values) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)values));
}
FUSED_OPTIM_HD void write_bytes(void* to, Words values) {
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)values));
}
FUSED_OPTIM_HD void write_upper_halves(void* to, Words values) {
  const __m512i order = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,  //
                                         31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  const __m512i halves = _mm512_permutexvar_epi16(order, (__m512i)values);
  _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(halves));
}
FUSED_OPTIM_HD bool all_divide_fast(Words magnitude) {
  const __m512i m = (__m512i)magnitude, span = _mm512_set1_epi32(kMostDividend - kLeastDividend);
  const __mmask16 inside = _mm512_cmplt_epu32_mask((__m512i)(magnitude - kLeastDividend), span);
  return (inside | _mm512_testn_epi32_mask(m, m)) == 0xffff;
}
// Rounded once.
FUSED_OPTIM_HD Floats multiply_subtract(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmsub_ps(a, b, c); }
FUSED_OPTIM_HD Floats subtract_product(Floats c, Floats a, Floats b) { return (Floats)_mm512_fnmadd_ps(a, b, c); }
#elif FUSED_OPTIM_VECTOR_BYTES == 32
FUSED_OPTIM_HD Words read_vector(const uint16_t* p) { return (Words)_mm256_cvtepu16_epi32(load<__m128i>(p)); }
FUSED_OPTIM_HD Words read_vector(const int16_t* p) { return (Words)_mm256_cvtepi16_epi32(load<__m128i>(p)); }
FUSED_OPTIM_HD Words read_vector(const uint8_t* p) { return (Words)_mm256_cvtepu8_epi32(_mm_loadu_si64(p)); }
FUSED_OPTIM_HD Words read_vector(const int8_t* p) { return (Words)_mm256_cvtepi8_epi32(_mm_loadu_si64(p)); }
// Chosen bytes of each half of the register, and then the two side by side.
FUSED_OPTIM_HD void write_chosen_halves(void* to, Words values, __m128i chosen) {
  const __m256i halves = _mm256_shuffle_epi8((__m256i)values, _mm256_broadcastsi128_si256(chosen));
  _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08)));
}
FUSED_OPTIM_HD void write_halves(void* to, Words values) {
  write_chosen_halves(to, values, _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1));
}
FUSED_OPTIM_HD void write_upper_halves(void* to, Words values) {
  write_chosen_halves(to, values, _mm_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1));
}
FUSED_OPTIM_HD void write_bytes(void* to, Words values) {
  const __m128i chosen = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i fours = _mm256_shuffle_epi8((__m256i)values, _mm256_broadcastsi128_si256(chosen));
  _mm_storeu_si64(to, _mm_unpacklo_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1)));
}
FUSED_OPTIM_HD bool all_divide_fast(Words magnitude) {
  const auto m = (Ints)magnitude;
  const Ints inside = (m >= static_cast<int32_t>(kLeastDividend)) & (m < static_cast<int32_t>(kMostDividend));
  return _mm256_movemask_ps((__m256)(inside | (m == 0))) == 0xff;
}
FUSED_OPTIM_HD Floats multiply_subtract(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmsub_ps(a, b, c); }
FUSED_OPTIM_HD Floats subtract_product(Floats c, Floats a, Floats b) { return (Floats)_mm256_fnmadd_ps(a, b, c); }
#else
template <class Stored>
using Short __attribute__((vector_size(kWords * sizeof(Stored)))) = Stored;

template <class Stored>
FUSED_OPTIM_HD Words read_vector(const Stored* from) {
  return __builtin_convertvector(load<Short<Stored>>(from), Words);
}
template <class Stored>
FUSED_OPTIM_HD void write_short(void* to, Words values) {
  const auto narrow = __builtin_convertvector(values, Short<Stored>);
  memcpy(to, &narrow, sizeof(narrow));
}
FUSED_OPTIM_HD void write_halves(void* to, Words values) { write_short<uint16_t>(to, values); }
FUSED_OPTIM_HD void write_bytes(void* to, Words values) { write_short<uint8_t>(to, values); }
FUSED_OPTIM_HD void write_upper_halves(void* to, Words values) { write_halves(to, values >> 16); }
#endif

FUSED_OPTIM_HD uint32_t largest_of(Words values) {
#if FUSED_OPTIM_VECTOR_BYTES == 32
  // With the loop a tile of bfloat16 moments takes up to 0.9% more instructions.
  const __m256i all = (__m256i)values;
  __m128i largest = _mm_max_epu32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  largest = _mm_max_epu32(largest, _mm_shuffle_epi32(largest, 0x4e));
  largest = _mm_max_epu32(largest, _mm_shuffle_epi32(largest, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(largest));
#else
  uint32_t largest = 0;
  for (int64_t i = 0; i < kWords; ++i) largest = values[i] > largest ? values[i] : largest;
  return largest;
#endif
}

template <class Stored>
FUSED_OPTIM_HD void write_vector(Stored* to, Words values) {
  sizeof(Stored) == 2 ? write_halves(to, values) : write_bytes(to, values);
}

// How many elements of a vector there are: all, or, at a tensor's end, some, at least one. Then the others are zero, or
// not written.
struct All {};

// Of some by AVX-512's masks: a call of memcpy for each operand of a tensor of one element takes longer than its step.
template <bool upper_halves = false, class Stored, class Count>
FUSED_OPTIM_HD auto read_vector(const Stored* from, Count n) {
  Stored part[kSize<Stored>];
  if constexpr (!std::is_same<Count, All>::value) {
#if FUSED_OPTIM_VECTOR_BYTES == 64
    const __m512i bytes = _mm512_maskz_loadu_epi8(~uint64_t{0} >> (64 - n * sizeof(Stored)), from);
    memcpy(part, &bytes, sizeof(part));
#else
    memset(part, 0, sizeof(part));
    memcpy(part, from, n * sizeof(Stored));
#endif
    from = part;
  }
  if constexpr (upper_halves)
    return read_vector(from) << 16;
  else
    return read_vector(from);
}

template <bool upper_halves = false, class Stored, class Vector, class Count>
FUSED_OPTIM_HD void write_vector(Stored* to, Vector values, Count n) {
  Stored part[kSize<Stored>];
  Stored* const whole = std::is_same<Count, All>::value ? to : part;
  if constexpr (upper_halves)
    write_upper_halves(whole, values);
  else
    write_vector(whole, values);
  if constexpr (!std::is_same<Count, All>::value) {
#if FUSED_OPTIM_VECTOR_BYTES == 64
    __m512i bytes = _mm512_setzero_si512();
    memcpy(&bytes, part, sizeof(part));
    _mm512_mask_storeu_epi8(to, ~uint64_t{0} >> (64 - n * sizeof(Stored)), bytes);
#else
    memcpy(to, part, n * sizeof(Stored));
#endif
  }
}

// `x` with zeros in the place of what is not there.
template <class Count>
FUSED_OPTIM_HD Floats first_of(Floats x, Count n) {
  if constexpr (std::is_same<Count, All>::value) return x;
  float part[kWords];
  write_vector(part, x);
  return read_vector(part, n);
}

// 0, 1, 2, ...
FUSED_OPTIM_HD Words iota() {
  Words words;
  for (int64_t i = 0; i < kWords; ++i) words[i] = static_cast<uint32_t>(i);
  return words;
}

// A constant that gcc keeps in a register: it would make it anew for each vector, from an integer's.
FUSED_OPTIM_HD Words in_register(Words constant) {
#if defined(__x86_64__)
  asm("" : "+v"(constant));
#endif
  return constant;
}

}  // namespace FUSED_OPTIM_ISA

#if FUSED_OPTIM_VECTOR_BYTES > 16
// The correctly rounded quotient without a division, which takes longer than the rest of a step in a cache:
// docs/numerics.md has the proof. AdamW takes 0.63 ns an element, 0.81 with the division.
FUSED_OPTIM_HD FUSED_OPTIM_ISA::Floats operator/(FUSED_OPTIM_ISA::Floats x, const Divisor<float>& divisor) {
  using namespace FUSED_OPTIM_ISA;
  if (divisor.is_one) return x;
  if (std::isnan(divisor.reciprocal) || !all_divide_fast(bits_of(absolute(x)))) return x / divisor.value;
  const Floats d = Floats{} + divisor.value, reciprocal = Floats{} + divisor.reciprocal;
  const Floats near = x * reciprocal;
  // In this order: with the remainder negated, -0 would give 0.
  return subtract_product(near, multiply_subtract(near, d, x), reciprocal);
}
#endif

}  // namespace fused_optim
