// The CUDA step: a prologue works out the coefficients, then one block steps each chunk.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda_kernels.h"

namespace fused_optim {
namespace {

template <class Task>
cudaError_t launch(void (*kernel)(Task), int64_t blocks, int threads, Task task, int64_t stream) {
  void* arguments[] = {&task};
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), arguments,
                          0, reinterpret_cast<cudaStream_t>(stream));
}

// Calls `launches` on a device; `text` says of what, and `launches` says which, where it is given an error.
template <class Launches>
void on_device(int device, const std::string& text, Launches launches) {
  const char* what = "making the device current for ";
  int previous = device;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess && previous != device) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = launches(what);
  if (previous != device) cudaSetDevice(previous);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forgets it, so that no later launch is blamed
  throw std::runtime_error(what + text + " on cuda:" + std::to_string(device) + " failed: " +
                           cudaGetErrorString(error) + " (" + cudaGetErrorName(error) +
                           "; built for compute capabilities " + cuda_archs() + ")");
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
  on_device(device, text_of(names), [&](const char*& what) {
    what = "the launch of the prologue of ";
    const cudaError_t error = launch(prologue, counter_blocks, kPrologueThreads, task, stream);
    if (error != cudaSuccess) return error;
    what = "the launch of ";
    return launch(kernel, task.n_chunks + 1, kThreads, task, stream);
  });
  return 2;
}

int square_sums_cuda(const char* grad, const NormTask& task, int64_t stream, int device) {
  void (*kernel)(NormTask) = nullptr;
  with_name(GradCodecs{}, grad, [&](auto codec) {
    kernel = square_sums_kernel<decltype(codec)>;
    return true;
  });
  if (kernel == nullptr) throw std::invalid_argument(std::string("no CUDA code for gradients in ") + grad);
  if (task.n_chunks == 0) return 0;
  on_device(device, std::string("gradients in ") + grad, [&](const char*& what) {
    what = "the launch of the norm of ";
    return launch(kernel, (task.n_chunks + kNormWarps - 1) / kNormWarps, kThreads, task, stream);
  });
  return 1;
}

int clip_cuda(const ClipTask& task, int64_t stream, int device) {
  on_device(device, "clipping", [&](const char*& what) {
    what = "the launch of ";
    return launch(clip_kernel<double>, 1, kLanes, task, stream);
  });
  return 1;
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
