// The CUDA step on the CPU: csrc/step_cuda*.cu as they are, over a runtime that runs a launched
// kernel at once, warp after warp. Compiled and driven by test_cuda_compiled.py, which puts an
// empty cuda_runtime.h on the include path. The last block, warp and lane go first, since no
// result may depend on their order, and what waits for the device is missing, since the step
// may not call it.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = struct Stream*;
enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure, cudaErrorInvalidDevice };

#define __global__
#define __launch_bounds__(...)
#define __CUDA_ARCH_LIST__ 800, 900
#define __CUDACC_VER_MAJOR__ 0
#define __CUDACC_VER_MINOR__ 0
#define __CUDACC_VER_BUILD__ 0
#define CUDART_VERSION 0

namespace {
float __fadd_rz(float x, float y) {  // for 0 <= x <= y
  const float nearest = x + y;
  return nearest - y > x ? std::nextafter(nearest, 0.0f) : nearest;
}
}  // namespace
#define FUSED_OPTIM_ADD_TOWARDS_ZERO __fadd_rz

namespace {
constexpr int kDevices = 2;
dim3 blockIdx, threadIdx;
int current_device = 0;
bool refuse = false;
struct Launched {
  int64_t blocks, threads, stream, device;
};
int n_launched = 0;
Launched launched[2];
}  // namespace

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "the error's text"; }
const char* cudaGetErrorName(cudaError_t) { return "the error's name"; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t);

namespace {

// The lanes of a warp, each with a stack of its own: a lane that shuffles waits for all others.
class Warp {
 public:
  static constexpr unsigned kSize = 32;

  Warp() : stacks_(kSize * kStack) {}

  template <class Body>
  void run(const Body& body) {
    body_ = [](const void* b) { (*static_cast<const Body*>(b))(); };
    argument_ = &body;
    const unsigned first = threadIdx.x;
    for (unsigned i = 0; i < kSize; ++i) {
      getcontext(&lanes_[i]);
      lanes_[i].uc_stack.ss_sp = &stacks_[i * kStack];
      lanes_[i].uc_stack.ss_size = kStack;
      lanes_[i].uc_link = &scheduler_;
      makecontext(&lanes_[i], start, 0);
    }
    shuffles_ = 0;
    do {
      waiting_ = 0;
      for (lane_ = kSize; lane_-- > 0;) {
        threadIdx.x = first + lane_;
        swapcontext(&scheduler_, &lanes_[lane_]);
      }
      if (waiting_ != 0 && waiting_ != kSize) fail("some lanes of a warp shuffle and others do not");
      ++shuffles_;
    } while (waiting_ != 0);
    threadIdx.x = first;
  }

  uint32_t shuffle(uint32_t x, unsigned from) {
    const unsigned now = shuffles_ % 2;  // the last shuffle's values may still be to be read
    values_[now][lane_] = x;
    ++waiting_;
    const unsigned lane = lane_;
    swapcontext(&lanes_[lane], &scheduler_);
    return values_[now][from];
  }

  unsigned lane() const { return lane_; }

  [[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "cuda_on_host: %s\n", what);
    std::abort();
  }

 private:
  static constexpr size_t kStack = 64 << 10;

  static void start();

  std::vector<char> stacks_;
  ucontext_t scheduler_, lanes_[kSize];
  uint32_t values_[2][kSize];
  unsigned lane_ = 0, waiting_ = 0, shuffles_ = 0;
  void (*body_)(const void*) = nullptr;
  const void* argument_ = nullptr;
} warp;

void Warp::start() { warp.body_(warp.argument_); }

uint32_t __shfl_xor_sync(unsigned lanes, uint32_t x, int difference) {
  if (lanes != 0xffffffffu) Warp::fail("a shuffle of some lanes only");
  return warp.shuffle(x, warp.lane() ^ static_cast<unsigned>(difference));
}

}  // namespace

#include "step_cuda.cu"
#include "step_cuda_8bit.cu"
#include "step_cuda_bf16.cu"
#include "step_cuda_fp32.cu"
#include "step_cuda_fp64.cu"

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t,
                             cudaStream_t stream) {
  if (refuse) return cudaErrorLaunchFailure;
  if (n_launched == 2) return cudaErrorLaunchFailure;
  launched[n_launched++] = {grid.x, block.x, reinterpret_cast<int64_t>(stream), current_device};
  const auto run = reinterpret_cast<void (*)(fused_optim::CudaTask)>(const_cast<void*>(kernel));
  for (blockIdx.x = grid.x; blockIdx.x-- > 0;)
    for (threadIdx.x = block.x; threadIdx.x > 0;) {
      threadIdx.x -= Warp::kSize;
      warp.run([&] { run(*static_cast<fused_optim::CudaTask*>(arguments[0])); });
    }
  return cudaSuccess;
}

namespace {

// What `use` throws goes to `error`, cut to `size` bytes.
template <class Use>
int64_t guarded(char* error, int64_t size, const Use& use) {
  try {
    return use();
  } catch (const std::exception& caught) {
    error[std::string(caught.what()).copy(error, size - 1)] = '\0';
    return -1;
  }
}

}  // namespace

extern "C" {

// `numbers`: the integers of CudaStep in their order, the device last.
int64_t step_on_host(const char* rule, const char* param, const char* grad, const char* mu, const char* nu,
                     const int64_t* numbers, char* error, int64_t size) {
  n_launched = 0;
  const int64_t* n = numbers;
  const fused_optim::CudaStep step{rule, param, grad, mu,   nu,   n[0], n[1], n[2],
                                   n[3], n[4],  n[5], n[6], n[7], n[8], n[9], static_cast<int>(n[10])};
  return guarded(error, size, [&] { return fused_optim::step_cuda(step); });
}

int64_t chunk_size() { return fused_optim::cuda_chunk_size(); }

int64_t coefficients_bytes(const char* param, char* error, int64_t size) {
  return guarded(error, size, [&] { return fused_optim::cuda_coefficients_bytes(param); });
}

// Blocks, threads, stream and device of a launch of the last step.
const int64_t* launch_of_last_step(int i) { return &launched[i].blocks; }

void refuse_launches(bool yes) { refuse = yes; }
int current() { return current_device; }
}
