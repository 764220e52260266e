// AdaBelief: fused_optim.reference.adabelief and adabelief_nesterov.
#pragma once

#include "common.h"

namespace fused_optim {

template <class T, class S>
FUSED_OPTIM_HD T belief_update(T m_hat, T s, const Coefficients<S>& c) {
  return m_hat / (square_root(s / c.bias_correction2) + c.eps);
}

struct AdaBelief {
  static constexpr const char* name = "adabelief";

  // Nesterov's needs both. Of one alone nvcc makes up to 3.4% more instructions for AdaBelief too, where
  // there are corrections.
  template <class S>
  static FUSED_OPTIM_HD bool leaves_out_first(const Coefficients<S>& c) {
    return c.bias_correction1.is_one && c.bias_correction1_next.is_one;
  }

  template <class T, class S>
  static FUSED_OPTIM_HD void moments(T g, T& m, T& s, const Coefficients<S>& c) {
    m = first_moment(g, m, c);
    const T e = g - m;
    s = (c.one_minus_beta2 * (e * e) + c.beta2 * s) + c.eps_root;
  }

  template <class T, class S>
  static FUSED_OPTIM_HD T update(T, T m, T s, const Coefficients<S>& c) {
    return belief_update(m / c.bias_correction1, s, c);
  }
};

struct AdaBeliefNesterov : AdaBelief {
  static constexpr const char* name = "adabelief_nesterov";

  template <class T, class S>
  static FUSED_OPTIM_HD T update(T g, T m, T s, const Coefficients<S>& c) {
    const T m_hat = c.beta1 * (m / c.bias_correction1_next) + c.one_minus_beta1 * (g / c.bias_correction1);
    return belief_update(m_hat, s, c);
  }
};

}  // namespace fused_optim
