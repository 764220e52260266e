// The CUDA kernels. tests/cuda_on_host.cpp has a host compiler make loops of them.
#pragma once

#include <cuda_runtime.h>

#include "step_cuda.h"

#define FUSED_OPTIM_DEVICE __device__ __forceinline__

namespace fused_optim {

constexpr int kThreads = 256;
constexpr int kLanes = 32;  // of a warp
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kPrologueThreads = 128;

constexpr int kLongest = 16;  // access, in bytes: fused_optim.table.VECTOR_BYTES

template <int bytes>
struct alignas(bytes) Access {
  uint32_t word[bytes / 4];
};

// Full chunks of float32 arithmetic are stepped by fewer operations, which give the same bits where all new values are
// below this in magnitude. Where one is not, a warp steps its elements again, by the usual operations.
constexpr float kUsualLimit = 0x1p40f;

// A number that is divided, and taken the root of, by approximations that are made exact: by fewer instructions than
// a float, without a branch, and NaN for what they are not exact for. docs/numerics.md has the proofs.
struct Usual {
  float x;
  FUSED_OPTIM_DEVICE Usual(float x) : x(x) {}
  explicit FUSED_OPTIM_DEVICE operator float() const { return x; }
};
FUSED_OPTIM_DEVICE Usual operator+(Usual a, Usual b) { return a.x + b.x; }
FUSED_OPTIM_DEVICE Usual operator-(Usual a, Usual b) { return a.x - b.x; }
FUSED_OPTIM_DEVICE Usual operator*(Usual a, Usual b) { return a.x * b.x; }
FUSED_OPTIM_DEVICE Usual absolute(Usual a) { return absolute(a.x); }
FUSED_OPTIM_DEVICE Usual maximum(Usual a, Usual b) { return maximum(a.x, b.x); }

#if defined(__CUDA_ARCH__)
// a * b + c, rounded once. Braces tell assembly that is inlined from what a compiler contracts or approximates.
FUSED_OPTIM_DEVICE float fused(float a, float b, float c) {
  asm("{fma.rn.f32 %0, %1, %2, %3;}" : "=f"(a) : "f"(a), "f"(b), "f"(c));
  return a;
}
FUSED_OPTIM_DEVICE float about_reciprocal(float x) {
  asm("{rcp.approx.ftz.f32 %0, %0;}" : "+f"(x));
  return x;
}
FUSED_OPTIM_DEVICE float about_reciprocal_root(float x) {
  asm("{rsqrt.approx.ftz.f32 %0, %0;}" : "+f"(x));
  return x;
}
#else
FUSED_OPTIM_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
FUSED_OPTIM_DEVICE float about_reciprocal(float x) { return 1.0f / (absolute(x) < 0x1p-126f ? x * 0.0f : x); }
FUSED_OPTIM_DEVICE float about_reciprocal_root(float x) { return 1.0f / sqrtf(absolute(x) < 0x1p-126f ? x * 0.0f : x); }
#endif

// NaN where x is not zero and below 2^exponent. The remainder's sign is such that -0 stays -0.
FUSED_OPTIM_DEVICE float quotient(float x, float divisor, float reciprocal, int exponent) {
  const float near = x * reciprocal, exact = fused(-fused(near, divisor, -x), reciprocal, near);
  // Twice the bits have no sign, and those of a zero, less 1, are the largest.
  return bits_of(x) * 2 - 1 < (uint32_t{127} + exponent << 24) - 1 ? NAN : exact;
}
FUSED_OPTIM_DEVICE Usual operator/(Usual x, const Divisor<float>& d) {
  return d.is_one ? x : quotient(x.x, d.value, d.reciprocal, -100);
}
FUSED_OPTIM_DEVICE Usual operator/(Usual x, Usual d) {
  const float near = about_reciprocal(d.x);
  return quotient(x.x, d.x, fused(fused(-d.x, near, 1.0f), near, near), -80);
}

// What the root is taken of: with what is added to it, it takes one operation less.
struct Root {
  float of;
};
FUSED_OPTIM_DEVICE Root square_root(Usual v) { return {v.x}; }
FUSED_OPTIM_DEVICE Usual operator+(Root root, float eps) {
  // Of zero 2^-126 is taken, whose root does not change eps unless that is tiny; then, and with a large eps, it is NaN.
  const float zero = eps >= 0x1p-66f ? 0x1p-126f : 0.0f, scaled = fused(root.of, 0x1p60f, eps < 0x1p40f ? zero : NAN);
  const float inverse = about_reciprocal_root(scaled), near = scaled * inverse;
  const float exact = fused(fused(-near, near, scaled), inverse * 0.5f, near);
  return fused(exact, 0x1p-30f, eps);
}

// E4M3 where load<true> and store<true> are asked for alone. A finite code, shifted, is a float32 of the value under
// exponent 0, subnormal values too: the exponent is a power of two to multiply by, in two factors since float32 has
// none above 2^127. codecs.h's way takes four more instructions.
struct FiniteE4M3 : E4M3 {
  static FUSED_OPTIM_HD float power_of_two(uint32_t exponent) { return float_of((exponent + 127) << 23); }

