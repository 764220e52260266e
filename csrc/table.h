// The table of addresses that fused_optim/table.py builds.
#pragma once

#include "coefficients.h"

namespace fused_optim {

struct Row {
  int64_t numel, counter, param, grad, mu, nu;
};

// A chunk number is complemented where the chunk is short or its row is not aligned.
struct Chunk {
  int32_t row, chunk;
};

struct Counter {
  int64_t step;  // the address of an int64 step number
  int64_t hyper;
};

}  // namespace fused_optim
