#include "cuda_find.h"

template fused_optim::Kernel fused_optim::find_step_of_moments<fused_optim::E4M3, fused_optim::E5M3>(
    const std::string&, const std::string&, const std::string&);