  template <bool>
  static FUSED_OPTIM_HD float load(uint32_t code, uint32_t exponent) {
    const uint32_t shifted = bits_of(int_of(code << 24) >> 4) & 0x87f00000u;
    return float_of(shifted) * power_of_two(120) * power_of_two(exponent - 120);
  }

  // The larger power first: a product that it rounds is zero after the other.
  template <bool>
  static FUSED_OPTIM_HD uint32_t store(float x, uint32_t random, uint32_t exponent) {
    const uint32_t half = exponent < 126 ? exponent : 126;
    const float scaled = absolute(x) * power_of_two(half - exponent) * power_of_two(0 - half);
    return (bits_of(scaled) + (random >> 12)) >> 20 | ((bits_of(x) >> 24) & 0x80u);
  }
};

// An address that the table holds. From a bare integer the compiler would make generic accesses, which are slower.
template <class T>
FUSED_OPTIM_DEVICE T* global(int64_t address) {
  return static_cast<T*>(__cvta_global_to_generic(static_cast<size_t>(address)));
}

// What the launch does not write goes through the read-only path and tensors do not, so that machine code tells them
// apart: tests/test_cuda_compiled.py counts each.
template <class T>
FUSED_OPTIM_DEVICE T read_only(const T* p) {
  using Word = std::conditional_t<alignof(T) == 8, unsigned long long, unsigned>;
  struct Words {
    Word word[sizeof(T) / sizeof(Word)];
  } words;
#pragma unroll
  for (size_t i = 0; i < sizeof(T) / sizeof(Word); ++i) words.word[i] = __ldg(reinterpret_cast<const Word*>(p) + i);
  return bit_cast<T>(words);
}

FUSED_OPTIM_DEVICE bool skips(const CudaTask& task) {
  const bool found_inf = task.found_inf != nullptr && read_only(task.found_inf) != 0.0f;
  return found_inf || (task.clip != nullptr && read_only(task.clip + 3) != 0.0);
}

// A thread works out a counter's coefficients. Step numbers stay: without the step kernel nothing has changed.
template <class T>
__global__ void __launch_bounds__(kPrologueThreads) prologue_kernel(const CudaTask task) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPrologueThreads + threadIdx.x;
  if (i >= task.n_counters) return;
  const Counter counter = task.counters[i];
  const int64_t count = next_count(*global<const int64_t>(counter.step));
  const T grad_scale = task.grad_scale == nullptr ? T(1) : static_cast<T>(read_only(task.grad_scale));
  const T grad_factor = task.clip == nullptr ? T(1) : static_cast<T>(read_only(task.clip + 2));
  static_cast<Coefficients<T>*>(task.coefficients)[i] =
      coefficients<T>(task.hyper[counter.hyper], count, grad_scale, grad_factor);
}

// What codecs are given and return for what is stored: integers in 32 bits.
template <class Stored>
using Wide = std::conditional_t<!std::is_integral<Stored>::value, Stored,
                                std::conditional_t<std::is_signed<Stored>::value, int32_t, uint32_t>>;

// `n` neighbours as they lie in memory. Halves and bytes are taken out of words and put into them in one or two
// instructions each; of arrays of them nvcc makes two or three. `upper`: codecs have them as upper halves of 32 bits.
template <class Stored, int n, bool upper = false>
class InMemory {
  static constexpr bool kInWords = n > 1 && sizeof(Stored) < 4;
  static constexpr int kBits = 8 * sizeof(Stored);
  static constexpr size_t kBytes = n * sizeof(Stored);
  using One = std::conditional_t<n == 1, Stored, Access<kBytes % kLongest == 0 ? kLongest : 8>>;
  static constexpr int kAccesses = kBytes / sizeof(One);
  static_assert(kAccesses * sizeof(One) == kBytes, "neighbours must fill whole accesses");

