// The CUDA step as plain C++ sees it: no CUDA type, so that the bindings need no CUDA header.
#pragma once

#include <cstdint>
#include <string>

namespace fused_optim {

// Addresses are in the device's memory; 0 for no grad_scale or found_inf, one float32 each.
struct CudaStep {
  std::string rule, param, grad, mu, nu;  // names of the rule and of formats
  int64_t rows, chunks, n_chunks, counters, n_counters, hyper, coefficients, grad_scale, found_inf;
  int64_t stream;
  int device;
};

// Launches one step, waits for nothing, and returns the number of kernels launched. Throws
// std::invalid_argument for what no kernel is built for, std::runtime_error for what CUDA
// refuses.
int step_cuda(const CudaStep& step);

// Elements of a chunk in the table that a step is given.
int64_t cuda_chunk_size();

// Bytes that `coefficients` needs for each counter.
int64_t cuda_coefficients_bytes(const std::string& param_format);

// 0 where there is no GPU or no driver.
int cuda_device_count();

int cuda_runtime_version();

// Compute capabilities that machine code is built for: "80,90".
std::string cuda_archs();

std::string cuda_compiler();

}  // namespace fused_optim
