// The CUDA step: a prologue works out the coefficients, then one block steps each chunk.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda_kernels.h"

namespace fused_optim {
namespace {

cudaError_t launch(Kernel kernel, int64_t blocks, int threads, CudaTask task, int64_t stream) {
  void* arguments[] = {&task};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                          dim3(static_cast<unsigned>(threads)), arguments, 0,
                          reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

int step_cuda(const Names& names, const CudaTask& task, int64_t stream, int device) {
  Kernel kernel = nullptr;
  for (const auto find : {find_step<1>, find_step<2>, find_step<4>, find_step<8>})
    if (kernel == nullptr) kernel = find(names);
  if (kernel == nullptr) throw std::invalid_argument("no CUDA code for " + text_of(names));
  if (task.n_counters == 0) return 0;
  const Kernel prologue = same(names.param, Fp64::name) ? prologue_kernel<double> : prologue_kernel<float>;
  const int64_t counter_blocks = (task.n_counters + kPrologueThreads - 1) / kPrologueThreads;
  const char* what = "making the device current for ";
  int previous = device;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess && previous != device) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    what = "the launch of the prologue of ";
    error = launch(prologue, counter_blocks, kPrologueThreads, task, stream);
  }
  if (error == cudaSuccess) {
    what = "the launch of ";
    error = launch(kernel, task.n_chunks + 1, kThreads, task, stream);
  }
  if (previous != device) cudaSetDevice(previous);
  if (error == cudaSuccess) return 2;
  cudaGetLastError();  // forgets it, so that no later launch is blamed
  throw std::runtime_error(what + text_of(names) + " on cuda:" + std::to_string(device) + " failed: " +
                           cudaGetErrorString(error) + " (" + cudaGetErrorName(error) +
                           "; built for compute capabilities " + cuda_archs() + ")");
}

std::string cuda_archs() {
  std::string names;
  for (const int arch : {__CUDA_ARCH_LIST__})
    names += (names.empty() ? "" : ",") + std::to_string(arch / 10);
  return names;
}

std::string cuda_compiler() {
  return "nvcc " + std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__) + "." +
         std::to_string(__CUDACC_VER_BUILD__);
}

}  // namespace fused_optim
