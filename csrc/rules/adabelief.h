// AdaBelief: fused_optim.reference.adabelief.
#pragma once

#include "common.h"

namespace fused_optim {

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

}  // namespace fused_optim
