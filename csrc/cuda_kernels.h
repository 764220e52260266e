// The kernels.
#pragma once

#include <cuda_runtime.h>

#include "cuda_body.h"

namespace fused_optim {

template <class T>
__global__ void __launch_bounds__(kPrologueThreads) prologue_kernel(const CudaTask task) {
  prologue_body<T>(task, static_cast<int64_t>(blockIdx.x) * kPrologueThreads + threadIdx.x);
}

// Blocks that a multiprocessor must have registers for: 64 a thread, or 80 where the
// arithmetic takes pairs. Then some 64 KiB of loads are in flight, or 48 with 8-bit moments,
// several times what an H100 needs to hide the latency of its memory.
template <class T>
constexpr int kResidentBlocks = sizeof(T) == 8 ? 3 : 4;

template <class Rule, class Param, class Grad, class Mu, class Nu>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<typename Param::Working>)
    step_kernel(const CudaTask task) {
  step_body<Rule, Param, Grad, Mu, Nu>(task, blockIdx.x, static_cast<int>(threadIdx.x));
}

using Kernel = void (*)(CudaTask);

// The step kernel among those of one part, null where there is none. Defined in step_cuda_kernels.cu.
template <int part>
Kernel find_step(const Names& names);

}  // namespace fused_optim
