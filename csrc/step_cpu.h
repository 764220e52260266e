// The CPU step. This file is compiled once for each instruction set, in a namespace of
// its own, by a short .cpp that sets FUSED_OPTIM_ISA and the compiler's target.
#pragma once

#include "codecs.h"
#include "cpu_task.h"
#include "rules/all.h"

namespace fused_optim {
namespace FUSED_OPTIM_ISA {

// Blocks of this many elements pass through buffers on the stack where an operand is not
// stored in the working precision or the gradient is scaled; the buffers stay in the L1 cache.
// A multiple of every codec's block and of Philox's eight. While one block is worked on, the
// one so many blocks ahead is fetched: 2^26 elements all in bfloat16 took 27 ms without that and
// with blocks of 1024, 22 ms with it, 17 ms with blocks of 256, and 19 ms with blocks of 128.
constexpr int64_t kBlock = 256, kBlocksAhead = 3;

inline void prefetch_bytes(const void* first, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(first) + i, 1);
}

// For 0..n-1. Where n is `whole` the compiler knows it, and has no tail to take care of.
template <int64_t whole, class Body>
FUSED_OPTIM_HD void for_elements(int64_t n, const Body& body) {
  if (n == whole) {
#pragma omp simd
    for (int64_t i = 0; i < whole; ++i) body(i);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) body(i);
  }
}

