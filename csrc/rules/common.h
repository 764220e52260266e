// What the rules share. Each line is one correctly rounded operation after another, in
// the order of fused_optim/reference.py; the compiler may not contract them
// (-ffp-contract=off, -fmad=false). T is a number or a vector of them, S the number.
#pragma once

#include <type_traits>

#include "../coefficients.h"
#include "../numbers.h"

namespace fused_optim {

// NaN on either side gives NaN, unlike fmax. Of two zeros it is x, which must not be the negative one.
template <class T>
FUSED_OPTIM_HD T maximum(T x, T y) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  // One instruction, where nvcc makes three of the comparisons.
  if constexpr (std::is_same<T, float>::value) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(y));
    return x;
  }
#endif
  const T larger = y > x ? y : x;
  return y != y ? y : larger;
}

template <class T, class S>
FUSED_OPTIM_HD T first_moment(T g, T m, const Coefficients<S>& c) {
  return c.one_minus_beta1 * g + c.beta1 * m;
}

// The first moment over its bias correction. Nesterov's look-ahead is a branch that all elements of a row
// take alike.
template <class T, class S>
FUSED_OPTIM_HD T corrected_first_moment(T g, T m, const Coefficients<S>& c) {
  if (c.nesterov) return c.beta1 * (m / c.bias_correction1_next) + c.one_minus_beta1 * (g / c.bias_correction1);
  return m / c.bias_correction1;
}

// Weight decay and the step. Decay is selected, not "add zero".
template <class T, class S>
FUSED_OPTIM_HD T apply_update(T p, T u, const Coefficients<S>& c) {
  const T decay = c.decay_kind != 0 ? c.decay * p : p;
  u = c.decay_kind == 1 ? u + decay : u;
  const T updated = p + c.neg_lr * u;
  return c.decay_kind == 2 ? updated - decay : updated;
}

}  // namespace fused_optim
