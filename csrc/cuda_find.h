// Which step kernel serves a rule and formats. They are some 250: each pair of moment formats has
// a short .cu, which instantiates its own, so that they compile side by side.
#pragma once

#include "cuda_kernels.h"

namespace fused_optim {

template <class Rule, class Param, class Mu, class Nu>
Kernel find_step_of_param(const std::string& grad) {
#define FUSED_OPTIM_CASE(Grad)                                                    \
  if constexpr (kSameWorking<Param, Grad>) {                                      \
    if (grad == Grad::name) return step_kernel<Rule, Param, Grad, Mu, Nu>;        \
  }
  FUSED_OPTIM_PLAIN_CODECS(FUSED_OPTIM_CASE)
#undef FUSED_OPTIM_CASE
  return nullptr;
}

template <class Rule, class Mu, class Nu>
Kernel find_step_of_rule(const std::string& param, const std::string& grad) {
#define FUSED_OPTIM_CASE(Param)                                                              \
  if constexpr (kSameWorking<Param, Mu>) {                                                   \
    if (param == Param::name) return find_step_of_param<Rule, Param, Mu, Nu>(grad);          \
  }
  FUSED_OPTIM_PARAM_CODECS(FUSED_OPTIM_CASE)
#undef FUSED_OPTIM_CASE
  return nullptr;
}

template <class Mu, class Nu>
Kernel find_step_of_moments(const std::string& rule, const std::string& param, const std::string& grad) {
#define FUSED_OPTIM_CASE(Rule) \
  if (rule == Rule::name) return find_step_of_rule<Rule, Mu, Nu>(param, grad);
  FUSED_OPTIM_RULES(FUSED_OPTIM_CASE)
#undef FUSED_OPTIM_CASE
  return nullptr;
}

}  // namespace fused_optim
