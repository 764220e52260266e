// The bodies of the CUDA kernels, as functions of a block and a thread number: nvcc makes
// kernels of them (step_cuda.cu), a host compiler loops (tests/cuda_on_host.cpp).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "codecs.h"
#include "rules/all.h"
#include "table.h"

#if defined(__CUDACC__)
#define FUSED_OPTIM_DEVICE __device__ __forceinline__
#else
#define FUSED_OPTIM_DEVICE inline
#endif

namespace fused_optim {

constexpr int kThreads = 256;
constexpr int kLanes = 32;  // of a warp
constexpr int kPrologueThreads = 128;

// 4,096 elements fill a GPU from a million parameters on, and still set some 100 KiB of
// traffic against a block's three dependent reads: chunk, row, coefficients.
constexpr int64_t kChunk = 4096;

// One access; the longer is fused_optim.table.VECTOR_BYTES.
struct alignas(16) Vector {
  uint32_t x, y, z, w;
};
struct alignas(8) HalfVector {
  uint32_t x, y;
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
FUSED_OPTIM_DEVICE T* global(int64_t address) {
#if defined(__CUDA_ARCH__)
  return static_cast<T*>(__cvta_global_to_generic(static_cast<size_t>(address)));
#else
  return reinterpret_cast<T*>(address);
#endif
}

// What the launch does not write goes through the read-only path and tensors do not: so the
// machine code tells the two apart, and tests/test_cuda_compiled.py counts each.
template <class T>
FUSED_OPTIM_DEVICE T read_only(const T* p) {
#if defined(__CUDA_ARCH__)
  return __ldg(p);
#else
  return *p;
#endif
}

FUSED_OPTIM_DEVICE Chunk read_only(const Chunk* p) { return {read_only(&p->row), read_only(&p->chunk)}; }

FUSED_OPTIM_DEVICE Row read_only(const Row* p) {
  return {read_only(&p->numel),       read_only(&p->counter),  read_only(&p->grad),     read_only(&p->param),
          read_only(&p->mu),          read_only(&p->nu),       read_only(&p->param_extra),
          read_only(&p->mu_extra),    read_only(&p->nu_extra), read_only(&p->key)};
}

template <class T>
FUSED_OPTIM_DEVICE Coefficients<T> read_only(const Coefficients<T>* p) {
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
FUSED_OPTIM_DEVICE void issue_reads() { asm volatile("" ::: "memory"); }

FUSED_OPTIM_DEVICE bool skips(const CudaTask& task) {
  return task.found_inf != nullptr && read_only(task.found_inf) != 0.0f;
}

// Works out the coefficients of counter `i` and advances it.
template <class T>
FUSED_OPTIM_DEVICE void prologue_body(const CudaTask& task, int64_t i) {
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

// `n` neighbours as they lie in memory.
template <class T, int n>
struct Pack {
  static constexpr size_t bytes = n * sizeof(T);
  using Access = std::conditional_t<
      n == 1, T, std::conditional_t<bytes % sizeof(Vector) == 0, Vector, HalfVector>>;
  static constexpr int accesses = bytes / sizeof(Access);
  static_assert(accesses * sizeof(Access) == bytes, "neighbours must fill whole accesses");

  T item[n];

  FUSED_OPTIM_DEVICE void read(const T* source) {
    Access all[accesses];
#pragma unroll
    for (int i = 0; i < accesses; ++i) all[i] = reinterpret_cast<const Access*>(source)[i];
    memcpy(item, all, bytes);
  }

  FUSED_OPTIM_DEVICE void write(T* target) const {
    Access all[accesses];
    memcpy(all, item, bytes);
#pragma unroll
    for (int i = 0; i < accesses; ++i) reinterpret_cast<Access*>(target)[i] = all[i];
  }
};

// What a codec asks for to round the `n` neighbours from element `index` of a parameter on.
template <class Codec, Operand operand, int n>
struct RandomBits {
  static_assert(n == 1 || n == 8 || Codec::random != kPhilox, "Philox serves eight neighbours at once");

  uint32_t index;
  Place place;
  PhiloxWords words;

  FUSED_OPTIM_DEVICE void begin(int64_t first, const Place& where) {
    index = static_cast<uint32_t>(first);
    place = where;
    if constexpr (Codec::random == kPhilox) words = philox(static_cast<uint64_t>(first) / 8, place);
  }

  FUSED_OPTIM_DEVICE uint32_t get(int k) const {
    if constexpr (Codec::random == kDither) return dither<operand>(index + static_cast<uint32_t>(k), place);
    if constexpr (Codec::random == kPhilox) {
      const uint32_t i = n == 8 ? k : index % 8;
      // Not word[i / 2]: registers have no address.
      const uint32_t low = i & 2 ? words.word[1] : words.word[0];
      const uint32_t high = i & 2 ? words.word[3] : words.word[2];
      return ((i & 4 ? high : low) >> 16 * (i & 1)) & 0xffffu;
    }
    return 0;
  }
};

// The largest of the values that `lanes` neighbouring lanes have; all lanes of the warp must ask.
template <int lanes>
FUSED_OPTIM_DEVICE uint32_t largest_of_lanes(uint32_t x) {
#pragma unroll
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    x = maximum(__shfl_xor_sync(0xffffffffu, x, offset), x);
  }
  return x;
}

// One operand of a chunk.
template <class Codec>
struct Array {
  typename Codec::Stored* stored;
  typename Codec::Extra* extra;

  FUSED_OPTIM_DEVICE Array(int64_t stored_address, int64_t extra_address, int64_t begin)
      : stored(global<typename Codec::Stored>(stored_address) + begin),
        extra(global<typename Codec::Extra>(extra_address) + begin / Codec::block) {}
};

// `n` neighbours of one operand.
template <class Codec, Operand operand, int n>
struct Elements {
  using Stored = typename Codec::Stored;
  using Extra = typename Codec::Extra;

  Pack<Stored, n> stored;
  Pack<Extra, kExtraEach<Codec> ? n : 1> extra;
  RandomBits<Codec, operand, n> random;
  typename Codec::Working value[n];

  // What a whole block has in common is read on its own, since it may be needed for longer.
  FUSED_OPTIM_DEVICE void read_base(const Array<Codec>& from, int i) {
    if constexpr (kBlocked<Codec>) extra.read(from.extra + i / Codec::block);
  }

  FUSED_OPTIM_DEVICE void read(const Array<Codec>& from, int i) {
    stored.read(from.stored + i);
    if constexpr (kExtraEach<Codec>) extra.read(from.extra + i);
  }

  FUSED_OPTIM_DEVICE void decode(int k) {
    value[k] = Codec::load(stored.item[k], extra.item[kExtraEach<Codec> ? k : 0]);
  }

  // Of what the block's extra depends on.
  FUSED_OPTIM_DEVICE uint32_t largest() const {
    uint32_t result = 0;
    if constexpr (kBlocked<Codec>) {
#pragma unroll
      for (int k = 0; k < n; ++k) result = maximum(Codec::magnitude(value[k]), result);
    }
    return result;
  }

  // Where it takes no more than the element itself.
  FUSED_OPTIM_DEVICE void encode(int k) {
    if constexpr (!kBlocked<Codec>) {
      Extra part;
      stored.item[k] = Codec::store(value[k], random.get(k), part);
      if constexpr (kExtraEach<Codec>) extra.item[k] = part;
    }
  }

  // `block_largest`: of the whole block.
  FUSED_OPTIM_DEVICE void write(const Array<Codec>& to, int i, uint32_t block_largest) {
    if constexpr (kBlocked<Codec>) {
      Extra base = Codec::extra_of(block_largest);
#pragma unroll
      for (int k = 0; k < n; ++k) stored.item[k] = Codec::store(value[k], random.get(k), base);
      if (i % Codec::block == 0) to.extra[i / Codec::block] = base;
    }
    stored.write(to.stored + i);
    if constexpr (kExtraEach<Codec>) extra.write(to.extra + i);
  }
};

// A row's operands from the beginning of a chunk on.
template <class Param, class Grad, class Mu, class Nu>
struct Arrays {
  Array<Param> p;
  Array<Grad> g;
  Array<Mu> mu;
  Array<Nu> nu;
};

// `n` neighbours of each.
template <class Rule, class Param, class Grad, class Mu, class Nu, int n>
struct Neighbours {
  using T = typename Param::Working;
  using From = Arrays<Param, Grad, Mu, Nu>;

  Elements<Param, kParam, n> p;
  Elements<Grad, kParam, n> g;
  Elements<Mu, kMu, n> mu;
  Elements<Nu, kNu, n> nu;

  FUSED_OPTIM_DEVICE void read_bases(const From& from, int i) {
    mu.read_base(from.mu, i);
    nu.read_base(from.nu, i);
  }

  FUSED_OPTIM_DEVICE void read(const From& from, int i) {
    p.read(from.p, i);
    g.read(from.g, i);
    mu.read(from.mu, i);
    nu.read(from.nu, i);
    issue_reads();
  }

  // What can be encoded is at once, element by element: with eight values of each operand waiting
  // some kernels spilled at 64 registers, and now they take 53. `first`: the index in the parameter.
  FUSED_OPTIM_DEVICE void update(const Coefficients<T>& c, int64_t first, const Place& place) {
    p.random.begin(first, place);
    mu.random.begin(first, place);
    nu.random.begin(first, place);
#pragma unroll
    for (int k = 0; k < n; ++k) {
      p.decode(k);
      g.decode(k);
      mu.decode(k);
      nu.decode(k);
      if (c.grad_divisor != T(1)) g.value[k] = g.value[k] / c.grad_divisor;
      step<Rule>(p.value[k], g.value[k], mu.value[k], nu.value[k], c);
      p.encode(k);
      mu.encode(k);
      nu.encode(k);
    }
  }
};

// Neighbours that a thread takes of a full chunk: 16 bytes of 16-bit operands, 8 of 8-bit ones.
// With 16 elements of the latter ones registers would not do.
template <class T, class... Codec>
constexpr int kNeighbours = ((sizeof(typename Codec::Stored) < 4) || ...) ? 8 : sizeof(Vector) / sizeof(T);

// One thread's share of one chunk.
template <class Rule, class Param, class Grad, class Mu, class Nu>
FUSED_OPTIM_DEVICE void step_body(const CudaTask& task, int64_t block, int thread) {
  using T = typename Param::Working;
  static_assert(!kBlocked<Param> && !kBlocked<Grad>, "blocks are for moments");
  // Asked for first and looked at last: the read hides behind those of the table.
  const bool skip = skips(task);
  const Chunk chunk = read_only(task.chunks + block);
  const Row row = read_only(task.rows + chunk.row);
  const Coefficients<T> c = read_only(static_cast<const Coefficients<T>*>(task.coefficients) + row.counter);
  if (skip) return;
  const int64_t begin = (chunk.chunk >= 0 ? chunk.chunk : ~chunk.chunk) * kChunk;
  const Place place{c.count, static_cast<uint64_t>(row.key)};
  const Arrays<Param, Grad, Mu, Nu> arrays{{row.param, row.param_extra, begin},
                                           {row.grad, 0, begin},
                                           {row.mu, row.mu_extra, begin},
                                           {row.nu, row.nu_extra, begin}};

  if (chunk.chunk >= 0) {
    constexpr int n = kNeighbours<T, Param, Grad, Mu, Nu>;
    static_assert(kChunk % (kThreads * n) == 0, "a chunk must be whole rounds of all threads");
#pragma unroll 1
    for (int i = thread * n; i < kChunk; i += kThreads * n) {
      Neighbours<Rule, Param, Grad, Mu, Nu, n> x;
      x.read_bases(arrays, i);
      x.read(arrays, i);
      x.update(c, begin + i, place);
      // One after another, since what is written needs no register any more; mu last, since its
      // 8-bit codec takes the most. Else some kernels spill 8 to 24 bytes.
      x.p.write(arrays.p, i, 0);
      x.nu.write(arrays.nu, i, largest_of_lanes<Nu::block / n>(x.nu.largest()));
      x.mu.write(arrays.mu, i, largest_of_lanes<Mu::block / n>(x.mu.largest()));
    }
  } else {
    // A lane takes one element at a time, and a warp whole blocks. What a block's elements share
    // is known only when all are updated: so blocked formats update twice and write the second time.
    constexpr bool blocked = kBlocked<Mu> || kBlocked<Nu>;
    constexpr int span = blocked ? kBlockElements : kLanes;
    const int end = static_cast<int>(row.numel - begin < kChunk ? row.numel - begin : kChunk);
    Neighbours<Rule, Param, Grad, Mu, Nu, 1> x;
#pragma unroll 1
    for (int first = thread / kLanes * span; first < end; first += kThreads / kLanes * span) {
      uint32_t mu_largest = 0, nu_largest = 0;
      x.read_bases(arrays, first);
#pragma unroll 1
      for (bool write = !blocked;; write = true) {
#pragma unroll 1
        for (int i = first + thread % kLanes; i < first + span && i < end; i += kLanes) {
          x.read(arrays, i);
          x.update(c, begin + i, place);
          if (write) {
            x.p.write(arrays.p, i, 0);
            x.mu.write(arrays.mu, i, mu_largest);
            x.nu.write(arrays.nu, i, nu_largest);
          } else {
            mu_largest = maximum(x.mu.largest(), mu_largest);
            nu_largest = maximum(x.nu.largest(), nu_largest);
          }
        }
        if (write) break;
        mu_largest = largest_of_lanes<kLanes>(mu_largest);
        nu_largest = largest_of_lanes<kLanes>(nu_largest);
      }
    }
  }
}

}  // namespace fused_optim
