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

// Philox gives eight neighbours their bits at once.
inline void random_block(const Place& place, int64_t begin, int64_t n, uint32_t* __restrict random) {
#pragma omp simd
  for (int64_t i = 0; i < (n + 7) / 8; ++i) {
    const PhiloxWords words = philox(static_cast<uint64_t>(begin / 8 + i), place);
    for (int k = 0; k < 4; ++k) {
      random[8 * i + 2 * k] = words.word[k] & 0xffffu;
      random[8 * i + 2 * k + 1] = words.word[k] >> 16;
    }
  }
}

inline void hash_block(int64_t begin, int64_t n, uint32_t* __restrict hashes) {
  const uint32_t first = static_cast<uint32_t>(begin);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) hashes[i] = hash32(first + static_cast<uint32_t>(i));
}

// A block's place, and the hashes of its elements' indices where an operand is dithered.
struct BlockPlace {
  Place place;
  int64_t begin;
  const uint32_t* hashes;
};

template <class Codec, Operand operand, class T>
void store_block(const T* __restrict source, const BlockPlace& at, int64_t n, void* target, void* extras) {
  const int64_t begin = at.begin;
  auto* __restrict stored = static_cast<typename Codec::Stored*>(target) + begin;
  uint32_t words[Codec::random == kPhilox ? kBlock : 1];
  if constexpr (Codec::random == kPhilox) random_block(at.place, begin, n, words);
  const Place place = at.place;
  const uint32_t* const __restrict hashes = at.hashes;
  const auto random_of = [&](int64_t i) {
    if constexpr (Codec::random == kPhilox) return words[i];
    if constexpr (Codec::random == kDither) return dither<operand>(hashes[i], place);
    return 0u;
  };
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
          const uint32_t magnitude = bits_of(source[i]) & kMagnitude;
          largest = magnitude > largest ? magnitude : largest;
        }
        const bool usual = Codec::usual(largest);
        if (!usual) {
          largest = 0;
          for (int64_t i = first; i < end; ++i) {
            const uint32_t magnitude = Codec::magnitude(source[i]);
            largest = magnitude > largest ? magnitude : largest;
          }
        }
        auto base = Codec::extra_of(largest);
        if (usual) {
#pragma omp simd
          for (int64_t i = first; i < end; ++i) stored[i] = Codec::store_usual(source[i], random_of(i), base);
        } else {
#pragma omp simd
          for (int64_t i = first; i < end; ++i) stored[i] = Codec::store(source[i], random_of(i), base);
        }
        extra[first / Codec::block] = base;
      }
    }
  }
}

// How one operand of a block gets from memory to the working precision and back.
template <class T>
struct Access {
  using Load = void (*)(const void* stored, const void* extra, int64_t begin, int64_t n, T* target);
  using Store = void (*)(const T* source, const BlockPlace&, int64_t n, void* stored, void* extra);
  Load load = nullptr;  // null where memory holds the working precision
  Store store = nullptr;
  Random random = kNearest;

  // Where the rule finds the values: in memory itself, else in the buffer.
  T* values(int64_t stored, int64_t extra, int64_t begin, int64_t n, T* buffer) const {
    if (load == nullptr) return reinterpret_cast<T*>(stored) + begin;
    load(reinterpret_cast<const void*>(stored), reinterpret_cast<const void*>(extra), begin, n, buffer);
    return buffer;
  }

  void put_back(const T* values, const BlockPlace& at, int64_t n, int64_t stored, int64_t extra) const {
    if (store != nullptr) store(values, at, n, reinterpret_cast<void*>(stored), reinterpret_cast<void*>(extra));
  }
};

// False for a format that does not decode to T.
template <Operand operand, class T>
bool find_access(const char* format, Access<T>& found) {
#define FUSED_OPTIM_CASE(Codec)                                                            \
  if constexpr (std::is_same<typename Codec::Working, T>::value) {                         \
    if (same(format, Codec::name)) {                                                       \
      if constexpr (!std::is_same<typename Codec::Stored, T>::value)                       \
        found = {load_block<Codec, T>, store_block<Codec, operand, T>, Codec::random};     \
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

  bool dithered() const {
    return param.random == kDither || mu.random == kDither || nu.random == kDither;
  }

  bool direct() const {
    return param.load == nullptr && grad.load == nullptr && mu.load == nullptr && nu.load == nullptr;
  }
};

template <class Rule, class T>
FUSED_OPTIM_HD void update_elements(T* __restrict p, const T* __restrict g, T* __restrict mu, T* __restrict nu,
                                    int64_t n, const Coefficients<T>& c) {
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

template <class Rule, class T>
void update_block(T* __restrict p, const T* __restrict g, T* __restrict mu, T* __restrict nu, int64_t n,
                  Coefficients<T> c) {
  if (c.bias_correction1 == T(1) && c.bias_correction1_next == T(1)) {
    // From step 165 on for beta1 = 0.9. A constant here, the compiler drops its division.
    c.bias_correction1 = c.bias_correction1_next = T(1);
    update_elements<Rule, T>(p, g, mu, nu, n, c);
  } else {
    update_elements<Rule, T>(p, g, mu, nu, n, c);
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
  uint32_t hashes[kBlock];
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
      if (access.dithered()) hash_block(begin, n, hashes);
      const BlockPlace at{place, begin, hashes};
      access.mu.put_back(mu, at, n, row.mu, row.mu_extra);
      access.nu.put_back(nu, at, n, row.nu, row.nu_extra);
      access.param.put_back(p, at, n, row.param, row.param_extra);
    }
  }
}

// One operand alone, for the tests of codecs.
template <Operand operand>
bool encode_operand(const char* format, const float* values, const Place& place, int64_t n, void* stored, void* extra) {
  Access<float> access;
  if (!find_access<operand>(format, access) || access.store == nullptr) return false;
  uint32_t hashes[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = minimum(kBlock, n - begin);
    hash_block(begin, count, hashes);
    access.store(values + begin, {place, begin, hashes}, count, stored, extra);
  }
  return true;
}

bool encode(Operand operand, const char* format, const float* values, const Place& place, int64_t n, void* stored,
            void* extra) {
  return operand == kParam ? encode_operand<kParam>(format, values, place, n, stored, extra)
         : operand == kMu  ? encode_operand<kMu>(format, values, place, n, stored, extra)
                           : encode_operand<kNu>(format, values, place, n, stored, extra);
}

bool decode(Operand operand, const char* format, const void* stored, const void* extra, int64_t n, float* values) {
  Access<float> access;
  const bool found = operand == kParam ? find_access<kParam>(format, access) : find_access<kMu>(format, access);
  if (!found || access.load == nullptr) return false;
  access.load(stored, extra, 0, n, values);
  return true;
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
