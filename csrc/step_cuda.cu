// The CUDA step: a prologue works out the coefficients, then one block steps each chunk.
#include <cuda_runtime.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "cuda_body.h"
#include "step_cuda.h"

namespace fused_optim {
namespace {

// Blocks that a multiprocessor must have registers for: 64 a thread, or 80 where the
// arithmetic takes pairs. Either way some 64 KiB of loads are in flight, several times what
// an H100 needs to hide the latency of its memory.
template <class T>
constexpr int kResidentBlocks = sizeof(T) == 8 ? 3 : 4;

template <class T>
__global__ void __launch_bounds__(kPrologueThreads) prologue_kernel(const CudaTask task) {
  prologue_body<T>(task, static_cast<int64_t>(blockIdx.x) * kPrologueThreads + threadIdx.x);
}

template <class Rule, class Param, class Grad, class State>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<typename Param::Working>)
    step_kernel(const CudaTask task) {
  step_body<Rule, Param, Grad, State>(task, blockIdx.x, static_cast<int>(threadIdx.x));
}

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

struct Launch {
  const CudaStep& step;
  int& launched;

  template <class Rule, class Param, class Grad, class State>
  void run() const {
    const DeviceGuard guard(step.device);
    const int64_t counter_blocks = (step.n_counters + kPrologueThreads - 1) / kPrologueThreads;
    launch(prologue_kernel<typename Param::Working>, counter_blocks, kPrologueThreads,
           {"prologue_kernel", State::name});
    launch(step_kernel<Rule, Param, Grad, State>, step.n_chunks, kThreads,
           {"step_kernel", Rule::name, Param::name, Grad::name, State::name});
  }

  void launch(void (*kernel)(CudaTask), int64_t blocks, int threads,
              std::initializer_list<const char*> name) const {
    if (blocks == 0) return;
    if (blocks > kMaxBlocks) throw std::invalid_argument("one launch takes 2^31 - 1 blocks at most");
    CudaTask task{reinterpret_cast<const Row*>(step.rows),
                  reinterpret_cast<const Chunk*>(step.chunks),
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
    if (error != cudaSuccess) {
      std::string what = "the launch of";
      for (const char* part : name) what += std::string(" ") + part;
      fail(error, what, step.device);
    }
    ++launched;
  }
};

struct Nothing {
  template <class Rule, class Param, class Grad, class State>
  void run() const {}
};

}  // namespace

int step_cuda(const CudaStep& step) {
  int launched = 0;
  if (!with_names(step.rule, step.param_format, step.grad_format, step.state_format, Launch{step, launched}))
    throw std::invalid_argument("no CUDA code for rule '" + step.rule + "', parameter format '" +
                                step.param_format + "', gradient format '" + step.grad_format +
                                "', state format '" + step.state_format + "'");
  return launched;
}

int64_t cuda_chunk_size(const std::string& param_format, const std::string& grad_format) {
  if (!with_param<AdaBelief>(param_format, grad_format, Fp32::name, Nothing{}) &&
      !with_param<AdaBelief>(param_format, grad_format, Fp64::name, Nothing{}))
    throw std::invalid_argument("no CUDA code for parameter format '" + param_format +
                                "' with gradient format '" + grad_format + "'");
  return kChunk;
}

int64_t cuda_coefficients_bytes(const std::string& state_format) {
  if (state_format == Fp32::name) return sizeof(Coefficients<float>);
  if (state_format == Fp64::name) return sizeof(Coefficients<double>);
  throw std::invalid_argument("no CUDA code for state format '" + state_format + "'");
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
