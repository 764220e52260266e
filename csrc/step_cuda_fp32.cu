#include "cuda_find.h"

template fused_optim::Kernel fused_optim::find_step_of_moments<fused_optim::Fp32, fused_optim::Fp32>(
    const std::string&, const std::string&, const std::string&);
