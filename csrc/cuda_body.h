// The bodies of the CUDA kernels, as functions of a block and a thread number: nvcc makes
// kernels of them (step_cuda.cu), a host compiler loops (tests/cuda_on_host.cpp).
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "codecs.h"
#include "rules/all.h"
#include "table.h"

namespace fused_optim {

constexpr int kThreads = 256;
constexpr int kPrologueThreads = 128;

// 4,096 elements fill a GPU from a million parameters on, and still set some 100 KiB of
// traffic against a block's three dependent reads: chunk, row, coefficients.
constexpr int64_t kChunk = 4096;

// One access. fused_optim.table.VECTOR_BYTES.
struct alignas(16) Vector {
  uint32_t x, y, z, w;
};

// Addresses in the device's memory; `grad_scale` and `found_inf` are null for none.
struct CudaTask {
  const Row* rows;
  const Chunk* chunks;
  const Counter* counters;
  int64_t n_counters;
  const Hyperparameters* hyper;
  void* coefficients;
  const float* grad_scale;
  const float* found_inf;
};

// An address that the table holds. From a bare integer the compiler would make generic
// accesses, which test the address space each time.
template <class T>
FUSED_OPTIM_HD T* global(int64_t address) {
#if defined(__CUDA_ARCH__)
  return static_cast<T*>(__cvta_global_to_generic(static_cast<size_t>(address)));
#else
  return reinterpret_cast<T*>(address);
#endif
}

// What the launch does not write goes through the read-only path and tensors do not: so the
// machine code tells the two apart, and tests/test_cuda_compiled.py counts each.
template <class T>
FUSED_OPTIM_HD T read_only(const T* p) {
#if defined(__CUDA_ARCH__)
  return __ldg(p);
#else
  return *p;
#endif
}

FUSED_OPTIM_HD Chunk read_only(const Chunk* p) { return {read_only(&p->row), read_only(&p->chunk)}; }

FUSED_OPTIM_HD Row read_only(const Row* p) {
  return {read_only(&p->numel), read_only(&p->counter), read_only(&p->param),
          read_only(&p->grad),  read_only(&p->mu),      read_only(&p->nu)};
}

template <class T>
FUSED_OPTIM_HD Coefficients<T> read_only(const Coefficients<T>* p) {
  struct Numbers {
    T value[sizeof(Coefficients<T>) / sizeof(T)];
  } numbers;
  const T* const source = reinterpret_cast<const T*>(p);
#pragma unroll
  for (size_t i = 0; i < sizeof(numbers) / sizeof(T); ++i) numbers.value[i] = read_only(source + i);
  return bit_cast<Coefficients<T>>(numbers);
}

// Keeps what was read above from being read below, so that reads wait together and not one
// after another.
FUSED_OPTIM_HD void issue_reads() { asm volatile("" ::: "memory"); }

FUSED_OPTIM_HD bool skips(const CudaTask& task) {
  return task.found_inf != nullptr && read_only(task.found_inf) != 0.0f;
}

// Works out the coefficients of counter `i` and advances it.
template <class T>
FUSED_OPTIM_HD void prologue_body(const CudaTask& task, int64_t i) {
  if (i >= task.n_counters) return;
  const bool skip = skips(task);
  const Counter counter = task.counters[i];
  int64_t* const step = global<int64_t>(counter.step);
  const int64_t count = next_count(*step);
  const T grad_scale = task.grad_scale == nullptr ? T(1) : static_cast<T>(read_only(task.grad_scale));
  static_cast<Coefficients<T>*>(task.coefficients)[i] =
      coefficients<T>(task.hyper[counter.hyper], count, grad_scale);
  if (!skip) *step = count;
}

// `n` neighbours of one operand as they lie in memory.
template <class Codec, int n>
struct Elements {
  using Stored = typename Codec::Stored;
  using Working = typename Codec::Working;
  static constexpr int vectors = n * sizeof(Stored) / sizeof(Vector);
  static_assert(vectors * sizeof(Vector) == n * sizeof(Stored), "elements must fill whole vectors");

  Vector vector[vectors];

  FUSED_OPTIM_HD void read(const Stored* source) {
#pragma unroll
    for (int i = 0; i < vectors; ++i) vector[i] = reinterpret_cast<const Vector*>(source)[i];
  }

  FUSED_OPTIM_HD void write(Stored* target) const {
#pragma unroll
    for (int i = 0; i < vectors; ++i) reinterpret_cast<Vector*>(target)[i] = vector[i];
  }

  FUSED_OPTIM_HD Working get(int i) const {
    Stored stored[n];
    memcpy(stored, vector, sizeof(stored));
    return Codec::load(stored[i]);
  }

