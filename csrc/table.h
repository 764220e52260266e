// The table of addresses that fused_optim/table.py builds.
#pragma once

#include "coefficients.h"

namespace fused_optim {

struct Row {
  int64_t numel, counter, param, mu, nu;
  int64_t param_aux, mu_aux, nu_aux;  // second parts, 0 where the format has none
  int64_t key;                        // of the parameter's random bits
  int64_t offset;                     // the first element's index in its parameter
};

// A chunk number is complemented where the chunk is short or its row is not aligned.
struct Chunk {
  int32_t row, chunk;
};

struct Counter {
  int64_t step;  // the address of an int64 step number
  int64_t hyper;
};

// This, CudaTask and NormTask fused_optim/backends/native.py gives as integers, in this order.
struct Table {
  const Row* rows;
  const int64_t* grads;  // each row's gradient
  const Chunk* chunks;
  int64_t n_chunks;
  const Counter* counters;
  int64_t n_counters;
};

// What the gradients' norm is made of, in the order that fused_optim.reference.tree_sum says.
constexpr int64_t kNormChunk = 4096, kNormLanes = 256;

struct NormChunk : Chunk {
  int32_t place;  // of its sum of squares
};

struct NormTask {
  const Row* rows;
  const int64_t* grads;
  const NormChunk* chunks;
  int64_t n_chunks;
  const float* grad_scale;  // null for none
  double* sums;
};

}  // namespace fused_optim
