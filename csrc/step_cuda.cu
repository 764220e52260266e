// The CUDA step: a prologue works out the coefficients, then one block steps each chunk.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda_kernels.h"
#include "step_cuda.h"

namespace fused_optim {
namespace {

constexpr int64_t kMaxBlocks = 2147483647;

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

void launch(const CudaStep& step, Kernel kernel, int64_t blocks, int threads, const std::string& name) {
  if (blocks > kMaxBlocks) throw std::invalid_argument("one launch takes 2^31 - 1 blocks at most");
  CudaTask task{reinterpret_cast<const Row*>(step.rows),
                reinterpret_cast<const Chunk*>(step.chunks),
                step.n_chunks,
                reinterpret_cast<const Counter*>(step.counters),
                step.n_counters,
                reinterpret_cast<const Hyperparameters*>(step.hyper),
                reinterpret_cast<void*>(step.coefficients),
                reinterpret_cast<const float*>(step.grad_scale),
                reinterpret_cast<const float*>(step.found_inf)};
  void* arguments[] = {&task};
  const cudaError_t error = cudaLaunchKernel(
      reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
      dim3(static_cast<unsigned>(threads)), arguments, 0, reinterpret_cast<cudaStream_t>(step.stream));
  if (error != cudaSuccess) fail(error, "the launch of " + name, step.device);
}

}  // namespace

int step_cuda(const CudaStep& step) {
  const std::string name = step.rule + " for parameters in " + step.param + ", gradients in " +
                           step.grad + ", moments in " + step.mu + " and " + step.nu;
  Kernel kernel = nullptr;
  for (const auto find : {find_step<0>, find_step<1>, find_step<2>, find_step<3>})
    if (kernel == nullptr) kernel = find(step);
  if (kernel == nullptr) throw std::invalid_argument("no CUDA code for " + name);
  if (step.n_counters == 0) return 0;
  const DeviceGuard guard(step.device);
  const int64_t counter_blocks = (step.n_counters + kPrologueThreads - 1) / kPrologueThreads;
  const Kernel prologue = step.param == Fp64::name ? prologue_kernel<double> : prologue_kernel<float>;
  launch(step, prologue, counter_blocks, kPrologueThreads, "the prologue of " + name);
  launch(step, kernel, step.n_chunks + 1, kThreads, name);
  return 2;
}

int64_t cuda_chunk_size() { return kChunk; }

int64_t cuda_coefficients_bytes(const std::string& param_format) {
#define FUSED_OPTIM_CASE(Param) \
  if (param_format == Param::name) return sizeof(Coefficients<typename Param::Working>);
  FUSED_OPTIM_PARAM_CODECS(FUSED_OPTIM_CASE)
#undef FUSED_OPTIM_CASE
  throw std::invalid_argument("no CUDA code for parameter format '" + param_format + "'");
}

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

int cuda_runtime_version() { return CUDART_VERSION; }

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
