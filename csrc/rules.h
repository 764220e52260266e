// The rules: fused_optim/reference.py in C++. A new rule is a struct here and its name in the list at the end. It has
//
//   name                 as in fused_optim/rules.py
//   moments(g, m, v, c)  makes m and v, the second state, the new ones
//   update(g, m, v, c)   the update that these make, before weight decay and learning rate;
//                        g may be used where c.nesterov is set alone
//
// T is a number or a vector of them, S the number. Operations are rounded once each; compilers may not contract them.
#pragma once

#include "numbers.h"

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
FUSED_OPTIM_HD T first_moment(T g, T m, const Coefficients<S>& c) { return c.one_minus_beta1 * g + c.beta1 * m; }

// Nesterov's look-ahead is a branch that all elements of a row take alike.
template <class T, class S>
FUSED_OPTIM_HD T corrected_first_moment(T g, T m, const Coefficients<S>& c) {
  if (c.nesterov) return c.beta1 * (m / c.bias_correction1_next) + c.one_minus_beta1 * (g / c.bias_correction1);
  return m / c.bias_correction1;
}

struct AdaBelief {
  static constexpr const char* name = "adabelief";

  template <class T, class S>
  static FUSED_OPTIM_HD void moments(T g, T& m, T& s, const Coefficients<S>& c) {
    m = first_moment(g, m, c);
    const T e = g - m;
    s = (c.one_minus_beta2 * (e * e) + c.beta2 * s) + c.eps_root;
  }

  template <class T, class S>
  static FUSED_OPTIM_HD T update(T g, T m, T s, const Coefficients<S>& c) {
    return corrected_first_moment(g, m, c) / (square_root(s / c.bias_correction2) + c.eps);
  }
};

struct AdamaxW {
  static constexpr const char* name = "adamaxw";

  template <class T, class S>
  static FUSED_OPTIM_HD void moments(T g, T& m, T& v, const Coefficients<S>& c) {
    m = first_moment(g, m, c);
    v = maximum(absolute(g) + c.eps, c.beta2 * v);
  }

  template <class T, class S>
  static FUSED_OPTIM_HD T update(T, T m, T v, const Coefficients<S>& c) {
    return (m / c.bias_correction1) / v;
  }
};

struct AdamW {
  static constexpr const char* name = "adamw";

  template <class T, class S>
  static FUSED_OPTIM_HD void moments(T g, T& m, T& v, const Coefficients<S>& c) {
    m = first_moment(g, m, c);
    v = c.one_minus_beta2 * (g * g) + c.beta2 * v;
  }

  template <class T, class S>
  static FUSED_OPTIM_HD T update(T g, T m, T v, const Coefficients<S>& c) {
    return corrected_first_moment(g, m, c) / (square_root(v / c.bias_correction2 + c.eps_root) + c.eps);
  }
};

using Rules = Types<AdaBelief, AdamaxW, AdamW>;

// Weight decay and the step. Decay is selected, not "add zero".
template <class T, class S>
FUSED_OPTIM_HD T apply_update(T p, T u, const Coefficients<S>& c) {
  const T decay = c.decay_kind != 0 ? c.decay * p : p;
  u = c.decay_kind == 1 ? u + decay : u;
  const T updated = p + c.neg_lr * u;
  return c.decay_kind == 2 ? updated - decay : updated;
}

// All of a step.
template <class Rule, class T, class S>
FUSED_OPTIM_HD void step(T& p, T g, T& m, T& v, const Coefficients<S>& c) {
  Rule::moments(g, m, v, c);
  p = apply_update(p, Rule::update(g, m, v, c), c);
}

}  // namespace fused_optim
