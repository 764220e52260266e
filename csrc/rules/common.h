// What the rules share. Each line is one correctly rounded operation after another, in
// the order of fused_optim/reference.py; the compiler may not contract them
// (-ffp-contract=off, -fmad=false).
#pragma once

#include <cmath>

#include "../coefficients.h"

namespace fused_optim {

FUSED_OPTIM_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

FUSED_OPTIM_HD double square_root(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

FUSED_OPTIM_HD float absolute(float x) { return fabsf(x); }
FUSED_OPTIM_HD double absolute(double x) { return fabs(x); }

// NaN on either side gives NaN, unlike fmax.
template <class T>
FUSED_OPTIM_HD T maximum(T x, T y) {
  return (x > y || x != x) ? x : y;
}

template <class T>
FUSED_OPTIM_HD T first_moment(T g, T m, const Coefficients<T>& c) {
  return c.one_minus_beta1 * g + c.beta1 * m;
}

// Weight decay and the step. Decay is selected, not "add zero".
template <class T>
FUSED_OPTIM_HD T apply_update(T p, T u, const Coefficients<T>& c) {
  const T decay = c.decay * p;
  u = c.decay_kind == T(1) ? u + decay : u;
  const T updated = p + c.neg_lr * u;
  return c.decay_kind == T(2) ? updated - decay : updated;
}

}  // namespace fused_optim
