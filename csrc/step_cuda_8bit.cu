#include "cuda_find.h"

namespace fused_optim {
template Kernel find_step_of_moments<E4M3, E5M3>(const std::string&, const std::string&, const std::string&);
}
