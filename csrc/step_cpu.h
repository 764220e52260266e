// The CPU step. This file is compiled once for each instruction set, in a namespace of
// its own, by a short .cpp that sets FUSED_OPTIM_ISA and the compiler's target.
#pragma once

#include "codecs.h"
#include "cpu_task.h"
#include "rules/all.h"

namespace fused_optim {
namespace FUSED_OPTIM_ISA {

// Blocks of this many elements pass through buffers on the stack where an operand is not
// stored in the working precision or the gradient is scaled: four buffers of 4 KiB (8 in
// float64) stay in the L1 cache. A multiple of every codec's block and of Philox's eight.
constexpr int64_t kBlock = 1024;

template <class Codec, class T>
void load_block(const void* source, const void* extras, int64_t begin, int64_t n, T* __restrict target) {
  const auto* stored = static_cast<const typename Codec::Stored*>(source) + begin;
  if constexpr (std::is_same<typename Codec::Extra, NoExtra>::value) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) target[i] = Codec::load(stored[i], NoExtra{});
  } else {
    const auto* extra = static_cast<const typename Codec::Extra*>(extras) + begin / Codec::block;
    if constexpr (Codec::block == 1) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) target[i] = Codec::load(stored[i], extra[i]);
    } else {
      for (int64_t first = 0; first < n; first += Codec::block) {
        const auto base = extra[first / Codec::block];
        const int64_t end = minimum(first + Codec::block, n);
#pragma omp simd
        for (int64_t i = first; i < end; ++i) target[i] = Codec::load(stored[i], base);
      }
    }
  }
}

// The random bits that a codec asks for.
template <class Codec, Operand operand>
void random_block(const Place& place, int64_t begin, int64_t n, uint32_t* __restrict random) {
  if constexpr (Codec::random == kDither) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) random[i] = dither<operand>(static_cast<uint32_t>(begin + i), place);
  } else if constexpr (Codec::random == kPhilox) {
    const int64_t group = begin / 8;
#pragma omp simd
    for (int64_t i = 0; i < (n + 7) / 8; ++i) {
      const PhiloxWords words = philox(static_cast<uint64_t>(group + i), place);
      for (int k = 0; k < 4; ++k) {
        random[8 * i + 2 * k] = words.word[k] & 0xffffu;
        random[8 * i + 2 * k + 1] = words.word[k] >> 16;
      }
    }
  }
}

template <class Codec, Operand operand, class T>
void store_block(const T* __restrict source, const Place& place, int64_t begin, int64_t n, void* target,
                 void* extras) {
  auto* __restrict stored = static_cast<typename Codec::Stored*>(target) + begin;
  uint32_t random[kBlock];
  random_block<Codec, operand>(place, begin, n, random);
  const auto random_of = [&](int64_t i) { return Codec::random == kNearest ? 0u : random[i]; };
  if constexpr (std::is_same<typename Codec::Extra, NoExtra>::value) {
    NoExtra none;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) stored[i] = Codec::store(source[i], random_of(i), none);
  } else {
    auto* __restrict extra = static_cast<typename Codec::Extra*>(extras) + begin / Codec::block;
    if constexpr (Codec::block == 1) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        typename Codec::Extra rest;
        stored[i] = Codec::store(source[i], random_of(i), rest);
        extra[i] = rest;
      }
    } else {
      for (int64_t first = 0; first < n; first += Codec::block) {
        const int64_t end = minimum(first + Codec::block, n);
        uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
        for (int64_t i = first; i < end; ++i) {
          const uint32_t magnitude = Codec::magnitude(source[i]);
          largest = magnitude > largest ? magnitude : largest;
        }
        auto base = Codec::extra_of(largest);
#pragma omp simd
        for (int64_t i = first; i < end; ++i) stored[i] = Codec::store(source[i], random_of(i), base);
        extra[first / Codec::block] = base;
      }
    }
  }
}

// How one operand of a block gets from memory to the working precision and back.
template <class T>
struct Access {
  using Load = void (*)(const void* stored, const void* extra, int64_t begin, int64_t n, T* target);
  using Store = void (*)(const T* source, const Place&, int64_t begin, int64_t n, void* stored, void* extra);
  Load load = nullptr;  // null where memory holds the working precision
  Store store = nullptr;

