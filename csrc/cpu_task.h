// What the instruction sets have for the CPU step.
#pragma once

#include "names.h"
#include "table.h"

namespace fused_optim {

FUSED_OPTIM_HD int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

// Steps elements `begin` to `end` of a row. `grad_is_own`: the gradient is in the parameter's plain format, or else
// in the working precision.
using StepElements = void (*)(const Row&, int64_t grad, int64_t begin, int64_t end, bool grad_is_own,
                               const void* coefficients);

// The sum of the squares of elements `begin` to `end` of a gradient, in the order of fused_optim.reference.tree_sum.
using SquareSum = double (*)(int64_t grad, int64_t begin, int64_t end, double grad_scale);

struct Isa {
  StepElements (*find)(const Names& names);  // null where what is named does not go together
  SquareSum (*find_square_sum)(const char* grad);  // null where there is no such format of gradients
};

namespace baseline { extern const Isa isa; }
namespace avx2 { extern const Isa isa; }
namespace avx512 { extern const Isa isa; }

}  // namespace fused_optim
