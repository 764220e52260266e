// The step kernels, some 35 of each rule. setup.py compiles this file once for each FUSED_OPTIM_PART of 4, side
// by side; a part has the kernels of every fourth pair of moment formats.
#include "cuda_kernels.h"

namespace fused_optim {
namespace {

template <class Rule, class Param, class Mu, class Nu>
Kernel find_step_of_param(const CudaStep& step) {
#define FUSED_OPTIM_CASE(Grad)                                                            \
  if constexpr (kNativeGrad<Param, Grad>)                                                 \
    if (step.grad == Grad::name) return step_kernel<Rule, Param, Grad, Mu, Nu>;
  FUSED_OPTIM_GRAD_CODECS(FUSED_OPTIM_CASE)
#undef FUSED_OPTIM_CASE
  return nullptr;
}

template <class Rule, class Mu, class Nu>
Kernel find_step_of_rule(const CudaStep& step) {
#define FUSED_OPTIM_CASE(Param)                                                                  \
  if constexpr (std::is_same<typename Param::Working, typename Mu::Working>::value)              \
    if (step.param == Param::name) return find_step_of_param<Rule, Param, Mu, Nu>(step);
  FUSED_OPTIM_PARAM_CODECS(FUSED_OPTIM_CASE)
#undef FUSED_OPTIM_CASE
  return nullptr;
}

template <class Mu, class Nu>
Kernel find_step_of_moments(const CudaStep& step) {
#define FUSED_OPTIM_CASE(Rule) \
  if (step.rule == Rule::name) return find_step_of_rule<Rule, Mu, Nu>(step);
  FUSED_OPTIM_RULES(FUSED_OPTIM_CASE)
#undef FUSED_OPTIM_CASE
  return nullptr;
}

constexpr int kFirstCase = __COUNTER__ + 1;

}  // namespace

template <int part>
Kernel find_step(const CudaStep& step) {
#define FUSED_OPTIM_CASE(Mu, Nu)                                                                 \
  if constexpr ((__COUNTER__ - kFirstCase) % 4 == part)                                          \
    if (step.mu == Mu::name && step.nu == Nu::name) return find_step_of_moments<Mu, Nu>(step);
  FUSED_OPTIM_MOMENTS(FUSED_OPTIM_CASE)
#undef FUSED_OPTIM_CASE
  return nullptr;
}

#if defined(FUSED_OPTIM_PART)
template Kernel find_step<FUSED_OPTIM_PART>(const CudaStep&);
#endif

}  // namespace fused_optim