  // Where the rule finds the values: in memory itself, else in the buffer.
  T* values(int64_t stored, int64_t extra, int64_t begin, int64_t n, T* buffer) const {
    if (load == nullptr) return reinterpret_cast<T*>(stored) + begin;
    load(reinterpret_cast<const void*>(stored), reinterpret_cast<const void*>(extra), begin, n, buffer);
    return buffer;
  }

  void put_back(const T* values, const Place& place, int64_t begin, int64_t n, int64_t stored,
                int64_t extra) const {
    if (store != nullptr)
      store(values, place, begin, n, reinterpret_cast<void*>(stored), reinterpret_cast<void*>(extra));
  }
};

// False for a format that does not decode to T.
template <Operand operand, class T>
bool find_access(const char* format, Access<T>& found) {
#define FUSED_OPTIM_CASE(Codec)                                                            \
  if constexpr (std::is_same<typename Codec::Working, T>::value) {                         \
    if (same(format, Codec::name)) {                                                       \
      if constexpr (!std::is_same<typename Codec::Stored, T>::value)                       \
        found = {load_block<Codec, T>, store_block<Codec, operand, T>};                    \
      return true;                                                                         \
    }                                                                                      \
  }
  if constexpr (operand == kParam) {
    FUSED_OPTIM_PARAM_CODECS(FUSED_OPTIM_CASE)
  } else {
    FUSED_OPTIM_MOMENT_CODECS(FUSED_OPTIM_CASE)
  }
#undef FUSED_OPTIM_CASE
  return false;
}

template <class T>
struct Accesses {
  Access<T> param, grad, mu, nu;

  bool find(const Task& task) {
    return find_access<kParam>(task.param_format, param) && find_access<kParam>(task.grad_format, grad) &&
           find_access<kMu>(task.mu_format, mu) && find_access<kNu>(task.nu_format, nu);
  }

  bool direct() const {
    return param.load == nullptr && grad.load == nullptr && mu.load == nullptr && nu.load == nullptr;
  }
};

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
  Accesses<T> access;
  access.find(task);
  T param_buffer[kBlock], grad_buffer[kBlock], mu_buffer[kBlock], nu_buffer[kBlock];
  for (int64_t k = first; k < last; ++k) {
    const Chunk chunk = task.chunks[k];
    const Row& row = task.rows[chunk.row];
    const Coefficients<T> c = task.coefficients_of<T>(row.counter);
    const Place place{c.count, static_cast<uint64_t>(row.key)};
    const bool scaled = c.grad_divisor != T(1);
    const int64_t number = chunk.chunk < 0 ? ~chunk.chunk : chunk.chunk;
    const int64_t end = minimum((number + 1) * task.chunk_size, row.numel);
    const int64_t block = access.direct() && !scaled ? task.chunk_size : kBlock;
    for (int64_t begin = number * task.chunk_size; begin < end; begin += block) {
      const int64_t n = minimum(block, end - begin);
      T* const p = access.param.values(row.param, row.param_extra, begin, n, param_buffer);
      T* g = access.grad.values(row.grad, 0, begin, n, grad_buffer);
      T* const mu = access.mu.values(row.mu, row.mu_extra, begin, n, mu_buffer);
      T* const nu = access.nu.values(row.nu, row.nu_extra, begin, n, nu_buffer);
      if (scaled) {
        if (g != grad_buffer) __builtin_memcpy(grad_buffer, g, n * sizeof(T));
        g = grad_buffer;
        divide_block(grad_buffer, n, c.grad_divisor);
      }
      update_block<Rule, T>(p, g, mu, nu, n, c);
      access.mu.put_back(mu, place, begin, n, row.mu, row.mu_extra);
      access.nu.put_back(nu, place, begin, n, row.nu, row.nu_extra);
      access.param.put_back(p, place, begin, n, row.param, row.param_extra);
    }
  }
}

// The function that steps a range of chunks; null for an unknown rule or format.
StepChunks find(const char* rule, const Task& task) {
  const bool single = Accesses<float>().find(task), twice = Accesses<double>().find(task);
#define FUSED_OPTIM_CASE(Rule)                                            \
  if (same(rule, Rule::name) && single) return step_chunks<Rule, float>; \
  if (same(rule, Rule::name) && twice) return step_chunks<Rule, double>;
  FUSED_OPTIM_RULES(FUSED_OPTIM_CASE)
#undef FUSED_OPTIM_CASE
  return nullptr;
}

}  // namespace FUSED_OPTIM_ISA
}  // namespace fused_optim
