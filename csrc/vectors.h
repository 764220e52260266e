// Vectors: the neighbours that one instruction of an instruction set works on, as vectors of gcc's
// and clang's. Rules and codecs compute with them as with numbers (numbers.h); what they lack is
// here: how they come from memory and go there. FUSED_OPTIM_VECTOR_BYTES is a register's size.
//
// Left to itself gcc vectorises loops over several formats too, but mixes widths in one loop, with
// a shuffle for each change, and narrows the masks of selects.
#pragma once

#include "cpu_standard.h"
#include "numbers.h"

namespace fused_optim {
namespace FUSED_OPTIM_ISA {

typedef float Floats __attribute__((vector_size(FUSED_OPTIM_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(FUSED_OPTIM_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(FUSED_OPTIM_VECTOR_BYTES)));
typedef double Doubles __attribute__((vector_size(FUSED_OPTIM_VECTOR_BYTES)));

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

}  // namespace FUSED_OPTIM_ISA
}  // namespace fused_optim

// For each instruction set: read_vector of integers, which widens them to 32 bits and keeps a sign;
// write_halves and write_bytes, which cut; read_upper_halves and write_upper_halves; largest_of.
#if FUSED_OPTIM_VECTOR_BYTES == 64
#include "vectors_avx512.h"
#elif FUSED_OPTIM_VECTOR_BYTES == 32
#include "vectors_avx2.h"
#else
#include "vectors_any.h"
#endif

namespace fused_optim {
namespace FUSED_OPTIM_ISA {

template <class Stored>
FUSED_OPTIM_HD void write_vector(Stored* to, Words values) {
  if constexpr (sizeof(Stored) == 2)
    write_halves(to, values);
  else
    write_bytes(to, values);
}

// The first `n` of a vector alone, one or more. A call of memcpy for each operand of a tensor of one
// element takes longer than its step.
template <class Stored>
FUSED_OPTIM_HD void copy_from(Stored* part, const Stored* from, int64_t n) {
#if FUSED_OPTIM_VECTOR_BYTES == 64
  const __m512i bytes = _mm512_maskz_loadu_epi8(~uint64_t{0} >> (64 - n * sizeof(Stored)), from);
  memcpy(part, &bytes, kSize<Stored> * sizeof(Stored));
#else
  memset(part, 0, kSize<Stored> * sizeof(Stored));
  memcpy(part, from, n * sizeof(Stored));
#endif
}
template <class Stored>
FUSED_OPTIM_HD void copy_to(Stored* to, const Stored* part, int64_t n) {
#if FUSED_OPTIM_VECTOR_BYTES == 64
  __m512i bytes = _mm512_setzero_si512();
  memcpy(&bytes, part, kSize<Stored> * sizeof(Stored));
  _mm512_mask_storeu_epi8(to, ~uint64_t{0} >> (64 - n * sizeof(Stored)), bytes);
#else
  memcpy(to, part, n * sizeof(Stored));
#endif
}

// How many elements of a vector there are: all, or, at a tensor's end, some. Then the others are zero, or
// is not written.
struct All {};

template <bool upper_halves = false, class Stored, class Count>
FUSED_OPTIM_HD auto read_vector(const Stored* from, Count n) {
  Stored part[kSize<Stored>];
  if constexpr (!std::is_same<Count, All>::value) {
    copy_from(part, from, n);
    from = part;
  }
  if constexpr (upper_halves)
    return read_upper_halves(from);
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
  if constexpr (!std::is_same<Count, All>::value) copy_to(to, part, n);
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
}  // namespace fused_optim