 public:
  using Item = std::conditional_t<kInWords, uint32_t, Stored>;
  static constexpr int kEach = sizeof(Item) / sizeof(Stored);  // elements in an item

  alignas(One) Item item[n / kEach];

  FUSED_OPTIM_DEVICE void read(const Stored* source) { copy(item, source); }
  FUSED_OPTIM_DEVICE void write(Stored* target) const { copy(target, item); }

  FUSED_OPTIM_DEVICE Wide<Stored> get(int k) const {
    if constexpr (kInWords) {
      const uint32_t highest = item[k / kEach] << (32 - kBits - kBits * (k % kEach));
      if constexpr (upper) return highest & 0xffff0000u;
      return static_cast<Wide<Stored>>(highest) >> (32 - kBits);
    } else if constexpr (upper) {
      return static_cast<uint32_t>(item[k]) << 16;
    } else {
      return item[k];
    }
  }

  // From the first on, one after another. What `x` has beside the element does not count.
  FUSED_OPTIM_DEVICE void set(int k, Wide<Stored> x) {
    if constexpr (kInWords) {
      constexpr uint32_t halves[] = {0, upper ? 0x7632u : 0x5410u}, bytes[] = {0, 0x3240u, 0x3410u, 0x4210u};
      const uint32_t selector = kEach == 2 ? halves[k % kEach] : bytes[k % kEach];
      uint32_t& word = item[k / kEach];
      word = k % kEach == 0 ? x : __byte_perm(word, x, selector);
    } else if constexpr (upper) {
      item[k] = static_cast<Stored>(x >> 16);
    } else {
      item[k] = static_cast<Stored>(x);
    }
  }

 private:
  FUSED_OPTIM_DEVICE static void copy(void* target, const void* source) {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) static_cast<One*>(target)[i] = static_cast<const One*>(source)[i];
  }
};

// The largest of the values that `lanes` neighbouring lanes have; all lanes of the warp must ask. (Of two
// redux.sync for the two blocks of a warp nvcc makes as many instructions, and takes up to 4 registers more.)
template <int lanes>
FUSED_OPTIM_DEVICE uint32_t largest_of_lanes(uint32_t x) {
#pragma unroll
  for (int offset = lanes / 2; offset > 0; offset /= 2) x = maximum(__shfl_xor_sync(kAllLanes, x, offset), x);
  return x;
}

template <class Codec>
struct Array {
  typename Codec::Stored* stored;
  typename Codec::Aux* aux;
  int64_t first;  // element's index in the parameter
  Place place;

  FUSED_OPTIM_DEVICE Array(int64_t stored_address, int64_t aux_address, int64_t begin, int64_t offset = 0,
                           Place place = {})
      : stored(global<typename Codec::Stored>(stored_address) + begin),
        aux(global<typename Codec::Aux>(aux_address) + begin / Codec::block),
        first(begin + offset),
        place(place) {}

  FUSED_OPTIM_DEVICE typename Codec::Aux* exponent_at(uint32_t i) const { return aux + i / uint32_t{Codec::block}; }
};

// `n` neighbours of one operand. `finite`: they have the bits that Codec gives, but not where a new value is infinite,
// NaN or not below kUsualLimit in magnitude, or a code in memory is that of infinity or NaN. (A zero with a negative
// remainder, which somebody wrote to the parameter, is decoded to a NaN; so the new parameter is one too.)
template <class Codec, Operand operand, int n, bool finite = false>
struct Elements {
  using Used = std::conditional_t<finite && std::is_same<Codec, E4M3>::value, FiniteE4M3, Codec>;
  using Aux = typename Codec::Aux;

  InMemory<typename Codec::Stored, n, Codec::is_upper_half> stored, new_stored;
  InMemory<Aux, kAuxEach<Codec> ? n : 1> aux, new_aux;
  uint32_t index;
  uint64_t group;  // of Philox's bits
  Place place;
  PhiloxWords words;
  typename Codec::Working value[n];

