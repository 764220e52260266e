// Rules and codecs are written once for a number and for a vector of neighbours that the CPU
// computes together (csrc/vectors.h). Here is what the two differ in.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "coefficients.h"

namespace fused_optim {

template <class... T> struct Types {};  // a list of rules or codecs

// What has the size of a number or of a vector of 32-bit ones.
template <class T>
struct Traits {
#if !defined(__CUDACC__)
  typedef float Float __attribute__((vector_size(sizeof(T))));
  typedef uint32_t Word __attribute__((vector_size(sizeof(T))));
  typedef int32_t Int __attribute__((vector_size(sizeof(T))));
#endif
};

template <>
struct Traits<float> {
  using Float = float;
  using Word = uint32_t;
  using Int = int32_t;
};
template <> struct Traits<uint32_t> : Traits<float> {};
template <> struct Traits<int32_t> : Traits<float> {};

FUSED_OPTIM_HD float absolute(float x) { return fabsf(x); }
FUSED_OPTIM_HD double absolute(double x) { return fabs(x); }
FUSED_OPTIM_HD float square_root(float x) { return sqrtf(x); }  // rounded once, by setup.py's flags
FUSED_OPTIM_HD double square_root(double x) { return sqrt(x); }

// Of vectors. The compiler makes one instruction of each.
template <class Vector>
FUSED_OPTIM_HD Vector absolute(Vector x) {
  for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) x[i] = absolute(x[i]);
  return x;
}
template <class Vector>
FUSED_OPTIM_HD Vector square_root(Vector x) {
  for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) x[i] = square_root(x[i]);
  return x;
}

template <class To, class From>
FUSED_OPTIM_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
FUSED_OPTIM_HD auto bits_of(T x) { return bit_cast<typename Traits<T>::Word>(x); }
template <class T>
FUSED_OPTIM_HD auto float_of(T bits) { return bit_cast<typename Traits<T>::Float>(bits); }
template <class T>
FUSED_OPTIM_HD auto int_of(T bits) { return bit_cast<typename Traits<T>::Int>(bits); }

// Of integers, for each element; a number counts for all elements of a vector.
template <class Condition, class A, class B>
FUSED_OPTIM_HD auto select(Condition condition, A a, B b) {
  using Both = decltype(a + b);
  return condition ? Both{} + a : Both{} + b;
}

// Of integers, likewise. Written with `select`, gcc 12 takes two instructions and a mask for each.
template <class A, class B>
FUSED_OPTIM_HD auto larger(A a, B b) {
  using Both = decltype(a + b);
  const Both x = Both{} + a, y = Both{} + b;
  return x > y ? x : y;
}
template <class A, class B>
FUSED_OPTIM_HD auto smaller(A a, B b) {
  using Both = decltype(a + b);
  const Both x = Both{} + a, y = Both{} + b;
  return x < y ? x : y;
}

}  // namespace fused_optim
