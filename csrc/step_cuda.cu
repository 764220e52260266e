// The CUDA step: a prologue works out the coefficients, then one block steps each chunk.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda_kernels.h"

namespace fused_optim {
namespace {

[[noreturn]] void fail(cudaError_t error, const std::string& what, int device) {
  cudaGetLastError();  // forgets it, so that no later launch is blamed
  throw std::runtime_error(what + " on cuda:" + std::to_string(device) + " failed: " +
                           cudaGetErrorString(error) + " (" + cudaGetErrorName(error) +
                           "; built for compute capabilities " + cuda_archs() + ")");
}

// Makes a device current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cudaError_t error = cudaGetDevice(&previous_);
    if (error == cudaSuccess && previous_ != device) {
      error = cudaSetDevice(device);
      changed_ = error == cudaSuccess;
    }
    if (error != cudaSuccess) fail(error, "making the device current", device);
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

void launch(Kernel kernel, int64_t blocks, int threads, const CudaTask& task, int64_t stream, int device,
            const std::string& what, const Names& names) {
  void* arguments[] = {const_cast<CudaTask*>(&task)};
  const cudaError_t error = cudaLaunchKernel(
      reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
      dim3(static_cast<unsigned>(threads)), arguments, 0, reinterpret_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) fail(error, "the launch of " + what + text_of(names), device);
}

}  // namespace

int step_cuda(const Names& names, const CudaTask& task, int64_t stream, int device) {
  Kernel kernel = nullptr;
  for (const auto find : {find_step<0>, find_step<1>, find_step<2>, find_step<3>})
    if (kernel == nullptr) kernel = find(names);
  if (kernel == nullptr) throw std::invalid_argument("no CUDA code for " + text_of(names));
  if (task.n_counters == 0) return 0;
  const DeviceGuard guard(device);
  const int64_t counter_blocks = (task.n_counters + kPrologueThreads - 1) / kPrologueThreads;
  const Kernel prologue = same(names.param, Fp64::name) ? prologue_kernel<double> : prologue_kernel<float>;
  launch(prologue, counter_blocks, kPrologueThreads, task, stream, device, "the prologue of ", names);
  launch(kernel, task.n_chunks + 1, kThreads, task, stream, device, "", names);
  return 2;
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
