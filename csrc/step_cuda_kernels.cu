// The step kernels, some 35 of each rule. setup.py compiles this file once for each FUSED_OPTIM_PART, side by side; a
// part has the kernels whose first moment is stored in as many bytes.
#include "cuda_kernels.h"

namespace fused_optim {

template <int part>
Kernel find_step(const Names& names) {
  return with_names<Kernel>(names, [](auto rule, auto param, auto grad, auto mu, auto nu) -> Kernel {
    if constexpr (sizeof(typename decltype(mu)::Stored) == part)
      return step_kernel<decltype(rule), decltype(param), decltype(grad), decltype(mu), decltype(nu)>;
    else
      return nullptr;
  });
}

#if defined(FUSED_OPTIM_PART)
template Kernel find_step<FUSED_OPTIM_PART>(const Names&);
#endif

}  // namespace fused_optim
