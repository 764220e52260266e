#include "cuda_find.h"

namespace fused_optim {
template Kernel find_step_of_moments<Fp64, Fp64>(const std::string&, const std::string&, const std::string&);
}
