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

template <class Task>
cudaError_t load(void (*kernel)(Task)) {
  cudaFuncAttributes attributes;  // asked for, since that loads the kernel
  return cudaFuncGetAttributes(&attributes, kernel);
}

[[noreturn]] void fail(cudaError_t error, const std::string& what) {
  cudaGetLastError();  // forgets it, so that no later launch is blamed
  throw std::runtime_error(what + " failed: " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) +
                           "; built for compute capabilities " + cuda_archs() + ")");
}

Kernel step_of(const Names& names) {
  for (const auto find : {find_step<1>, find_step<2>, find_step<4>, find_step<8>})
    if (const Kernel kernel = find(names)) return kernel;
  throw std::invalid_argument("no CUDA code for " + text_of(names));
}

Kernel prologue_of(const Names& names) {
  return same(names.param, Fp64::name) ? prologue_kernel<double> : prologue_kernel<float>;
}

}  // namespace

void load_cuda(const Names& names) {
  for (const Kernel kernel : {step_of(names), prologue_of(names)})
    if (const cudaError_t error = load(kernel)) fail(error, "loading " + text_of(names));
}

void check_cuda() {
  if (const cudaError_t error = load(clip_kernel<double>)) fail(error, "loading a kernel");
}

void step_cuda(const Names& names, const CudaTask& task, int64_t stream) {
  const Kernel kernel = step_of(names);
  if (task.n_counters == 0) return;
  const int64_t counter_blocks = (task.n_counters + kPrologueThreads - 1) / kPrologueThreads;
  if (const cudaError_t error = launch(prologue_of(names), counter_blocks, kPrologueThreads, task, stream))
    fail(error, "the launch of the prologue of " + text_of(names));
  if (const cudaError_t error = launch(kernel, task.n_chunks + 1, kThreads, task, stream))
    fail(error, "the launch of " + text_of(names));
}

void square_sums_cuda(const char* grad, const NormTask& task, int64_t stream) {
  const auto kernel = with_name<void (*)(NormTask)>(
      GradCodecs{}, grad, [](auto codec) { return square_sums_kernel<decltype(codec)>; });
  if (kernel == nullptr) throw std::invalid_argument(std::string("no CUDA code for gradients in ") + grad);
  if (task.n_chunks == 0) return;
  const int64_t blocks = (task.n_chunks + kNormWarps - 1) / kNormWarps;
  if (const cudaError_t error = launch(kernel, blocks, kThreads, task, stream))
    fail(error, std::string("the launch of the norm of gradients in ") + grad);
}

void clip_cuda(const ClipTask& task, int64_t stream) {
  if (const cudaError_t error = launch(clip_kernel<double>, 1, kLanes, task, stream))
    fail(error, "the launch of clipping");
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
