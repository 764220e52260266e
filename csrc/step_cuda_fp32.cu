#include "cuda_find.h"

namespace fused_optim {
template Kernel find_step_of_moments<Fp32, Fp32>(const std::string&, const std::string&, const std::string&);
}