  static_assert(Codec::random != kPhilox || (operand == kParam && (n == 1 || n == 8)), "Philox: parameters, by eight");

  FUSED_OPTIM_DEVICE uint32_t random(int k) const {
    if constexpr (Codec::random == kDither) return dither(index + static_cast<uint32_t>(k), place, operand);
    if constexpr (Codec::random == kPhilox) {
      const uint32_t i = n == 8 ? k : index % 8;
      // Not word[i / 2]: registers have no address.
      const uint32_t low = i & 2 ? words.word[1] : words.word[0];
      const uint32_t high = i & 2 ? words.word[3] : words.word[2];
      return ((i & 4 ? high : low) >> 16 * (i & 1)) & 0xffffu;
    }
    return 0;
  }

  // What a whole block has in common is read on its own, since it may be needed for longer.
  FUSED_OPTIM_DEVICE void read_exponent(const Array<Codec>& from, int i) {
    if constexpr (kBlocked<Codec>) aux.read(from.exponent_at(i));
  }

  FUSED_OPTIM_DEVICE void read(const Array<Codec>& from, int i) {
    stored.read(from.stored + i);
    if constexpr (kAuxEach<Codec>) aux.read(from.aux + i);
    index = static_cast<uint32_t>(from.first + i);
    place = from.place;
    group = static_cast<uint64_t>(from.first + i) / 8;
  }

  FUSED_OPTIM_DEVICE void decode(int k) {
    value[k] = Used::template load<finite>(stored.get(k), aux.get(kAuxEach<Codec> ? k : 0));
  }

  // Whether a code in memory is that of infinity or NaN. Four are tested at once: no sum leaves its byte.
  FUSED_OPTIM_DEVICE bool has_special_codes() const {
    uint32_t special = 0;
    if constexpr (kBlocked<Codec>) {
#pragma unroll
      for (const uint32_t codes : stored.item) {
        const uint32_t sums = (codes & 0x7f7f7f7fu) + (Codec::code_bits + 1 - Codec::infinity) * 0x01010101u;
        special |= Codec::sign_bit == 0 ? sums & codes : sums;
      }
    }
    return (special & 0x80808080u) != 0;
  }

  // Whether a new value is not usual. Of blocks largest() says so.
  FUSED_OPTIM_DEVICE bool is_special(int k) const { return !kBlocked<Codec> && !(absolute(value[k]) < kUsualLimit); }

  // Of what the block's aux depends on.
  FUSED_OPTIM_DEVICE uint32_t largest() const {
    uint32_t result = 0;
    if constexpr (kBlocked<Codec>) {
#pragma unroll
      for (const float x : value) result = maximum(finite ? Codec::finite_magnitude(x) : Codec::magnitude(x), result);
    }
    return result;
  }

  FUSED_OPTIM_DEVICE void encode(int k, Wide<Aux> part = {}) {
    new_stored.set(k, Used::template store<finite>(value[k], random(k), part));
    if constexpr (kAuxEach<Codec>) new_aux.set(k, part);
  }

  // `block_largest`: of the whole block.
  FUSED_OPTIM_DEVICE void write(const Array<Codec>& to, int i, uint32_t block_largest = 0) {
    if constexpr (kBlocked<Codec>) {
      const Aux exponent = Codec::exponent_of(block_largest);
#pragma unroll
      for (int k = 0; k < n; ++k) encode(k, exponent);
      if (i % Codec::block == 0) *to.exponent_at(i) = exponent;
    }
    new_stored.write(to.stored + i);
    if constexpr (kAuxEach<Codec>) new_aux.write(to.aux + i);
  }
};

// What full chunks of float32 arithmetic have a loop of their own for. Of branches of each element nvcc follows all
// the ways through eight of them, for hours; and without divisions by 1 a step takes a fifth less. Nesterov's is never
// late. (With a bool in its place kernels take up to 5% more instructions.)
enum Stage : uint32_t { kEarly, kLate, kNesterov };

// A row's operands from the beginning of a chunk on, and what else a step depends on.
template <class Param, class Grad, class Mu, class Nu>
struct Operands {
  Array<Param> p;
  Array<Grad> g;
  Array<Mu> mu;
  Array<Nu> nu;
  Coefficients<typename Param::Working> c;
  Stage stage;
};

template <class Rule, int n, bool finite, class Param, class Grad, class Mu, class Nu>
struct Neighbours {
  using T = typename Param::Working;
  using From = Operands<Param, Grad, Mu, Nu>;

