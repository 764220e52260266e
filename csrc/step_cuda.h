// The CUDA step as plain C++ sees it: no CUDA type, so that the bindings need no CUDA header.
#pragma once

#include "names.h"
#include "table.h"

namespace fused_optim {

// Addresses in the device's memory. `coefficients` has kCoefficientsBytes for each counter.
struct CudaTask : Table {
  const Hyperparameters* hyper;
  void* coefficients;
  const float *grad_scale, *found_inf;  // null for none
  const double* clip;                   // what clip_cuda gives, null for none
};

// From `n` sums of squares, in order, to what fused_optim.reference.clip gives. Where `skipped` is not null, a norm
// that is not finite skips the step and is counted there.
struct ClipTask {
  const double* sums;
  int64_t n;
  const double* max_grad_norm;
  double* clip;
  int64_t* skipped;
};

// Fills a GPU from a million parameters on, and sets some 100 KiB of traffic against a block's three dependent reads.
constexpr int64_t kChunk = 4096;

constexpr int64_t kCoefficientsBytes = sizeof(Coefficients<double>);  // as many as any format needs

// All of this is on the device that is current in CUDA, which torch keeps: a guard here would be of the static
// runtime's. What no kernel is built for is a std::invalid_argument, what CUDA refuses a std::runtime_error.

// Loads a step's kernels, which CUDA otherwise does at their first launch.
void load_cuda(const Names& names);
void check_cuda();  // loads some kernel: whether the driver and the GPU take what was built

// Each of these launches kernels and waits for nothing.
void step_cuda(const Names& names, const CudaTask& task, int64_t stream);
void square_sums_cuda(const char* grad, const NormTask& task, int64_t stream);
void clip_cuda(const ClipTask& task, int64_t stream);

std::string cuda_archs();  // compute capabilities that machine code is built for: "80,90"
std::string cuda_compiler();

}  // namespace fused_optim
