#include "cuda_find.h"

namespace fused_optim {
template Kernel find_step_of_moments<Bf16Dither, Bf16Dither>(const std::string&, const std::string&,
                                                             const std::string&);
}
