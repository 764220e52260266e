// AdamaxW: fused_optim.reference.adamaxw.
#pragma once

#include "common.h"

namespace fused_optim {

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

}  // namespace fused_optim