  FUSED_OPTIM_HD void set(int i, Working value) {
    Stored stored[n];
    memcpy(stored, vector, sizeof(stored));
    stored[i] = Codec::store(value);
    memcpy(vector, stored, sizeof(stored));
  }
};

// One thread's share of one chunk.
template <class Rule, class Param, class Grad, class State>
FUSED_OPTIM_HD void step_body(const CudaTask& task, int64_t block, int thread) {
  using T = typename Param::Working;
  using P = typename Param::Stored;
  using G = typename Grad::Stored;
  using S = typename State::Stored;
  // Asked for first and looked at last: the read hides behind those of the table.
  const bool skip = skips(task);
  const Chunk chunk = read_only(task.chunks + block);
  const Row row = read_only(task.rows + chunk.row);
  const Coefficients<T> c = read_only(static_cast<const Coefficients<T>*>(task.coefficients) + row.counter);
  const bool scaled = c.grad_divisor != T(1);
  if (skip) return;
  const int64_t begin = (chunk.chunk >= 0 ? chunk.chunk : ~chunk.chunk) * kChunk;
  P* const p = global<P>(row.param) + begin;
  const G* const g = global<const G>(row.grad) + begin;
  S* const mu = global<S>(row.mu) + begin;
  S* const nu = global<S>(row.nu) + begin;

  if (chunk.chunk >= 0) {
    // One vector of the narrowest operand.
    constexpr int n = sizeof(Vector) / (sizeof(P) < sizeof(G) ? sizeof(P) : sizeof(G));
    static_assert(kChunk % (kThreads * n) == 0, "a chunk must be whole rounds of all threads");
#pragma unroll 1
    for (int i = thread * n; i < kChunk; i += kThreads * n) {
      Elements<Param, n> p_elements;
      Elements<Grad, n> g_elements;
      Elements<State, n> mu_elements, nu_elements;
      p_elements.read(p + i);
      g_elements.read(g + i);
      mu_elements.read(mu + i);
      nu_elements.read(nu + i);
      issue_reads();
#pragma unroll
      for (int k = 0; k < n; ++k) {
        T p_value = p_elements.get(k), mu_value = mu_elements.get(k), nu_value = nu_elements.get(k);
        T g_value = g_elements.get(k);
        if (scaled) g_value = g_value / c.grad_divisor;
        Rule::update(p_value, g_value, mu_value, nu_value, c);
        p_elements.set(k, p_value);
        mu_elements.set(k, mu_value);
        nu_elements.set(k, nu_value);
      }
      p_elements.write(p + i);
      mu_elements.write(mu + i);
      nu_elements.write(nu + i);
    }
  } else {
    const int end = static_cast<int>(row.numel - begin < kChunk ? row.numel - begin : kChunk);
#pragma unroll 1
    for (int i = thread; i < end; i += kThreads) {
      const P p_stored = p[i];
      const G g_stored = g[i];
      const S mu_stored = mu[i], nu_stored = nu[i];
      issue_reads();
      T p_value = Param::load(p_stored), mu_value = State::load(mu_stored), nu_value = State::load(nu_stored);
      T g_value = Grad::load(g_stored);
      if (scaled) g_value = g_value / c.grad_divisor;
      Rule::update(p_value, g_value, mu_value, nu_value, c);
      p[i] = Param::store(p_value);
      mu[i] = State::store(mu_value);
      nu[i] = State::store(nu_value);
    }
  }
}

// The format that moments have: the working precision.
template <class T>
using StateOf = std::conditional_t<std::is_same<T, double>::value, Fp64, Fp32>;

template <class Rule, class Param, class Use>
bool with_grad(const std::string& grad, const std::string& state, const Use& use) {
  using State = StateOf<typename Param::Working>;
#define FUSED_OPTIM_CASE(Grad)                                                          \
  if constexpr (std::is_same<typename Grad::Working, typename Param::Working>::value) { \
    if (grad == Grad::name && state == State::name) {                                   \
      use.template run<Rule, Param, Grad, State>();                                     \
      return true;                                                                      \
    }                                                                                   \
  }
  FUSED_OPTIM_CODECS(FUSED_OPTIM_CASE)
#undef FUSED_OPTIM_CASE
  return false;
}

template <class Rule, class Use>
bool with_param(const std::string& param, const std::string& grad, const std::string& state, const Use& use) {
#define FUSED_OPTIM_CASE(Param) \
  if (param == Param::name) return with_grad<Rule, Param>(grad, state, use);
  FUSED_OPTIM_CODECS(FUSED_OPTIM_CASE)
#undef FUSED_OPTIM_CASE
  return false;
}

// Calls `use.run<Rule, Param, Grad, State>()` for the named ones; false where there are none.
template <class Use>
bool with_names(const std::string& rule, const std::string& param, const std::string& grad,
                const std::string& state, const Use& use) {
#define FUSED_OPTIM_CASE(Rule) \
  if (rule == Rule::name) return with_param<Rule>(param, grad, state, use);
  FUSED_OPTIM_RULES(FUSED_OPTIM_CASE)
#undef FUSED_OPTIM_CASE
  return false;
}

}  // namespace fused_optim
