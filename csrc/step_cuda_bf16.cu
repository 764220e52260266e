#include "cuda_find.h"

template fused_optim::Kernel fused_optim::find_step_of_moments<fused_optim::Bf16Dither, fused_optim::Bf16Dither>(
    const std::string&, const std::string&, const std::string&);
