// The CUDA step on the CPU: csrc/step_cuda*.cu and their bindings as they are, over a runtime that runs a launched
// kernel at once, warp after warp. Compiled and driven by test_cuda_compiled.py, which puts an
// empty cuda_runtime.h on the include path. The last block, warp and lane go first, since no
// result may depend on their order, and what waits for the device is missing, since the step
// may not call it.
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = struct Stream*;
enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure, cudaErrorNoKernelImageForDevice };
struct cudaFuncAttributes {};

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __CUDA_ARCH_LIST__ 800, 900
#define __CUDACC_VER_MAJOR__ 0
#define __CUDACC_VER_MINOR__ 0
#define __CUDACC_VER_BUILD__ 0

namespace {
dim3 blockIdx, threadIdx;
bool refuse = false;
struct Launched {
  int64_t blocks, threads, stream;
};
int n_launched = 0;
Launched launched[2];  // the last two
}  // namespace

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "the error's text"; }
const char* cudaGetErrorName(cudaError_t) { return "the error's name"; }
template <class Task>
cudaError_t cudaLaunchKernel(void (*)(Task), dim3, dim3, void**, size_t, cudaStream_t);
template <class Task>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(Task)) {
  return refuse ? cudaErrorNoKernelImageForDevice : cudaSuccess;
}

namespace {

// The lanes of a warp, each with a stack of its own: a lane that asks the others waits for all of them.
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
    questions_ = 0;
    do {
      waiting_ = 0;
      for (lane_ = kSize; lane_-- > 0;) {
        threadIdx.x = first + lane_;
        swapcontext(&scheduler_, &lanes_[lane_]);
      }
      if (waiting_ != 0 && waiting_ != kSize) fail("some lanes of a warp ask the others and some do not");
      ++questions_;
    } while (waiting_ != 0);
    threadIdx.x = first;
  }

  // What all lanes gave, by lane.
  const uint32_t* values_of_all(unsigned lanes, uint32_t x) {
    if (lanes != 0xffffffffu) fail("some lanes only are asked");
    const unsigned now = questions_ % 2;  // the last question's values may still be to be read
    values_[now][lane_] = x;
    ++waiting_;
    const unsigned lane = lane_;
    swapcontext(&lanes_[lane], &scheduler_);
    return values_[now];
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
  unsigned lane_ = 0, waiting_ = 0, questions_ = 0;
  void (*body_)(const void*) = nullptr;
  const void* argument_ = nullptr;
} warp;

void Warp::start() { warp.body_(warp.argument_); }

uint32_t __shfl_xor_sync(unsigned lanes, uint32_t x, int difference) {
  const unsigned from = warp.lane() ^ static_cast<unsigned>(difference);
  return warp.values_of_all(lanes, x)[from];
}

double __shfl_xor_sync(unsigned lanes, double x, int difference) {
  uint32_t words[2];
  std::memcpy(words, &x, sizeof(x));
  for (uint32_t& word : words) word = __shfl_xor_sync(lanes, word, difference);
  std::memcpy(&x, words, sizeof(x));
  return x;
}

template <class T>
T __ldg(const T* p) {
  T x;
  std::memcpy(&x, p, sizeof(x));  // what lies there may be of another type
  return x;
}

void* __cvta_global_to_generic(size_t address) { return reinterpret_cast<void*>(address); }

int n_yes = 0;  // votes of warps

int __any_sync(unsigned lanes, int x) {
  const uint32_t* const all = warp.values_of_all(lanes, x != 0);
  const bool any = std::any_of(all, all + Warp::kSize, [](uint32_t of_lane) { return of_lane != 0; });
  n_yes += any && warp.lane() == 0;
  return any;
}

// Byte k of the result is the one that digit k of `selector` names, of x's four and then y's.
uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int k = 0; k < 4; ++k) result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * k & 7) & 0xff) << 8 * k;
  return result;
}

}  // namespace

#include "step_cuda_kernels.cu"
#include "step_cuda.cu"
#include "bindings_cuda.cpp"

template <class Task>
cudaError_t cudaLaunchKernel(void (*kernel)(Task), dim3 grid, dim3 block, void** arguments, size_t,
                             cudaStream_t stream) {
  if (refuse) return cudaErrorLaunchFailure;
  launched[n_launched++ % 2] = {grid.x, block.x, reinterpret_cast<int64_t>(stream)};
  for (blockIdx.x = grid.x; blockIdx.x-- > 0;)
    for (threadIdx.x = block.x; threadIdx.x > 0;) {
      threadIdx.x -= Warp::kSize;
      warp.run([&] { kernel(*static_cast<Task*>(arguments[0])); });
    }
  return cudaSuccess;
}

extern "C" {

// How many launches there were since the last call.
int launches() {
  const int n = n_launched;
  n_launched = 0;
  return n;
}

// Blocks, threads and stream of a launch of the last step.
const int64_t* launch_of_last_step(int i) { return &launched[i].blocks; }

// How often a warp had a lane that voted yes since the last call.
int yes_votes() {
  const int n = n_yes;
  n_yes = 0;
  return n;
}

// How many magnitudes, of `n` tried under each exponent, FiniteE4M3 stores otherwise than E4M3 does with the least
// random bits that round it up, or with one less.
int64_t e4m3_differences(int64_t n) {
  using fused_optim::E4M3;
  using fused_optim::FiniteE4M3;
  std::mt19937 generator(0);
  const auto word = [&] { return static_cast<uint32_t>(generator()); };
  int64_t differences = 0;
  for (uint32_t exponent = 0; exponent < 240; ++exponent) {
    for (int64_t i = 0; i < n; ++i) {
      // Of the largest magnitudes under the exponent and of those that are rounded to its smallest code.
      const uint32_t orders = std::min(word() % 40, exponent + 14);
      const float x = fused_optim::float_of((exponent + 14 - orders) << 23 | word() >> 9);
      const uint32_t code = E4M3::store(x, 0u, exponent);
      uint32_t random = 1u << 20;
      for (uint32_t step = random / 2; step > 0; step /= 2)
        if (E4M3::store(x, (random - step) << 12, exponent) != code) random -= step;
      for (const uint32_t bits : {random, random - 1})
        if (bits < 1u << 20) differences += FiniteE4M3::store<true>(x, bits << 12, exponent) != E4M3::store(x, bits << 12, exponent);
    }
  }
  return differences;
}

void refuse_launches(bool yes) { refuse = yes; }
}