// Not "omp simd": its reductions pass through memory, and take longer than the rest.
template <auto magnitude_of, class Value>
FUSED_OPTIM_HD auto largest_of(const Value* values, int64_t n) {
  auto largest = magnitude_of(Value{});
  for (int64_t i = 0; i < n; ++i) {
    const auto magnitude = magnitude_of(values[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

template <auto magnitude_of, int64_t whole, class Value>
FUSED_OPTIM_HD auto largest_of(const Value* values, int64_t n) {
  return n == whole ? largest_of<magnitude_of>(values, whole) : largest_of<magnitude_of>(values, n);
}

template <class Codec, class T>
void load_block(const void* source, const void* extras, int64_t begin, int64_t n, T* __restrict target) {
  using Extra = typename Codec::Extra;
  const auto* stored = static_cast<const typename Codec::Stored*>(source) + begin;
  const auto* extra = static_cast<const Extra*>(extras) + begin / Codec::block;
  prefetch_bytes(stored + kBlocksAhead * kBlock, n * sizeof(*stored));
  if constexpr (std::is_same<Extra, NoExtra>::value) {
    for_elements<kBlock>(n, [=](int64_t i) { target[i] = Codec::load(stored[i], NoExtra{}); });
  } else if constexpr (Codec::block == 1) {
    prefetch_bytes(extra + kBlocksAhead * kBlock, n * sizeof(*extra));
    for_elements<kBlock>(n, [=](int64_t i) { target[i] = Codec::load(stored[i], extra[i]); });
  } else {
    const bool usual = Codec::usual_stored(largest_of<Codec::magnitude_of_stored, kBlock>(stored, n));
    for (int64_t first = 0; first < n; first += Codec::block) {
      const int64_t count = minimum(Codec::block, n - first);
      const auto* const from = stored + first;
      T* const __restrict to = target + first;
      const Extra base = extra[first / Codec::block];
      if (usual)
        for_elements<Codec::block>(count, [=](int64_t i) { to[i] = Codec::load_usual(from[i], base); });
      else
        for_elements<Codec::block>(count, [=](int64_t i) { to[i] = Codec::load(from[i], base); });
    }
  }
}

// Philox gives eight neighbours their bits at once.
inline void random_block(const Place& place, int64_t begin, int64_t n, uint16_t* __restrict random) {
  uint32_t words[4][kBlock / 8];
  const int64_t groups = (n + 7) / 8;
  for_elements<kBlock / 8>(groups, [&](int64_t i) {
    const PhiloxWords four = philox(static_cast<uint64_t>(begin / 8 + i), place);
    words[0][i] = four.word[0];
    words[1][i] = four.word[1];
    words[2][i] = four.word[2];
    words[3][i] = four.word[3];
  });
  for (int64_t i = 0; i < groups; ++i) {
    for (int k = 0; k < 4; ++k) {
      random[8 * i + 2 * k] = static_cast<uint16_t>(words[k][i]);
      random[8 * i + 2 * k + 1] = static_cast<uint16_t>(words[k][i] >> 16);
    }
  }
}

// The place of a block that begins at this element.
struct BlockPlace {
  Place place;
  int64_t begin;
};

template <class Codec, Operand operand, class T>
void store_block(const T* __restrict source, const BlockPlace& at, int64_t n, void* target, void* extras) {
  using Extra = typename Codec::Extra;
  const int64_t begin = at.begin;
  auto* __restrict stored = static_cast<typename Codec::Stored*>(target) + begin;
  auto* __restrict extra = static_cast<Extra*>(extras) + begin / Codec::block;
  uint16_t words[Codec::random == kPhilox ? kBlock : 1];
  if constexpr (Codec::random == kPhilox) random_block(at.place, begin, n, words);
  const Place place = at.place;
  const uint32_t first_index = static_cast<uint32_t>(begin);
  const auto random_of = [&](int64_t i) {
    if constexpr (Codec::random == kPhilox) return static_cast<uint32_t>(words[i]);
    if constexpr (Codec::random == kDither) return dither<operand>(first_index + static_cast<uint32_t>(i), place);
    return 0u;
  };
  // So many elements have one base, or are looked at together for whether they are usual.
  constexpr bool has_base = Codec::block > 1;
  constexpr int64_t run = has_base ? Codec::block : kBlock;
  for (int64_t first = 0; first < n; first += run) {
    const int64_t count = minimum(run, n - first);
    const T* const __restrict from = source + first;
    const auto store_run = [&](auto&& encode, Extra base) {
      for_elements<run>(count, [&](int64_t i) {
        Extra rest = base;
        stored[first + i] = encode(from[i], random_of(first + i), rest);
        if constexpr (!has_base && !std::is_same<Extra, NoExtra>::value) extra[first + i] = rest;
      });
    };
    if constexpr (!Codec::has_usual) {
      store_run(Codec::store, Extra{});
    } else {
      uint32_t largest = largest_of<magnitude_bits, run>(from, count);
      const bool usual = Codec::usual(largest);
      Extra base{};
      if constexpr (has_base) {
        if (!usual) largest = largest_of<Codec::magnitude, run>(from, count);
        extra[first / run] = base = Codec::extra_of(largest);
      }
      if (usual)
        store_run(Codec::store_usual, base);
      else
        store_run(Codec::store, base);
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

// Constants, where the compiler then drops a division or a select. Left to it, it makes these
// cases itself, and did not vectorise all of them: AdamaxW's first 164 steps took six times as long.
template <class Rule, class T>
FUSED_OPTIM_HD void update_by_decay(T* __restrict p, const T* __restrict g, T* __restrict mu, T* __restrict nu,
                                    int64_t n, Coefficients<T> c) {
  if (c.decay_kind == T(0)) {
    c.decay_kind = T(0);
    update_elements<Rule, T>(p, g, mu, nu, n, c);
  } else if (c.decay_kind == T(1)) {
    c.decay_kind = T(1);
    update_elements<Rule, T>(p, g, mu, nu, n, c);
  } else {
    c.decay_kind = T(2);
    update_elements<Rule, T>(p, g, mu, nu, n, c);
  }
}

template <class Rule, class T>
void update_block(T* __restrict p, const T* __restrict g, T* __restrict mu, T* __restrict nu, int64_t n,
                  Coefficients<T> c) {
  // From step 165 on for beta1 = 0.9.
  if (c.bias_correction1 == T(1) && c.bias_correction1_next == T(1)) {
    c.bias_correction1 = c.bias_correction1_next = T(1);
    update_by_decay<Rule, T>(p, g, mu, nu, n, c);
  } else {
    update_by_decay<Rule, T>(p, g, mu, nu, n, c);
  }
}

template <class T>
void divide_block(T* __restrict g, int64_t n, T divisor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) g[i] = g[i] / divisor;
}

// Small tensors lie in memory of their own each, where no prefetcher of the processor's finds them.
inline void prefetch_row(const Row& row) {
  for (const int64_t operand : {row.grad, row.param, row.mu, row.nu})
    prefetch_bytes(reinterpret_cast<const void*>(operand), 256);
}

template <class Rule, class T>
void step_chunks(const Task& task, int64_t first, int64_t last) {
  Accesses<T> access;
  access.find(task);
  T param_buffer[kBlock], grad_buffer[kBlock], mu_buffer[kBlock], nu_buffer[kBlock];
  for (int64_t k = first; k < last; ++k) {
    if (k + 2 < last && task.chunks[k + 2].row != task.chunks[k + 1].row)
      prefetch_row(task.rows[task.chunks[k + 2].row]);
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
      const BlockPlace at{place, begin};
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
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = minimum(kBlock, n - begin);
    access.store(values + begin, {place, begin}, count, stored, extra);
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
