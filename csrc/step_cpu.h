// The CPU step. This file is compiled once for each instruction set, in a namespace of
// its own, by a short .cpp that sets FUSED_OPTIM_ISA and the compiler's target.
#pragma once

#include "codecs.h"
#include "cpu_task.h"
#include "rules/all.h"

namespace fused_optim {
namespace FUSED_OPTIM_ISA {

// Blocks of this many elements pass through buffers on the stack where an operand is not
// stored in the working precision or the gradient is scaled: two buffers of 4 KiB (8 in
// float64) stay in the L1 cache.
constexpr int64_t kBlock = 1024;

template <class Codec, class T>
void load_block(const void* source, int64_t begin, int64_t n, T* __restrict target) {
  const auto* stored = static_cast<const typename Codec::Stored*>(source) + begin;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) target[i] = Codec::load(stored[i]);
}

template <class Codec, class T>
void store_block(const T* __restrict source, int64_t begin, int64_t n, void* target) {
  auto* stored = static_cast<typename Codec::Stored*>(target) + begin;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) stored[i] = Codec::store(source[i]);
}

template <class T>
struct Operand {
  using Load = void (*)(const void*, int64_t, int64_t, T*);
  using Store = void (*)(const T*, int64_t, int64_t, void*);
  Load load = nullptr;  // null where memory holds the working precision
  Store store = nullptr;
};

// False for a format that does not decode to T.
template <class T>
bool find_operand(const char* format, Operand<T>& found) {
#define FUSED_OPTIM_CASE(Codec)                                                            \
  if constexpr (std::is_same<typename Codec::Working, T>::value) {                         \
    if (same(format, Codec::name)) {                                                       \
      if constexpr (!std::is_same<typename Codec::Stored, T>::value)                       \
        found = {load_block<Codec, T>, store_block<Codec, T>};                             \
      return true;                                                                         \
    }                                                                                      \
  }
  FUSED_OPTIM_CODECS(FUSED_OPTIM_CASE)
#undef FUSED_OPTIM_CASE
  return false;
}

template <class Rule, class T>
void update_block(T* __restrict p, const T* __restrict g, T* __restrict mu, T* __restrict nu,
                  int64_t n, const Coefficients<T> c) {
  // Said to be independent: once this is inlined the compiler forgets __restrict, checks for
  // overlap at run time and takes a scalar loop for small tensors, five times as slow.
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    T p_value = p[i], mu_value = mu[i], nu_value = nu[i];
    Rule::update(p_value, g[i], mu_value, nu_value, c);
    p[i] = p_value;
    mu[i] = mu_value;
    nu[i] = nu_value;
  }
}

template <class T>
void divide_block(T* __restrict g, int64_t n, T divisor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) g[i] = g[i] / divisor;
}

template <class Rule, class T>
void step_chunks(const Task& task, int64_t first, int64_t last) {
  Operand<T> param, grad;
  find_operand(task.param_format, param);
  find_operand(task.grad_format, grad);
  T param_buffer[kBlock], grad_buffer[kBlock];
  for (int64_t k = first; k < last; ++k) {
    const Chunk chunk = task.chunks[k];
    const Row& row = task.rows[chunk.row];
    const Coefficients<T> c = task.coefficients_of<T>(row.counter);
    const bool scaled = c.grad_divisor != T(1);
    const int64_t number = chunk.chunk < 0 ? ~chunk.chunk : chunk.chunk;
    const int64_t end = minimum((number + 1) * task.chunk_size, row.numel);
    void* const p = reinterpret_cast<void*>(row.param);
    void* const g = reinterpret_cast<void*>(row.grad);
    const bool direct = param.load == nullptr && grad.load == nullptr && !scaled;
    const int64_t block = direct ? task.chunk_size : kBlock;
    for (int64_t begin = number * task.chunk_size; begin < end; begin += block) {
      const int64_t n = minimum(block, end - begin);
      T* p_block = static_cast<T*>(p) + begin;
      T* g_block = static_cast<T*>(g) + begin;
      if (param.load != nullptr) {
        param.load(p, begin, n, param_buffer);
        p_block = param_buffer;
      }
      if (grad.load != nullptr) {
        grad.load(g, begin, n, grad_buffer);
        g_block = grad_buffer;
      }
      if (scaled) {
        if (g_block != grad_buffer) __builtin_memcpy(grad_buffer, g_block, n * sizeof(T));
        g_block = grad_buffer;
        divide_block(grad_buffer, n, c.grad_divisor);
      }
      update_block<Rule, T>(p_block, g_block, reinterpret_cast<T*>(row.mu) + begin,
                            reinterpret_cast<T*>(row.nu) + begin, n, c);
      if (param.store != nullptr) param.store(param_buffer, begin, n, p);
    }
  }
}

// The function that steps a range of chunks; null for an unknown rule or format.
StepChunks find(const char* rule, const char* param_format, const char* grad_format, const char* state_format) {
  Operand<float> f;
  Operand<double> d;
  const bool single = find_operand(param_format, f) && find_operand(grad_format, f) && same(state_format, Fp32::name);
  const bool twice = find_operand(param_format, d) && find_operand(grad_format, d) && same(state_format, Fp64::name);
#define FUSED_OPTIM_CASE(Rule)                                            \
  if (same(rule, Rule::name) && single) return step_chunks<Rule, float>; \
  if (same(rule, Rule::name) && twice) return step_chunks<Rule, double>;
  FUSED_OPTIM_RULES(FUSED_OPTIM_CASE)
#undef FUSED_OPTIM_CASE
  return nullptr;
}

}  // namespace FUSED_OPTIM_ISA
}  // namespace fused_optim