  Elements<Param, kParam, n, finite> p;
  Elements<Grad, kParam, n> g;
  Elements<Mu, kMu, n, finite> mu;
  Elements<Nu, kNu, n, finite> nu;

  FUSED_OPTIM_DEVICE void read(const From& from, int i) {
    p.read(from.p, i);
    g.read(from.g, i);
    mu.read(from.mu, i);
    nu.read(from.nu, i);
    asm volatile("" ::: "memory");  // all of it before anything else, so that reads wait together
  }

  // Returns whether a new value is special, where no block says so.
  template <bool usual>
  FUSED_OPTIM_DEVICE bool update(const From& operands) {
    // Not while they are read, when these words take registers.
    if constexpr (Param::random == kPhilox) p.words = philox(p.group, p.place);
    Coefficients<T> c = operands.c;
    c.grad_divisor.is_one = c.bias_correction1.is_one = c.bias_correction1_next.is_one = c.bias_correction2.is_one = 0;
    using Number = std::conditional_t<usual, Usual, T>;
    c.nesterov = operands.stage == kNesterov;
    if (!usual || c.nesterov) return update_each<Number>(c);
    if (operands.stage == kEarly) return update_each<Number>(c);  // apart: here nesterov is known to be 0
    c.bias_correction1.is_one = c.bias_correction2.is_one = 1;
    return update_each<Number>(c);
  }

 private:
  // What can be encoded is at once: with eight values of each operand waiting some kernels spilled at 64 registers.
  template <class Number>
  FUSED_OPTIM_DEVICE bool update_each(const Coefficients<T>& c) {
    bool special = false;
#pragma unroll
    for (int k = 0; k < n; ++k) {
      p.decode(k);
      g.decode(k);
      mu.decode(k);
      nu.decode(k);
      Number new_p = p.value[k], grad = g.value[k], new_mu = mu.value[k], new_nu = nu.value[k];
      // One branch for both: a factor's own test takes an instruction of each element.
      if (c.grad_divisor.value != T(1) || c.grad_factor != T(1)) {
        if (c.grad_divisor.value != T(1)) grad = grad / c.grad_divisor;
        grad = grad * c.grad_factor;
      }
      step<Rule>(new_p, grad, new_mu, new_nu, c);
      p.value[k] = static_cast<T>(new_p);
      mu.value[k] = static_cast<T>(new_mu);
      nu.value[k] = static_cast<T>(new_nu);
      special |= p.is_special(k) | mu.is_special(k) | nu.is_special(k);
      p.encode(k);
      if constexpr (kBlocked<Mu>) continue;  // the block's exponent is not known yet
      mu.encode(k);
      nu.encode(k);
    }
    return special;
  }
};

// Neighbours that a thread takes of a full chunk: 16 bytes of 16-bit operands, 8 of 8-bit ones, for want of registers.
template <class T, class... Codec>
constexpr int kNeighbours = ((sizeof(typename Codec::Stored) < 4) || ...) ? 8 : kLongest / sizeof(T);

// A thread's `n` elements from `i` on of a full chunk. Where a lane of the warp has a special value it writes nothing
// and returns false, or, where all is float32, steps them once more: a moment that no gradient comes to any more decays
// to a subnormal number and stays there. (With other parameters the kernels spill 16 to 32 bytes.) Float64 has none.
template <class Rule, int n, class Param, class Grad, class Mu, class Nu>
FUSED_OPTIM_DEVICE bool step_neighbours(const Operands<Param, Grad, Mu, Nu>& operands, int i) {
  constexpr bool usual = std::is_same<typename Param::Working, float>::value;
  Neighbours<Rule, n, Mu::low_precision, Param, Grad, Mu, Nu> x;
  x.mu.read_exponent(operands.mu, i);
  x.nu.read_exponent(operands.nu, i);
  x.read(operands, i);
  bool special = x.mu.has_special_codes() | x.nu.has_special_codes();
  special |= x.template update<usual>(operands);
  const uint32_t mu_largest = x.mu.largest(), nu_largest = x.nu.largest();
  special |= maximum(mu_largest, nu_largest) >= bits_of(kUsualLimit);
  if (usual && __any_sync(kAllLanes, special)) {
    if constexpr (n == 8) return false;
    x.template update<false>(operands);
  }
  // What is written needs no register any more, and mu's codec takes the most. Else some kernels spill 8 to 24 bytes.
  x.p.write(operands.p, i);
  x.nu.write(operands.nu, i, largest_of_lanes<Nu::block / n>(nu_largest));
  x.mu.write(operands.mu, i, largest_of_lanes<Mu::block / n>(mu_largest));
  return true;
}

