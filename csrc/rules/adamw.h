// AdamW: fused_optim.reference.adamw.
#pragma once

#include "common.h"

namespace fused_optim {

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

}  // namespace fused_optim
