// The step kernels. They are some 250: each pair of moment formats has a short .cu, which
// instantiates its own, so that they compile side by side.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "cuda_body.h"

namespace fused_optim {

// Blocks that a multiprocessor must have registers for: 64 a thread, or 80 where the
// arithmetic takes pairs. Either way some 64 KiB of loads are in flight, several times what
// an H100 needs to hide the latency of its memory.
template <class T>
constexpr int kResidentBlocks = sizeof(T) == 8 ? 3 : 4;

template <class Rule, class Param, class Grad, class Mu, class Nu>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<typename Param::Working>)
    step_kernel(const CudaTask task) {
  step_body<Rule, Param, Grad, Mu, Nu>(task, blockIdx.x, static_cast<int>(threadIdx.x));
}

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