// Elements that a warp takes at a time where each lane takes one: whole blocks.
template <class Mu>
constexpr int kSpan = kBlocked<Mu> ? kBlockElements : kLanes;

// Spans, from `first` to `end` and `stride` apart, of any values and alignment. Blocked formats update twice, since
// what a block's elements share is known only then, and write the second time.
template <class Rule, class Param, class Grad, class Mu, class Nu>
FUSED_OPTIM_DEVICE void step_spans(const Operands<Param, Grad, Mu, Nu>& operands, int first, int end, int stride,
                                   int lane) {
  Neighbours<Rule, 1, false, Param, Grad, Mu, Nu> x;
#pragma unroll 1
  for (; first < end; first += stride) {
    uint32_t mu_largest = 0, nu_largest = 0;
    x.mu.read_exponent(operands.mu, first);
    x.nu.read_exponent(operands.nu, first);
#pragma unroll 1
    for (bool write = !kBlocked<Mu>;; write = true) {
#pragma unroll 1
      for (int i = first + lane; i < first + kSpan<Mu> && i < end; i += kLanes) {
        x.read(operands, i);
        x.template update<false>(operands);
        if (write) {
          x.p.write(operands.p, i);
          x.mu.write(operands.mu, i, mu_largest);
          x.nu.write(operands.nu, i, nu_largest);
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

// Blocks that a multiprocessor must have registers for: 64 a thread, or 80 where arithmetic takes pairs. Then some
// 64 KiB of loads are in flight, or 48 with 8-bit moments, several times what hides the latency of an H100's memory.
template <class T>
constexpr int kResidentBlocks = sizeof(T) == 8 ? 3 : 4;

// A block steps a chunk; one more writes the new step numbers, which no other block reads.
template <class Rule, class Param, class Grad, class Mu, class Nu>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<typename Param::Working>)
    step_kernel(const CudaTask task) {
  const int64_t block = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  using T = typename Param::Working;
  static_assert(!kBlocked<Param> && !kBlocked<Grad> && kBlocked<Mu> == kBlocked<Nu>, "blocks are for moments");
  constexpr int n = kNeighbours<T, Param, Grad, Mu, Nu>, round = kThreads * n, span = kSpan<Mu>;
  static_assert(kChunk % round == 0, "a chunk must be whole rounds of all threads");
  static_assert(kLanes * n % span == 0, "a warp's neighbours must be whole spans");
  const auto* const coefficients = static_cast<const Coefficients<T>*>(task.coefficients);
  if (block == task.n_chunks) {
    if (skips(task)) return;
#pragma unroll 1
    for (int64_t i = thread; i < task.n_counters; i += kThreads)
      *global<int64_t>(task.counters[i].step) = read_only(&coefficients[i].count);
    return;
  }
  // Asked for first and looked at last: the read hides behind those of the table.
  const bool skip = skips(task);
  const Chunk chunk = read_only(task.chunks + block);
  const Row row = read_only(task.rows + chunk.row);
  const Coefficients<T> c = read_only(coefficients + row.counter);
  if (skip) return;
  const bool full = chunk.chunk >= 0;
  const int64_t begin = (full ? chunk.chunk : ~chunk.chunk) * kChunk;
  const Place place{c.count, static_cast<uint64_t>(row.key)};
  const Operands<Param, Grad, Mu, Nu> operands{
      {row.param, row.param_aux, begin, row.offset, place}, {read_only(task.grads + chunk.row), 0, begin},
      {row.mu, row.mu_aux, begin, row.offset, place}, {row.nu, row.nu_aux, begin, row.offset, place}, c,
      c.nesterov ? kNesterov : c.bias_correction1.is_one && c.bias_correction2.is_one ? kLate : kEarly};
  const int lane = thread % kLanes;
  int i = thread * n;
  // A warp that meets a special value steps its round as spans, by the code that short chunks have.
#pragma unroll 1
  do {
    int first = thread / kLanes * span, end = kChunk, stride = kThreads / kLanes * span;
    if (full) {
      if (step_neighbours<Rule, n>(operands, i)) continue;
      first = i - lane * n;
      end = first + kLanes * n;
      stride = span;
    } else {
      // Read again: kept until here it takes registers, and of 64 some spill.
      const int64_t left = read_only(&task.rows[chunk.row].numel) - ~chunk.chunk * kChunk;
      if (left < kChunk) end = static_cast<int>(left);
    }
    step_spans<Rule>(operands, first, end, stride, lane);
  } while (full && (i += round) < kChunk);
}

// The gradients' norm: a warp takes a chunk, and a thread of it kNormEach neighbouring lanes of the sum.
constexpr int kNormWarps = kThreads / kLanes, kNormEach = kNormLanes / kLanes;

FUSED_OPTIM_DEVICE double tree_sum(double (&lanes)[kNormEach]) {
#pragma unroll
  for (int n = kNormEach / 2; n > 0; n /= 2) {
#pragma unroll
    for (int k = 0; k < n; ++k) lanes[k] = lanes[2 * k] + lanes[2 * k + 1];
  }
  double sum = lanes[0];
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  return sum;
}

template <int n, class Grad, class T>
FUSED_OPTIM_DEVICE void add_squares(double* lanes, const Array<Grad>& g, int i, T scale) {
  Elements<Grad, kParam, n> x;
  x.read(g, i);
#pragma unroll
  for (int k = 0; k < n; ++k) {
    x.decode(k);
    const double wide = static_cast<double>(scale == T(1) ? x.value[k] : x.value[k] / scale);
    lanes[k] += wide * wide;
  }
}

template <class Grad>
__global__ void __launch_bounds__(kThreads) square_sums_kernel(const NormTask task) {
  using T = typename Grad::Working;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kNormWarps + thread / kLanes;
  if (number >= task.n_chunks) return;
  const NormChunk chunk = read_only(task.chunks + number);
  const Row row = read_only(task.rows + chunk.row);
  const bool full = chunk.chunk >= 0;
  const int64_t begin = (full ? chunk.chunk : ~chunk.chunk) * kNormChunk;
  const Array<Grad> g(read_only(task.grads + chunk.row), 0, begin);
  const T scale = task.grad_scale == nullptr ? T(1) : static_cast<T>(read_only(task.grad_scale));
  double lanes[kNormEach] = {};
  if (full) {
#pragma unroll 4
    for (int i = lane * kNormEach; i < kNormChunk; i += kNormLanes) add_squares<kNormEach>(lanes, g, i, scale);
  } else {
    const int length = static_cast<int>(row.numel - begin < kNormChunk ? row.numel - begin : kNormChunk);
#pragma unroll 1
    for (int i = lane * kNormEach; i < length; i += kNormLanes) {
#pragma unroll
      for (int k = 0; k < kNormEach; ++k)
        if (i + k < length) add_squares<1>(lanes + k, g, i + k, scale);
    }
  }
  const double sum = tree_sum(lanes);
  if (lane == 0) task.sums[chunk.place] = sum;
}

// One warp; T: of the sums.
template <class T>
__global__ void __launch_bounds__(kLanes) clip_kernel(const ClipTask task) {
  const int lane = static_cast<int>(threadIdx.x);
  T lanes[kNormEach] = {};
#pragma unroll 4
  for (int64_t i = lane * kNormEach; i < task.n; i += kNormLanes) {
#pragma unroll
    for (int k = 0; k < kNormEach; ++k)
      if (i + k < task.n) lanes[k] += read_only(task.sums + i + k);
  }
  const T total = tree_sum(lanes), norm = square_root(total);
  const T coefficient = read_only(task.max_grad_norm) / (norm + 1e-6);
  if (lane != 0) return;
  const bool skip = task.skipped != nullptr && norm - norm != 0;
  task.clip[0] = total;
  task.clip[1] = norm;
  task.clip[2] = coefficient > 1 ? 1 : coefficient;
  task.clip[3] = skip ? 1.0 : 0.0;
  if (skip) ++*task.skipped;
}

using Kernel = void (*)(CudaTask);

// The step kernel among those of one part, null where there is none. Defined in step_cuda_kernels.cu.
template <int part>
Kernel find_step(const Names& names);

}  // namespace fused_optim
